"""The 1x1 convolutions of a folded CoT layer as one kernel, in bfloat16 on processors with AVX-512 BF16.

Three of the four are so narrow in the early stages that calls and memory take longer than products. With AMX, oneDNN is
faster than this could be.
"""
import ctypes
from typing import Optional, Tuple

import torch
from torch import Tensor

from .native import load

_SOURCE = 'pointwise.c'
_WIDTH, _PIXELS = 32, 128  # of pointwise.c


def why_not_pointwise(x: Tensor, *parameters: Tensor) -> Optional[str]:
    """The reason why `pointwise` cannot take x and filters and biases here and now; None if it can."""
    if x.dtype != torch.bfloat16 or any(p.dtype != torch.bfloat16 or not p.is_contiguous() for p in parameters):
        return 'the tensors are not contiguous bfloat16'
    if any(p.is_inference() for p in parameters):
        return 'filters made in inference mode have no version that would tell when they change'
    if x.shape[1] % 4 != 0:
        return f'half of {x.shape[1]} channels are no pairs'
    library = load(torch.bfloat16, _SOURCE)
    if isinstance(library, str):
        return library
    return None if library.has_pointwise() else 'the processor has no AVX-512 BF16, or has AMX'


def pack_pairs(weight: Tensor) -> Tensor:
    """Filters in the form that `pointwise` takes: panels of 32 outputs, (C_in // 2, 32, 2) each.

    Args:
        weight: (C_out, C_in, 1, 1), an even C_in.
    """
    weight = weight.flatten(1)
    weight = torch.nn.functional.pad(weight, (0, 0, 0, -weight.shape[0] % _WIDTH))
    return weight.view(-1, _WIDTH, weight.shape[1] // 2, 2).transpose(1, 2).contiguous()


def pointwise(
        x: Tensor,
        static: Tensor,
        query: Tensor,
        query_bias: Tensor,
        key: Tensor,
        attn: Tensor,
        attn_bias: Tensor,
        value: Tensor,
        value_bias: Tensor,
) -> Tuple[Tensor, Tensor]:
    """Filters before their norm and values of a CoT layer, where `why_not_pointwise` is None.

    `conv(relu(conv(x, query, query_bias) + conv(static, key)), attn, attn_bias)` and `conv(x, value, value_bias)`.

    Args:
        x: (B, C, H, W), channels-last.
        static: Static context, like x.
        query: Filters from `pack_pairs`, as the other weights.
        query_bias: (C // 2).
        key: Filters of the same number.
        attn: Filters from C // 2 channels to N.
        attn_bias: (N).
        value: Filters from C channels to C.
        value_bias: (C).
    """
    (B, C, H, W), hidden, threads = x.shape, query_bias.numel(), torch.get_num_threads()
    x, static = (t.contiguous(memory_format=torch.channels_last) for t in (x, static))
    logits = x.new_empty(B, H, W, attn_bias.numel()).permute(0, 3, 1, 2)
    values = torch.empty_like(x)
    scratch = x.new_empty(threads, _PIXELS * hidden)
    load(torch.bfloat16, _SOURCE).pointwise(
        *map(ctypes.c_long, (B * H * W, C, hidden, attn_bias.numel())),
        *(ctypes.c_void_p(t.data_ptr()) for t in (
            x, static, query, query_bias, key, attn, attn_bias, value, value_bias, logits, values, scratch)),
        ctypes.c_int(threads))
    return logits, values
