"""A whole CoT layer in training as one operator: its definition, and the autograd function of its implementations.

`dispatch.py` says what may stand in for the modules that compute it, and when.
"""
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import contexts as definition  # the module, as it may be on its way to import what imports this one
from .batch_norm import Averages, averages_of
from .watch import untraced, wants_plain


class TrainingParameters(NamedTuple):
    """Those of all behind the convolutions, for C channels, N = G * k * k filter values, A hidden channels of `se`."""
    value_weight: Tensor  # (C), batch norm of the values
    value_bias: Tensor
    conv_bias: Tensor  # (N), what the convolution that makes the filters adds to them, filter by filter
    filter_weight: Tensor  # (N), group norm of the filters, filter by filter
    filter_bias: Tensor
    weight: Tensor  # (C), batch norm behind the local convolution
    bias: Tensor
    se_weight1: Tensor  # (A, C, 1, 1), the mixing's first convolution
    se_bias1: Tensor
    se_norm_weight: Tensor  # (A), its batch norm
    se_norm_bias: Tensor
    se_weight2: Tensor  # (2 * C, A, 1, 1), its second convolution
    se_bias2: Tensor

    @property
    def of_contexts(self) -> 'definition.ContextsParameters':
        """All but conv_bias, where the convolution has added it."""
        return definition.ContextsParameters(*self[:2], *self[3:])


class Parameters(NamedTuple):
    """Parameters of a layer: of what makes static context, filters and values, and those of `contexts`."""
    key: Tensor  # filters of the key convolution, (C, C / groups, k, k)
    key_weight: Tensor  # (C), its batch norm
    key_bias: Tensor
    first: Tensor  # (C / 2, 2 * C / groups, 1, 1), first convolution of `embed`
    first_weight: Tensor  # (C / 2), its batch norm
    first_bias: Tensor
    attn: Tensor  # (N, C / 2 / groups, 1, 1), second convolution of `embed`
    value: Tensor  # (C, C / groups, 1, 1)
    rest: TrainingParameters


class Settings(NamedTuple):
    """Numbers of a layer, and the running statistics of its norms."""
    contexts: 'definition.ContextsSettings'
    key_groups: int
    key_padding: Tuple[int, int]
    key_dilation: Tuple[int, int]
    key_eps: float
    first_eps: float
    key_averages: Averages
    first_averages: Averages
    averages: Tuple[Averages, Averages, Averages]
    dtype: torch.dtype  # in which convolutions compute


def settings_of(layer: nn.Module, x: Tensor) -> Settings:
    """Those of a `CotLayer` or `CoxtLayer` for an x, which autocast may convert."""
    parts = layer._modules
    key, key_norm, _ = parts['key_embed']._modules.values()
    _, first_norm, _, _, filter_norm = parts['embed']._modules.values()
    (_, value_norm), norm = parts['conv1x1']._modules.values(), parts['bn']
    _, se_norm, _, _ = parts['se']._modules.values()
    return Settings(
        definition.ContextsSettings(
            layer.kernel_size, layer.dilation, layer.groups, filter_norm.num_groups, value_norm.eps, filter_norm.eps,
            norm.eps, se_norm.eps),
        key.groups, key.padding, key.dilation, key_norm.eps, first_norm.eps, averages_of(key_norm),
        averages_of(first_norm), (averages_of(value_norm), averages_of(norm), averages_of(se_norm)),
        torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype)


def parameters_of(layer: nn.Module) -> List[Tensor]:
    """Those of a `CotLayer` or `CoxtLayer` in the order of `Parameters`, in one row."""
    parts = layer._modules
    key, key_norm, _ = parts['key_embed']._modules.values()
    first, first_norm, _, attn, filter_norm = parts['embed']._modules.values()
    conv, value_norm = parts['conv1x1']._modules.values()
    se1, se_norm, _, se2 = parts['se']._modules.values()
    with_both = key_norm, first_norm, value_norm, filter_norm, parts['bn'], se1, se_norm, se2
    # by way of dictionaries, as `nn.Module.__getattr__` is slow
    made = [module._parameters[name] for module in with_both for name in ('weight', 'bias')]
    key, first, attn_parameters, conv = [module._parameters for module in (key, first, attn, conv)]
    return [key['weight'], *made[:2], first['weight'], *made[2:4], attn_parameters['weight'], conv['weight'],
            *made[4:6], attn_parameters['bias'], *made[6:]]


def grouped(parameters: Sequence[Tensor]) -> Parameters:
    """`Parameters` of the row that `parameters_of` gives; contiguous, but for the filters of convolutions."""
    first = [t if t.ndim == 4 else t.contiguous() for t in parameters[:8]]
    return Parameters(*first, TrainingParameters(*(t.contiguous() for t in parameters[8:])))


def cot_layer(x: Tensor, *parameters: Tensor, s: Settings) -> Tensor:
    """The layer in plain PyTorch: differentiable. Running statistics are neither read nor written."""
    p, groups = grouped(parameters), s.contexts.groups
    static = F.conv2d(x, p.key, None, 1, s.key_padding, s.key_dilation, s.key_groups)
    static = F.relu(F.batch_norm(static, None, None, p.key_weight, p.key_bias, True, 0., s.key_eps))
    both = torch.cat([x, static], 1) if groups == 1 else torch.stack([x, static], 2).flatten(1, 2)
    hidden = F.conv2d(both, p.first, groups=groups)
    hidden = F.relu(F.batch_norm(hidden, None, None, p.first_weight, p.first_bias, True, 0., s.first_eps))
    logits = F.conv2d(hidden, p.attn, p.rest.conv_bias, groups=groups)
    value = F.conv2d(x, p.value, groups=groups)
    return definition.contexts(value, logits, static, p.rest.of_contexts, s.contexts)


class TrainCotLayer(torch.autograd.Function):
    """`apply(x, forward, backward, settings, *parameters)` for the two functions of a `LayerOperator`.

    x is dense in channels-last. Running statistics are updated.
    """

    @staticmethod
    def forward(ctx, x: Tensor, forward: Callable, backward: Callable, settings: Settings, *parameters: Tensor):
        out, *kept = forward(x, parameters, settings)
        ctx.implementation, ctx.settings = backward, settings
        ctx.save_for_backward(x, *parameters, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        (x, *saved), (need_x, _, _, _, *need_parameters) = ctx.saved_tensors, ctx.needs_input_grad
        count, needed = len(need_parameters), [need_x, *need_parameters]
        if wants_plain(grad):
            grads = differentiable_gradients(grad, x, saved[:count], needed, ctx.settings)
        else:
            grads = untraced(ctx.implementation)(grad, x, saved[:count], saved[count:], needed, ctx.settings)
        return grads[0], None, None, None, *grads[1:]


def differentiable_gradients(
        grad: Tensor,
        x: Tensor,
        parameters: Sequence[Tensor],
        needed: Sequence[bool],
        s: Settings,
) -> List[Optional[Tensor]]:
    """Gradients of x and the parameters where they are needed, which are differentiable themselves."""
    with torch.enable_grad():
        tensors = [t.view_as(t) for t in (x, *parameters)]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        out = cot_layer(*(t.to(dtype) for t in tensors), s=s)
        wanted = [t for t, need in zip(tensors, needed) if need]
        grads = iter(torch.autograd.grad(out, wanted, grad.to(dtype), create_graph=True))
    return [next(grads) if need else None for need in needed]
