"""3x3 convolutions that become CoT layers: which, which not and why, and what they compute and cost."""
import copy
import pickle

import pytest
import timm
import torch
from helpers import difference, image, plain_wing, shaken
from timm.models.resnet import Bottleneck, ResNet
from timm.utils import reparameterize_model
from torch import nn

from timm_cotnet import CotBottleneck, CotLayer, CotNet, CoxtLayer, replace_conv3x3
from timm_cotnet.layers import AvgPool2d
from timm_cotnet.published import PUBLISHED

TINY = dict(layers=(1, 2, 1, 1), channels=(16, 32, 48, 64), stem_type='deep', stem_width=16, num_classes=10)
STAGES = (1, 2, 3, 4)


def test_resnet50_becomes_cotnet50():
    model, cotnet = timm.create_model('resnet50'), shaken(timm.create_model('cotnet50'))
    old, weights = model.state_dict(), cotnet.state_dict()
    report = replace_conv3x3(model)
    new = model.state_dict()
    assert [(key, value.shape) for key, value in new.items()] == [(key, value.shape) for key, value in weights.items()]
    assert all(torch.equal(new[key], old[key]) for key in set(new) & set(old))
    assert set(old) - set(new) == {key for key in old if '.conv2.' in key or '.bn2.' in key}
    model.load_state_dict(weights)
    x = image(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), cotnet.eval()(x))

    assert len(report.replaced) == 16 and set(report.kept) == {'conv1'}
    assert report.params[''] == (25557032, PUBLISHED['cotnet50.jd_in1k'].params)
    assert [f'{macs / 1e9:.2f}' for macs in report.macs['']] == ['4.09', '3.24']
    assert report.params['layer4.1.conv2'] == (9 * 512 * 512, sum(p.numel() for p in CotLayer(512).parameters()))
    assert report.macs['layer4.1.conv2'][0] == 9 * 512 * 512 * 49
    text = str(report)
    assert '| layer2.0.conv2 | pool, CotLayer | 0.147 -> 0.105 | 0.116 -> 0.063 |' in text
    assert '| the network |  | 25.557 -> 22.222 | 4.089 -> 3.243 |' in text and '- conv1: kernel 7x7' in text


@pytest.mark.parametrize('kwargs', [
    dict(), dict(cardinality=2, base_width=32), dict(output_stride=8), dict(aa_layer=nn.AvgPool2d),
    dict(drop_path_rate=0.2), dict(block_args=dict(attn_layer='se')), dict(avg_down=True),
], ids=str)
@pytest.mark.parametrize('training', [False, True])
def test_bottlenecks_become_those_of_cotnet(kwargs, training):
    torch.manual_seed(0)
    model, cotnet = ResNet(Bottleneck, **TINY, **kwargs), shaken(CotNet(**TINY, **kwargs)).double().train(training)
    model.eval()
    replace_conv3x3(model, stages=STAGES)
    assert not any(module.training for module in model.modules())
    model.double().train(training).load_state_dict(cotnet.state_dict())
    outs, grads = [], []
    for network in (model, cotnet):
        torch.manual_seed(1)  # of what is dropped
        out = network(image(3, 3, 64, 64, dtype=torch.float64))
        outs.append(out)
        grads.append(torch.autograd.grad(out.square().sum(), list(network.parameters())))
    assert torch.equal(*outs) and all(difference(*pair) < 1e-12 for pair in zip(*grads))
    for (name, buffer), (_, expected) in zip(model.named_buffers(), cotnet.named_buffers()):
        assert torch.equal(buffer, expected), name


def test_kernels_and_folding_are_those_of_cotnet():
    called = []
    for network in (ResNet(Bottleneck, **TINY), CotNet(**TINY)):
        if type(network) is ResNet:
            replace_conv3x3(network, stages=STAGES)
        x = image(2, 3, 64, 64, memory_format=torch.channels_last)
        with plain_wing() as wing:
            network.to(memory_format=torch.channels_last)(x)
            folded = reparameterize_model(network.eval())
            with torch.no_grad():
                folded(x)
            called.append((wing.called, [type(m).__name__ for n, m in folded.named_modules() if n.startswith('layer')]))
    assert called[0] == called[1] and 'FoldedStage' in called[0][1] and 'bottleneck' in called[0][0]


FEW = dict(layers=(1, 1, 1, 1))
FAMILIES = {  # arguments; replaced of all that look at more than a pixel, kind of layer
    'resnet18': ({}, 13, 17, CotLayer), 'resnet50_gn': (FEW, 4, 5, CotLayer),
    'resnext50_32x4d': (FEW, 4, 5, CoxtLayer), 'resnetv2_50': (FEW, 4, 5, CotLayer),
    'resnetv2_50d_gn': (FEW, 5, 7, CotLayer), 'regnety_002': ({}, 7, 14, CoxtLayer),
    'res2net50_48w_2s': (FEW, 4, 5, CotLayer), 'res2net50_26w_4s': (FEW, 6, 13, CotLayer),
    'gernet_s': ({}, 14, 19, CotLayer), 'efficientnetv2_rw_t': ({}, 2, 40, CotLayer),
}


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[pytest.mark.slow] * (kwargs is not FEW)) for name, (kwargs, *_) in FAMILIES.items()])
def test_families(name):
    """All else keeps its weights, gradients reach everything, and folding changes nothing."""
    kwargs, num_replaced, num, layer_cls = FAMILIES[name]
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    old = model.state_dict()
    report = replace_conv3x3(model)
    assert (len(report.replaced), len(report.replaced) + len(report.kept)) == (num_replaced, num)
    assert sum(type(module) is layer_cls for module in model.modules()) == num_replaced
    gone = set(old) - set(model.state_dict())
    with_norms = model.layer1[0].__class__ is CotBottleneck if hasattr(model, 'layer1') else False
    assert {key.rpartition('.')[0] for key in gone if '.bn2.' not in key or not with_norms} == set(report.replaced)
    assert all(torch.equal(value, old[key]) for key, value in model.state_dict().items() if key in old)
    assert report.params[''][1] == sum(p.numel() for p in model.parameters())

    shaken(model)
    model(image(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for module in model.modules():  # what a chain of random layers makes too large for a comparison
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.running_var)
    model.double().eval()
    folded = reparameterize_model(model)
    assert sum(type(module).__name__ == 'FoldedCotLayer' for module in folded.modules()) == num_replaced
    x = image(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert difference(folded(x), model(x)) < 1e-6


def test_stages_and_where():
    model = timm.create_model('resnet50')
    assert set(replace_conv3x3(model, stages=[4]).replaced) == {f'layer4.{i}.conv2' for i in range(3)}
    assert type(model.layer3[0]) is Bottleneck and type(model.layer4[0]) is CotBottleneck
    report = replace_conv3x3(model, stages=[2, 3], where=lambda name, conv: conv.stride == (2, 2))
    assert list(report.replaced) == ['layer2.0.conv2', 'layer3.0.conv2'] and report.kept == {}
    with pytest.raises(ValueError, match=r'stages has \[7\]; .* are in \[0, 1, 2, 3, 4\]'):
        replace_conv3x3(model, stages=[1, 7])
    with pytest.raises(ValueError, match='stages and where choose none'):
        replace_conv3x3(model, where=lambda name, conv: False)
    with pytest.raises(ValueError, match='Sequential has no group_matcher'):
        replace_conv3x3(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)), stages=[1])


@pytest.mark.parametrize('name, message', [
    ('convnext_atto', 'stem.0: kernel 4x4, a CoT layer takes the place of 3x3'),
    ('mobilenetv3_small_050', 'blocks.0.0.conv_dw, .*: depthwise'),
    ('repvgg_a0', r'belongs to a RepVggBlock, whose reparameterize\(\) reads it'),
    ('nf_regnet_b0', 'is a ScaledStdConv2d, which may do more than a convolution'),
    ('tf_efficientnetv2_b0', r'changes channels \(32 to 16\), which a CoT layer keeps \(see project\)'),
    ('test_cotnet', 'belongs to a CotLayer'),
    ('vit_tiny_patch16_224', 'patch_embed.proj: kernel 16x16'),
])
def test_what_cannot_be_replaced_says_why(name, message):
    model = timm.create_model(name)
    before = str(model)
    with pytest.raises(ValueError, match=message):
        replace_conv3x3(model, stages=STAGES if name == 'test_cotnet' else None)
    assert str(model) == before


def _hooked(conv):
    conv.register_forward_hook(lambda *args: None)
    return conv


@pytest.mark.parametrize('conv, reason', [
    (nn.Conv2d(12, 12, 3, padding=1), '12 channels, expected a multiple of 8'),
    (nn.Conv2d(24, 24, 3, padding=1, groups=3), '24 channels, expected a multiple of 16'),
    (nn.Conv2d(16, 16, 3), r'padding (0, 0) (zeros), expected zeros that keep the size'),
    (nn.Conv2d(16, 16, 3, padding=1, dilation=2), 'padding (1, 1) (zeros)'),
    (nn.Conv2d(16, 16, 3, padding=1, padding_mode='reflect'), 'padding (1, 1) (reflect)'),
    (nn.Conv2d(16, 16, 3, (1, 2), padding=1), 'stride (1, 2) and dilation (1, 1), expected the same for both axes'),
    (_hooked(nn.Conv2d(16, 16, 3, padding=1)), 'something watches it'),
    (nn.utils.parametrizations.spectral_norm(nn.Conv2d(16, 16, 3, padding=1)), 'which may do more'),
], ids=str)
def test_convolutions_that_are_kept(conv, reason):
    model = nn.Sequential(conv, nn.Conv2d(conv.out_channels, 16, 1), nn.Conv2d(16, 16, 3, padding=1))
    report = replace_conv3x3(model)
    assert model[0] is conv and reason in report.kept['0'] and set(report.replaced) == {'2'}


def test_shared_convolutions_are_kept():
    conv = nn.Conv2d(16, 16, 3, padding=1)
    report = replace_conv3x3(nn.Sequential(conv, conv, nn.Conv2d(16, 16, 3, padding=1)))
    assert report.kept == {'0': 'is used in more than one place'} and set(report.replaced) == {'2'}


def test_watched_blocks_are_kept():
    model = ResNet(Bottleneck, **TINY)
    model.layer2[0].register_forward_hook(lambda *args: None)
    model.layer3[0].act2.register_forward_hook(lambda *args: None)
    assert {'layer2.0.conv2', 'layer3.0.conv2'} <= set(replace_conv3x3(model).kept)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [(9, 12), (8, 7)])
def test_shapes_modes_and_types_are_those_of_the_convolution(stride, size):
    model = nn.Sequential(nn.Conv2d(32, 32, 3, stride, padding=2, dilation=2, groups=4, bias=False)).double().eval()
    x = image(2, 32, *size, dtype=torch.float64)
    if stride == 1:
        expected = model(x).shape
    else:  # a convolution of dilation one, as the pool has
        expected = nn.functional.conv2d(x, x.new_ones(1, 32, 3, 3), stride=2, padding=1).expand(-1, 32, -1, -1).shape
    report = replace_conv3x3(model)
    assert model(x).shape == expected and model(x).dtype == torch.float64
    assert not any(m.training for m in model[0].modules()) and report.macs == {}
    layer = model[0] if stride == 1 else model[0][1]
    assert type(layer) is CoxtLayer and layer.dilation == 2
    assert stride == 1 or type(model[0][0]) is AvgPool2d


def test_channels_change_by_a_projection():
    model = timm.create_model('tf_efficientnetv2_b0')
    report = replace_conv3x3(model, project=True)
    assert report.replaced['blocks.0.0.conv'] == 'CotLayer, 1x1'
    assert report.replaced['blocks.1.0.conv_exp'] == 'pool, CotLayer, 1x1'
    assert report.kept['conv_stem'] == '3 channels, expected a multiple of 8'
    assert model(image(2, 3, 64, 64)).shape == (2, 1000) and report.macs[''][1] < report.macs[''][0]
    block = ResNet(Bottleneck, **TINY, block_reduce_first=2)
    replace_conv3x3(block, stages=STAGES, project=True)
    assert block(image(2, 3, 64, 64)).shape == (2, 10) and type(block.layer1[0]) is Bottleneck


def test_unknown_input_sizes():
    model = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    model.pretrained_cfg = dict(input_size=(3, 32, 32))
    other = copy.deepcopy(model)
    report = replace_conv3x3(model)
    assert report.macs == {} and '| 2 | CotLayer | 0.002 -> 0.003 |  |' in str(report)
    with pytest.raises(RuntimeError):
        replace_conv3x3(other, input_size=(12, 32, 32))
    assert type(other[2]) is nn.Conv2d
    assert replace_conv3x3(other, input_size=(3, 32, 32)).macs['2'][0] == 9 * 16 * 16 * 16 * 16


def test_input_size_and_norm_layer():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False))
    report = replace_conv3x3(model, norm_layer=lambda dim: nn.GroupNorm(2, dim), input_size=(16, 10, 12))
    assert report.macs[''][0] == 9 * 16 * 16 * 120 and report.params[''][0] == 9 * 16 * 16
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    report = replace_conv3x3(timm.create_model('resnet18', in_chans=1))
    assert report.macs[''][1] < report.macs[''][0]


def test_bottlenecks_of_any_width():
    model = ResNet(Bottleneck, layers=(1, 1, 1, 1), channels=(16, 12, 16, 16), base_width=128)
    report = replace_conv3x3(model)
    assert 'layer2.0.conv2' in report.replaced and model.layer2[0].conv2.dim == 24
    assert model(image(2, 3, 64, 64)).shape == (2, 1000)


class _NarrowNorm(nn.BatchNorm2d):
    """Fails when it is made, or when it runs, for more than 32 channels."""

    def __init__(self, dim, at_once):
        if at_once and dim > 32:
            raise ValueError(f'{dim} channels')
        super().__init__(dim)

    def forward(self, x):
        if x.shape[1] > 32:
            raise ValueError(f'{x.shape[1]} channels')
        return super().forward(x)


@pytest.mark.parametrize('at_once', [True, False])
def test_failures_leave_the_model_as_it_was(at_once):
    model = ResNet(Bottleneck, **TINY)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r'\d+ channels'):
        replace_conv3x3(model, norm_layer=lambda dim: _NarrowNorm(dim, at_once), input_size=(3, 64, 64))
    assert dict(model.named_modules()) == modules


class _Caching(nn.Conv2d):
    """Keeps a tensor of its first call."""
    kept = None

    def forward(self, x):
        if self.kept is None:
            self.kept = torch.ones_like(x)
        return super().forward(x + self.kept)


def test_counting_leaves_no_traces():
    model = nn.Sequential(_Caching(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
    seen = []
    model[2].register_forward_hook(lambda *args: seen.append(args))
    model.register_forward_pre_hook(lambda *args: seen.append(args))
    report = replace_conv3x3(model, input_size=(16, 10, 12))
    assert model[0].kept is None and seen == [] and report.macs['1'][0] == 9 * 16 * 16 * 120
    assert all(tensor.device.type == 'cpu' for tensor in model.state_dict().values())
    model(image(2, 16, 8, 8))
    assert len(seen) == 2 and len(model[1]._forward_hooks) == 0


def test_weights_that_hooks_compute_are_counted():
    model = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(16, 16, 3, padding=1, bias=False))
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    report = replace_conv3x3(model, input_size=(16, 10, 12))
    assert report.macs[''][0] == 10 * 16 * 16 * 120 and model[0].weight.device.type == 'cpu'


class _Raising(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error('cannot run')


@pytest.mark.parametrize('error', [RuntimeError, AssertionError, ValueError, TypeError])
def test_models_that_cannot_be_counted(error):
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), _Raising(error))
    model.pretrained_cfg = dict(input_size=(3, 32, 32))
    with pytest.raises(error, match='cannot run'):
        replace_conv3x3(model, input_size=(16, 32, 32))
    assert type(model[0]) is nn.Conv2d
    report = replace_conv3x3(model)
    assert report.macs == {} and type(model[0]) is CotLayer


@pytest.mark.slow
def test_copies_and_scripts():
    model = shaken(ResNet(Bottleneck, **TINY))
    replace_conv3x3(model, stages=STAGES)
    model.eval()
    x = image(1, 3, 32, 32)
    with torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.jit.script(model)):
            assert difference(other(x), model(x)) < 1e-6
