"""What `reparameterize_model` makes of CoT blocks: modules for evaluation, with equal results from less work.

Batch norms are folded, and each convolution also applies what follows it. On the CPU these modules run channels-last on
oneDNN's convolutions with fused sums and activations, and on the kernels of `ops/native.c` for what lies between them
(`FusedConv2d.can_run_packed` and `FusedCotLayer.can_run_native` choose). Everywhere else, and for whatever traces,
scripts, compiles or differentiates them, they are plain PyTorch.

Filters are packed again when they change, as told by their address and version; `p.data.mul_()` changes neither. A NaN
may end in oneDNN's ReLU, which makes it zero.
"""
import weakref
from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from .fold import conv_like, fold_norm
from .ops import grouped_local_conv, is_traced, native

_POST_OPS = {nn.Identity: 'none', nn.ReLU: 'relu', nn.SiLU: 'swish'}  # activations that oneDNN fuses
_PACKED = weakref.WeakKeyDictionary()  # of a FusedConv2d: what its packed filters were made for, oneDNN's arguments


class FusedConv2d(nn.Conv2d):
    """act(conv(x) + addend): a folded convolution with what follows it.

    Args:
        conv: Convolution with a bias or without; left as it is.
        act: Activation: `nn.Identity`, `nn.ReLU` or `nn.SiLU`.
    """

    def __init__(self, conv: nn.Conv2d, act: nn.Module):
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, device='meta')
        self.weight, self.bias = conv.weight, conv.bias
        self.act = act
        self.train(conv.training)

    @staticmethod
    def is_fusible(conv: nn.Module, act: nn.Module) -> bool:
        """Whether this class can stand for conv and act."""
        return type(act) in _POST_OPS and type(conv) is nn.Conv2d and conv.padding_mode == 'zeros' \
            and not isinstance(conv.padding, str)

    def forward(
            self,
            x: torch.Tensor,
            addend: Optional[torch.Tensor] = None,
            overwrite: bool = False,
    ) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H', W').

        Args:
            x: Input.
            addend: What is added before the activation, of the result's shape.
            overwrite: Whether the result may take the memory of addend.
        """
        if not torch.jit.is_scripting():
            if self.can_run_packed(x):
                return self._forward_packed(x, addend, overwrite)
        x = self._conv_forward(x, self.weight, self.bias)
        if addend is not None:
            x = x + addend
        return self.act(x)

    @torch.jit.unused
    def can_run_packed(self, x: torch.Tensor) -> bool:
        """Whether oneDNN's fused convolutions do the work for x."""
        return (
            not is_traced(x)
            and x.device.type == 'cpu'
            and torch.backends.mkldnn.is_available()
            and torch._C._get_mkldnn_enabled()
            and x.dtype == self.weight.dtype
            and (x.dtype == torch.float32 or x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
            and x.numel() > 0
            and x.ndim == 4
            and x.shape[1] == self.in_channels
            and not torch.is_grad_enabled()
            and forward_ad._current_level < 0
            and not torch.is_autocast_enabled('cpu')
            and not self.weight.is_inference()  # has no version that would tell of changes
        )

    @torch.jit.unused
    def _forward_packed(self, x: torch.Tensor, addend: Optional[torch.Tensor], overwrite: bool) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        weight = self.weight
        made_for = (x.shape, x.dtype, weight.data_ptr(), weight._version)
        packed = _PACKED.get(self)
        if packed is None or packed[0] != made_for:
            geometry = (self.padding, self.stride, self.dilation, self.groups)
            weight = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.detach().to_mkldnn(), *geometry, x.shape)
            # with the filters themselves: as long as they live, no others can have their address
            _PACKED[self] = packed = (made_for, weight, self.weight.detach())
        args = (packed[1], self.bias, self.padding, self.stride, self.dilation, self.groups)
        act = _POST_OPS[type(self.act)]
        if addend is None:
            return torch.ops.mkldnn._convolution_pointwise(x, *args, act, [], '')
        addend = addend.contiguous(memory_format=torch.channels_last)
        if overwrite:
            return torch.ops.mkldnn._convolution_pointwise_.binary(addend, x, *args, 'add', 1.0, act, [], '')
        return torch.ops.mkldnn._convolution_pointwise.binary(x, addend, *args, 'add', 1.0, act, [], '')


class FusedCotLayer(nn.Module):
    """`CotLayer` or `CoxtLayer` for evaluation: batch norms folded, no concatenation.

    The batch norm after the local convolution goes into the values (its scale) and behind the operator (its shift), as
    the operator is linear in the values. Of the fusion's two logits only the difference is computed. Where there is one
    group, filters come tap by tap, so that neighbours in memory belong to neighbouring channels.

    Args:
        layer: The layer to convert; left as it is.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.kernel_size = layer.kernel_size
        self.dilation = layer.dilation
        self.groups = layer.groups
        self.tap_by_tap = layer.groups == 1

        self.key_embed = FusedConv2d(fold_norm(layer.key_embed[0], layer.key_embed[1]), nn.ReLU(inplace=True))

        query_key, norm = layer.embed[0], layer.embed[1]
        folded = fold_norm(query_key, norm)
        weight_q, weight_k = query_key.query_key_weights()
        scale = (norm.weight if norm.weight is not None else 1) * (norm.running_var + norm.eps).rsqrt()
        scale = scale.view(-1, 1, 1, 1)
        self.query = FusedConv2d(conv_like(query_key, weight_q * scale, folded.bias), nn.Identity())
        self.key = FusedConv2d(conv_like(query_key, weight_k * scale), nn.ReLU(inplace=True))
        attn, group_norm = layer.embed[3], layer.embed[4]
        self.attn = FusedConv2d(
            conv_like(attn, self._reorder(attn.weight), self._reorder(attn.bias)), nn.Identity())
        self.num_filters, self.eps = group_norm.num_groups, group_norm.eps
        requires_grad = attn.weight.requires_grad
        self.attn_scale = nn.Parameter(self._reorder(group_norm.weight).detach().clone(), requires_grad)
        self.attn_shift = nn.Parameter(self._reorder(group_norm.bias).detach().clone(), requires_grad)

        value = fold_norm(layer.conv1x1[0], layer.conv1x1[1])
        bn = layer.bn
        scale = (bn.weight if bn.weight is not None else 1) * (bn.running_var + bn.eps).rsqrt()
        shift = (bn.bias if bn.bias is not None else 0) - bn.running_mean * scale
        self.value = FusedConv2d(
            conv_like(value, value.weight * scale.view(-1, 1, 1, 1), value.bias * scale), nn.Identity())
        self.shift = nn.Parameter(shift.detach().clone(), requires_grad)

        self.se = nn.Sequential(fold_norm(layer.se[0], layer.se[1]), nn.ReLU(inplace=True))
        last = layer.se[3]
        self.se.append(conv_like(last, last.weight[1::2] - last.weight[0::2], last.bias[1::2] - last.bias[0::2]))
        self.train(layer.training)

    def _reorder(self, x: torch.Tensor) -> torch.Tensor:
        """(G * k * k, ...) -> (k * k * G, ...), where filters come tap by tap."""
        if not self.tap_by_tap:
            return x
        return x.unflatten(0, (-1, self.kernel_size * self.kernel_size)).transpose(0, 1).flatten(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        static = self.key_embed(x)
        attn = self.attn(self.key(static, self.query(x), overwrite=True))
        value = self.value(x)
        if not torch.jit.is_scripting():
            if self.can_run_native(value):
                return self._forward_native(value, attn, static)
        return self._forward_plain(value, attn, static)

    def _forward_plain(self, value: torch.Tensor, attn: torch.Tensor, static: torch.Tensor) -> torch.Tensor:
        B, _, H, W = attn.shape
        taps = self.kernel_size * self.kernel_size
        weight, bias = self.attn_scale, self.attn_shift
        if self.tap_by_tap:
            attn = attn.view(B, taps, self.num_filters, H, W).transpose(1, 2).reshape(B, taps * self.num_filters, H, W)
            weight, bias = weight.view(taps, -1).t().reshape(-1), bias.view(taps, -1).t().reshape(-1)
        attn = F.group_norm(attn, self.num_filters, weight, bias, self.eps)
        dynamic = grouped_local_conv(value, attn, self.kernel_size, self.dilation, self.groups)
        dynamic = F.silu(dynamic + self.shift.view(-1, 1, 1))
        gap = dynamic.mean((2, 3), keepdim=True) + static.mean((2, 3), keepdim=True)
        return torch.lerp(dynamic, static.to(dynamic.dtype), self.se(gap).sigmoid().to(dynamic.dtype))

    @torch.jit.unused
    def can_run_native(self, value: torch.Tensor) -> bool:
        """Whether the kernels of `native.c` do what comes behind the convolutions."""
        return (
            self.value.can_run_packed(value)
            and native.why_not_sizes(self.kernel_size, self.num_filters, self.value.out_channels) is None
            and native.why_not_native(value) is None
            and all(p.dtype == value.dtype and p.is_contiguous() for p in self._native_parameters())
        )

    @torch.jit.unused
    def _native_parameters(self) -> List[torch.Tensor]:
        """What the kernels read through pointers."""
        first, last = self.se[0], self.se[2]
        return [self.attn_scale, self.attn_shift, self.shift, first.weight, first.bias, last.weight, last.bias]

    @torch.jit.unused
    def _forward_native(self, value: torch.Tensor, attn: torch.Tensor, static: torch.Tensor) -> torch.Tensor:
        gamma, beta, *others = (p.data_ptr() for p in self._native_parameters())
        parameters = native.Parameters(gamma, beta, self.eps, *others, self.se[2].in_channels)
        return native.fuse_contexts(
            value, attn, static, parameters, self.kernel_size, self.dilation, self.groups, self.tap_by_tap)


class FusedBottleneck(nn.Module):
    """`CotBottleneck` or `SplitAttnBottleneck` for evaluation: folded batch norms, sums and activations fused.

    Args:
        block: The block to convert, whose convolutions have been folded already; left as it is.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.conv1 = FusedConv2d(block.conv1, block.act1)
        self.avd_first, self.conv2, self.avd_last = block.avd_first, block.conv2, block.avd_last
        self.conv3 = FusedConv2d(block.conv3, block.act3)
        self.downsample = None
        if block.downsample is not None:
            layers = _layers(block.downsample)
            self.downsample = nn.Sequential(*layers[:-1], FusedConv2d(layers[-1], nn.Identity()))
        self.train(block.training)

    @staticmethod
    def is_fusible(block: nn.Module) -> bool:
        """Whether this class can stand for block: nothing in it but convolutions, activations and pooling."""
        return (
            FusedConv2d.is_fusible(block.conv1, block.act1)
            and FusedConv2d.is_fusible(block.conv3, block.act3)
            and not isinstance(block.act3, nn.SiLU)  # oneDNN fuses none behind a sum
            and all(isinstance(m, nn.Identity) for m in (block.bn1, block.bn3, block.drop_block))
            and block.se is None
            and block.drop_path is None
            and (block.downsample is None or FusedConv2d.is_fusible(_layers(block.downsample)[-1], nn.Identity()))
        )

    def forward(self, x: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """overwrite: Whether the result may take the memory of x."""
        out = self.avd_last(self.conv2(self.avd_first(self.conv1(x))))
        if self.downsample is not None:
            return self.conv3(out, self.downsample(x), overwrite=True)
        return self.conv3(out, x, overwrite=overwrite)


class FusedStage(nn.Sequential):
    """`FusedBottleneck`s in sequence; on the CPU each but the first writes its result over its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        overwrite = False  # the input of the first block belongs to others
        for block in self:
            x = block(x, overwrite)
            overwrite = not self.is_watched()
        return x

    def is_watched(self) -> bool:
        """Whether a forward hook may have kept what a block or a part of one got or returned."""
        if torch.jit.is_scripting():
            return True
        return self._has_hooks()

    @torch.jit.unused
    def _has_hooks(self) -> bool:
        everywhere = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
        return bool(everywhere) or any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())


class Stage(nn.Sequential):
    """A stage of blocks, which `reparameterize_model` fuses together."""

    def fuse(self) -> nn.Module:
        blocks = [block.fuse() if hasattr(block, 'fuse') else block for block in self]
        fused = all(isinstance(block, FusedBottleneck) for block in blocks)
        return (FusedStage if fused else nn.Sequential)(*blocks)


def _layers(layers: nn.Sequential) -> List[nn.Module]:
    return [layer for layer in layers if not isinstance(layer, nn.Identity)]
