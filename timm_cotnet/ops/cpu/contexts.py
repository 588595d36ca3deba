"""All of a CoT layer behind its convolutions in C: folded for inference, and in training, channels-last.

In training the backward needs its three inputs (values and filters before their norms) and computes the rest again,
where autograd would keep six tensors more.
"""
import ctypes
from typing import List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import contexts as definition  # the module, as it may be on its way to import this one
from ..batch_norm import Averages
from .build import call, num_threads
from .local_conv import Shape, channels_last, empty_like


class _Folded(ctypes.Structure):
    """`Parameters` of contexts_folded.c."""
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            'filter_weight', 'filter_bias', 'shift', 'weight1', 'bias1', 'weight2', 'bias2')),
        ('eps', ctypes.c_double), ('hidden', ctypes.c_long), ('logits', ctypes.c_long)]


class Norm(ctypes.Structure):
    """`Norm` of norms.h."""
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            'weight', 'bias', 'scale', 'shift', 'x_scale', 'x_shift', 'running_mean', 'running_var', 'grad_weight',
            'grad_bias')),
        ('eps', ctypes.c_double), ('momentum', ctypes.c_double)]

    def __init__(self, eps: float, momentum: float = 0., table: Sequence[Tensor] = (), **tensors: Tensor):
        """table holds scale, shift, x_scale and x_shift."""
        tensors.update(zip(('scale', 'shift', 'x_scale', 'x_shift'), table))
        super().__init__(eps=eps, momentum=momentum, **{name: t.data_ptr() for name, t in tensors.items()})


class _Contexts(ctypes.Structure):
    """`Contexts` of contexts_training.c."""
    _fields_ = [
        ('shape', Shape), *((name, Norm) for name in ('value_norm', 'filter_norm', 'norm')),
        *((name, ctypes.c_void_p) for name in (
            'value', 'logits', 'key', 'out', 'pooled', 'attn', 'grad', 'pool_grad', 'act_sums', 'grad_attn', 'grad_key',
            'grad_value', 'grad_logits'))]

    def __init__(self, s: 'definition.ContextsSettings', norms: Sequence[Norm], value: Tensor, **tensors: Tensor):
        super().__init__(Shape.of(value, s.num_filters, s.groups, s.kernel_size, s.dilation), *norms)
        self.set(value=value, **tensors)

    def set(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor.data_ptr())

    def call(self, kernel: str) -> None:
        call(kernel, torch.float32, ctypes.byref(self))


def contexts_folded(
        value: Tensor,
        logits: Tensor,
        static: Tensor,
        parameters: Sequence[Tensor],
        kernel_size: int,
        dilation: int,
        groups: int,
        filter_eps: float,
        overwrite: bool = False,
) -> Tensor:
    """Group norm of the filters, local convolution, shift, SiLU, pooling and the mix of the contexts: (B, C, H, W).

    All tensors are of one dtype, float32 or bfloat16, and none is empty; the result is channels-last.

    Args:
        value: Values with all norms folded in, (B, C, H, W).
        logits: Filters before their norm, (B, G * k * k, H, W).
        static: Static context, (B, C, H, W).
        parameters: Weight and bias of the group norm, (G * k * k) each; what is added to the local convolution, (C);
            weight and bias of the first convolution of the mix, (A, C, 1, 1) and (A); those of its second, (2 * C, A,
            1, 1) and (2 * C), the logits of the dynamic and of the static context in turn, or (C, A, 1, 1) and (C), by
            how much the latter is larger.
        kernel_size: k, odd, at most `MAX_KERNEL_SIZE` of local_conv.py.
        dilation: Distance between the taps of a filter, in pixels.
        groups: Number of slices of the channels, each of which has its own slice of the filters.
        filter_eps: Of the group norm, whose groups are the filters.
        overwrite: Whether the result may take the memory of value.
    """
    parameters = [p.contiguous() for p in parameters]
    value, logits, static = map(channels_last, (value, logits, static))
    # threads that share an image read each other's rows of the values
    out = value if overwrite and value.shape[0] >= num_threads() else torch.empty_like(value)
    shape = Shape.of(value, logits.shape[1] // kernel_size ** 2, groups, kernel_size, dilation)
    folded = _Folded(*[p.data_ptr() for p in parameters], filter_eps, parameters[4].numel(), parameters[6].numel())
    call('contexts_folded', value.dtype, ctypes.byref(shape), ctypes.byref(folded), value, logits, static, out)
    return out


_LIBRARY = torch._library.custom_ops.get_library_allowing_overwrite('timm_cotnet', 'contexts_folded')
_LIBRARY.define(
    'contexts_folded(Tensor value, Tensor logits, Tensor static, Tensor[] parameters, int kernel_size, int dilation, '
    'int groups, float filter_eps) -> Tensor')
_LIBRARY.impl('contexts_folded', contexts_folded, 'CPU')


@torch.library.register_fake('timm_cotnet::contexts_folded', lib=_LIBRARY)
def _(value, *args):
    return torch.empty_like(value, memory_format=torch.channels_last)


def contexts_forward(
        value: Tensor,
        logits: Tensor,
        static: Tensor,
        parameters: Sequence[Tensor],
        averages: Sequence[Averages],
        s: 'definition.ContextsSettings',
) -> Tuple[Tensor, ...]:
    """The contexts in training, and what the backward needs: pooled contexts, their weights and three tables.

    All are float32, and images channels-last.

    Args:
        value: Values before their norm, (B, C, H, W), more than one of each channel.
        logits: Filters before their norm, (B, G * k * k, H, W).
        static: Static context, (B, C, H, W).
        parameters: Those of `ContextsParameters`.
        averages: Running statistics of the norms of values, local convolution and mix, which are updated.
        s: Numbers.
    """
    B, C = value.shape[:2]
    tables = value.new_empty(4, C), value.new_empty(4, B, logits.shape[1]), value.new_empty(4, C)
    out, pooled = empty_like(value), value.new_empty(B, C, 1, 1)
    weights, biases = parameters[:6:2], parameters[1:6:2]
    of_value, of_dynamic, of_mix = averages
    norms = [
        Norm(s.value_eps, of_value.momentum, tables[0], weight=weights[0], bias=biases[0],
             running_mean=of_value.mean, running_var=of_value.var),
        Norm(s.filter_eps, 0., tables[1], weight=weights[1], bias=biases[1]),
        Norm(s.eps, of_dynamic.momentum, tables[2], weight=weights[2], bias=biases[2],
             running_mean=of_dynamic.mean, running_var=of_dynamic.var)]
    native = _Contexts(s, norms, value, logits=logits, key=static, out=out, pooled=pooled)
    native.call('contexts_forward')
    for average in averages:
        average.tracked.add_(1)
    attn = _static_weight(pooled, parameters[6:], of_mix, s.se_eps)
    native.set(attn=attn)
    native.call('contexts_mix')
    return out, pooled, attn, *tables


def contexts_backward(
        grad: Tensor,
        value: Tensor,
        logits: Tensor,
        static: Tensor,
        pooled: Tensor,
        attn: Tensor,
        tables: Sequence[Tensor],
        parameters: Sequence[Tensor],
        s: 'definition.ContextsSettings',
) -> List[Tensor]:
    """Gradients of value, logits, static and the parameters; all are dense."""
    out, grad_attn = empty_like(value), torch.empty_like(attn)
    act_sums = value.new_empty(value.shape[0], 5, value.shape[1], dtype=torch.float64)
    grad_static, grad_value, grad_logits = map(empty_like, (static, value, logits))
    norm_grads = [torch.empty_like(p) for p in parameters[:6]]
    norms = [
        Norm(eps, 0., tables[i], weight=parameters[2 * i], bias=parameters[2 * i + 1],
             grad_weight=norm_grads[2 * i], grad_bias=norm_grads[2 * i + 1])
        for i, eps in enumerate((s.value_eps, s.filter_eps, s.eps))]
    native = _Contexts(
        s, norms, value, logits=logits, key=static, out=out, attn=attn, grad=grad, act_sums=act_sums,
        grad_attn=grad_attn, grad_key=grad_static, grad_value=grad_value, grad_logits=grad_logits)
    native.call('contexts_recompute')
    grad_pooled, *se_grads = _se_gradients(pooled, attn, parameters[6:], s.se_eps, grad_attn)
    pool_grad = grad_pooled / value[0, 0].numel()
    native.set(pool_grad=pool_grad)
    native.call('contexts_backward')
    return [grad_value, grad_logits, grad_static, *norm_grads, *se_grads]


def _static_weight(pooled: Tensor, parameters: Sequence[Tensor], averages: Averages, eps: float) -> Tensor:
    """Weight of the static context: softmax over the (dynamic, static) logits of each channel, (B, C, 1, 1)."""
    weight1, bias1, weight, bias, weight2, bias2 = parameters
    hidden = F.linear(pooled.flatten(1), weight1.flatten(1), bias1)  # takes less time than convolutions of one pixel
    hidden = F.batch_norm(hidden, averages.mean, averages.var, weight, bias, True, averages.momentum, eps)
    logits = F.linear(hidden.relu_(), weight2.flatten(1), bias2).unflatten(1, (-1, 2))
    return (logits[..., 1] - logits[..., 0]).sigmoid().view_as(pooled)


def _se_gradients(pooled: Tensor, attn: Tensor, parameters: Sequence[Tensor], eps: float, grad: Tensor) -> List[Tensor]:
    """Gradients of the pooled contexts and of the parameters of what makes the weights of the mix."""
    weight1, bias1, weight, bias, weight2, _ = parameters
    rows = pooled.flatten(1)
    x = F.linear(rows, weight1.flatten(1), bias1)
    hidden, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0., eps)
    hidden.relu_()
    grad = (grad * attn * (1 - attn)).flatten(1)
    grad = torch.stack([-grad, grad], 2).flatten(1)  # of the logits
    grad_x = torch.ops.aten.threshold_backward(grad @ weight2.flatten(1), hidden, 0)
    grad_x, *norm_grads = torch.ops.aten.native_batch_norm_backward(
        grad_x, x, weight, None, None, mean, rstd, True, eps, [True] * 3)
    return [
        (grad_x @ weight1.flatten(1)).view_as(pooled), (grad_x.t() @ rows).view_as(weight1), grad_x.sum(0), *norm_grads,
        (grad.t() @ hidden).view_as(weight2), grad.sum(0)]
