"""Batch norm in training with what follows it in the same pass, in Triton: a sum with a residual, ReLU."""
from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from ..batch_norm import Averages, averages_of, batch_norm_act
from ..contexts import gradient_like
from ..watch import untraced, wants_plain
from .launch import Walk, accumulator, all_rows, kernels_of, launch


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
    rows = kernels_of('rows')
    x, residual = alike(x, residual)
    out, walk = torch.empty_like(x), all_rows(x, sums=False)
    launch(rows.norm_act_kernel, walk.grid,
           x, x if residual is None else residual, running_table(norm, x.dtype), out, *walk.rows,
           RESIDUAL=residual is not None, RELU=relu, **walk.blocks, ACC=accumulator(x.dtype)[1])
    return out


def running_table(norm: nn.BatchNorm2d, dtype: torch.dtype) -> Tensor:
    """What a batch norm in evaluation does to each channel of an x of dtype: (2, C), scale and shift."""
    rows = kernels_of('rows')
    mean, C, (table_dtype, acc) = norm.running_mean, norm.num_features, accumulator(dtype)
    table = torch.empty(2, C, dtype=table_dtype, device=mean.device)
    launch(rows.running_norm_kernel, (-(-C // 128),), mean, norm.running_var, norm.weight, norm.bias, table,
           C=C, EPS=norm.eps, BLOCK_C=128, ACC=acc)
    return table


def norm_forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        averages: Averages,
        eps: float,
        relu: bool = True,
        residual: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """`norm_act` of dense tensors, and what its backward needs: (4, C)."""
    table = batch_norm_table(x, weight, bias, averages, eps)
    return norm_again(x, table, relu, residual), table


def norm_again(
        x: Tensor,
        table: Tensor,
        relu: bool = True,
        residual: Optional[Tensor] = None,
        out: Optional[Tensor] = None,
) -> Tensor:
    """The first result of `norm_forward` from its second: cheaper to compute twice than to keep for a backward.

    It is written to out if that is given, an image where x may be its rows.
    """
    rows = kernels_of('rows')
    out, walk = torch.empty_like(x) if out is None else out, all_rows(x, sums=False)
    launch(rows.norm_act_kernel, walk.grid, x, x if residual is None else residual, table, out, *walk.rows,
           RESIDUAL=residual is not None, RELU=relu, **walk.blocks, ACC=accumulator(x.dtype)[1])
    return out


def norm_backward(
        grad: Tensor,
        x: Tensor,
        out: Optional[Tensor],
        weight: Tensor,
        table: Tensor,
        with_residual: bool = False,
) -> Tuple[Tensor, Tensor, Tuple[Tensor, Tensor]]:
    """Gradients of x, of the residual (grad unless they differ), and of weight and bias; all dense.

    out is what ReLU put out; None: there is none.
    """
    rows = kernels_of('rows')
    C, (dtype, acc), relu, walk = x.shape[1], accumulator(x.dtype), out is not None, all_rows(x, 4)
    out = out if relu else x
    sums = x.new_empty(walk.runs, 2, C, dtype=dtype)
    launch(rows.grad_sums_kernel, walk.grid, grad, x, out, table, sums, *walk.rows, TABLE_ROWS=0, RELU=relu,
           **walk.blocks, ACC=acc)
    factors, grads = batch_norm_backward(sums, weight, table, walk)
    grad_x, walk = torch.empty_like(x), all_rows(x, sums=False)
    grad_residual = torch.empty_like(grad) if with_residual and relu else grad
    launch(rows.norm_backward_kernel, walk.grid, grad, x, out, factors, grad_x, grad_residual, *walk.rows,
           FACTOR_ROWS=0, RELU=relu, RESIDUAL=with_residual and relu, **walk.blocks, ACC=acc)
    return grad_x, grad_residual, grads


class NormAct(torch.autograd.Function):
    """`apply(x, residual, weight, bias, averages, eps, relu)`, see `norm_act`; images are dense in channels-last."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, averages, eps, relu):
        out, table = norm_forward(x, weight, bias, averages, eps, relu, residual)
        ctx.eps, ctx.relu = eps, relu
        ctx.save_for_backward(x, weight, bias, table, out if relu else None)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, table, out = ctx.saved_tensors
        if wants_plain(grad):
            return _differentiable_gradients(ctx, grad, out, x, weight, bias)
        grad, x = (t.to(x.dtype).contiguous(memory_format=torch.channels_last) for t in (grad, x))
        out = None if out is None else out.contiguous(memory_format=torch.channels_last)
        with torch.cuda.device_of(x):
            grad_x, grad_residual, grads = untraced(norm_backward)(grad, x, out, weight, table, ctx.needs_input_grad[1])
        grad_weight, grad_bias = (gradient_like(g, p) for g, p in zip(grads, (weight, bias)))
        return grad_x, grad_residual if ctx.needs_input_grad[1] else None, grad_weight, grad_bias, None, None, None


def batch_norm_table(x: Tensor, weight: Tensor, bias: Tensor, averages: Averages, eps: float) -> Tensor:
    """What a batch norm does to each channel of x, see `rows.batch_norm_kernel`: (4, C)."""
    rows = kernels_of('rows')
    C, walk, (dtype, acc) = x.shape[1], all_rows(x), accumulator(x.dtype)
    moments = x.new_empty(walk.runs, 2, C, dtype=dtype)
    launch(rows.moments_kernel, walk.grid, x, moments, *walk.rows, **walk.blocks, ACC=acc)
    return table_of_moments(moments, 1, weight, bias, averages, eps, walk)


def table_of_moments(
        moments: Tensor,
        images: int,
        weight: Tensor,
        bias: Tensor,
        averages: Averages,
        eps: float,
        walk: Walk,
) -> Tensor:
    """What a batch norm does to each channel, of the moments that a walk over some images gives: (4, C)."""
    rows = kernels_of('rows')
    C, (_, acc) = moments.shape[-1], accumulator(moments.dtype)
    table = moments.new_empty(4, C)
    launch(rows.batch_norm_kernel, (-(-C // 8),),
           moments, weight, bias, averages.mean, averages.var, averages.tracked, table, images, *walk.sizes, C,
           EPS=eps, MOMENTUM=averages.momentum, BLOCK_R=256, BLOCK_C=8, ACC=acc)
    return table


def batch_norm_backward(
        sums: Tensor,
        weight: Tensor,
        table: Tensor,
        walk: Walk,
        images: int = 1,
) -> Tuple[Tensor, Tuple[Tensor, Tensor]]:
    """What makes the gradient of x, the first rows of (5, C), and the gradients of weight and bias, the others."""
    rows = kernels_of('rows')
    C, (_, acc) = sums.shape[-1], accumulator(sums.dtype)
    factors = table.new_empty(5, C)
    launch(rows.batch_norm_backward_kernel, (-(-C // 8),),
           sums, weight, table, factors, images, walk.sizes[0], images * walk.runs, C,
           BLOCK_R=256, BLOCK_C=8, ACC=acc)
    return factors, (factors.as_strided((C,), (1,), 3 * C), factors.as_strided((C,), (1,), 4 * C))


def _differentiable_gradients(ctx, grad: Tensor, out: Optional[Tensor], x: Tensor, weight: Tensor, bias: Tensor):
    """By the definition; what the residual was does not matter, as out tells where ReLU lets a gradient pass."""
    with torch.enable_grad():
        tensors = {i: t.view_as(t) for i, t in ((0, x), (2, weight), (3, bias))}
        if out is not None:
            grad = grad.masked_fill(out <= 0, 0.)
        again = batch_norm_act(*tensors.values(), relu=False, eps=ctx.eps)
        wanted = {i: t for i, t in tensors.items() if ctx.needs_input_grad[i]}
        grads = torch.autograd.grad(again, list(wanted.values()), grad, create_graph=True) if wanted else ()
    found = {1: grad if ctx.needs_input_grad[1] else None, **dict(zip(wanted, grads))}
    return *(found.get(i) for i in range(4)), None, None, None
