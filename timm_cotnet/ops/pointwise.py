"""A 1x1 convolution of channels-last tensors on the CPU whose gradients are products of matrices.

The convolution is one, of pixels in rows. PyTorch's gradients of convolutions take more time for it, most of all where
images are small and channels many.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pointwise(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """`F.conv2d(x, weight, bias)` of a 1x1 convolution: (B, C_in, H, W) -> (B, C, H, W), channels-last.

    Args:
        x: (B, C_in, H, W), best channels-last.
        weight: (C, C_in, 1, 1), of the same dtype.
        bias: (C).
    """
    return Pointwise.apply(x, weight, bias)


def run_pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x) for a convolution without hooks whose kernel and stride are 1, by `pointwise` if it has one group."""
    return pointwise(x, conv.weight, conv.bias) if conv.groups == 1 else conv(x)


class Pointwise(torch.autograd.Function):
    """`apply(x, weight, bias)`, see `pointwise`."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # differentiable itself
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_x = grad_weight = None
        rows = grad.permute(0, 2, 3, 1)  # (B, H, W, C)
        if wants_x:
            grad_x = (rows @ weight.flatten(1)).permute(0, 3, 1, 2)
        if wants_weight:
            grad_weight = rows.reshape(-1, rows.shape[3]).t() @ x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
            # in memory as channels-last or other filters are, which autograd would copy it to
            is_last = weight.stride(2) == weight.shape[1]
            grad_weight = grad_weight[:, None, None].permute(0, 3, 1, 2) if is_last else grad_weight[..., None, None]
        return grad_x, grad_weight, rows.sum((0, 1, 2)) if wants_bias else None
