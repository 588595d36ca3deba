"""Images in channels-last memory, and the rows of channels that their pixels are there."""
import math

import torch
from torch import Tensor

from .launch import launch, made, repeated
from .walks import kernels_of


def channels_last(x: Tensor) -> Tensor:
    """What a convolution or a product gave, as kernels want it: cuDNN has none in channels-last for float64."""
    return x.contiguous(memory_format=torch.channels_last)


def change_format(x: Tensor, back: bool = False) -> Tensor:
    """x, (B, C, H, W), contiguous, in channels-last memory; or back. PyTorch takes several times as long."""
    if x.numel() // len(x) >= 2 ** 31:  # beyond what the kernel reaches in an image
        return x.contiguous(memory_format=torch.contiguous_format if back else torch.channels_last)
    return _transposed(x, back=back)


@repeated()
def _transposed(x: Tensor, *, back: bool) -> Tensor:
    B, C, H, W = x.shape
    out = made(torch.empty(
        x.shape, dtype=x.dtype, device=x.device,
        memory_format=torch.contiguous_format if back else torch.channels_last))
    sizes = (H * W, C) if back else (C, H * W)
    block, aligned = 64 if x.element_size() < 8 else 32, [math.gcd(n, 16) for n in sizes]
    launch(kernels_of('images_kernels').transpose_kernel, (B * -(-C // block) * -(-H * W // block),), x, out,
           *(n // align for n, align in zip(sizes, aligned)),
           ALIGN_ROWS=aligned[0], ALIGN_COLUMNS=aligned[1], BLOCK=block)
    return out


def rows_of(x: Tensor) -> Tensor:
    """(B, C, H, W), dense in channels-last, as a matrix of pixels without a gradient: (B * H * W, C)."""
    B, C, H, W = x.shape
    return x.as_strided((B * H * W, C), (C, 1))


def image_of(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `rows_of` for an image of the same size and any channels."""
    (B, _, H, W), C = like.shape, rows.shape[1]
    return rows.as_strided((B, C, H, W), (H * W * C, 1, W * C, C))
