"""What timm's `reparameterize_model` makes of CoT networks: batch norms folded into convolutions, for evaluation.

A norm folds into the convolution before it where both are exactly of a known type and nothing watches them: a
subclass, a hook, a parametrization, an adapter or a quantized module stays as it is, and so do activations of any kind.
Blocks and CoT layers all of whose norms fold become the plain PyTorch modules of this file, which give equal results
from less work. `ops/dispatch.py` says what may stand in for these.
"""
import weakref
from typing import NamedTuple, Optional

import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SplitAttn
from timm.layers.norm_act import SyncBatchNormAct
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from .ops import grouped_local_conv, mix_contexts, pool_contexts
from .ops.dispatch import known_as
from .ops.watch import are_watched

_NORMS = (
    nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)


class Affine(NamedTuple):
    """What a norm does in evaluation: `act(x * scale + shift)`."""
    scale: Tensor  # (C)
    shift: Tensor  # (C)
    act: nn.Module


def affine_of(norm: nn.Module) -> Optional[Affine]:
    """The constant affine map that norm applies in evaluation; None if it is none, or if something watches norm."""
    if type(norm) not in _NORMS or norm.running_mean is None or are_watched([norm]):
        return None
    act = norm.act if hasattr(norm, 'act') else nn.Identity().train(norm.training)
    if type(getattr(norm, 'drop', None)) not in (type(None), nn.Identity):
        act = nn.Sequential(norm.drop, act)
    mean, var = _wide(norm.running_mean), _wide(norm.running_var)
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach()
    return Affine(scale, shift, act)


def _wide(t: Tensor) -> Tensor:
    """In at least float32, as norms compute."""
    return t.detach() if t.dtype == torch.float64 else t.detach().float()


def is_known_conv(conv: nn.Module) -> bool:
    """Whether conv is an `nn.Conv2d` with filters of its own, and nothing watches it."""
    return type(conv) is nn.Conv2d and type(conv._parameters.get('weight')) is nn.Parameter and not are_watched([conv])


def is_pointwise(conv: nn.Module) -> bool:
    """Whether conv is a known 1x1 convolution."""
    return is_known_conv(conv) and conv.kernel_size == conv.stride == (1, 1) and conv.padding in ((0, 0), 'valid')


def conv_like(conv: nn.Conv2d, weight: Tensor, bias: Optional[Tensor] = None) -> nn.Conv2d:
    """A convolution with the geometry of conv and other filters, (out, in // groups, k, k), copied."""
    made = nn.Conv2d(
        weight.shape[1] * conv.groups, weight.shape[0], conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        conv.groups, bias is not None, conv.padding_mode, device='meta')
    for name, value in (('weight', weight), ('bias', bias)):
        if value is not None:
            value = value.detach().to(conv.weight.dtype, copy=True)
            setattr(made, name, nn.Parameter(value, requires_grad=conv.weight.requires_grad))
    return made.train(conv.training)


def fold_norm(conv: nn.Conv2d, affine: Affine) -> nn.Conv2d:
    """A new convolution that computes `conv(x) * scale + shift`."""
    weight = conv.weight.detach() * affine.scale.view(-1, 1, 1, 1)
    bias = affine.shift if conv.bias is None else conv.bias.detach() * affine.scale + affine.shift
    return conv_like(conv, weight, bias)


def fold_pair(parent: nn.Module, conv_name: str, norm_name: str) -> bool:
    """Fold a norm of parent into the convolution before it, whose only reader it is; whether that was possible."""
    conv, affine = getattr(parent, conv_name), affine_of(getattr(parent, norm_name))
    if affine is None or not is_known_conv(conv):
        return False
    setattr(parent, conv_name, fold_norm(conv, affine))
    setattr(parent, norm_name, affine.act)
    return True


def fold_sequential(layers: nn.Module) -> None:
    """Fold each (convolution, norm) pair of an `nn.Sequential` in place; nothing where something watches it."""
    if _is_plain_sequence(layers):
        names = list(layers._modules)
        for conv_name, norm_name in zip(names, names[1:]):
            fold_pair(layers, conv_name, norm_name)


# CoT layers


@known_as('folded_cot_layer')
class FoldedCotLayer(nn.Module):
    """`CotLayer` or `CoxtLayer` with folded batch norms: (B, dim, H, W) -> (B, dim, H, W).

    Query and keys have a convolution each, whose sum is that of the concatenation. The norm behind the local
    convolution has gone into the values (its scale, as the operator is linear in them) and into `shift`. Of the two
    logits of a channel, `se` makes the difference, unless `paired`.

    Args:
        layer: The layer to convert, for which `why_not_folded` is None; left as it is.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.kernel_size = layer.kernel_size
        self.dilation = layer.dilation
        self.groups = layer.groups

        conv, norm, act = layer.key_embed
        affine = affine_of(norm)
        self.key_embed = _sequence(layer.training, fold_norm(conv, affine), affine.act, act)

        conv, norm, act, attn, group_norm = layer.embed
        affine = affine_of(norm)
        folded, dim = fold_norm(conv, affine), conv.in_channels // 2
        if layer.groups == 1:
            query, key = folded.weight[:, :dim], folded.weight[:, dim:]
        else:
            query, key = folded.weight[:, 0::2], folded.weight[:, 1::2]
        self.query = conv_like(conv, query, folded.bias)
        self.key = conv_like(conv, key)
        self.embed = _sequence(layer.training, affine.act, act, attn, group_norm)

        affine, behind = affine_of(layer.conv1x1[1]), affine_of(layer.bn)
        value = fold_norm(layer.conv1x1[0], affine)
        if isinstance(affine.act, nn.Identity):
            scale = behind.scale
            value = conv_like(value, value.weight * scale.view(-1, 1, 1, 1), value.bias * scale)
            self.scale = None
        else:  # the scale cannot pass an activation
            self.scale = nn.Parameter(behind.scale.to(value.weight.dtype, copy=True), value.weight.requires_grad)
        self.value = _one_or_sequence(layer.training, value, affine.act)
        self.shift = nn.Parameter(behind.shift.to(value.weight.dtype, copy=True), value.weight.requires_grad)
        self.act = _one_or_sequence(layer.training, behind.act, layer.act)

        conv, norm, act, last = layer.se
        affine = affine_of(norm)
        self.paired = not is_pointwise(last) or last.groups != 1 or last.out_channels != 2 * layer.dim
        if not self.paired:
            last = _difference(last)
        self.se = _sequence(layer.training, fold_norm(conv, affine), affine.act, act, last)
        self.training = layer.training  # parts keep their own mode

    def forward(self, x: Tensor) -> Tensor:
        static = self.key_embed(x)
        filters = self.embed(self.query(x) + self.key(static))
        dynamic = grouped_local_conv(self.value(x), filters, self.kernel_size, self.dilation, self.groups)
        if self.scale is not None:
            dynamic = dynamic * self.scale.view(-1, 1, 1)
        dynamic = self.act(dynamic + self.shift.view(-1, 1, 1))
        return mix_contexts(dynamic, static, self.se(pool_contexts(dynamic, static)), self.paired)


def _difference(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution for the odd channels of conv less those before them."""
    weight, bias = (None if t is None else _wide(t)[1::2] - _wide(t)[::2] for t in (conv.weight, conv.bias))
    return conv_like(conv, weight, bias)


def why_not_folded(layer: nn.Module) -> Optional[str]:
    """The reason why `FoldedCotLayer` cannot stand for a `CotLayer` or `CoxtLayer`; None if it can."""
    if are_watched([layer], children=False):
        return 'hooks watch the layer, or its forward is another one'
    for name, size in (('key_embed', 3), ('embed', 5), ('conv1x1', 2), ('se', 4)):
        part = getattr(layer, name)
        if not _is_plain_sequence(part) or len(part) != size:
            return f'{name} is not as CotLayer made it, or something watches it'
    convs = {'key_embed.0': layer.key_embed[0], 'se.0': layer.se[0]}
    pointwise = {'embed.0': layer.embed[0], 'conv1x1.0': layer.conv1x1[0]}
    for name, conv in (*convs.items(), *pointwise.items()):
        if not (is_pointwise(conv) if name in pointwise else is_known_conv(conv)):
            return f'{name} is a {type(conv).__name__} that cannot be folded, or something watches it'
    norms = {'key_embed.1': layer.key_embed[1], 'embed.1': layer.embed[1], 'conv1x1.1': layer.conv1x1[1],
             'bn': layer.bn, 'se.1': layer.se[1]}
    for name, norm in norms.items():
        if affine_of(norm) is None:
            return f'{name} is a {type(norm).__name__} that cannot be folded, or something watches it'
    if layer.embed[0].groups != layer.groups or layer.embed[0].in_channels % (2 * layer.groups) != 0:
        return 'embed.0 has other groups than the layer'
    return None


def fold_cot_layer(layer: nn.Module) -> nn.Module:
    """`FoldedCotLayer` where it can be; otherwise the layer itself, with the pairs folded that can be."""
    if why_not_folded(layer) is None:
        return FoldedCotLayer(layer)
    if not are_watched([layer], children=False):
        for part in (layer.key_embed, layer.embed, layer.conv1x1, layer.se):
            fold_sequential(part)
    return layer


@known_as('folded_cot_attention')
class FoldedCotAttention(nn.Module):
    """`CoTAttention` with folded batch norms: (B, dim, H, W) -> (B, dim, H, W).

    The mean over the taps commutes with the 1x1 convolution that makes the logits, so the filters are averaged instead,
    and the k * k times larger logits are never made.

    Args:
        key_embed: Makes the static context.
        value_embed: Makes the values.
        query: 1x1 convolution of the input to dim // 2 channels.
        key: 1x1 convolution of the static context to dim // 2 channels.
        attention_embed: Makes dim logits of the sum of both.
    """

    def __init__(
            self,
            key_embed: nn.Module,
            value_embed: nn.Module,
            query: nn.Module,
            key: nn.Module,
            attention_embed: nn.Module,
    ):
        super().__init__()
        self.key_embed = key_embed
        self.value_embed = value_embed
        self.query = query
        self.key = key
        self.attention_embed = attention_embed

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        static = self.key_embed(x)
        attn = self.attention_embed(self.query(x) + self.key(static))
        attn = attn.flatten(2).softmax(2).view(B, C, H, W)
        return static + attn.to(static.dtype) * self.value_embed(x)


def fold_attention(module: nn.Module) -> nn.Module:
    """A `CoTAttention` with folded norms: `FoldedCotAttention` where it can be, otherwise what pairs can be folded."""
    if are_watched([module], children=False):
        return module
    for part in (module.key_embed, module.value_embed, module.attention_embed):
        fold_sequential(part)
    part = module.attention_embed
    if not _is_plain_sequence(part) or len(part) != 4 \
            or not (is_pointwise(part[0]) and is_pointwise(part[3])) or part[0].groups != 1 or part[3].groups != 1 \
            or not isinstance(part[1], nn.Identity):
        return module
    conv, last, dim = part[0], part[3], module.dim
    mean = conv_like(last, last.weight.unflatten(0, (dim, -1)).mean(1),
                     None if last.bias is None else last.bias.view(dim, -1).mean(1))
    folded = FoldedCotAttention(
        module.key_embed, module.value_embed, conv_like(conv, conv.weight[:, dim:], conv.bias),
        conv_like(conv, conv.weight[:, :dim]), _sequence(module.training, part[1], part[2], mean))
    folded.training = module.training  # parts keep their own mode
    return folded


# Blocks and stem


@known_as('folded_bottleneck')
class FoldedBottleneck(nn.Module):
    """A bottleneck of folded convolutions: (B, inplanes, H, W) -> (B, outplanes, H', W').

    Args:
        block: `CotBottleneck` or `SplitAttnBottleneck` whose convolutions have been folded; left as it is.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.conv1, self.act1 = block.conv1, _one_or_sequence(block.training, block.bn1, block.act1)
        self.avd_first, self.conv2, self.avd_last = block.avd_first, block.conv2, block.avd_last
        self.conv3, self.act3 = block.conv3, block.act3
        self.downsample = block.downsample
        if _is_plain_sequence(block.downsample):
            self.downsample = _sequence(block.downsample.training, *block.downsample)
        self.training = block.training  # parts keep their own mode

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.conv1(x))
        x = self.avd_last(self.conv2(self.avd_first(x)))
        return self.act3(self.conv3(x) + shortcut)


def fold_bottleneck(block: nn.Module) -> nn.Module:
    """A block with folded norms: `FoldedBottleneck` where it can be, otherwise the block itself."""
    if are_watched([block], children=False):
        return block
    folded = [fold_pair(block, 'conv1', 'bn1'), fold_pair(block, 'conv3', 'bn3')]
    fold_sequential(block.downsample)
    if hasattr(block.conv2, 'fuse'):
        block.conv2 = block.conv2.fuse()
    elif type(block.conv2) is SplitAttn and not are_watched([block.conv2], children=False):
        fold_pair(block.conv2, 'conv', 'bn0')
        fold_pair(block.conv2, 'fc1', 'bn1')
    between = (block.bn3, block.drop_block)  # between convolution and sum there must be nothing
    if all(folded) and all(type(m) is nn.Identity and not are_watched([m]) for m in between) \
            and block.se is None and block.drop_path is None:
        return FoldedBottleneck(block)
    return block


@known_as('folded_stage')
class FoldedStage(nn.Sequential):
    """`FoldedBottleneck`s in sequence: (B, inplanes, H, W) -> (B, outplanes, H', W')."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class Stage(nn.Sequential):
    """A stage of blocks, which fold together."""

    def fuse(self) -> nn.Module:
        """The stage with folded batch norms, for evaluation (called by timm's `reparameterize_model`)."""
        for name, block in self._modules.items():
            if hasattr(block, 'fuse'):
                self._modules[name] = block.fuse()
        if are_watched([self], children=False) or any(type(block) is not FoldedBottleneck for block in self):
            return self
        stage = FoldedStage(*self)
        stage.training = self.training
        return stage


class FirstStage(Stage):
    """The first stage of a network, whose folding also folds the stem.

    The stem's norm and convolution are children of the network and no module of their own, and timm asks only the
    children of a network to fold themselves. So the first stage knows its network, which tells it (`of`) whenever it is
    made, copied or unpickled.
    """

    def of(self, network: nn.Module) -> None:
        """Tell the stage its network."""
        self.__dict__['_network'] = weakref.ref(network)

    def fuse(self) -> nn.Module:
        network = self.__dict__.get('_network', lambda: None)()
        if network is not None and network._modules.get('layer1') is self:
            fold_stem(network)
        return super().fuse()

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != '_network'}


@known_as('folded_stem')
class FoldedStem(nn.Sequential):
    """Convolutions with a ReLU behind each: (B, in_chans, H, W) -> (B, C, H', W')."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def fold_stem(network: nn.Module) -> None:
    """Fold `conv1` (a convolution, or a sequence that ends in one), `bn1` and a ReLU of a timm ResNet."""
    if type(network.conv1) is not nn.Sequential:
        fold_pair(network, 'conv1', 'bn1')
        layers = [network.conv1]
    else:
        fold_sequential(network.conv1)
        affine = affine_of(network.bn1)
        if affine is None or not is_known_conv(network.conv1[-1]) or not _is_plain_sequence(network.conv1):
            return
        network.conv1[-1] = fold_norm(network.conv1[-1], affine)
        network.bn1 = affine.act
        layers = network.conv1
    layers = list(_sequence(network.training, *layers, network.bn1, network.act1))
    if all(is_known_conv(m) if i % 2 == 0 else type(m) is nn.ReLU and not are_watched([m])
           for i, m in enumerate(layers)) and len(layers) % 2 == 0:
        network.conv1 = FoldedStem(*layers)
        network.conv1.training = network.training
        network.bn1, network.act1 = (nn.Identity().train(network.training) for _ in range(2))


def _is_plain_sequence(layers: nn.Module) -> bool:
    return type(layers) is nn.Sequential and not are_watched([layers], children=False)


def _sequence(training: bool, *modules: nn.Module) -> nn.Sequential:
    """A sequence of those that do something or are watched, which keep their own modes."""
    sequence = nn.Sequential(*(m for m in modules if type(m) is not nn.Identity or are_watched([m])))
    sequence.training = training
    return sequence


def _one_or_sequence(training: bool, *modules: nn.Module) -> nn.Module:
    """`_sequence`, or the only module of it."""
    sequence = _sequence(training, *modules)
    return sequence[0] if len(sequence) == 1 else sequence
