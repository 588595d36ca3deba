"""All of a CoT layer behind its convolutions on a GPU, in Triton: in training and in inference, channels-last.

In training the norms of values and filters, the local convolution, its norm, SiLU, pooling and the mix of the contexts
go together. The backward keeps their three inputs and the local convolution's output, and computes the rest again,
where autograd would keep six tensors more.

Filters lie tap by tap, as `contexts_kernels.py` says; `tap_by_tap` brings those of a convolution into that order.
"""
import math
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..batch_norm import Averages
from ..contexts import ContextsSettings
from ..cot_layer import TrainingParameters
from .images import channels_last
from .launch import launch, made, repeated
from .norm import batch_norm_backward, batch_norm_table, table_of_moments
from .walks import (
    Walk, accumulator, image_rows, kernels_of, more_threads, over_filters, over_halves, power_of_2)

_SMALL = 256  # pixels of an image, through which one program walks in little time
_FEW = 32  # images, for which a launch costs more than what programs compute twice or one after the other


class Mixing(NamedTuple):
    """Two 1x1 convolutions that make the weights of the mix for inference, and scale and shift between them."""
    weight1: Tensor  # (A, C, 1, 1)
    bias1: Tensor
    table: Optional[Tensor]  # (2, A); None: no norm
    weight2: Tensor  # (2 * C, A, 1, 1), or (C, A, 1, 1) for the difference of the two logits of a channel
    bias2: Tensor


def tap_by_tap(x: Tensor, kernel_size: int, groups: int) -> Tensor:
    """Filter values (the first dimension, N) that lie filter by filter, brought into the order of the kernels."""
    return x.unflatten(0, (groups, -1, kernel_size ** 2)).transpose(1, 2).flatten(0, 2)


def _local_walk(value: Tensor, s: ContextsSettings) -> Walk:
    """How the kernels of the local convolution share out its work."""
    B, C, H, W = value.shape
    return over_halves(B, H * W, C, s.num_filters, s.groups, value.element_size())


def _local(kernel, walk: Walk, value: Tensor, s: ContextsSettings, *args: Tensor, **flags: bool) -> None:
    """Launch a kernel of the local convolution."""
    _, C, H, W = value.shape
    pixels, length, runs = walk.sizes
    launch(kernel, walk.grid, *args, pixels, H, W, length, runs, s.dilation,
           C=C, GROUPS=s.groups, GS=s.num_filters // s.groups, K=s.kernel_size, **flags, **walk.blocks,
           ACC=accumulator(value.dtype)[1])


def _filter_tiles(B: int, s: ContextsSettings) -> Tuple[Tuple[int], dict]:
    """Grid and sizes of the kernels whose programs have all taps of some filters of an image."""
    filters, taps = s.num_filters // s.groups, s.kernel_size ** 2
    block_g = min(power_of_2(filters), 16)
    return (B * s.groups * -(-filters // block_g),), dict(
        GROUPS=s.groups, GS=filters, TAPS=taps, BLOCK_T=power_of_2(taps), BLOCK_G=block_g)


def filter_table(
        logits: Tensor,
        conv_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        s: ContextsSettings,
        table: Tensor,
        means: Tensor,
) -> None:
    """Fill in what the group norm does to each filter value of an image, (B, 4, N), and means, (B, N)."""
    contexts_kernels, rows = kernels_of('contexts_kernels'), kernels_of('rows')
    (B, N), walk, (dtype, acc) = logits.shape[:2], image_rows(logits), accumulator(logits.dtype)
    moments = made(logits.new_empty(B, walk.runs, 2, N, dtype=dtype))
    launch(rows.moments_kernel, walk.grid, logits, moments, *walk.rows, **walk.blocks, ACC=acc)
    grid, sizes = _filter_tiles(B, s)
    launch(contexts_kernels.filter_norm_kernel, grid, moments, conv_bias, weight, bias, table, means, *walk.sizes,
           EPS=s.filter_eps, **sizes, ACC=acc)


def infer_filter_table(
        logits: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor, s: ContextsSettings) -> Tensor:
    """The table of `filter_table`; of few small images, which one launch can do, only its first two rows."""
    statistics_kernels = kernels_of('statistics_kernels')
    B, N, H, W = logits.shape
    dtype, acc = accumulator(logits.dtype)
    table = made(logits.new_empty(B, 4, N, dtype=dtype))
    if H * W > _SMALL or B > _FEW:
        filter_table(logits, conv_bias, weight, bias, s, table, made(table.new_empty(B, N)))
        return table
    grid, sizes = _filter_tiles(B, s)
    fitting = 2 ** (12 if dtype == torch.float64 else 13) // (sizes['BLOCK_T'] * sizes['BLOCK_G'])  # 32 for each thread
    block_p = max(1, min(32, power_of_2(H * W), fitting))
    launch(statistics_kernels.filter_table_kernel, grid, logits, conv_bias, weight, bias, table, H * W,
           EPS=s.filter_eps, BLOCK_P=block_p, **sizes, ACC=acc, num_warps=8)
    return table


def infer_attention(pooled: Tensor, mixing: Mixing) -> Tensor:
    """Logits of the mix, (B, 2 * C or C), of contexts that are pooled over runs, (B, runs, C)."""
    mixing_kernels = kernels_of('mixing_kernels')
    (B, runs, C), hidden, acc = pooled.shape, len(mixing.bias1), accumulator(pooled.dtype)[1]
    weight1, bias1, table, weight2, bias2 = mixing
    logits = len(bias2)
    attn = made(pooled.new_empty(B, logits))
    length = logits if B > _FEW else 64  # few images leave some logits to other programs
    launch(mixing_kernels.attend_kernel, (B * -(-logits // length),), pooled, weight1, bias1,
           pooled if table is None else table, weight2, bias2, attn, runs, length,
           C=C, A=hidden, LOGITS=logits, NORMED=table is not None, BLOCK_A=power_of_2(hidden), BLOCK_C=32, ACC=acc,
           num_warps=8)
    return attn


@repeated(0, 1, 9, 12)
def infer_contexts(
        value: Tensor,
        logits: Tensor,
        static: Tensor,
        conv_bias: Tensor,
        filter_weight: Tensor,
        filter_bias: Tensor,
        value_table: Optional[Tensor],
        table: Tensor,
        *mixing: Optional[Tensor],
        s: ContextsSettings,
) -> Tensor:
    """Output of a CoT layer without a gradient from the results of its convolutions: (B, C, H, W), channels-last.

    Args:
        value: Values, (B, C, H, W), like the next two dense in channels-last.
        logits: Filters before their norm and without the bias of their convolution, tap by tap, (B, N, H, W).
        static: Static context, (B, C, H, W).
        conv_bias: Bias of the convolution that makes the filters, filter by filter, (N), like the next two.
        filter_weight: Of the norm of the filters.
        filter_bias: Of the norm of the filters.
        value_table: Scale and shift of the values, (2, C); None: they are normed.
        table: Scale and shift of what is applied to the local convolution, (2, C), or where values are normed, what is
            added to it, (C).
        *mixing: `Mixing`.
        s: Numbers.
    """
    kernels, mixing_kernels = kernels_of('contexts_kernels'), kernels_of('mixing_kernels')
    (B, C), walk, (dtype, acc) = value.shape[:2], _local_walk(value, s), accumulator(value.dtype)
    filters = infer_filter_table(logits, conv_bias, filter_weight, filter_bias, s)
    dynamic, pooled = made(torch.empty_like(value)), made(value.new_empty(B, walk.runs, C, dtype=dtype))
    _local(kernels.dynamic_context_kernel, walk, value, s, value, logits, static,
           table if value_table is None else value_table, filters, table, dynamic, pooled,
           NORMED=value_table is not None, **more_threads(value.element_size()))
    attn = infer_attention(pooled, Mixing(*mixing))
    walk = image_rows(value, sums=False)
    launch(mixing_kernels.mix_kernel, walk.grid, dynamic, static, attn, attn, dynamic, *walk.rows,
           DYNAMIC=True, PAIRED=attn.shape[1] != C, **walk.blocks, ACC=acc)  # in place
    return dynamic


def dense_arguments(
        filter_parameters: Sequence[Tensor],
        value_table: Optional[Tensor],
        table: Tensor,
        mixing: Sequence[Optional[Tensor]],
) -> List[Optional[Tensor]]:
    """Those of `infer_contexts` but for its images; dense."""
    return [t if t is None else t.contiguous() for t in (*filter_parameters, value_table, table, *mixing)]


def compiled_contexts(
        value: Tensor,
        logits: Tensor,
        static: Tensor,
        filter_parameters: Sequence[Tensor],
        value_table: Optional[Tensor],
        table: Tensor,
        mixing: Mixing,
        s: ContextsSettings,
) -> Tensor:
    """`infer_contexts` as an operator of a graph; filter_parameters are conv_bias, filter_weight and filter_bias."""
    return torch.ops.timm_cotnet.infer_contexts(
        value, logits, static, list(filter_parameters), value_table, table, *mixing, s.kernel_size, s.dilation,
        s.groups, s.num_filters, s.filter_eps)


# without what `torch.library.custom_op` does around each call, which takes longer than the kernels
_LIBRARY = torch._library.custom_ops.get_library_allowing_overwrite('timm_cotnet', 'infer_contexts')
_LIBRARY.define(
    'infer_contexts(Tensor value, Tensor logits, Tensor static, Tensor[] filter_parameters, Tensor? value_table, '
    'Tensor table, Tensor weight1, Tensor bias1, Tensor? mixing_table, Tensor weight2, Tensor bias2, int kernel_size, '
    'int dilation, int groups, int num_filters, float filter_eps) -> Tensor', tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(_LIBRARY, 'infer_contexts', 'CompositeExplicitAutograd')
def _(value, logits, static, filter_parameters, value_table, table, weight1, bias1, mixing_table, weight2, bias2,
      *numbers):
    s = ContextsSettings(*numbers[:4], filter_eps=numbers[4])
    value, logits, static = map(channels_last, (value, logits, static))
    mixing = weight1, bias1, mixing_table, weight2, bias2
    with torch.cuda.device_of(value):
        return infer_contexts(
            value, logits, static, *dense_arguments(filter_parameters, value_table, table, mixing), s=s)


@torch.library.register_fake('timm_cotnet::infer_contexts', lib=_LIBRARY)
def _(value, *args):
    return torch.empty_like(value, memory_format=torch.channels_last)


class Tables(NamedTuple):
    """What the backward of a layer in training needs besides images, in an accumulator's dtype; A hidden channels."""
    value: Tensor  # (4, C), of the norm of the values
    filters: Tensor  # (B, 4, N), of that of the filters
    norm: Tensor  # (4, C), of that behind the local convolution
    attn: Tensor  # (B, 2 * C), logits of the mix
    pooled: Tensor  # (B, C)
    normed: Tensor  # (B, A), what the norm of the mixing gives without weight and bias
    hidden: Tensor  # (B, A), what the second convolution of the mixing gets
    x_scale: Tensor  # (A), 1 / sqrt(var + eps) of that norm
    means: Tensor  # (B, N), of the filters


def like_tables(value: Tensor, N: int, A: int) -> Tensor:
    """Memory for `Tables`, in one row."""
    B, C = value.shape[:2]
    size = sum(math.prod(shape) for shape in _table_shapes(B, C, N, A))
    return value.new_empty(size, dtype=accumulator(value.dtype)[0])


def split_tables(memory: Tensor, B: int, C: int, N: int, A: int) -> Tables:
    """Of what `like_tables` gives."""
    shapes = _table_shapes(B, C, N, A)
    return Tables(*(t.view(shape) for t, shape in zip(memory.split([math.prod(shape) for shape in shapes]), shapes)))


def _table_shapes(B: int, C: int, N: int, A: int) -> List[Tuple[int, ...]]:
    """The last is the one whose size may be odd, as launches want tensors at multiples of 16 bytes."""
    return [(4, C), (B, 4, N), (4, C), (B, 2 * C), (B, C), (B, A), (B, A), (A,), (B, N)]


def _compile_backward(results: Tuple[Tensor, ...], *args: Tensor, s: ContextsSettings, **_) -> None:
    (mixed, local, tables), (value, logits, static), p = results, args[:3], TrainingParameters(*args[3:16])
    train_backward.compile_ahead(
        mixed, value, logits, static, local, tables, p.value_weight, p.filter_weight, p.weight, p.se_weight1,
        p.se_norm_weight, p.se_weight2, s=s)


@repeated(0, 1, 11, ahead=_compile_backward)
def train_forward(
        value: Tensor,
        logits: Tensor,
        static: Tensor,
        value_weight: Tensor,
        value_bias: Tensor,
        conv_bias: Tensor,
        filter_weight: Tensor,
        filter_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        se_weight1: Tensor,
        se_bias1: Tensor,
        se_norm_weight: Tensor,
        se_norm_bias: Tensor,
        se_weight2: Tensor,
        se_bias2: Tensor,
        *averages: Tensor,
        momenta: Tuple[float, float, float],
        s: ContextsSettings,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Output of a CoT layer in training from the results of its convolutions, the local convolution's, and `Tables`.

    All tensors are dense, those of four dimensions in channels-last.

    Args:
        value: Values before their norm, (B, C, H, W), more than one of each channel, in float64, float32, bfloat16 or
            float16, like the next two.
        logits: Filters before their norm and without the bias of their convolution, tap by tap, (B, N, H, W).
        static: Static context, (B * H * W, C).
        value_weight: The first of `TrainingParameters`, to se_bias2; in any floating dtype.
        *averages: Mean, variance and count of the norms of values, local convolution and mixing, which are updated.
        momenta: Of these norms.
        s: Numbers.
    """
    kernels, mixing_kernels = kernels_of('contexts_kernels'), kernels_of('mixing_kernels')
    (B, C), N, A, walk = value.shape[:2], logits.shape[1], len(se_bias1), image_rows(value)
    dtype, acc = accumulator(value.dtype)
    value_norm, norm, se_norm = (Averages(*averages[3 * i:3 * i + 3], momentum) for i, momentum in enumerate(momenta))
    memory = made(like_tables(value, N, A))
    t = split_tables(memory, B, C, N, A)
    batch_norm_table(value, value_weight, value_bias, value_norm, s.value_eps, t.value)
    filter_table(logits, conv_bias, filter_weight, filter_bias, s, t.filters, t.means)
    local_walk = _local_walk(value, s)
    local, moments = made(torch.empty_like(static)), made(value.new_empty(B, local_walk.runs, 2, C, dtype=dtype))
    _local(kernels.local_conv_kernel, local_walk, value, s, value, logits, t.value, t.filters, local, moments)
    table_of_moments(moments, B, weight, bias, norm, s.eps, local_walk, t.norm)
    run_sums = made(moments.new_empty(B, walk.runs, C))
    launch(mixing_kernels.pool_kernel, walk.grid, local, static, t.norm, run_sums, *walk.rows,
           **walk.blocks, ACC=acc)
    attend(run_sums, (se_weight1, se_bias1, se_norm_weight, se_norm_bias, se_weight2, se_bias2), se_norm, s.se_eps, t)
    mixed, walk = made(torch.empty_like(value)), image_rows(value, sums=False)
    launch(mixing_kernels.mix_kernel, walk.grid, local, static, t.attn, t.norm, mixed, *walk.rows,
           DYNAMIC=False, PAIRED=True, **walk.blocks, ACC=acc)
    return mixed, local, memory


def attend(run_sums: Tensor, parameters: Sequence[Tensor], averages: Averages, eps: float, t: Tables) -> None:
    """Fill in the logits of the mix, of contexts that are pooled over runs, (B, runs, C), and what the backward needs.

    The parameters are those of both convolutions and of the norm, in the order of `TrainingParameters`.
    """
    (B, runs, C), A, acc = run_sums.shape, len(t.x_scale), accumulator(run_sums.dtype)[1]
    *first, weight2, bias2 = parameters
    launch(kernels_of('mixing_kernels').train_attend_kernel, (A,), run_sums, *first, *averages[:3],
           t.pooled, t.normed, t.hidden, t.x_scale, B, runs, C, A,
           EPS=eps, MOMENTUM=averages.momentum, BLOCK_R=128, BLOCK_C=32, ACC=acc, num_warps=16)
    _product(t.hidden, weight2, t.attn, (A, 1), (A, 1), A, bias2)


def _product(
        x: Tensor,
        y: Tensor,
        out: Tensor,
        x_steps: Tuple[int, int],
        y_steps: Tuple[int, int],
        length: int,
        bias: Optional[Tensor] = None,
) -> None:
    """out = x @ y^T + bias, (M, N), for x (M, length) and y (N, length) of these steps in memory."""
    (M, N), acc = out.shape, accumulator(out.dtype)[1]
    block = 16 if out.dtype == torch.float64 else 32
    launch(kernels_of('products_kernels').product_kernel, (-(-M // block) * -(-N // block),),
           x, y, x if bias is None else bias, out, M, N, length, *x_steps, *y_steps, int(bias is not None),
           BLOCK=block, ACC=acc, num_warps=8)


class Grads(NamedTuple):
    """Gradients of parameters behind the convolutions, and what makes those of images; in an accumulator's dtype."""
    value_factors: Tensor  # see `store_backward_factors`, which also gives the next two
    value_weight: Tensor
    value_bias: Tensor
    factors: Tensor
    weight: Tensor
    bias: Tensor
    se_bias2: Tensor
    se_norm_weight: Tensor
    se_norm_bias: Tensor
    se_bias1: Tensor
    se_weight1: Tensor
    se_weight2: Tensor


def grads_like(tables: Tensor, C: int, A: int) -> Tensor:
    """Memory for `Grads`, in one row."""
    return tables.new_empty(sum(_grad_sizes(C, A)))


def split_grads(memory: Tensor, C: int, A: int) -> Grads:
    """Of what `grads_like` gives."""
    return Grads(*memory.split(_grad_sizes(C, A)))


def _grad_sizes(C: int, A: int) -> List[int]:
    return [3 * C, C, C, 3 * C, C, C, 2 * C, A, A, A, A * C, 2 * C * A]


def attend_backward(
        grad: Tensor, weight1: Tensor, norm_weight: Tensor, weight2: Tensor, t: Tables, g: Grads) -> Tensor:
    """Gradient of the pooled contexts, (B, C), from that of the logits; fills in those of parameters but for bias2."""
    (B, C), A, acc = t.pooled.shape, len(t.x_scale), accumulator(grad.dtype)[1]
    grad_hidden, grad_pooled = made(grad.new_empty(B, A)), made(grad.new_empty(B, C))
    launch(kernels_of('mixing_kernels').train_attend_backward_kernel, (A,),
           grad, weight2, t.hidden, t.normed, norm_weight, t.x_scale, grad_hidden, g.se_norm_weight, B, C, A,
           BLOCK_R=128, BLOCK_C=64, ACC=acc, num_warps=16)
    _product(grad_hidden, weight1, grad_pooled, (A, 1), (1, C), A)
    _product(grad_hidden, t.pooled, g.se_weight1.view(A, C), (1, A), (1, C), B)
    _product(grad, t.hidden, g.se_weight2.view(2 * C, A), (1, 2 * C), (1, A), B)
    return grad_pooled


@repeated(1, 2, 11)
def train_backward(
        grad: Tensor,
        value: Tensor,
        logits: Tensor,
        static: Tensor,
        local: Tensor,
        tables: Tensor,
        value_weight: Tensor,
        filter_weight: Tensor,
        weight: Tensor,
        se_weight1: Tensor,
        se_norm_weight: Tensor,
        se_weight2: Tensor,
        *,
        s: ContextsSettings,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of value, logits and static, of rows; of parameters, see `split_grads`; and of others for each image.

    These are those of weight and bias of the filters' norm and of the bias that is added to the filters: (B, 3, N).
    """
    kernels, mixing_kernels, rows = kernels_of('contexts_kernels'), kernels_of('mixing_kernels'), kernels_of('rows')
    (B, C, H, W), N, (dtype, acc) = value.shape, logits.shape[1], accumulator(value.dtype)
    A = len(se_norm_weight)
    walk, filter_walk = image_rows(value), image_rows(logits)
    t = split_tables(tables, B, C, N, A)
    memory = made(grads_like(tables, C, A))
    g = split_grads(memory, C, A)

    run_sums = made(value.new_empty(B, walk.runs, 5, C, dtype=dtype))
    launch(mixing_kernels.mix_sums_kernel, walk.grid, grad, local, static, t.norm, run_sums, *walk.rows,
           **walk.blocks, ACC=acc)
    sums, grad_attn = made(run_sums.new_empty(B, 4, C)), made(run_sums.new_empty(B, 2 * C))
    launch(mixing_kernels.attn_grad_kernel, (B * -(-C // 64),), run_sums, t.attn, sums, grad_attn, walk.runs, C,
           BLOCK_C=64, ACC=acc)
    grad_pooled = attend_backward(grad_attn, se_weight1, se_norm_weight, se_weight2, t, g)

    launch(mixing_kernels.mixed_norm_backward_kernel, (-(-C // 8),),
           sums, t.attn, grad_attn, grad_pooled, weight, t.norm, g.factors, B, H * W, C,
           BLOCK_R=128, BLOCK_C=8, ACC=acc)
    walk = image_rows(value, sums=False)
    grad_static, grad_local = made(torch.empty_like(static)), made(torch.empty_like(local))
    launch(mixing_kernels.mix_backward_kernel, walk.grid,
           grad, local, t.attn, grad_pooled, t.norm, g.factors, grad_static, grad_local, *walk.rows,
           **walk.blocks, ACC=acc)

    local_walk = _local_walk(value, s)
    grad_value, sums = made(torch.empty_like(local)), made(sums.new_empty(B, local_walk.runs, 2, C))
    _local(kernels.value_grad_kernel, local_walk, value, s,
           grad_local, logits, value, t.value, t.filters, grad_value, sums, **more_threads(value.element_size()))
    batch_norm_backward(sums, value_weight, t.value, g.value_factors, local_walk, B)
    launch(rows.norm_backward_kernel, walk.grid, grad_value, value, t.value, g.value_factors, grad_value, *walk.rows,
           FACTOR_ROWS=0, RELU=False, **walk.blocks, ACC=acc)

    grad_logits = made(logits.new_empty(B * H * W, N))
    _local(kernels.filter_grad_kernel, over_filters(B, H * W, C, s.num_filters, s.groups, value.element_size()),
           value, s, grad_local, value, t.value, grad_logits)
    sums = made(sums.new_empty(B, filter_walk.runs, 2, N))
    launch(rows.grad_sums_kernel, filter_walk.grid,
           grad_logits, logits, logits, t.filters, grad_logits, sums, *filter_walk.rows,
           TABLE_ROWS=4, RELU=False, RESIDUAL=False, **filter_walk.blocks, ACC=acc)
    factors, filter_grads = made(sums.new_empty(B, 3, N)), made(sums.new_empty(B, 3, N))
    grid, sizes = _filter_tiles(B, s)
    launch(kernels.filter_norm_backward_kernel, grid,
           sums, filter_weight, t.filters, t.means, factors, filter_grads, H * W, filter_walk.runs, **sizes, ACC=acc)
    filter_walk = image_rows(logits, sums=False)
    launch(rows.norm_backward_kernel, filter_walk.grid,
           grad_logits, logits, t.filters, factors, grad_logits, *filter_walk.rows,
           FACTOR_ROWS=3, RELU=False, **filter_walk.blocks, ACC=acc)
    return grad_value, grad_logits, grad_static, memory, filter_grads
