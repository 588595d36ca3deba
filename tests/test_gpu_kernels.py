"""Triton kernels of whole layers, norms and pools against plain PyTorch in float64; see `triton_helpers.py`."""
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from golden import filled, golden_input, load
from helpers import FORMAT_NAMES, FORMATS, image, shaken, shortcut
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from triton_helpers import DEVICE, INTERPRETED, kernels, passed_in_the_interpreter

from timm_cotnet import CotBottleneck, CotLayer, CoxtLayer, SplitAttnBottleneck
from timm_cotnet.ops.contexts import ContextsSettings
from timm_cotnet.ops.gpu import launch
from timm_cotnet.ops.gpu.contexts import filter_table, tap_by_tap
from timm_cotnet.ops.gpu.norm import norm_act, norm_act_eval
from timm_cotnet.ops.gpu.stand_ins import (
    infer_bottleneck, infer_cot_layer, infer_folded_bottleneck, infer_folded_cot_layer, padded_pool, pool,
    train_bottleneck, train_cot_layer)

# For gradients of a layer, of the norm of all differences; outputs are 16 times closer. In a half type tensors between
# its parts are rounded too, values near zero fall on the other side of a ReLU, and the norm over few pooled images
# makes much of it: plain PyTorch is as far off. The interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.12}
LAYERS = {
    'cot': (CotLayer, dict(dim=16), (4, 4, 3)),
    'cot24': (CotLayer, dict(dim=24), (3, 3, 7)),
    'k5': (CotLayer, dict(dim=16, kernel_size=5), (3, 4, 7)),
    'dilation2': (CotLayer, dict(dim=8, dilation=2), (4, 5, 3)),
    'k1': (CotLayer, dict(dim=8, kernel_size=1), (4, 3, 1)),
    'coxt': (CoxtLayer, dict(dim=32), (3, 4, 3)),
    'coxt_k5_dilation2': (CoxtLayer, dict(dim=16, kernel_size=5, dilation=2), (3, 5, 6)),
}
LAYERS_AND_FORMATS = [
    *((tag, torch.channels_last) for tag in LAYERS), *((tag, torch.contiguous_format) for tag in ('k1', 'coxt'))]
SMALL = {'small_cot': (CotLayer, dict(dim=8), (3, 2, 3)), 'small_coxt': (CoxtLayer, dict(dim=16), (3, 2, 3))}
CONVS = ('key_embed.0.weight', 'embed.0.weight', 'embed.3.weight', 'conv1x1.0.weight')


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """Float32 is that on a GPU too, and each time the same."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason='is already inside')
def test_kernels_in_the_interpreter():
    pytest.importorskip('triton', reason='Triton is not installed')
    if launch._has_old_launcher():
        pytest.skip('written for Triton 3.3 and later, whose interpreter loops between numbers that kernels compute')
    passed, skipped = passed_in_the_interpreter(__file__)
    assert passed >= 120 and skipped == 1  # this test


def create(tag='cot', dtype=torch.float64, memory_format=torch.channels_last, seed=0):
    """A layer, and an x for it."""
    cls, kwargs, (B, H, W) = (LAYERS | SMALL)[tag]
    torch.manual_seed(seed)
    return shaken(cls(**kwargs)).to(DEVICE, dtype), image(B, kwargs['dim'], H, W, memory_format, dtype).to(DEVICE)


def plain(module, x):
    """What the module's own forward gives, whatever could stand in for it."""
    return type(module).forward.__wrapped__(module, x)


def exact(module, x):
    """Both in float64 on the CPU."""
    return copy.deepcopy(module).cpu().double(), x.detach().cpu().double()


def gradient_for(out, seed=2):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors_of(module, x):
    """By name what a gradient is wanted of."""
    tensors = {'x': x.requires_grad_(), **dict(module.named_parameters())}
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


def value_and_grads(run, module, x):
    """Output and gradients, by name, for a gradient that is the same each time."""
    tensors, out = tensors_of(module, x), run(module, x)
    grad = torch.empty_like(out).copy_(gradient_for(out))
    return {'out': out, **dict(zip(tensors, torch.autograd.grad(out, list(tensors.values()), grad)))}


def error(actual, expected):
    """Norm of the difference, relative to that of what is expected."""
    assert actual.shape == expected.shape
    assert expected.norm() > 0
    return ((actual.detach().cpu().double() - expected.detach()).norm() / expected.norm()).item()


def assert_all_close(actual, expected, tolerance, zero=()):
    """Tensors by name; those named zero are that but for rounding."""
    assert list(actual) == list(expected)
    largest = max(tensor.norm() for tensor in expected.values())
    for name in actual:
        if name in zero or expected[name].norm() == 0:
            assert actual[name].norm() <= tolerance * largest, name
        else:
            found = error(actual[name], expected[name])
            assert found <= (tolerance / 16 if name == 'out' else tolerance), f'{name}: relative error {found:.1e}'


def of_zero_gradient(layer):
    """Biases that a norm takes out again."""
    return ('se.0.bias', 'embed.3.bias') if layer.kernel_size == 1 else ('se.0.bias',)


def assert_trains_like_plain(run, module, x, tolerance=None, zero=()):
    """Outputs, gradients and running statistics."""
    tolerance = tolerance or TOLERANCE[x.dtype]
    reference, exact_x = exact(module, x)
    got = value_and_grads(run, module, x)
    assert_all_close(got, value_and_grads(plain, reference, exact_x), tolerance, zero)
    for (name, buffer), expected in zip(module.named_buffers(), reference.buffers()):
        if name.endswith('num_batches_tracked'):
            assert buffer == expected == 1, name
        else:
            assert error(buffer, expected) <= tolerance, name
    return got


# Layers in training


@kernels
@pytest.mark.parametrize('tag, memory_format', LAYERS_AND_FORMATS, ids=str)
def test_train_cot_layer(tag, memory_format):
    layer, x = create(tag, memory_format=memory_format)
    got = assert_trains_like_plain(train_cot_layer, layer, x, zero=of_zero_gradient(layer))
    assert got['out'].is_contiguous(memory_format=memory_format)


@kernels
@pytest.mark.parametrize('tag', ['cot', 'coxt'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_train_cot_layer_in_other_dtypes(dtype, tag):
    layer, x = create(tag, dtype)
    got = assert_trains_like_plain(train_cot_layer, layer, x, zero=of_zero_gradient(layer))
    assert {tensor.dtype for tensor in got.values()} == {dtype}


@kernels
@pytest.mark.parametrize('tag', ['cot', 'coxt'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, tag):
    layer, x = create(tag, torch.float32)

    def run(layer, x):
        with torch.autocast(DEVICE, dtype):
            return train_cot_layer(layer, x)

    got = assert_trains_like_plain(run, layer, x, TOLERANCE[dtype], of_zero_gradient(layer))
    assert got.pop('out').dtype == dtype
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}


@kernels
@pytest.mark.parametrize('tag', SMALL)
def test_programs_that_walk_far(tag, monkeypatch):
    """Each program has several blocks of pixels, as those of large images have, and the last block is not full."""
    walk = launch._walk
    monkeypatch.setattr(
        launch, '_walk', lambda images, pixels, tiles, block_p, programs=0, **blocks:
        walk(images, pixels, tiles, block_p, images * tiles, **blocks))
    caches = launch.over_rows, launch.over_filters
    for cache in caches:
        cache.cache_clear()
    try:
        layer, _ = create(tag)
        x = image(2, layer.dim, 9, 9, torch.channels_last, torch.float64)
        found = launch.image_rows(x, 2)
        assert found.runs == 1 and found.sizes[1] > 2 * found.blocks['BLOCK_P']
        assert 9 * 9 % found.blocks['BLOCK_P'] != 0
        x = x.to(DEVICE)
        assert_trains_like_plain(train_cot_layer, layer, x, zero=of_zero_gradient(layer))
    finally:
        for cache in caches:
            cache.cache_clear()


@kernels
@pytest.mark.parametrize('tag', ['cot_dim64_k3', 'coxt_dim96_k3'])
def test_golden(tag):
    data = load('layers')
    layer = filled((CotLayer if tag.startswith('cot_') else CoxtLayer)(data[f'{tag}_train'].shape[1])).train()
    names, layer = data[f'{tag}_param_names'], layer.to(DEVICE)
    x = golden_input(tuple(data[f'{tag}_train'].shape), 'layer' + tag).to(DEVICE).requires_grad_()
    out = train_cot_layer(layer, x)
    torch.testing.assert_close(out.cpu(), data[f'{tag}_train'], rtol=0, atol=1e-9)
    out.square().mean().backward()
    torch.testing.assert_close(x.grad.cpu(), data[f'{tag}_input_grad'], rtol=0, atol=1e-9)
    norms = torch.stack([layer.get_parameter(name).grad.norm().cpu() for name in names])
    torch.testing.assert_close(norms, data[f'{tag}_param_grad_norms'], rtol=0, atol=1e-9)


def gradients_of_gradients(run, module, x):
    """By name, of x, the parameters and the gradient of the output."""
    tensors, out = tensors_of(module, x), run(module, x)
    grad = torch.empty_like(out).copy_(gradient_for(out)).requires_grad_()
    grads = torch.autograd.grad(out, list(tensors.values()), grad, create_graph=True)
    total = sum((g * gradient_for(g, 3 + i).to(g)).sum() for i, g in enumerate(grads))
    found = torch.autograd.grad(total, [*tensors.values(), grad], allow_unused=True)
    tensors['grad'] = grad
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(tensors.items(), found)}


@kernels
@pytest.mark.parametrize('memory_format', FORMATS, ids=FORMAT_NAMES.get)
@pytest.mark.parametrize('tag', SMALL)
def test_second_derivatives(tag, memory_format):
    layer, x = create(tag, memory_format=memory_format)
    expected = gradients_of_gradients(plain, *exact(layer, x))
    assert_all_close(gradients_of_gradients(train_cot_layer, layer, x), expected, 1e-7, of_zero_gradient(layer))


@kernels
def test_second_derivatives_under_autocast():
    layer, x = create('small_coxt', torch.float32)

    def run(layer, x):
        with torch.autocast(DEVICE, torch.bfloat16):
            return train_cot_layer(layer, x)

    got, expected = gradients_of_gradients(run, layer, x), gradients_of_gradients(plain, *exact(layer, x))
    for name in ('x', 'grad', 'conv1x1.1.bias', 'se.3.weight'):
        assert error(got[name], expected[name]) < TOLERANCE[torch.bfloat16], name


@kernels
def test_many_gradients_at_once():
    layer, x = create('small_cot')
    tensors, out = list(tensors_of(layer, x).values()), train_cot_layer(layer, x)
    grads = torch.stack([gradient_for(out, seed) for seed in (2, 3)]).to(out)
    together = torch.autograd.grad(out, tensors, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for one, of_all in zip(torch.autograd.grad(out, tensors, grad, retain_graph=True), together):
            torch.testing.assert_close(of_all[i], one, rtol=1e-9, atol=1e-9)


@functools.lru_cache(maxsize=None)
def gradients_of_all(tag):
    return value_and_grads(train_cot_layer, *create(tag))


@kernels
@pytest.mark.parametrize('tag, frozen', [
    ('small_cot', ('x', 'embed.0.weight')), ('small_cot', CONVS[2:]),
    *(('small_coxt', frozen) for frozen in [('x',), *((name,) for name in CONVS), ('x', *CONVS)])])
def test_frozen(tag, frozen):
    layer, x = create(tag)
    x.requires_grad_('x' not in frozen)
    for name in set(frozen) - {'x'}:
        layer.get_parameter(name).requires_grad_(False)
    out = train_cot_layer(layer, x)
    out.backward(torch.empty_like(out).copy_(gradient_for(out)))
    grads = {'x': x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    assert {name for name, grad in grads.items() if grad is None} == set(frozen)
    for name, grad in grads.items():
        if grad is not None:
            torch.testing.assert_close(grad, gradients_of_all(tag)[name], rtol=1e-12, atol=1e-12)


@kernels
@pytest.mark.parametrize('memory_format', FORMATS, ids=FORMAT_NAMES.get)
@pytest.mark.parametrize('tag', SMALL)
def test_gradients_lie_like_their_tensors(tag, memory_format):
    layer, x = create(tag, torch.float32, memory_format)
    layer = layer.to(memory_format=memory_format)
    got, tensors = value_and_grads(train_cot_layer, layer, x), tensors_of(layer, x)
    for name, tensor in tensors.items():
        if name != 'x':
            assert got[name].stride() == tensor.stride() and got[name].dtype == tensor.dtype, name


@kernels
def test_deterministic():
    first, second = (value_and_grads(train_cot_layer, *create('small_coxt', torch.float32)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@kernels
def test_hooks_may_change_what_is_saved():
    """Saved tensors come back in another memory format."""
    layer, x = create('small_coxt')
    expected = value_and_grads(train_cot_layer, layer, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        got = value_and_grads(train_cot_layer, layer, x)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@kernels
def test_running_statistics_are_averaged():
    layer, x = create('small_cot')
    reference, exact_x = exact(layer, x)
    for i in range(3):
        train_cot_layer(layer, (i + 1) * x), plain(reference, (i + 1) * exact_x)
    for (name, buffer), expected in zip(layer.named_buffers(), reference.buffers()):
        torch.testing.assert_close(buffer.cpu(), expected, msg=name)
    assert layer.bn.num_batches_tracked == 3


# Statistics of numbers far from zero


@kernels
def test_norm_of_a_large_mean():
    norm, x = create_norm(16, torch.float32), image(2, 16, 9, 7, torch.channels_last) + 1000
    reference, exact_x = exact(norm, x)
    assert error(norm_act(x.to(DEVICE), norm), F.relu(reference(exact_x))) < 1e-3
    assert error(norm.running_var, reference.running_var) < 1e-4


@kernels
def test_filters_of_a_large_mean():
    layer = create(dtype=torch.float32)[0]
    norm, attn = layer.embed[4], layer.embed[3]
    logits = image(2, norm.num_channels, 6, 5) + 1000
    with torch.no_grad():
        attn.bias.mul_(10)  # tells the taps apart
        s = ContextsSettings(3, 1, 1, norm.num_groups)
        ours = tap_by_tap(logits.transpose(0, 1), 3, 1).transpose(0, 1).to(DEVICE)
        ours = ours.contiguous(memory_format=torch.channels_last)
        table, _ = filter_table(ours, attn.bias, norm.weight, norm.bias, s)
        scale, shift = table.double()[:, :2].unsqueeze(-1).unsqueeze(-1).unbind(1)
        got = ours.double() * scale + shift
        exact_norm, exact_bias = copy.deepcopy(norm).cpu().double(), attn.bias.cpu().double().view(-1, 1, 1)
        expected = exact_norm(logits.double() + exact_bias)
    expected = tap_by_tap(expected.transpose(0, 1), 3, 1).transpose(0, 1)
    assert error(got, expected) < 1e-3


@kernels
def test_local_convolution_of_a_large_mean():
    """Filters of one tap, all about one: the norm behind them meets the mean of the values."""
    layer, x = create('k1', torch.float32)
    with torch.no_grad():
        layer.conv1x1[1].weight.fill_(0.2)
        layer.conv1x1[1].bias.fill_(1000)
        layer.embed[4].weight.fill_(1e-5)
        layer.embed[4].bias.fill_(1)
    assert error(train_cot_layer(layer, x), plain(*exact(layer, x))) < 1e-2


# Norms


def create_norm(C=16, dtype=torch.float64):
    torch.manual_seed(0)
    return shaken(nn.BatchNorm2d(C)).to(DEVICE, dtype)


class Tail(nn.Module):
    """A norm and what follows it."""

    def __init__(self, norm, relu, residual):
        super().__init__()
        self.norm, self.relu, self.residual = norm, relu, residual

    def own(self, x):
        out = self.norm(x)
        if self.residual:
            out = out + x[:, :, :1].cos()
        return F.relu(out) if self.relu else out

    def by_kernels(self, x):
        residual = x[:, :, :1].cos().expand_as(x) if self.residual else None
        return (norm_act if self.training else norm_act_eval)(x, self.norm, self.relu, residual)


@kernels
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('C, shape', [(16, (2, 5, 3)), (40, (1, 2, 3)), (9, (3, 1, 1))])
def test_norm_act(C, shape, relu, residual):
    tail, x = Tail(create_norm(C), relu, residual), image(shape[0], C, *shape[1:], dtype=torch.float64).to(DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    reference, exact_x = exact(tail, x)
    got = value_and_grads(Tail.by_kernels, tail, x)
    assert_all_close(got, value_and_grads(Tail.own, reference, exact_x), 1e-9)
    for name, buffer in tail.named_buffers():
        torch.testing.assert_close(buffer.cpu(), reference.get_buffer(name))
    expected = gradients_of_gradients(Tail.own, reference, exact_x)
    assert_all_close(gradients_of_gradients(Tail.by_kernels, tail, x), expected, 1e-7)


@kernels
@pytest.mark.parametrize('memory_format', FORMATS, ids=FORMAT_NAMES.get)
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('residual', [False, True])
def test_norm_act_in_evaluation(residual, dtype, memory_format):
    tail = Tail(create_norm(24), True, residual).eval()
    x = image(2, 24, 3, 5, memory_format, dtype).to(DEVICE)
    residual = image(2, 24, 3, 5, seed=5).to(DEVICE) if residual else None
    with torch.no_grad():
        got = norm_act_eval(x, tail.norm, True, residual)
        exact_norm, exact_x = exact(tail.norm, x)
        expected = exact_norm(exact_x) + (0 if residual is None else residual.cpu().double())
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    assert error(got, F.relu(expected)) < (1e-12 if dtype == torch.float64 else 2 ** -7)


@kernels
def test_norm_act_of_mixed_dtypes():
    """As under autocast: parameters in float32, and a residual in another dtype than x."""
    norm = create_norm(16, torch.float32)
    x = image(2, 16, 4, 3, torch.channels_last, torch.bfloat16).to(DEVICE).requires_grad_()
    residual = image(2, 16, 4, 3, seed=5).to(DEVICE).requires_grad_()
    exact_norm, exact_x = exact(norm, x)
    out = norm_act(x, norm, residual=residual)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    exact_x, exact_residual = exact_x.requires_grad_(), residual.detach().cpu().double().requires_grad_()
    expected = F.relu(exact_norm(exact_x) + exact_residual)
    expected.square().sum().backward()
    assert error(out, expected) < 2 ** -6
    pairs = (x, exact_x), (residual, exact_residual), (norm.weight, exact_norm.weight), (norm.bias, exact_norm.bias)
    for ours, theirs in pairs:
        assert ours.grad.dtype == ours.dtype and error(ours.grad, theirs.grad) < 0.03


@kernels
@pytest.mark.parametrize('training', [False, True])
def test_nan_stays_nan(training):
    norm, x = create_norm(16), image(2, 16, 3, 4, torch.channels_last, torch.float64).to(DEVICE)
    x[1, 3, 2, 1] = float('nan')
    with torch.no_grad():
        out = (norm_act if training else norm_act_eval)(x, norm.train(training))
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[(slice(None), 3) if training else (1, 3, 2, 1)] = True
    assert torch.equal(out.isnan(), expected)


# Blocks, and inference


def create_block(cls, downsample, dtype=torch.float64):
    torch.manual_seed(0)
    if downsample == 'pool':
        block = cls(16, 16, 2, shortcut(16, 64))
    elif downsample == 'stride':
        block = cls(16, 16, 2, nn.Sequential(nn.Conv2d(16, 64, 1, 2, bias=False), nn.BatchNorm2d(64)))
    else:
        block = cls(64, 16)
    x = image(4, 64 if downsample is None else 16, 6, 5, torch.channels_last, dtype)
    return shaken(block).to(DEVICE, dtype), x.to(DEVICE)


BLOCKS = [
    (CotBottleneck, None), (CotBottleneck, 'pool'), (CotBottleneck, 'stride'),
    (functools.partial(CotBottleneck, cardinality=2, base_width=64), 'pool'), (SplitAttnBottleneck, 'pool')]
BLOCK_NAMES = ['cot', 'cot_pool', 'cot_stride', 'coxt_pool', 'split_pool']


@kernels
@pytest.mark.parametrize('cls, downsample', BLOCKS, ids=BLOCK_NAMES)
def test_train_bottleneck(cls, downsample):
    block, x = create_block(cls, downsample)
    names = [name for name, module in block.named_modules() if name == 'conv2.se.0' or name == 'conv2.fc1']
    assert_trains_like_plain(train_bottleneck, block, x, zero=[f'{name}.bias' for name in names])


@kernels
def test_train_bottleneck_of_a_frozen_input():
    block, x = create_block(CotBottleneck, 'pool')
    reference, exact_x = exact(block, x)
    out, expected = train_bottleneck(block, x), plain(reference, exact_x)
    grad = torch.empty_like(out).copy_(gradient_for(out))
    out.backward(grad), expected.backward(grad.cpu())
    assert x.grad is None
    for name, parameter in block.named_parameters():
        if name != 'conv2.se.0.bias':
            assert error(parameter.grad, reference.get_parameter(name).grad) < 1e-9, name


@kernels
@torch.no_grad()
@pytest.mark.parametrize('cls, downsample', BLOCKS, ids=BLOCK_NAMES)
def test_infer_bottleneck(cls, downsample):
    block, x = create_block(cls, downsample)
    assert error(infer_bottleneck(block.eval(), x), plain(*exact(block, x))) < 1e-9


@kernels
@torch.no_grad()
@pytest.mark.parametrize('tag, memory_format', LAYERS_AND_FORMATS, ids=str)
def test_infer_cot_layer(tag, memory_format):
    layer, x = create(tag, memory_format=memory_format)
    expected = plain(*exact(layer.eval(), x))
    out = infer_cot_layer(layer, x)
    assert error(out, expected) < 1e-9 and out.is_contiguous(memory_format=memory_format)
    assert error(infer_cot_layer(layer, x[:1]), expected[:1]) < 1e-9


@kernels
@torch.no_grad()
@pytest.mark.parametrize('tag', ['cot', 'coxt'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infer_cot_layer_in_other_dtypes(dtype, tag):
    layer, x = create(tag, dtype)
    out = infer_cot_layer(layer.eval(), x)
    assert out.dtype == dtype and error(out, plain(*exact(layer, x))) < TOLERANCE[dtype]
    if dtype != torch.float32:
        layer, x = create(tag, torch.float32)
        with torch.autocast(DEVICE, dtype):
            out = infer_cot_layer(layer.eval(), x)
        assert out.dtype == dtype and error(out, plain(*exact(layer, x))) < TOLERANCE[dtype]


@pytest.fixture
def folded_dtype(monkeypatch):
    """The most exact one that cuDNN has fused convolutions for; in the interpreter plain PyTorch stands in for it."""
    if not INTERPRETED:
        return torch.float32
    monkeypatch.setattr(torch, 'cudnn_convolution_relu', lambda x, w, b, *args: F.relu(F.conv2d(x, w, b, *args)))
    monkeypatch.setattr(
        torch, 'cudnn_convolution_add_relu',
        lambda x, w, z, alpha, b, *args: F.relu(F.conv2d(x, w, b, *args) + alpha * z))
    return torch.float64


@kernels
@torch.no_grad()
@pytest.mark.parametrize('tag, memory_format', LAYERS_AND_FORMATS, ids=str)
def test_infer_folded_cot_layer(tag, memory_format, folded_dtype):
    layer, x = create(tag, folded_dtype, memory_format)
    expected = plain(*exact(layer.eval(), x))
    out = infer_folded_cot_layer(layer.fuse(), x)
    assert error(out, expected) < TOLERANCE[folded_dtype] and out.is_contiguous(memory_format=memory_format)


@kernels
@torch.no_grad()
@pytest.mark.parametrize('cls, downsample', BLOCKS, ids=BLOCK_NAMES)
def test_infer_folded_bottleneck(cls, downsample, folded_dtype):
    block, x = create_block(cls, downsample, folded_dtype)
    expected = plain(*exact(block.eval(), x))
    assert error(infer_folded_bottleneck(block.fuse(), x), expected) < TOLERANCE[folded_dtype]


# Pools


def assert_pools_like_plain(module, x, tolerance):
    """Output, gradient and the gradient of that."""
    exact_x = x.detach().cpu().double().requires_grad_()
    expected = nn.AvgPool2d.forward(module, exact_x)
    expected_grad = gradient_for(expected).requires_grad_()
    expected_x_grad, = torch.autograd.grad(expected, exact_x, expected_grad, create_graph=True)
    x = x.detach().requires_grad_()
    out = pool(module, x)
    grad = torch.empty_like(out).copy_(expected_grad.detach()).requires_grad_()
    x_grad, = torch.autograd.grad(out, x, grad, retain_graph=True)
    assert out.dtype == x_grad.dtype == x.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, expected) <= tolerance and error(x_grad, expected_x_grad) <= tolerance
    x_grad, = torch.autograd.grad(out, x, grad, create_graph=True)
    onto = gradient_for(x_grad)
    again, = torch.autograd.grad(x_grad, grad, onto.to(x_grad))
    assert error(again, torch.autograd.grad(expected_x_grad, expected_grad, onto)[0]) <= tolerance


@kernels
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_pool_dtypes(dtype):
    x = image(2, 24, 7, 6, torch.channels_last, dtype).to(DEVICE)
    assert_pools_like_plain(nn.AvgPool2d(3, 2, 1), x, 1e-12 if dtype == torch.float64 else 2 ** -7)


@kernels
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_any_pool(data):
    def size(low, high):
        return data.draw(st.integers(low, high))

    kernel_size, stride = (size(1, 4), size(1, 4)), (size(1, 3), size(1, 3))
    padding = tuple(size(0, k // 2) for k in kernel_size)
    H, W = (size(max(1, k - 2 * p), 9) for k, p in zip(kernel_size, padding))
    x = image(size(1, 2), size(2, 20), H, W, torch.channels_last, torch.float64).to(DEVICE)
    module = nn.AvgPool2d(kernel_size, stride, padding)
    assert_pools_like_plain(module, x, 1e-12)
    torch.testing.assert_close(padded_pool(module, x), pool(module, x), rtol=0, atol=1e-12)


@kernels
def test_padded_pool():
    x = image(2, 8, 7, 6, torch.channels_last, torch.float64).to(DEVICE).requires_grad_()
    module = nn.AvgPool2d(3, 2, (1, 0))
    outs = pool(module, x), padded_pool(module, x)
    torch.testing.assert_close(*outs, rtol=0, atol=1e-12)
    grad = gradient_for(outs[0]).to(DEVICE)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in outs), rtol=0, atol=1e-12)
