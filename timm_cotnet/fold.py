"""Fold batch norms into the convolutions before them: equal results in evaluation from less work."""
from typing import Optional

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def is_foldable(norm: nn.Module) -> bool:
    """Whether norm applies fixed running statistics in evaluation, as only then it is a constant affine map."""
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None


def fold_norm(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """The convolution that computes norm(conv(x)) as norm does in evaluation.

    Args:
        conv: Convolution whose only reader is norm; left as it is.
        norm: Batch norm with running statistics.

    Returns:
        A new convolution with a bias.
    """
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    return conv_like(conv, weight, bias)


def conv_like(conv: nn.Conv2d, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> nn.Conv2d:
    """A convolution with the geometry of conv and other filters, (out, in // groups, k, k)."""
    folded = nn.Conv2d(
        weight.shape[1] * conv.groups, weight.shape[0], conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        conv.groups, bias is not None, device='meta')
    folded.weight = nn.Parameter(weight.detach().clone(), requires_grad=conv.weight.requires_grad)
    if bias is not None:
        folded.bias = nn.Parameter(bias.detach().clone(), requires_grad=conv.weight.requires_grad)
    return folded.train(conv.training)


def fold_sequential(layers: nn.Sequential) -> None:
    """Fold each (convolution, batch norm) pair of layers in place; the norm's place is taken by an identity."""
    for i in range(len(layers) - 1):
        if isinstance(layers[i], nn.Conv2d) and is_foldable(layers[i + 1]):
            layers[i] = fold_norm(layers[i], layers[i + 1])
            layers[i + 1] = nn.Identity()


def fold_pair(parent: nn.Module, conv_name: str, norm_name: str) -> None:
    """The same for two named children of parent."""
    conv, norm = getattr(parent, conv_name), getattr(parent, norm_name)
    if isinstance(conv, nn.Conv2d) and is_foldable(norm):
        setattr(parent, conv_name, fold_norm(conv, norm))
        setattr(parent, norm_name, nn.Identity())
