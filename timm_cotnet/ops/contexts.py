"""What lies behind the convolutions of a CoT layer, in training on the CPU: few passes over memory, and little kept.

Norm of the values, group norm of the filters, local convolution, norm, SiLU, pooling and the fusion of the contexts are
one autograd function. It saves its three inputs (values and filters before their norms) and computes the rest again in
the backward, where autograd would keep six tensors more.
"""
import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from . import native
from .local_conv import grouped_local_conv
from .watch import are_watched, is_traced


class Norm(ctypes.Structure):
    """`Norm` of native.c, with the tensors that it points to."""
    _fields_ = [(name, ctypes.c_void_p) for name in ('scale', 'bias', 'x_scale', 'x_bias')]

    def __init__(self, mean: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor):
        self.inverse = inverse  # 1 / std
        shift = -mean * inverse
        self.tensors = tuple(
            t.float().contiguous() for t in (inverse * weight, shift * weight + bias, inverse, shift))
        super().__init__(*(t.data_ptr() for t in self.tensors))

    def backward(self, weight: torch.Tensor, mean_grad: torch.Tensor, mean_product: torch.Tensor) -> 'NormBackward':
        """How the input's gradient follows from the output's one and the means of its products with `weight`."""
        _, _, inverse, shift = (t.double() for t in self.tensors)
        return NormBackward(
            inverse * weight, -inverse * mean_product * inverse, -inverse * (mean_grad + shift * mean_product))


class NormBackward(ctypes.Structure):
    """`NormBackward` of native.c, with the tensors that it points to."""
    _fields_ = [(name, ctypes.c_void_p) for name in ('of_grad', 'of_x', 'rest')]

    def __init__(self, *factors: torch.Tensor):
        self.tensors = tuple(t.float().contiguous() for t in factors)
        super().__init__(*(t.data_ptr() for t in self.tensors))


def can_train_native(value: torch.Tensor, logits: torch.Tensor, static: torch.Tensor, layer: nn.Module) -> bool:
    """Whether `FuseContexts` does what lies behind the convolutions of a `CotLayer` for these."""
    group_norm = layer.embed[4]
    norms = (layer.conv1x1[1], layer.bn, layer.se[1])
    return (
        torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and not any(is_traced(x) for x in (value, logits, static))
        and value.device.type == 'cpu'
        and value.numel() > value.shape[1] > 0  # one value has no variance: its norm says so
        and not torch.is_autocast_enabled('cpu')
        and all(x.dtype == torch.float32 for x in (value, logits, static))
        and all(x.is_contiguous(memory_format=torch.channels_last) for x in (value, logits, static))
        and all(type(norm) is nn.BatchNorm2d and norm.training and norm.affine and norm.track_running_stats
                and norm.momentum is not None for norm in norms)
        and group_norm.affine
        and type(layer.act) is nn.SiLU
        and not are_watched([norms[0], group_norm, layer.bn, layer.act, layer.se])
        and all(type(p) is nn.Parameter and p.dtype == torch.float32 and p.is_contiguous()
                for module in (*norms, group_norm, layer.se) for p in module.parameters())
        and native.why_not_sizes(layer.kernel_size, group_norm.num_groups, value.shape[1]) is None
        and native.why_not_native(value) is None
    )


def train_contexts(value: torch.Tensor, logits: torch.Tensor, static: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Output of a `CotLayer` from the results of its convolutions, where `can_train_native` holds.

    Args:
        value: Values before their norm, (B, C, H, W).
        logits: Filters before their norm, (B, G * k * k, H, W).
        static: Static context, (B, C, H, W).
        layer: The layer; the running statistics of its norms are updated.
    """
    value_norm, group_norm, se = layer.conv1x1[1], layer.embed[4], layer.se
    parameters = [p for m in (value_norm, group_norm, layer.bn, se[0], se[1], se[3]) for p in (m.weight, m.bias)]
    return FuseContexts.apply(value, logits, static, layer, *parameters)


class FuseContexts(torch.autograd.Function):
    """`apply(value, logits, static, layer, *parameters)`, see `train_contexts`."""

    @staticmethod
    def forward(ctx, value, logits, static, layer, *parameters):
        value_bn, group_norm, bn, se_bn = layer.conv1x1[1], layer.embed[4], layer.bn, layer.se[1]
        moments = _call('image_moments', value, layer, value, value.shape[1], _moments(value))
        value_norm = Norm(*_batch_statistics(moments, value, value_bn), *parameters[0:2])
        moments = _call('image_moments', value, layer, logits, logits.shape[1], _moments(logits))
        filter_norm = Norm(*_group_statistics(moments, logits, group_norm), *parameters[2:4])

        out, moments = torch.empty_like(value), _moments(value)
        _call('contexts_local_conv', value, layer, value, value_norm, logits, filter_norm, out, moments)
        norm = Norm(*_batch_statistics(moments, value, bn), *parameters[4:6])
        pooled = value.new_empty(*value.shape[:2], 1, 1)
        _call('contexts_pool', value, layer, out, norm, static, pooled)
        attn = _static_weight(layer.se(pooled))
        _call('contexts_blend', value, layer, out, norm, static, attn)

        ctx.save_for_backward(value, logits, static, pooled, attn, *parameters)
        ctx.norms = value_norm, filter_norm, norm
        ctx.layer = Settings(layer.kernel_size, layer.dilation, layer.groups, group_norm.num_groups)
        ctx.eps = value_bn.eps, group_norm.eps, bn.eps, se_bn.eps
        return out

    @staticmethod
    def backward(ctx, grad):
        value, logits, static, pooled, attn, *parameters = ctx.saved_tensors
        # a second derivative is wanted, or many gradients at once: the first one as differentiable plain PyTorch
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
            return FuseContexts._differentiable_gradients(ctx, grad, value, logits, static, *parameters)
        layer, (value_norm, filter_norm, norm) = ctx.layer, ctx.norms
        grad = grad.contiguous(memory_format=torch.channels_last)
        B, C, H, W = value.shape
        pixels, taps = H * W, layer.kernel_size ** 2

        x = torch.empty_like(value)  # the local convolution again
        _call('contexts_local_conv', value, layer, value, value_norm, logits, filter_norm, x, None)
        attn_grad = _call('contexts_attn_backward', value, layer, grad, x, norm, static, torch.empty_like(attn))
        pool_grad, *se_grads = _se_gradients(pooled, parameters[6:], ctx.eps[3], attn_grad)
        pool_grad, grad_static, sums = pool_grad / pixels, torch.empty_like(static), _moments(value)
        _call('contexts_act_backward', value, layer, grad, x, norm, attn, pool_grad, grad_static, sums)
        grad_bias, grad_weight = sums.sum(0)
        weight = parameters[4] / (B * pixels)
        back = norm.backward(parameters[4], weight * grad_bias, weight * grad_weight)

        grad_value, value_sums = torch.empty_like(value), _moments(value)
        grad_logits, filter_sums = torch.empty_like(logits), _moments(logits)
        _call(
            'contexts_local_conv_backward', value, layer, grad, x, norm, back, attn, pool_grad, value, value_norm,
            logits, filter_norm, grad_value, grad_logits, value_sums, filter_sums)
        grad_bias_v, grad_weight_v = value_sums.sum(0)
        weight = parameters[0] / (B * pixels)
        back = value_norm.backward(parameters[0], weight * grad_bias_v, weight * grad_weight_v)
        _call('norm_backward', value, layer, grad_value, value, C, back, 0)
        grad_bias_f, grad_weight_f = filter_sums.sum(0)
        means = (filter_sums * parameters[2]).view(B, 2, -1, taps).mean(3, keepdim=True) / pixels
        means = means.expand(-1, -1, -1, taps).flatten(2)
        back = filter_norm.backward(parameters[2], means[:, 0], means[:, 1])
        _call('norm_backward', value, layer, grad_logits, logits, logits.shape[1], back, 1)

        grads = (grad_weight_v, grad_bias_v, grad_weight_f, grad_bias_f, grad_weight, grad_bias)
        return grad_value, grad_logits, grad_static, None, *(g.to(value.dtype) for g in grads), *se_grads

    @staticmethod
    def _differentiable_gradients(ctx, grad, *tensors):
        with torch.enable_grad():
            tensors = [t.view_as(t) for t in tensors]
            out = _contexts_reference(*tensors, layer=ctx.layer, eps=ctx.eps)
            needed = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:]]
            wanted = [t for t, need in zip(tensors, needed) if need]
            grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
        grads = [next(grads) if need else None for need in needed]
        return *grads[:3], None, *grads[3:]


class Settings(NamedTuple):
    """What a backward has to know of its `CotLayer`."""
    kernel_size: int
    dilation: int
    groups: int
    num_filters: int


def _contexts_reference(
        value, logits, static, weight_v, bias_v, weight_f, bias_f, weight, bias, *se, layer: Settings, eps):
    """The same as a function of tensors alone, in plain PyTorch."""
    value = F.batch_norm(value, None, None, weight_v, bias_v, True, 0., eps[0])
    filters = F.group_norm(logits, layer.num_filters, weight_f, bias_f, eps[1])
    dynamic = grouped_local_conv(value, filters, layer.kernel_size, layer.dilation, layer.groups)
    dynamic = F.silu(F.batch_norm(dynamic, None, None, weight, bias, True, 0., eps[2]))
    pooled = dynamic.mean((2, 3), keepdim=True) + static.mean((2, 3), keepdim=True)
    return torch.lerp(dynamic, static, _static_weight(_se_reference(pooled, se, eps[3])))


def _se_reference(pooled: torch.Tensor, parameters, eps: float) -> torch.Tensor:
    weight1, bias1, weight, bias, weight2, bias2 = parameters
    x = F.batch_norm(F.conv2d(pooled, weight1, bias1), None, None, weight, bias, True, 0., eps)
    return F.conv2d(F.relu(x), weight2, bias2)


def _static_weight(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the (dynamic, static) logits of each channel: weight of the static context, (B, C, 1, 1)."""
    B, C = logits.shape[0], logits.shape[1] // 2
    logits = logits.view(B, C, 2)
    return (logits[:, :, 1] - logits[:, :, 0]).sigmoid().view(B, C, 1, 1)


def _se_gradients(pooled: torch.Tensor, parameters, eps: float, grad: torch.Tensor):
    """Gradients of the pooled contexts and of the parameters."""
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (pooled, *parameters)]
        attn = _static_weight(_se_reference(inputs[0], inputs[1:], eps))
        return torch.autograd.grad(attn, inputs, grad)


def _moments(x: torch.Tensor) -> torch.Tensor:
    """Room for two numbers of each channel of each image."""
    return x.new_empty(x.shape[0], 2, x.shape[1], dtype=torch.float64)


def _batch_statistics(moments: torch.Tensor, x: torch.Tensor, norm: nn.BatchNorm2d):
    """Mean and 1 / std of each channel, (C), which also go into the running statistics."""
    pixels = x.shape[2] * x.shape[3]
    count = x.shape[0] * pixels
    means, squares = moments.unbind(1)
    mean = means.mean(0)
    var = (squares.sum(0) + pixels * (means - mean).square().sum(0)) / count
    norm.running_mean.lerp_(mean.to(x.dtype), norm.momentum)
    norm.running_var.lerp_((var * (count / (count - 1))).to(x.dtype), norm.momentum)
    norm.num_batches_tracked.add_(1)
    return mean, (var + norm.eps).rsqrt()


def _group_statistics(moments: torch.Tensor, x: torch.Tensor, norm: nn.GroupNorm):
    """Mean and 1 / std of each channel's group, (B, C)."""
    pixels = x.shape[2] * x.shape[3]
    means, squares = moments.view(x.shape[0], 2, norm.num_groups, -1).unbind(1)
    mean = means.mean(2, keepdim=True)
    var = (squares.mean(2, keepdim=True) / pixels + (means - mean).square().mean(2, keepdim=True))
    return tuple(t.expand_as(means).flatten(1) for t in (mean, (var + norm.eps).rsqrt()))


def _call(function: str, value: torch.Tensor, layer, *args):
    """Call a kernel for the shape of value and the filters of layer; returns the last argument."""
    B, C, H, W = value.shape
    taps = layer.kernel_size ** 2
    groups = layer.num_filters if isinstance(layer, Settings) else layer.embed[4].num_groups
    shape = native.Shape(B, C, groups, layer.groups, H, W, layer.kernel_size, layer.dilation, taps, 1)
    converted = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            converted.append(ctypes.c_void_p(arg.data_ptr()))
        elif isinstance(arg, int):
            converted.append(ctypes.c_long(arg))
        else:
            converted.append(arg if arg is None else ctypes.byref(arg))
    getattr(native.load(value.dtype), function)(
        ctypes.byref(shape), *converted, ctypes.c_int(torch.get_num_threads()))
    return args[-1]
