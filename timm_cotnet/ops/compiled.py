"""A CoT layer in training, whatever device it runs on: an autograd function, and operators of compiled graphs.

Compilers see what goes in and what comes out, and no less: running statistics are inputs, and their new values outputs
that the graph copies into the buffers, so that nothing is written where a compiler does not expect it. What the
gradient needs are outputs too.

The operator that a graph gets first is made of the autograd function and of two more, of the forward and the backward.
These are all that is left when the gradient has been traced. As PyTorch has no gradient of theirs to look for, and
as `torch.library.custom_op` is not what defines them, a call of them enters Python once instead of twice.
"""
import functools
import zlib
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from . import contexts as definition  # the module, as it may be on its way to import what imports this one
from .batch_norm import Averages
from .cot_layer import Settings, TrainCotLayer, parameters_of, settings_of

_NUMBERS = 'int[] sizes, float[] numbers'
_NORMS = 5
# of the sources: a number in each graph, as PyTorch keeps compiled graphs on disk, where they outlive versions of this
# package, which may keep other tensors for the gradient
_CHECKSUM = zlib.crc32(b''.join(
    path.read_bytes() for kind in ('*.py', '*.[ch]') for path in sorted(Path(__file__).parent.rglob(kind))))


class LayerOperator:
    """An implementation of `cot_layer`: called while a graph is made, it puts its operator there.

    Args:
        name: Of the operator in the namespace `timm_cotnet`; those that it is made of end in `_forward` and
            `_backward`.
        forward: `forward(x, parameters, settings)` gives the output and what the backward needs, each with memory of
            its own, and updates running statistics.
        backward: `backward(grad, x, parameters, kept, needed, settings)` gives the gradients of x and the parameters.
        like_kept: `like_kept(x, parameters, settings)` gives empty tensors like those that the backward needs.
    """

    def __init__(self, name: str, forward: Callable, backward: Callable, like_kept: Callable):
        self._forward, self._backward, self._like_kept = forward, backward, like_kept
        self._library = torch._library.custom_ops.get_library_allowing_overwrite('timm_cotnet', name)
        inputs = f'Tensor x, Tensor[] parameters, Tensor[] averages, {_NUMBERS}'
        self.operator = self._define(name, inputs, self._run, 'CompositeImplicitAutograd')
        self._forward_operator = self._define(f'{name}_forward', inputs, self._run_forward)
        self._backward_operator = self._define(
            f'{name}_backward',
            f'Tensor grad, Tensor x, Tensor[] parameters, Tensor[] kept, bool[] needed, {_NUMBERS}', self._run_backward)
        torch.library.register_fake(f'timm_cotnet::{name}_forward', self._run_forward_fake, lib=self._library)
        torch.library.register_fake(f'timm_cotnet::{name}_backward', _run_backward_fake, lib=self._library)

    def _define(self, name: str, inputs: str, function: Callable, key: str = 'CompositeExplicitAutograd') -> Callable:
        self._library.define(f'{name}({inputs}) -> Tensor[]', tags=(torch.Tag.pt2_compliant_tag,))
        self._library.impl(name, function, key)
        return getattr(torch.ops.timm_cotnet, name).default

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """`layer(x)` for a `CotLayer` or `CoxtLayer` in training, in the memory format of x."""
        if torch.compiler.is_compiling():
            out = self._in_graph(layer, x)
        else:
            s = settings_of(layer, x)
            # converted out here, so that a second derivative knows where it comes from; `to` leaves gaps in memory
            dense = _dense(x.to(s.dtype))
            out = TrainCotLayer.apply(dense, self._forward, self._backward, s, *parameters_of(layer))
        return out if x.is_contiguous(memory_format=torch.channels_last) else out.contiguous()

    def _in_graph(self, layer: nn.Module, x: Tensor) -> Tensor:
        args, norms = arguments_of(layer, x)
        (out, *results), averages = self.operator(*args), args[2]
        with torch.no_grad():
            torch._foreach_copy_(averages, results)
            torch._foreach_add_([norm.tracked for norm in norms], 1)
        return out

    def _run(self, x, parameters, averages, *numbers):
        updated = []

        def forward(x, parameters, s):
            results = self._forward_operator(x, parameters, averages, *numbers)
            updated.extend(results[-len(averages):])
            return results[:-len(averages)]

        def backward(grad, x, parameters, kept, needed, s):
            grads = iter(self._backward_operator(grad, x, parameters, kept, needed, *numbers))
            return [next(grads) if need else None for need in needed]

        return [TrainCotLayer.apply(x, forward, backward, _settings(x, numbers), *parameters), *updated]

    def _run_forward(self, x, parameters, averages, *numbers):
        averages = torch._foreach_mul(averages, 1)  # copies in one go
        s = _settings(x, numbers, averages)
        with torch.cuda.device_of(x):
            out = self._forward(_dense(x), parameters, s)
        return [*out, *averages]

    def _run_forward_fake(self, x, parameters, averages, *numbers):
        kept = self._like_kept(x, parameters, _settings(x, numbers))
        return [torch.empty_like(x, memory_format=torch.channels_last), *kept, *map(torch.empty_like, averages)]

    def _run_backward(self, grad, x, parameters, kept, needed, *numbers):
        grads = self._backward(grad, x, parameters, kept, needed, _settings(x, numbers))
        return _apart([grad for grad, need in zip(grads, needed) if need])


def arguments_of(layer: nn.Module, x: Tensor) -> Tuple[Tuple[Any, ...], Sequence[Averages]]:
    """What an operator takes for a layer and x, and the running statistics of the layer's norms."""
    s = settings_of(layer, x)
    norms = (s.key_averages, s.first_averages, *s.averages)
    averages = [average for norm in norms for average in (norm.mean, norm.var)]
    x = _dense(x.to(s.dtype))
    return (x, parameters_of(layer), averages, *_numbers(s, norms)), norms


def _run_backward_fake(grad, x, parameters, kept, needed, *numbers):
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    grads = [grad_x, *(p.new_empty_strided(p.shape, p.stride()) for p in parameters)]
    return [grad for grad, need in zip(grads, needed) if need]


def _numbers(s: Settings, norms: Sequence[Averages]) -> Tuple[List[int], List[float]]:
    """Settings as an operator takes them."""
    c = s.contexts
    sizes = [
        c.kernel_size, c.dilation, c.groups, c.num_filters, s.key_groups, *s.key_padding, *s.key_dilation, _CHECKSUM]
    eps = [s.key_eps, s.first_eps, c.value_eps, c.filter_eps, c.eps, c.se_eps]
    return sizes, [*eps, *(norm.momentum for norm in norms)]


def _settings(x: Tensor, numbers: Tuple[Any, Any], averages: Optional[Sequence[Tensor]] = None) -> Settings:
    """Settings of what `_numbers` gives; with running statistics, mean and variance of each norm, if they are given."""
    sizes, values = map(tuple, numbers)
    s = _settings_without_averages(sizes, values, x.dtype)
    if averages is None:
        return s
    # counted outside; one for each, at a multiple of 16 bytes, as launches are repeated for tensors like these only
    tracked = x.new_empty((_NORMS, 2), dtype=torch.int64).unbind()
    key, first, *others = (
        Averages(*averages[2 * i:2 * i + 2], tracked[i], momentum) for i, momentum in enumerate(values[-_NORMS:]))
    return Settings(*s[:6], key, first, tuple(others), s.dtype)


@functools.lru_cache(maxsize=256)
def _settings_without_averages(sizes: Tuple[int, ...], values: Tuple[float, ...], dtype: torch.dtype) -> Settings:
    *sizes, key_groups, top, left, down, right, _checksum = sizes
    key_eps, first_eps, *eps = values[:-_NORMS]
    contexts = definition.ContextsSettings(*sizes, *eps)
    return Settings(contexts, key_groups, (top, left), (down, right), key_eps, first_eps, None, None, (), dtype)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _apart(tensors: Sequence[Tensor]) -> List[Tensor]:
    """With memory of their own, as results of operators must have: copied in one go where they are parts of others."""
    tensors = list(tensors)
    parts = [i for i, t in enumerate(tensors) if t.untyped_storage().nbytes() != t.nbytes]
    if parts:
        for i, copy in zip(parts, torch._foreach_mul([tensors[i] for i in parts], 1)):
            tensors[i] = copy
    return tensors
