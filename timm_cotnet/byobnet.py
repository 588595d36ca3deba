"""A hybrid of timm's ByobNet whose self-attention layers are CoT layers, beside those with lambda, halo and BoT layers.

The network is that of timm's `lambda_resnet26t` (`timm/models/byoanet.py`). There are no weights for it. Networks of
your own take the layer in the same way: `ByoModelCfg(..., self_attn_layer=create_cot_layer)`.
"""
from typing import Any, Dict

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg, interleave_blocks

from .layers import create_cot_layer

model_cfgs = dict(
    cot_resnet26t=ByoModelCfg(
        blocks=(
            ByoBlockCfg(type='bottle', d=2, c=256, s=1, gs=0, br=0.25),
            ByoBlockCfg(type='bottle', d=2, c=512, s=2, gs=0, br=0.25),
            interleave_blocks(types=('bottle', 'self_attn'), d=2, c=1024, s=2, gs=0, br=0.25),
            ByoBlockCfg(type='self_attn', d=2, c=2048, s=2, gs=0, br=0.25),
        ),
        stem_chs=64,
        stem_type='tiered',
        stem_pool='maxpool',
        self_attn_layer=create_cot_layer,
    ),
)


def _create_byobnet(variant: str, pretrained: bool = False, **kwargs) -> ByobNet:
    return build_model_with_cfg(
        ByobNet, variant, pretrained,
        model_cfg=model_cfgs[variant],
        feature_cfg=dict(flatten_sequential=True),
        **kwargs)


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 256, 256), 'pool_size': (8, 8), 'min_input_size': (3, 64, 64),
        'crop_pct': 0.95, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1.conv', 'classifier': 'head.fc', 'fixed_input_size': False,
        **kwargs
    }


default_cfgs = generate_default_cfgs({
    'cot_resnet26t.untrained': _cfg(),
})


@register_model
def cot_resnet26t(pretrained=False, **kwargs) -> ByobNet:
    """ResNet-26-T with CoT layers in its last stages. No weights were published."""
    return _create_byobnet('cot_resnet26t', pretrained, **kwargs)
