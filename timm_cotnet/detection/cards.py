"""Cards and configs of the detectors' Hub repositories. `card_template.md` is their text, with `$names` to fill in."""
import json
from pathlib import Path
from string import Template
from typing import Any, Dict

from ..cards import front_matter
from ..hub import DEFAULT_NAMESPACE
from ..published import DETECTION_URL, PAPER_URL, PUBLISHED
from .published import CHECKPOINTS_URL, COCO_CATEGORIES, KINDS, PUBLISHED_DETECTORS, PublishedDetector

__all__ = ['detector_card_files', 'published_config']

_UPLOADED = 'The `model.safetensors` of this repository has the sha256 `{}`.\nTo make it yourself, download the {} from'
_NOT_UPLOADED = (
    f"**The weights are not on the Hub yet** in the account `{DEFAULT_NAMESPACE}`, where `weights='coco'` looks for "
    'them.\nUntil they are, download the {} from')


def published_config(name: str) -> Dict[str, Any]:
    """What `config.json` says of an official detector.

    Args:
        name: Detector and tag.
    """
    facts = PUBLISHED_DETECTORS[name]
    return {
        'detector': facts.kind, 'backbone': facts.backbone, 'num_classes': len(COCO_CATEGORIES),
        'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.229, 0.224, 0.225],
        'categories': list(COCO_CATEGORIES),
    }


def detector_card_files(name: str, config: Dict[str, Any]) -> Dict[str, str]:
    """The text files of the Hub repository of a detector, by file name.

    Args:
        name: Detector, with its tag if it is an official one.
        config: Content of `config.json`.
    """
    text = _card(name) if name in PUBLISHED_DETECTORS else _plain_card(name, config)
    return {'README.md': text, 'config.json': json.dumps(config, indent=2) + '\n'}


def _card(name: str) -> str:
    facts = PUBLISHED_DETECTORS[name]
    backbone = PUBLISHED[f'{facts.backbone}.jd_in1k'].name
    checkpoint = f'checkpoint of {KINDS[facts.kind]} with {backbone}'
    template = Template(Path(__file__).with_name('card_template.md').read_text(encoding='utf-8'))
    return template.substitute(
        front_matter=front_matter(_metadata(name, facts)),
        name=name,
        kind=KINDS[facts.kind],
        model=backbone,
        backbone_card=f'https://huggingface.co/{DEFAULT_NAMESPACE}/{facts.backbone}.jd_in1k',
        backbone=facts.backbone,
        function=facts.kind,
        paper_url=PAPER_URL,
        detection_url=DETECTION_URL,
        checkpoints_url=CHECKPOINTS_URL,
        box_ap=f'{facts.box_ap:.2f}',
        mask_ap='-' if facts.mask_ap is None else f'{facts.mask_ap:.2f}',
        weights_note=(_UPLOADED.format(facts.sha256, checkpoint) if facts.sha256 else _NOT_UPLOADED.format(checkpoint)),
        outputs='boxes, labels, scores' + ('' if facts.mask_ap is None else ', masks'),
        results=_results(name),
    )


def _metadata(name: str, facts: PublishedDetector) -> Dict[str, Any]:
    """Metadata of a card, as the Hub reads it."""
    dataset = {'name': 'COCO 2017', 'type': 'coco', 'split': 'val2017'}
    source = {'name': 'JDAI-CV/CoTNet-ObjectDetection-InstanceSegmentation', 'url': DETECTION_URL}
    results = [{
        'task': {'type': 'object-detection', 'name': 'Object Detection'}, 'dataset': dict(dataset),
        'metrics': [{'type': 'box AP', 'name': 'Box AP (reported by the authors)', 'value': facts.box_ap}],
        'source': dict(source)}]
    if facts.mask_ap is not None:
        results.append({
            'task': {'type': 'image-segmentation', 'name': 'Instance Segmentation'}, 'dataset': dict(dataset),
            'metrics': [{'type': 'mask AP', 'name': 'Mask AP (reported by the authors)', 'value': facts.mask_ap}],
            'source': dict(source)})
    task = 'object-detection' if facts.mask_ap is None else 'image-segmentation'
    return {
        'license': 'apache-2.0',
        'library_name': 'timm-cotnet',
        'pipeline_tag': task,
        'tags': [task, 'torchvision', 'timm', 'cotnet', 'contextual-transformer'],
        'datasets': ['coco'],
        'model-index': [{'name': name, 'results': results}],
    }


def _results(name: str) -> str:
    """Table of the official detectors with this backbone, and of this kind with other backbones."""
    this = PUBLISHED_DETECTORS[name]
    rows = ['| detector | box AP | mask AP |', '| --- | --- | --- |']
    for other, facts in PUBLISHED_DETECTORS.items():
        if facts.kind == this.kind or facts.backbone == this.backbone:
            shown = f'**{other}**' if other == name else other
            mask_ap = '-' if facts.mask_ap is None else f'{facts.mask_ap:.2f}'
            rows.append(f'| {shown} | {facts.box_ap:.2f} | {mask_ap} |')
    return '\n'.join(rows)


def _plain_card(name: str, config: Dict[str, Any]) -> str:
    """Card of converted weights that are none of the official detectors'."""
    task = 'image-segmentation' if 'mask' in config['detector'] else 'object-detection'
    metadata = {'license': 'apache-2.0', 'library_name': 'timm-cotnet', 'pipeline_tag': task, 'tags': [task, 'cotnet']}
    return front_matter(metadata) + f"""
# {name}

{KINDS[config['detector']]} on {config['backbone']}, a backbone of [Contextual Transformer Networks for Visual
Recognition]({PAPER_URL}), converted by `timm-cotnet` from a detectron2 checkpoint. It has
{config['num_classes']} classes, the background included. No accuracy is stated, as none was published for these
weights.

```python
from timm_cotnet.detection import {config['detector']}

model = {config['detector']}(
    {config['backbone']!r}, weights='path/to/this/folder', num_classes={config['num_classes']})
```
"""
