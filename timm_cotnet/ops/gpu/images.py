"""Images in channels-last memory, and the rows of channels that their pixels are there."""
import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """What a convolution or a product gave, as kernels want it: cuDNN has none in channels-last for float64."""
    return x.contiguous(memory_format=torch.channels_last)


def rows_of(x: Tensor) -> Tensor:
    """(B, C, H, W), dense in channels-last, as a matrix of pixels without a gradient: (B * H * W, C)."""
    B, C, H, W = x.shape
    return x.as_strided((B * H * W, C), (C, 1))


def image_of(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `rows_of` for an image of the same size and any channels."""
    (B, _, H, W), C = like.shape, rows.shape[1]
    return rows.as_strided((B, C, H, W), (H * W * C, 1, W * C, C))
