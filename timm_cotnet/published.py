"""What was published about the official checkpoints: the one source for cards, conversion, download and verification.

Accuracies and links: the tables of https://github.com/JDAI-CV/CoTNet. COCO results: the tables of
https://github.com/JDAI-CV/CoTNet-ObjectDetection-InstanceSegmentation. Parameters and GMACs: counted on the official
implementation at the size of evaluation.
"""
from dataclasses import dataclass
from typing import Dict, Optional, Tuple

__all__ = ['PUBLISHED', 'Coco', 'Published']

PAPER_URL = 'https://arxiv.org/abs/2107.12292'
CODE_URL = 'https://github.com/JDAI-CV/CoTNet'
DETECTION_URL = 'https://github.com/JDAI-CV/CoTNet-ObjectDetection-InstanceSegmentation'


@dataclass(frozen=True)
class Coco:
    """COCO results of detectors (FPN, 1x schedule) on this backbone, as reported by the authors.

    Attributes:
        faster_rcnn: Box AP of Faster R-CNN.
        cascade_rcnn: Box AP of Cascade R-CNN.
        mask_rcnn: Box AP and mask AP of Mask R-CNN.
        cascade_mask_rcnn: Box AP and mask AP of Cascade Mask R-CNN.
    """
    faster_rcnn: float
    cascade_rcnn: float
    mask_rcnn: Tuple[float, float]
    cascade_mask_rcnn: Tuple[float, float]


@dataclass(frozen=True)
class Published:
    """Facts about one official checkpoint.

    Attributes:
        name: What the authors call it.
        url: Where the authors published it.
        top1: ImageNet-1k top-1 accuracy in percent, as reported by the authors.
        top5: ImageNet-1k top-5 accuracy in percent, as reported by the authors.
        params: Number of parameters.
        gmacs: Billions of multiply-accumulates at the size of evaluation.
        coco: COCO results with this backbone, where the authors report them.
        sha256: Digest of the converted `model.safetensors`, once it is on the Hub.
    """
    name: str
    url: str
    top1: float
    top5: float
    params: int
    gmacs: float
    coco: Optional[Coco] = None
    sha256: Optional[str] = None


PUBLISHED: Dict[str, Published] = {
    'cotnet50.jd_in1k': Published(
        'CoTNet-50', 'https://drive.google.com/file/d/1SR5ezIu7LN943zHaUh4mC0ehxBVMqtfv/view',
        top1=81.3, top5=95.6, params=22222416, gmacs=3.24,
        coco=Coco(43.50, 46.11, (44.06, 39.28), (46.94, 40.25)),
    ),
    'cotnext50_2x48d.jd_in1k': Published(
        'CoTNeXt-50', 'https://drive.google.com/file/d/1j6b5D3xcZ5L_bHiQV0WfqyOieqZLVOCv/view',
        top1=82.1, top5=95.9, params=30046276, gmacs=4.26,
        coco=Coco(44.06, 46.79, (44.47, 39.62), (47.63, 40.76)),
    ),
    'se_cotnetd_50.jd_in1k': Published(
        'SE-CoTNetD-50', 'https://drive.google.com/file/d/1D2b5fr3lxpBpiFcCYBKngmmSgfVHt_56/view',
        top1=81.6, top5=95.8, params=23107784, gmacs=4.05,
        coco=Coco(43.96, 46.77, (44.16, 39.38), (47.44, 40.73)),
    ),
    'cotnet101.jd_in1k': Published(
        'CoTNet-101', 'https://drive.google.com/file/d/11jExbPEg4Eq5PApisZyE5k-1CbRYnsQb/view',
        top1=82.8, top5=96.2, params=38272048, gmacs=6.05,
        coco=Coco(45.35, 48.19, (46.17, 40.86), (48.97, 41.98)),
    ),
    'cotnext101_2x48d.jd_in1k': Published(
        'CoTNeXt-101', 'https://drive.google.com/file/d/1des5wgkBDUscQAs8IYOmKCKKUA46QLfJ/view',
        top1=83.2, top5=96.4, params=53346068, gmacs=8.07,
        coco=Coco(46.10, 49.02, (46.66, 41.21), (49.35, 42.20)),
    ),
    'se_cotnetd_101.jd_in1k': Published(
        'SE-CoTNetD-101', 'https://drive.google.com/file/d/1PWIltQYpYZiDrpfZORRQzGzQeXVd2b2f/view',
        top1=83.2, top5=96.5, params=40912392, gmacs=8.44,
        coco=Coco(45.66, 49.02, (46.67, 41.53), (49.24, 42.38)),
    ),
    'se_cotnetd_152.jd_in1k': Published(
        'SE-CoTNetD-152', 'https://drive.google.com/file/d/1MkMx0a8an3ikt6LZwClIOyabBnMfR91v/view',
        top1=84.0, top5=97.0, params=55783688, gmacs=16.84,
    ),
    'se_cotnetd_152.jd_in1k_320': Published(
        'SE-CoTNetD-152 @320', 'https://drive.google.com/file/d/1E43T2jS37gR07p_FVWnjJNkMWeYMXgX9/view',
        top1=84.6, top5=97.1, params=55783688, gmacs=26.32,
    ),
}
