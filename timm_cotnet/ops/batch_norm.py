"""Batch norm with what follows it in a residual block, as one operator. This is its definition.

`dispatch.py` says where a kernel may stand in for the modules that compute it, and when.
"""
from typing import NamedTuple, Optional

import torch.nn.functional as F
from torch import Tensor, nn


class Averages(NamedTuple):
    """Running statistics of a batch norm, which are updated."""
    mean: Tensor
    var: Tensor
    tracked: Tensor  # number of batches
    momentum: float


def averages_of(norm: nn.BatchNorm2d) -> Averages:
    buffers = norm._buffers
    return Averages(buffers['running_mean'], buffers['running_var'], buffers['num_batches_tracked'], norm.momentum)


def batch_norm_act(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Optional[Tensor] = None,
        relu: bool = True,
        eps: float = 1e-5,
) -> Tensor:
    """`act(batch_norm(x) + residual)` with the statistics of the batch, in plain PyTorch: differentiable.

    Running statistics are neither read nor written.

    Args:
        x: (B, C, H, W), more than one value of each channel.
        weight: (C).
        bias: (C).
        residual: Summand, (B, C, H, W).
        relu: Whether act is ReLU; else there is none.
        eps: Of the norm.

    Returns:
        (B, C, H, W), in the dtype of x.
    """
    out = F.batch_norm(x, None, None, weight, bias, True, 0., eps)
    if residual is not None:
        out = out + residual
    return F.relu(out) if relu else out
