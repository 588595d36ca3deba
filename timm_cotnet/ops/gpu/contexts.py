"""All of a CoT layer behind its convolutions on a GPU, in Triton: in training and in inference, channels-last.

In training the norms of values and filters, the local convolution, its norm, SiLU, pooling and the mix of the contexts
go together. The backward keeps their three inputs and the local convolution's output, and computes the rest again,
where autograd would keep six tensors more.

Filters lie tap by tap, as `contexts_kernels.py` says; `tap_by_tap` brings those of a convolution into that order.
"""
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch_norm import Averages
from ..contexts import ContextsSettings
from ..cot_layer import TrainingParameters
from .images import channels_last
from .launch import (
    Walk, accumulator, image_rows, kernels_of, launch, more_threads, over_filters, over_halves, power_of_2)
from .norm import batch_norm_backward, batch_norm_table, table_of_moments

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
        logits: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor, s: ContextsSettings) -> Tuple[Tensor, Tensor]:
    """What the group norm does to each filter value of an image, and means: (B, 4, N) and (B, N)."""
    contexts_kernels, rows = kernels_of('contexts_kernels'), kernels_of('rows')
    (B, N), walk, (dtype, acc) = logits.shape[:2], image_rows(logits), accumulator(logits.dtype)
    conv_bias, weight, bias = conv_bias.contiguous(), weight.contiguous(), bias.contiguous()
    moments = logits.new_empty(B, walk.runs, 2, N, dtype=dtype)
    launch(rows.moments_kernel, walk.grid, logits, moments, *walk.rows, **walk.blocks, ACC=acc)
    table, means = moments.new_empty(B, 4, N), moments.new_empty(B, N)
    grid, sizes = _filter_tiles(B, s)
    launch(contexts_kernels.filter_norm_kernel, grid, moments, conv_bias, weight, bias, table, means, *walk.sizes,
           EPS=s.filter_eps, **sizes, ACC=acc)
    return table, means


def infer_filter_table(
        logits: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor, s: ContextsSettings) -> Tensor:
    """The first result of `filter_table`; of few small images, which one launch can do, only its first two rows."""
    statistics_kernels = kernels_of('statistics_kernels')
    B, N, H, W = logits.shape
    if H * W > _SMALL or B > _FEW:
        return filter_table(logits, conv_bias, weight, bias, s)[0]
    dtype, acc = accumulator(logits.dtype)
    grid, sizes = _filter_tiles(B, s)
    fitting = 2 ** (12 if dtype == torch.float64 else 13) // (sizes['BLOCK_T'] * sizes['BLOCK_G'])  # 32 for each thread
    block_p = max(1, min(32, power_of_2(H * W), fitting))
    table = logits.new_empty(B, 4, N, dtype=dtype)
    launch(statistics_kernels.filter_table_kernel, grid, logits, conv_bias.contiguous(), weight.contiguous(),
           bias.contiguous(), table, H * W, EPS=s.filter_eps, BLOCK_P=block_p, **sizes, ACC=acc, num_warps=8)
    return table


def infer_attention(pooled: Tensor, mixing: Mixing) -> Tensor:
    """Logits of the mix, (B, 2 * C or C), of contexts that are pooled over runs, (B, runs, C)."""
    mixing_kernels = kernels_of('mixing_kernels')
    (B, runs, C), hidden, acc = pooled.shape, len(mixing.bias1), accumulator(pooled.dtype)[1]
    weight1, bias1, table, weight2, bias2 = (t if t is None else t.contiguous() for t in mixing)
    logits = len(bias2)
    attn = pooled.new_empty(B, logits)
    length = logits if B > _FEW else 64  # few images leave some logits to other programs
    launch(mixing_kernels.attend_kernel, (B * -(-logits // length),), pooled, weight1, bias1,
           pooled if table is None else table, weight2, bias2, attn, runs, length,
           C=C, A=hidden, LOGITS=logits, NORMED=table is not None, BLOCK_A=power_of_2(hidden), BLOCK_C=32, ACC=acc, num_warps=8)
    return attn


def infer_contexts(
        value: Tensor,
        logits: Tensor,
        static: Tensor,
        filters: Tensor,
        value_table: Optional[Tensor],
        table: Tensor,
        mixing: Mixing,
        s: ContextsSettings,
) -> Tensor:
    """Output of a CoT layer without a gradient from the results of its convolutions: (B, C, H, W), channels-last.

    Args:
        value: Values, (B, C, H, W), like the next two dense in channels-last.
        logits: Filters before their norm and without the bias of their convolution, tap by tap, (B, N, H, W).
        static: Static context, (B, C, H, W).
        filters: What the group norm does to the filters, (B, 4, N), see `infer_filter_table`.
        value_table: Scale and shift of the values, (2, C); None: they are normed.
        table: Scale and shift of what is applied to the local convolution, (2, C), or where values are normed, what is
            added to it, (C).
        mixing: What makes the weights of the mix.
        s: Numbers.
    """
    kernels, mixing_kernels = kernels_of('contexts_kernels'), kernels_of('mixing_kernels')
    (B, C), walk, (dtype, acc) = value.shape[:2], _local_walk(value, s), accumulator(value.dtype)
    table = table.contiguous()
    dynamic, pooled = torch.empty_like(value), value.new_empty(B, walk.runs, C, dtype=dtype)
    _local(kernels.dynamic_context_kernel, walk, value, s, value, logits, static,
           table if value_table is None else value_table, filters, table, dynamic, pooled,
           NORMED=value_table is not None, **more_threads(value.element_size()))
    attn = infer_attention(pooled, mixing)
    walk = image_rows(value, sums=False)
    launch(mixing_kernels.mix_kernel, walk.grid, dynamic, static, attn, attn, dynamic, *walk.rows,
           DYNAMIC=True, PAIRED=attn.shape[1] != C, **walk.blocks, ACC=acc)  # in place
    return dynamic


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
    """`infer_contexts` as an operator of a graph, the norm of the filters included.

    Args, besides those of `infer_contexts`:
        filter_parameters: Bias of the convolution that makes the filters, weight and bias of their norm, (N) each.
    """
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
    with torch.cuda.device_of(value):
        filters = infer_filter_table(logits, *filter_parameters, s)
        mixing = Mixing(weight1, bias1, mixing_table, weight2, bias2)
        return infer_contexts(value, logits, static, filters, value_table, table, mixing, s)


@torch.library.register_fake('timm_cotnet::infer_contexts', lib=_LIBRARY)
def _(value, *args):
    return torch.empty_like(value, memory_format=torch.channels_last)


def train_forward(
        value: Tensor,
        logits: Tensor,
        static: Tensor,
        p: TrainingParameters,
        averages: Tuple[Averages, Averages, Averages],
        s: ContextsSettings,
) -> Tuple[Tensor, ...]:
    """Output of a CoT layer in training from the results of its convolutions, and what the backward needs.

    All tensors are dense, those of four dimensions in channels-last.

    Args:
        value: Values before their norm, (B, C, H, W), more than one of each channel, in float64, float32, bfloat16 or
            float16, like the next two.
        logits: Filters before their norm and without the bias of their convolution, tap by tap, (B, N, H, W).
        static: Static context, (B * H * W, C).
        p: Parameters, in any floating dtype.
        averages: Running statistics of the norms of value, local convolution and mixing, which are updated.
        s: Numbers.
    """
    kernels, mixing_kernels = kernels_of('contexts_kernels'), kernels_of('mixing_kernels')
    (B, C), walk, (dtype, acc) = value.shape[:2], image_rows(value), accumulator(value.dtype)
    value_table = batch_norm_table(value, p.value_weight, p.value_bias, averages[0], s.value_eps)
    filters, means = filter_table(logits, p.conv_bias, p.filter_weight, p.filter_bias, s)
    local_walk = _local_walk(value, s)
    local, moments = torch.empty_like(static), value.new_empty(B, local_walk.runs, 2, C, dtype=dtype)
    _local(kernels.local_conv_kernel, local_walk, value, s, value, logits, value_table, filters, local, moments)
    table = table_of_moments(moments, B, p.weight, p.bias, averages[1], s.eps, local_walk)
    pooled = moments.new_empty(B, walk.runs, C)
    launch(mixing_kernels.pool_kernel, walk.grid, local, static, table, pooled, *walk.rows,
           **walk.blocks, ACC=acc)
    attn, *hidden = _attend(pooled, p, averages[2], s.se_eps)
    mixed, walk = torch.empty_like(value), image_rows(value, sums=False)
    launch(mixing_kernels.mix_kernel, walk.grid, local, static, attn, table, mixed, *walk.rows,
           DYNAMIC=False, PAIRED=True, **walk.blocks, ACC=acc)
    return mixed, local, value_table, filters, means, table, attn, *hidden


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype; asks first, which takes less time than the conversion of what has it already."""
    return x if x.dtype == dtype else x.to(dtype)


def like_attention(pooled: Tensor, p: TrainingParameters) -> Tuple[Tensor, ...]:
    """Empty tensors that `_attend` fills for the backward; pooled, (B, ..., C), is in the dtype of tables."""
    (B, *_, C), (A,) = pooled.shape, p.se_bias1.shape
    return (pooled.new_empty((B, C), dtype=p.se_weight1.dtype), pooled.new_empty(B, A),
            pooled.new_empty((B, A), dtype=p.se_weight2.dtype), pooled.new_empty(A))


def _attend(pooled: Tensor, p: TrainingParameters, averages: Averages, eps: float) -> Tuple[Tensor, ...]:
    """Logits of the mix, (B, 2 * C), of contexts that are pooled over runs, and what the backward needs."""
    mixing_kernels = kernels_of('mixing_kernels')
    (B, runs, C), (A,) = pooled.shape, p.se_bias1.shape
    images, normed, hidden, x_scale = kept = like_attention(pooled, p)
    launch(mixing_kernels.train_attend_kernel, (A,),
           pooled, p.se_weight1, p.se_bias1, p.se_norm_weight, p.se_norm_bias, averages.mean, averages.var,
           averages.tracked, *kept, B, runs, C, A,
           EPS=eps, MOMENTUM=averages.momentum, BLOCK_R=128, BLOCK_C=32, ACC=accumulator(pooled.dtype)[1],
           num_warps=16)
    return F.linear(hidden, p.se_weight2.flatten(1), p.se_bias2), *kept


def _attend_backward(
        grad: Tensor,
        pooled: Tensor,
        normed: Tensor,
        hidden: Tensor,
        x_scale: Tensor,
        p: TrainingParameters,
) -> Tuple[Tensor, ...]:
    """Gradients of the pooled contexts and of the parameters but for the last one, which is a sum over images."""
    mixing_kernels = kernels_of('mixing_kernels')
    (B, C), (A,) = pooled.shape, x_scale.shape
    grad_x, grads = pooled.new_empty(B, A), normed.new_empty(3, A)
    launch(mixing_kernels.train_attend_backward_kernel, (A,),
           grad, p.se_weight2, hidden, normed, p.se_norm_weight, x_scale, grad_x, grads, B, C, A,
           BLOCK_R=128, BLOCK_C=64, ACC=accumulator(grad.dtype)[1], num_warps=16)
    grad_weight, grad_bias, grad_bias1 = grads.unbind()
    return (
        grad_x.mm(p.se_weight1.flatten(1)), grad_x.t().mm(pooled).view(p.se_weight1.shape), grad_bias1, grad_weight,
        grad_bias, _as(grad, hidden.dtype).t().mm(hidden).view(p.se_weight2.shape))


def train_backward(
        grad: Tensor,
        value: Tensor,
        logits: Tensor,
        static: Tensor,
        local: Tensor,
        value_table: Tensor,
        filters: Tensor,
        means: Tensor,
        table: Tensor,
        attn: Tensor,
        pooled: Tensor,
        normed: Tensor,
        hidden: Tensor,
        x_scale: Tensor,
        p: TrainingParameters,
        s: ContextsSettings,
) -> List[Tensor]:
    """Gradients of value, logits and static, of rows, and of the parameters.

    Those of the filters' norm and of the bias that is added to the filters come last, for each image: (B, 3, N).
    """
    kernels, mixing_kernels, rows = kernels_of('contexts_kernels'), kernels_of('mixing_kernels'), kernels_of('rows')
    (B, C, H, W), N, (dtype, acc) = value.shape, logits.shape[1], accumulator(value.dtype)
    walk, filter_walk = image_rows(value), image_rows(logits)

    run_sums = value.new_empty(B, walk.runs, 5, C, dtype=dtype)
    launch(mixing_kernels.mix_sums_kernel, walk.grid, grad, local, static, table, run_sums, *walk.rows,
           **walk.blocks, ACC=acc)
    sums, grad_attn = run_sums.new_empty(B, 4, C), run_sums.new_empty(B, 2 * C)
    launch(mixing_kernels.attn_grad_kernel, (B * -(-C // 64),), run_sums, attn, sums, grad_attn, walk.runs, C,
           BLOCK_C=64, ACC=acc)
    grad_pooled, *se_grads = _attend_backward(grad_attn, pooled, normed, hidden, x_scale, p)

    factors = table.new_empty(7, C)
    launch(mixing_kernels.mixed_norm_backward_kernel, (-(-C // 8),),
           sums, attn, grad_attn, grad_pooled, p.weight, table, factors, B, H * W, C,
           BLOCK_R=128, BLOCK_C=8, ACC=acc)
    _, grad_weight, grad_bias, grad_bias2 = factors.view(-1).split([3 * C, C, C, 2 * C])
    walk, grad_static, grad_local = image_rows(value, sums=False), torch.empty_like(static), torch.empty_like(local)
    launch(mixing_kernels.mix_backward_kernel, walk.grid,
           grad, local, attn, grad_pooled, table, factors, grad_static, grad_local, *walk.rows,
           **walk.blocks, ACC=acc)

    local_walk = _local_walk(value, s)
    grad_value, sums = torch.empty_like(local), sums.new_empty(B, local_walk.runs, 2, C)
    _local(kernels.value_grad_kernel, local_walk, value, s,
           grad_local, logits, value, value_table, filters, grad_value, sums, **more_threads(value.element_size()))
    factors, value_grads = batch_norm_backward(sums, p.value_weight, value_table, local_walk, B)
    launch(rows.norm_backward_kernel, walk.grid, grad_value, value, value, factors, grad_value, value, *walk.rows,
           FACTOR_ROWS=0, RELU=False, RESIDUAL=False, **walk.blocks, ACC=acc)

    grad_logits = logits.new_empty(B * H * W, N)
    _local(kernels.filter_grad_kernel, over_filters(B, H * W, C, s.num_filters, s.groups, value.element_size()),
           value, s, grad_local, value, value_table, grad_logits)
    sums = sums.new_empty(B, filter_walk.runs, 2, N)
    launch(rows.grad_sums_kernel, filter_walk.grid, grad_logits, logits, logits, filters, sums, *filter_walk.rows,
           TABLE_ROWS=4, RELU=False, **filter_walk.blocks, ACC=acc)
    factors, filter_grads = sums.new_empty(B, 3, N), sums.new_empty(B, 3, N)
    grid, sizes = _filter_tiles(B, s)
    launch(kernels.filter_norm_backward_kernel, grid,
           sums, p.filter_weight, filters, means, factors, filter_grads, H * W, filter_walk.runs, **sizes, ACC=acc)
    filter_walk = image_rows(logits, sums=False)
    launch(rows.norm_backward_kernel, filter_walk.grid,
           grad_logits, logits, logits, factors, grad_logits, logits, *filter_walk.rows,
           FACTOR_ROWS=3, RELU=False, RESIDUAL=False, **filter_walk.blocks, ACC=acc)
    return [grad_value, grad_logits, grad_static, *value_grads, grad_weight, grad_bias, *se_grads, grad_bias2,
            filter_grads]
