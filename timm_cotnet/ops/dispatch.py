"""The seam: what may stand in for a module or an operator on an input, and why not. Nothing else decides that.

A module class says by `known_as` what it is, and from then on its forward asks `stand_in` first, once. A row of the
table answers only for modules of exactly that class whose children, parameters and surroundings are what it knows; the
conditions are stated once, below. In every other case the module does its own work, child by child.
"""
import contextlib
import functools
import types
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import onednn, plain
from .reference import local_conv_reference
from .shifted import LocalConvShifted
from .gpu.local_conv import local_conv_triton, why_not_triton
from .watch import are_watched, is_traced

try:
    from . import cpu  # the only import of that folder, without which all works
except ImportError:
    cpu = None


class StandIn(NamedTuple):
    """What computes the same as a module, where `why_not(module, x)` is None."""
    name: str
    why_not: Callable[[nn.Module, Tensor], Optional[str]]
    run: Callable[[nn.Module, Tensor], Tensor]


class Choice(NamedTuple):
    """What was decided for a module or an operator, and why faster ones were not taken."""
    module: Optional[nn.Module]  # None: an operator called by the module that was asked about before
    implementation: str
    why_not: Tuple[Tuple[str, str], ...]  # (name, reason)


_KINDS: Dict[type, str] = {}
_record: Optional[List[Choice]] = None


def known_as(kind: str) -> Callable[[type], type]:
    """Class decorator: modules of exactly this class are of a kind that stand-ins know, and its forward asks for one.

    A subclass is not known. Where its forward calls this one, this one does its own work, child by child. What scripts
    a module finds the forward as it is written.
    """
    def register(cls: type) -> type:
        _KINDS[cls] = kind
        if 'forward' in cls.__dict__:
            cls.forward = _asking_first(cls.forward)
        return cls
    return register


def _asking_first(forward: Callable) -> Callable:
    ask = stand_in

    def asking(self, x):
        out = ask(self, x)
        return forward(self, x) if out is None else out

    # with the globals of the written forward, in which TorchScript looks up the names of its source
    asking = types.FunctionType(asking.__code__, forward.__globals__, closure=asking.__closure__)
    return functools.wraps(forward)(asking)


def stand_in(module: nn.Module, x: Tensor) -> Optional[Tensor]:
    """`module(x)` from something faster that knows the module; None if the module has to do it itself."""
    if not isinstance(x, Tensor):
        return None  # a symbol of torch.fx
    refused = []
    for candidate in _stand_ins(_KINDS.get(type(module)), x.device.type):
        reason = candidate.why_not(module, x)
        if reason is None:
            if _record is not None:
                _record.append(Choice(module, candidate.name, tuple(refused)))
            return candidate.run(module, x)
        if _record is not None:
            refused.append((candidate.name, reason))
    if _record is not None:
        _record.append(Choice(module, 'its own modules', tuple(refused)))
    return None


def _stand_ins(kind: Optional[str], device_type: str) -> Tuple[StandIn, ...]:
    """The table, the fastest first. A GPU's contexts have their row here."""
    if device_type == 'cpu':
        return _ON_CPU.get(kind, ()) + _ANYWHERE.get(kind, ())
    return _ANYWHERE.get(kind, ())


def choose_local_conv(x: Tensor, weight: Tensor, kernel_size: int) -> Callable[..., Tensor]:
    """The implementation of local convolution for tensors that its front end has checked."""
    refused = []
    name, chosen = 'plain PyTorch', local_conv_reference
    if torch.compiler.is_compiling() or is_traced(x) or is_traced(weight):
        pass  # compilers and tracers fuse plain ATen, and need nothing of this package later
    elif x.device.type == 'cpu':
        reason = _why_not_native_local_conv(x, weight, kernel_size)
        if reason is None:
            name, chosen = 'C kernel', cpu.LocalConvNative.apply  # one pass over memory in each direction
        else:  # in-place accumulation, no padded copy, little saved for the backward
            name, chosen = 'shifted slices', LocalConvShifted.apply
            refused.append(('C kernel', reason))
    else:
        reason = why_not_triton(x)
        if reason is None:
            name, chosen = 'Triton kernel', local_conv_triton
        else:
            refused.append(('Triton kernel', reason))
    if _record is not None:
        _record.append(Choice(None, f'local convolution by {name}', tuple(refused)))
    return chosen


@contextlib.contextmanager
def recorded() -> Iterator[List[Choice]]:
    """While it lasts, what is decided is added to the list that it gives."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


# Conditions: surroundings and tensors


def _why_not_now(x: Tensor, dtypes: Tuple[torch.dtype, ...], training: bool) -> Optional[str]:
    """Why kernels for training, or those for inference, cannot take x now."""
    if torch.compiler.is_compiling():
        # PyTorch 2.6 cannot tell what it compiles for
        if training or not hasattr(torch.compiler, 'is_exporting') or torch.compiler.is_exporting():
            return 'a compiler or exporter wants plain operators'
    elif is_traced(x):
        return 'a tracer, functorch transform or dispatch mode watches operators, or x is a tensor subclass'
    elif x.layout != torch.strided or x.is_neg():
        return 'x is not a dense tensor'
    if x.dtype not in dtypes:
        return f'x is {x.dtype}, not {" or ".join(map(str, dtypes))}'
    if x.ndim != 4 or x.numel() == 0:
        return f'x of shape {tuple(x.shape)} is empty or has not 4 dimensions'
    if training and not x.is_contiguous(memory_format=torch.channels_last):
        return 'x is not channels-last'
    if torch.is_grad_enabled() != training:
        return 'no gradient is wanted (torch.no_grad)' if training else 'a gradient may be wanted (no torch.no_grad)'
    if torch.is_autocast_enabled(x.device.type):
        return 'autocast chooses the dtypes'
    if forward_ad._current_level >= 0:
        return 'the kernels have no forward-mode derivative'
    return None


def _why_not_native_local_conv(x: Tensor, weight: Tensor, kernel_size: int) -> Optional[str]:
    if cpu is None:
        return _NO_WING
    if kernel_size > cpu.MAX_KERNEL_SIZE:
        return f'kernel_size is {kernel_size}, more than {cpu.MAX_KERNEL_SIZE}'
    if not x.is_contiguous(memory_format=torch.channels_last) or not weight.permute(0, 3, 4, 1, 2).is_contiguous():
        return 'x or its filters are not channels-last'
    if forward_ad._current_level >= 0:
        return 'the kernels have no forward-mode derivative'
    return cpu.why_not(x.dtype)


# Conditions: modules


class _Part(NamedTuple):
    """What a stand-in knows of one module below another."""
    parent: int  # in the list of those found before, of which the first is the whole
    name: str
    path: str
    type: type
    size: int  # number of children of an `nn.Sequential`


def _parts(**children: object) -> List[_Part]:
    """The parts of a module, of each its exact type, or a list of those of the children of an `nn.Sequential`."""
    rows = []
    for name, kind in children.items():
        if isinstance(kind, list):
            rows.append(_Part(0, name, name, nn.Sequential, len(kind)))
            parent = len(rows)
            rows.extend(_Part(parent, str(i), f'{name}.{i}', of_child, 0) for i, of_child in enumerate(kind))
        else:
            rows.append(_Part(0, name, name, kind, 0))
    return rows


_COT_LAYER = _parts(
    key_embed=[nn.Conv2d, nn.BatchNorm2d, nn.ReLU],
    embed=[nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.GroupNorm],
    conv1x1=[nn.Conv2d, nn.BatchNorm2d],
    bn=nn.BatchNorm2d,
    act=nn.SiLU,
    se=[nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d],
)
_BOTTLENECK = _parts(  # the others are called
    conv1=nn.Conv2d, bn1=nn.BatchNorm2d, drop_block=nn.Identity, act1=nn.ReLU,
    conv3=nn.Conv2d, bn3=nn.BatchNorm2d, act3=nn.ReLU)
_FOLDED_COT_LAYER = _parts(
    key_embed=[nn.Conv2d, nn.ReLU],
    query=nn.Conv2d,
    key=nn.Conv2d,
    embed=[nn.ReLU, nn.Conv2d, nn.GroupNorm],
    value=[nn.Conv2d],
    act=[nn.SiLU],
    se=[nn.Conv2d, nn.ReLU, nn.Conv2d],
)
_FOLDED_BOTTLENECK = _parts(conv1=nn.Conv2d, act1=[nn.ReLU], conv3=nn.Conv2d, act3=nn.ReLU)
_COT_ATTENTION = _parts(
    key_embed=[nn.Conv2d, nn.BatchNorm2d, nn.ReLU],
    value_embed=[nn.Conv2d, nn.BatchNorm2d],
    attention_embed=[nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d],
)
_WEIGHTED = (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)
_NO_WING = 'the package has no folder ops/cpu'


def _find(module: nn.Module, parts: List[_Part], like: Optional[Tensor]) -> Union[str, Dict[str, nn.Module]]:
    """The parts of a module by their paths, or why they are not what a stand-in knows.

    Each has exactly its type, no hooks and no forward of its own. All parameters are plain tensors, like the one given
    if there is one.
    """
    if are_watched([]):
        return 'hooks watch all modules'
    found, by_path = [module], {}
    for parent, name, path, kind, size in parts:
        child = found[parent]._modules.get(name)
        if type(child) is not kind:
            return f'{path} is a {type(child).__name__}, not a {kind.__name__}'
        if size and len(child._modules) != size:
            return f'{path} is not a sequence of {size} modules'
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks \
                or 'forward' in child.__dict__:
            return f'hooks watch {path}, or its forward is another one'
        if kind is nn.Conv2d and (child.padding_mode != 'zeros' or type(child.padding) is str):
            return f'{path} does not pad by a number of zeros'
        parameters = child._parameters
        if kind in _WEIGHTED and 'weight' not in parameters:
            return f'the weight of {path} is computed whenever it is read'
        for parameter in parameters.values():
            if parameter is not None and like is not None and not _is_plain(parameter, like):
                return f'a parameter of {path} is not a plain {like.dtype} tensor on {like.device.type}'
        found.append(child)
        by_path[path] = child
    return by_path


def _is_plain(tensor: Tensor, like: Tensor) -> bool:
    return type(tensor) in (nn.Parameter, Tensor) and tensor.dtype == like.dtype and tensor.is_cpu == like.is_cpu \
        and tensor.layout == torch.strided


def _is_pointwise(conv: nn.Conv2d, groups: int) -> bool:
    return conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == groups


def _is_mixing(first: nn.Conv2d, second: nn.Conv2d, dim: int) -> bool:
    return (
        _is_pointwise(first, 1) and _is_pointwise(second, 1) and first.bias is not None and second.bias is not None
        and second.out_channels == 2 * dim == 2 * first.in_channels
    )


def _why_not_train_cot_layer(layer: nn.Module, x: Tensor) -> Optional[str]:
    reason = _NO_WING if cpu is None else _why_not_now(x, (torch.float32,), training=True)
    if reason is not None:
        return reason
    m = _find(layer, _COT_LAYER, x)
    if isinstance(m, str):
        return m
    B, C, H, W = x.shape
    norms = m['conv1x1.1'], m['bn'], m['se.1'], m['key_embed.1'], m['embed.1']
    if not all(_is_pointwise(m[path], layer.groups) for path in ('embed.0', 'embed.3', 'conv1x1.0')):
        return 'embed.0, embed.3 or conv1x1.0 is not a 1x1 convolution with the groups of the layer'
    if not _is_mixing(m['se.0'], m['se.3'], C):
        return 'se is not made of two 1x1 convolutions with a bias, from dim channels to twice as many'
    if m['embed.0'].bias is not None or m['embed.0'].in_channels != 2 * C or not m['embed.0'].weight.is_contiguous():
        return 'embed.0 has a bias or filters that are not contiguous, or does not read x and the static context'
    for norm in norms:
        reason = _why_not_train_norm(norm, x)
        if reason is not None:
            return reason
    if not norms[0].num_features == norms[1].num_features == C == m['conv1x1.0'].out_channels:
        return 'values or their norms have not as many channels as x'
    return (
        _why_not_filters(layer, m['embed.3'], m['embed.4'], C)
        or ('one value has no variance' if B * H * W == 1 else None)
        or (f'{torch.get_num_threads()} threads share {B} images' if 4 * B < torch.get_num_threads() else None)
        or cpu.why_not(x.dtype)
    )


def _why_not_train_bottleneck(block: nn.Module, x: Tensor) -> Optional[str]:
    reason = _NO_WING if cpu is None else _why_not_now(x, (torch.float32,), training=True)
    if reason is not None:
        return reason
    m = _find(block, _BOTTLENECK, x)
    if isinstance(m, str):
        return m
    if block.se is not None or block.drop_path is not None:
        return 'the block has an attention module behind its norm, or stochastic depth'
    if not (_is_pointwise(m['conv1'], 1) and _is_pointwise(m['conv3'], 1)):
        return 'conv1 or conv3 is not a 1x1 convolution of one group'
    return _why_not_train_norm(m['bn1'], x) or _why_not_train_norm(m['bn3'], x) or cpu.why_not(x.dtype)


def _why_not_train_norm(norm: nn.BatchNorm2d, x: Tensor) -> Optional[str]:
    if not (norm.training and norm.affine and norm.track_running_stats and norm.momentum is not None):
        return 'a batch norm does not use and average the statistics of the batch, or has no weight'
    if not all(_is_plain(t, x) and t.is_contiguous() and len(t) == norm.num_features
               for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)):
        return 'a weight or running statistic of a batch norm is not a plain contiguous float32 tensor'
    return None


def _why_not_filters(layer: nn.Module, attn: nn.Conv2d, norm: nn.GroupNorm, channels: int) -> Optional[str]:
    """For what makes the filters, and their norm."""
    taps = layer.kernel_size ** 2
    if not (attn.bias is not None and norm.weight is not None and norm.bias is not None
            and attn.out_channels == norm.num_channels == norm.num_groups * taps
            and norm.num_groups % layer.groups == 0 and channels % norm.num_groups == 0):
        return 'filters or their norm have other sizes than the layer gives them'
    if layer.kernel_size > cpu.MAX_KERNEL_SIZE:
        return f'kernel_size is {layer.kernel_size}, more than {cpu.MAX_KERNEL_SIZE}'
    return None


def _why_not_inference(x: Tensor) -> Optional[str]:
    return _why_not_now(x, (torch.float32, torch.bfloat16), training=False) or onednn.why_not_packed(x.dtype)


def _why_not_folded_cot_layer(layer: nn.Module, x: Tensor) -> Optional[str]:
    reason = _NO_WING if cpu is None else _why_not_inference(x)
    if reason is not None:
        return reason
    m = _find(layer, _FOLDED_COT_LAYER, x)
    if isinstance(m, str):
        return m
    C = x.shape[1]
    if not all(_is_pointwise(m[path], layer.groups) for path in ('query', 'key', 'embed.1', 'value.0')):
        return 'query, key, embed.1 or value.0 is not a 1x1 convolution with the groups of the layer'
    if not _is_mixing(m['se.0'], m['se.2'], C):
        return 'se is not made of two 1x1 convolutions with a bias, from dim channels to twice as many'
    if m['value.0'].out_channels != C or layer.scale is not None \
            or not _is_plain(layer.shift, x) or layer.shift.shape != (C,):
        return 'values have not as many channels as x, or more than a shift is left of the norm behind the filters'
    return _why_not_filters(layer, m['embed.1'], m['embed.2'], C) or cpu.why_not(x.dtype)


def _why_not_folded_bottleneck(block: nn.Module, x: Tensor) -> Optional[str]:
    reason = _why_not_inference(x)
    if reason is not None:
        return reason
    m = _find(block, _FOLDED_BOTTLENECK, x)
    return m if isinstance(m, str) else None


def _why_not_folded_stage(stage: nn.Module, x: Tensor) -> Optional[str]:
    reason = _why_not_inference(x)
    if reason is not None:
        return reason
    for name, block in stage._modules.items():
        if _KINDS.get(type(block)) != 'folded_bottleneck':
            return f'{name} is a {type(block).__name__}, not a folded bottleneck'
        if are_watched([block], children=False):
            return f'hooks watch {name}, or its forward is another one'
        m = _find(block, _FOLDED_BOTTLENECK, x)
        if isinstance(m, str):
            return f'{name}: {m}'
    return None


def _why_not_averaged(module: nn.Module, x: Tensor) -> Optional[str]:
    if torch.jit.is_tracing():
        return 'a tracer keeps what the modules do'
    m = _find(module, _COT_ATTENTION, None)
    if isinstance(m, str):
        return m
    if not (_is_pointwise(m['attention_embed.0'], 1) and _is_pointwise(m['attention_embed.3'], 1)):
        return 'a convolution of attention_embed is not 1x1'
    return None


_ON_CPU = {
    'bottleneck': (StandIn('C kernels of norms', _why_not_train_bottleneck, lambda *a: cpu.train_bottleneck(*a)),),
    'cot_layer': (StandIn('C kernels for training', _why_not_train_cot_layer, lambda *a: cpu.train_cot_layer(*a)),),
    'folded_cot_layer': (
        StandIn('packed convolutions and a C kernel', _why_not_folded_cot_layer, lambda *a: cpu.folded_cot_layer(*a)),),
    'folded_stage': (
        StandIn('packed convolutions, in place', _why_not_folded_stage, lambda *a: onednn.folded_stage(*a)),),
    'folded_bottleneck': (
        StandIn('packed convolutions', _why_not_folded_bottleneck, lambda *a: onednn.folded_bottleneck(*a)),),
}
_ANYWHERE = {
    'cot_attention': (StandIn('averaged filters', _why_not_averaged, plain.averaged_attention),),
}
