"""Average pool, zeros included, channels-last, in Triton."""
from typing import Tuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..watch import untraced, wants_plain
from .launch import THREADS, VECTOR, accumulator, launch, power_of_2

Pair = Tuple[int, int]


def avg_pool(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair) -> Tensor:
    """`avg_pool2d` of (B, C, H, W), channels-last."""
    return AvgPool.apply(x, kernel_size, stride, padding)


class AvgPool(torch.autograd.Function):
    """`apply(x, kernel_size, stride, padding)`."""

    @staticmethod
    def forward(ctx, x, kernel_size, stride, padding):
        B, C, H, W = x.shape
        out_h, out_w = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip((H, W), kernel_size, stride, padding))
        ctx.shape, ctx.geometry = x.shape, (kernel_size, stride, padding)
        x = x.contiguous(memory_format=torch.channels_last)
        out = torch.empty((B, C, out_h, out_w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        _launch(x, out, False, *ctx.geometry)
        return out

    @staticmethod
    def backward(ctx, grad):
        if wants_plain(grad):
            with torch.enable_grad():
                x = grad.new_zeros(ctx.shape, requires_grad=True)
                out = avg_pool2d(x, *ctx.geometry)
                return torch.autograd.grad(out, x, grad, create_graph=True)[0], None, None, None
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        untraced(_launch)(grad, grad_x, True, *ctx.geometry)
        return grad_x, None, None, None


def _launch(x: Tensor, out: Tensor, adjoint: bool, kernel_size: Pair, stride: Pair, padding: Pair) -> None:
    from . import rows

    B, C, H, W = out.shape
    block_c = min(power_of_2(C), 128 // x.element_size())
    block_p = max(1, 2 * THREADS * VECTOR // x.element_size() // block_c)
    with torch.cuda.device_of(x):
        launch(
            rows.avg_pool_kernel, (B * -(-H * W // block_p) * -(-C // block_c),), x, out, H, W, *x.shape[2:], C=C,
            KH=kernel_size[0], KW=kernel_size[1], SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[1],
            ADJOINT=adjoint, BLOCK_P=block_p, BLOCK_C=block_c, ACC=accumulator(x.dtype)[1])
