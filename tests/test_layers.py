"""Layers against numbers of the official implementation, and the ways in which layers are used."""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import filled, golden_input, load
from torch import nn

from timm_cotnet import CoTAttention, CotLayer, CoxtLayer
from timm_cotnet.layers import AvgPool2d
from timm_cotnet.ops import grouped_local_conv

LAYERS = {
    'cot_dim64_k3': lambda: CotLayer(64, 3),
    'coxt_dim96_k3': lambda: CoxtLayer(96, 3),
    'seed_dim64_k3': lambda: CoTAttention(64, 3),
}


@pytest.mark.parametrize('tag', LAYERS)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_golden(tag, memory_format):
    data = load('layers')
    x = golden_input(tuple(data[f'{tag}_eval'].shape), 'layer' + tag).contiguous(memory_format=memory_format)

    layer = filled(LAYERS[tag]()).eval()
    torch.testing.assert_close(layer(x), data[f'{tag}_eval'], rtol=0, atol=1e-9)

    layer = filled(LAYERS[tag]()).train()
    x.requires_grad_()
    out = layer(x)
    torch.testing.assert_close(out, data[f'{tag}_train'], rtol=0, atol=1e-9)
    out.square().mean().backward()
    torch.testing.assert_close(x.grad, data[f'{tag}_input_grad'], rtol=0, atol=1e-9)
    parameters = dict(layer.named_parameters())
    names = data[f'{tag}_param_names']
    assert names == list(parameters)
    norms = torch.stack([parameters[name].grad.norm() for name in names])
    torch.testing.assert_close(norms, data[f'{tag}_param_grad_norms'], rtol=0, atol=1e-9)


def test_article_module_has_the_keys_of_the_article():
    state_dict = CoTAttention(64, 3).state_dict()
    keys = [f'{key}: {list(value.shape)}' for key, value in state_dict.items()]
    assert keys == load('layers')['seed_state_dict_dim64_k3']


@pytest.mark.parametrize('tag', LAYERS)
def test_float32_is_close_to_float64(tag):
    expected = load('layers')[f'{tag}_eval']
    layer = filled(LAYERS[tag]()).float().eval()
    x = golden_input(tuple(expected.shape), 'layer' + tag).float()
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('layer_cls', [CotLayer, CoxtLayer])
@pytest.mark.parametrize('kernel_size, dilation', [(3, 2), (5, 1), (7, 3)])
def test_kernel_size_and_dilation_reach_both_convolutions(layer_cls, kernel_size, dilation):
    layer = layer_cls(32, kernel_size, dilation).eval()
    x = torch.randn(1, 32, 40, 40, requires_grad=True)
    reach = dilation * (kernel_size // 2)
    values = layer.conv1x1(x)
    values.retain_grad()
    attn = torch.randn(1, 4 * kernel_size * kernel_size, 40, 40)
    dynamic = grouped_local_conv(values, attn, kernel_size, dilation, layer.groups)
    (layer.key_embed(x)[0, :, 20, 20].sum() + dynamic[0, :, 20, 20].sum()).backward()
    for grad in (x.grad, values.grad):
        rows = grad.abs().sum((0, 1, 3)).nonzero().flatten()
        assert (rows.min(), rows.max()) == (20 - reach, 20 + reach)


def test_article_module_matches_the_article_formula():
    layer = filled(CoTAttention(16, 5)).eval()
    x = golden_input((2, 16, 6, 5))
    static = layer.key_embed(x)
    logits = layer.attention_embed[:3](torch.cat([static, x], 1))
    last = layer.attention_embed[3]
    logits = F.conv2d(logits, last.weight, last.bias).view(2, 16, 25, 6, 5).mean(2)
    expected = static + logits.flatten(2).softmax(-1).view_as(x) * layer.value_embed(x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


CHILDREN = {  # in the order of the official modules: type, and channels in and out (as multiples of dim)
    'key_embed.0': (nn.Conv2d, 1, 1), 'key_embed.1': (nn.BatchNorm2d, 1, 1), 'key_embed.2': (nn.ReLU, 1, 1),
    'embed.0': (nn.Conv2d, 2, 1 / 2), 'embed.1': (nn.BatchNorm2d, 1 / 2, 1 / 2), 'embed.2': (nn.ReLU, 1 / 2, 1 / 2),
    'embed.3': (nn.Conv2d, 1 / 2, 9 / 8), 'embed.4': (nn.GroupNorm, 9 / 8, 9 / 8),
    'conv1x1.0': (nn.Conv2d, 1, 1), 'conv1x1.1': (nn.BatchNorm2d, 1, 1),
    'bn': (nn.BatchNorm2d, 1, 1), 'act': (nn.SiLU, 1, 1),
    'se.0': (nn.Conv2d, 1, 1 / 2), 'se.1': (nn.BatchNorm2d, 1 / 2, 1 / 2), 'se.2': (nn.ReLU, 1 / 2, 1 / 2),
    'se.3': (nn.Conv2d, 1 / 2, 2),
}
ARTICLE_CHILDREN = {
    'key_embed.0': (nn.Conv2d, 1, 1), 'key_embed.1': (nn.BatchNorm2d, 1, 1), 'key_embed.2': (nn.ReLU, 1, 1),
    'value_embed.0': (nn.Conv2d, 1, 1), 'value_embed.1': (nn.BatchNorm2d, 1, 1),
    'attention_embed.0': (nn.Conv2d, 2, 1 / 2), 'attention_embed.1': (nn.BatchNorm2d, 1 / 2, 1 / 2),
    'attention_embed.2': (nn.ReLU, 1 / 2, 1 / 2), 'attention_embed.3': (nn.Conv2d, 1 / 2, 9),
}


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('tag', LAYERS)
def test_children_are_the_official_ones_and_see_what_those_see(tag, training):
    layer = LAYERS[tag]().train(training)
    expected = ARTICLE_CHILDREN if tag.startswith('seed') else CHILDREN
    leaves = {name: module for name, module in layer.named_modules() if not list(module.children()) and name}
    assert {name: type(module) for name, module in leaves.items()} == {name: row[0] for name, row in expected.items()}
    assert list(leaves) == list(expected)
    seen = []
    for name, module in leaves.items():
        module.register_forward_hook(
            lambda module, args, out, name=name: seen.append((name, tuple(args[0].shape), tuple(out.shape))))
    dim = layer.dim
    layer(torch.randn(3, dim, 6, 7).contiguous(memory_format=torch.channels_last))
    assert sorted(seen) == sorted(
        (name, *((3, round(dim * part), *((1, 1) if name.startswith('se.') else (6, 7))) for part in (before, after)))
        for name, (_, before, after) in expected.items())


@pytest.mark.parametrize('tag', LAYERS)
def test_attention_sees_the_concatenation(tag):
    layer = filled(LAYERS[tag]()).eval()
    seen = {}
    embed = layer.attention_embed if tag.startswith('seed') else layer.embed
    for name, module in (('keys', layer.key_embed), ('embed', embed)):
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: (args[0], out)}))
    x = golden_input((2, layer.dim, 3, 4))
    layer(x)
    keys = seen['keys'][1]
    both = {
        'cot': lambda: torch.cat([x, keys], 1),
        'coxt': lambda: torch.stack([x, keys], 2).flatten(1, 2),
        'seed': lambda: torch.cat([keys, x], 1),
    }[tag.split('_')[0]]()
    assert torch.equal(seen['embed'][0], both) and torch.equal(seen['embed'][1], embed(both))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('tag', LAYERS)
def test_half_types_and_autocast(tag, dtype):
    layer = filled(LAYERS[tag]()).float().eval()
    x = golden_input((2, layer.dim, 7, 6)).float()
    expected = layer(x)
    with torch.autocast('cpu', dtype):
        out = layer(x)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.1)
    out = layer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize('layer_cls, kwargs, message', [
    (CotLayer, dict(dim=20), 'dim is 20, expected a multiple of 8'),
    (CoxtLayer, dict(dim=24), 'dim is 24, expected a multiple of 16'),
    (CoTAttention, dict(dim=6), 'dim is 6, expected a multiple of 4'),
    (CotLayer, dict(dim=16, kernel_size=4), 'kernel_size is 4, expected a positive odd integer'),
    (CoTAttention, dict(dim=16, kernel_size=2), 'kernel_size is 2, expected a positive odd integer'),
    (CotLayer, dict(dim=16, dilation=0), 'dilation is 0, expected a positive integer'),
    (CotLayer, dict(dim=16.), r'dim is 16\.0, expected a multiple of 8'),
    (CoTAttention, dict(dim='16'), "dim is '16', expected a multiple of 4"),
    (CotLayer, dict(dim=16, kernel_size=3.), r'kernel_size is 3\.0, expected a positive odd integer'),
    (CoxtLayer, dict(dim=16, kernel_size=(3, 3)), r'kernel_size is \(3, 3\), expected a positive odd integer'),
    (CoTAttention, dict(dim=16, kernel_size=1.5), r'kernel_size is 1\.5, expected a positive odd integer'),
    (CotLayer, dict(dim=16, dilation=1.5), r'dilation is 1\.5, expected a positive integer'),
    (CotLayer, dict(dim=16, dilation=(1, 1)), r'dilation is \(1, 1\), expected a positive integer'),
])
def test_wrong_arguments_are_named(layer_cls, kwargs, message):
    with pytest.raises(ValueError, match=message):
        layer_cls(**kwargs)


def test_norm_layer_device_and_dtype():
    layer = CotLayer(16, norm_layer=lambda dim, **dd: nn.GroupNorm(2, dim, **dd), dtype=torch.float64)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in layer.modules())
    assert layer(torch.randn(1, 16, 5, 5, dtype=torch.float64)).dtype == torch.float64
    assert layer.fuse() is layer  # nothing to fold
    assert all(p.is_meta for p in CoxtLayer(32, device='meta').parameters())


@pytest.mark.parametrize('args', [(3, 2, 1), (2,), ((3, 2), (2, 1), (1, 0)), (3, 2, 1, True), (3, 1, 1, False, False)])
def test_average_pool_is_that_of_pytorch(args):
    ours, theirs = AvgPool2d(*args), nn.AvgPool2d(*args)
    assert str(ours) == str(theirs) and ours.state_dict() == {}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 4, 7, 8).contiguous(memory_format=memory_format).requires_grad_()
        out, expected = ours(x), theirs(x)
        assert torch.equal(out, expected) and out.stride() == expected.stride()
        grad = torch.randn(out.shape)
        assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (out, expected)))
    x = torch.randn(2, 4, 7, 8)
    copies = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.jit.script(ours)
    assert all(torch.equal(pool(x), theirs(x)) for pool in copies)


def test_networks_pool_by_it():
    """Where the official ones have a pool before the CoT layer."""
    pools = {
        name: module for name, module in timm.create_model('test_cotnet').named_modules() if name.endswith('avd_first')}
    strided = [module for module in pools.values() if not isinstance(module, nn.Identity)]
    assert len(strided) == 3
    for module in strided:
        assert type(module) is AvgPool2d and (module.kernel_size, module.stride, module.padding) == (3, 2, 1)
