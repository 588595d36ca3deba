"""Cards of the official detectors: what the Hub reads, the authors' numbers, and code that runs."""
import re

import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard

from timm_cotnet import detection
from timm_cotnet.detection.published import PUBLISHED_DETECTORS


@pytest.mark.parametrize('name', PUBLISHED_DETECTORS)
def test_metadata_and_numbers(name):
    facts = PUBLISHED_DETECTORS[name]
    card = ModelCard.load(ROOT / 'hub_cards' / name / 'README.md')
    found = [(result.metric_name, result.metric_value) for result in card.data.eval_results]
    expected = [('Box AP (reported by the authors)', facts.box_ap)]
    expected += [] if facts.mask_ap is None else [('Mask AP (reported by the authors)', facts.mask_ap)]
    assert found == expected and card.data.license == 'apache-2.0' and card.data.model_name == name
    masks = '-' if facts.mask_ap is None else f'{facts.mask_ap:.2f}'
    assert f'| **{name}** | {facts.box_ap:.2f} | {masks} |' in card.text
    assert 'not on the Hub yet' in card.text and '$' not in card.text


def test_code_runs(monkeypatch):
    """With a stand-in for the detector, that says what it was asked for."""
    name = 'cascade_mask_rcnn_cotnet50_fpn.jd_coco'
    text = (ROOT / 'hub_cards' / name / 'README.md').read_text()
    asked = []

    class Detector(torch.nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__()
            asked.append((args, kwargs))

        def forward(self, images):
            return [dict(labels=torch.tensor([1, 13])) for _ in images]

    monkeypatch.setattr(detection, 'cascade_mask_rcnn_cotnet_fpn', Detector)
    names = {}
    for block in re.findall(r'```python\n(.*?)```', text, flags=re.S):
        exec(block, names)
    assert asked == [(('cotnet50',), dict(weights='coco')), (('cotnet50',), dict(weights='coco', num_classes=3))]
    assert names['names'] == ['person', 'stop sign']
