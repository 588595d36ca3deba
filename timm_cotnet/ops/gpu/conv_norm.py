"""A 1x1 convolution in training with the batch norm behind it, and with what follows that: one autograd function.

The convolution is a matrix product of rows of channels, a pixel each. Not in float32, where it is said apart for
convolutions and for products whether they may run in TF32.
"""
from typing import List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch_norm import Averages, averages_of, batch_norm_act
from ..contexts import gradient_like
from ..watch import untraced, wants_plain
from .images import rows_of
from .norm import alike, norm_backward, norm_forward, norm_grads


def conv_norm_act(
        x: Tensor,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d,
        relu: bool = True,
        residual: Optional[Tensor] = None,
        with_shortcut: bool = False,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """`relu(norm(conv(x)) + residual)` with the statistics of the batch, computed in the dtype of x, channels-last.

    Args:
        x: (B, C, H, W).
        conv: Of 1x1, stride one, one group, without padding and bias; its filters may have another dtype.
        norm: Of as many channels as conv gives.
        relu: Whether there is a ReLU.
        residual: Summand, of the result's shape.
        with_shortcut: Whether to give x as well, for a shortcut around all this: the sum of both gradients goes over
            the shortcut's, for which whoever reads it has to make a new tensor. One fewer is made, and read again.
    """
    parameters = norm._parameters
    x, residual = alike(x, residual)
    return ConvNormAct.apply(x, residual, conv._parameters['weight'], parameters['weight'], parameters['bias'],
                             averages_of(norm), norm.eps, relu, with_shortcut)


class ConvNormAct(torch.autograd.Function):
    """`apply(x, residual, filters, weight, bias, averages, eps, relu, with_shortcut)`, see `conv_norm_act`; images are
    dense."""

    @staticmethod
    def forward(
            ctx,
            x: Tensor,
            residual: Optional[Tensor],
            filters: Tensor,
            weight: Tensor,
            bias: Tensor,
            averages: Averages,
            eps: float,
            relu: bool,
            with_shortcut: bool,
    ) -> Union[Tensor, Tuple[Tensor, Tensor]]:
        ctx.set_materialize_grads(False)
        (B, C, H, W), channels, dtype = x.shape, filters.shape[0], x.dtype
        matrix = filters.view(channels, C)
        if matrix.dtype != dtype:
            matrix = matrix.to(dtype)
        product = F.linear(rows_of(x), matrix)
        # no view of rows, as what follows could not change one in place
        out, table = norm_forward(
            product, residual, weight, bias, *averages[:3], momentum=averages.momentum, eps=eps, relu=relu,
            shape=(B, channels, H, W))
        ctx.eps, ctx.relu = eps, relu
        is_sum = relu and residual is not None
        ctx.save_for_backward(x, filters, weight, bias, matrix, product, table, out if is_sum else None)
        return (out, x) if with_shortcut else out

    @staticmethod
    def backward(ctx, grad, grad_shortcut=None):
        if grad is None:
            return grad_shortcut, *[None] * 8
        x, *parameters = saved = ctx.saved_tensors
        if wants_plain(grad, grad_shortcut):
            grad_x, *grads = _differentiable_gradients(ctx, grad, saved[-1], x, *parameters[:3])
            return grad_x if grad_shortcut is None or grad_x is None else grad_x + grad_shortcut, *grads
        return *untraced(_gradients)(grad, saved, ctx.needs_input_grad, ctx.relu, grad_shortcut), None, None, None, None


def _gradients(
        grad: Tensor,
        saved: Sequence[Tensor],
        needed: Sequence[bool],
        relu: bool,
        grad_shortcut: Optional[Tensor] = None,
) -> List[Optional[Tensor]]:
    """Those of x, residual, filters, weight and bias; that of x over the shortcut's, if that is dense.

    Products are told where to go: so autocast leaves them alone, and nothing else holds the memory of an image, to
    which autograd may add in place then.
    """
    x, filters, weight, bias, matrix, product, table, out = saved
    need_x, need_residual, need_filters, *_ = needed
    grad, _ = alike(grad.to(x.dtype), None)
    x, out = alike(x, out)  # hooks may have changed what was saved
    grad_x = grad_filters = None
    with torch.cuda.device_of(x):
        grad_product, grad_residual, factors = norm_backward(grad, product, out, weight, table, relu=relu)
        if need_filters:
            grad_filters = torch.empty_like(matrix)
            torch.mm(grad_product.t(), rows_of(x), out=grad_filters)
        if need_x and grad_shortcut is not None and grad_shortcut.dtype == x.dtype \
                and grad_shortcut.is_contiguous(memory_format=torch.channels_last):
            grad_x = grad_shortcut
            rows_of(grad_x).addmm_(grad_product, matrix)
        elif need_x:
            grad_x = torch.empty_like(x)
            torch.mm(grad_product, matrix, out=rows_of(grad_x))
            grad_x = grad_x if grad_shortcut is None else grad_x.add_(grad_shortcut)
        if need_filters:
            grad_filters = gradient_like(grad_filters.view(filters.shape), filters)
        grad_weight, grad_bias = (gradient_like(g, p) for g, p in zip(norm_grads(factors), (weight, bias)))
    return [grad_x, grad_residual if need_residual else None, grad_filters, grad_weight, grad_bias]


def _differentiable_gradients(
        ctx, grad: Tensor, out: Optional[Tensor], x: Tensor, filters: Tensor, weight: Tensor, bias: Tensor):
    """By the definition; what the residual was does not matter, as out tells where ReLU lets a gradient pass."""
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        tensors = {i: t.view_as(t) for i, t in ((0, x), (2, filters), (3, weight), (4, bias))}
        if out is not None:
            grad = grad.masked_fill(out <= 0, 0.)
        product = F.conv2d(tensors[0], tensors[2].to(x.dtype))
        again = batch_norm_act(product, tensors[3], tensors[4], relu=ctx.relu and out is None, eps=ctx.eps)
        wanted = {i: t for i, t in tensors.items() if ctx.needs_input_grad[i]}
        grads = torch.autograd.grad(again, list(wanted.values()), grad, create_graph=True) if wanted else ()
    found = {1: grad if ctx.needs_input_grad[1] else None, **dict(zip(wanted, grads))}
    return *(found.get(i) for i in range(5)), None, None, None, None
