"""Batch norm in training, the sum with a residual and ReLU in C, channels-last, as one autograd function.

Modules go over memory for each of these by itself. What ReLU lets through follows from the input of the norm, or from
the output where there is a residual; that is saved by what reads it in any case.
"""
import ctypes
from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from .. import batch_norm as definition  # the module, as it may be on its way to import this one
from ..batch_norm import Averages, averages_of
from ..watch import untraced, wants_plain
from .build import call
from .contexts import Norm
from .local_conv import Shape, channels_last, empty_like


class _BatchNorm(ctypes.Structure):
    """`BatchNorm` of batch_norm.c."""
    _fields_ = [
        ('shape', Shape), ('norm', Norm),
        *((name, ctypes.c_void_p) for name in ('x', 'residual', 'out', 'grad', 'grad_x', 'grad_residual')),
        ('relu', ctypes.c_long)]

    def __init__(self, norm: Norm, relu: bool, x: Tensor, **tensors: Optional[Tensor]):
        pointers = {name: None if t is None else t.data_ptr() for name, t in tensors.items()}
        super().__init__(Shape.of(x), norm, x.data_ptr(), relu=relu, **pointers)

    def call(self, kernel: str) -> None:
        call(kernel, torch.float32, ctypes.byref(self))


def train_batch_norm(x: Tensor, norm: nn.BatchNorm2d, relu: bool = True, residual: Optional[Tensor] = None) -> Tensor:
    """`act(norm(x) + residual)` in training: (B, C, H, W) -> (B, C, H, W), all float32 and channels-last.

    Args:
        x: (B, C, H, W), more than one value of each channel.
        norm: Norm of C channels with weight and bias, whose running statistics are moving averages and are updated.
        relu: Whether act is ReLU; else there is none.
        residual: Summand, (B, C, H, W).
    """
    return TrainBatchNorm.apply(x, norm.weight, norm.bias, residual, norm, relu)


class TrainBatchNorm(torch.autograd.Function):
    """`apply(x, weight, bias, residual, norm, relu)`, see `train_batch_norm`."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, norm, relu):
        out, table = batch_norm_forward(x, weight, bias, averages_of(norm), norm.eps, relu, residual)
        ctx.eps, ctx.relu = norm.eps, relu
        ctx.save_for_backward(x, weight, bias, table, out if relu and residual is not None else None)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, table, out = ctx.saved_tensors
        if wants_plain(grad):
            return TrainBatchNorm._differentiable_gradients(ctx, grad, out, x, weight, bias)
        # hooks may have changed what was saved
        grad, x, out = (t if t is None else channels_last(t.float()) for t in (grad, x, out))
        weight, bias, table = (t.float().contiguous() for t in (weight, bias, table))
        wants_x, _, _, wants_residual = ctx.needs_input_grad[:4]
        grad_x, grad_residual, grad_weight, grad_bias = untraced(batch_norm_backward)(
            grad, x, weight, bias, table, ctx.eps, ctx.relu, out, wants_x)
        if not wants_residual:
            grad_residual = None
        elif out is None:
            grad_residual = grad
        return grad_x, grad_weight, grad_bias, grad_residual, None, None

    @staticmethod
    def _differentiable_gradients(ctx, grad, out, *tensors):
        with torch.enable_grad():
            tensors = [t.view_as(t) for t in tensors]
            if out is not None:
                grad = grad.masked_fill(out <= 0, 0.)
            again = definition.batch_norm_act(*tensors, None, ctx.relu and out is None, ctx.eps)
            needed = ctx.needs_input_grad[:3]
            wanted = [t for t, need in zip(tensors, needed) if need]
            grads = iter(torch.autograd.grad(again, wanted, grad, create_graph=True) if wanted else ())
        grads = [next(grads) if need else None for need in needed]
        return *grads, grad if ctx.needs_input_grad[3] else None, None, None


def batch_norm_forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        averages: Averages,
        eps: float,
        relu: bool = True,
        residual: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """`train_batch_norm` without a gradient, and what its backward needs: (4, C)."""
    out, table = empty_like(x), x.new_empty(4, x.shape[1])
    norm = Norm(eps, averages.momentum, table, weight=weight, bias=bias, running_mean=averages.mean,
                running_var=averages.var)
    _BatchNorm(norm, relu, x, residual=residual, out=out).call('batch_norm_forward')
    averages.tracked.add_(1)
    return out, table


def batch_norm_backward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        table: Tensor,
        eps: float,
        relu: bool = True,
        out: Optional[Tensor] = None,
        wants_x: bool = True,
) -> Tuple[Optional[Tensor], Optional[Tensor], Tensor, Tensor]:
    """Gradients of x, of the residual, of weight and bias; out is what came out if there was a residual before ReLU."""
    grad_x = empty_like(x) if wants_x else None
    grad_residual = None if out is None else empty_like(x)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    norm = Norm(eps, 0., table, weight=weight, bias=bias, grad_weight=grad_weight, grad_bias=grad_bias)
    _BatchNorm(
        norm, relu, x, out=out, grad=grad, grad_x=grad_x, grad_residual=grad_residual).call('batch_norm_backward')
    return grad_x, grad_residual, grad_weight, grad_bias
