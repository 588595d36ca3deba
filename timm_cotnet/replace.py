"""CoT layers in place of the 3x3 convolutions of any network, as the paper replaces those of ResNet and ResNeXt.

Paper: `Contextual Transformer Networks for Visual Recognition` - https://arxiv.org/abs/2107.12292, section 3.3
timm's `resnet50` becomes `cotnet50`, key for key: its bottlenecks become `CotBottleneck`s, which have no norm and no
activation behind the CoT layer. In blocks of other kinds only the convolution goes.
"""
import copy
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from timm.layers import Conv2dSame, StdConv2d, StdConv2dSame
from timm.models import group_parameters
from timm.models.resnet import Bottleneck
from torch import nn

from .cotnet import CotBottleneck
from .deploy import Stage
from .layers import SHARE_PLANES, AvgPool2d, CotLayer, create_cot_layer
from .ops.watch import are_watched

__all__ = ['Replacements', 'replace_conv3x3']

# What these do to their filters or padding does not outlive them.
_CONVS = (nn.Conv2d, Conv2dSame, StdConv2d, StdConv2dSame)
_FOLDS_ITSELF = ('fuse', 'reparameterize', 'switch_to_deploy')  # what timm's reparameterize_model calls


@dataclass
class Replacements:
    """What `replace_conv3x3` did; printed, a table.

    Attributes:
        replaced: Name of each replaced convolution, and what has taken its place.
        kept: Name of each other convolution with a kernel larger than 1x1 that was chosen, and why it was kept.
        params: Parameters of the network before and after; by name of a replaced convolution, its own.
        macs: Multiply-accumulates of convolutions, linear layers and local convolutions for one image, likewise; empty
            where no input_size was given, and that of the model is not known or cannot be counted with.
    """
    replaced: Dict[str, str]
    kept: Dict[str, str]
    params: Dict[str, Tuple[int, int]] = field(default_factory=dict)
    macs: Dict[str, Tuple[int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        names = {name: name for name in self.replaced} | {'': 'the network'}
        lines = ['| replaced | by | parameters (M) | GMACs |', '| --- | --- | --- | --- |']
        for name, label in names.items():
            columns = (_before_after(self.params.get(name), 1e6), _before_after(self.macs.get(name), 1e9))
            lines.append(f'| {label} | {self.replaced.get(name, "")} | {" | ".join(columns)} |')
        return '\n'.join(lines + _list_kept(self.kept))


def replace_conv3x3(
        model: nn.Module,
        stages: Optional[Sequence[int]] = None,
        where: Optional[Callable[[str, nn.Module], bool]] = None,
        project: bool = False,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        input_size: Optional[Tuple[int, int, int]] = None,
) -> Replacements:
    """Puts CoT layers in the place of 3x3 convolutions, in place, and tells which, which not, and what it costs.

    A convolution becomes `CotLayer`, one with groups `CoxtLayer`; a stride is taken by an average pool before the
    layer. All else keeps its weights; the new layers start as those of CoTNet do. Optimizers, compiled and wrapped
    models come after the replacement.

    Args:
        model: A network of timm, or any other.
        stages: Numbers of the stages to work on, as timm groups them: 1 is the first one, 0 the stem. By default all.
        where: Called with name and module of each convolution in these stages; only where it is true, it is replaced.
        project: Replace convolutions that change the number of channels too, with a 1x1 convolution behind the CoT
            layer, which keeps it. The paper has no such thing.
        norm_layer: What normalizes in the new layers; called with the number of channels.
        input_size: (C, H, W) for which operations are counted; by default that of a timm model.

    Raises:
        ValueError: If stages names one without convolutions, or if nothing can be replaced; says why of each.
        Exception: What norm_layer raises, or a copy of the model run with the given input_size. Whatever is raised,
            the model stays as it was.
    """
    chosen = _chosen(model, stages, where)
    reasons = {name: _why_not(model, name, conv, project) for name, conv in chosen.items()}
    kept = {name: reason for name, reason in reasons.items() if reason is not None}
    names = [name for name in chosen if name not in kept]
    if not names:
        reasons = _list_kept(kept) or ['', 'stages and where choose none that is larger than 1x1.']
        raise ValueError('\n'.join([f'{type(model).__name__}: no convolution can become a CoT layer', *reasons[1:]]))
    layers = {name: _new_layer(model, name, norm_layer) for name in names}
    try:
        macs = _count_macs(model, layers, input_size or _input_size(model))
    except Exception:  # what the model's configuration says is not what it takes, or it does not run on meta
        if input_size is not None:
            raise
        macs = {}
    before = _count_params(model, names)
    _put(model, layers)  # last, so that what fails above leaves the model as it was
    _make_foldable(model)
    after = _count_params(model, names)
    replaced = {name: _describe(chosen[name]) for name in names}
    params = {name: (before[name], after[name]) for name in before}
    return Replacements(replaced, kept, params, macs)


def _chosen(model, stages, where) -> Dict[str, nn.Module]:
    """The convolutions that look at more than one pixel, by name, among those that are asked for."""
    convs = {
        name: module for name, module in model.named_modules()
        if name and isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)}
    if stages is not None:
        if not hasattr(model, 'group_matcher'):
            raise ValueError(f'{type(model).__name__} has no group_matcher that tells stages: choose by where')
        stage_of = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        stage_of = {name: stage_of.get(f'{name}.weight') for name in convs}
        unknown = sorted(set(stages) - set(stage_of.values()))
        if unknown:
            known = sorted({stage for stage in stage_of.values() if stage is not None})
            raise ValueError(f'stages has {unknown}; convolutions larger than 1x1 are in {known} (0 is the stem)')
        convs = {name: conv for name, conv in convs.items() if stage_of[name] in stages}
    return {name: conv for name, conv in convs.items() if where is None or where(name, conv)}


def _why_not(model: nn.Module, name: str, conv: nn.Conv2d, project: bool) -> Optional[str]:
    """The reason why no CoT layer can take the place of conv; None if one can."""
    for ancestor in _ancestors(model, name):
        method = next((method for method in _FOLDS_ITSELF if hasattr(ancestor, method)), None)
        if method is not None:
            return f'belongs to a {type(ancestor).__name__}, whose {method}() reads it'
    if type(conv) not in _CONVS:
        return f'is a {type(conv).__name__}, which may do more than a convolution'
    if conv.kernel_size != (3, 3):
        return f'kernel {conv.kernel_size[0]}x{conv.kernel_size[1]}, a CoT layer takes the place of 3x3'
    if conv.in_channels != conv.out_channels and not project:
        return f'changes channels ({conv.in_channels} to {conv.out_channels}), which a CoT layer keeps (see project)'
    if conv.groups == conv.in_channels:
        return 'depthwise: a CoT layer, which mixes channels, would cost many times as much'
    multiple = SHARE_PLANES if conv.groups == 1 else 2 * SHARE_PLANES
    if conv.in_channels % multiple != 0:
        return f'{conv.in_channels} channels, expected a multiple of {multiple}'
    if conv.stride[0] != conv.stride[1] or conv.dilation[0] != conv.dilation[1]:
        return f'stride {conv.stride} and dilation {conv.dilation}, expected the same for both axes'
    if type(conv) in (nn.Conv2d, StdConv2d) and (
            conv.padding not in (conv.dilation, 'same') or conv.padding_mode != 'zeros'):
        return f'padding {conv.padding} ({conv.padding_mode}), expected zeros that keep the size'
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    if uses[id(conv)] > 1:
        return 'is used in more than one place'
    block = _parent(model, name)[0]
    gone = [conv, block.bn2, block.act2] if _is_bottleneck(block, conv) else [conv]
    if are_watched(gone) or hasattr(conv, 'parametrizations') or _is_bottleneck(block, conv) \
            and are_watched([block], children=False):
        return 'something watches it: a hook, a parametrization or another forward'
    return None


def _is_bottleneck(block: nn.Module, conv: nn.Module) -> bool:
    return type(block) is Bottleneck and block.conv2 is conv and conv.in_channels == conv.out_channels


def _ancestors(model: nn.Module, name: str) -> List[nn.Module]:
    """The modules that hold the one with this name, the innermost first."""
    parts = name.split('.')
    return [model.get_submodule('.'.join(parts[:depth])) for depth in reversed(range(len(parts)))]


def _parent(model: nn.Module, name: str) -> Tuple[nn.Module, str]:
    parent, _, child = name.rpartition('.')
    return model.get_submodule(parent), child


def _new_layer(model: nn.Module, name: str, norm_layer) -> nn.Module:
    """What takes the place of the convolution with this name; the model is left alone."""
    block, child = _parent(model, name)
    conv = getattr(block, child)
    stride = 1 if _is_bottleneck(block, conv) else conv.stride[0]
    layer = create_cot_layer(conv.in_channels, stride, conv.dilation[0], conv.groups, norm_layer)
    if conv.in_channels != conv.out_channels:
        layer = nn.Sequential(layer, nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=conv.bias is not None))
    for module in layer.modules():  # as timm's ResNet does
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
    return layer.to(conv.weight).train(conv.training)


def _put(model: nn.Module, layers: Dict[str, nn.Module]) -> None:
    """Sets the new layers in the places of the convolutions with their names."""
    for name, layer in layers.items():
        block, child = _parent(model, name)
        conv = getattr(block, child)
        if _is_bottleneck(block, conv):
            layer = _cot_bottleneck(block, layer, conv.stride[0])
            block, child = _parent(model, name.rpartition('.')[0])
        setattr(block, child, layer)


def _describe(conv: nn.Conv2d) -> str:
    """A word on what takes the place of conv."""
    words = ['pool'] * (conv.stride[0] > 1) + ['CotLayer' if conv.groups == 1 else 'CoxtLayer']
    return ', '.join(words + ['1x1'] * (conv.in_channels != conv.out_channels))


def _cot_bottleneck(block: Bottleneck, layer: CotLayer, stride: int) -> CotBottleneck:
    made = CotBottleneck(  # all its parts go, so planes need only be a number that a CoT layer takes
        block.conv1.in_channels, block.conv2.in_channels, block.stride, dilation=block.dilation, device='meta')
    for name in ('conv1', 'bn1', 'drop_block', 'act1', 'conv3', 'bn3'):
        setattr(made, name, getattr(block, name))
    for name in ('se', 'act3', 'downsample', 'drop_path'):  # which may be None: deleted first, so that the order stays
        delattr(made, name)
        setattr(made, name, getattr(block, name))
    made.avd_first = (AvgPool2d(3, stride, padding=1) if stride > 1 else nn.Identity()).train(layer.training)
    made.conv2 = layer
    made.avd_last = block.aa
    made.training = block.training  # parts keep their own mode
    return made


def _make_foldable(model: nn.Module) -> None:
    """Stages of nothing but `CotBottleneck`s fold as those of CoTNet do."""
    for module in list(model.modules()):
        for name, stage in module.named_children():
            if type(stage) is nn.Sequential and len(stage) > 0 and not are_watched([stage], children=False) \
                    and all(type(block) is CotBottleneck for block in stage):
                setattr(module, name, Stage(*stage))
                getattr(module, name).training = stage.training


def _input_size(model: nn.Module) -> Optional[Tuple[int, int, int]]:
    size = (getattr(model, 'pretrained_cfg', None) or {}).get('input_size')
    if size is None:
        return None
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return (first.in_channels, *size[1:])


def _count_params(model: nn.Module, names: Sequence[str]) -> Dict[str, int]:
    """Parameters of the modules with these names, and of the network ('')."""
    return {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in ['', *names]}


def _count_macs(model: nn.Module, layers: Dict[str, nn.Module], input_size) -> Dict[str, Tuple[int, int]]:
    """Multiply-accumulates of the network ('') and of what is replaced, before and after; of a copy without memory."""
    if input_size is None:
        return {}
    model, layers = _copy_to_meta(model, layers)
    before = _run(model, list(layers), input_size)
    _put(model, layers)
    after = _run(model, list(layers), input_size)
    return {name: (before[name], after[name]) for name in before}


def _copy_to_meta(model: nn.Module, layers: Dict[str, nn.Module]) -> Tuple[nn.Module, Dict[str, nn.Module]]:
    """Copies on meta, without hooks: what they do when they run leaves no traces in the originals."""
    memo = {}  # of deepcopy: what stands for an object in the copy
    for module in (part for network in (model, *layers.values()) for part in network.modules()):
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = nn.Parameter(tensor.detach().to('meta'), tensor.requires_grad)
            elif isinstance(tensor, torch.Tensor):
                memo[id(tensor)] = tensor.detach().to('meta')
        for name, value in vars(module).items():
            if name.endswith('_hooks') and isinstance(value, OrderedDict):
                memo[id(value)] = OrderedDict()
    return copy.deepcopy((model, layers), memo)


def _run(model: nn.Module, names: Sequence[str], input_size) -> Dict[str, int]:
    """Runs a network on meta; multiply-accumulates of the modules with these names, and of the network ('')."""
    macs = defaultdict(int)

    def count(name, module, out):
        if isinstance(module, nn.Conv2d):
            macs[name] += out.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            macs[name] += out.numel() * module.in_features
        elif isinstance(module, CotLayer):
            macs[name] += out.numel() * module.kernel_size ** 2

    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: count(name, module, out))
        for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear, CotLayer))]
    batch = 2  # norms in training mode refuse a single pixel
    with torch.no_grad():
        model(torch.empty(batch, *input_size, device='meta', dtype=next(model.parameters()).dtype))
    for handle in handles:
        handle.remove()
    return {
        name: sum(n for part, n in macs.items() if not name or f'{part}.'.startswith(f'{name}.')) // batch
        for name in ['', *names]}


def _before_after(counts: Optional[Tuple[int, int]], unit: float) -> str:
    return '' if counts is None else f'{counts[0] / unit:.3f} -> {counts[1] / unit:.3f}'


def _list_kept(kept: Dict[str, str]) -> List[str]:
    """Lines that name the convolutions kept for each reason, at most three of them."""
    by_reason = defaultdict(list)
    for name, reason in kept.items():
        by_reason[reason].append(name)
    lines = [
        f'- {", ".join(names[:3])}{f" and {len(names) - 3} more" if len(names) > 3 else ""}: {reason}'
        for reason, names in by_reason.items()]
    return ['', 'Kept:', *lines] if lines else []
