"""A CoT layer in training, whatever device it runs on: an autograd function, and an operator of compiled graphs.

Compilers see what goes in and what comes out, and no less: running statistics are inputs, and their new values outputs
that the graph copies into the buffers, so that nothing is written where a compiler does not expect it. What the
gradient needs are outputs too.
"""
from typing import Any, Callable, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from . import contexts as definition  # the module, as it may be on its way to import what imports this one
from .batch_norm import Averages
from .cot_layer import Settings, TrainCotLayer, differentiable_gradients, parameters_of, settings_of
from .watch import wants_plain

_NUMBERS = (
    'int kernel_size, int dilation, int groups, int num_filters, int key_groups, int[] key_padding, '
    'int[] key_dilation, float[] eps, float[] momentum')
_NORMS = 5


class LayerOperator:
    """An implementation of `cot_layer`: called while a graph is made, it puts one of its two operators there.

    Args:
        name: Of the operator in the namespace `timm_cotnet`; that of its gradient ends in `_backward`.
        forward: `forward(x, parameters, settings)` gives the output and what the backward needs, and updates running
            statistics.
        backward: `backward(grad, x, parameters, kept, needed, settings)` gives the gradients of x and the parameters.
        like_kept: `like_kept(x, parameters, settings)` gives empty tensors like those that the backward needs.
    """

    def __init__(self, name: str, forward: Callable, backward: Callable, like_kept: Callable):
        self._forward, self._backward, self._like_kept = forward, backward, like_kept
        self.operator = torch.library.custom_op(
            f'timm_cotnet::{name}', self._run, mutates_args=(),
            schema=f'(Tensor x, Tensor[] parameters, Tensor[] averages, {_NUMBERS}) -> Tensor[]')
        self.operator.register_fake(self._run_fake)
        self.operator.register_autograd(self._gradients, setup_context=_save)
        self._gradient = torch.library.custom_op(
            f'timm_cotnet::{name}_backward', self._run_backward, mutates_args=(),
            schema='(Tensor grad, Tensor x, Tensor[] parameters, Tensor[] kept, bool[] needed, '
                   f'{_NUMBERS}) -> Tensor[]')
        self._gradient.register_fake(_run_backward_fake)

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """`layer(x)` for a `CotLayer` or `CoxtLayer` in training, in the memory format of x."""
        if torch.compiler.is_compiling():
            out = self._in_graph(layer, x)
        else:
            s = settings_of(layer, x)
            # converted out here, so that a second derivative knows where it comes from
            dense = x.to(s.dtype, memory_format=torch.channels_last)
            out = TrainCotLayer.apply(dense, self._forward, self._backward, s, *parameters_of(layer))
        return out if x.is_contiguous(memory_format=torch.channels_last) else out.contiguous()

    def _in_graph(self, layer: nn.Module, x: Tensor) -> Tensor:
        args, norms = arguments_of(layer, x)
        results, averages = self.operator(*args), args[2]
        with torch.no_grad():
            torch._foreach_copy_(averages, [t.detach() for t in results[-len(averages):]])
            torch._foreach_add_([norm.tracked for norm in norms], 1)
        return results[0]

    def _run(self, x, parameters, averages, *numbers):
        averages = torch._foreach_mul(averages, 1)  # copies in one go
        s = _settings(x, averages, numbers)
        with torch.cuda.device_of(x):
            out = self._forward(_dense(x), parameters, s)
        return [*map(_apart, out), *averages]

    def _run_fake(self, x, parameters, averages, *numbers):
        averages = [torch.empty_like(average) for average in averages]
        kept = self._like_kept(x, parameters, _settings(x, averages, numbers))
        return [torch.empty_like(x, memory_format=torch.channels_last), *kept, *averages]

    def _run_backward(self, grad, x, parameters, kept, needed, *numbers):
        grads = self._backward(grad, x, parameters, kept, needed, _settings(x, [None] * 2 * _NORMS, numbers))
        return [_apart(grad) for grad, need in zip(grads, needed) if need]

    def _gradients(self, ctx, grads: List[Tensor]) -> Tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        need_x, need_parameters = ctx.needs_input_grad[:2]
        needed, count = [need_x, *need_parameters], len(need_parameters)
        parameters, kept = saved[:count], saved[count:]
        if wants_plain(grads[0]):
            s = _settings(x, [None] * 2 * _NORMS, ctx.numbers)
            found = differentiable_gradients(grads[0], x, parameters, needed, s)
        else:
            given = iter(self._gradient(grads[0], x, parameters, kept, needed, *ctx.numbers))
            found = [next(given) if need else None for need in needed]
        return found[0], found[1:], [None] * 2 * _NORMS, *[None] * len(ctx.numbers)


def arguments_of(layer: nn.Module, x: Tensor) -> Tuple[Tuple[Any, ...], Sequence[Averages]]:
    """What an operator takes for a layer and x, and the running statistics of the layer's norms."""
    s = settings_of(layer, x)
    norms = (s.key_averages, s.first_averages, *s.averages)
    averages = [average for norm in norms for average in (norm.mean, norm.var)]
    x = x.to(s.dtype, memory_format=torch.channels_last)
    return (x, parameters_of(layer), averages, *_numbers(s, norms)), norms


def _save(ctx, inputs: Tuple, output: List[Tensor]) -> None:
    x, parameters, averages, *ctx.numbers = inputs
    ctx.save_for_backward(x, *parameters, *output[1:-len(averages)])
    ctx.set_materialize_grads(False)


def _run_backward_fake(grad, x, parameters, kept, needed, *numbers):
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    grads = [grad_x, *(p.new_empty_strided(p.shape, p.stride()) for p in parameters)]
    return [grad for grad, need in zip(grads, needed) if need]


def _numbers(s: Settings, norms: Sequence[Averages]) -> Tuple[Any, ...]:
    """Settings as an operator takes them."""
    c = s.contexts
    eps = [s.key_eps, s.first_eps, c.value_eps, c.filter_eps, c.eps, c.se_eps]
    return (c.kernel_size, c.dilation, c.groups, c.num_filters, s.key_groups, list(s.key_padding),
            list(s.key_dilation), eps, [norm.momentum for norm in norms])


def _settings(x: Tensor, averages: Sequence[Tensor], numbers: Tuple[Any, ...]) -> Settings:
    """Settings of the numbers that `_numbers` gives, for running statistics: mean and variance of each norm."""
    *sizes, key_groups, key_padding, key_dilation, (key_eps, first_eps, *eps), momentum = numbers
    tracked = x.new_zeros((), dtype=torch.int64)  # counted outside
    key, first, *others = (
        Averages(*averages[2 * i:2 * i + 2], tracked, momentum[i]) for i in range(_NORMS))
    return Settings(
        definition.ContextsSettings(*sizes, *eps), key_groups, tuple(key_padding), tuple(key_dilation), key_eps,
        first_eps, key, first, tuple(others), x.dtype)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _apart(t: Tensor) -> Tensor:
    """With memory of its own, as results of operators must have."""
    return t if t.untyped_storage().nbytes() == t.numel() * t.element_size() else t.clone()
