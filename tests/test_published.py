"""The published facts agree with the facts taken from the official repositories, and with the models."""
import json
from pathlib import Path

import pytest
import timm

from timm_cotnet.cotnet import default_cfgs
from timm_cotnet.published import PUBLISHED

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'variants.json').read_text())['variants']
OFFICIAL_NAMES = {'se_cotnetd_152.jd_in1k_320': 'se_cotnetd_152_L'}


def test_every_tag_with_published_weights_has_its_facts():
    tags = [f'{variant}.{tag}' for variant, cfg in default_cfgs.items() for tag in cfg.tags if tag.startswith('jd_')]
    assert sorted(PUBLISHED) == sorted(tags)
    assert len(tags) == sum(entry['published'] is not None for entry in GOLDEN.values()) == 8


@pytest.mark.parametrize('tag', PUBLISHED)
def test_facts_agree_with_the_golden_ones(tag):
    facts = PUBLISHED[tag]
    golden = GOLDEN[OFFICIAL_NAMES.get(tag, tag.split('.')[0])]
    size = timm.get_pretrained_cfg(tag).input_size[-1]
    assert (facts.name, facts.url) == (golden['published']['name'], golden['published']['weights'])
    assert (facts.top1, facts.top5) == (golden['published']['top1'], golden['published']['top5'])
    assert facts.params == golden['num_params']
    assert facts.gmacs == golden['measured_gmacs'][str(size)]
    assert golden['eval_config']['input_size'] == [3, size, size]


@pytest.mark.parametrize('tag, box, mask', [
    ('cotnet50.jd_in1k', [43.50, 46.11, 44.06, 46.94], [39.28, 40.25]),
    ('cotnext50_2x48d.jd_in1k', [44.06, 46.79, 44.47, 47.63], [39.62, 40.76]),
    ('se_cotnetd_50.jd_in1k', [43.96, 46.77, 44.16, 47.44], [39.38, 40.73]),
    ('cotnet101.jd_in1k', [45.35, 48.19, 46.17, 48.97], [40.86, 41.98]),
    ('cotnext101_2x48d.jd_in1k', [46.10, 49.02, 46.66, 49.35], [41.21, 42.20]),
    ('se_cotnetd_101.jd_in1k', [45.66, 49.02, 46.67, 49.24], [41.53, 42.38]),
])
def test_coco_results(tag, box, mask):
    coco = PUBLISHED[tag].coco
    assert [coco.faster_rcnn, coco.cascade_rcnn, coco.mask_rcnn[0], coco.cascade_mask_rcnn[0]] == box
    assert [coco.mask_rcnn[1], coco.cascade_mask_rcnn[1]] == mask
