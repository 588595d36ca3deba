"""Filters of a CoT layer in training on a GPU as matrices: made in one launch, and their gradients brought back in one.

Convolutions of 1x1 are matrix products of rows, a pixel each. The convolution of two concatenated tensors is the sum of
two. Filters with groups become filters without, zeros between the groups, which takes less time in half precision.
"""
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..cot_layer import Parameters, Settings
from .launch import launch, repeated
from .walks import accumulator, kernels_of

_FEW = 16  # channels of a group, up to which cuDNN takes longer than for a convolution without groups
_BLOCK = 1024  # elements of a program


class Matrices(NamedTuple):
    """In the dtype that convolutions compute in, for C channels and N filter values a pixel, or their gradients."""
    key: Tensor  # filters of the key convolution, channels-last: (C, C / groups, k, k), or (C, C, k, k)
    of_query: Tensor  # (C / 2, C), what the first convolution of `embed` does to x
    of_key: Tensor  # (C / 2, C), and to the static context
    attn: Tensor  # (N, C / 2), its second convolution, tap by tap
    value: Tensor  # (C, C)


def is_dense(weight: Tensor, groups: int, dtype: torch.dtype) -> bool:
    """Whether filters with groups take less time without, zeros between the groups."""
    return groups > 1 and weight.shape[1] <= _FEW and dtype in (torch.bfloat16, torch.float16)


def key_groups(p: Parameters, s: Settings) -> int:
    """Groups of the key convolution with the filters of `Matrices`."""
    return 1 if is_dense(p.key, s.key_groups, s.dtype) else s.key_groups


def like_matrices(p: Parameters, s: Settings) -> Matrices:
    """Empty ones."""
    (C, part, *size), H, N = p.key.shape, p.first.shape[0], p.attn.shape[0]
    options = dict(dtype=s.dtype, device=p.key.device)
    channels = part * s.key_groups // key_groups(p, s)
    return Matrices(
        torch.empty((C, channels, *size), memory_format=torch.channels_last, **options),
        *(torch.empty(shape, **options) for shape in ((H, C), (H, C), (N, H), (C, C))))


def to_matrices(p: Parameters, s: Settings) -> Matrices:
    """The matrices of a layer's filters."""
    made = like_matrices(p, s)
    key, steps = _key(p.key)
    filters = (key, *[t.contiguous() for t in (p.first, p.attn, p.value)])
    sizes, programs = _sizes(p, s, steps, (True,) * 4)
    _to_matrices(*filters, *made, sizes=sizes, programs=programs)
    return made


@repeated()
def _to_matrices(*tensors: Tensor, sizes: Tuple[int, ...], programs: int) -> None:
    launch(kernels_of('matrices_kernels').to_matrices_kernel, (programs,), *tensors, *sizes,
           BLOCK=_BLOCK, ACC=accumulator(tensors[-1].dtype)[1])


def from_matrices(
        grads: Sequence[Optional[Tensor]],
        image_sums: Tensor,
        p: Parameters,
        s: Settings,
) -> Tuple[Tuple[Optional[Tensor], ...], Sequence[Tensor]]:
    """Gradients of a layer's filters, which lie like these, in their order; and sums over images.

    Args:
        grads: As `Matrices`; None: not needed.
        image_sums: (B, 3, N), summed up to three of (N).
        p: Parameters.
        s: Numbers.
    """
    N = image_sums.shape[2]
    needed = tuple([grads[i] is not None for i in (0, 1, 3, 4)])
    filters = [torch.empty_like(t) if need else None for need, t in zip(needed, (p.key, p.first, p.attn, p.value))]
    # where memory of filters is like no format, their gradients are made in one
    own, steps = (None, (0, 0)) if filters[0] is None else _key(filters[0])
    made = [own, *[None if t is None else t.contiguous() for t in filters[1:]]]
    sums = image_sums.new_empty(3, N)
    sizes, programs = _sizes(p, s, steps, needed)
    _from_matrices(image_sums, sums, *made, *grads, sizes=sizes, programs=programs)
    found = (None if t is None else t if t is other else t.copy_(other) for t, other in zip(filters, made))
    return tuple(found), sums.unbind()


@repeated()
def _from_matrices(
        image_sums: Tensor, sums: Tensor, *tensors: Optional[Tensor], sizes: Tuple[int, ...], programs: int) -> None:
    tensors = [sums if t is None else t for t in tensors]
    B, _, N = image_sums.shape
    launch(kernels_of('matrices_kernels').from_matrices_kernel, (programs + -(-3 * N // 16),),
           *tensors[:4], image_sums, sums, *tensors[4:], B, *sizes, BLOCK=_BLOCK, BLOCK_R=64, BLOCK_C=16,
           ACC=accumulator(image_sums.dtype)[1])


def _key(weight: Tensor) -> Tuple[Tensor, Tuple[int, int]]:
    """Filters that are dense in one of the two formats, and the steps from channel to channel and from tap to tap."""
    _, part, height, width = weight.shape
    if weight.is_contiguous(memory_format=torch.channels_last):
        return weight, (1, part)
    return weight.contiguous(), (height * width, 1)


def _sizes(p: Parameters, s: Settings, steps: Tuple[int, int], needed: Sequence[bool]) -> Tuple[Tuple[int, ...], int]:
    """What the kernels take as integers, and the number of programs that copy."""
    (C, part, height, width), H, N = p.key.shape, p.first.shape[0], p.attn.shape[0]
    dense = s.key_groups if key_groups(p, s) != s.key_groups else 1  # groups that the matrix does without
    elements = (C * part * dense * height * width, H * C, N * H, C * C)
    key, first, attn, value = programs = [-(-n // _BLOCK) if need else 0 for n, need in zip(elements, needed)]
    sizes = (C, H, N, s.contexts.groups, s.contexts.kernel_size ** 2, part, dense, height * width, *steps, *programs)
    return sizes, key + 2 * first + attn + value
