"""What was published about the official detectors: names, backbones and COCO results.

All checkpoints are in one folder, `CHECKPOINTS_URL`; results and folder are named in the README of
https://github.com/JDAI-CV/CoTNet-ObjectDetection-InstanceSegmentation.
"""
from dataclasses import dataclass
from typing import Dict, Optional

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from ..published import PUBLISHED, Published

__all__ = ['CHECKPOINTS_URL', 'COCO_CATEGORIES', 'PUBLISHED_DETECTORS', 'PublishedDetector', 'detector_name']

CHECKPOINTS_URL = 'https://drive.google.com/drive/folders/1TQNwMatwmfKgjbIgFdfbIH-4vkfZ07Ag'
TAG = 'jd_coco'
#: Names of the classes by COCO's own numbers; some numbers have none ('N/A').
COCO_CATEGORIES = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta['categories']
KINDS = {  # what a kind of detector is called
    'fasterrcnn_cotnet_fpn': 'Faster R-CNN',
    'cascade_rcnn_cotnet_fpn': 'Cascade R-CNN',
    'maskrcnn_cotnet_fpn': 'Mask R-CNN',
    'cascade_mask_rcnn_cotnet_fpn': 'Cascade Mask R-CNN',
}
SHA256: Dict[str, str] = {}  # of the converted model.safetensors, by name, once it is on the Hub


@dataclass(frozen=True)
class PublishedDetector:
    """Facts about one official detector (FPN, 1x schedule, COCO 2017).

    Attributes:
        kind: Function that makes it.
        backbone: Variant of its backbone.
        box_ap: Box AP on val2017 in percent, as reported by the authors.
        mask_ap: Mask AP on val2017 in percent, as reported by the authors; None without masks.
        sha256: Digest of the converted `model.safetensors`, once it is on the Hub.
    """
    kind: str
    backbone: str
    box_ap: float
    mask_ap: Optional[float]
    sha256: Optional[str]


def detector_name(kind: str, backbone: str) -> str:
    """Name of a detector, such as `maskrcnn_cotnet50_fpn`.

    Args:
        kind: Function that makes it.
        backbone: Variant of its backbone.
    """
    return kind.replace('cotnet', backbone)


def _detector(kind: str, backbone: str, facts: Published) -> PublishedDetector:
    box_ap, mask_ap = {
        'fasterrcnn_cotnet_fpn': (facts.coco.faster_rcnn, None),
        'cascade_rcnn_cotnet_fpn': (facts.coco.cascade_rcnn, None),
        'maskrcnn_cotnet_fpn': facts.coco.mask_rcnn,
        'cascade_mask_rcnn_cotnet_fpn': facts.coco.cascade_mask_rcnn,
    }[kind]
    return PublishedDetector(kind, backbone, box_ap, mask_ap, SHA256.get(f'{detector_name(kind, backbone)}.{TAG}'))


#: The twenty-four official detectors, by name and tag.
PUBLISHED_DETECTORS: Dict[str, PublishedDetector] = {
    f'{detector_name(kind, name.split(".")[0])}.{TAG}': _detector(kind, name.split('.')[0], facts)
    for kind in KINDS for name, facts in PUBLISHED.items() if facts.coco is not None}
