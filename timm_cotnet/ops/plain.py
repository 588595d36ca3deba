"""Stand-ins in plain PyTorch, for any device: equal results from less work, by algebra alone."""
import torch.nn.functional as F
from torch import Tensor, nn


def averaged_attention(module: nn.Module, x: Tensor) -> Tensor:
    """A `CoTAttention`, (B, dim, H, W) -> (B, dim, H, W), whose k * k times larger logits are never made.

    The mean over the taps commutes with the 1x1 convolution that makes them, so its filters are averaged instead; and a
    convolution of two concatenated tensors is the sum of two convolutions.
    """
    B, C, H, W = x.shape
    static = module.key_embed(x)
    conv, norm, act, last = module.attention_embed
    dim = conv.in_channels // 2
    attn = F.conv2d(static, conv.weight[:, :dim], conv.bias) + F.conv2d(x, conv.weight[:, dim:])
    bias = None if last.bias is None else last.bias.view(C, -1).mean(1)
    attn = F.conv2d(act(norm(attn)), last.weight.unflatten(0, (C, -1)).mean(1), bias)
    attn = attn.flatten(2).softmax(2).view(B, C, H, W)
    return static + attn.to(static.dtype) * module.value_embed(x)
