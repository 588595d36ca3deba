"""Object detection and instance segmentation on CoTNets and other timm models, with torchvision's conventions."""
from .backbone import cotnet_fpn_backbone
from .models import cascade_mask_rcnn_cotnet_fpn, cascade_rcnn_cotnet_fpn, fasterrcnn_cotnet_fpn, maskrcnn_cotnet_fpn

__all__ = [
    'cascade_mask_rcnn_cotnet_fpn', 'cascade_rcnn_cotnet_fpn', 'cotnet_fpn_backbone', 'fasterrcnn_cotnet_fpn',
    'maskrcnn_cotnet_fpn',
]
