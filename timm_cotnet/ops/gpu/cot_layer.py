"""A CoT layer in training on a GPU: few launches, and little work for the host.

Activations are rows of channels, a pixel each, (B * H * W, C), as 1x1 convolutions are matrix products of such; see
`matrices.py`. Only what PyTorch convolves is an image.
"""
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch_norm import Averages
from ..compiled import LayerOperator
from ..contexts import gradient_like
from ..cot_layer import Settings, grouped
from .contexts import like_tables, split_grads, train_backward, train_forward
from .images import channels_last, image_of, rows_of
from .matrices import Matrices, from_matrices, is_dense, key_groups, like_matrices, to_matrices
from .norm import norm_again, norm_backward, norm_forward, norm_grads


class _WithoutAutocast:
    """`torch.autocast(device_type, enabled=False)` in a third of the time."""

    def __init__(self, device_type: str):
        self._device_type, self._was_enabled = device_type, torch.is_autocast_enabled(device_type)

    def __enter__(self) -> None:
        if self._was_enabled:
            torch.set_autocast_enabled(self._device_type, False)

    def __exit__(self, *_) -> None:
        if self._was_enabled:
            torch.set_autocast_enabled(self._device_type, True)


def layer_forward(x: Tensor, parameters: Sequence[Tensor], s: Settings) -> Tuple[Tensor, ...]:
    """Output of a layer for an x that is dense in channels-last, and what `layer_backward` needs."""
    p, of_x = grouped(parameters), rows_of(x)
    with _WithoutAutocast(x.device.type):
        m = to_matrices(p, s)
        static_in = F.conv2d(x, m.key, None, 1, s.key_padding, s.key_dilation, key_groups(p, s))
        static_in = rows_of(channels_last(static_in))
        static, key_table = _norm(static_in, p.key_weight, p.key_bias, s.key_averages, s.key_eps)
        hidden_in = _product(static, m.of_key, x, _product(of_x, m.of_query, x))
        hidden, first_table = _norm(hidden_in, p.first_weight, p.first_bias, s.first_averages, s.first_eps)
        logits, value = image_of(_product(hidden, m.attn, x), x), image_of(_product(of_x, m.value, x), x)
        averages = s.averages
        mixed, local, tables = train_forward(
            value, logits, static, *p.rest, *averages[0][:3], *averages[1][:3], *averages[2][:3],
            momenta=(averages[0].momentum, averages[1].momentum, averages[2].momentum), s=s.contexts)
    return mixed, *m, static_in, key_table, hidden_in, first_table, value, logits, local, tables


def _norm(x: Tensor, weight: Tensor, bias: Tensor, averages: Averages, eps: float) -> Tuple[Tensor, Tensor]:
    return norm_forward(x, None, weight, bias, *averages[:3], momentum=averages.momentum, eps=eps)


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
    grad, x, *kept = [_dense(t) for t in (grad.to(s.dtype), x, *kept)]
    m, (static_in, key_table, hidden_in, first_table, value, logits, local, tables) = Matrices(*kept[:5]), kept[5:]
    with torch.cuda.device_of(x), _WithoutAutocast(x.device.type):
        static, of_x, rest = norm_again(static_in, None, key_table), rows_of(x), p.rest
        grad_value, grad_logits, grad_static, grads, image_sums = train_backward(
            grad, value, logits, static, local, tables, rest.value_weight, rest.filter_weight, rest.weight,
            rest.se_weight1, rest.se_norm_weight, rest.se_weight2, s=s.contexts)
        hidden = norm_again(hidden_in, None, first_table)
        grad_attn = _filter_grad(grad_logits, hidden, x) if need_attn else None
        grad_hidden = _product_back(grad_logits, m.attn, x)
        grad_hidden, _, of_first_norm = norm_backward(grad_hidden, hidden_in, None, p.first_weight, first_table)
        grad_static = _product_back(grad_hidden, m.of_key, x, grad_static)
        of_first = [_filter_grad(grad_hidden, t, x) if need_first else None for t in (of_x, static)]
        grad_static, _, of_key_norm = norm_backward(grad_static, static_in, None, p.key_weight, key_table)
        grad_x, grad_key, _ = torch.ops.aten.convolution_backward(
            image_of(grad_static, x), x, m.key, None, _ONES, s.key_padding, s.key_dilation, False, _ZEROS,
            key_groups(p, s), [need_x, need_key, False])
        if need_x:
            grad_x = channels_last(grad_x)
            of_grad_x = _product_back(grad_hidden, m.of_query, x, rows_of(grad_x))
            _product_back(grad_value, m.value, x, of_grad_x)
        grad_value = _filter_grad(grad_value, of_x, x) if need_value else None
        grad_key = channels_last(grad_key) if need_key else None
        (grad_key, grad_first, grad_attn, grad_value), (filter_weight, filter_bias, conv_bias) = from_matrices(
            (grad_key, *of_first, grad_attn, grad_value), image_sums, p, s)
    g = split_grads(grads, x.shape[1], len(rest.se_bias1))
    grads = [
        grad_key, *norm_grads(of_key_norm), grad_first, *norm_grads(of_first_norm), grad_attn, grad_value,
        g.value_weight, g.value_bias, conv_bias, filter_weight, filter_bias, g.weight, g.bias,
        g.se_weight1.view(rest.se_weight1.shape), g.se_bias1, g.se_norm_weight, g.se_norm_bias,
        g.se_weight2.view(rest.se_weight2.shape), g.se_bias2]
    return [grad_x, *(None if g is None else gradient_like(g, t) for g, t in zip(grads, parameters))]


_ONES, _ZEROS = (1, 1), (0, 0)


def like_kept(x: Tensor, parameters: Sequence[Tensor], s: Settings) -> List[Tensor]:
    """Empty tensors like those that `layer_forward` keeps."""
    p = grouped(parameters)
    (B, C, H, W), N, hidden = x.shape, p.rest.filter_weight.shape[0], p.first_weight.shape[0]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32

    def rows(channels: int) -> Tensor:
        return x.new_empty(B * H * W, channels)

    def image(channels: int) -> Tensor:
        return torch.empty(
            (B, channels, H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def table(channels: int) -> Tensor:
        return x.new_empty(4, channels, dtype=dtype)

    return [*like_matrices(p, s), rows(C), table(C), rows(hidden), table(hidden), image(C), image(N), rows(C),
            like_tables(x, N, len(p.rest.se_bias1))]


train_cot_layer = LayerOperator('train_cot_layer', layer_forward, layer_backward, like_kept)


def _product(x: Tensor, filters: Tensor, image: Tensor, addend: Optional[Tensor] = None) -> Tensor:
    """A 1x1 convolution of an image's rows with filters (out, channels); the sum is written over addend."""
    if x.dtype == torch.float32:  # whether it may run in TF32 is said for convolutions and for products apart
        out = rows_of(channels_last(F.conv2d(image_of(x, image), filters[:, :, None, None])))
        return out if addend is None else addend.add_(out)
    return F.linear(x, filters) if addend is None else addend.addmm_(x, filters.t())


def _product_back(grad: Tensor, filters: Tensor, image: Tensor, addend: Optional[Tensor] = None) -> Tensor:
    """Gradient of the rows that `_product` was given."""
    if grad.dtype == torch.float32:
        return _product(grad, filters.t(), image, addend)
    return torch.mm(grad, filters) if addend is None else addend.addmm_(grad, filters)


def _filter_grad(grad: Tensor, x: Tensor, image: Tensor) -> Tensor:
    """Gradient of the filters of a 1x1 convolution, (out, channels), of an image's rows."""
    if x.dtype != torch.float32:
        return torch.mm(grad.t(), x)
    grad, x = image_of(grad, image), image_of(x, image)
    filters = grad.new_empty(grad.shape[1], x.shape[1], 1, 1)
    return torch.ops.aten.convolution_backward(
        grad, x, filters, None, _ONES, _ZEROS, _ONES, False, _ZEROS, 1, [False, True, False])[1].flatten(1)


def _dense(x: Tensor) -> Tensor:
    if x.ndim == 4 and x.shape[1] != 1:
        return channels_last(x)
    return x.contiguous()


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


def grouped_weight(conv: nn.Conv2d, dtype: torch.dtype) -> Tuple[Tensor, int]:
    """Filters in dtype and their groups: without groups where that takes less time."""
    weight = conv.weight.to(dtype)
    return (dense(weight, conv.groups), 1) if is_dense(weight, conv.groups, dtype) else (weight, conv.groups)
