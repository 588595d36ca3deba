"""Batch norm whose statistics are those of all processes, on the CPU too.

PyTorch's `SyncBatchNorm` refuses tensors of the CPU as soon as there is a process group. On GPUs it does the work; on
the CPU this one does, over any backend that gathers and reduces there, such as gloo.
"""
from typing import Any, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm as timm_convert
from torch import nn
from torch.autograd.function import once_differentiable

__all__ = ['SyncBatchNorm', 'convert_sync_batchnorm']


class SyncBatchNorm(nn.SyncBatchNorm):
    """PyTorch's `SyncBatchNorm`, extended to tensors of the CPU.

    In evaluation, and without a process group or with one process in it, it is an ordinary batch norm. TorchScript
    knows it as little as it knows PyTorch's.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or x.device.type != 'cpu' or not (dist.is_available() and dist.is_initialized()):
            return super().forward(x)
        if dist.get_world_size(self.process_group) == 1:
            return super(nn.SyncBatchNorm, self).forward(x)
        self._check_input_dim(x)
        out, mean, var, count = _SyncBatchNorm.apply(x, self.weight, self.bias, self.eps, self.process_group)
        if self.track_running_stats and count > 0:
            self.num_batches_tracked.add_(1)
            momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_((var * count / (count - 1).clamp(min=1)).to(self.running_var.dtype), momentum)
        return out


class _SyncBatchNorm(torch.autograd.Function):
    """(out, mean, biased variance, number of values in a channel), the last three over all processes."""

    @staticmethod
    def forward(
            ctx: Any,
            x: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor,
            eps: float,
            group: Any,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        dims = [i for i in range(x.ndim) if i != 1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        local = torch.zeros(3, x.shape[1], dtype=dtype)
        if x.numel():  # a process may have no values: its images have no region for a mask head
            local[0] = x.numel() // x.shape[1]
            local[2], local[1] = torch.var_mean(x.to(dtype), dims, correction=0)
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local, group=group)
        counts, means, variances = torch.stack(parts, 1)  # (processes, channels) each
        count = counts[:, 0].sum()
        mean = (counts * means).sum(0) / count.clamp(min=1)
        var = (counts * (variances + (means - mean) ** 2)).sum(0) / count.clamp(min=1)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        ctx.group = group
        ctx.mark_non_differentiable(mean, var, count)
        return F.batch_norm(x, mean, var, weight, bias, False, 0., eps), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_):
        x, weight, mean, scale, count = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.ndim - 2)
        dims = [i for i in range(x.ndim) if i != 1]
        grad, normalized = grad.to(mean.dtype), (x - mean.view(shape)) * scale.view(shape)
        local = torch.stack([grad.sum(dims), (grad * normalized).sum(dims)])
        total = local.clone()
        dist.all_reduce(total, group=ctx.group)
        mean_grad, mean_projection = (total / count.clamp(min=1)).view(2, *shape)
        scale = scale if weight is None else scale * weight
        grad_x = ((grad - mean_grad - normalized * mean_projection) * scale.view(shape)).to(x.dtype)
        if weight is None:
            return grad_x, None, None, None, None
        return grad_x, local[1].to(weight.dtype), local[0].to(weight.dtype), None, None


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Synchronizes all batch norms of a module, on GPUs as timm does, on the CPU by the class above.

    Args:
        module: Any module; it is changed, and returned unless it is itself a batch norm.
    """
    module = timm_convert(module)
    for child in module.modules():
        if type(child) is nn.SyncBatchNorm:
            child.__class__ = SyncBatchNorm
    return module
