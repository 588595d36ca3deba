"""The seam: what may stand in for a module or an operator on an input, and why not. Nothing else decides that.

A module class says by `known_as` what it is, and from then on its forward asks `stand_in` first, once. A row of the
table answers only for modules of exactly that class whose children, parameters and surroundings are what it knows;
`conditions.py` states them once. In every other case the module does its own work, child by child.
"""
import contextlib
import functools
import types
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from . import conditions, onednn, plain
from .conditions import KINDS as _KINDS
from .exported import is_exporting, local_conv_exported
from .gpu.local_conv import local_conv_triton, why_not_triton
from .reference import local_conv_reference
from .shifted import LocalConvShifted
from .watch import as_written, is_traced, needs_plain_graph


class StandIn(NamedTuple):
    """What computes the same as a module, where `look(module, x)` gives no reason against it."""
    name: str
    look: Callable[[nn.Module, Tensor], Any]  # a reason, or what it found
    run: Callable[[nn.Module, Tensor, Any], Tensor]  # of the module, the input and what was found


class Choice(NamedTuple):
    """What was decided for a module or an operator, and why faster ones were not taken."""
    module: Optional[nn.Module]  # None: an operator called by the module that was asked about before
    implementation: str
    why_not: Tuple[Tuple[str, str], ...]  # (name, reason)


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
        as_written(cls)
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
    refused, candidates = [], _stand_ins(_KINDS.get(type(module)), 'cpu' if x.is_cpu else x.device.type)
    for candidate in candidates:
        found = candidate.look(module, x)
        if not isinstance(found, str):
            if _record is not None:
                _record.append(Choice(module, candidate.name, tuple(refused)))
            return candidate.run(module, x, found)
        if _record is not None:
            refused.append((candidate.name, found))
    if _record is not None and candidates:
        _record.append(Choice(module, 'its own modules', tuple(refused)))
    return None


def _stand_ins(kind: Optional[str], device_type: str) -> Tuple[StandIn, ...]:
    """The table, the fastest first."""
    of_device = _ON_CPU if device_type == 'cpu' else _ON_GPU if device_type == 'cuda' else {}
    return of_device.get(kind, ()) + _ANYWHERE.get(kind, ())


def choose_local_conv(x: Tensor, weight: Tensor, kernel_size: int) -> Callable[..., Tensor]:
    """The implementation of local convolution for tensors that its front end has checked."""
    refused = []
    name, chosen = 'plain PyTorch', local_conv_reference
    compiling = torch.compiler.is_compiling()
    if is_exporting():
        name, chosen = 'operators for runtimes', functools.partial(
            local_conv_exported, crops=torch.onnx.is_in_onnx_export())
    elif needs_plain_graph(x, weight) if compiling else is_traced(x) or is_traced(weight):
        pass  # what is captured needs nothing of this package later
    elif x.device.type == 'cpu':
        reason = conditions.why_not_native_local_conv(x, weight, kernel_size)
        if reason is None:
            name, chosen = 'C kernel', conditions.cpu.local_conv  # one pass over memory in each direction
        elif compiling:  # fuses the taps
            refused.append(('C kernel', reason))
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


def _gpu(name: str) -> Callable:
    """A function of the stand-ins on a GPU, imported when it is called, as Triton takes long to import."""
    def run(module, x, _):
        from .gpu import stand_ins

        if torch.compiler.is_compiling():  # operators find the device by themselves
            return getattr(stand_ins, name)(module, x)
        with torch.cuda.device_of(x):
            return getattr(stand_ins, name)(module, x)
    return run


def _run_folded_cot_layer(layer: nn.Module, x: Tensor, found: Any) -> Tensor:
    """With parts that were found before."""
    row, = _ON_CPU.get('folded_cot_layer', (None,))
    if row is None:
        return layer(x)
    if _record is not None:
        _record.append(Choice(layer, row.name, ()))
    return row.run(layer, x, found)


_ON_CPU = {
    'bottleneck': (StandIn(
        'C kernels of norms', conditions.look_at_train_bottleneck,
        lambda *a: conditions.cpu.train_bottleneck(*a)),),
    'cot_layer': (StandIn(
        'C kernels for training', conditions.why_not_train_cot_layer,
        lambda layer, x, _: conditions.cpu.train_cot_layer(layer, x)),),
    'folded_cot_layer': (StandIn(
        'packed convolutions and a C kernel', conditions.look_at_folded_cot_layer,
        lambda *a: conditions.cpu.folded_cot_layer(*a)),),
    'folded_stem': (StandIn(
        'packed convolutions', conditions.look_at_folded_stem, lambda _, x, found: onednn.folded_stem(found, x)),),
    'folded_stage': (StandIn(
        'packed convolutions, in place', conditions.look_at_folded_stage,
        lambda _, x, found: onednn.folded_stage(found, x, _run_folded_cot_layer)),),
    'folded_bottleneck': (StandIn(
        'packed convolutions', conditions.look_at_folded_bottleneck,
        lambda block, x, found: onednn.folded_bottleneck(block, x, found, block._modules['conv2'])),),
}
_ON_GPU = {
    'cot_layer': (
        StandIn('Triton kernels for training', conditions.why_not_train_on_gpu, _gpu('train_cot_layer')),
        StandIn('Triton kernels for evaluation', conditions.why_not_infer_on_gpu, _gpu('infer_cot_layer'))),
    'bottleneck': (
        StandIn('Triton kernels of norms', conditions.why_not_train_bottleneck_on_gpu, _gpu('train_bottleneck')),
        StandIn('Triton kernels of norms, in evaluation', conditions.why_not_infer_bottleneck_on_gpu,
                _gpu('infer_bottleneck'))),
    'avg_pool': (
        StandIn('Triton kernel', conditions.why_not_pool, _gpu('pool')),
        StandIn('zeros and a pool without padding', conditions.why_not_padded_pool, _gpu('padded_pool'))),
    'folded_cot_layer': (
        StandIn('cuDNN and Triton kernels', conditions.why_not_folded_on_gpu, _gpu('infer_folded_cot_layer')),),
    'folded_stem': (
        StandIn('cuDNN convolutions with ReLU', conditions.look_at_folded_stem_on_gpu, _gpu('infer_folded_stem')),),
    'folded_bottleneck': (
        StandIn('cuDNN convolutions with ReLU', conditions.why_not_folded_bottleneck_on_gpu,
                _gpu('infer_folded_bottleneck')),),
}
_ANYWHERE = {
    'cot_attention': (StandIn(
        'averaged filters', conditions.why_not_averaged, lambda module, x, _: plain.averaged_attention(module, x)),),
}
