"""What stands in for CoT layers and folded blocks on the CPU, where `ops/dispatch.py` found nothing against it."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..onednn import run_conv2d
from .contexts import contexts_folded, train_contexts


def train_cot_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """A `CotLayer` or `CoxtLayer` in training, (B, dim, H, W) -> (B, dim, H, W), float32 and channels-last.

    Convolutions are the modules' own, but for the concatenation: that of two concatenated tensors is the sum of two.
    """
    static = layer.key_embed(x)
    conv, norm, act, attn, _ = layer.embed
    weight = conv.weight
    if layer.groups == 1:
        query, key = weight.split(conv.in_channels // 2, 1)
    else:
        # the backward of as_strided gives the gradient the strides of its parameter, as distributed training wants it
        weight = weight.as_strided(weight.shape, (weight.shape[1], 1, 1, 1))
        query, key = weight[:, 0::2], weight[:, 1::2]
    hidden = F.conv2d(x, query, groups=layer.groups) + F.conv2d(static, key, groups=layer.groups)
    return train_contexts(layer, layer.conv1x1[0](x), attn(act(norm(hidden))), static)


def folded_cot_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """A `FoldedCotLayer` without a gradient, (B, dim, H, W) -> (B, dim, H, W)."""
    parts, groups = layer._modules, layer.groups
    static = run_conv2d(parts['key_embed'][0], x, 'relu')
    hidden = run_conv2d(parts['key'], static, 'relu', addend=run_conv2d(parts['query'], x), overwrite=True)
    logits, value = run_conv2d(parts['embed'][1], hidden), run_conv2d(parts['value'][0], x)
    norm, se = parts['embed'][2], parts['se']
    parameters = [norm.weight, norm.bias, layer.shift, se[0].weight, se[0].bias, se[2].weight, se[2].bias]
    args = (value, logits, static, parameters, layer.kernel_size, layer.dilation, groups, norm.eps)
    if torch.compiler.is_compiling():
        return torch.ops.timm_cotnet.contexts_folded(*args)
    return contexts_folded(*args)
