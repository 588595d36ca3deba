"""What lies behind the convolutions of a CoT layer, in training on the CPU: few passes over memory, and little kept.

Norm of the values, group norm of the filters, local convolution, norm, SiLU, pooling and the fusion of the contexts are
one autograd function. It saves its three inputs (values and filters before their norms) and computes the rest again in
the backward, where autograd would keep six tensors more.
"""
import ctypes
from typing import NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from . import native
from .local_conv import grouped_local_conv
from .memory import empty_like
from .watch import are_watched, is_traced


class NormParameters(ctypes.Structure):
    """`NormParameters` of native.c."""
    _fields_ = [
        ('weight', ctypes.c_void_p), ('bias', ctypes.c_void_p), ('running_mean', ctypes.c_void_p),
        ('running_var', ctypes.c_void_p), ('eps', ctypes.c_double), ('momentum', ctypes.c_double)]

    def __init__(self, norm: nn.Module):
        super().__init__(norm.weight.data_ptr(), norm.bias.data_ptr(), eps=norm.eps)
        if isinstance(norm, nn.BatchNorm2d):
            self.running_mean, self.running_var = norm.running_mean.data_ptr(), norm.running_var.data_ptr()
            self.momentum = norm.momentum


def can_train_native(value: torch.Tensor, logits: torch.Tensor, static: torch.Tensor, layer: nn.Module) -> bool:
    """Whether `FuseContexts` does what lies behind the convolutions of a `CotLayer` for these.

    Its threads share the images, so with many more threads than images plain PyTorch is faster.
    """
    group_norm = layer.embed[4]
    norms = (layer.conv1x1[1], layer.bn, layer.se[1])
    return (
        torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and not any(is_traced(x) for x in (value, logits, static))
        and value.device.type == 'cpu'
        and 4 * value.shape[0] >= torch.get_num_threads()
        and value.numel() > value.shape[1] > 0  # one value has no variance: its norm says so
        and not torch.is_autocast_enabled('cpu')
        and all(x.dtype == torch.float32 for x in (value, logits, static))
        and all(x.is_contiguous(memory_format=torch.channels_last) for x in (value, logits, static))
        and static.shape == value.shape
        and logits.shape == (value.shape[0], group_norm.num_groups * layer.kernel_size ** 2, *value.shape[2:])
        and all(type(norm) is nn.BatchNorm2d and norm.training and norm.affine and norm.track_running_stats
                and norm.momentum is not None for norm in norms)
        and norms[0].num_features == layer.bn.num_features == value.shape[1]
        and group_norm.affine
        and group_norm.num_channels == logits.shape[1]
        and type(layer.act) is nn.SiLU
        and not are_watched([norms[0], group_norm, layer.bn, layer.act, layer.se])
        and all(type(p) is nn.Parameter and p.dtype == torch.float32 and p.is_contiguous()
                for module in (*norms, group_norm, layer.se) for p in module.parameters())
        and all(statistic.dtype == torch.float32 and statistic.is_contiguous()
                for norm in norms for statistic in (norm.running_mean, norm.running_var))
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
        ctx.layer = Settings(
            layer.kernel_size, layer.dilation, layer.groups, group_norm.num_groups,
            (value_bn.eps, group_norm.eps, bn.eps, se_bn.eps))
        B, C = value.shape[:2]
        table = value.new_empty(8 * C + 4 * B * logits.shape[1])  # `Norms` of native.c
        out, pooled = empty_like(value), value.new_empty(B, C, 1, 1)
        norms = [NormParameters(norm) for norm in (value_bn, group_norm, bn)]
        _call('contexts_forward', value, ctx.layer, value, logits, static, *norms, table, out, pooled)
        for norm in (value_bn, bn):
            norm.num_batches_tracked.add_(1)
        attn = _static_weight(layer.se(pooled))
        _call('contexts_blend', value, ctx.layer, out, table, static, attn)
        ctx.save_for_backward(value, logits, static, pooled, attn, table, *parameters)
        return out

    @staticmethod
    def backward(ctx, grad):
        value, logits, static, pooled, attn, table, *parameters = ctx.saved_tensors
        # a second derivative is wanted, or many gradients at once: the first one as differentiable plain PyTorch
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
            return FuseContexts._differentiable_gradients(ctx, grad, value, logits, static, *parameters)
        value, logits, static, grad = (
            t.contiguous(memory_format=torch.channels_last) for t in (value, logits, static, grad))
        x, grad_attn = empty_like(value), torch.empty_like(attn)
        act_sums = value.new_empty(value.shape[0], 5, value.shape[1], dtype=torch.float64)
        _call('contexts_recompute', value, ctx.layer, value, logits, static, table, grad, x, act_sums, grad_attn)
        grad_pooled, *se_grads = _se_gradients(pooled, parameters[6:], ctx.layer.eps[3], grad_attn)
        grads = [empty_like(t) for t in (static, value, logits)]
        grad_norms = table.new_empty(sum(p.numel() for p in parameters[:6]))
        _call(
            'contexts_backward', value, ctx.layer, value, logits, table, *parameters[0:6:2], grad, x, act_sums,
            attn, grad_pooled / value[0, 0].numel(), *grads, grad_norms)
        return grads[1], grads[2], grads[0], None, *grad_norms.split([p.numel() for p in parameters[:6]]), *se_grads

    @staticmethod
    def _differentiable_gradients(ctx, grad, *tensors):
        with torch.enable_grad():
            tensors = [t.view_as(t) for t in tensors]
            out = _contexts_reference(*tensors, layer=ctx.layer)
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
    eps: Tuple[float, float, float, float]  # of its norms: values, filters, dynamic context, fusion


def _contexts_reference(
        value, logits, static, weight_v, bias_v, weight_f, bias_f, weight, bias, *se, layer: Settings):
    """The same as a function of tensors alone, in plain PyTorch."""
    eps = layer.eps
    value = F.batch_norm(value, None, None, weight_v, bias_v, True, 0., eps[0])
    filters = F.group_norm(logits, layer.num_filters, weight_f, bias_f, eps[1])
    dynamic = grouped_local_conv(value, filters, layer.kernel_size, layer.dilation, layer.groups)
    dynamic = F.silu(F.batch_norm(dynamic, None, None, weight, bias, True, 0., eps[2]))
    pooled = dynamic.mean((2, 3), keepdim=True) + static.mean((2, 3), keepdim=True)
    return torch.lerp(dynamic, static, _static_weight(_se_reference(pooled, se, eps[3])))


def _se_reference(pooled: torch.Tensor, parameters, eps: float) -> torch.Tensor:
    weight1, bias1, weight, bias, weight2, bias2 = parameters
    x = F.linear(pooled.flatten(1), weight1.flatten(1), bias1)
    x = F.batch_norm(x, None, None, weight, bias, True, 0., eps)
    return F.linear(F.relu(x), weight2.flatten(1), bias2)


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


def _call(function: str, value: torch.Tensor, layer: Settings, *args) -> None:
    """Call a kernel for the shape of value and the filters of layer."""
    B, C, H, W = value.shape
    taps = layer.kernel_size ** 2
    shape = native.Shape(
        B, C, layer.num_filters, layer.groups, H, W, layer.kernel_size, layer.dilation, taps, 1)
    getattr(native.load(value.dtype), function)(
        ctypes.byref(shape),
        *(ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, torch.Tensor) else ctypes.byref(arg) for arg in args),
        ctypes.c_int(torch.get_num_threads()))
