"""What `reparameterize_model` makes of CoT blocks: modules for evaluation, with equal results from less work.

Batch norms are folded, and each convolution also applies what follows it. On the CPU these modules run channels-last on
the operators of `ops/folded.py`, which says where (`can_run_packed`, `can_compile_packed`, `why_not_cot_layer`).
Everywhere else, and for whatever traces, scripts, exports or differentiates them, they are plain PyTorch.
"""
from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import nn

from .fold import conv_like, fold_norm, fold_sequential, is_foldable
from .ops import grouped_local_conv, local_conv
from .ops.folded import POST_OPS, CotParameters, CotSettings, can_compile_packed, can_run_packed, conv2d_act, cot_layer
from .ops.folded import why_not_cot_layer
from .ops.watch import are_watched


def _parameters(module: nn.Module, *names: str) -> List[Optional[torch.Tensor]]:
    """Parameters of a module, which its attributes take ten times as long to give."""
    found = module._parameters
    return [found[name] if name in found else getattr(module, name) for name in names or ('weight', 'bias')]


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
        return type(act) in POST_OPS and type(conv) is nn.Conv2d and conv.padding_mode == 'zeros' \
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
            if can_run_packed(x):
                return self.forward_packed(x, addend, overwrite)
            if can_compile_packed(x):
                return self._forward_compiled(x, addend, overwrite)
        x = self._conv_forward(x, self.weight, self.bias)
        if addend is not None:
            x = x + addend
        return self.act(x)

    @torch.jit.unused
    def forward_packed(
            self,
            x: torch.Tensor,
            addend: Optional[torch.Tensor] = None,
            overwrite: bool = False,
    ) -> torch.Tensor:
        """`forward` where `can_run_packed(x)`; with overwrite the result may take the memory of addend."""
        return conv2d_act(
            x, *_parameters(self), addend, self.stride, self.padding, self.dilation, self.groups,
            POST_OPS[type(self._modules['act'])], overwrite)

    @torch.jit.unused
    def _forward_compiled(self, x: torch.Tensor, addend: Optional[torch.Tensor], overwrite: bool) -> torch.Tensor:
        args = (self.stride, self.padding, self.dilation, self.groups, POST_OPS[type(self.act)])
        if addend is not None and overwrite:
            torch.ops.timm_cotnet.conv2d_add_act_(x, self.weight, self.bias, addend, *args)
            return addend
        return torch.ops.timm_cotnet.conv2d_act(x, self.weight, self.bias, addend, *args)


@torch.fx.wrap  # has a branch, which torch.fx cannot trace
def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x, in float32 if it is of a half type."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


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

        self.se_reduce = fold_norm(layer.se[0], layer.se[1])
        last = layer.se[3]
        self.se_expand = conv_like(last, last.weight[1::2] - last.weight[0::2], last.bias[1::2] - last.bias[0::2])
        self.train(layer.training)

    def _reorder(self, x: torch.Tensor) -> torch.Tensor:
        """(G * k * k, ...) -> (k * k * G, ...), where filters come tap by tap."""
        if not self.tap_by_tap:
            return x
        return x.unflatten(0, (-1, self.kernel_size * self.kernel_size)).transpose(0, 1).flatten(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if can_run_packed(x) and not are_watched(list(self._modules.values())):
                return self.forward_packed(x)
            if can_compile_packed(x) and not are_watched(list(self._modules.values())):
                parameters, settings = self._parameters_and_settings()
                if why_not_cot_layer(x, parameters, settings) is None:
                    return torch.ops.timm_cotnet.cot_layer(x, parameters, *settings)
        static = self.key_embed(x)
        return self._fuse_contexts(self.value(x), self.attn(self.key(static, self.query(x))), static)

    @torch.jit.unused
    def forward_packed(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` where `can_run_packed(x)`."""
        parameters, settings = self._parameters_and_settings()
        if why_not_cot_layer(x, parameters, settings) is None:
            return cot_layer(x, parameters, settings)
        static = self.key_embed.forward_packed(x)
        attn = self.key.forward_packed(static, self.query.forward_packed(x), overwrite=True)
        return self._fuse_contexts(self.value.forward_packed(x), self.attn.forward_packed(attn), static)

    @torch.jit.unused
    def _parameters_and_settings(self):
        parts = self._modules
        key_embed = parts['key_embed']
        parameters = CotParameters(
            *_parameters(key_embed), *_parameters(parts['query']), _parameters(parts['key'])[0],
            *_parameters(parts['attn']), *_parameters(parts['value']),
            *_parameters(self, 'attn_scale', 'attn_shift', 'shift'),
            *_parameters(parts['se_reduce']), *_parameters(parts['se_expand']))
        settings = CotSettings(
            self.kernel_size, self.dilation, key_embed.groups, self.groups, self.tap_by_tap, self.eps)
        return parameters, settings

    def _fuse_contexts(self, value: torch.Tensor, attn: torch.Tensor, static: torch.Tensor) -> torch.Tensor:
        if self.tap_by_tap:
            dynamic = local_conv(value, self._norm_filters(attn), self.kernel_size, self.dilation)
        else:
            attn = F.group_norm(attn, self.num_filters, self.attn_scale, self.attn_shift, self.eps)
            dynamic = grouped_local_conv(value, attn, self.kernel_size, self.dilation, self.groups)
        dynamic = F.silu(dynamic + self.shift.view(-1, 1, 1))
        gap = dynamic.mean((2, 3), keepdim=True) + static.mean((2, 3), keepdim=True)
        attn = self.se_expand(F.relu(self.se_reduce(gap))).sigmoid()
        return torch.lerp(dynamic, static.to(dynamic.dtype), attn.to(dynamic.dtype))

    def _norm_filters(self, attn: torch.Tensor) -> torch.Tensor:
        """Group norm of (B, k * k * G, H, W), seen as (B, G, k * k, H, W) without a copy."""
        B, _, H, W = attn.shape
        taps = self.kernel_size * self.kernel_size
        attn = attn.view(B, taps, self.num_filters, H, W)
        var, mean = torch.var_mean(at_least_float32(attn), [1, 3, 4], correction=0, keepdim=True)
        scale = (var + self.eps).rsqrt() * self.attn_scale.view(taps, -1, 1, 1)
        shift = self.attn_shift.view(taps, -1, 1, 1) - mean * scale
        return (attn * scale + shift).to(attn.dtype).transpose(1, 2)


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
        """(B, inplanes, H, W) -> (B, outplanes, H', W').

        With overwrite the result may take the memory of the shortcut, which is x where nothing downsamples it.
        """
        out = self.avd_last(self.conv2(self.avd_first(self.conv1(x))))
        return self.conv3(out, x if self.downsample is None else self.downsample(x), overwrite)

    @torch.jit.unused
    def forward_packed(self, x: torch.Tensor, overwrite: bool) -> torch.Tensor:
        """`forward` where `can_run_packed(x)`; with overwrite the result may take the memory of x."""
        out = self.avd_first(self.conv1.forward_packed(x))
        out = self.conv2.forward_packed(out) if isinstance(self.conv2, FusedCotLayer) else self.conv2(out)
        out = self.avd_last(out)
        if self.downsample is not None:
            x, overwrite = self.downsample(x), True
        return self.conv3.forward_packed(out, x, overwrite)


class FusedStage(nn.Sequential):
    """`FusedBottleneck`s in sequence; on the CPU each but the first writes its result over its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if can_run_packed(x) and not are_watched(list(self._modules.values())):
                return self._forward_packed(x)
            if can_compile_packed(x) and not are_watched(list(self._modules.values())):
                return self._forward_compiled(x)
        for block in self:
            x = block(x)
        return x

    @torch.jit.unused
    def _forward_packed(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self):
            x = block.forward_packed(x, overwrite=i > 0)  # the input of the first block belongs to others
        return x

    @torch.jit.unused
    def _forward_compiled(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self):
            x = block(x, overwrite=i > 0 or block.downsample is not None)
        return x


class Stage(nn.Sequential):
    """A stage of blocks, which `reparameterize_model` fuses together."""

    def fuse(self) -> nn.Module:
        blocks = [block.fuse() if hasattr(block, 'fuse') else block for block in self]
        fused = all(isinstance(block, FusedBottleneck) for block in blocks)
        return (FusedStage if fused else nn.Sequential)(*blocks)


class StemFold:
    """Folds a stem for timm's `reparameterize_model`, which visits a network's children in turn and calls their `fuse`.

    The stem's norm and activation stand beside its convolution in the network, not in one module with it. So each gets
    a method of this object as its `fuse`. The norm folds only if the convolution has been visited before: had it been
    replaced in the network since, the norm would belong to another one. A norm that was itself replaced (by a
    SyncBatchNorm, say) stays, and the activation with it.
    """

    def __init__(self, stem: nn.Module, norm: nn.Module, act: nn.Module):
        self.stem = stem
        self.norm = norm
        self.act = act
        self.conv = None  # the last convolution, once visited
        self.folded = False

    def fuse_stem(self) -> nn.Module:
        if isinstance(self.stem, nn.Sequential):
            fold_sequential(self.stem)
            for i in range(len(self.stem) - 2):
                conv, norm, act = self.stem[i:i + 3]
                if isinstance(norm, nn.Identity) and FusedConv2d.is_fusible(conv, act):
                    self.stem[i], self.stem[i + 2] = FusedConv2d(conv, act), nn.Identity()
            self.stem[-1] = self.conv = self._fusible(self.stem[-1])
            return self.stem
        self.conv = self._fusible(self.stem)
        return self.conv

    @staticmethod
    def _fusible(conv: nn.Module) -> nn.Module:
        act = nn.Identity()
        return FusedConv2d(conv, act) if FusedConv2d.is_fusible(conv, act) else conv

    def fuse_norm(self) -> nn.Module:
        if not (isinstance(self.conv, nn.Conv2d) and is_foldable(self.norm)):
            return self.norm
        folded = fold_norm(self.conv, self.norm)
        self.conv.weight, self.conv.bias = folded.weight, folded.bias
        self.folded = True
        return nn.Identity()

    def fuse_act(self) -> nn.Module:
        if not (self.folded and isinstance(self.conv, FusedConv2d) and type(self.act) in POST_OPS):
            return self.act
        self.conv.act = self.act
        return nn.Identity()


def make_stem_foldable(stem: nn.Module, norm: nn.Module, act: nn.Module) -> None:
    """Let timm's `reparameterize_model` fold a stem (a convolution or a sequence ending in one), its norm and act."""
    fold = StemFold(stem, norm, act)
    stem.fuse = fold.fuse_stem
    norm.fuse = fold.fuse_norm
    act.fuse = fold.fuse_act


def _layers(layers: nn.Sequential) -> List[nn.Module]:
    return [layer for layer in layers if not isinstance(layer, nn.Identity)]
