"""Batch norm, the sum with a residual and the activation in one operation: `batch_norm_act`."""
import ctypes
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .memory import empty_like
from .native import MAX_NUMBERS, load
from .shared_input import conv_gradients, images_at_a_time, is_plain_1x1
from .watch import are_watched, is_traced

_SOURCE = 'batch_norm.c'


def batch_norm_act(
        x: Tensor,
        norm: nn.Module,
        act: Optional[nn.Module] = None,
        residual: Optional[Tensor] = None,
) -> Tensor:
    """`act(norm(x) + residual)`; in training on the CPU, where the modules and tensors allow it, as one fused function.

    Fused, each direction goes over memory twice, and without a residual the output is not kept for the backward.

    Args:
        x: (B, C, H, W).
        norm: Normalization of C channels, whose running statistics are updated as it does that itself.
        act: Activation, None for none.
        residual: Summand, of the shape of x.
    """
    if why_not_fused(x, norm, act, residual) is None:
        return BatchNormAct.apply(x, norm.weight, norm.bias, residual, norm, type(act) is nn.ReLU)
    x = norm(x)
    if residual is not None:
        x += residual
    return x if act is None else act(x)


def conv_batch_norm_act(
        x: Tensor,
        conv: nn.Module,
        norm: nn.Module,
        act: Optional[nn.Module] = None,
        residual: Optional[Tensor] = None,
) -> Tensor:
    """`batch_norm_act(conv(x), norm, act, residual)`.

    Where a 1x1 convolution makes a large tensor of a small one, in training on the CPU, the gradient between
    convolution and norm is never there as a whole: it would go to memory and back.
    """
    images = _images_at_a_time(x, conv)
    if images is not None:
        with torch.no_grad():
            y = conv(x)
        if why_not_fused(y, norm, act, residual) is None:
            return ConvBatchNormAct.apply(
                y, norm.weight, norm.bias, residual, norm, type(act) is nn.ReLU, images, x, conv.weight, conv.stride)
    return batch_norm_act(conv(x), norm, act, residual)


def _images_at_a_time(x: Tensor, conv: nn.Module) -> Optional[int]:
    """How many images the backward of `ConvBatchNormAct` takes at a time; None where it has to be plain."""
    if not is_plain_1x1(x, conv):
        return None
    (B, C, H, W), (stride_h, stride_w) = x.shape, conv.stride
    made = conv.out_channels * -(-H // stride_h) * -(-W // stride_w)  # numbers of an image
    images = images_at_a_time(B, made) if made >= 2 * C * H * W else B
    return images if images < B else None


def why_not_fused(
        x: Tensor,
        norm: nn.Module,
        act: Optional[nn.Module],
        residual: Optional[Tensor] = None,
) -> Optional[str]:
    """The reason why `BatchNormAct` cannot take these here and now; None if it can."""
    if type(norm) is not nn.BatchNorm2d or type(act) not in (type(None), nn.Identity, nn.ReLU):
        return f'there is no kernel for {type(norm).__name__} and {type(act).__name__}'
    if not norm.training or not torch.is_grad_enabled():
        return 'the kernels are for training'
    if is_traced(x) or residual is not None and is_traced(residual):
        return 'operators are watched'
    if norm.momentum is None or not norm.track_running_stats or norm.num_batches_tracked is None:
        return 'the running statistics are not moving averages'
    if not _is_plain(x, x.shape) or x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return 'x is not a channels-last float32 tensor on the CPU'
    if residual is not None and not (
            _is_plain(residual, x.shape) and residual.is_contiguous(memory_format=torch.channels_last)):
        return 'the residual is not a channels-last float32 tensor of the shape of x on the CPU'
    if x.numel() <= x.shape[1]:
        return 'a channel has no two values'
    if x.shape[1] > MAX_NUMBERS:
        return f'x has {x.shape[1]} channels, more than {MAX_NUMBERS}'
    channels = (x.shape[1],)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if not _is_plain(tensor, channels) or not tensor.is_contiguous():
            return 'a parameter or running statistic is not a contiguous float32 tensor of C numbers on the CPU'
    if are_watched([norm, act]):
        return 'hooks want to see the modules run'
    if torch.is_autocast_enabled('cpu'):
        return 'autocast chooses the dtypes'
    if forward_ad._current_level >= 0:
        return 'the kernels have no forward-mode derivative'
    library = load(torch.float32, _SOURCE)
    return library if isinstance(library, str) else None


def _is_plain(tensor: Optional[Tensor], shape: tuple) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.dtype == torch.float32
        and tensor.device.type == 'cpu'
        and tensor.shape == shape
    )


class BatchNormAct(torch.autograd.Function):
    """`apply(x, weight, bias, residual, norm, relu)` where `why_not_fused` is None."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, norm, relu):
        return _forward(ctx, x, weight, bias, residual, norm, relu)

    @staticmethod
    def backward(ctx, grad):
        x, *parameters, statistics, out = ctx.saved_tensors
        if _wants_plain(grad):
            return _plain_gradients(ctx, grad, (x, *parameters), out)
        gradients = Gradients(ctx, grad, x, *parameters, statistics, out)
        grad_x = gradients.of_images(0, len(x)) if ctx.needs_input_grad[0] else None
        return grad_x, gradients.weight, gradients.bias, gradients.residual if ctx.residual else None, None, None


class ConvBatchNormAct(torch.autograd.Function):
    """`apply(x, weight, bias, residual, norm, relu, images, conv_in, conv_weight, stride)`: also the 1x1 convolution.

    x is what the convolution makes of conv_in, computed already, and gets no gradient. In the backward its gradient
    exists for a few images at a time, which the processor's caches hold until the convolution's backward needs them.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, residual, norm, relu, images, conv_in, conv_weight, stride):
        ctx.images, ctx.stride = images, stride
        return _forward(ctx, x, weight, bias, residual, norm, relu, conv_in, conv_weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, statistics, out, conv_in, conv_weight = ctx.saved_tensors
        if _wants_plain(grad):
            return _plain_gradients(ctx, grad, (x, weight, bias), out, conv_in, conv_weight)
        gradients = Gradients(ctx, grad, x, weight, bias, statistics, out)
        conv_in = conv_in.contiguous(memory_format=torch.channels_last)
        grads_in, grad_conv_weight = [], torch.zeros_like(conv_weight)
        for first in range(0, len(x), ctx.images):
            grad_x = gradients.of_images(first, first + ctx.images)
            grad_in, grad_weight = conv_gradients(
                grad_x, conv_in[first:first + ctx.images], conv_weight, ctx.stride, of_x=ctx.needs_input_grad[7])
            grads_in.append(grad_in)
            grad_conv_weight += grad_weight
        return (
            None, gradients.weight, gradients.bias, gradients.residual if ctx.residual else None, None, None, None,
            torch.cat(grads_in) if ctx.needs_input_grad[7] else None, grad_conv_weight, None)


def _forward(ctx, x, weight, bias, residual, norm, relu, *saved):
    """The forward of both functions."""
    out, statistics = empty_like(x), x.new_empty(4, x.shape[1])
    load(torch.float32, _SOURCE).batch_norm_act(
        *_sizes(x), *_pointers(x, weight, bias, residual, statistics, out), ctypes.c_double(norm.eps),
        ctypes.c_int(relu), ctypes.c_int(torch.get_num_threads()))
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(statistics[0], norm.momentum)
    norm.running_var.lerp_(statistics[3], norm.momentum)
    ctx.eps, ctx.relu, ctx.residual = norm.eps, relu, residual is not None
    # what ReLU lets through follows from x, unless there is a residual
    ctx.save_for_backward(x, weight, bias, statistics, out if relu and ctx.residual else None, *saved)
    return out


def _wants_plain(grad: Tensor) -> bool:
    """Whether a second derivative is wanted, or many gradients at once: the first one as differentiable PyTorch."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)


class Gradients:
    """Gradients of weight, bias and residual; those of x are computed when asked for.

    Args:
        ctx: What `_forward` left there.
        grad: Gradient of what it returned.
        x: Saved by it, like the rest.
    """

    def __init__(self, ctx, grad, x, weight, bias, statistics, out):
        # hooks may change the strides of what is saved
        grad, self.x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
        if out is not None:
            out = out.contiguous(memory_format=torch.channels_last)
        self.parameters = (weight, bias, statistics)
        self.weight, self.bias = torch.empty_like(weight), torch.empty_like(bias)
        self.residual = grad if out is None else empty_like(self.x)
        self.factors = x.new_empty(2, x.shape[1])
        self.relu = ctx.relu and out is None  # else it has been applied to the gradient
        load(torch.float32, _SOURCE).batch_norm_act_sums(
            *_sizes(x), *_pointers(grad, self.x, out, *self.parameters, self.weight, self.bias),
            *_pointers(None if out is None else self.residual, self.factors), ctypes.c_int(ctx.relu),
            ctypes.c_int(torch.get_num_threads()))

    def of_images(self, first: int, end: int) -> Tensor:
        """The gradient of x[first:end]."""
        x, grad = self.x[first:end], self.residual[first:end]
        grad_x = empty_like(x)
        load(torch.float32, _SOURCE).batch_norm_act_grad(
            *_sizes(x), *_pointers(grad, x, *self.parameters, self.factors, grad_x), ctypes.c_int(self.relu),
            ctypes.c_int(torch.get_num_threads()))
        return grad_x


def _plain_gradients(ctx, grad, tensors, out, *conv):
    """The backward of both functions in differentiable plain PyTorch; conv are the convolution's input and filters."""
    needed = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[7:9]]
    with torch.enable_grad():
        inputs = [tensor.view_as(tensor) for tensor in (*tensors, *conv)]
        x = F.conv2d(inputs[3], inputs[4], None, ctx.stride) if conv else inputs[0]
        normed = F.batch_norm(x, None, None, *inputs[1:3], True, 0.0, ctx.eps)
        if ctx.relu:
            grad = grad.masked_fill((normed if out is None else out) <= 0, 0)
        wanted = [tensor for tensor, need in zip(inputs, needed) if need]
        grads = iter(torch.autograd.grad(normed, wanted, grad, create_graph=True) if wanted else ())
    grads = [next(grads) if need else None for need in needed]
    of_norm = *grads[:3], grad if ctx.residual else None, None, None
    return (*of_norm, None, *grads[3:], None) if conv else of_norm


def _sizes(x: Tensor):
    return ctypes.c_long(x.numel() // x.shape[1]), ctypes.c_long(x.shape[1])


def _pointers(*tensors: Optional[Tensor]):
    return (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
