"""Anchors and pooling against plain recomputations of detectron2's conventions."""
import math

import torch
from detectron2_conventions import STRIDES, grid_anchors
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from timm_cotnet.detection.heads import AlignedRoIAlign, AnchorGenerator
from timm_cotnet.detection.models import ANCHOR_SIZES, ASPECT_RATIOS


def test_anchors_are_neither_rounded_nor_squeezed():
    """800 x 1088: the last level has 13 x 17 places, 64 pixels apart."""
    generator = AnchorGenerator(ANCHOR_SIZES, ASPECT_RATIOS)
    sizes = [(math.ceil(800 / stride), math.ceil(1088 / stride)) for stride in STRIDES]
    levels = [torch.zeros(1, 1, *size) for size in sizes]
    found = generator(ImageList(torch.zeros(1, 3, 800, 1088), [(800, 1088)]), levels)[0]
    expected = torch.cat([
        grid_anchors(*size, stride, area[0]) for size, stride, area in zip(sizes, STRIDES, ANCHOR_SIZES)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert found[-1, 0] + found[-1, 2] == 2 * 16 * 64


def bilinear(feature, y, x):
    """Value between the centers of pixels, where detectron2 has whole numbers."""
    height, width = feature.shape[1:]
    y, x = min(max(y, 0.), height - 1.), min(max(x, 0.), width - 1.)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, over = y - top, x - left
    return (feature[:, top, left] * (1 - down) * (1 - over) + feature[:, top, right] * (1 - down) * over
            + feature[:, bottom, left] * down * (1 - over) + feature[:, bottom, right] * down * over)


def plain_pool(feature, box, stride, bins):
    """Mean of as many samples in each bin as it has pixels, half a pixel of the level up and to the left."""
    x1, y1, x2, y2 = (value / stride - 0.5 for value in box.tolist())
    height, width = (y2 - y1) / bins, (x2 - x1) / bins
    rows, columns = math.ceil(height), math.ceil(width)
    out = torch.zeros(feature.shape[0], bins, bins)
    for i in range(bins):
        for j in range(bins):
            out[:, i, j] = sum(
                bilinear(feature, y1 + (i + (a + 0.5) / rows) * height, x1 + (j + (b + 0.5) / columns) * width)
                for a in range(rows) for b in range(columns)) / (rows * columns)
    return out


def test_scales_of_pooling_after_a_thin_image():
    """Of 10 x 200 pixels, which are padded to 32 x 224, or the other way round: scales stay for all images."""
    for shape, size in (((10, 200), (32, 224)), ((200, 10), (224, 32)), ((64, 64), (64, 64))):
        levels = {str(i): torch.randn(1, 2, *(-(-side // (4 << i)) for side in size)) for i in range(4)}
        pool = AlignedRoIAlign(3)
        assert pool(levels, [torch.tensor([[1., 2, 9, 8]])], [shape]).shape == (1, 2, 3, 3)
        assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_pooling_is_aligned_and_takes_the_level_of_the_area():
    levels = {str(i): torch.randn(1, 2, 128 >> i, 128 >> i) for i in range(4)} | {'pool': torch.randn(1, 2, 8, 8)}
    boxes = torch.tensor([[10.3, 20.6, 40.1, 33.], [30., 40, 150, 190], [3, 5, 300, 260], [0, 0, 500, 480.]])
    found = AlignedRoIAlign(3)(levels, [boxes], [(512, 512)])
    for box, pooled, level in zip(boxes, found, (0, 1, 2, 3)):
        expected = plain_pool(levels[str(level)][0], box, 4 << level, 3)
        torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
    shifted = MultiScaleRoIAlign(['0', '1', '2', '3'], 3, 0)(levels, [boxes], [(512, 512)])
    assert (shifted - found).abs().max() > 0.1  # torchvision's is another


def test_pooling_of_nothing_and_in_half_precision():
    levels = {str(i): torch.randn(1, 2, 16 >> i, 16 >> i) for i in range(4)}
    assert AlignedRoIAlign(3)(levels, [torch.zeros(0, 4)], [(64, 64)]).shape == (0, 2, 3, 3)
    boxes = [torch.tensor([[10.3, 20.6, 40.1, 33.]])]
    half = {name: level.bfloat16() for name, level in levels.items()}
    found = AlignedRoIAlign(3)(half, boxes, [(64, 64)])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), AlignedRoIAlign(3)(levels, boxes, [(64, 64)]), rtol=0.05, atol=0.05)
