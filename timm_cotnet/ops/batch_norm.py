"""Batch norm, the sum with a residual and the activation in one operation: `batch_norm_act`."""
import ctypes
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .memory import empty_like
from .native import MAX_NUMBERS, load
from .watch import are_watched, is_traced

_SOURCE = 'batch_norm.c'


def batch_norm_act(
        x: Tensor,
        norm: nn.Module,
        act: Optional[nn.Module] = None,
        residual: Optional[Tensor] = None,
) -> Tensor:
    """`act(norm(x) + residual)`; in training on the CPU, where the modules and tensors allow it, as one fused function.

    Fused, each direction goes over memory twice, and without a residual the output is not kept for the backward.

    Args:
        x: (B, C, H, W).
        norm: Normalization of C channels, whose running statistics are updated as it does that itself.
        act: Activation, None for none.
        residual: Summand, of the shape of x.
    """
    if why_not_fused(x, norm, act, residual) is None:
        return BatchNormAct.apply(x, norm.weight, norm.bias, residual, norm, type(act) is nn.ReLU)
    x = norm(x)
    if residual is not None:
        x += residual
    return x if act is None else act(x)


def why_not_fused(
        x: Tensor,
        norm: nn.Module,
        act: Optional[nn.Module],
        residual: Optional[Tensor] = None,
) -> Optional[str]:
    """The reason why `BatchNormAct` cannot take these here and now; None if it can."""
    if type(norm) is not nn.BatchNorm2d or type(act) not in (type(None), nn.Identity, nn.ReLU):
        return f'there is no kernel for {type(norm).__name__} and {type(act).__name__}'
    if not norm.training or not torch.is_grad_enabled():
        return 'the kernels are for training'
    if is_traced(x) or residual is not None and is_traced(residual):
        return 'operators are watched'
    if norm.momentum is None or not norm.track_running_stats or norm.num_batches_tracked is None:
        return 'the running statistics are not moving averages'
    if not _is_plain(x, x.shape) or x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return 'x is not a channels-last float32 tensor on the CPU'
    if residual is not None and not (
            _is_plain(residual, x.shape) and residual.is_contiguous(memory_format=torch.channels_last)):
        return 'the residual is not a channels-last float32 tensor of the shape of x on the CPU'
    if x.numel() <= x.shape[1]:
        return 'a channel has no two values'
    if x.shape[1] > MAX_NUMBERS:
        return f'x has {x.shape[1]} channels, more than {MAX_NUMBERS}'
    channels = (x.shape[1],)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if not _is_plain(tensor, channels) or not tensor.is_contiguous():
            return 'a parameter or running statistic is not a contiguous float32 tensor of C numbers on the CPU'
    if are_watched([norm, act]):
        return 'hooks want to see the modules run'
    if torch.is_autocast_enabled('cpu'):
        return 'autocast chooses the dtypes'
    if forward_ad._current_level >= 0:
        return 'the kernels have no forward-mode derivative'
    library = load(torch.float32, _SOURCE)
    return library if isinstance(library, str) else None


def _is_plain(tensor: Optional[Tensor], shape: tuple) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.dtype == torch.float32
        and tensor.device.type == 'cpu'
        and tensor.shape == shape
    )


class BatchNormAct(torch.autograd.Function):
    """`apply(x, weight, bias, residual, norm, relu)` where `why_not_fused` is None."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, norm, relu):
        out, statistics = empty_like(x), x.new_empty(4, x.shape[1])
        load(torch.float32, _SOURCE).batch_norm_act(
            *_sizes(x), *_pointers(x, weight, bias, residual, statistics, out), ctypes.c_double(norm.eps),
            ctypes.c_int(relu), ctypes.c_int(torch.get_num_threads()))
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(statistics[0], norm.momentum)
        norm.running_var.lerp_(statistics[3], norm.momentum)
        ctx.eps, ctx.relu, ctx.residual = norm.eps, relu, residual is not None
        # what ReLU lets through follows from x, unless there is a residual
        ctx.save_for_backward(x, weight, bias, statistics, out if relu and ctx.residual else None)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, statistics, out = ctx.saved_tensors
        # a second derivative is wanted, or many gradients at once: the first one as differentiable plain PyTorch
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
            return _gradients(ctx, grad, x, weight, bias, out)
        grad, x = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (grad, x))
        if out is not None:
            out = out.contiguous(memory_format=torch.channels_last)  # hooks may change the strides of what is saved
        grad_x = empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
        grad_residual = grad if out is None else empty_like(x)
        load(torch.float32, _SOURCE).batch_norm_act_backward(
            *_sizes(x), *_pointers(grad, x, out, weight, bias, statistics, grad_x, grad_weight, grad_bias),
            *_pointers(None if out is None else grad_residual), ctypes.c_int(ctx.relu),
            ctypes.c_int(torch.get_num_threads()))
        return grad_x, grad_weight, grad_bias, grad_residual if ctx.residual else None, None, None


def _gradients(ctx, grad, x, weight, bias, out):
    """`BatchNormAct.backward` in differentiable plain PyTorch."""
    with torch.enable_grad():
        inputs = x.view_as(x), weight.view_as(weight), bias.view_as(bias)
        normed = F.batch_norm(inputs[0], None, None, *inputs[1:], True, 0.0, ctx.eps)
        if ctx.relu:
            grad = grad.masked_fill((normed if out is None else out) <= 0, 0)
        wanted = [tensor for tensor, need in zip(inputs, ctx.needs_input_grad) if need]
        grads = iter(torch.autograd.grad(normed, wanted, grad, create_graph=True) if wanted else ())
    grad_inputs = (next(grads) if need else None for need in ctx.needs_input_grad[:3])
    return *grad_inputs, grad if ctx.residual else None, None, None


def _sizes(x: Tensor):
    return ctypes.c_long(x.numel() // x.shape[1]), ctypes.c_long(x.shape[1])


def _pointers(*tensors: Optional[Tensor]):
    return (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
