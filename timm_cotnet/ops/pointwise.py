"""A 1x1 convolution of channels-last tensors on the CPU whose gradients are products of matrices.

The convolution is one, of pixels in rows. PyTorch's gradients of convolutions take more time for it, most of all where
images are small and channels many.
"""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .watch import wants_plain


def pointwise(
        x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, stride: Tuple[int, int] = (1, 1)) -> Tensor:
    """`F.conv2d(x, weight, bias, stride)` of a 1x1 convolution: (B, C_in, H, W) -> (B, C, H', W'), channels-last.

    Args:
        x: (B, C_in, H, W), best channels-last.
        weight: (C, C_in, 1, 1), of the same dtype.
        bias: (C).
        stride: Vertical and horizontal.
    """
    return Pointwise.apply(x, weight, bias, stride, False)


def run_pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x) for a convolution without hooks, of kernel size 1, one group and without padding."""
    return pointwise(x, conv.weight, conv.bias, conv.stride)


def run_pointwise_with_shortcut(conv: nn.Conv2d, x: Tensor) -> Tuple[Tensor, Tensor]:
    """conv(x), of stride 1, and x for the shortcut around it: the sum of both gradients goes over the latter's.

    So whoever reads the shortcut has to make a new tensor for its gradient. One fewer is made, and read again.
    """
    return Pointwise.apply(x, conv.weight, conv.bias, (1, 1), True) if x.requires_grad else (run_pointwise(conv, x), x)


class Pointwise(torch.autograd.Function):
    """`apply(x, weight, bias, stride, with_shortcut)`, see `pointwise` and `run_pointwise_with_shortcut`."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, with_shortcut):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        out = F.conv2d(x, weight, bias, stride)
        return (out, x) if with_shortcut else out

    @staticmethod
    def backward(ctx, grad, grad_shortcut=None):  # differentiable itself
        if grad is None:
            return grad_shortcut, None, None, None, None
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = None
        rows = grad.permute(0, 2, 3, 1)  # (B, H', W', C)
        with torch.autocast(grad.device.type, enabled=False):
            if wants_x and ctx.stride == (1, 1):
                grad_x = add_product(rows, weight.flatten(1), grad_shortcut)
            elif wants_x:
                grad_x = _strided_grad(grad, x, weight, ctx.stride)
            if wants_weight:
                read = x[:, :, ::ctx.stride[0], ::ctx.stride[1]].permute(0, 2, 3, 1)  # (B, H', W', C_in)
                grad_weight = rows.reshape(-1, rows.shape[3]).t() @ read.reshape(-1, read.shape[3])
                if weight.stride(2) == weight.shape[1]:  # channels-last in memory, to which autograd would copy it
                    grad_weight = grad_weight[:, None, None].permute(0, 3, 1, 2)
                else:
                    grad_weight = grad_weight[..., None, None]
        return grad_x, grad_weight, rows.sum((0, 1, 2)) if wants_bias else None, None, None


def add_product(rows: Tensor, matrix: Tensor, addend: Optional[Tensor]) -> Tensor:
    """(B, H, W, C) @ (C, C_in) + addend: (B, C_in, H, W), over an addend that is dense in channels-last."""
    if addend is None or wants_plain(rows, addend) or not addend.is_contiguous(memory_format=torch.channels_last):
        out = (rows @ matrix).permute(0, 3, 1, 2)
        return out if addend is None else addend + out
    addend.permute(0, 2, 3, 1).view(-1, matrix.shape[1]).addmm_(rows.flatten(0, 2), matrix)
    return addend


def _strided_grad(grad: Tensor, x: Tensor, weight: Tensor, stride: Tuple[int, int]) -> Tensor:
    """Gradient of x, zero wherever no stride led to: (B, C_in, H, W)."""
    if wants_plain(grad):
        return torch.nn.grad.conv2d_input(x.shape, weight, grad, stride)
    out = torch.zeros_like(x, memory_format=torch.channels_last)
    out.permute(0, 2, 3, 1)[:, ::stride[0], ::stride[1]] = grad.permute(0, 2, 3, 1) @ weight.flatten(1)
    return out
