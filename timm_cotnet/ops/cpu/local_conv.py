"""The local convolution of channels-last tensors and its gradients, in C."""
import ctypes
from typing import Tuple

import torch
from torch import Tensor

from ..shifted import LocalConvShifted
from ..watch import wants_plain
from .build import call

MAX_KERNEL_SIZE = 7  # MAX_TAPS in local_conv.h


class Shape(ctypes.Structure):
    """`Shape` of local_conv.h."""
    _fields_ = [(name, ctypes.c_long) for name in (
        'batch', 'channels', 'groups', 'slices', 'height', 'width', 'kernel_size', 'dilation')]


def local_conv(x: Tensor, weight: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """The local convolution, without a gradient: (B, C, H, W) -> (B, C, H, W), channels-last.

    Args:
        x: Values, (B, C, H, W), channels-last, float32 or bfloat16.
        weight: Filters, (B, G, k * k, H, W), of which `permute(0, 3, 4, 1, 2)` is contiguous; of x's dtype.
        kernel_size: k, odd, at most `MAX_KERNEL_SIZE`.
        dilation: Distance between the taps of a filter, in pixels.
    """
    out = torch.empty_like(x)
    call('local_conv', x.dtype, _shape(x, weight, kernel_size, dilation), x, weight, out)
    return out


def local_conv_backward(
        grad: Tensor, x: Tensor, weight: Tensor, kernel_size: int, dilation: int) -> Tuple[Tensor, Tensor]:
    """Gradients of x and weight, in their layouts.

    Args:
        grad: Gradient of the output, (B, C, H, W), channels-last, float32 like all others.
        x: Values, as for `local_conv`.
        weight: Filters, as for `local_conv`.
        kernel_size: k, odd, at most `MAX_KERNEL_SIZE`.
        dilation: Distance between the taps of a filter, in pixels.
    """
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    call(
        'local_conv_backward', x.dtype, _shape(x, weight, kernel_size, dilation), grad, x, weight, grad_x, grad_weight)
    return grad_x, grad_weight


def _shape(x: Tensor, weight: Tensor, kernel_size: int, dilation: int):
    (B, C, H, W), groups = x.shape, weight.shape[1]
    return ctypes.byref(Shape(B, C, groups, 1, H, W, kernel_size, dilation))


class LocalConvNative(LocalConvShifted):
    """`apply(x, weight, kernel_size, dilation)` for tensors as `local_conv` takes them."""

    @staticmethod
    def forward(x, weight, kernel_size, dilation):
        return local_conv(x, weight, kernel_size, dilation)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if (
                wants_plain(grad)
                or not all(ctx.needs_input_grad[:2])
                or not x.dtype == weight.dtype == grad.dtype == torch.float32
                or not x.is_contiguous(memory_format=torch.channels_last)  # hooks may change saved tensors
                or not weight.permute(0, 3, 4, 1, 2).is_contiguous()
        ):
            return LocalConvShifted.gradients(ctx, grad, x, weight)
        grad = grad.contiguous(memory_format=torch.channels_last)
        return *local_conv_backward(grad, x, weight, ctx.kernel_size, ctx.dilation), None, None
