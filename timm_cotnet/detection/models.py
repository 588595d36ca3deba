"""Faster, Mask, Cascade and Cascade Mask R-CNN on a CoTNet or any other timm model, with torchvision's conventions.

Paper: `Contextual Transformer Networks for Visual Recognition` - https://arxiv.org/abs/2107.12292. The heads are those
of the official configurations, https://github.com/JDAI-CV/CoTNet-ObjectDetection-InstanceSegmentation: norms in the
pyramid and in all heads but the region proposals', four convolutions and one linear layer for boxes.
"""
from typing import Optional

from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import _validate_trainable_layers
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from .backbone import NORMS, cotnet_fpn_backbone
from .cascade import CascadeRoIHeads, CascadeStage
from .heads import AlignedRoIAlign, AnchorGenerator, ClassAgnosticPredictor

__all__ = [
    'cascade_mask_rcnn_cotnet_fpn', 'cascade_rcnn_cotnet_fpn', 'fasterrcnn_cotnet_fpn', 'maskrcnn_cotnet_fpn',
]

CASCADE_IOUS = (0.5, 0.6, 0.7)
CASCADE_BOX_WEIGHTS = ((10., 10., 5., 5.), (20., 20., 10., 10.), (30., 30., 15., 15.))
OUT_CHANNELS, REPRESENTATION = 256, 1024


def _build(detector, backbone, weights, weights_backbone, num_classes, trainable_backbone_layers, norm, **kwargs):
    if weights is not None:
        raise ValueError(f'weights is {weights!r}; it may be None')
    trainable = _validate_trainable_layers(
        weights_backbone is not None, trainable_backbone_layers, max_value=5, default_value=3)
    body = cotnet_fpn_backbone(
        backbone, pretrained=weights_backbone is not None, trainable_layers=trainable, norm=norm)
    sizes = ((32,), (64,), (128,), (256,), (512,))
    kwargs.setdefault('rpn_anchor_generator', AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)))
    kwargs.setdefault('rpn_post_nms_top_n_train', 1000)
    kwargs.setdefault('box_roi_pool', AlignedRoIAlign(7))
    kwargs.setdefault('box_head', _box_head(NORMS[norm]))
    if issubclass(detector, MaskRCNN):
        kwargs.setdefault('mask_roi_pool', AlignedRoIAlign(14))
        kwargs.setdefault('mask_head', MaskRCNNHeads(OUT_CHANNELS, (256,) * 4, 1, norm_layer=NORMS[norm]))
    return detector(body, num_classes, **kwargs)


def _box_head(norm_layer) -> nn.Module:
    return FastRCNNConvFCHead((OUT_CHANNELS, 7, 7), [256] * 4, [REPRESENTATION], norm_layer=norm_layer)


def fasterrcnn_cotnet_fpn(
        backbone: str = 'cotnet50',
        *,
        weights: Optional[str] = None,
        weights_backbone: Optional[str] = 'DEFAULT',
        num_classes: int = 91,
        trainable_backbone_layers: Optional[int] = None,
        norm: str = 'sync',
        **kwargs,
) -> FasterRCNN:
    return _build(
        FasterRCNN, backbone, weights, weights_backbone, num_classes, trainable_backbone_layers, norm, **kwargs)


def maskrcnn_cotnet_fpn(
        backbone: str = 'cotnet50',
        *,
        weights: Optional[str] = None,
        weights_backbone: Optional[str] = 'DEFAULT',
        num_classes: int = 91,
        trainable_backbone_layers: Optional[int] = None,
        norm: str = 'sync',
        **kwargs,
) -> MaskRCNN:
    return _build(
        MaskRCNN, backbone, weights, weights_backbone, num_classes, trainable_backbone_layers, norm, **kwargs)




def cascade_rcnn_cotnet_fpn(
        backbone: str = 'cotnet50',
        *,
        weights: Optional[str] = None,
        weights_backbone: Optional[str] = 'DEFAULT',
        num_classes: int = 91,
        trainable_backbone_layers: Optional[int] = None,
        norm: str = 'sync',
        **kwargs,
) -> FasterRCNN:
    kwargs.setdefault('rpn_post_nms_top_n_train', 2000)
    model = _build(
        FasterRCNN, backbone, weights, weights_backbone, num_classes, trainable_backbone_layers, norm, **kwargs)
    return _make_cascade(model, num_classes, norm)


def cascade_mask_rcnn_cotnet_fpn(
        backbone: str = 'cotnet50',
        *,
        weights: Optional[str] = None,
        weights_backbone: Optional[str] = 'DEFAULT',
        num_classes: int = 91,
        trainable_backbone_layers: Optional[int] = None,
        norm: str = 'sync',
        **kwargs,
) -> MaskRCNN:
    kwargs.setdefault('rpn_post_nms_top_n_train', 2000)
    model = _build(
        MaskRCNN, backbone, weights, weights_backbone, num_classes, trainable_backbone_layers, norm, **kwargs)
    return _make_cascade(model, num_classes, norm)


def _make_cascade(model, num_classes, norm):
    heads = model.roi_heads
    sampler = heads.fg_bg_sampler
    stages = [
        CascadeStage(
            None, _box_head(NORMS[norm]), ClassAgnosticPredictor(REPRESENTATION, num_classes), iou, iou,
            sampler.batch_size_per_image, sampler.positive_fraction, weights,
            heads.score_thresh, heads.nms_thresh, heads.detections_per_img)
        for iou, weights in zip(CASCADE_IOUS, CASCADE_BOX_WEIGHTS)]
    model.roi_heads = CascadeRoIHeads(
        stages, heads.box_roi_pool, heads.mask_roi_pool, heads.mask_head, heads.mask_predictor)
    return model
