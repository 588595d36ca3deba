"""A CoT layer in training on a GPU: few launches, and little work for the host.

1x1 convolutions are matrix products of rows, a pixel each. The convolution of two concatenated tensors is the sum of
two. Filters with groups become filters without, zeros between the groups, which takes less time in half precision.
"""
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compiled import LayerOperator
from ..contexts import ContextsSettings, gradient_like
from ..cot_layer import Parameters, Settings, grouped
from .contexts import se_forward, tap_by_tap, train_backward, train_forward
from .norm import norm_again, norm_backward, norm_forward

_FEW = 16  # channels of a group, up to which cuDNN takes longer than for a convolution without groups


def layer_forward(x: Tensor, parameters: Sequence[Tensor], s: Settings) -> Tuple[Tensor, ...]:
    """Output of a layer for an x that is dense in channels-last, and what `layer_backward` needs."""
    p = grouped(parameters)
    with torch.autocast(x.device.type, enabled=False):
        key, groups = _grouped_weight(p.key.to(s.dtype), s.key_groups)
        static_in = _channels_last(F.conv2d(x, key, None, 1, s.key_padding, s.key_dilation, groups))
        static, key_table = norm_forward(static_in, p.key_weight, p.key_bias, s.key_averages, s.key_eps)
        of_query, of_key, attn, value_filters = _matrices(p, s)
        hidden_in = _conv1x1(x, of_query, addend=_conv1x1(static, of_key))
        hidden, first_table = norm_forward(hidden_in, p.first_weight, p.first_bias, s.first_averages, s.first_eps)
        logits, value = _conv1x1(hidden, attn), _conv1x1(x, value_filters)
        mixed, *kept = train_forward(value, logits, static, p.rest, s.averages, s.contexts)
    return mixed, static_in, key_table, hidden_in, first_table, value, logits, *kept


def layer_backward(
        grad: Tensor,
        x: Tensor,
        parameters: Sequence[Tensor],
        kept: Sequence[Tensor],
        needed: Sequence[bool],
        s: Settings,
) -> List[Optional[Tensor]]:
    """Gradients of x and the parameters; None of an x or of filters of which none is needed."""
    need_x, need_key, _, _, need_first, _, _, need_attn, need_value, *_ = needed
    p = grouped(parameters)
    # hooks may have changed what was saved
    grad, x, *kept = (_dense(t) for t in (grad.to(s.dtype), x, *kept))
    static_in, key_table, hidden_in, first_table, value, logits, *kept = kept
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        static = norm_again(static_in, key_table)
        of_query, of_key, attn, value_filters = _matrices(p, s)
        grad_value, grad_logits, grad_static, *grads = train_backward(
            grad, value, logits, static, *kept, p.rest, s.contexts)
        hidden = norm_again(hidden_in, first_table)
        grad_attn = _filter_grad(grad_logits, hidden) if need_attn else None
        grad_hidden = _conv1x1(grad_logits, attn.t())
        grad_hidden, _, first_grads = norm_backward(grad_hidden, hidden_in, hidden, p.first_weight, first_table)
        grad_static = _conv1x1(grad_hidden, of_key.t(), addend=grad_static)
        of_first = [_filter_grad(grad_hidden, t) for t in (x, static)] if need_first else None
        grad_static, _, key_grads = norm_backward(grad_static, static_in, static, p.key_weight, key_table)
        key, groups = _grouped_weight(p.key.to(s.dtype), s.key_groups)
        grad_x, grad_key, _ = torch.ops.aten.convolution_backward(
            grad_static, x, key, None, [1, 1], s.key_padding, s.key_dilation, False, [0, 0], groups,
            [need_x, need_key, False])
        if need_x:
            grad_x = _conv1x1(grad_hidden, of_query.t(), addend=_channels_last(grad_x))
            grad_x = _conv1x1(grad_value, value_filters.t(), addend=grad_x)
        grad_value = _filter_grad(grad_value, x) if need_value else None
        # of filters without groups to those with
        if need_key and groups != s.key_groups:
            grad_key = _of_groups(grad_key, s.key_groups)
        if need_first:
            of_first = [_of_groups(t, s.contexts.groups) for t in of_first]
            of_first = torch.cat(of_first, 1) if s.contexts.groups == 1 else torch.stack(of_first, 2).flatten(1)
        if need_attn:
            grad_attn = _filter_by_filter(_of_groups(grad_attn, s.contexts.groups), s.contexts)
        if need_value:
            grad_value = _of_groups(grad_value, s.contexts.groups)
    grads = [grad_key, *key_grads, of_first, *first_grads, grad_attn, grad_value, *grads]
    return [grad_x, *(None if g is None else gradient_like(g.view(t.shape), t) for g, t in zip(grads, parameters))]


def like_kept(x: Tensor, parameters: Sequence[Tensor], s: Settings) -> List[Tensor]:
    """Empty tensors like those that `layer_forward` keeps."""
    p = grouped(parameters)
    (B, C, H, W), N, hidden = x.shape, len(p.rest.filter_weight), len(p.first_weight)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32

    def images(channels: int) -> Tensor:
        return torch.empty(
            (B, channels, H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def numbers(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    attn = se_forward(x.new_empty((B, C), dtype=p.rest.se_weight1.dtype), p.rest[7:], s.averages[2], s.contexts.se_eps)
    return [
        images(C), numbers(4, C), images(hidden), numbers(4, hidden), images(C), images(N),
        images(C), numbers(4, C), numbers(B, 4, N), numbers(B, N), numbers(4, C), *attn]


train_cot_layer = LayerOperator('train_cot_layer', layer_forward, layer_backward, like_kept)


def _conv1x1(x: Tensor, filters: Tensor, addend: Optional[Tensor] = None) -> Tensor:
    """A 1x1 convolution with filters (out, channels), channels-last; the sum is written over addend."""
    if x.dtype == torch.float32:  # whether it may run in TF32 is said for convolutions and for products apart
        out = F.conv2d(x, filters[:, :, None, None])
        return out if addend is None else addend.add_(out)
    if addend is not None:
        _rows(addend).addmm_(_rows(x), filters.t())
        return addend
    B, _, H, W = x.shape
    return (_rows(x) @ filters.t()).view(B, H, W, -1).permute(0, 3, 1, 2)


def _filter_grad(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of the filters of a 1x1 convolution, (out, channels)."""
    if x.dtype != torch.float32:
        return _rows(grad).t() @ _rows(x)
    filters = grad.new_empty(grad.shape[1], x.shape[1], 1, 1)
    return torch.ops.aten.convolution_backward(
        grad, x, filters, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False])[1].flatten(1)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W), channels-last, as a matrix of pixels: (B * H * W, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _dense(x: Tensor) -> Tensor:
    if x.ndim == 4 and x.shape[1] != 1:
        return _channels_last(x)
    return x.contiguous()


def _matrices(p: Parameters, s: Settings) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Filters of the 1x1 convolutions as matrices, those of the filters tap by tap."""
    groups = s.contexts.groups
    of_query, of_key = query_key(p.first.to(s.dtype), groups)
    attn = tap_by_tap(dense(p.attn.to(s.dtype), groups), s.contexts.kernel_size, groups)
    return tuple(t.flatten(1) for t in (of_query, of_key, attn, dense(p.value.to(s.dtype), groups)))


def query_key(weight: Tensor, groups: int) -> Sequence[Tensor]:
    """Filters for two tensors, instead of for their concatenation or, with groups, their channels in turn."""
    if groups == 1:
        return weight.split(weight.shape[1] // 2, 1)
    return [dense(weight[:, i::2], groups) for i in (0, 1)]


def dense(weight: Tensor, groups: int) -> Tensor:
    """Filters that do without groups what these do with them: zeros between the groups."""
    if groups == 1:
        return weight
    out, per_group = weight.shape[0] // groups, weight.shape[1]
    made = weight.new_zeros(weight.shape[0], per_group * groups, *weight.shape[2:])
    for i in range(groups):
        made[i * out:(i + 1) * out, i * per_group:(i + 1) * per_group] = weight[i * out:(i + 1) * out]
    return made


def _of_groups(weight: Tensor, groups: int) -> Tensor:
    """Filters with groups of those that `dense` makes, (out, channels, ...) -> (out, channels / groups, ...)."""
    if groups == 1:
        return weight
    out, per_group = weight.shape[0] // groups, weight.shape[1] // groups
    return torch.cat([
        weight[i * out:(i + 1) * out, i * per_group:(i + 1) * per_group] for i in range(groups)])


def _filter_by_filter(weight: Tensor, s: ContextsSettings) -> Tensor:
    """The inverse of `tap_by_tap`."""
    return weight.unflatten(0, (s.groups, s.kernel_size ** 2, -1)).transpose(1, 2).flatten(0, 2)


def grouped_weight(conv: nn.Conv2d, dtype: torch.dtype) -> Tuple[Tensor, int]:
    """Filters in dtype and their groups: without groups where that takes less time."""
    return _grouped_weight(conv.weight.to(dtype), conv.groups)


def _grouped_weight(weight: Tensor, groups: int) -> Tuple[Tensor, int]:
    if groups == 1 or weight.shape[1] > _FEW or weight.dtype not in (torch.bfloat16, torch.float16):
        return weight, groups
    return dense(weight, groups), 1
