"""The grouped 3x3 convolution over the keys on the CPU, in float32, by Winograd's algorithm: 2.25 times fewer products.

F(2x2, 3x3) of Lavin & Gray, arXiv:1509.09308; key_conv.c explains it. Results equal those of `F.conv2d` up to
rounding, except that what is not finite spreads in tiles: a NaN or an infinity in x reaches all 2x2 outputs of a tile
that depends on it, and an infinite output may become NaN.
"""
import ctypes
import math
from typing import Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import forward_ad

from .memory import on_huge_pages
from .native import load
from .watch import is_traced

_SOURCE = 'key_conv.c'
_ROWS, _PAD = 8, 16  # the most of multiply.h; that of key_conv.c
# What a thread works on at once; chosen by measurements, with a level 2 cache of a megabyte.
_BLOCK = 32  # tiles
_CHANNELS = 128  # of groups that are worked on together
_FILTERS = 8192
MIN_CHANNELS = 8  # of a group: with fewer, the transforms take longer than the products that they save


class Shape(ctypes.Structure):
    """`Shape` of key_conv.c."""
    _fields_ = [(name, ctypes.c_long) for name in (
        'batch', 'groups', 'inputs', 'outputs', 'height', 'width', 'block', 'together', 'slab', 'parts')]


class Strides(ctypes.Structure):
    """`Strides` of key_conv.c."""
    _fields_ = [(name, ctypes.c_long) for name in ('group', 'outputs', 'inputs', 'y', 'x')]


def why_not_key_conv(
        x: Tensor,
        weight: Tensor,
        groups: int,
        bias: Optional[Tensor] = None,
        stride: Tuple[int, int] = (1, 1),
        padding: Tuple[int, int] = (1, 1),
        dilation: Tuple[int, int] = (1, 1),
) -> Optional[str]:
    """The reason why `key_conv` and `KeyConv` cannot take these here and now; None if they can.

    Args:
        x: (B, C, H, W).
        weight: Filters, (C_out, C // groups, 3, 3).
        groups: Groups of the channels.
        bias: (C_out), or None.
        stride: What a convolution may have otherwise; like the next two as `nn.Conv2d` keeps it.
        padding: Zeros around x.
        dilation: Distance between the taps.
    """
    if is_traced(x):
        return 'operators are watched'
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or (*stride, *dilation) != (1, 1, 1, 1) or padding != (1, 1):
        return 'it is not a 3x3 convolution of stride 1, padding 1 and dilation 1'
    if not _is_plain(x) or x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return 'x is not a channels-last float32 tensor on the CPU'
    if not _is_plain(weight) or not (
            weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
        return 'weight is not a dense float32 tensor on the CPU'
    if bias is not None and not (_is_plain(bias) and bias.is_contiguous() and bias.shape == weight.shape[:1]):
        return 'bias is not a contiguous float32 tensor of C_out numbers on the CPU'
    if groups < 1 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups != 0 or x.numel() == 0:
        return f'x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)} make no {groups} groups'
    for channels in (weight.shape[1], weight.shape[0] // groups):
        if channels % 4 != 0 or channels < MIN_CHANNELS:
            return f'a group has {channels} channels: fewer than {MIN_CHANNELS}, or not a multiple of 4'
    if torch.is_autocast_enabled('cpu'):
        return 'autocast chooses the dtypes'
    if forward_ad._current_level >= 0:
        return 'the kernels have no forward-mode derivative'
    library = load(torch.float32, _SOURCE)
    if isinstance(library, str):
        return library
    return 'the processor has no vectors of numbers' if library.vector_lanes() == 1 else None


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.dtype == torch.float32
        and tensor.device.type == 'cpu'
    )


def transform_filters(weight: Tensor, groups: int) -> Tensor:
    """Filters in the form that `key_conv` takes, (groups, 16, C // groups, C_out // groups), without a gradient.

    The last two dimensions are ordered as this processor's kernels want them, so keep them in memory only.

    Args:
        weight: (C_out, C // groups, 3, 3) in float32.
        groups: Groups of the channels.
    """
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    filters = weight.new_empty(groups, 16, inputs, outputs)
    load(torch.float32, _SOURCE).key_conv_filters(
        ctypes.byref(Shape(groups=groups, inputs=inputs, outputs=outputs)), *_filters_in_memory(weight, groups),
        *_pointers(filters), ctypes.c_int(torch.get_num_threads()))
    return filters


def key_conv(x: Tensor, filters: Tensor, bias: Optional[Tensor] = None, relu: bool = False) -> Tensor:
    """The convolution where `why_not_key_conv` is None, for filters from `transform_filters`; without a gradient.

    (B, C, H, W) -> (B, C_out, H, W), both float32 and channels-last.

    Args:
        x: Input.
        filters: (groups, 16, C // groups, C_out // groups) in float32.
        bias: (C_out) in float32, or None.
        relu: Whether ReLU follows.
    """
    groups, _, inputs, outputs = filters.shape
    return _convolve(x, groups, inputs, outputs, *_pointers(filters), None, None, *_pointers(bias), relu)


class KeyConv(torch.autograd.Function):
    """`apply(x, weight, groups)`, the convolution where `why_not_key_conv(x, weight, groups)` is None.

    (B, C, H, W), (C_out, C // groups, 3, 3) -> (B, C_out, H, W), all float32.
    """

    @staticmethod
    def forward(ctx, x, weight, groups):
        ctx.groups = groups
        ctx.save_for_backward(x, weight)
        inputs, outputs = weight.shape[1], weight.shape[0] // groups
        return _convolve(x, groups, inputs, outputs, None, *_filters_in_memory(weight, groups), None, False)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        groups, needed = ctx.groups, ctx.needs_input_grad
        # a second derivative is wanted, or many gradients at once: the first one as differentiable plain PyTorch
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
            grads = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], groups, [needed[0], needed[1], False])
            return grads[0], grads[1], None
        grad, x = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (grad, x))
        grad_x = grad_weight = None
        if needed[0]:  # the same convolution back, with turned filters
            inputs, outputs = weight.shape[0] // groups, weight.shape[1]
            turned = _filters_in_memory(weight, groups, turned=True)
            grad_x = _convolve(grad, groups, inputs, outputs, None, *turned, None, False)
        if needed[1]:
            grad_weight = _filter_gradient(x, grad, weight, groups)
        return grad_x, grad_weight, None


def _convolve(x: Tensor, groups: int, inputs: int, outputs: int, filters, weight, strides, bias, relu: bool) -> Tensor:
    """`key_conv` of key_conv.c."""
    B, _, H, W = x.shape
    slabs = 1 if weight is None else -(-inputs * outputs // _FILTERS)
    shape, scratch = _shape_and_scratch(x, groups, inputs, outputs, slabs)
    out = on_huge_pages(torch.empty(
        (B, groups * outputs, H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last))
    load(torch.float32, _SOURCE).key_conv(
        ctypes.byref(shape), *_pointers(x), filters, weight, strides, bias, ctypes.c_int(relu),
        *_pointers(out, scratch), ctypes.c_int(len(scratch)))
    return out


def _filter_gradient(x: Tensor, grad: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Gradient of weight, from x and the output gradient."""
    inputs, outputs = weight.shape[1], weight.shape[0] // groups
    shape, scratch = _shape_and_scratch(x, groups, inputs, outputs, -(-inputs * outputs // _FILTERS))
    grad_weight = torch.empty_like(weight)
    items = groups // shape.together * -(-shape.outputs // shape.slab) * shape.parts
    products = x.new_empty(
        len(scratch) if shape.parts == 1 else items, shape.together, 16, shape.inputs, shape.slab)
    address, strides = _filters_in_memory(grad_weight, groups)
    load(torch.float32, _SOURCE).key_conv_filter_gradient(
        ctypes.byref(shape), *_pointers(x, grad), strides, address, *_pointers(products, scratch),
        ctypes.c_int(len(scratch)))
    return grad_weight


def _shape_and_scratch(x: Tensor, groups: int, inputs: int, outputs: int, slabs: int = 1) -> Tuple[Shape, Tensor]:
    """How the work is cut for the caches and threads (see key_conv.c), and memory for each thread."""
    B, _, H, W = x.shape
    threads = torch.get_num_threads()
    together = max(n for n in range(1, groups + 1) if n == 1 or groups % n == 0 and (
        n * max(inputs, outputs) <= _CHANNELS and n * inputs * outputs < _FILTERS))
    slab = -(-outputs // (4 * slabs)) * 4
    sets = groups // together * -(-outputs // slab)
    tiles = B * -(-H // 2) * -(-W // 2)
    parts = min(threads // math.gcd(sets, threads), -(-tiles // _ROWS))  # as many items for each thread
    shape = Shape(B, groups, inputs, outputs, H, W, _BLOCK, together, slab, parts)
    inputs, outputs = together * inputs, together * slab
    numbers = 16 * (_BLOCK * (inputs + outputs) + 2 * _PAD + inputs * slab) + inputs + 2 * outputs
    return shape, x.new_empty(threads, numbers)


def _filters_in_memory(weight: Tensor, groups: int, turned: bool = False):
    """Address and `Strides` of filters; turned: inputs and outputs swapped, and by 180 degrees."""
    out, in_, y, x = weight.stride()
    group = weight.shape[0] // groups * out
    if turned:
        address = weight.data_ptr() + (2 * y + 2 * x) * weight.element_size()
        return ctypes.c_void_p(address), ctypes.byref(Strides(group, in_, out, -y, -x))
    return ctypes.c_void_p(weight.data_ptr()), ctypes.byref(Strides(group, out, in_, y, x))


def _pointers(*tensors: Optional[Tensor]):
    return (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
