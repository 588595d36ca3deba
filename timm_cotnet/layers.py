"""Contextual Transformer (CoT) layers: modules that take the place of a 3x3 convolution.

Paper: `Contextual Transformer Networks for Visual Recognition` - https://arxiv.org/abs/2107.12292, section 3.2
Official modules: `CotLayer`, `CoXtLayer` in https://github.com/JDAI-CV/CoTNet (`models/cotnet.py`). The state dicts
agree key for key, and every child gets what it gets there. What computes the same faster stands behind
`ops/dispatch.py`, which lets it only where a layer and its children are exactly what it knows.
"""
from typing import Any, Callable, Dict, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from .deploy import fold_attention, fold_cot_layer
from .ops import grouped_local_conv, mix_contexts, pool_contexts
from .ops.dispatch import known_as

SHARE_PLANES = 8  # number of channels that share one dynamic filter


def factory_kwargs(device=None, dtype=None) -> Dict[str, Any]:
    """The arguments that were given: a norm or pooling layer of an older timm takes neither."""
    return {name: value for name, value in (('device', device), ('dtype', dtype)) if value is not None}


@known_as('cot_layer')
class CotLayer(nn.Module):
    """CoT layer of CoTNet: static context from a convolution over the keys, dynamic context from a filter per pixel.

    (B, dim, H, W) -> (B, dim, H, W), any floating dtype. arXiv:2107.12292, section 3.2; official `CotLayer`, whose
    names the children keep: `key_embed` makes the static context, `embed` the attention (a filter for every pixel, one
    for each dim // 8 groups of channels), `conv1x1` the values, `se` the mixing weights of the two contexts.

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
        _check_dim(type(self).__name__, dim, SHARE_PLANES * self.GROUPS)
        _check_kernel(type(self).__name__, kernel_size, dilation)
        self.dim = dim
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.groups = self.GROUPS
        taps = kernel_size * kernel_size
        num_filters = dim // SHARE_PLANES

        self.key_embed = nn.Sequential(
            nn.Conv2d(
                dim, dim, kernel_size, padding=dilation * (kernel_size // 2), dilation=dilation,
                groups=self.KEY_GROUPS, bias=False, **dd),
            norm_layer(dim, **dd),
            nn.ReLU(inplace=True),
        )
        self.embed = nn.Sequential(
            nn.Conv2d(2 * dim, dim // 2, 1, groups=self.groups, bias=False, **dd),
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
        static, dynamic = self.contexts(x)
        attn = self.se(pool_contexts(dynamic, static))  # (B, 2 * dim, 1, 1)
        return mix_contexts(dynamic, static, attn)

    def contexts(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """The static and the dynamic context of x before they are mixed, (B, dim, H, W) each."""
        static = self.key_embed(x)
        filters = self.embed(self._concatenate(x, static))  # (B, dim // 8 * k * k, H, W)
        value = self.conv1x1(x)
        dynamic = grouped_local_conv(value, filters, self.kernel_size, self.dilation, self.groups)
        return static, self.act(self.bn(dynamic))

    def _concatenate(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.cat([query, key], 1)

    def fuse(self) -> nn.Module:
        """The layer with folded batch norms, for evaluation (called by timm's `reparameterize_model`)."""
        return fold_cot_layer(self) if type(self) in (CotLayer, CoxtLayer) else self


@known_as('cot_layer')
class CoxtLayer(CotLayer):
    """CoT layer of CoTNeXt: as `CotLayer`, with two groups in the 1x1 convolutions and eight in the key convolution.

    (B, dim, H, W) -> (B, dim, H, W), dim a multiple of 16. Official `CoXtLayer`.
    """
    KEY_GROUPS = 8
    GROUPS = 2

    def _concatenate(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.stack([query, key], 2).flatten(1, 2)  # channel by channel in turn, so that each group sees both


@known_as('cot_attention')
class CoTAttention(nn.Module):
    """The widely copied stand-alone CoT module, which weighs each pixel by a softmax over the whole image.

    (B, dim, H, W) -> (B, dim, H, W). It differs from the paper's layer: the attention logits of the k * k taps are
    averaged, so there is one weight per pixel and channel. State dict as in the copies found in articles and
    collections of attention modules.

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
            nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=4, bias=False, **dd),
            nn.BatchNorm2d(dim, **dd),
            nn.ReLU(inplace=True),
        )
        self.value_embed = nn.Sequential(
            nn.Conv2d(dim, dim, 1, bias=False, **dd),
            nn.BatchNorm2d(dim, **dd),
        )
        self.attention_embed = nn.Sequential(
            nn.Conv2d(2 * dim, dim // 2, 1, bias=False, **dd),
            nn.BatchNorm2d(dim // 2, **dd),
            nn.ReLU(inplace=True),
            nn.Conv2d(dim // 2, kernel_size * kernel_size * dim, 1, **dd),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        static = self.key_embed(x)
        attn = self.attention_embed(torch.cat([static, x], 1))
        attn = attn.view(B, C, self.kernel_size * self.kernel_size, H, W).mean(2)  # of the taps
        attn = attn.flatten(2).softmax(2).view(B, C, H, W)
        return static + attn.to(static.dtype) * self.value_embed(x)

    def fuse(self) -> nn.Module:
        """The module with folded batch norms, for evaluation (called by timm's `reparameterize_model`)."""
        return fold_attention(self) if type(self) is CoTAttention else self


@known_as('avg_pool')
class AvgPool2d(nn.AvgPool2d):
    """`nn.AvgPool2d` whose gradient is right on a GPU too: (B, C, H, W) -> (B, C, H', W').

    That of PyTorch is silently wrong there for channels-last images with padding, until a fix in 2026
    (https://github.com/pytorch/pytorch/issues/188344). Arguments as those of `nn.AvgPool2d`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(
            x, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override)


def create_cot_layer(
        dim: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
) -> nn.Module:
    """The CoT layer that takes the place of a 3x3 convolution: (B, dim, H, W) -> (B, dim, H', W').

    `CotLayer`, or `CoxtLayer` for a convolution with groups, as in CoTNeXt. A stride is taken by a 3x3 average pool
    before the layer, as in the official blocks. Serves as `self_attn_layer` of timm's ByobNet too.

    Raises:
        ValueError: If dim does not fit: a multiple of 8 is needed, of 16 with groups.
    """
    layer_cls = CotLayer if groups == 1 else CoxtLayer
    layer = layer_cls(dim, dilation=dilation, norm_layer=norm_layer, device=device, dtype=dtype)
    return layer if stride == 1 else nn.Sequential(AvgPool2d(3, stride, padding=1), layer)


def _check_dim(name: str, dim: int, multiple: int) -> None:
    if not isinstance(dim, int) or dim < 1 or dim % multiple != 0:
        raise ValueError(f'{name}: dim is {dim!r}, expected a multiple of {multiple}')


def _check_kernel(name: str, kernel_size: int, dilation: int = 1) -> None:
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'{name}: kernel_size is {kernel_size!r}, expected a positive odd integer')
    if not isinstance(dilation, int) or dilation < 1:
        raise ValueError(f'{name}: dilation is {dilation!r}, expected a positive integer')
