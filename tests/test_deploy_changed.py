"""What `reparameterize_model` makes of networks that were changed before: equal results, whatever was done."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from timm.layers.norm_act import convert_sync_batchnorm
from timm.utils import freeze, reparameterize_model
from torch import nn
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.nn.utils import parametrizations, parametrize, prune

from timm_cotnet import CotBottleneck, CotLayer
from timm_cotnet.deploy import FoldedCotLayer, why_not_folded

from deploy_helpers import check, fold, made, model_of, pictures
from helpers import MODULES, Lora, create, difference, image, norms, plain_wing, shaken


class Doubled(CotLayer):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledBlock(CotBottleneck):
    def forward(self, x):
        return 2 * super().forward(x)


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 1.5 * super().forward(x)


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return 1.5 * super().forward(x)


class ScaledIdentity(nn.Identity):
    def forward(self, x):
        return 1.5 * x


class Quantized(nn.Module):
    """A module between the stubs of eager quantization."""

    def __init__(self, base):
        super().__init__()
        self.quant, self.base, self.dequant = QuantStub(), base, DeQuantStub()

    def forward(self, x):
        return self.dequant(self.base(self.quant(x)))


def replace(module, types, make):
    for name, child in list(module.named_children()):
        if type(child) in types:
            setattr(module, name, make(child))
        else:
            replace(child, types, make)
    return module


def each(model, types, do):
    for child in [m for m in model.modules() if type(m) in types]:
        do(child)
    return model


def with_class(*classes):
    def change(model):
        for module in model.modules():
            for cls in classes:
                if type(module) in cls.__bases__:
                    module.__class__ = cls
        return model
    return change


def circular(conv):
    """As code that makes panoramas does."""
    conv.padding_mode = 'circular'


def norm_without_weight(norm):
    other = nn.BatchNorm2d(norm.num_features, affine=False)
    other.running_mean, other.running_var = norm.running_mean, norm.running_var
    return other


def frozen(model):
    freeze(model)
    return model


CHANGES = {  # name: (change, whether every norm is folded nevertheless)
    'gelu': (lambda m: replace(m, (nn.ReLU,), lambda act: nn.GELU()), True),
    'mish': (lambda m: replace(m, (nn.ReLU, nn.SiLU), lambda act: nn.Mish()), True),
    'identity that scales': (lambda m: replace(m, (nn.ReLU,), lambda act: ScaledIdentity()), True),
    'norm with activation': (lambda m: replace(m, (nn.BatchNorm2d,), lambda n: BatchNormAct2d(n.num_features)), True),
    'norm without weight': (lambda m: replace(m, (nn.BatchNorm2d,), norm_without_weight), True),
    'norm with another eps': (lambda m: each(m, (nn.BatchNorm2d,), lambda norm: setattr(norm, 'eps', 0.1)), True),
    'frozen norms': (lambda m: freeze_batch_norm_2d(m), True),
    'frozen': (frozen, True),
    'SyncBatchNorm': (lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m), True),
    "timm's SyncBatchNorm": (lambda m: convert_sync_batchnorm(m), True),
    'circular': (lambda m: each(m, (nn.Conv2d,), circular), True),
    'spectral norm removed': (lambda m: each(m, (nn.Conv2d,), spectral), True),
    'norms without statistics': (
        lambda m: replace(m, (nn.BatchNorm2d,), lambda n: nn.BatchNorm2d(n.num_features, track_running_stats=False)),
        False),
    'subclass of the layer': (with_class(Doubled), False),
    'subclass of the block': (with_class(DoubledBlock), False),
    'subclass of norms': (with_class(ScaledNorm), False),
    'subclass of convolutions': (with_class(ScaledConv), False),
    'pruned': (lambda m: each(m, (nn.Conv2d,), lambda conv: prune.l1_unstructured(conv, 'weight', 0.5)), False),
    'weight norm by hooks': (lambda m: each(m, (nn.Conv2d,), lambda conv: nn.utils.weight_norm(conv)), False),
    'weight norm': (lambda m: each(m, (nn.Conv2d,), lambda conv: parametrizations.weight_norm(conv)), False),
    'LoRA': (lambda m: replace(m, (nn.Conv2d,), Lora), False),
    'quantization stubs': (lambda m: replace(m, (nn.Conv2d,), Quantized), False),
}


@torch.no_grad()
def settled(module, x):
    """The module in float64 and evaluation; hooks have made its weights once without a graph, so it can be copied."""
    module.double().eval()(x.double())
    return module


def spectral(conv):
    nn.utils.spectral_norm(conv)
    nn.utils.remove_spectral_norm(conv)


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('name', MODULES)
def test_changed_modules(name, change):
    change, all_folded = CHANGES[change]
    module = settled(change(nn.Sequential(create(name))), image(3, MODULES[name][1]))
    folded = reparameterize_model(module)
    for plain in (False, True):
        with plain_wing(plain):
            check(module, folded, image(3, MODULES[name][1]), tolerance=1e-9)
    if all_folded:
        assert not norms(folded)
    check(module, copy.deepcopy(folded), image(3, MODULES[name][1]), tolerance=1e-9)


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('change', CHANGES)
def test_changed_networks(change):
    """Their stem too."""
    change, all_folded = CHANGES[change]
    model = settled(change(shaken(timm.create_model('test_cotnet'))), pictures())
    folded = reparameterize_model(model)
    for plain in (False, True):
        with plain_wing(plain):
            check(model, folded, pictures(), tolerance=1e-9)
    assert not all_folded or not norms(folded)


def test_subclasses_stay():
    for cls, base in ((Doubled, 'CotLayer'), (DoubledBlock, 'CotBottleneck')):
        module = create(base)
        module.__class__ = cls
        assert type(fold(module)) is cls
    block = made('CotBottleneck')
    block.__class__ = DoubledBlock
    assert type(fold(block).conv2) is FoldedCotLayer  # which the block only calls


def test_forward_replaced_on_the_object():
    for name in MODULES:
        module = create(name).eval()
        forward = module.forward
        module.forward = lambda x, forward=forward: 2 * forward(x)
        x = image(2, MODULES[name][1])
        with torch.no_grad():
            expected = module(x)
            folded = reparameterize_model(nn.Sequential(module), inplace=True)[0]
            assert folded is module and difference(folded(x), expected) < 1e-5, name


@torch.no_grad()
def test_forward_replaced_on_a_sequence():
    """Which may leave out a part that folding would put into another."""
    for name, path in (('CotLayer', 'conv1x1'), ('CotLayer', 'se'), ('CoTAttention', 'value_embed'),
                       ('CotBottleneck', 'downsample')):
        module = made(name)
        parts = list(module.get_submodule(path))
        norm = next(i for i, part in enumerate(parts) if isinstance(part, nn.BatchNorm2d))
        module.get_submodule(path).forward = nn.Sequential(*parts[:norm], *parts[norm + 1:]).forward
        x = image(2, MODULES[name][1], dtype=torch.float64)
        expected = module(x)
        folded = reparameterize_model(nn.Sequential(module), inplace=True)
        assert difference(folded(x), expected) < 1e-10, path


def test_pruned_model_goes_on_training():
    model = timm.create_model('test_cotnet').train()
    each(model, (nn.Conv2d,), lambda conv: prune.l1_unstructured(conv, 'weight', 0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = {key: value.clone() for key, value in model.named_buffers() if key.endswith('weight_mask')}
    first = model.layer1[0].conv2.key_embed[0].weight_orig.clone()
    for seed in range(2):
        optimizer.zero_grad()
        x = image(4, 3, 64, 64, memory_format=torch.channels_last, seed=seed)
        F.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
    assert difference(model.layer1[0].conv2.key_embed[0].weight_orig, first) > 1e-6
    copied = copy.deepcopy(settled(model, pictures()))
    check(copied, reparameterize_model(copied), pictures(), tolerance=1e-9)
    each(copied, (nn.Conv2d,), lambda conv: prune.remove(conv, 'weight'))
    folded = reparameterize_model(copied)
    assert not norms(folded)
    check(copied, folded, pictures(), tolerance=1e-9)
    for key, mask in masks.items():
        conv = copied.get_submodule(key.rpartition('.')[0])
        assert (conv.weight[mask == 0] == 0).all() and (conv.weight != 0).float().mean() < 0.51


@pytest.mark.parametrize('name', MODULES)
def test_hooks_go_on_firing(name):
    """On every child in turn: after folding they see what they saw before."""
    module = create(name).double().eval()
    x = image(2, MODULES[name][1], dtype=torch.float64)
    for path, _ in list(module.named_modules()):
        hooked, seen = copy.deepcopy(module), []
        hooked.get_submodule(path).register_forward_hook(
            lambda module, args, out: seen.append((args[0].clone(), out.clone())))
        for child in hooked.modules():
            if hasattr(child, 'inplace'):
                child.inplace = False  # so that what hooks see of inputs stays
        with torch.no_grad():
            expected, before = hooked(x), list(seen)
            seen.clear()
            folded = reparameterize_model(nn.Sequential(hooked), inplace=True)
            assert difference(folded(x), expected) < 1e-10, path
        assert len(seen) == len(before) > 0, path
        for pair in zip(seen, before):
            assert all(difference(after, wanted) < 1e-10 for after, wanted in zip(*pair)), path


def test_hooks_of_a_network_go_on_firing():
    model = model_of('test_cotnet')
    seen = []
    for path in ('conv1', 'bn1', 'conv1.1', 'act1', 'layer1.0.downsample.1', 'layer2.0.conv2.bn', 'layer3', 'layer4.0'):
        model.get_submodule(path).register_forward_hook(
            lambda module, args, out, path=path: seen.append((path, out.clone())))
    with torch.no_grad():
        expected = model(pictures())
        before = list(seen)
        seen.clear()
        folded = reparameterize_model(model, inplace=True)
        assert difference(folded(pictures()), expected) < 1e-10
    assert [path for path, _ in seen] == [path for path, _ in before] and len(seen) == 8
    assert all(difference(after, out) < 1e-10 for (_, after), (_, out) in zip(seen, before))


def test_parts_in_another_mode_stay_in_it():
    """Dropout that samples in evaluation, norms that are frozen in training."""
    module = create('CotLayer').eval()
    module.key_embed[2] = nn.Dropout(0.5)
    module.key_embed[2].train()
    folded = fold(module)
    drops = [m for m in folded.modules() if isinstance(m, nn.Dropout)]
    assert len(drops) == 1 and drops[0].training and not folded.training

    block = create('CotBottleneck').train()
    block.conv2.bn.register_forward_hook(lambda *_: None)  # stays as it is
    block.conv2.bn.eval()
    folded = fold(block)
    assert folded.training and not folded.conv2.bn.training


def test_parametrized_norm_stays():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module = made('CotLayer')
    parametrize.register_parametrization(module.bn, 'weight', Twice())
    folded = fold(module)
    assert type(folded) is CotLayer and norms(folded) == ['bn']
    check(module, folded, image(2, 32))


def test_requires_grad_is_kept():
    module = create('CotBottleneck').eval()
    module.conv2.requires_grad_(False)
    folded = fold(module)
    assert not any(p.requires_grad for p in folded.conv2.parameters())
    assert all(p.requires_grad for p in folded.conv1.parameters())


def test_reason_why_not_folded():
    layer = create('CotLayer')
    assert why_not_folded(layer) is None
    for change, reason in (
            (lambda m: m.register_forward_hook(lambda *_: None), 'hooks watch the layer'),
            (lambda m: m.embed.append(nn.Identity()), 'embed is not as CotLayer made it'),
            (lambda m: m.se.register_forward_hook(lambda *_: None), 'se is not as CotLayer made it'),
            (lambda m: setattr(m, 'conv1x1', nn.Identity()), 'conv1x1 is not as CotLayer made it'),
            (lambda m: m.key_embed.__setitem__(0, Lora(m.key_embed[0])), 'key_embed.0 is a Lora'),
            (lambda m: m.conv1x1.__setitem__(0, nn.Conv2d(32, 32, 3, padding=1)), 'conv1x1.0 is a Conv2d'),
            (lambda m: setattr(m, 'bn', nn.GroupNorm(1, 32)), 'bn is a GroupNorm'),
            (lambda m: m.embed.__setitem__(0, nn.Conv2d(64, 16, 1, groups=2)), 'embed.0 has other groups'),
    ):
        changed = copy.deepcopy(layer)
        change(changed)
        assert reason in why_not_folded(changed)
