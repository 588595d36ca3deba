"""Convolutions of folded models on oneDNN, with packed filters and with what follows them in the same pass.

Packed filters may never be older than the filters. A version counter does not tell (`p.data.mul_()` leaves it as it
is), but PyTorch's copy-on-write does: what is kept holds a lazy clone of the filters, which shares their memory until
somebody writes to either, in whatever way PyTorch offers. Then the filters move to memory of their own, and their
address differs from that of the clone. Filters whose memory others look at (a NumPy view, another tensor) or that is
not PyTorch's own are not packed. A NaN may end in oneDNN's ReLU, which makes it zero.
"""
import functools
import os
import threading
import weakref
from typing import Any, Callable, Dict, Hashable, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import FoundBlock
from .watch import are_watched

_MOST_KEPT = 8  # results for a parameter: packed for one image and for several, of four sizes
POST_OPS = {'none': lambda x: x, 'relu': F.relu, 'swish': F.silu}  # by oneDNN's names


class _Made(NamedTuple):
    result: Any
    clone: Tensor  # of what it was made of
    dtype: torch.dtype
    shape: torch.Size
    stride: Tuple[int, ...]


class _Kept(NamedTuple):
    storage: weakref.ref  # of the filters, as a weak reference to a parameter would keep it from being swapped
    made: Dict[Hashable, _Made]


_KEPT: Dict[int, _Kept] = {}  # by the address of the storage
_lock = threading.RLock()


def _new_lock() -> None:  # another thread may have held it when the process forked
    global _lock
    _lock = threading.RLock()


if hasattr(os, 'register_at_fork'):  # not on Windows
    os.register_at_fork(after_in_child=_new_lock)


def kept(weight: Tensor, make: Callable, *args: Hashable) -> Optional[Any]:
    """`make(weight, *args)`, made anew only after weight was written to; None if that could not be told.

    Args:
        weight: Parameter, of any shape.
        make: Function of a tensor like it.
        *args: Its further arguments, by which results are told apart; of each parameter the last few are kept.
    """
    storage = weight.untyped_storage()
    key = storage._cdata
    found = _KEPT.get(key)
    if found is not None and found.storage() is storage:
        entry = found.made.get((make, args))
        if entry is not None and _is_same(weight, entry):
            return entry.result
    with _lock:
        # the parameter, and what asks; what torch.load makes has no allocator, which a write to shared memory calls
        if torch._C._storage_Use_Count(key) > 2 or not storage.resizable():
            return None
        try:
            clone = torch._lazy_clone(weight.detach())
        except RuntimeError:  # memory that is not PyTorch's own
            return None
        made = make(clone.clone(), *args)
        if found is None or found.storage() is not storage:
            found = _KEPT[key] = _Kept(weakref.ref(storage, lambda _: _KEPT.pop(key, None)), {})
        for old in [key for key, entry in found.made.items() if not _is_same(weight, entry)]:
            del found.made[old]  # with the filters that it was made of
        if len(found.made) == _MOST_KEPT:
            del found.made[next(iter(found.made))]
        found.made[make, args] = _Made(made, clone, clone.dtype, clone.shape, clone.stride())
    return made


def _is_same(weight: Tensor, made: _Made) -> bool:
    return (
        torch._C._data_address(weight) == torch._C._data_address(made.clone)
        and weight.dtype == made.dtype
        and weight.shape == made.shape
        and weight.stride() == made.stride
    )


@torch.compiler.assume_constant_result
def why_not_packed(dtype: torch.dtype) -> Optional[str]:
    """The reason why `conv2d_act` cannot take tensors of a dtype; None if it can."""
    return _why_not_here(dtype) if torch._C._get_mkldnn_enabled() else 'oneDNN is turned off'


@functools.lru_cache(maxsize=None)  # asked of the dispatcher it would take longer than all other conditions together
def _why_not_here(dtype: torch.dtype) -> Optional[str]:
    if not torch.backends.mkldnn.is_available():
        return 'PyTorch has no oneDNN'
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 'oneDNN has no bfloat16 on this processor'
    return None


def conv2d_act(
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        addend: Optional[Tensor],
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        dilation: Tuple[int, int],
        groups: int,
        act: str,
        overwrite: bool = False,
) -> Tensor:
    """`act(conv(x) + addend)` without a gradient, where `why_not_packed` is None.

    Args:
        x: (B, in_channels, H, W), float32 or bfloat16.
        weight: Filters, (out_channels, in_channels // groups, k, k).
        bias: (out_channels), or None.
        addend: What is added before the activation, of the result's shape, or None.
        stride: Vertical and horizontal, like the next two.
        padding: Zeros on each side.
        dilation: Distance between the taps of a filter, in pixels.
        groups: Groups of channels.
        act: A key of `POST_OPS`; with an addend not 'swish'.
        overwrite: Whether the result may take the memory of addend.

    Returns:
        (B, out_channels, H', W'), channels-last.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    padding, stride, dilation = tuple(padding), tuple(stride), tuple(dilation)
    geometry = padding, stride, dilation, groups
    pointwise = addend is None and groups == 1 and stride == (1, 1) and padding == (0, 0) and weight.shape[2:] == (1, 1)
    packed = kept(weight, pack_linear) if pointwise else kept(weight, pack, *geometry, _alike(x.shape))
    if packed is None:
        out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        out = POST_OPS[act](out if addend is None else out + addend)
        return out.contiguous(memory_format=torch.channels_last)
    ops = torch.ops.mkldnn
    if pointwise:  # less fixed cost for each call
        return ops._linear_pointwise.default(x.permute(0, 2, 3, 1), packed, bias, act, [], '').permute(0, 3, 1, 2)
    if addend is None:
        return ops._convolution_pointwise.default(x, packed, bias, *geometry, act, [], '')
    addend = addend.contiguous(memory_format=torch.channels_last)
    behind = ('add', 1.0, None if act == 'none' else act, [], '')
    if overwrite:
        return ops._convolution_pointwise_.binary(addend, x, packed, bias, *geometry, *behind)
    return ops._convolution_pointwise.binary(x, addend, packed, bias, *geometry, *behind)


def pack_linear(weight: Tensor) -> Tensor:
    """Filters of a 1x1 convolution in oneDNN's order for matrix products, the same for any number of pixels but one."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1).contiguous(), 196)


def pack(
        weight: Tensor, padding: Tuple, stride: Tuple, dilation: Tuple, groups: int, shape: Tuple[int, ...]) -> Tensor:
    """Filters in oneDNN's order for convolutions of an x of this shape; for others they are ordered anew at each call.

    In float32 that was seen to take up to 60 times as long as the convolution.
    """
    return torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), padding, stride, dilation, groups, shape)


def _alike(shape: torch.Size) -> Tuple[int, ...]:
    """A shape with the same order of filters: that depends on whether there is one image, but not on how many more."""
    return (1 if shape[0] == 1 else 8, *shape[1:])


def conv2d_act_(x: Tensor, weight: Tensor, bias: Optional[Tensor], addend: Tensor, *args: Any) -> None:
    """`conv2d_act` whose result takes the place of addend."""
    out = conv2d_act(x, weight, bias, addend, *args, overwrite=True)
    if out.data_ptr() != addend.data_ptr():
        addend.copy_(out)


# of operators; for the first a GPU has another implementation
LIBRARY = torch._library.custom_ops.get_library_allowing_overwrite('timm_cotnet', 'conv2d_act')
_NUMBERS = 'SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str act'
LIBRARY.define(f'conv2d_act(Tensor x, Tensor weight, Tensor? bias, Tensor? addend, {_NUMBERS}) -> Tensor')
LIBRARY.impl('conv2d_act', conv2d_act, 'CPU')
LIBRARY.define(f'conv2d_act_(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) addend, {_NUMBERS}) -> ()')
LIBRARY.impl('conv2d_act_', conv2d_act_, 'CPU')


@torch.library.register_fake('timm_cotnet::conv2d_act', lib=LIBRARY)
def _(x, weight, bias, addend, stride, padding, dilation, groups, act):
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return torch.empty_like(out, memory_format=torch.channels_last)


@torch.library.register_fake('timm_cotnet::conv2d_act_', lib=LIBRARY)
def _(*args):
    return None


def run_conv2d(
        conv: nn.Conv2d,
        x: Tensor,
        act: str = 'none',
        addend: Optional[Tensor] = None,
        overwrite: bool = False,
) -> Tensor:
    """`conv2d_act` of a module; what is compiled calls it as an operator of the graph."""
    weight, bias = conv._parameters['weight'], conv._parameters['bias']
    args = (weight, bias, addend, conv.stride, conv.padding, conv.dilation, conv.groups, act)
    if torch.compiler.is_compiling():
        if not overwrite:
            return torch.ops.timm_cotnet.conv2d_act(x, *args)
        # a compiler copies what it still needs
        torch.ops.timm_cotnet.conv2d_act_(x, *args)
        return addend
    return conv2d_act(x, *args, overwrite)


def folded_stem(parts: Dict[str, nn.Module], x: Tensor) -> Tensor:
    """Stands in for a `FoldedStem` of these parts without a gradient: (B, in_chans, H, W) -> (B, C, H', W')."""
    for conv in list(parts.values())[::2]:
        x = run_conv2d(conv, x, 'relu')
    return x


def folded_stage(blocks: List[FoundBlock], x: Tensor, run_layer: Callable) -> Tensor:
    """Stands in for a `FoldedStage` without a gradient: (B, inplanes, H, W) -> (B, outplanes, H', W').

    Each block but the first writes its result over its input, which nobody else has: fresh memory takes longer than the
    sum.

    Args:
        blocks: What was found of each block.
        x: Input.
        run_layer: Runs a CoT layer on an input, with its parts.
    """
    for i, (block, parts, of_layer) in enumerate(blocks):
        layer = block._modules['conv2'] if of_layer is None \
            else functools.partial(run_layer, block._modules['conv2'], found=of_layer)
        x = folded_bottleneck(block, x, parts, layer, overwrite=i > 0)
    return x


def folded_bottleneck(
        block: nn.Module, x: Tensor, parts: Dict[str, nn.Module], layer: Callable, overwrite: bool = False) -> Tensor:
    """Stands in for a `FoldedBottleneck` without a gradient: (B, inplanes, H, W) -> (B, outplanes, H', W').

    With overwrite, the result may take the memory of x. What computes the block's `conv2` is given.
    """
    modules = block._modules
    out = run_conv2d(parts['conv1'], x, 'relu')
    out = modules['avd_last'](layer(modules['avd_first'](out)))
    downsample = modules.get('downsample')
    if downsample is not None:
        overwrite = type(downsample) is nn.Sequential and len(downsample) > 0 \
            and is_packable(downsample[-1], x.dtype) and not are_watched([downsample])
        if overwrite:  # of what this convolution makes
            *pools, conv = downsample
            for pool in pools:
                x = pool(x)
            x = run_conv2d(conv, x)
        else:
            x = downsample(x)
    return run_conv2d(parts['conv3'], out, 'relu', addend=x, overwrite=overwrite)


def is_packable(conv: nn.Module, dtype: torch.dtype) -> bool:
    """Whether conv is a convolution that `run_conv2d` takes."""
    return type(conv) is nn.Conv2d and conv.padding_mode == 'zeros' \
        and type(conv.padding) is type(conv.stride) is type(conv.dilation) is tuple \
        and type(conv._parameters.get('weight')) is nn.Parameter and conv.weight.dtype == dtype
