"""Batch norm in training with what follows it in the same pass, in Triton: a sum with a residual, ReLU."""
from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from ..batch_norm import Averages, averages_of, batch_norm_act
from ..contexts import gradient_like
from ..watch import untraced, wants_plain
from .launch import launch, made, repeated
from .walks import Walk, accumulator, all_rows, kernels_of


def norm_act(x: Tensor, norm: nn.BatchNorm2d, relu: bool = True, residual: Optional[Tensor] = None) -> Tensor:
    """`relu(norm(x) + residual)` with the statistics of the batch, (B, C, H, W) -> (B, C, H, W), channels-last."""
    parameters = norm._parameters
    x, residual = alike(x, residual)  # out here, so that a second derivative knows where they come from
    return NormAct.apply(x, residual, parameters['weight'], parameters['bias'], averages_of(norm), norm.eps, relu)


def alike(x: Tensor, residual: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
    """Both channels-last, in the dtype of x."""
    if residual is not None:
        residual = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last), residual


def norm_act_eval(x: Tensor, norm: nn.BatchNorm2d, relu: bool = True, residual: Optional[Tensor] = None) -> Tensor:
    """`norm_act` with the running statistics and without a gradient."""
    return _norm_act_eval(
        *alike(x, residual), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps, relu=relu)


@repeated()
def _norm_act_eval(
        x: Tensor,
        residual: Optional[Tensor],
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        eps: float,
        relu: bool,
) -> Tensor:
    rows, C, (dtype, acc) = kernels_of('rows'), x.shape[1], accumulator(x.dtype)
    table = made(torch.empty(2, C, dtype=dtype, device=x.device))
    launch(rows.running_norm_kernel, (-(-C // 128),), mean, var, weight, bias, table, C=C, EPS=eps, BLOCK_C=128,
           ACC=acc)
    return norm_again(x, residual, table, relu=relu)


def _compile_backward(results: Tuple[Tensor, Tensor], x: Tensor, residual: Optional[Tensor], weight: Tensor, *_: Tensor,
                      relu: bool = True, **__) -> None:
    out, table = results
    norm_backward.compile_ahead(out, x, None if residual is None or not relu else out, weight, table, relu=relu)


@repeated(ahead=_compile_backward)
def norm_forward(
        x: Tensor,
        residual: Optional[Tensor],
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        tracked: Tensor,
        *,
        momentum: float,
        eps: float,
        relu: bool = True,
        shape: Optional[Tuple[int, ...]] = None,
) -> Tuple[Tensor, Tensor]:
    """`norm_act` of dense tensors, and what its backward needs, (4, C); mean to momentum are `Averages`, see there."""
    table = batch_norm_table(x, weight, bias, Averages(mean, var, tracked, momentum), eps)
    return norm_again(x, residual, table, relu=relu, shape=shape), table


@repeated()
def norm_again(
        x: Tensor,
        residual: Optional[Tensor],
        table: Tensor,
        *,
        relu: bool = True,
        shape: Optional[Tuple[int, ...]] = None,
) -> Tensor:
    """The first result of `norm_forward` from its second: cheaper to compute twice than to keep for a backward.

    Of rows of channels, it is rows, or an image of this shape.
    """
    rows, walk = kernels_of('rows'), all_rows(x, sums=False)
    out = made(torch.empty_like(x) if shape is None else torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last))
    launch(rows.norm_act_kernel, walk.grid, x, x if residual is None else residual, table, out, *walk.rows,
           RESIDUAL=residual is not None, RELU=relu, **walk.blocks, ACC=accumulator(x.dtype)[1])
    return out


@repeated(0, 1)
def norm_backward(
        grad: Tensor,
        x: Tensor,
        out: Optional[Tensor],
        weight: Tensor,
        table: Tensor,
        *,
        relu: bool = True,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the residual (grad unless they differ), and of weight and bias, see `norm_grads`.

    out is what ReLU put out, where it is behind a sum with a residual; else None. All are dense.
    """
    rows = kernels_of('rows')
    C, (dtype, acc), walk, is_sum = x.shape[1], accumulator(x.dtype), all_rows(x, 4), out is not None
    sums, passed = made(x.new_empty(walk.runs, 2, C, dtype=dtype)), made(torch.empty_like(grad)) if is_sum else grad
    launch(rows.grad_sums_kernel, walk.grid, grad, x, out if is_sum else x, table, passed, sums, *walk.rows,
           TABLE_ROWS=0, RELU=relu, RESIDUAL=is_sum, **walk.blocks, ACC=acc)
    factors = made(table.new_empty(5, C))
    batch_norm_backward(sums, weight, table, factors, walk)
    grad_x, walk = made(torch.empty_like(x)), all_rows(x, sums=False)
    launch(rows.norm_backward_kernel, walk.grid, passed, x, table, factors, grad_x, *walk.rows,
           FACTOR_ROWS=0, RELU=relu and not is_sum, **walk.blocks, ACC=acc)
    return grad_x, passed, factors


def norm_grads(factors: Tensor) -> Tuple[Tensor, Tensor]:
    """Gradients of weight and bias of what `norm_backward` gives last."""
    C = factors.shape[1]
    return factors.as_strided((C,), (1,), 3 * C), factors.as_strided((C,), (1,), 4 * C)


class NormAct(torch.autograd.Function):
    """`apply(x, residual, weight, bias, averages, eps, relu)`, see `norm_act`; images are dense in channels-last."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, averages, eps, relu):
        out, table = norm_forward(
            x, residual, weight, bias, *averages[:3], momentum=averages.momentum, eps=eps, relu=relu)
        ctx.eps, ctx.relu = eps, relu
        ctx.save_for_backward(x, weight, bias, table, out if relu and residual is not None else None)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, table, out = ctx.saved_tensors
        if wants_plain(grad):
            return _differentiable_gradients(ctx, grad, out, x, weight, bias)
        grad, x = (t.to(x.dtype).contiguous(memory_format=torch.channels_last) for t in (grad, x))
        out = None if out is None else out.contiguous(memory_format=torch.channels_last)
        with torch.cuda.device_of(x):
            grad_x, grad_residual, factors = untraced(norm_backward)(grad, x, out, weight, table, relu=ctx.relu)
        grad_weight, grad_bias = (gradient_like(g, p) for g, p in zip(norm_grads(factors), (weight, bias)))
        return grad_x, grad_residual if ctx.needs_input_grad[1] else None, grad_weight, grad_bias, None, None, None


def batch_norm_table(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        averages: Averages,
        eps: float,
        table: Optional[Tensor] = None,
) -> Tensor:
    """What a batch norm does to each channel of x, see `rows.batch_norm_kernel`: (4, C), new unless it is given."""
    rows = kernels_of('rows')
    C, walk, (dtype, acc) = x.shape[1], all_rows(x), accumulator(x.dtype)
    moments = made(x.new_empty(walk.runs, 2, C, dtype=dtype))
    launch(rows.moments_kernel, walk.grid, x, moments, *walk.rows, **walk.blocks, ACC=acc)
    table = made(moments.new_empty(4, C)) if table is None else table
    table_of_moments(moments, 1, weight, bias, averages, eps, walk, table)
    return table


def table_of_moments(
        moments: Tensor,
        images: int,
        weight: Tensor,
        bias: Tensor,
        averages: Averages,
        eps: float,
        walk: Walk,
        table: Tensor,
) -> None:
    """Fill the table of a batch norm, (4, C), from the moments that a walk over some images gives."""
    rows = kernels_of('rows')
    C, (_, acc) = moments.shape[-1], accumulator(moments.dtype)
    launch(rows.batch_norm_kernel, (-(-C // 8),),
           moments, weight, bias, averages.mean, averages.var, averages.tracked, table, images, *walk.sizes, C,
           EPS=eps, MOMENTUM=averages.momentum, BLOCK_R=256, BLOCK_C=8, ACC=acc)


def batch_norm_backward(
        sums: Tensor,
        weight: Tensor,
        table: Tensor,
        factors: Tensor,
        walk: Walk,
        images: int = 1,
) -> None:
    """Fill in what makes the gradient of x, the first rows of (5, C), and the gradients of weight and bias."""
    rows = kernels_of('rows')
    C, (_, acc) = sums.shape[-1], accumulator(sums.dtype)
    launch(rows.batch_norm_backward_kernel, (-(-C // 8),),
           sums, weight, table, factors, images, walk.sizes[0], images * walk.runs, C,
           BLOCK_R=256, BLOCK_C=8, ACC=acc)


def _differentiable_gradients(ctx, grad: Tensor, out: Optional[Tensor], x: Tensor, weight: Tensor, bias: Tensor):
    """By the definition; what the residual was does not matter, as out tells where ReLU lets a gradient pass."""
    with torch.enable_grad():
        tensors = {i: t.view_as(t) for i, t in ((0, x), (2, weight), (3, bias))}
        if out is not None:
            grad = grad.masked_fill(out <= 0, 0.)
        again = batch_norm_act(*tensors.values(), relu=ctx.relu and out is None, eps=ctx.eps)
        wanted = {i: t for i, t in tensors.items() if ctx.needs_input_grad[i]}
        grads = torch.autograd.grad(again, list(wanted.values()), grad, create_graph=True) if wanted else ()
    found = {1: grad if ctx.needs_input_grad[1] else None, **dict(zip(wanted, grads))}
    return *(found.get(i) for i in range(4)), None, None, None
