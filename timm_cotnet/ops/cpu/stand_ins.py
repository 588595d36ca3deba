"""What stands in for folded CoT layers and for blocks on the CPU, where `ops/dispatch.py` found nothing against it."""
from typing import Dict, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..onednn import run_conv2d
from ..pointwise import run_pointwise, run_pointwise_with_shortcut
from .batch_norm import train_batch_norm
from .contexts import contexts_folded


def train_bottleneck(block: nn.Module, x: Tensor, downsample: Sequence[nn.Module]) -> Tensor:
    """A `CotBottleneck` or `SplitAttnBottleneck` in training, (B, C_in, H, W) -> (B, C, H', W'), float32.

    Norms are kernels, with what follows them. Between the 1x1 convolutions all is called; so is the block's downsample,
    unless its convolution and norm are given.
    """
    out, shortcut = run_pointwise_with_shortcut(block.conv1, x)
    out = _norm_act(out, block.bn1)
    out = run_pointwise(block.conv3, block.avd_last(block.conv2(block.avd_first(out))))
    if downsample:
        return _norm_act(out, block.bn3, _norm_act(run_pointwise(downsample[0], shortcut), downsample[1], relu=False))
    if block.downsample is None:
        return _norm_act(out, block.bn3, x, shortcut)
    return _norm_act(out, block.bn3, block.downsample(x))


def _norm_act(x: Tensor, norm: nn.BatchNorm2d, residual: Optional[Tensor] = None, shortcut: Optional[Tensor] = None,
              relu: bool = True) -> Tensor:
    """`relu(norm(x) + residual)`, by the kernel if it can take what came from modules, which may be any. It makes a new
    tensor for the residual's gradient, so it reads the shortcut instead where that is the residual."""
    if all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.is_cpu and t.layout == torch.strided
           and not t.is_neg() and t.shape == x.shape and t.is_contiguous(memory_format=torch.channels_last)  # of rank 4
           for t in (x, x if residual is None else residual)) and x.shape[1] == norm.num_features < x.numel():
        return train_batch_norm(x, norm, relu, residual if shortcut is None else shortcut)
    out = norm(x) if residual is None else norm(x).add_(residual)
    return F.relu(out) if relu else out


def folded_cot_layer(layer: nn.Module, x: Tensor, parts: Dict[str, nn.Module]) -> Tensor:
    """A `FoldedCotLayer` of these parts without a gradient: (B, dim, H, W) -> (B, dim, H, W)."""
    static = run_conv2d(parts['key_embed.0'], x, 'relu')
    hidden = run_conv2d(parts['key'], static, 'relu', addend=run_conv2d(parts['query'], x), overwrite=True)
    logits, value = run_conv2d(parts['embed.1'], hidden), run_conv2d(parts['value'], x)
    norm, own = parts['embed.2'], [parts[path]._parameters for path in ('embed.2', 'se.0', 'se.2')]
    parameters = [p[name] for p in own for name in ('weight', 'bias')]
    parameters.insert(2, layer._parameters['shift'])
    args = (value, logits, static, parameters, layer.kernel_size, layer.dilation, layer.groups, norm.eps)
    if torch.compiler.is_compiling():
        return torch.ops.timm_cotnet.contexts_folded(*args)
    return contexts_folded(*args, overwrite=True)
