"""Synthetic checkpoints of the official detectors, as detectron2 writes them."""
from collections import OrderedDict

import timm
import torch
from official_checkpoints import detection_key, random_state_dict

KINDS = ['fasterrcnn', 'cascade_rcnn', 'maskrcnn', 'cascade_mask_rcnn']
CLASSES = 80


def _norm(name: str) -> dict:
    shapes = {f'{name}.norm.{part}': (256,) for part in ('weight', 'bias', 'running_mean', 'running_var')}
    return shapes | {f'{name}.norm.num_batches_tracked': ()}


def head_shapes(kind: str, channels: list[int], classes: int = CLASSES) -> dict:
    """Shapes of all that a detector has besides its backbone.

    Args:
        kind: One of `KINDS`.
        channels: Channels of the backbone's four stages.
        classes: Number of classes without the background.
    """
    shapes = {}
    for stage, width in enumerate(channels, 2):
        shapes |= {f'backbone.fpn_lateral{stage}.weight': (256, width, 1, 1), **_norm(f'backbone.fpn_lateral{stage}')}
        shapes |= {f'backbone.fpn_output{stage}.weight': (256, 256, 3, 3), **_norm(f'backbone.fpn_output{stage}')}
    for name, shape in (
            ('conv', (256, 256, 3, 3)), ('objectness_logits', (3, 256, 1, 1)), ('anchor_deltas', (12, 256, 1, 1))):
        name = f'proposal_generator.rpn_head.{name}'
        shapes |= {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
    cascade = kind.startswith('cascade')
    for stage in ('0.', '1.', '2.') if cascade else ('',):
        head, predictor = f'roi_heads.box_head.{stage}', f'roi_heads.box_predictor.{stage}'
        for i in range(1, 5):
            shapes |= {f'{head}conv{i}.weight': (256, 256, 3, 3), **_norm(f'{head}conv{i}')}
        shapes |= {f'{head}fc1.weight': (1024, 256 * 7 * 7), f'{head}fc1.bias': (1024,)}
        boxes = 4 if cascade else 4 * classes
        shapes |= {f'{predictor}cls_score.weight': (classes + 1, 1024), f'{predictor}cls_score.bias': (classes + 1,)}
        shapes |= {f'{predictor}bbox_pred.weight': (boxes, 1024), f'{predictor}bbox_pred.bias': (boxes,)}
    if 'mask' in kind:
        for i in range(1, 5):
            name = f'roi_heads.mask_head.mask_fcn{i}'
            shapes |= {f'{name}.weight': (256, 256, 3, 3), **_norm(name)}
        for name, shape, width in (('deconv', (256, 256, 2, 2), 256), ('predictor', (classes, 256, 1, 1), classes)):
            shapes |= {f'roi_heads.mask_head.{name}.weight': shape, f'roi_heads.mask_head.{name}.bias': (width,)}
    return shapes


def detector_state_dict(
        kind: str, backbone: str, classes: int = CLASSES, seed: int = 0, expand: bool = False) -> OrderedDict:
    """Random weights with the names and shapes of an official detector's, which keep images apart from each other.

    Args:
        kind: One of `KINDS`.
        backbone: Variant.
        classes: Number of classes without the background.
        seed: Of the random numbers.
        expand: Weights take no memory: each tensor is one number, repeated.
    """
    with torch.device('meta'):
        body = timm.create_model(backbone, num_classes=0)
    body_state = body.state_dict()
    deep, pooled = 'conv1.0.weight' in body_state, 'layer1.0.downsample.0.weight' not in body_state
    shapes = {
        detection_key(key, pooled if key.startswith('layer') else deep): value.shape
        for key, value in body_state.items()
        if not (key.endswith('num_batches_tracked') and not key.startswith(('layer2', 'layer3', 'layer4')))}
    shapes |= head_shapes(kind, [info['num_chs'] for info in body.feature_info[1:]], classes)
    if expand:
        return OrderedDict(
            (key, torch.tensor(7) if key.endswith('num_batches_tracked') else torch.tensor(0.5).expand(shape))
            for key, shape in shapes.items())
    state = random_state_dict(shapes, seed)
    for key, value in state.items():
        if key.endswith('running_var'):
            value.abs_().add_(0.5)
        elif value.ndim > 1:  # what goes into a head comes out as large; in the backbone, shortcuts add up
            value.mul_((2 if 'bottom_up' in key else 6) / value[0].numel() ** 0.5)
        elif key.endswith('norm.weight') and 'bottom_up' not in key:
            value.add_(1)
    return state


def detectron2_extras(bgr: bool = False) -> OrderedDict:
    """Buffers that detectron2 0.3 saves besides."""
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    extras = OrderedDict(
        pixel_mean=(mean.flip(0) if bgr else mean).view(3, 1, 1), pixel_std=(std.flip(0) if bgr else std).view(3, 1, 1))
    for level, size in enumerate((32, 64, 128, 256, 512)):
        sizes = [(size / ratio ** 0.5, size * ratio ** 0.5) for ratio in (0.5, 1.0, 2.0)]
        extras[f'proposal_generator.anchor_generator.cell_anchors.{level}'] = torch.tensor(
            [[-w / 2, -h / 2, w / 2, h / 2] for w, h in sizes])
    return extras


def saved(state_dict: OrderedDict) -> dict:
    """What detectron2's checkpointer saves at the end of training."""
    return {
        'model': state_dict, 'optimizer': {'state': {}, 'param_groups': []}, 'scheduler': {'last_epoch': 90000},
        'iteration': 89999}
