"""Faster, Mask, Cascade and Cascade Mask R-CNN on a CoTNet or any other timm model, with torchvision's conventions.

Paper: `Contextual Transformer Networks for Visual Recognition` - https://arxiv.org/abs/2107.12292. Heads, pooling and
anchors are those of the official configurations, detectron2's, in
https://github.com/JDAI-CV/CoTNet-ObjectDetection-InstanceSegmentation; everything else is torchvision's.
"""
import inspect
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Type, Union

from timm.layers import freeze_batch_norm_2d
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import _validate_trainable_layers
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..misfit import first_few
from .backbone import NORMS, OUT_CHANNELS, cotnet_fpn_backbone
from .cascade import CascadeRoIHeads, CascadeStage
from .heads import AlignedRoIAlign, AnchorGenerator, BoxPredictor, RPNHead
from .weights import find_weights, has_norms, load_weights, read_keys

__all__ = [
    'DETECTORS', 'cascade_mask_rcnn_cotnet_fpn', 'cascade_rcnn_cotnet_fpn', 'fasterrcnn_cotnet_fpn',
    'maskrcnn_cotnet_fpn',
]

ANCHOR_SIZES = ((32,), (64,), (128,), (256,), (512,))
ASPECT_RATIOS = ((0.5, 1.0, 2.0),) * len(ANCHOR_SIZES)
MIN_SIZES = (640, 672, 704, 736, 768, 800)  # drawn in training; the last one in evaluation
HEAD_CHANNELS, BOX_FEATURES = 256, 1024
CASCADE_IOUS = (0.5, 0.6, 0.7)
CASCADE_BOX_WEIGHTS = ((10., 10., 5., 5.), (20., 20., 10., 10.), (30., 30., 15., 15.))


def fasterrcnn_cotnet_fpn(
        backbone: str = 'cotnet50',
        *,
        weights: Optional[Union[str, Path]] = None,
        weights_backbone: Optional[str] = 'DEFAULT',
        num_classes: int = 91,
        trainable_backbone_layers: Optional[int] = None,
        norm: str = 'sync',
        **kwargs,
) -> FasterRCNN:
    """Faster R-CNN with the box head of the CoTNet paper's: four convolutions and one linear layer.

    Called like torchvision's detectors: a list of images (3, H, W) in 0...1 and, in training, a list of targets give
    the losses; in evaluation the images give `boxes`, `labels` and `scores` each. The paper's norms are synchronized
    over the processes; with one image in a process and no process group, choose 'frozen'.

    Args:
        backbone: Name of a model as `timm.create_model` takes it.
        weights: Weights of the whole detector: 'coco' for the official ones, 'hf-hub:NAME/REPOSITORY', or a folder that
            `timm_cotnet.detection.convert` wrote. With another number of classes the predictors start at random.
        weights_backbone: Weights of the backbone where `weights` is None: 'DEFAULT', or a tag of the model in timm.
            None starts at random.
        num_classes: Number of classes, the background included, which is 0. 91 with COCO's own numbers.
        trainable_backbone_layers: How many of stages 4, 3, 2, 1 and stem are trained, counted from the last; by default
            3 where there are weights, else all. Of the others, norms are frozen too.
        norm: Batch norms of what is trained, heads and pyramid included: 'sync', 'batch', or 'frozen'. Heads and
            pyramid without weights have nothing to freeze: with 'frozen' they have no norms, nor have they any where
            `weights` are of such a detector. TorchScript needs 'batch' or 'frozen'.
        kwargs: Arguments of torchvision's detector, such as `min_size`, `box_score_thresh` or `rpn_nms_thresh`.

    Raises:
        ValueError: If an argument is none of these.
        WeightsError: If the weights cannot be had, or do not fit.
    """
    return _create(
        'fasterrcnn_cotnet_fpn', backbone, weights, weights_backbone, num_classes, trainable_backbone_layers, norm,
        kwargs)


def maskrcnn_cotnet_fpn(
        backbone: str = 'cotnet50',
        *,
        weights: Optional[Union[str, Path]] = None,
        weights_backbone: Optional[str] = 'DEFAULT',
        num_classes: int = 91,
        trainable_backbone_layers: Optional[int] = None,
        norm: str = 'sync',
        **kwargs,
) -> MaskRCNN:
    """Mask R-CNN: `fasterrcnn_cotnet_fpn`, whose arguments it has, and a mask head of four convolutions with norms."""
    return _create(
        'maskrcnn_cotnet_fpn', backbone, weights, weights_backbone, num_classes, trainable_backbone_layers, norm,
        kwargs)


def cascade_rcnn_cotnet_fpn(
        backbone: str = 'cotnet50',
        *,
        weights: Optional[Union[str, Path]] = None,
        weights_backbone: Optional[str] = 'DEFAULT',
        num_classes: int = 91,
        trainable_backbone_layers: Optional[int] = None,
        norm: str = 'sync',
        **kwargs,
) -> FasterRCNN:
    """Cascade R-CNN: three box heads, each trained at a higher IoU on the boxes of the one before.

    Arguments are those of `fasterrcnn_cotnet_fpn`. `cascade_ious` and `bbox_reg_weights` have one entry for each stage,
    as have `box_head` and `box_predictor`.
    """
    return _create(
        'cascade_rcnn_cotnet_fpn', backbone, weights, weights_backbone, num_classes, trainable_backbone_layers, norm,
        kwargs)


def cascade_mask_rcnn_cotnet_fpn(
        backbone: str = 'cotnet50',
        *,
        weights: Optional[Union[str, Path]] = None,
        weights_backbone: Optional[str] = 'DEFAULT',
        num_classes: int = 91,
        trainable_backbone_layers: Optional[int] = None,
        norm: str = 'sync',
        **kwargs,
) -> MaskRCNN:
    """Cascade Mask R-CNN: `cascade_rcnn_cotnet_fpn`, whose arguments it has, and the mask head of Mask R-CNN."""
    return _create(
        'cascade_mask_rcnn_cotnet_fpn', backbone, weights, weights_backbone, num_classes, trainable_backbone_layers,
        norm, kwargs)


DETECTORS: Dict[str, Callable[..., FasterRCNN]] = {
    create.__name__: create for create in (
        fasterrcnn_cotnet_fpn, cascade_rcnn_cotnet_fpn, maskrcnn_cotnet_fpn, cascade_mask_rcnn_cotnet_fpn)}


def _create(
        name: str,
        backbone: str,
        weights: Optional[Union[str, Path]],
        weights_backbone: Optional[str],
        num_classes: int,
        trainable_backbone_layers: Optional[int],
        norm: str,
        kwargs: Dict[str, Any],
) -> FasterRCNN:
    found = None if weights is None else find_weights(weights, name, backbone)
    if found is not None:
        weights_backbone = None
        kwargs = {'image_mean': found.config['image_mean'], 'image_std': found.config['image_std'], **kwargs}
    trainable = _validate_trainable_layers(
        weights is not None or weights_backbone is not None, trainable_backbone_layers, max_value=5, default_value=3)
    head_norms = found is None or has_norms(read_keys(found))
    # norms of pyramid and heads are frozen once they have their weights
    freeze_all = norm == 'frozen' and found is not None and head_norms
    model = _build(
        name, backbone, weights_backbone, num_classes, trainable, 'batch' if freeze_all else norm, head_norms,
        dict(kwargs))
    if found is not None:
        load_weights(model, found, num_classes)
    return freeze_batch_norm_2d(model) if freeze_all else model


def _build(
        name: str,
        backbone: str,
        weights_backbone: Optional[str],
        num_classes: int,
        trainable_layers: int,
        norm: str,
        head_norms: bool,
        kwargs: Dict[str, Any],
) -> FasterRCNN:
    """A detector with the published heads wherever `kwargs` does not name others."""
    masks, cascade = 'mask' in name, name.startswith('cascade')
    takers = [FasterRCNN, GeneralizedRCNNTransform, *([MaskRCNN] if masks else [])]
    known = {'_skip_resize', *(['cascade_ious'] if cascade else [])}.union(
        *(inspect.signature(taker.__init__).parameters for taker in takers))
    unknown = sorted(kwargs.keys() - known)
    if unknown:  # torchvision takes anything without a word
        raise ValueError(f'{name} has no argument {first_few(unknown)}; torchvision lists those of its detectors')
    body = cotnet_fpn_backbone(
        backbone if weights_backbone in (None, 'DEFAULT') else f'{backbone}.{weights_backbone}',
        pretrained=weights_backbone is not None, trainable_layers=trainable_layers, norm=norm,
        pyramid_norms=head_norms)
    norm_layer = NORMS[norm] if head_norms else None
    box_head = partial(FastRCNNConvFCHead, (OUT_CHANNELS, 7, 7), [HEAD_CHANNELS] * 4, [BOX_FEATURES], norm_layer)

    defaults: Dict[str, Callable[[], Any]] = {
        'min_size': lambda: MIN_SIZES,
        'rpn_anchor_generator': lambda: AnchorGenerator(ANCHOR_SIZES, ASPECT_RATIOS),
        'rpn_head': lambda: RPNHead(OUT_CHANNELS, len(ASPECT_RATIOS[0])),
        'rpn_post_nms_top_n_train': lambda: 2000 if cascade else 1000,
        'box_roi_pool': lambda: AlignedRoIAlign(7),
    }
    if masks:
        defaults.update(
            mask_roi_pool=lambda: AlignedRoIAlign(14),
            mask_head=lambda: MaskRCNNHeads(OUT_CHANNELS, [HEAD_CHANNELS] * 4, 1, norm_layer),
            mask_predictor=lambda: MaskRCNNPredictor(HEAD_CHANNELS, HEAD_CHANNELS, num_classes))
    if not cascade:
        defaults.update(box_head=box_head, box_predictor=lambda: BoxPredictor(BOX_FEATURES, num_classes))
    stages = _take_stages(kwargs, box_head, num_classes) if cascade else []
    for key, default in defaults.items():
        if kwargs.get(key) is None:
            kwargs[key] = default()

    detector: Type[FasterRCNN] = MaskRCNN if masks else FasterRCNN
    if not cascade:
        return detector(body, **kwargs)
    model = detector(body, box_head=nn.Identity(), box_predictor=nn.Identity(), **kwargs)
    heads, sampler = model.roi_heads, model.roi_heads.fg_bg_sampler
    model.roi_heads = CascadeRoIHeads(
        [CascadeStage(
            heads.box_roi_pool, stage['box_head'], stage['box_predictor'], stage['cascade_ious'], stage['cascade_ious'],
            sampler.batch_size_per_image, sampler.positive_fraction, stage['bbox_reg_weights'],
            heads.score_thresh, heads.nms_thresh, heads.detections_per_img) for stage in stages],
        heads.mask_roi_pool, heads.mask_head, heads.mask_predictor)
    return model


def _take_stages(kwargs: Dict[str, Any], box_head: Callable[[], nn.Module], num_classes: int) -> Sequence[Dict]:
    """What differs between the stages of a cascade, taken out of `kwargs` where it says so."""
    for key in ('box_fg_iou_thresh', 'box_bg_iou_thresh'):
        if kwargs.get(key) is not None:
            raise ValueError(f'{key} is {kwargs[key]}, but a cascade has an IoU for each stage: pass cascade_ious')
    ious = kwargs.pop('cascade_ious', None) or CASCADE_IOUS
    parts = {
        'cascade_ious': ious,
        'bbox_reg_weights': kwargs.pop('bbox_reg_weights', None) or CASCADE_BOX_WEIGHTS,
        'box_head': kwargs.pop('box_head', None) or [box_head() for _ in ious],
        'box_predictor': kwargs.pop('box_predictor', None) or [
            BoxPredictor(BOX_FEATURES, num_classes, class_agnostic=True) for _ in ious],
    }
    for key, values in parts.items():
        if not isinstance(values, (list, tuple, nn.ModuleList)) or len(values) != len(ious):
            raise ValueError(f'{key} has to be a list with an entry for each of the {len(ious)} stages')
    return [dict(zip(parts, values)) for values in zip(*parts.values())]
