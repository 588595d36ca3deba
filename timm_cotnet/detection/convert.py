"""Official detectors to safetensors: `python -m timm_cotnet.detection.convert CHECKPOINT... --output DIR`.

Reads the checkpoints of https://github.com/JDAI-CV/CoTNet-ObjectDetection-InstanceSegmentation, which detectron2 wrote,
all of it: backbone, pyramid, region proposals and heads. What is written into the folder is what the Hub repository of
the detector holds, and what `weights='DIR'` takes.
"""
import argparse
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch

from ..checkpoint import DETECTION_PREFIX, CheckpointError, find_state_dict, find_variant, read_checkpoint
from ..checkpoint import rename_detection
from ..convert import plain_tensor, write_folder
from ..misfit import differences, first_few
from .cards import detector_card_files
from .heads import AnchorGenerator
from .models import ANCHOR_SIZES, ASPECT_RATIOS, DETECTORS
from .published import COCO_CATEGORIES, PUBLISHED_DETECTORS, TAG, detector_name
from .weights import CONFIG_KEYS, has_norms

__all__ = ['DIFFERENCES', 'DetectorConversion', 'check_detector', 'convert_detector', 'rename_detector']

#: COCO's own numbers of its 80 classes, in the order in which detectron2 counts them.
COCO_IDS = [i for i, name in enumerate(COCO_CATEGORIES) if name not in ('__background__', 'N/A')]
RGB_MEAN, RGB_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NEVER = -1e3  # logit of a number that no class of COCO has: after the softmax it is zero, in half precision too

#: (what differs, how much it can matter): what converted weights meet here in another form than in detectron2.
DIFFERENCES = [
    ('Resizing of images', 'detectron2 resizes 8-bit images by Pillow, torchvision tensors by bilinear interpolation: '
     'less than a gray level of 256 where images are enlarged, as all of COCO are; where they are made smaller, Pillow '
     'smooths and torchvision does not. Sizes are rounded there and cut off here: up to a pixel of 800'),
    ('Order of proposals', 'torchvision sorts them by their probability, detectron2 by its logit: only where '
     'probabilities are equal in single precision, as above a logit of 17, may another one be suppressed'),
    ('Pasting of masks', 'torchvision rounds a box to whole pixels before it pastes the mask, detectron2 does not: up '
     'to a pixel along the outline'),
    ('Small boxes', 'torchvision leaves out detections thinner than 0.01 pixels, detectron2 those of no width'),
    ('Padding', 'none, for one image at a time. In a batch, small images are padded to the largest, in both libraries; '
     'a CoT layer pools over the padding too, so that results change with the batch. The authors evaluated one by one'),
    ('Losses', 'only for further training: of boxes torchvision takes a smooth L1 loss with beta 1/9, the authors L1'),
]
#: What is the same, as the detectors here are made to agree with detectron2 in it.
AGREEING = (
    'anchors (not rounded, strides of powers of two), pooling (`aligned`, as many samples as pixels), box coder and '
    'its limit, order of anchors, non-maximum suppression, scores of a cascade, channels (RGB)')

RENAMING = [  # the first that fits, counts
    (r'backbone\.fpn_(lateral|output)([2-5])\.(norm\.)?(\w+)',
     lambda m: f'backbone.fpn.{"inner" if m[1] == "lateral" else "layer"}_blocks.{int(m[2]) - 2}.'
               f'{1 if m[3] else 0}.{m[4]}'),
    (r'proposal_generator\.rpn_head\.conv\.(\w+)', r'rpn.head.conv.0.0.\1'),
    (r'proposal_generator\.rpn_head\.objectness_logits\.(\w+)', r'rpn.head.cls_logits.\1'),
    (r'proposal_generator\.rpn_head\.anchor_deltas\.(\w+)', r'rpn.head.bbox_pred.\1'),
    (r'roi_heads\.box_head\.(?:(\d)\.)?conv([1-4])\.(norm\.)?(\w+)',
     lambda m: f'roi_heads.{_stage(m[1])}box_head.{int(m[2]) - 1}.{1 if m[3] else 0}.{m[4]}'),
    (r'roi_heads\.box_head\.(?:(\d)\.)?fc1\.(\w+)', lambda m: f'roi_heads.{_stage(m[1])}box_head.5.{m[2]}'),
    (r'roi_heads\.box_predictor\.(?:(\d)\.)?(cls_score|bbox_pred)\.(\w+)',
     lambda m: f'roi_heads.{_stage(m[1])}box_predictor.{m[2]}.{m[3]}'),
    (r'roi_heads\.mask_head\.mask_fcn([1-4])\.(norm\.)?(\w+)',
     lambda m: f'roi_heads.mask_head.{int(m[1]) - 1}.{1 if m[2] else 0}.{m[3]}'),
    (r'roi_heads\.mask_head\.deconv\.(\w+)', r'roi_heads.mask_predictor.conv5_mask.\1'),
    (r'roi_heads\.mask_head\.predictor\.(\w+)', r'roi_heads.mask_predictor.mask_fcn_logits.\1'),
]
PIXELS = ('pixel_mean', 'pixel_std')
CELL_ANCHORS = 'proposal_generator.anchor_generator.cell_anchors.'


@dataclass(frozen=True)
class DetectorConversion:
    """What was made of one checkpoint.

    Attributes:
        name: Detector and tag; without a tag if it is none of the official ones.
        config: What `config.json` says of it.
        taken: Where its weights were in the checkpoint, and what was done to them, in words.
        digests: sha256 of each file written, by name.
    """
    name: str
    config: Dict
    taken: str
    digests: Dict[str, str] = field(default_factory=dict)


def convert_detector(
        path: Path,
        output: Path,
        inside: bool = False,
        before: Optional[Dict[str, Path]] = None,
) -> DetectorConversion:
    """Converts one checkpoint; afterwards `output` holds what the Hub repository of the detector holds.

    Args:
        path: Checkpoint.
        output: Folder to write to; the files of an earlier conversion in it are replaced.
        inside: Write to a folder inside `output` that is named after the detector.
        before: Checkpoints that are converted already, by the names of their detectors; another of the same name is
            refused.

    Raises:
        CheckpointError: If the checkpoint cannot be converted.
        OSError: If a file cannot be read or written.
    """
    state_dict, taken = find_state_dict(read_checkpoint(Path(path)))
    weights, config, notes = rename_detector(state_dict)
    name = check_detector(weights, config)
    output = Path(output, name) if inside else Path(output)
    if name in (before or {}):
        raise CheckpointError(
            f'it is {name} like {before[name]}, which {output} holds now; convert it to another --output')
    digests = write_folder(detector_card_files(name, config), weights, output)
    return DetectorConversion(name, config, '; '.join([taken, *notes]), digests)


def rename_detector(
        state_dict: Dict[str, torch.Tensor],
) -> Tuple[Dict[str, torch.Tensor], Dict, List[str]]:
    """The weights of a detectron2 detector under torchvision's names, in torchvision's order of classes.

    Args:
        state_dict: Weights of an official detector.

    Returns:
        Weights, what `config.json` says of the detector, and what was done besides renaming, in words.

    Raises:
        CheckpointError: If the weights are not those of a whole detector.
    """
    if not any(key.startswith('roi_heads.') for key in state_dict):
        raise CheckpointError(
            'the checkpoint has no roi_heads, so it is no detector; a backbone or a classification model is converted '
            'by python -m timm_cotnet.convert')
    state_dict = {key: plain_tensor(key, value) for key, value in state_dict.items()}
    backbone, body = _backbone(state_dict)
    rest = {key: value for key, value in state_dict.items() if not key.startswith(DETECTION_PREFIX)}
    mean, std, bgr = _pixel_statistics(rest)
    _check_anchors(rest)
    renamed = {_renamed(key): value for key, value in rest.items() if not key.endswith('num_batches_tracked')}
    if bgr:
        first = 'conv1.weight' if 'conv1.weight' in body else 'conv1.0.weight'
        body[first] = body[first].flip(1)
    cascade, masks = (any(part in key for key in renamed) for part in ('.stages.', '.mask_head.'))
    kind = [['fasterrcnn', 'maskrcnn'], ['cascade_rcnn', 'cascade_mask_rcnn']][cascade][masks] + '_cotnet_fpn'

    scores = next((value for key, value in renamed.items() if key.endswith('cls_score.bias')), None)
    if scores is None:
        raise CheckpointError('the checkpoint has no box predictor, roi_heads.box_predictor...cls_score')
    count = len(scores) - 1
    ids = COCO_IDS if count == len(COCO_IDS) else list(range(1, count + 1))
    num_classes = ids[-1] + 1 if count else 1
    weights = {f'backbone.body.{key}': value for key, value in body.items()}
    weights.update((key, _reordered(key, value, ids)) for key, value in renamed.items())
    config = {
        'detector': kind, 'backbone': backbone, 'num_classes': num_classes, 'image_mean': mean, 'image_std': std,
        'categories': list(COCO_CATEGORIES) if ids is COCO_IDS else None,
    }
    return weights, config, [
        f'background from last to first of {count + 1} classes' + (
            ', the others to the numbers that COCO gives them' if ids is COCO_IDS else ''),
        'channels of the first convolution from BGR to RGB' if bgr else 'channels are RGB already']


def _backbone(state_dict: Dict[str, torch.Tensor]) -> Tuple[str, Dict[str, torch.Tensor]]:
    """Variant and weights of the backbone, under the names of the classification model."""
    body = rename_detection({key: value for key, value in state_dict.items() if key.startswith(DETECTION_PREFIX)})
    body = {key: value for key, value in body.items() if not key.startswith('fc.')}
    variant = find_variant(body, num_classes=0)
    return variant, {key: value for key, value in body.items() if not key.endswith('num_batches_tracked')}


def _pixel_statistics(state_dict: Dict[str, torch.Tensor]) -> Tuple[List[float], List[float], bool]:
    """Mean and standard deviation for RGB in 0...1, and whether the detector takes BGR; removed from `state_dict`.

    detectron2 0.3 saves them, later versions do not; then they are those of the official configurations.
    """
    mean, std = (state_dict.pop(name, None) for name in PIXELS)
    if mean is None or std is None:
        return RGB_MEAN, RGB_STD, False
    mean, std = mean.flatten().double(), std.flatten().double()
    if len(mean) != 3 or len(std) != 3:
        raise CheckpointError(f'pixel_mean has {len(mean)} channels and pixel_std {len(std)}; the detectors take three')
    bgr = bool(mean[0] < mean[2])  # of natural images, red is the brightest
    if bgr:
        mean, std = mean.flip(0), std.flip(0)
    return [round(v, 6) for v in (mean / 255).tolist()], [round(v, 6) for v in (std / 255).tolist()], bgr


def _check_anchors(state_dict: Dict[str, torch.Tensor]) -> None:
    """Compares the anchors around zero that detectron2 0.3 saves with those here; removed from `state_dict`."""
    generator = AnchorGenerator(ANCHOR_SIZES, ASPECT_RATIOS)
    for level, expected in enumerate(generator.cell_anchors):
        found = state_dict.pop(f'{CELL_ANCHORS}{level}', None)
        if found is not None and not (found.shape == expected.shape and torch.allclose(found, expected, atol=1e-3)):
            raise CheckpointError(
                f'{CELL_ANCHORS}{level} holds other anchors than the official configurations: {found.tolist()}')


def _renamed(key: str) -> str:
    for pattern, name in RENAMING:
        match = re.fullmatch(pattern, key)
        if match:
            return name(match) if callable(name) else match.expand(name)
    return key


def _stage(number: Optional[str]) -> str:
    return '' if number is None else f'stages.{number}.'


def _reordered(key: str, value: torch.Tensor, ids: List[int]) -> torch.Tensor:
    """Rows of a predictor in torchvision's order: the background is number 0, class i of detectron2's is ids[i]."""
    num_classes = ids[-1] + 1
    if '.cls_score.' in key:
        rows = value.new_zeros(num_classes, *value.shape[1:])
        if value.ndim == 1:
            rows.fill_(NEVER)
        rows[ids] = value[:-1]
        rows[0] = value[-1]
        return rows
    if '.mask_fcn_logits.' in key or 'box_predictor.bbox_pred.' in key and len(value) != 4:
        per_class = len(value) // len(ids)
        rows = value.new_zeros(num_classes, per_class, *value.shape[1:])
        rows[ids] = value.view(len(ids), per_class, *value.shape[1:])
        return rows.flatten(0, 1)
    return value


def check_detector(weights: Dict[str, torch.Tensor], config: Dict) -> str:
    """Checks that weights are those of the detector that a config names, and returns the name of its repository.

    Args:
        weights: State dict; its tensors may be on the meta device.
        config: Content of `config.json`.

    Raises:
        CheckpointError: If the config names no detector, or keys or shapes differ.
    """
    missing = [key for key in CONFIG_KEYS if key not in config]
    if missing or config['detector'] not in DETECTORS:
        raise CheckpointError(f'config.json is not that of a detector: it has no {", ".join(missing) or "known one"}')
    kind, backbone, num_classes = config['detector'], config['backbone'], config['num_classes']
    with torch.device('meta'):
        model = DETECTORS[kind](
            backbone, weights_backbone=None, num_classes=num_classes, norm='batch' if has_norms(weights) else 'frozen')
    found, expected = (
        {key: value for key, value in state.items() if not key.endswith('num_batches_tracked')}
        for state in (weights, model.state_dict()))
    misfit = {what: keys for what, keys in differences(found, expected).items() if keys}
    if misfit:
        lines = [f'  {what}: {first_few(keys)}' for what, keys in misfit.items()]
        raise CheckpointError('\n'.join([
            f'the weights do not fit {kind}({backbone!r}), {sum(map(len, misfit.values()))} differences:', *lines]))
    name = detector_name(kind, backbone)
    return f'{name}.{TAG}' if f'{name}.{TAG}' in PUBLISHED_DETECTORS and config.get('categories') else name


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m timm_cotnet.detection.convert', description=__doc__.split('\n')[0])
    parser.add_argument('checkpoint', nargs='+', type=Path, help='official checkpoints of detectors')
    parser.add_argument(
        '--output', type=Path, required=True, help='folder to write to; of several checkpoints, each to one inside it')
    args = parser.parse_args(argv)
    converted: Dict[str, Path] = {}
    for path in args.checkpoint:
        try:
            conversion = convert_detector(path, args.output, inside=len(args.checkpoint) > 1, before=converted)
        except (CheckpointError, OSError) as e:
            print(f'error: {path}: {e}', file=sys.stderr)
            continue
        converted[conversion.name] = path
        folder = args.output / conversion.name if len(args.checkpoint) > 1 else args.output
        print(f'model   {conversion.name}, found by keys and shapes')
        print(f'taken   {conversion.taken}')
        for name, digest in conversion.digests.items():
            print(f'sha256  {digest}  {folder / name} ({(folder / name).stat().st_size} bytes)')
        config = conversion.config
        arguments = f"{config['backbone']!r}, weights={str(folder)!r}, num_classes={config['num_classes']}"
        print(f"use     timm_cotnet.detection.{config['detector']}({arguments})")
    if converted:
        print(f'\nAs in detectron2: {AGREEING}.\nDifferent from detectron2, and how much it can matter:')
        for what, how_much in DIFFERENCES:
            print(f'- {what}: {how_much}.')
    return int(len(converted) < len(args.checkpoint))


if __name__ == '__main__':
    sys.exit(main())
