"""Contexts: all that lies behind the convolutions of a CoT layer, as one operator. This is its definition.

Values and filters are normed, the filters are applied to the values (the dynamic context), and the two contexts are
mixed: arXiv:2107.12292, section 3.2. In training the norms use the statistics of the batch; once batch norms are
folded, they are gone or a shift is left of them. `dispatch.py` says what may stand in for it, and when.
"""
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .exported import is_exporting
from .local_conv import grouped_local_conv


class ContextsParameters(NamedTuple):
    """Parameters of `contexts`, for C channels, N = G * k * k filter values a pixel, and A hidden channels of `se`."""
    value_weight: Optional[Tensor]  # (C), batch norm of the values; None: they are normed already
    value_bias: Optional[Tensor]
    filter_weight: Tensor  # (N), group norm of the filters
    filter_bias: Tensor
    weight: Optional[Tensor]  # (C), batch norm behind the local convolution; None: only a shift by its bias
    bias: Tensor
    se_weight1: Tensor  # (A, C, 1, 1), the mixing's first convolution
    se_bias1: Tensor
    se_norm_weight: Optional[Tensor]  # (A), its batch norm; None: no norm
    se_norm_bias: Optional[Tensor]
    se_weight2: Tensor  # (2 * C, A, 1, 1), its second convolution; (C, A, 1, 1): the difference of its two logits
    se_bias2: Tensor


class ContextsSettings(NamedTuple):
    """Numbers of `contexts`."""
    kernel_size: int
    dilation: int
    groups: int  # slices of the channels, each with its own slice of the filters
    num_filters: int  # G, groups of the group norm
    value_eps: float = 1e-5
    filter_eps: float = 1e-5
    eps: float = 1e-5
    se_eps: float = 1e-5


def contexts(value: Tensor, logits: Tensor, static: Tensor, p: ContextsParameters, s: ContextsSettings) -> Tensor:
    """The output of a CoT layer from the results of its convolutions, in plain PyTorch: differentiable, scriptable.

    `dynamic = silu(norm(local_conv(norm(value), group_norm(logits))))`, `attn = se(mean(dynamic + static))`, and of
    each channel's two logits in attn the softmax gives the weights of dynamic and static. Running statistics are
    neither read nor written.

    Args:
        value: Values, (B, C, H, W).
        logits: Filters before their norm, filter by filter, (B, G * k * k, H, W).
        static: Static context, (B, C, H, W).
        p: Parameters.
        s: Numbers.

    Returns:
        (B, C, H, W), in the dtype of value.
    """
    if p.value_weight is not None:
        value = F.batch_norm(value, None, None, p.value_weight, p.value_bias, True, 0., s.value_eps)
    filters = F.group_norm(logits, s.num_filters, p.filter_weight, p.filter_bias, s.filter_eps)
    dynamic = grouped_local_conv(value, filters, s.kernel_size, s.dilation, s.groups)
    if p.weight is not None:
        dynamic = F.batch_norm(dynamic, None, None, p.weight, p.bias, True, 0., s.eps)
    else:
        dynamic = dynamic + p.bias.view(-1, 1, 1)
    dynamic = F.silu(dynamic)
    attn = F.conv2d(pool_contexts(dynamic, static), p.se_weight1, p.se_bias1)
    if p.se_norm_weight is not None:
        attn = F.batch_norm(attn, None, None, p.se_norm_weight, p.se_norm_bias, True, 0., s.se_eps)
    attn = F.conv2d(F.relu(attn), p.se_weight2, p.se_bias2)
    return mix_contexts(dynamic, static, attn, attn.shape[1] != static.shape[1])


def pool_contexts(dynamic: Tensor, static: Tensor) -> Tensor:
    """Mean over the pixels of the sum of both contexts: (B, C, H, W) twice -> (B, C, 1, 1)."""
    if torch.jit.is_scripting() or _is_exporting():  # one pool
        return (dynamic + static).mean((2, 3), keepdim=True)
    return dynamic.mean((2, 3), keepdim=True) + static.mean((2, 3), keepdim=True)


def mix_contexts(dynamic: Tensor, static: Tensor, attn: Tensor, paired: bool = True) -> Tensor:
    """Sum of both contexts, weighted in each channel by the softmax of its two logits.

    Args:
        dynamic: Dynamic context, (B, C, H, W).
        static: Static context, (B, C, H, W).
        attn: Logits, of dynamic and static in turn for each channel, (B, 2 * C, 1, 1); or if not paired by how much
            that of static is larger, (B, C, 1, 1).
        paired: Whether there are two logits for each channel.

    Returns:
        (B, C, H, W), in the dtype of dynamic.
    """
    B, C = dynamic.shape[0], dynamic.shape[1]
    static = static.to(dynamic.dtype)
    if not paired:
        return dynamic + (static - dynamic) * attn.sigmoid().to(dynamic.dtype)
    weights = attn.view(B, C, 2, 1).softmax(2).to(dynamic.dtype)
    if torch.jit.is_scripting() or _is_exporting():
        return static + (dynamic - static) * weights[:, :, :1]
    weights = weights.split(1, 2)  # (B, C, 1, 1) twice
    return dynamic * weights[0] + static * weights[1]


@torch.jit.unused
def _is_exporting() -> bool:
    return is_exporting()


def gradient_like(grad: Tensor, parameter: Tensor) -> Tensor:
    """grad in dtype and memory as a parameter is: distributed training compares strides, of single elements too."""
    if grad.dtype == parameter.dtype and grad.stride() == parameter.stride() and grad.shape == parameter.shape:
        return grad
    if grad.shape == parameter.shape and all(
            n == 1 or step == other for n, step, other in zip(grad.shape, grad.stride(), parameter.stride())):
        return grad.as_strided(parameter.shape, parameter.stride()).to(parameter.dtype)
    like = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device=grad.device)
    return like.copy_(grad)
