"""Batch norm in training: with the sum with a residual, the activation and a 1x1 convolution before it as one function.

Activations are by far the largest in training, and each of these operations alone does little more than go over them.
"""
import ctypes
from typing import Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .memory import empty_like, on_huge_pages
from .native import MAX_NUMBERS, load
from .watch import are_watched, is_traced

_SOURCE = 'batch_norm.c'
_PIXELS, _PAD, _PANEL = 128, 16, 32  # of batch_norm.c
MAX_FILTERS = 1 << 18  # of a convolution: more do not fit into a level 2 cache of a megabyte
MIN_PIXELS = 32  # of a thread: with fewer, what sums the threads' gradients takes too long


class Convolution(ctypes.Structure):
    """`Convolution` of batch_norm.c."""
    _fields_ = [
        ('inputs', ctypes.c_long), ('sources', ctypes.c_long), ('x', ctypes.c_void_p * 2), ('filters', ctypes.c_void_p),
        ('scratch', ctypes.c_void_p), ('grad_x', ctypes.c_void_p * 2), ('grad_filters', ctypes.c_void_p),
        ('shared', ctypes.c_void_p)]


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
        return BatchNormAct.apply(norm, type(act) is nn.ReLU, False, norm.weight, norm.bias, residual, None, x)
    x = norm(x)
    if residual is not None:
        x += residual
    return x if act is None else act(x)


def conv_norm_act(
        conv: nn.Conv2d,
        norm: nn.Module,
        act: Optional[nn.Module],
        *inputs: Tensor,
        residual: Optional[Tensor] = None,
        share: bool = False,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """`batch_norm_act(conv(*inputs), norm, act, residual)`, in training on the CPU as one function where it can be.

    Fused, the convolution's output is summed for the norm while it is made, and its gradient is never in memory whole.

    Args:
        conv: Convolution without a bias; with two inputs it has `pair`, which adds the products of both.
        norm: As for `batch_norm_act`, like the next.
        act: Activation, None for none.
        *inputs: One or two, (B, C_in, H, W) each.
        residual: Summand, of the shape of the convolution's output.
        share: Whether to return the first input, too, for other readers: their gradient is added in the same pass.
    """
    if why_not_conv(conv, inputs) is None and why_not_fused(
            inputs[0], norm, act, residual, conv.out_channels) is None:
        out = BatchNormAct.apply(
            norm, type(act) is nn.ReLU, share and inputs[0].requires_grad, norm.weight, norm.bias, residual,
            conv.weight, *inputs)
        return (out, inputs[0]) if share and not inputs[0].requires_grad else out
    x = conv(*inputs) if len(inputs) == 1 else conv.pair(*inputs)
    out = batch_norm_act(x, norm, act, residual)
    return (out, inputs[0]) if share else out


def why_not_conv(conv: nn.Conv2d, inputs: Sequence[Tensor]) -> Optional[str]:
    """The reason why `BatchNormAct` cannot take the convolution with these inputs; None if it can."""
    if type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        return f'there is no kernel for {type(conv).__name__}'
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding != (0, 0) or conv.groups != 1:
        return 'it is no 1x1 convolution of stride 1 and one group'
    if conv.bias is not None:
        return 'the convolution has a bias'
    if 'weight' not in conv._parameters:
        return 'the filters are computed anew whenever they are read'
    if are_watched([conv]):
        return 'hooks want to see the convolution run'
    x, filters = inputs[0], conv.weight
    if is_traced(x) or is_traced(filters):
        return 'operators are watched'
    if x.ndim != 4 or not all(
            _is_plain(other, x.shape) and other.is_contiguous(memory_format=torch.channels_last) for other in inputs):
        return 'an input is not a channels-last float32 tensor on the CPU, of the shape of the first'
    if not _is_plain(filters, (conv.out_channels, x.shape[1] * len(inputs), 1, 1)) or not filters.is_contiguous():
        return f'{x.shape[1]} channels do not fit the filters, or they are not contiguous float32 on the CPU'
    if x.shape[1] % 4 != 0 or conv.out_channels % 4 != 0:
        return f'{x.shape[1]} or {conv.out_channels} channels are not a multiple of 4'
    if filters.numel() > MAX_FILTERS:
        return f'there are {filters.numel()} filters, more than {MAX_FILTERS}'
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if pixels < MIN_PIXELS * torch.get_num_threads():
        return f'there are {pixels} pixels, fewer than {MIN_PIXELS} for each thread'
    library = load(torch.float32, _SOURCE)
    if isinstance(library, str):
        return library
    return 'the processor has no vectors of numbers' if library.vector_lanes() == 1 else None


def why_not_fused(
        x: Tensor,
        norm: nn.Module,
        act: Optional[nn.Module],
        residual: Optional[Tensor] = None,
        channels: Optional[int] = None,
) -> Optional[str]:
    """The reason why `BatchNormAct` cannot take these here and now; None if it can.

    Args:
        x: What is normed, or the input of the convolution before the norm.
        norm: Norm, like the next as for `batch_norm_act`.
        act: Activation.
        residual: Summand.
        channels: What the norm gets, if it is not x.
    """
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
    channels = channels or x.shape[1]
    if residual is not None and not (
            _is_plain(residual, (x.shape[0], channels, *x.shape[2:]))
            and residual.is_contiguous(memory_format=torch.channels_last)):
        return 'the residual is not a channels-last float32 tensor of the shape of the output on the CPU'
    if x.numel() <= x.shape[1]:
        return 'a channel has no two values'
    if channels > MAX_NUMBERS:
        return f'there are {channels} channels, more than {MAX_NUMBERS}'
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if not _is_plain(tensor, (channels,)) or not tensor.is_contiguous():
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
        and not tensor.is_neg()
    )


class BatchNormAct(torch.autograd.Function):
    """`apply(norm, relu, share, weight, bias, residual, filters, *inputs)`: see `conv_norm_act`.

    Without filters there is no convolution: the input itself is normed.
    """

    @staticmethod
    def forward(ctx, norm, relu, share, weight, bias, residual, filters, *inputs):
        x, conv = inputs[0], None
        if filters is not None:
            B, _, H, W = x.shape
            x = on_huge_pages(torch.empty(
                (B, filters.shape[0], H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last))
            scratch = x.new_empty(filters.numel())
            conv = _convolution(inputs, filters, scratch)
        out, statistics = empty_like(x), x.new_empty(4, x.shape[1])
        load(torch.float32, _SOURCE).batch_norm_act(
            conv, *_sizes(x), *_pointers(x, weight, bias, residual, statistics, out), ctypes.c_double(norm.eps),
            ctypes.c_int(relu), ctypes.c_int(torch.get_num_threads()))
        norm.num_batches_tracked.add_(1)
        # as plain batch norm, which saves them: autograd is not told that they change
        norm.running_mean.data.lerp_(statistics[0], norm.momentum)
        norm.running_var.data.lerp_(statistics[3], norm.momentum)
        ctx.eps, ctx.relu, ctx.residual = norm.eps, relu, residual is not None
        ctx.set_materialize_grads(False)
        # what ReLU lets through follows from x, unless there is a residual
        ctx.save_for_backward(
            x, weight, bias, statistics, out if relu and ctx.residual else None, filters,
            *(inputs if filters is not None else ()))
        return (out, inputs[0]) if share else out

    @staticmethod
    def backward(ctx, grad, shared=None):
        x, weight, bias, statistics, out, filters, *inputs = ctx.saved_tensors
        if grad is None:  # only the shared input was read
            return *(None for _ in range(7)), shared, *(None for _ in inputs[1:])
        # a second derivative is wanted, or many gradients at once: the first one as differentiable plain PyTorch
        if torch.is_grad_enabled() or any(
                torch._C._functorch.is_legacy_batchedtensor(g) for g in (grad, shared) if g is not None):
            return _gradients(ctx, grad, shared, x, weight, bias, out, filters, *inputs)
        # Nobody reads x again but this backward, unless the graph is kept. A hook on what is saved may have kept it:
        # then it is not the graph's own tensor, which the graph and this name refer to.
        is_last_use = filters is not None and x._use_count() == 2 \
            and not torch._C._autograd._get_current_graph_task_keep_graph()
        # hooks may also change strides and dtypes
        saved = (x, weight, bias, statistics, out, filters, *inputs)
        if any(tensor is not None and tensor.dtype != torch.float32 for tensor in saved):
            raise TypeError('tensors that were saved in float32 have another dtype now, by a saved-tensors hook')
        weight, bias, statistics = (tensor.contiguous() for tensor in (weight, bias, statistics))
        grad, x, out, shared, *inputs = (
            tensor if tensor is None else tensor.resolve_neg().contiguous(memory_format=torch.channels_last)
            for tensor in (grad, x, out, shared, *inputs))
        wanted = ctx.needs_input_grad[6:]
        threads = min(torch.get_num_threads(), x.numel() // x.shape[1])  # each has a pixel
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
        if out is None:
            grad_residual = grad
        elif is_last_use:
            grad_residual = x
        else:
            grad_residual = empty_like(x)
        grad_x = grad_filters = conv = None
        if filters is None:
            grad_x = empty_like(x) if wanted[1] or out is not None else None
            grad_inputs = [grad_x if wanted[1] else None]
        else:
            filters = filters.contiguous()
            grad_inputs = [empty_like(t) if want else None for t, want in zip(inputs, wanted[1:])]
            grad_filters = torch.empty_like(filters) if wanted[0] else None
            room = _PIXELS * (x.shape[1] + _PAD + _PANEL) + filters.numel()
            scratch = x.new_empty(filters.numel() + threads * room)
            conv = _convolution(inputs, filters, scratch, grad_inputs, grad_filters, shared)
        load(torch.float32, _SOURCE).batch_norm_act_backward(
            conv, *_sizes(x), *_pointers(grad, x, out, weight, bias, statistics, grad_x, grad_weight, grad_bias),
            *_pointers(None if out is None else grad_residual), ctypes.c_int(ctx.relu), ctypes.c_int(threads))
        grad_residual = grad_residual if ctx.residual else None
        return None, None, None, grad_weight, grad_bias, grad_residual, grad_filters, *grad_inputs


def _gradients(ctx, grad, shared, x, weight, bias, out, filters, *inputs):
    """`BatchNormAct.backward` in differentiable plain PyTorch."""
    with torch.enable_grad():
        tensors = [t if t is None else t.view_as(t) for t in (weight, bias, filters, *(inputs or [x]))]
        weight, bias, filters, *inputs = tensors
        if filters is None:
            x = inputs[0]
        else:
            parts = filters.split(inputs[0].shape[1], 1)
            x = sum(F.conv2d(x, part) for x, part in zip(inputs, parts))
        normed = F.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps)
        if ctx.relu:
            grad = grad.masked_fill((normed if out is None else out) <= 0, 0)
        needed = [*ctx.needs_input_grad[3:5], *ctx.needs_input_grad[6:]]
        wanted = [tensor for tensor, need in zip(tensors, needed) if need]
        grads = iter(torch.autograd.grad(normed, wanted, grad, create_graph=True) if wanted else ())
        grad_weight, grad_bias, grad_filters, *grad_inputs = (next(grads) if need else None for need in needed)
        if shared is not None and grad_inputs[0] is not None:
            grad_inputs[0] = grad_inputs[0] + shared
    return None, None, None, grad_weight, grad_bias, grad if ctx.residual else None, grad_filters, *grad_inputs


def _convolution(inputs, filters, scratch, grad_inputs=(), grad_filters=None, shared=None):
    """`Convolution` of batch_norm.c; the caller keeps the tensors alive."""
    addresses = [[t if t is None else t.data_ptr() for t in tensors] for tensors in (inputs, grad_inputs)]
    x, grad_x = ((ctypes.c_void_p * 2)(*some) for some in addresses)
    return ctypes.byref(Convolution(
        inputs[0].shape[1], len(inputs), x, filters.data_ptr(), scratch.data_ptr(), grad_x,
        *(t if t is None else t.data_ptr() for t in (grad_filters, shared))))


def _sizes(x: Tensor):
    return ctypes.c_long(x.numel() // x.shape[1]), ctypes.c_long(x.shape[1])


def _pointers(*tensors: Optional[Tensor]):
    return (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
