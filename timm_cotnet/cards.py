"""The Hub repositories' cards and configs, from the registry and the published facts: `python -m timm_cotnet.cards`.

`card_template.md` is the text of a card; its `$names` are filled in here.
"""
import argparse
import json
import re
import sys
from pathlib import Path
from string import Template
from typing import Any, Dict, List, Optional

import timm
import torch
import yaml
from timm.models import filter_pretrained_cfg

from .hub import DEFAULT_NAMESPACE
from .published import CODE_URL, DETECTION_URL, PAPER_URL, PUBLISHED, Published

__all__ = ['card_files', 'front_matter', 'plain_card_files']

# (name, image size, parameters in millions, top-1, top-5), from results/results-imagenet.csv of timm's repository
TIMM_RESULTS = [
    ('resnet50.a1_in1k', 224, 25.56, 80.382, 94.598),
    ('resnest50d.in1k', 224, 27.48, 80.958, 95.372),
    ('resnext50_32x4d.a1h_in1k', 224, 25.03, 81.140, 95.320),
    ('seresnext50_32x4d.racm_in1k', 224, 27.56, 81.268, 95.624),
    ('swin_tiny_patch4_window7_224.ms_in1k', 224, 28.29, 81.388, 95.540),
    ('halonet50ts.a1h_in1k', 256, 22.73, 81.640, 95.612),
    ('convnext_tiny.fb_in1k', 224, 28.59, 82.066, 95.854),
    ('resnet101.a1h_in1k', 224, 44.55, 81.950, 95.760),
    ('ecaresnet101d.miil_in1k', 224, 44.57, 82.180, 96.062),
    ('resnest101e.in1k', 256, 48.28, 82.916, 96.310),
    ('convnext_small.fb_in1k', 224, 50.22, 83.144, 96.432),
    ('regnety_080.ra3_in1k', 224, 39.18, 83.166, 96.480),
    ('swin_small_patch4_window7_224.ms_in1k', 224, 49.61, 83.228, 96.326),
    ('resnet152d.ra2_in1k', 256, 60.21, 83.160, 96.370),
    ('seresnet152d.ra2_in1k', 256, 66.84, 83.702, 96.794),
    ('resnest200e.in1k', 320, 70.20, 83.880, 96.880),
    ('resnet200d.ra2_in1k', 320, 64.69, 83.976, 96.820),
    ('seresnet152d.ra2_in1k', 320, 66.84, 84.344, 97.044),
]
COMPARABLE = 1.35  # largest ratio of the numbers of parameters in the comparison


def card_files(name: str) -> Dict[str, str]:
    """The text files of the Hub repository of a model with published weights, by file name.

    Args:
        name: Variant and tag.
    """
    with torch.device('meta'):
        model = timm.create_model(name)
    return {'README.md': _card(name, model), 'config.json': _config(model), 'figure.svg': _figure(name)}


def plain_card_files(model: torch.nn.Module, taken: str) -> Dict[str, str]:
    """The text files that stand beside converted weights which were not published for ImageNet.

    Args:
        model: The converted model.
        taken: Where its weights were in the checkpoint.
    """
    cfg = model.pretrained_cfg
    metadata = {'license': cfg['license'], 'library_name': 'timm', 'tags': ['timm', 'image-feature-extraction']}
    if model.num_classes:
        metadata.update(tags=['timm', 'image-classification'], pipeline_tag='image-classification')
    text = f"""
# {cfg['architecture']}

{cfg['architecture']} of [Contextual Transformer Networks for Visual Recognition]({PAPER_URL}),
converted by `timm-cotnet` from the {taken}. The model has {model.num_classes or 'no'} classes.
No accuracy is stated, as none was published for these weights.

```python
import timm

model = timm.create_model('local-dir:path/to/this/folder', pretrained=True)
```
"""
    return {'README.md': front_matter(metadata) + text, 'config.json': _config(model)}


def _config(model: torch.nn.Module) -> str:
    """A `config.json` in timm's layout, the same whatever timm's version."""
    pretrained_cfg = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True)
    config = {
        'architecture': pretrained_cfg.pop('architecture'),
        'num_classes': model.num_classes,
        'num_features': model.num_features,
        'global_pool': 'avg',
        'pretrained_cfg': pretrained_cfg,
    }
    return json.dumps(config, indent=2) + '\n'


def front_matter(metadata: Dict[str, Any]) -> str:
    """The block of metadata that a card begins with.

    Args:
        metadata: What the Hub reads.
    """
    return f'---\n{yaml.safe_dump(metadata, sort_keys=False, width=120)}---\n'


def _metadata(name: str, facts: Published) -> Dict[str, Any]:
    """Metadata of a card, as the Hub reads it."""
    return {
        'license': 'apache-2.0',
        'library_name': 'timm',
        'pipeline_tag': 'image-classification',
        'tags': ['image-classification', 'timm', 'transformers', 'cotnet', 'contextual-transformer'],
        'datasets': ['imagenet-1k'],
        'metrics': ['accuracy'],
        'model-index': [{'name': name, 'results': [_imagenet_result(facts), *_coco_results(facts)]}],
    }


def _imagenet_result(facts: Published) -> Dict[str, Any]:
    return {
        'task': {'type': 'image-classification', 'name': 'Image Classification'},
        'dataset': {'name': 'ImageNet-1k', 'type': 'imagenet-1k', 'split': 'validation'},
        'metrics': [
            {'type': 'accuracy', 'name': 'Top-1 accuracy (reported by the authors)', 'value': facts.top1},
            {'type': 'accuracy', 'name': 'Top-5 accuracy (reported by the authors)', 'value': facts.top5},
        ],
        'source': {'name': 'JDAI-CV/CoTNet', 'url': CODE_URL},
    }


def _coco_results(facts: Published) -> List[Dict[str, Any]]:
    if facts.coco is None:
        return []
    dataset = {'name': 'COCO 2017', 'type': 'coco', 'split': 'val2017'}
    source = {'name': 'JDAI-CV/CoTNet-ObjectDetection-InstanceSegmentation', 'url': DETECTION_URL}
    boxes, masks = [], []
    for detector, box, mask in _coco_rows(facts):
        name = f'{detector} with this backbone (reported by the authors)'
        boxes.append({'type': 'box AP', 'name': f'Box AP, {name}', 'value': box})
        if mask is not None:
            masks.append({'type': 'mask AP', 'name': f'Mask AP, {name}', 'value': mask})
    return [
        {'task': {'type': 'object-detection', 'name': 'Object Detection'}, 'dataset': dict(dataset), 'metrics': boxes,
         'source': dict(source)},
        {'task': {'type': 'image-segmentation', 'name': 'Instance Segmentation'}, 'dataset': dict(dataset),
         'metrics': masks, 'source': dict(source)},
    ]


def _coco_rows(facts: Published):
    """Detector, box AP, mask AP."""
    coco = facts.coco
    return [
        ('Faster R-CNN', coco.faster_rcnn, None),
        ('Cascade R-CNN', coco.cascade_rcnn, None),
        ('Mask R-CNN', *coco.mask_rcnn),
        ('Cascade Mask R-CNN', *coco.cascade_mask_rcnn),
    ]


def _card(name: str, model: torch.nn.Module) -> str:
    facts = PUBLISHED[name]
    variant, tag = name.split('.')
    cfg = model.pretrained_cfg
    size = cfg['input_size'][-1]
    template = Template(Path(__file__).with_name('card_template.md').read_text(encoding='utf-8'))
    text = template.substitute(
        front_matter=front_matter(_metadata(name, facts)),
        name=name,
        variant=variant,
        model=facts.name,
        description=_description(variant),
        paper_url=PAPER_URL,
        code_url=CODE_URL,
        params=f'{facts.params / 1e6:.1f}',
        gmacs=f'{facts.gmacs:.2f}',
        size=size,
        crop_pct=cfg['crop_pct'],
        interpolation=cfg['interpolation'],
        top1=facts.top1,
        top5=facts.top5,
        resolution_note=_RESOLUTION_NOTES.get(name, ''),
        weights_note=_UPLOADED.format(facts.sha256) if facts.sha256 else _NOT_UPLOADED,
        checkpoint=f'{variant}{tag.removeprefix("jd_in1k")}.pth.tar',
        checkpoint_url=facts.url,
        namespace=DEFAULT_NAMESPACE,
        feature_shapes=_feature_shapes(model, size),
        num_features=model.num_features,
        comparison=_comparison(name),
        coco=_coco_section(facts),
        training=_TRAINING.get(name, _DEFAULT_TRAINING),
    )
    return re.sub('\n{3,}', '\n\n', text)  # a section that is left out leaves empty lines


def _description(variant: str) -> str:
    if variant.startswith('se_cotnetd'):
        return 'a network of split-attention blocks and Contextual Transformer (CoT) blocks, with a deep stem'
    if variant.startswith('cotnext'):
        return 'a ResNeXt with Contextual Transformer (CoT) layers in place of its 3x3 convolutions'
    return 'a ResNet with Contextual Transformer (CoT) layers in place of its 3x3 convolutions'


_RESOLUTION_NOTES = {
    'se_cotnetd_152.jd_in1k': '''\
The authors' table names a resolution of 224 for this model and 17.0 GFLOPs. These are the operations of a 256 x 256
input (12.90 GMACs at 224, 16.84 at 256), and the official default config evaluates at 256 with crop 0.888; so does this
one.''',
    'se_cotnetd_152.jd_in1k_320': '''\
The same network as `se_cotnetd_152.jd_in1k` with other weights, evaluated at 320 x 320. The official code calls it
`se_cotnetd_152_L`.''',
}

_UPLOADED = '''\
The `model.safetensors` of this repository has the sha256 `{}`.
To make it yourself, download the authors' checkpoint from'''
_NOT_UPLOADED = f'''\
**The weights are not on the Hub yet** in the account `{DEFAULT_NAMESPACE}`, where `pretrained=True` looks for them.
Until they are, `local-dir:`, as below, takes the place of the model's name. Download the authors' checkpoint from'''

_DEFAULT_TRAINING = (
    'By the authors, for 350 epochs: SGD with momentum 0.9 and a cosine schedule, RandAugment, mixup 0.8, CutMix 1.0,\n'
    f'label smoothing 0.1, dropout 0.25, stochastic depth. The configs are in the [official repository]({CODE_URL}).')
_TRAINING = {
    'se_cotnetd_152.jd_in1k_320':
        f'By the authors. The config of this checkpoint is not in the [official repository]({CODE_URL}).',
}


def _feature_shapes(model: torch.nn.Module, size: int) -> str:
    shapes = [(1, info['num_chs'], size // info['reduction'], size // info['reduction']) for info in model.feature_info]
    return '\n'.join(f'# {shape}' for shape in shapes)


def _comparable(name: str):
    """Rows like those of `TIMM_RESULTS`, of all models that have a similar number of parameters, best first."""
    own = [
        (other, timm.get_pretrained_cfg(other).input_size[-1], facts.params / 1e6, facts.top1, facts.top5)
        for other, facts in PUBLISHED.items()]
    params = PUBLISHED[name].params / 1e6
    return sorted(
        (row for row in own + TIMM_RESULTS if max(row[2] / params, params / row[2]) < COMPARABLE),
        key=lambda row: row[3], reverse=True)


def _comparison(name: str) -> str:
    rows = ['| model | image size | parameters (M) | top-1 | top-5 | numbers by |', '| --- ' * 6 + '|']
    for other, size, params, top1, top5 in _comparable(name):
        shown = f'**{other}**' if other == name else other
        source = 'authors' if other in PUBLISHED else 'timm'
        rows.append(f'| {shown} | {size} | {params:.1f} | {top1:.1f} | {top5:.1f} | {source} |')
    return '\n'.join(rows)


def _coco_section(facts: Published) -> str:
    if facts.coco is None:
        return ''
    rows = '\n'.join(
        f'| {detector} | {box:.2f} | {"-" if mask is None else f"{mask:.2f}"} |'
        for detector, box, mask in _coco_rows(facts))
    return f'''\
### As a backbone on COCO

Reported by the authors for detectors with this backbone, FPN and a 1x schedule, on COCO 2017
([official repository]({DETECTION_URL})). The weights here are those before the training on COCO.

| detector | box AP | mask AP |
| --- | --- | --- |
{rows}'''


def _figure(name: str) -> str:
    """SVG: top-1 accuracy over the number of parameters of all CoT models and of timm's models in `TIMM_RESULTS`."""
    width, height, left, bottom, top, right = 760, 400, 60, 350, 20, 740
    low, high, most = 80.0, 85.0, 80.0

    def place(params, top1):
        return left + (right - left) * params / most, bottom - (bottom - top) * (top1 - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        '<style>text {font-size: 13px}</style>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for top1 in range(int(low), int(high) + 1):
        y = place(0, top1)[1]
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{top1}</text>')
    for params in range(0, int(most) + 1, 10):
        parts.append(f'<text x="{place(params, 0)[0]:.1f}" y="{bottom + 18}" text-anchor="middle">{params}</text>')
    parts.append(f'<text x="{(left + right) / 2:.1f}" y="{bottom + 38}" text-anchor="middle">parameters (M)</text>')
    parts.append(f'<text x="{left + 6}" y="{top + 8}">ImageNet-1k top-1 (%)</text>')
    note = 'gray: models of timm, its results'
    parts.append(f'<text x="{right}" y="{bottom - 10}" text-anchor="end" fill="#777777">{note}</text>')
    for other, size, params, top1, _ in TIMM_RESULTS:
        x, y = place(params, top1)
        title = f'<title>{other}, {size} x {size}</title>'
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#aaaaaa">{title}</circle>')
    for other, facts in PUBLISHED.items():
        x, y = place(facts.params / 1e6, facts.top1)
        style = 'r="7" fill="#d1350f"' if other == name else 'r="5" fill="#2166ac"'
        weight = ' font-weight="bold"' if other == name else ''
        hybrid = facts.name.startswith('SE')  # its label goes to the upper left, where nothing is
        side = f'x="{x - 8:.1f}" text-anchor="end"' if hybrid or facts.params < 25e6 else f'x="{x + 8:.1f}"'
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" {style}/>')
        parts.append(f'<text {side} y="{y - 8 if hybrid else y + 16:.1f}"{weight}>{facts.name}</text>')
    return '\n'.join([*parts, '</svg>', ''])


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m timm_cotnet.cards', description=__doc__.split('\n')[0])
    parser.add_argument(
        'folder', nargs='?', type=Path, default=Path('hub_cards'), help='folder to write to (default: %(default)s)')
    args = parser.parse_args(argv)
    from .detection.cards import detector_card_files, published_config  # which imports this module
    from .detection.published import PUBLISHED_DETECTORS

    repositories = {name: card_files(name) for name in PUBLISHED}
    repositories.update((name, detector_card_files(name, published_config(name))) for name in PUBLISHED_DETECTORS)
    for name, files in repositories.items():
        (args.folder / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (args.folder / name / file).write_bytes(text.encode())
        print(args.folder / name)
    return 0


if __name__ == '__main__':
    sys.exit(main())
