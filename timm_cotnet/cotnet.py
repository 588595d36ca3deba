"""Contextual Transformer networks: CoTNet, CoTNeXt and SE-CoTNetD.

Paper: `Contextual Transformer Networks for Visual Recognition` - https://arxiv.org/abs/2107.12292
Official code and weights: https://github.com/JDAI-CV/CoTNet, `models/cotnet.py` and `models/cotnet_hybrid.py`

CoTNet and CoTNeXt are ResNet and ResNeXt with a CoT layer in place of each 3x3 convolution. SE-CoTNetD has a deep stem
without a max-pool, strides in its first stage instead, and mixes split-attention with CoT blocks. State dicts agree
with the official ones key for key. Different from there: `output_stride` dilates the CoT layers too, so that receptive
fields stay.
"""
import math
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, Type, Union

import torch
from torch import nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import BlurPool2d, DropPath, SplitAttn, create_aa, create_attn, get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_model_deprecations
from timm.models.resnet import ResNet, downsample_avg, drop_blocks

from .deploy import FirstStage, Stage, fold_bottleneck
from .hub import HUB_NAMESPACE, WEIGHTS_NAME
from .layers import AvgPool2d, CotLayer, CoxtLayer, factory_kwargs
from .ops.dispatch import known_as
from .pretrained import CheckedLoading, build_pretrained, hook_config_loader
from .published import PUBLISHED

__all__ = ['CotBottleneck', 'SplitAttnBottleneck', 'CotNet', 'SeCotNetD']


@known_as('bottleneck')
class CotBottleneck(nn.Module):
    """Bottleneck block whose 3x3 convolution is a CoT layer: `CotLayer`, or `CoxtLayer` where cardinality is 2.

    A stride is taken by a 3x3 average pool before the CoT layer, or by `aa_layer` after it. Official `Bottleneck`
    (`cotnet.py`) and `CoTBottleneck` (`cotnet_hybrid.py`). Arguments as in timm's `Bottleneck`.

    Raises:
        ValueError: If cardinality or reduce_first is one that CoT layers do not have.
    """
    expansion = 4

    def __init__(
            self,
            inplanes: int,
            planes: int,
            stride: int = 1,
            downsample: Optional[nn.Module] = None,
            cardinality: int = 1,
            base_width: int = 64,
            reduce_first: int = 1,
            dilation: int = 1,
            first_dilation: Optional[int] = None,
            act_layer: Type[nn.Module] = nn.ReLU,
            norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
            attn_layer: Optional[Union[str, Type[nn.Module]]] = None,
            aa_layer: Optional[Type[nn.Module]] = None,
            drop_block: Optional[Callable[[], nn.Module]] = None,
            drop_path: Optional[nn.Module] = None,
            device=None,
            dtype=None,
    ):
        dd = factory_kwargs(device, dtype)
        super().__init__()
        if cardinality not in (1, 2):
            raise ValueError(f'cardinality is {cardinality}; CoT layers exist for 1 (CoTNet) and 2 (CoTNeXt)')
        if reduce_first != 1:
            raise ValueError(f'block_reduce_first is {reduce_first}; a CoT layer keeps its width, so it must be 1')
        width = int(math.floor(planes * (base_width / 64)) * cardinality)
        outplanes = planes * self.expansion

        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False, **dd)
        self.bn1 = norm_layer(width, **dd)
        self.drop_block = drop_block() if drop_block is not None else nn.Identity()
        self.act1 = act_layer(inplace=True)

        self.avd_first, self.conv2, self.avd_last = self._spatial_layers(
            width, stride, first_dilation or dilation, cardinality, norm_layer, aa_layer, drop_block, dd)

        self.conv3 = nn.Conv2d(width, outplanes, 1, bias=False, **dd)
        self.bn3 = norm_layer(outplanes, **dd)
        self.se = create_attn(attn_layer, outplanes, **dd)
        self.act3 = act_layer(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self.dilation = dilation
        self.drop_path = drop_path

    @staticmethod
    def _spatial_layers(width, stride, dilation, cardinality, norm_layer, aa_layer, drop_block, dd):
        """What pools before, mixes pixels, and pools after."""
        layer = CotLayer if cardinality == 1 else CoxtLayer
        conv2 = layer(width, kernel_size=3, dilation=dilation, norm_layer=norm_layer, **dd)
        if stride == 1:
            return nn.Identity(), conv2, nn.Identity()
        if aa_layer is None:
            return AvgPool2d(3, stride, padding=1), conv2, nn.Identity()
        return nn.Identity(), conv2, create_aa(aa_layer, channels=width, stride=stride, **dd)

    def zero_init_last(self) -> None:
        """Start the residual branch at zero."""
        if getattr(self.bn3, 'weight', None) is not None:
            nn.init.zeros_(self.bn3.weight)

    def fuse(self) -> nn.Module:
        """The block with folded batch norms, for evaluation (called by timm's `reparameterize_model`)."""
        return fold_bottleneck(self) if type(self) in (CotBottleneck, SplitAttnBottleneck) else self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)

        x = self.avd_first(x)
        x = self.conv2(x)
        x = self.avd_last(x)

        x = self.conv3(x)
        x = self.bn3(x)
        x = self.drop_block(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act3(x)


@known_as('bottleneck')
class SplitAttnBottleneck(CotBottleneck):
    """Bottleneck block with split attention of radix one, the other kind of block in SE-CoTNetD.

    A stride is taken by the convolution, or by `aa_layer` after it. Official `CoTBottleneck`.
    """

    @staticmethod
    def _spatial_layers(width, stride, dilation, cardinality, norm_layer, aa_layer, drop_block, dd):
        pool = stride > 1 and aa_layer is not None
        conv2 = SplitAttn(
            width, width, kernel_size=3, stride=1 if pool else stride, padding=dilation, dilation=dilation,
            groups=cardinality, radix=1, act_layer=nn.SiLU, norm_layer=norm_layer, drop_layer=drop_block, **dd)
        avd_last = create_aa(aa_layer, channels=width, stride=stride, **dd) if pool else nn.Identity()
        return nn.Identity(), conv2, avd_last


class CotResNet(CheckedLoading, ResNet):
    """What both kinds of networks share: timm's ResNet, whose stages fold as a whole, the first with the stem."""

    def _make_foldable(self) -> None:
        for name, cls in (('layer1', FirstStage), ('layer2', Stage), ('layer3', Stage), ('layer4', Stage)):
            setattr(self, name, cls(*getattr(self, name)))
        self.layer1.of(self)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        if isinstance(self.layer1, FirstStage):  # a copy, or unpickled: it has another network now
            self.layer1.of(self)


class CotNet(CotResNet):
    """CoTNet and CoTNeXt: timm's ResNet made of `CotBottleneck`s.

    Args:
        layers: Number of blocks in each of the four stages.
        **kwargs: As for `timm.models.resnet.ResNet`; cardinality 1 gives CoTNet, 2 CoTNeXt.
    """

    def __init__(self, layers: Tuple[int, ...], **kwargs):
        super().__init__(CotBottleneck, layers, **kwargs)
        self._make_foldable()


class SeCotNetD(CotResNet):
    """SE-CoTNetD: split-attention blocks in the first two stages, in turn with CoT blocks in the third, CoT last.

    The stem is three 3x3 convolutions without a max-pool; the first stage has a stride of two instead. Official
    `CoTHybridNet`. Only the constructor differs from timm's ResNet.

    Args:
        layers: Number of blocks in each of the four stages.
        num_classes: Number of classes, 0 for none.
        in_chans: Channels of the input.
        output_stride: 8, 16 or 32.
        global_pool: As for timm's ResNet.
        stem_width: Channels of the stem's first two convolutions; its last one has twice as many.
        act_layer: Activation of the stem and between the blocks' convolutions.
        norm_layer: What normalizes after a convolution.
        aa_layer: Anti-aliased pool that takes the strides of the blocks.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly with depth.
        drop_block_rate: DropBlock rate of the last two stages.
        zero_init_last: Start each residual branch at zero.
        block_args: Further arguments of the blocks.
    """

    def __init__(
            self,
            layers: Tuple[int, ...],
            num_classes: int = 1000,
            in_chans: int = 3,
            output_stride: int = 32,
            global_pool: str = 'avg',
            stem_width: int = 32,
            act_layer: Union[str, Type[nn.Module]] = nn.ReLU,
            norm_layer: Union[str, Callable[..., nn.Module]] = nn.BatchNorm2d,
            aa_layer: Optional[Type[nn.Module]] = None,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            drop_block_rate: float = 0.,
            zero_init_last: bool = True,
            block_args: Optional[Dict[str, Any]] = None,
            device=None,
            dtype=None,
    ):
        dd = factory_kwargs(device, dtype)
        super().__init__(  # stem and classifier; the stages follow
            CotBottleneck,
            (),
            num_classes=num_classes,
            in_chans=in_chans,
            output_stride=output_stride,
            global_pool=global_pool,
            stem_width=stem_width,
            stem_type='deep',
            act_layer=act_layer,
            norm_layer=norm_layer,
            drop_rate=drop_rate,
            **dd,
        )
        self.maxpool = nn.Identity()
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)

        inplanes = 2 * stem_width
        block_kwargs = dict(act_layer=act_layer, norm_layer=norm_layer, aa_layer=aa_layer, **(block_args or {}), **dd)
        net_stride = 2
        dilation = prev_dilation = 1
        num_blocks, block_idx = sum(layers), 0
        stages = zip((64, 128, 256, 512), layers, drop_blocks(drop_block_rate))
        for stage, (planes, depth, drop_block) in enumerate(stages):
            stride = 2 if net_stride < output_stride else 1
            net_stride *= stride
            dilation *= 2 // stride
            outplanes = planes * CotBottleneck.expansion
            downsample = downsample_avg(inplanes, outplanes, 1, stride, dilation, norm_layer=norm_layer, **dd)
            blocks = []
            for i in range(depth):
                block_fn = CotBottleneck if stage == 3 or stage == 2 and i % 2 == 0 else SplitAttnBottleneck
                drop_path = drop_path_rate * block_idx / (num_blocks - 1)
                blocks.append(block_fn(
                    inplanes,
                    planes,
                    stride=stride if i == 0 else 1,
                    downsample=downsample if i == 0 else None,
                    dilation=dilation,
                    first_dilation=prev_dilation,
                    drop_block=drop_block,
                    drop_path=DropPath(drop_path) if drop_path > 0. else None,
                    **block_kwargs,
                ))
                prev_dilation = dilation
                inplanes = outplanes
                block_idx += 1
            self.add_module(f'layer{stage + 1}', nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=outplanes, reduction=net_stride, module=f'layer{stage + 1}'))

        for name in ('global_pool', 'fc'):  # last, as in the official state dict
            self.add_module(name, self._modules.pop(name))
        self._make_foldable()
        self.init_weights(zero_init_last=zero_init_last)


def _create_cotnet(variant: str, pretrained: bool = False, model_cls: Type[ResNet] = CotNet, **kwargs) -> ResNet:
    if pretrained:
        return build_pretrained(model_cls, variant, **kwargs)
    return build_model_with_cfg(model_cls, variant, False, **kwargs)


_create_se_cotnetd = partial(_create_cotnet, model_cls=SeCotNetD)


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc',
        'license': 'apache-2.0', 'origin_url': 'https://github.com/JDAI-CV/CoTNet',
        'paper_name': 'Contextual Transformer Networks for Visual Recognition', 'paper_ids': 'arXiv:2107.12292',
        **kwargs
    }


_cfg_d = partial(_cfg, first_conv='conv1.0')
_cfg_d256 = partial(_cfg_d, input_size=(3, 256, 256), pool_size=(8, 8), crop_pct=0.888)
_cfg_d320 = partial(_cfg_d, input_size=(3, 320, 320), pool_size=(10, 10), crop_pct=0.909)


def _on_hub(cfgs: Dict[str, Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """Adds where the Hub has the published weights."""
    for tag in PUBLISHED:
        cfgs[tag].update(hf_hub_id=f'{HUB_NAMESPACE}/{tag}', hf_hub_filename=WEIGHTS_NAME)
    return cfgs


default_cfgs = generate_default_cfgs(_on_hub({
    'cotnet50.jd_in1k': _cfg(),
    'cotnet101.jd_in1k': _cfg(),
    'cotnext50_2x48d.jd_in1k': _cfg(),
    'cotnext101_2x48d.jd_in1k': _cfg(),
    'se_cotnetd_50.jd_in1k': _cfg_d(),
    'se_cotnetd_101.jd_in1k': _cfg_d(),
    'se_cotnetd_152.jd_in1k': _cfg_d256(),
    'se_cotnetd_152.jd_in1k_320': _cfg_d320(),
    'se_cotnetd_200.untrained': _cfg_d256(),
    'se_cotnetd_270.untrained': _cfg_d256(),
    'test_cotnet.digits': _cfg(
        file=str(Path(__file__).with_name('weights') / 'test_cotnet.digits.safetensors'),
        num_classes=10, input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0, first_conv='conv1.0',
        origin_url='https://scikit-learn.org/stable/datasets/toy_dataset.html#digits-dataset'),
}))


@register_model
def cotnet50(pretrained=False, **kwargs) -> CotNet:
    """CoTNet-50: 22.2 M parameters, 3.2 GMACs at 224 x 224."""
    return _create_cotnet('cotnet50', pretrained, **dict(dict(layers=(3, 4, 6, 3)), **kwargs))


@register_model
def cotnet101(pretrained=False, **kwargs) -> CotNet:
    """CoTNet-101: 38.3 M parameters, 6.1 GMACs at 224 x 224."""
    return _create_cotnet('cotnet101', pretrained, **dict(dict(layers=(3, 4, 23, 3)), **kwargs))


@register_model
def cotnext50_2x48d(pretrained=False, **kwargs) -> CotNet:
    """CoTNeXt-50 (2x48d): 30.0 M parameters, 4.3 GMACs at 224 x 224."""
    model_args = dict(layers=(3, 4, 6, 3), cardinality=2, base_width=48)
    return _create_cotnet('cotnext50_2x48d', pretrained, **dict(model_args, **kwargs))


@register_model
def cotnext101_2x48d(pretrained=False, **kwargs) -> CotNet:
    """CoTNeXt-101 (2x48d): 53.3 M parameters, 8.1 GMACs at 224 x 224."""
    model_args = dict(layers=(3, 4, 23, 3), cardinality=2, base_width=48)
    return _create_cotnet('cotnext101_2x48d', pretrained, **dict(model_args, **kwargs))


@register_model
def se_cotnetd_50(pretrained=False, **kwargs) -> SeCotNetD:
    """SE-CoTNetD-50: 23.1 M parameters, 4.1 GMACs at 224 x 224."""
    return _create_se_cotnetd('se_cotnetd_50', pretrained, **dict(dict(layers=(3, 4, 6, 3)), **kwargs))


@register_model
def se_cotnetd_101(pretrained=False, **kwargs) -> SeCotNetD:
    """SE-CoTNetD-101: 40.9 M parameters, 8.4 GMACs at 224 x 224."""
    model_args = dict(layers=(3, 4, 23, 3), stem_width=64)
    return _create_se_cotnetd('se_cotnetd_101', pretrained, **dict(model_args, **kwargs))


@register_model
def se_cotnetd_152(pretrained=False, **kwargs) -> SeCotNetD:
    """SE-CoTNetD-152: 55.8 M parameters, 16.8 GMACs at 256 x 256, 26.3 at 320 x 320."""
    model_args = dict(layers=(3, 8, 36, 3), stem_width=64, aa_layer=BlurPool2d)
    return _create_se_cotnetd('se_cotnetd_152', pretrained, **dict(model_args, **kwargs))


@register_model
def se_cotnetd_200(pretrained=False, **kwargs) -> SeCotNetD:
    """SE-CoTNetD-200: 60.4 M parameters, 21.4 GMACs at 256 x 256. No weights were published."""
    model_args = dict(layers=(3, 24, 36, 3), stem_width=64, aa_layer=BlurPool2d)
    return _create_se_cotnetd('se_cotnetd_200', pretrained, **dict(model_args, **kwargs))


@register_model
def se_cotnetd_270(pretrained=False, **kwargs) -> SeCotNetD:
    """SE-CoTNetD-270: 83.4 M parameters, 27.6 GMACs at 256 x 256. No weights were published."""
    model_args = dict(layers=(4, 29, 53, 4), stem_width=64, aa_layer=BlurPool2d)
    return _create_se_cotnetd('se_cotnetd_270', pretrained, **dict(model_args, **kwargs))


@register_model
def test_cotnet(pretrained=False, **kwargs) -> CotNet:
    """Tiny CoTNet for tests and demonstrations, with weights inside the package (scikit-learn's digits)."""
    model_args = dict(layers=(1, 1, 1, 1), channels=(16, 32, 48, 64), stem_type='deep', stem_width=16)
    return _create_cotnet('test_cotnet', pretrained, **dict(model_args, **kwargs))


register_model_deprecations(__name__, {
    'se_cotnetd_152_L': 'se_cotnetd_152.jd_in1k_320',  # the official name of the same network at 320 x 320
})

hook_config_loader()
