"""Any timm model as a detector's backbone: its four stages, and a feature pyramid on them."""
from typing import Callable, Dict, List, Optional

import timm
import torch
from timm.layers import Format, freeze_batch_norm_2d
from timm.models import FeatureInfo
from torch import nn
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool

from .sync_batch_norm import SyncBatchNorm, convert_sync_batchnorm

__all__ = ['BackboneWithFPN', 'cotnet_fpn_backbone']

NORMS: Dict[str, Optional[Callable[..., nn.Module]]] = {
    'sync': SyncBatchNorm, 'batch': nn.BatchNorm2d, 'frozen': None}
STRIDES = (4, 8, 16, 32)  # of the stages, which torchvision calls layers 1 to 4
OUT_CHANNELS = 256  # of all levels of the pyramid


class BackboneWithFPN(nn.Module):
    """A timm model for features and a feature pyramid, in the place of torchvision's class of this name.

    Args:
        body: What `timm.create_model(..., features_only=True)` returns.
        fpn: Pyramid on the features of `body`.
        out_channels: Channels of all levels of the pyramid.
    """

    def __init__(self, body: nn.Module, fpn: FeaturePyramidNetwork, out_channels: int):
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.out_channels = out_channels
        self.is_channels_last = getattr(body, 'output_fmt', Format.NCHW) == Format.NHWC  # as of transformers

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Levels of the pyramid, finest first, under '0', '1', ..., and those of the extra blocks.

        Args:
            x: Images, (B, 3, H, W).
        """
        features: Dict[str, torch.Tensor] = {}
        for level, feature in enumerate(self.body(x)):
            features[str(level)] = feature.permute(0, 3, 1, 2) if self.is_channels_last else feature
        return self.fpn(features)


def cotnet_fpn_backbone(
        backbone: str = 'cotnet50',
        *,
        pretrained: bool = False,
        trainable_layers: int = 3,
        norm: str = 'sync',
        pyramid_norms: bool = True,
        returned_layers: Optional[List[int]] = None,
        extra_blocks: Optional[ExtraFPNBlock] = None,
) -> BackboneWithFPN:
    """A backbone with a feature pyramid, as in the CoTNet paper's detectors.

    Args:
        backbone: Name of a model as `timm.create_model` takes it.
        pretrained: Whether to load its weights.
        trainable_layers: How many of stages 4, 3, 2, 1 and stem are trained, counted from the last. Parameters and
            norms of the others are frozen.
        norm: Batch norms of what is trained, the pyramid included: 'sync', 'batch', or 'frozen'. With 'frozen', the
            pyramid has biases instead of norms.
        pyramid_norms: Whether the pyramid has norms, else biases, where `norm` is not 'frozen'.
        returned_layers: Stages that the pyramid is built on, by default [1, 2, 3, 4].
        extra_blocks: What adds levels to the pyramid, by default a max-pool of the coarsest.

    Raises:
        ValueError: If an argument is none of these, or the model has no such stages.
    """
    if norm not in NORMS:
        raise ValueError(f'norm is {norm!r}; it may be {", ".join(map(repr, NORMS))}')
    if not 0 <= trainable_layers <= 5:
        raise ValueError(f'trainable_layers is {trainable_layers}; it may be 0 to 5')
    returned_layers = returned_layers or [1, 2, 3, 4]
    if not all(1 <= layer <= 4 for layer in returned_layers):
        raise ValueError(f'returned_layers is {returned_layers}; each may be 1 to 4')

    info = _feature_info(backbone)
    indices = {reduction: index for index, reduction in enumerate(info.reduction())}
    if not indices.keys() >= set(STRIDES):
        raise ValueError(f'{backbone} has features at strides {sorted(indices)}; a pyramid needs those at 4, 8, 16, 32')
    out_indices = [indices[STRIDES[layer - 1]] for layer in sorted(returned_layers)]
    body = timm.create_model(backbone, pretrained=pretrained, features_only=True, out_indices=out_indices)

    _freeze(body, [info[indices[stride]]['module'] for stride in STRIDES], 5 - trainable_layers)
    if norm == 'sync':
        body = convert_sync_batchnorm(body)
    elif norm == 'frozen':
        body = freeze_batch_norm_2d(body)

    fpn = FeaturePyramidNetwork(
        body.feature_info.channels(), OUT_CHANNELS, extra_blocks or LastLevelMaxPool(),
        norm_layer=NORMS[norm] if pyramid_norms else None)
    return BackboneWithFPN(body, fpn, OUT_CHANNELS)


def _feature_info(backbone: str) -> FeatureInfo:
    try:
        with torch.device('meta'):
            return timm.create_model(backbone, features_only=True).feature_info
    except RuntimeError:  # constructors of models of timm 1.0.15 compute with tensors
        return timm.create_model(backbone, features_only=True).feature_info


def _freeze(body: nn.Module, ends: List[str], count: int) -> None:
    """Freezes parameters and norms of the first `count` of stem and stages.

    Args:
        body: Model for features.
        ends: Names of the modules that end the four stages.
        count: How many are frozen.
    """
    modules = dict(body.named_modules())
    ends = [end if end in modules else end.replace('.', '_') for end in ends]  # timm flattens sequences
    frozen = {key for key, stage in _stages(list(body.state_dict()), ends).items() if stage < count}
    for name, parameter in body.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for name, module in modules.items():
        if f'{name}.running_mean' in frozen:
            body.set_submodule(name, freeze_batch_norm_2d(module))


def _stages(keys: List[str], ends: List[str]) -> Dict[str, int]:
    """Stage of each key, 0 for the stem. What lies between the ends of two stages belongs to the second of them."""
    stages, last = {}, 0
    for key in keys:
        inside = [stage for stage, end in enumerate(ends, 1) if key.startswith(f'{end}.')]
        last = inside[0] if inside else last
        stages[key] = last if inside or last == 0 else last + 1
    return stages
