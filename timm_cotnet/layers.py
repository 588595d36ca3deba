"""Contextual Transformer (CoT) layers: modules that take the place of a 3x3 convolution.

Paper: `Contextual Transformer Networks for Visual Recognition` - https://arxiv.org/abs/2107.12292, section 3.2
Official modules: `CotLayer`, `CoXtLayer` in https://github.com/JDAI-CV/CoTNet (`models/cotnet.py`). The state dicts
agree key for key. The arithmetic is rearranged where that gives equal results from less work: no concatenation of keys
and query, and the two-way softmax over dynamic and static context is a sigmoid of the difference.
"""
from typing import Any, Callable, Dict

import torch
import torch.nn.functional as F
from torch import nn

from .fold import fold_norm, fold_sequential, is_foldable
from .fused import FusedCotLayer
from .ops import grouped_local_conv
from .ops.batch_norm import batch_norm_act, conv_norm_act
from .ops.contexts import can_train_native, train_contexts
from .ops.key_conv import KeyConv, why_not_key_conv
from .ops.watch import are_watched

SHARE_PLANES = 8  # number of channels that share one dynamic filter


def factory_kwargs(device=None, dtype=None) -> Dict[str, Any]:
    """The arguments that were given: a norm or pooling layer of an older timm takes neither."""
    return {name: value for name, value in (('device', device), ('dtype', dtype)) if value is not None}


def run_sequential(layers: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """layers(x), in which batch norms run together with their activations where they can."""
    if type(layers) is not nn.Sequential or are_watched([layers]):
        return layers(x)
    left = list(layers)
    while left:
        layer = left.pop(0)
        conv = layer if isinstance(layer, nn.Conv2d) and left and isinstance(left[0], nn.BatchNorm2d) else None
        norm = left.pop(0) if conv is not None else layer
        if isinstance(norm, nn.BatchNorm2d):
            act = left.pop(0) if left and isinstance(left[0], nn.ReLU) else None
            x = batch_norm_act(x, norm, act) if conv is None else conv_norm_act(conv, norm, act, x)
        else:
            x = layer(x)
    return x


class KeyConv2d(nn.Conv2d):
    """The grouped k x k convolution over the keys, by Winograd's algorithm where there are kernels for it.

    (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(self, dim: int, kernel_size: int, dilation: int, groups: int, device=None, dtype=None):
        super().__init__(
            dim, dim, kernel_size, padding=dilation * (kernel_size // 2), dilation=dilation, groups=groups, bias=False,
            device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if why_not_key_conv(x, self.weight, self.groups, None, self.stride, self.padding, self.dilation) is None:
                return KeyConv.apply(x, self.weight, self.groups)
        return self._conv_forward(x, self.weight, self.bias)


class QueryKeyConv2d(nn.Conv2d):
    """1x1 convolution of the concatenated query and keys; `pair` computes it as W_q q + W_k k without concatenating.

    Args:
        dim: Channels of query and keys, each.
        out_channels: Output channels.
        groups: With one group the filters read [q, k]; with more they read q and k channel by channel in turn, so that
            each group sees both (official `CoXtLayer`).
    """

    def __init__(self, dim: int, out_channels: int, groups: int = 1, device=None, dtype=None):
        super().__init__(2 * dim, out_channels, 1, groups=groups, bias=False, device=device, dtype=dtype)

    def pair(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """(B, dim, H, W) twice -> (B, out_channels, H, W)."""
        weight_q, weight_k = self.query_key_weights()
        return F.conv2d(query, weight_q, self.bias, groups=self.groups) + F.conv2d(key, weight_k, groups=self.groups)

    def query_key_weights(self):
        """The filters' two halves, (out_channels, dim // groups, 1, 1) each."""
        if self.groups == 1:
            dim = self.in_channels // 2
            return self.weight[:, :dim], self.weight[:, dim:]
        return self.weight[:, 0::2], self.weight[:, 1::2]


class TapMeanConv2d(nn.Conv2d):
    """1x1 convolution followed by the mean over its k * k taps, computed as one with the mean of the filters.

    (B, in_channels, H, W) -> (B, dim, H, W), from filters for dim * k * k outputs.
    """

    def __init__(self, in_channels: int, dim: int, taps: int, device=None, dtype=None):
        super().__init__(in_channels, dim * taps, 1, device=device, dtype=dtype)
        self.dim = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.view(self.dim, -1, self.in_channels, 1, 1).mean(1)
        bias = self.bias
        assert bias is not None  # for TorchScript
        return F.conv2d(x, weight, bias.view(self.dim, -1).mean(1))


class CotLayer(nn.Module):
    """CoT layer of CoTNet: static context from a convolution over the keys, dynamic context from a filter per pixel.

    (B, dim, H, W) -> (B, dim, H, W), any floating dtype. arXiv:2107.12292, section 3.2; official `CotLayer`, whose
    names the children keep: `key_embed` makes the static context, `embed` the attention (a filter for every pixel, one
    for each dim // 8 groups of channels), `conv1x1` the values, `se` the fusion of the two contexts.

    Args:
        dim: Channels, a multiple of 8.
        kernel_size: Side of the key convolution and of the dynamic filters, odd.
        dilation: Dilation of both.
        norm_layer: What normalizes after a convolution.

    Raises:
        ValueError: If dim, kernel_size or dilation does not fit.
    """
    KEY_GROUPS = 4  # of the key convolution
    GROUPS = 1  # of the 1x1 convolutions and of the values

    def __init__(
            self,
            dim: int,
            kernel_size: int = 3,
            dilation: int = 1,
            norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        dd = factory_kwargs(device, dtype)
        super().__init__()
        multiple = SHARE_PLANES * self.GROUPS
        _check_dim(type(self).__name__, dim, multiple)
        _check_kernel(type(self).__name__, kernel_size, dilation)
        self.dim = dim
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.groups = self.GROUPS
        taps = kernel_size * kernel_size
        num_filters = dim // SHARE_PLANES

        self.key_embed = nn.Sequential(
            KeyConv2d(dim, kernel_size, dilation, self.KEY_GROUPS, **dd),
            norm_layer(dim, **dd),
            nn.ReLU(inplace=True),
        )
        self.embed = nn.Sequential(
            QueryKeyConv2d(dim, dim // 2, groups=self.groups, **dd),
            norm_layer(dim // 2, **dd),
            nn.ReLU(inplace=True),
            nn.Conv2d(dim // 2, taps * num_filters, 1, groups=self.groups, **dd),
            nn.GroupNorm(num_filters, taps * num_filters, **dd),
        )
        self.conv1x1 = nn.Sequential(
            nn.Conv2d(dim, dim, 1, groups=self.groups, bias=False, **dd),
            norm_layer(dim, **dd),
        )
        self.bn = norm_layer(dim, **dd)
        self.act = nn.SiLU(inplace=True)
        attn_chs = max(dim // 2, 32)
        self.se = nn.Sequential(
            nn.Conv2d(dim, attn_chs, 1, **dd),
            norm_layer(attn_chs, **dd),
            nn.ReLU(inplace=True),
            nn.Conv2d(attn_chs, 2 * dim, 1, **dd),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        static, attn = self._static_and_filters(x)
        if torch.jit.is_scripting():
            value = self.conv1x1(x)
        elif are_watched([self.conv1x1]):
            value = self.conv1x1(x)
        else:
            value = self.conv1x1[0](x)
            if can_train_native(value, attn, static, self):
                return train_contexts(value, attn, static, self)
            value = self.conv1x1[1](value)
        B, C, H, W = x.shape
        dynamic = self._dynamic_context(value, attn)
        gap = dynamic.mean((2, 3), keepdim=True) + static.mean((2, 3), keepdim=True)
        attn = self.se(gap).view(B, C, 2)  # (dynamic, static) logits of each channel
        attn = (attn[:, :, 1] - attn[:, :, 0]).sigmoid().view(B, C, 1, 1)
        return torch.lerp(dynamic, static.to(dynamic.dtype), attn.to(dynamic.dtype))

    def contexts(self, x: torch.Tensor):
        """The static and the dynamic context of x before their fusion, (B, dim, H, W) each."""
        static, attn = self._static_and_filters(x)
        return static, self._dynamic_context(self.conv1x1(x), attn)

    def _static_and_filters(self, x: torch.Tensor):
        """Static context, and the filters before their norm."""
        if torch.jit.is_scripting():
            static = self.key_embed(x)
            attn = self.embed[2](self.embed[1](self.embed[0].pair(x, static)))
        else:
            static = run_sequential(self.key_embed, x)
            attn = conv_norm_act(self.embed[0], self.embed[1], self.embed[2], x, static)
        return static, self.embed[3](attn)

    def _dynamic_context(self, value: torch.Tensor, attn: torch.Tensor) -> torch.Tensor:
        dynamic = grouped_local_conv(value, self.embed[4](attn), self.kernel_size, self.dilation, self.groups)
        return self.act(self.bn(dynamic))

    def fuse(self) -> nn.Module:
        """The same layer for evaluation, with folded batch norms (called by timm's `reparameterize_model`)."""
        norms = (self.key_embed[1], self.embed[1], self.conv1x1[1], self.bn, self.se[1])
        return FusedCotLayer(self) if all(map(is_foldable, norms)) else self


class CoxtLayer(CotLayer):
    """CoT layer of CoTNeXt: as `CotLayer`, with two groups in the 1x1 convolutions and eight in the key convolution.

    (B, dim, H, W) -> (B, dim, H, W), dim a multiple of 16. Official `CoXtLayer`.
    """
    KEY_GROUPS = 8
    GROUPS = 2


class CoTAttention(nn.Module):
    """The widely copied stand-alone CoT module, which weighs each pixel by a softmax over the whole image.

    (B, dim, H, W) -> (B, dim, H, W). It differs from the paper's layer: the attention logits of the k * k taps are
    averaged, so there is one weight per pixel and channel. The mean commutes with the 1x1 convolution that makes the
    logits, so the filters are averaged instead and the k * k times larger logits tensor is never made. State dict as
    in the copies found in articles and collections of attention modules.

    Args:
        dim: Channels, a multiple of 4.
        kernel_size: Side of the key convolution, odd.

    Raises:
        ValueError: If dim or kernel_size does not fit.
    """

    def __init__(self, dim: int = 512, kernel_size: int = 3, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        _check_dim('CoTAttention', dim, 4)
        _check_kernel('CoTAttention', kernel_size)
        self.dim = dim
        self.kernel_size = kernel_size
        self.key_embed = nn.Sequential(
            KeyConv2d(dim, kernel_size, 1, 4, **dd),
            nn.BatchNorm2d(dim, **dd),
            nn.ReLU(inplace=True),
        )
        self.value_embed = nn.Sequential(
            nn.Conv2d(dim, dim, 1, bias=False, **dd),
            nn.BatchNorm2d(dim, **dd),
        )
        self.attention_embed = nn.Sequential(
            QueryKeyConv2d(dim, dim // 2, **dd),
            nn.BatchNorm2d(dim // 2, **dd),
            nn.ReLU(inplace=True),
            TapMeanConv2d(dim // 2, dim, kernel_size * kernel_size, **dd),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        static = self.key_embed(x)
        attn = self.attention_embed[0].pair(static, x)  # this module concatenates the keys first
        attn = self.attention_embed[3](self.attention_embed[2](self.attention_embed[1](attn)))
        attn = attn.flatten(2).softmax(2).view(B, C, H, W)
        return torch.addcmul(static, attn.to(static.dtype), self.value_embed(x))

    def fuse(self) -> nn.Module:
        """Fold the batch norms in place (called by timm's `reparameterize_model`)."""
        for layers in (self.key_embed, self.value_embed):
            fold_sequential(layers)
        if is_foldable(self.attention_embed[1]):
            weight = fold_norm(self.attention_embed[0], self.attention_embed[1])
            self.attention_embed[0].weight = weight.weight
            self.attention_embed[0].bias = weight.bias
            self.attention_embed[1] = nn.Identity()
        return self


def _check_dim(name: str, dim: int, multiple: int) -> None:
    if not isinstance(dim, int) or dim < 1 or dim % multiple != 0:
        raise ValueError(f'{name}: dim is {dim!r}, expected a multiple of {multiple}')


def _check_kernel(name: str, kernel_size: int, dilation: int = 1) -> None:
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'{name}: kernel_size is {kernel_size!r}, expected a positive odd integer')
    if not isinstance(dilation, int) or dilation < 1:
        raise ValueError(f'{name}: dilation is {dilation!r}, expected a positive integer')
