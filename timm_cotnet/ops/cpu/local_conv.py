"""The local convolution of channels-last tensors and its gradients, in C."""
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


# What compiled graphs hold


def compiled_local_conv(x: Tensor, weight: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """`local_conv` as operator of a graph, with a gradient: x and weight may have any strides."""
    return _operator(x, weight, kernel_size, dilation)


@torch.library.custom_op('timm_cotnet::local_conv_on_cpu', mutates_args=())
def _operator(x: Tensor, weight: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return _like(local_conv(_dense(x), _dense_filters(weight), kernel_size, dilation), x)


@_operator.register_fake
def _(x, weight, kernel_size, dilation):
    return torch.empty_like(x)


@torch.library.custom_op('timm_cotnet::local_conv_on_cpu_backward', mutates_args=())
def _backward_operator(
        grad: Tensor, x: Tensor, weight: Tensor, kernel_size: int, dilation: int) -> Tuple[Tensor, Tensor]:
    if x.dtype == torch.float32:
        grads = local_conv_backward(_dense(grad), _dense(x), _dense_filters(weight), kernel_size, dilation)
    else:
        grads = input_grad(grad, x, weight, kernel_size, dilation), weight_grad(grad, x, weight, kernel_size, dilation)
    return _like(grads[0], x), _like(grads[1], weight)


@_backward_operator.register_fake
def _(grad, x, weight, kernel_size, dilation):
    return torch.empty_like(x), torch.empty_like(weight)


def _gradients(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    if wants_plain(grad):
        return LocalConvShifted.gradients(ctx, grad, x, weight)
    return *_backward_operator(grad, x, weight, ctx.kernel_size, ctx.dilation), None, None


def _save(ctx, inputs: Tuple, output: Tensor) -> None:
    x, weight, ctx.kernel_size, ctx.dilation = inputs
    ctx.save_for_backward(x, weight)


_operator.register_autograd(_gradients, setup_context=_save)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _dense_filters(weight: Tensor) -> Tensor:
    return weight.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)


def _like(out: Tensor, tensor: Tensor) -> Tensor:
    """out in memory as fake tensors say that it is."""
    like = torch.empty_like(tensor)
    return out if out.stride() == like.stride() else like.copy_(out)
