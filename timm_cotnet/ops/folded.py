"""Operators of folded models on the CPU: convolutions on oneDNN with packed filters, and what follows them.

Eager models call `conv2d_act` where `can_run_packed`. What `torch.compile` compiles for evaluation calls the same as an
operator of the graph (`can_compile_packed`): a compiler would call oneDNN without packed filters, and would apply sums
and activations in passes of their own. What is exported, scripted or traced sees plain PyTorch.

Filters are packed again when they change, as told by their address, dtype and version; `p.data.mul_()` changes none of
them. A NaN may end in oneDNN's ReLU, which makes it zero.
"""
import weakref
from typing import Any, Callable, Dict, Hashable, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from . import native
from .key_conv import key_conv, transform_filters, why_not_key_conv
from .pointwise import pack_pairs, pointwise, why_not_pointwise
from .watch import is_traced

POST_OPS = {nn.Identity: 'none', nn.ReLU: 'relu', nn.SiLU: 'swish'}  # activations that oneDNN fuses
_ACTS = {'none': lambda x: x, 'relu': F.relu, 'swish': F.silu}
_MAX_PACKED = 2  # shapes of the input for which a filter stays packed: the last part of a batch may be smaller


def can_run_packed(x: torch.Tensor) -> bool:
    """Whether oneDNN's fused convolutions take x here and now."""
    return not is_traced(x) and _can_be_packed(x)


def can_compile_packed(x: torch.Tensor) -> bool:
    """Whether a graph that torch.compile makes for tensors like x calls them as operators."""
    return (
        torch.compiler.is_compiling()
        and hasattr(torch.compiler, 'is_exporting')  # PyTorch 2.6 cannot tell what it compiles for
        and not torch.compiler.is_exporting()
        and _can_be_packed(x)
    )


def _can_be_packed(x: torch.Tensor) -> bool:
    return (
        x.device.type == 'cpu'
        and x.ndim == 4
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled('cpu')
        and _onednn_takes(x.dtype)
    )


@torch.compiler.assume_constant_result
def _onednn_takes(dtype: torch.dtype) -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and (dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class _Packed(NamedTuple):
    """What is kept of a filter."""
    weight: weakref.ref
    version: int
    made: Dict[Hashable, Tuple[Any, torch.Tensor]]  # by what for


_PACKED: Dict[int, _Packed] = {}  # by the filter's id


def conv2d_act(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        addend: Optional[torch.Tensor],
        stride: List[int],
        padding: List[int],
        dilation: List[int],
        groups: int,
        act: str,
        overwrite: bool = False,
) -> torch.Tensor:
    """act(conv(x) + addend) where `can_run_packed(x)`.

    Args:
        x: (B, in_channels, H, W), float32 or bfloat16.
        weight: Filters, (out_channels, in_channels // groups, k, k).
        bias: (out_channels,), or None.
        addend: What is added before the activation, of the result's shape, or None.
        stride: Vertical and horizontal, as the next two.
        padding: Zeros on each side.
        dilation: Distance between the taps of a filter.
        groups: Groups of channels.
        act: 'none', 'relu' or 'swish'.
        overwrite: Whether the result may take the memory of addend.

    Returns:
        (B, out_channels, H', W'), channels-last.
    """
    if (
            type(weight) not in (torch.Tensor, nn.Parameter)
            or weight.is_inference()  # has no version that would tell of changes
            or x.dtype != weight.dtype
            or x.shape[1] != weight.shape[1] * groups
    ):
        out = _plain(x, weight, bias, addend, stride, padding, dilation, groups, act)
        return out.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    stride, padding, dilation = tuple(stride), tuple(padding), tuple(dilation)
    if groups > 1 and x.dtype == torch.float32 and addend is None and act != 'swish' \
            and why_not_key_conv(x, weight, groups, bias, stride, padding, dilation) is None:
        return key_conv(x, _keep(weight, transform_filters, groups), bias, act == 'relu')
    conv = _keep(weight, _pack, x.shape, stride, padding, dilation, groups, act, addend is not None)
    if addend is None:
        return conv(x, bias)
    return conv(x, bias, addend.contiguous(memory_format=torch.channels_last), overwrite)


def _keep(weight: torch.Tensor, make: Callable, *args: Hashable) -> Any:
    """make(weight, *args), for as long as the filters neither change nor die."""
    kept = _PACKED.get(id(weight))
    if kept is None or kept.weight() is not weight or kept.version != weight._version:
        key = id(weight)
        kept = _PACKED[key] = _Packed(weakref.ref(weight, lambda _: _PACKED.pop(key, None)), weight._version, {})
    made_for = (make, args, weight.dtype, weight.data_ptr())
    entry = kept.made.get(made_for)
    if entry is None:
        for old in list(kept.made)[:max(0, len(kept.made) + 1 - _MAX_PACKED)]:
            kept.made.pop(old, None)  # another thread may have done so
        # with the numbers themselves: as long as they live, no others can have their address
        entry = kept.made[made_for] = make(weight.detach(), *args), weight.detach()
    return entry[0]


def _pack(
        weight: torch.Tensor, shape: torch.Size, stride: Tuple, padding: Tuple, dilation: Tuple, groups: int, act: str,
        adds: bool) -> Callable:
    """The convolution of inputs of one shape, with the filters in oneDNN's order."""
    ops = torch.ops.mkldnn
    if not adds and groups == 1 and weight.shape[2:] == (1, 1) and stride == (1, 1) and padding == (0, 0):
        packed = ops._reorder_linear_weight(weight.flatten(1).contiguous(), shape.numel() // shape[1])
        linear = ops._linear_pointwise.default  # less fixed cost for each call
        return lambda x, bias: linear(x.permute(0, 2, 3, 1), packed, bias, act, [], '').permute(0, 3, 1, 2)
    geometry = (padding, stride, dilation, groups)
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *geometry, shape)
    if not adds:
        conv = ops._convolution_pointwise.default
        return lambda x, bias: conv(x, packed, bias, *geometry, act, [], '')
    conv, conv_ = ops._convolution_pointwise.binary, ops._convolution_pointwise_.binary

    def add(x, bias, addend, overwrite):
        if overwrite:
            return conv_(addend, x, packed, bias, *geometry, 'add', 1.0, act, [], '')
        return conv(x, addend, packed, bias, *geometry, 'add', 1.0, act, [], '')
    return add


def _plain(x, weight, bias, addend, stride, padding, dilation, groups: int, act: str) -> torch.Tensor:
    x = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _ACTS[act](x if addend is None else x + addend)


def max_pool(x: torch.Tensor, pool: nn.Module) -> torch.Tensor:
    """pool(x) where `can_run_packed(x)`."""
    if (
            type(pool) is nn.MaxPool2d
            and (pool.kernel_size, pool.stride, pool.padding, pool.dilation) == (3, 2, 1, 1)
            and not pool.ceil_mode and not pool.return_indices
            and x.is_contiguous(memory_format=torch.channels_last)
            and _why_no_kernels(x.dtype) is None
    ):
        return native.max_pool(x)
    return pool(x)


class CotParameters(NamedTuple):
    """The parameters of `FusedCotLayer`: filters (weight, bias) of its convolutions, and of what lies behind them."""
    static: torch.Tensor
    static_bias: torch.Tensor
    query: torch.Tensor
    query_bias: torch.Tensor
    key: torch.Tensor
    attn: torch.Tensor
    attn_bias: torch.Tensor
    value: torch.Tensor
    value_bias: torch.Tensor
    attn_scale: torch.Tensor  # group norm of the filters
    attn_shift: torch.Tensor
    shift: torch.Tensor  # batch norm behind the local convolution
    se_reduce: torch.Tensor
    se_reduce_bias: torch.Tensor
    se_expand: torch.Tensor
    se_expand_bias: torch.Tensor


class CotSettings(NamedTuple):
    """And its numbers: those of `CotLayer`, and how the filters are ordered (see `native.fuse_contexts`)."""
    kernel_size: int
    dilation: int
    key_groups: int
    groups: int
    tap_by_tap: bool
    eps: float


def why_not_cot_layer(x: torch.Tensor, parameters: CotParameters, settings: CotSettings) -> Optional[str]:
    """The reason why `cot_layer` cannot do this layer, where `can_run_packed(x)`; None if it can."""
    channels = max(parameters.value.shape[0], parameters.se_reduce.shape[0])
    too_large = native.why_not_sizes(
        settings.kernel_size, parameters.attn.shape[0] // settings.kernel_size ** 2, channels)
    if too_large is not None:
        return too_large
    if not all(p.dtype == x.dtype and p.is_contiguous() for p in parameters[9:]):
        return 'a parameter that the kernels read is not contiguous or not of the dtype of x'
    return _why_no_kernels(x.dtype)


@torch.compiler.assume_constant_result
def _why_no_kernels(dtype: torch.dtype) -> Optional[str]:
    library = native.load(dtype)
    return library if isinstance(library, str) else None


def cot_layer(x: torch.Tensor, p: CotParameters, settings: CotSettings) -> torch.Tensor:
    """A folded CoT layer, (B, C, H, W) -> (B, C, H, W), where `can_run_packed` and `why_not_cot_layer` is None."""
    k, d = settings.kernel_size, settings.dilation
    one, zero, padding = (1, 1), (0, 0), (d * (k // 2),) * 2
    groups = settings.groups

    def conv1x1(x, weight, bias, act='none', addend=None):
        return conv2d_act(x, weight, bias, addend, one, zero, one, groups, act, overwrite=True)

    static = conv2d_act(x, p.static, p.static_bias, None, one, padding, (d, d), settings.key_groups, 'relu')
    if groups == 1 and why_not_pointwise(x, *p[2:9]) is None:
        query, key, attn, value = (_keep(weight, pack_pairs) for weight in (p.query, p.key, p.attn, p.value))
        attn, value = pointwise(x, static, query, p.query_bias, key, attn, p.attn_bias, value, p.value_bias)
    else:
        attn = conv1x1(static, p.key, None, 'relu', addend=conv1x1(x, p.query, p.query_bias))
        attn = conv1x1(attn, p.attn, p.attn_bias)
        value = conv1x1(x, p.value, p.value_bias)
    gamma, beta, *others = (parameter.data_ptr() for parameter in p[9:])
    parameters = native.Parameters(gamma, beta, settings.eps, *others, p.se_expand.shape[1])
    return native.fuse_contexts(value, attn, static, parameters, k, d, groups, settings.tap_by_tap)


_LIBRARY = torch.library.Library('timm_cotnet', 'FRAGMENT')  # a `custom_op` would add 30 us to each call
_LIBRARY.define(
    'conv2d_act(Tensor x, Tensor weight, Tensor? bias, Tensor? addend, SymInt[] stride, SymInt[] padding, '
    'SymInt[] dilation, SymInt groups, str act) -> Tensor')
_LIBRARY.define(
    'conv2d_add_act_(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) addend, SymInt[] stride, SymInt[] padding, '
    'SymInt[] dilation, SymInt groups, str act) -> ()')
_LIBRARY.define(
    'cot_layer(Tensor x, Tensor[] parameters, int kernel_size, int dilation, int key_groups, int groups, '
    'bool tap_by_tap, float eps) -> Tensor')


def _conv2d_act_op(x, weight, bias, addend, stride, padding, dilation, groups, act):
    """`conv2d_act` as an operator, whose result is channels-last."""
    args = (weight, bias, addend, stride, padding, dilation, groups, act)
    x = conv2d_act(x, *args) if can_run_packed(x) else _plain(x, *args)
    return x.contiguous(memory_format=torch.channels_last)


_LIBRARY.impl('conv2d_act', _conv2d_act_op, 'CPU')


@torch.library.register_fake('timm_cotnet::conv2d_act', lib=_LIBRARY)
def _(x, weight, bias, addend, stride, padding, dilation, groups, act):
    shape = _plain(x, weight, bias, addend, stride, padding, dilation, groups, act).shape
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _conv2d_add_act_op(x, weight, bias, addend, *rest):
    """`conv2d_act` as an operator that overwrites addend."""
    args = (weight, bias, addend, *rest)
    out = conv2d_act(x, *args, overwrite=True) if can_run_packed(x) else _plain(x, *args)
    if out.data_ptr() != addend.data_ptr():
        addend.copy_(out)


_LIBRARY.impl('conv2d_add_act_', _conv2d_add_act_op, 'CPU')


@torch.library.register_fake('timm_cotnet::conv2d_add_act_', lib=_LIBRARY)
def _(x, weight, bias, addend, stride, padding, dilation, groups, act):
    pass


def _cot_layer_op(x, parameters, *settings):
    """`cot_layer` as an operator, whose result is channels-last."""
    return cot_layer(x, CotParameters(*parameters), CotSettings(*settings))


_LIBRARY.impl('cot_layer', _cot_layer_op, 'CPU')


@torch.library.register_fake('timm_cotnet::cot_layer', lib=_LIBRARY)
def _(x, parameters, *settings):
    return torch.empty_like(x, memory_format=torch.channels_last)
