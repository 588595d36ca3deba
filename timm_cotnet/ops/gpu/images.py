"""Images in channels-last memory, and the rows of channels that their pixels are there."""
import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """What a convolution or a product gave, as kernels want it: cuDNN has none in channels-last for float64."""
    return x.contiguous(memory_format=torch.channels_last)


def rows_of(x: Tensor) -> Tensor:
    """(B, C, H, W), channels-last, as a matrix of pixels: (B * H * W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def image_of(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `rows_of` for an image of the same size."""
    B, _, H, W = like.shape
    return rows.view(B, H, W, -1).permute(0, 3, 1, 2)
