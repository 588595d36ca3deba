"""A CoT layer in training on the CPU, float32 and channels-last: PyTorch's convolutions, and kernels for the rest.

The convolution of two concatenated tensors is the sum of two. Gradients of 1x1 convolutions are products of matrices,
as in `pointwise.py`. What comes out of norms is computed again, not kept.
"""
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import contexts as definition  # the module, as it may be on its way to import this one
from ..compiled import LayerOperator
from ..cot_layer import Settings, grouped
from ..pointwise import add_product
from .batch_norm import batch_norm_backward, batch_norm_forward
from .contexts import contexts_backward, contexts_forward
from .local_conv import channels_last


def layer_forward(x: Tensor, parameters: Sequence[Tensor], s: Settings) -> Tuple[Tensor, ...]:
    """Output of a layer for an x that is dense in channels-last, and what `layer_backward` needs."""
    p, groups = grouped(parameters), s.contexts.groups
    static_in = channels_last(F.conv2d(x, p.key, None, 1, s.key_padding, s.key_dilation, s.key_groups))
    static, key_table = batch_norm_forward(static_in, p.key_weight, p.key_bias, s.key_averages, s.key_eps)
    of_query, of_key = _query_key(p.first, groups)
    hidden_in = channels_last(F.conv2d(x, of_query, groups=groups))
    if groups == 1:
        _rows(hidden_in).addmm_(_rows(static), of_key.flatten(1).t())
    else:
        hidden_in.add_(F.conv2d(static, of_key, groups=groups))
    hidden, first_table = batch_norm_forward(hidden_in, p.first_weight, p.first_bias, s.first_averages, s.first_eps)
    logits = channels_last(F.conv2d(hidden, p.attn, p.rest.conv_bias, groups=groups))
    value = channels_last(F.conv2d(x, p.value, groups=groups))
    out, *kept = contexts_forward(value, logits, static, p.rest.of_contexts, s.averages, s.contexts)
    return out, static_in, key_table, hidden_in, first_table, value, logits, *kept


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
    # hooks may have changed what was saved
    p, groups = grouped([t.float() for t in parameters]), s.contexts.groups
    grad, x, *kept = (channels_last(t.float()) if t.ndim == 4 else t.float().contiguous() for t in (grad, x, *kept))
    static_in, key_table, hidden_in, first_table, value, logits, pooled, attn, *tables = kept
    with torch.autocast('cpu', enabled=False):
        static, hidden = (
            torch.addcmul(table[1, :, None, None], t, table[0, :, None, None]).relu_()
            for t, table in ((static_in, key_table), (hidden_in, first_table)))
        grad_value, grad_logits, grad_static, *rest = contexts_backward(
            grad, value, logits, static, pooled, attn, tables, p.rest.of_contexts, s.contexts)
        rest.insert(2, grad_logits.sum((0, 2, 3)))
        of_query, of_key = _query_key(p.first, groups)
        grad_attn = _filter_grad(grad_logits, hidden, p.attn, groups) if need_attn else None
        grad_hidden, _, *first_grads = batch_norm_backward(
            _input_grad(grad_logits, p.attn, groups), hidden_in, p.first_weight, p.first_bias, first_table, s.first_eps)
        grad_static = _input_grad(grad_hidden, of_key, groups, grad_static)
        grad_first = None
        if need_first:
            of_both = _filter_grad(grad_hidden, x, of_query, groups), _filter_grad(grad_hidden, static, of_key, groups)
            grad_first = torch.cat(of_both, 1) if groups == 1 else torch.stack(of_both, 2).flatten(1, 2)
        grad_static, _, *key_grads = batch_norm_backward(
            grad_static, static_in, p.key_weight, p.key_bias, key_table, s.key_eps)
        grad_x, grad_key, _ = torch.ops.aten.convolution_backward(
            grad_static, x, p.key, None, [1, 1], s.key_padding, s.key_dilation, False, [0, 0], s.key_groups,
            [need_x, need_key, False])
        if need_x:
            grad_x = _input_grad(grad_hidden, of_query, groups, channels_last(grad_x))
            grad_x = _input_grad(grad_value, p.value, groups, grad_x)
        grad_value = _filter_grad(grad_value, x, p.value, groups) if need_value else None
    grads = [grad_key, *key_grads, grad_first, *first_grads, grad_attn, grad_value, *rest]
    return [grad_x, *(
        None if g is None else definition.gradient_like(g.view(t.shape), t) for g, t in zip(grads, parameters))]


def like_kept(x: Tensor, parameters: Sequence[Tensor], s: Settings) -> List[Tensor]:
    """Empty tensors like those that `layer_forward` keeps."""
    p = grouped(parameters)
    (B, C, H, W), N, hidden = x.shape, len(p.rest.filter_weight), len(p.first_weight)

    def images(channels: int) -> Tensor:
        return x.new_empty((B, channels, H, W)).contiguous(memory_format=torch.channels_last)

    new = x.new_empty
    return [
        images(C), new(4, C), images(hidden), new(4, hidden), images(C), images(N), new(B, C, 1, 1),
        new(B, C, 1, 1), new(4, C), new(4, B, N), new(4, C)]


train_cot_layer = LayerOperator('train_cot_layer_on_cpu', layer_forward, layer_backward, like_kept)


def _query_key(weight: Tensor, groups: int) -> Sequence[Tensor]:
    """Filters for two tensors, instead of for their concatenation or, with groups, their channels in turn."""
    return weight.split(weight.shape[1] // 2, 1) if groups == 1 else (weight[:, 0::2], weight[:, 1::2])


def _input_grad(grad: Tensor, weight: Tensor, groups: int, addend: Optional[Tensor] = None) -> Tensor:
    """Gradient of the input of a 1x1 convolution; the sum is written over addend."""
    if groups == 1:
        return add_product(grad.permute(0, 2, 3, 1), weight.flatten(1), addend)
    x = grad.new_empty(1).expand(grad.shape[0], weight.shape[1] * groups, *grad.shape[2:])
    out = channels_last(_gradients(grad, x, weight, groups, [True, False, False])[0])
    return out if addend is None else addend.add_(out)


def _filter_grad(grad: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Gradient of the filters of a 1x1 convolution."""
    if groups == 1:
        return (_rows(grad).t() @ _rows(x)).view(weight.shape)
    return _gradients(grad, x, weight, groups, [False, True, False])[1]


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, groups: int, wanted: List[bool]) -> Tuple[Tensor, ...]:
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], groups, wanted)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W), channels-last, as a matrix of pixels: (B * H * W, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)
