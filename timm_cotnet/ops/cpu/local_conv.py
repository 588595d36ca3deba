"""The local convolution of channels-last tensors and its gradients in C, as operators, which graphs hold too."""
import ctypes
from typing import Tuple

import torch
from torch import Tensor

from ..shifted import LocalConvShifted, input_grad, weight_grad
from ..watch import wants_plain
from .build import call

MAX_KERNEL_SIZE = 7  # MAX_TAPS in local_conv.h


class Shape(ctypes.Structure):
    """`Shape` of local_conv.h."""
    _fields_ = [(name, ctypes.c_long) for name in (
        'batch', 'channels', 'groups', 'slices', 'height', 'width', 'kernel_size', 'dilation')]

    @classmethod
    def of(cls, x: Tensor, groups: int = 1, slices: int = 1, kernel_size: int = 1, dilation: int = 1) -> 'Shape':
        B, C, H, W = x.shape
        return cls(B, C, groups, slices, H, W, kernel_size, dilation)


@torch.library.custom_op('timm_cotnet::local_conv_on_cpu', mutates_args=())
def local_conv(x: Tensor, weight: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """The local convolution, with a gradient: (B, C, H, W) -> (B, C, H, W), in memory like x.

    Args:
        x: Values, (B, C, H, W), best channels-last, float32 or bfloat16.
        weight: Filters, (B, G, k * k, H, W), of which `permute(0, 3, 4, 1, 2)` is best contiguous; of x's dtype.
        kernel_size: k, odd, at most `MAX_KERNEL_SIZE`.
        dilation: Distance between the taps of a filter, in pixels.
    """
    dense, filters = channels_last(x), _dense_filters(weight)
    out, shape = torch.empty_like(dense), Shape.of(x, weight.shape[1], 1, kernel_size, dilation)
    call('local_conv', x.dtype, ctypes.byref(shape), dense, filters, out)
    return _like(out, x)


@local_conv.register_fake
def _(x, weight, kernel_size, dilation):
    return torch.empty_like(x)


@torch.library.custom_op('timm_cotnet::local_conv_on_cpu_backward', mutates_args=())
def local_conv_backward(
        grad: Tensor, x: Tensor, weight: Tensor, kernel_size: int, dilation: int) -> Tuple[Tensor, Tensor]:
    """Gradients of x and weight, in their layouts; the kernel is for float32 alone."""
    if not grad.dtype == x.dtype == weight.dtype == torch.float32:
        return input_grad(grad, x, weight, kernel_size, dilation), weight_grad(grad, x, weight, kernel_size, dilation)
    dense, filters = channels_last(x), _dense_filters(weight)
    grad_x, grad_weight = torch.empty_like(dense), torch.empty_like(filters)
    shape = Shape.of(x, weight.shape[1], 1, kernel_size, dilation)
    call('local_conv_backward', x.dtype, ctypes.byref(shape), channels_last(grad), dense, filters, grad_x, grad_weight)
    return _like(grad_x, x), _like(grad_weight, weight)


@local_conv_backward.register_fake
def _(grad, x, weight, kernel_size, dilation):
    return torch.empty_like(x), torch.empty_like(weight)


def _gradients(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    if wants_plain(grad):
        return LocalConvShifted.gradients(ctx, grad, x, weight)
    return *local_conv_backward(grad, x, weight, ctx.kernel_size, ctx.dilation), None, None


local_conv.register_autograd(_gradients, setup_context=LocalConvShifted.setup_context)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def empty_like(x: Tensor) -> Tensor:
    """An empty tensor like x, which is dense. Its memory, once freed, will do for the next tensor of its size: to align
    a block, glibc looks for one that is 112 bytes larger, and passes over those that would just fit."""
    memory = torch.UntypedStorage(x.numel() * x.element_size() + 128, device='cpu')
    return x.new_empty(0).set_(memory, 0, x.shape, x.stride())


def _dense_filters(weight: Tensor) -> Tensor:
    return weight.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)


def _like(out: Tensor, tensor: Tensor) -> Tensor:
    """out in memory as fake tensors say that it is."""
    like = torch.empty_like(tensor)
    return out if out.stride() == like.stride() else like.copy_(out)
