"""Average pool, zeros included, channels-last, in Triton."""
from typing import Tuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..watch import untraced, wants_plain
from .launch import launch, made, repeated
from .walks import THREADS, VECTOR, accumulator, kernels_of, power_of_2

Pair = Tuple[int, int]


def avg_pool(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair) -> Tensor:
    """`avg_pool2d` of (B, C, H, W), channels-last."""
    return AvgPool.apply(x, kernel_size, stride, padding)


class AvgPool(torch.autograd.Function):
    """`apply(x, kernel_size, stride, padding)`."""

    @staticmethod
    def forward(ctx, x, kernel_size, stride, padding):
        B, C, *sides = x.shape
        sides = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(sides, kernel_size, stride, padding))
        ctx.shape, ctx.geometry = tuple(x.shape), (kernel_size, stride, padding)
        return _pool(x, (B, C, *sides), False, *ctx.geometry)

    @staticmethod
    def backward(ctx, grad):
        if wants_plain(grad):
            with torch.enable_grad():
                x = grad.new_zeros(ctx.shape, requires_grad=True)
                out = avg_pool2d(x, *ctx.geometry)
                return torch.autograd.grad(out, x, grad, create_graph=True)[0], None, None, None
        return untraced(_pool)(grad, ctx.shape, True, *ctx.geometry), None, None, None


def _pool(x: Tensor, shape: Tuple[int, ...], adjoint: bool, *geometry: Pair) -> Tensor:
    """What has this shape: means of x, or if adjoint the gradient of what was pooled from that of the means, x."""
    with torch.cuda.device_of(x):
        return _launch(x.contiguous(memory_format=torch.channels_last), shape=shape, adjoint=adjoint, geometry=geometry)


@repeated()
def _launch(x: Tensor, *, shape: Tuple[int, ...], adjoint: bool, geometry: Tuple[Pair, Pair, Pair]) -> Tensor:
    (B, C, H, W), (kernel_size, stride, padding) = shape, geometry
    out = made(torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last))
    block_c = min(power_of_2(C), 128 // x.element_size())
    block_p = max(1, 2 * THREADS * VECTOR // x.element_size() // block_c)
    launch(
        kernels_of('rows').avg_pool_kernel, (B * -(-H * W // block_p) * -(-C // block_c),), x, out, H, W,
        *x.shape[2:], C=C, KH=kernel_size[0], KW=kernel_size[1], SH=stride[0], SW=stride[1], PH=padding[0],
        PW=padding[1], ADJOINT=adjoint, BLOCK_P=block_p, BLOCK_C=block_c, ACC=accumulator(x.dtype)[1])
    return out
