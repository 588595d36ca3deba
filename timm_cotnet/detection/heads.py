"""Parts of the published detectors that torchvision has in another form: anchors, pooling, predictors."""
from typing import Dict, List, Tuple

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead as TorchvisionRPNHead
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import _convert_to_roi_format, _filter_input, _setup_scales

__all__ = ['AlignedRoIAlign', 'AnchorGenerator', 'BoxPredictor', 'RPNHead']


class AnchorGenerator(TorchvisionAnchorGenerator):
    """torchvision's anchors with their exact sizes and strides.

    torchvision rounds corners to whole pixels, and divides the image's size by that of a level to get a stride: 61
    instead of 64 for 800 pixels on 13 positions. detectron2 does neither, and the published detectors were trained so.
    """

    def generate_anchors(
            self,
            scales: List[int],
            aspect_ratios: List[float],
            dtype: torch.dtype = torch.float32,
            device: torch.device = torch.device('cpu'),
    ) -> torch.Tensor:
        """Anchors around zero, (ratios * scales, 4) as x1, y1, x2, y2; aspect ratios are height to width."""
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths, heights = (sizes / roots[:, None]).flatten(), (sizes * roots[:, None]).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: List[torch.Tensor]) -> List[torch.Tensor]:
        """All anchors of each image, (N, 4) in pixels, level by level, row by row.

        Args:
            image_list: Images.
            feature_maps: Levels of the pyramid, (B, C, H, W).
        """
        height, width = image_list.tensors.shape[-2:]
        grid_sizes: List[List[int]] = []
        strides: List[List[torch.Tensor]] = []
        for feature in feature_maps:
            rows, columns = feature.shape[-2:]
            grid_sizes.append([rows, columns])
            ratios = torch.tensor([height / rows, width / columns], device=feature.device)
            stride = torch.exp2(ratios.log2().round()).to(torch.int64)
            strides.append([stride[0], stride[1]])
        self.set_cell_anchors(feature_maps[0].dtype, feature_maps[0].device)
        anchors = torch.cat(self.grid_anchors(grid_sizes, strides))
        return [anchors for _ in image_list.image_sizes]


class AlignedRoIAlign(MultiScaleRoIAlign):
    """torchvision's pooling of regions from a pyramid, without its shift of half a pixel of a level.

    detectron2's `ROIAlignV2`: `roi_align(..., aligned=True)`, as many samples in a bin as it has pixels.

    Args:
        output_size: Rows and columns of bins.
    """

    def __init__(self, output_size: int):
        super().__init__(['0', '1', '2', '3'], output_size, sampling_ratio=0)

    def forward(
            self,
            x: Dict[str, torch.Tensor],
            boxes: List[torch.Tensor],
            image_shapes: List[Tuple[int, int]],
    ) -> torch.Tensor:
        """Pooled regions of all images, (N, C, output_size, output_size).

        Args:
            x: Levels of the pyramid, by name.
            boxes: Regions of each image, (N, 4) in pixels.
            image_shapes: Height and width of each image without padding.
        """
        features = _filter_input(x, self.featmap_names)
        if self.scales is None or self.map_levels is None:
            shapes = image_shapes
            if max([shape[1] for shape in shapes]) > max([shape[0] for shape in shapes]):
                # torchvision looks at heights, which padding makes several times as large in images that are thin
                features = [feature.transpose(2, 3) for feature in features]
                shapes = [(shape[1], shape[0]) for shape in shapes]
            self.scales, self.map_levels = _setup_scales(features, shapes, self.canonical_scale, self.canonical_level)
            features = _filter_input(x, self.featmap_names)
        scales, map_levels = self.scales, self.map_levels
        assert scales is not None and map_levels is not None  # TorchScript asks
        rois, levels = _convert_to_roi_format(boxes), map_levels(boxes)
        pooled = torch.zeros(
            [len(rois), features[0].shape[1], self.output_size[0], self.output_size[1]],
            dtype=features[0].dtype, device=features[0].device)
        for level, (feature, scale) in enumerate(zip(features, scales)):
            chosen = torch.where(levels == level)[0]
            pooled[chosen] = roi_align(
                feature.to(rois.dtype), rois[chosen], self.output_size, scale, self.sampling_ratio, aligned=True,
            ).to(pooled.dtype)
        return pooled


class RPNHead(TorchvisionRPNHead):
    """torchvision's head of the region proposals, whose results are in full precision under autocast too.

    Boxes are computed in the dtype of the offsets, and bfloat16 has no pixels between 1024 and 1032.
    """

    def forward(self, x: List[torch.Tensor]) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        """Logits (B, anchors, H, W) and box offsets (B, anchors * 4, H, W) of each level.

        Args:
            x: Levels of the pyramid, (B, C, H, W).
        """
        logits: List[torch.Tensor] = []
        offsets: List[torch.Tensor] = []
        for feature in x:
            hidden = self.conv(feature)
            logits.append(_full_precision(self.cls_logits(hidden)))
            offsets.append(_full_precision(self.bbox_pred(hidden)))
        return logits, offsets


class BoxPredictor(nn.Module):
    """Scores and boxes of regions, in full precision under autocast too.

    Args:
        in_channels: Channels of its input.
        num_classes: Number of classes, the background included.
        class_agnostic: Predict one box for all classes; it is repeated for each, as torchvision expects.
    """

    def __init__(self, in_channels: int, num_classes: int, class_agnostic: bool = False):
        super().__init__()
        self.repeats = num_classes if class_agnostic else 1
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4 if class_agnostic else 4 * num_classes)
        # as in detectron2: what a cascade refines is at first almost what it was
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, num_classes) and box offsets (N, num_classes * 4).

        Args:
            x: Features of regions, (N, in_channels).
        """
        offsets = _full_precision(self.bbox_pred(x))
        return _full_precision(self.cls_score(x)), offsets.repeat(1, self.repeats)


def _full_precision(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
