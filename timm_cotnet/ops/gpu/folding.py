"""Filters for inference with their norms folded in, made anew at each call by one launch; see `folding_kernels.py`."""
import functools
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .launch import launch, repeated
from .matrices import is_dense
from .walks import accumulator, kernels_of, power_of_2

_BLOCK_O, _BLOCK_J = 8, 256


class LayerFilters(NamedTuple):
    """What a CoT layer computes with, in one dtype but for the last two, which are in that of an accumulator."""
    key: Tensor  # (C, C / key_groups, k, k), channels-last
    key_bias: Tensor
    key_groups: int
    query: Tensor  # (H, C), H hidden channels
    of_key: Tensor  # (H, C)
    bias: Tensor  # (H)
    attn: Tensor  # (N, H), tap by tap
    value: Tensor  # (C, C)
    value_bias: Tensor
    shift: Tensor  # (C)
    mixing_table: Optional[Tensor]  # (2, A)


class BlockFilters(NamedTuple):
    """What a bottleneck computes with around its CoT layer."""
    conv1: Tensor  # (width, inputs)
    bias1: Tensor
    conv3: Tensor  # (outputs, hidden)
    bias3: Tensor  # that of the shortcut added
    shortcut: Optional[Tensor]  # (outputs, inputs)


class _Part(NamedTuple):
    shape: Tuple[int, ...]
    strides: Tuple[int, ...]
    first: int


class _Plan(NamedTuple):
    """Where parts lie in one piece of memory, and how it is filled."""
    parts: Tuple[_Part, ...]
    size: int
    programs: int
    constants: Dict[str, Any]


def _place(shapes: Sequence[Tuple[int, ...]]) -> Tuple[Tuple[_Part, ...], int]:
    """Parts behind each other, as the kernels have them; of four dimensions in channels-last."""
    parts, first = [], 0
    for shape in shapes:
        if len(shape) == 4:
            rows, inputs, height, width = shape
            strides = (inputs * height * width, 1, width * inputs, inputs)
        else:
            strides = (shape[1], 1) if len(shape) == 2 else (1,)
        parts.append(_Part(shape, strides, first))
        first += -(-torch.Size(shape).numel() // 64) * 64
    return tuple(parts), first


def _tiles(*rows: int) -> int:
    return sum(-(-n // _BLOCK_O) for n in rows)


@functools.lru_cache(maxsize=1024)
def _plan_of_layer(
        key: Tuple[int, ...], key_groups: int, made_groups: int, channels_last: bool, hidden: int, attention: int,
        groups: int, filters: int, taps: int) -> _Plan:
    C, each, height, width = key
    made_inputs = each * key_groups // made_groups
    parts, size = _place([
        (C, made_inputs, height, width), (hidden, C), (hidden, C), (filters * taps, hidden), (C, C), (C,), (C,),
        (hidden,)])
    constants = dict(
        C=C, HIDDEN=hidden, A=attention, GROUPS=groups, GS=filters // groups, TAPS=taps, KEY_INPUTS=made_inputs,
        KEY_TAPS=height * width, KEY_GROUPS=key_groups // made_groups,
        KEY_INPUT=1 if channels_last else height * width, KEY_TAP=each if channels_last else 1)
    return _Plan(parts, size, _tiles(C, C, filters * taps, hidden, hidden) + 1, constants)


def fold_layer(layer: nn.Module, dtype: torch.dtype) -> LayerFilters:
    """The filters of a `CotLayer` or `CoxtLayer` in evaluation."""
    parts = layer._modules
    key, key_norm, _ = parts['key_embed']._modules.values()
    first, first_norm, _, attn, group_norm = parts['embed']._modules.values()
    conv, value_norm = parts['conv1x1']._modules.values()
    se, se_norm, _, _ = parts['se']._modules.values()
    norms = key_norm, first_norm, value_norm, parts['bn'], se_norm
    weight, channels_last = _dense(key.weight)
    made_groups = 1 if is_dense(weight, key.groups, dtype) else key.groups
    plan = _plan_of_layer(
        tuple(weight.shape), key.groups, made_groups, channels_last, first.out_channels, se.out_channels,
        layer.groups, group_norm.num_groups, layer.kernel_size ** 2)
    table_dtype, C = accumulator(dtype)[0], weight.shape[0]
    out = torch.empty(plan.size, dtype=dtype, device=weight.device)
    table = torch.empty(-(-C // 64) * 64 + 2 * se.out_channels, dtype=table_dtype, device=weight.device)
    _fold(weight, *[t.contiguous() for t in (first.weight, attn.weight, conv.weight)],
          *[t for norm in norms for t in _tensors(norm)], out, table, kernel='fold_layer_kernel',
          programs=plan.programs, dtype=dtype, KEY=norms[0].eps, FIRST=norms[1].eps, VALUE=norms[2].eps,
          NORM=norms[3].eps, SE=norms[4].eps, BLOCK_A=power_of_2(se.out_channels), **plan.constants)
    key, query, of_key, attn, value, key_bias, value_bias, bias = (out.as_strided(*part) for part in plan.parts)
    return LayerFilters(
        key, key_bias, made_groups, query, of_key, bias, attn, value, value_bias, table[:C],
        table[-2 * se.out_channels:])


def order_filters(layer: nn.Module) -> Tensor:
    """Filters of the convolution that makes the logits in a `FoldedCotLayer`: (N, H), tap by tap, without groups."""
    _, attn, norm = layer._modules['embed']._modules.values()
    weight, rows = attn.weight, attn.out_channels
    out = torch.empty(rows, attn.in_channels, dtype=weight.dtype, device=weight.device)
    _fold(weight.contiguous(), out, kernel='order_filters_kernel', programs=_tiles(rows), dtype=weight.dtype,
          HIDDEN=attn.in_channels, GROUPS=layer.groups, GS=norm.num_groups // layer.groups,
          TAPS=layer.kernel_size ** 2)
    return out


@functools.lru_cache(maxsize=1024)
def _plan_of_block(inputs: int, width: int, hidden: int, outputs: int, has_conv: bool) -> _Plan:
    filters = [(width, inputs), (outputs, hidden), *([(outputs, inputs)] if has_conv else [])]
    parts, size = _place([*filters, (width,), (outputs,)])
    return _Plan(parts, size, _tiles(width, outputs), dict(
        INPUTS=inputs, WIDTH=width, HIDDEN=hidden, OUTPUTS=outputs, SHORTCUT=has_conv))


def fold_block(
        conv1: nn.Conv2d,
        norm1: nn.BatchNorm2d,
        conv3: nn.Conv2d,
        norm3: nn.BatchNorm2d,
        shortcut: Optional[Tuple[nn.Conv2d, nn.BatchNorm2d]],
        dtype: torch.dtype,
) -> BlockFilters:
    """The filters of 1x1 convolutions without groups and bias, with the norms behind them in evaluation."""
    plan = _plan_of_block(
        conv1.in_channels, conv1.out_channels, conv3.in_channels, conv3.out_channels, shortcut is not None)
    of_shortcut, eps = (None,) * 5, 0.
    if shortcut is not None:
        conv, norm = shortcut
        of_shortcut, eps = (conv.weight.contiguous(), *_tensors(norm)), norm.eps
    out = torch.empty(plan.size, dtype=dtype, device=conv1.weight.device)
    _fold(conv1.weight.contiguous(), *_tensors(norm1), conv3.weight.contiguous(), *_tensors(norm3), *of_shortcut, out,
          kernel='fold_block_kernel', programs=plan.programs, dtype=dtype, EPS1=norm1.eps, EPS3=norm3.eps, EPS=eps,
          **plan.constants)
    first, last, *of_shortcut, bias1, bias3 = (out.as_strided(*part) for part in plan.parts)
    return BlockFilters(first, bias1, last, bias3, of_shortcut[0] if of_shortcut else None)


@repeated()
def _fold(*tensors: Optional[Tensor], kernel: str, programs: int, dtype: torch.dtype, **constants: Any) -> None:
    tensors = [tensors[0] if t is None else t for t in tensors]  # which is not read
    launch(getattr(kernels_of('folding_kernels'), kernel), (programs,), *tensors, **constants,
           BLOCK_O=_BLOCK_O, BLOCK_J=_BLOCK_J, ACC=accumulator(dtype)[1])


def _tensors(norm: nn.BatchNorm2d) -> Tuple[Tensor, ...]:
    parameters, buffers = norm._parameters, norm._buffers
    return buffers['running_mean'], buffers['running_var'], parameters['weight'], parameters['bias']


def _dense(weight: Tensor) -> Tuple[Tensor, bool]:
    """Filters in memory without gaps, and whether in channels-last."""
    if weight.is_contiguous():
        return weight, False
    if weight.is_contiguous(memory_format=torch.channels_last):
        return weight, True
    return weight.contiguous(), False
