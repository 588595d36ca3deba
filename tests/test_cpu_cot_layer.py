"""A whole CoT layer in training in C, against its definition in float64; `test_compiled.py` has it in graphs."""
import copy

import pytest
import torch
from helpers import FORMATS, difference, image, maps_group_norm, needs_kernels, shaken

from timm_cotnet import CotLayer, CoxtLayer
from timm_cotnet.ops import conditions
from timm_cotnet.ops.cot_layer import cot_layer, parameters_of, settings_of

pytestmark = needs_kernels
# batches are not tiny, as the norm of the mix, which is over pooled images, makes noise of few
LAYERS = [
    (CotLayer, dict(dim=64), (7, 9, 7)), (CotLayer, dict(dim=16, kernel_size=5, dilation=2), (8, 8, 8)),
    (CoxtLayer, dict(dim=96), (6, 6, 5)), (CotLayer, dict(dim=136, kernel_size=7), (6, 5, 6)),
    (CoxtLayer, dict(dim=32, dilation=3), (9, 1, 4)), (CotLayer, dict(dim=64, dilation=4), (6, 3, 2))]
CONVS = ['key_embed.0.weight', 'embed.0.weight', 'embed.3.weight', 'conv1x1.0.weight']


def create(layer_cls=CotLayer, **kwargs):
    torch.manual_seed(0)
    return shaken(layer_cls(**{'dim': 32, **kwargs})).train()


def picture(layer, B=6, H=4, W=5):
    return image(B, layer.dim, H, W, torch.channels_last).requires_grad_()


def train(layer, x):
    return conditions.cpu.train_cot_layer(layer, x)


def leaves_of(layer, x):
    """By name, but for a bias of `se` that a norm takes out again: its gradient is zero but for rounding."""
    return {'x': x, **{name: p for name, p in layer.named_parameters() if name != 'se.0.bias'}}


def grad_for(x, seed=2):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def gradients(out, layer, x, grad=None, **kwargs):
    leaves = leaves_of(layer, x)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad, **kwargs)))


def assert_all_close(actual, expected, tolerance):
    assert list(actual) == list(expected)
    for name in actual:
        assert difference(actual[name], expected[name]) < tolerance, name


@pytest.mark.parametrize('layer_cls, kwargs, shape', LAYERS)
def test_values_and_gradients(layer_cls, kwargs, shape):
    layer = create(layer_cls, **kwargs)
    x, exact = picture(layer, *shape), copy.deepcopy(layer).double()
    out, exact_x = train(layer, x), x.detach().double().requires_grad_()
    expected = cot_layer(exact_x, *parameters_of(exact), s=settings_of(exact, exact_x))
    assert out.is_contiguous(memory_format=torch.channels_last) and difference(out, expected) < 1e-4
    assert_all_close(
        gradients(out, layer, x, grad_for(x)), gradients(expected, exact, exact_x, grad_for(x).double()), 1e-3)


def test_running_statistics():
    layer = create(CoxtLayer)
    exact = copy.deepcopy(layer).double()
    for factor in (1, 2):
        x = factor * picture(layer)
        train(layer, x).sum().backward()
        exact(x.double())
    for name, statistic in exact.named_buffers():
        assert difference(layer.get_buffer(name), statistic) < 1e-5, name
    assert all(layer.get_buffer(name) == 2 for name, _ in exact.named_buffers() if name.endswith('tracked'))


@pytest.mark.parametrize('layer_cls', [CotLayer, CoxtLayer])
def test_little_is_saved(layer_cls):
    """The input, and what the norms get."""
    layer = create(layer_cls, dim=64)
    out = train(layer, picture(layer, 2, 16, 16))
    saved = sorted(t.shape[1] for t in out.grad_fn.saved_tensors if t.shape[2:] == (16, 16))
    channels, hidden, filters = layer.dim, layer.embed[0].out_channels, layer.embed[4].num_channels
    assert saved == sorted([*3 * [channels], hidden, filters])


def test_second_derivatives():
    layer = create()
    results = []
    for run, dtype in ((train, torch.float32), (lambda layer, x: layer(x), torch.float64)):
        one, x = copy.deepcopy(layer).to(dtype), picture(layer).detach().to(dtype).requires_grad_()
        first = gradients(run(one, x), one, x, grad_for(x).to(dtype), create_graph=True)
        second = gradients(sum(g.square().sum() for g in first.values()), one, x, allow_unused=True)
        results.append((first, {name: g for name, g in second.items() if g is not None}))
    for actual, expected in zip(*results):
        assert_all_close(actual, expected, 1e-3)


@pytest.mark.parametrize('how', ['vmap', 'is_grads_batched'])
def test_many_gradients_at_once(how):
    if not maps_group_norm(backward=True):
        pytest.skip('this PyTorch cannot map the backward of its own group norm of channels-last images')
    layer = create()
    x = picture(layer)
    out = train(layer, x)
    grads = torch.stack([grad_for(x, seed) for seed in range(3)])
    if how == 'vmap':
        batched = torch.vmap(lambda grad: gradients(out, layer, x, grad, retain_graph=True))(grads)
    else:
        batched = gradients(out, layer, x, grads, retain_graph=True, is_grads_batched=True)
    for i, grad in enumerate(grads):
        single = gradients(out, layer, x, grad, retain_graph=True)
        assert_all_close({name: many[i] for name, many in batched.items()}, single, 1e-3)


@pytest.mark.parametrize('layer_cls', [CotLayer, CoxtLayer])
@pytest.mark.parametrize('memory_format', FORMATS)
def test_gradients_have_the_strides_of_their_parameters(memory_format, layer_cls):
    """Distributed training compares them, those of single elements too."""
    layer = create(layer_cls).to(memory_format=memory_format)
    x = picture(layer)
    for name, gradient in gradients(train(layer, x), layer, x, grad_for(x)).items():
        assert gradient.stride() == leaves_of(layer, x)[name].stride(), name


@pytest.mark.parametrize('change, tolerance', [
    (lambda t: t.contiguous(), 1e-6), (lambda t: t.double(), 1e-6), (lambda t: torch.stack([t, t], -1)[..., 0], 1e-6),
    (lambda t: t.bfloat16(), 0.5)], ids=['contiguous', 'double', 'not dense', 'bfloat16'])
def test_saved_tensors_that_hooks_change(change, tolerance):
    layer = create()
    x = picture(layer, 8)
    expected = gradients(train(layer, x), layer, x, grad_for(x))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: change(t.detach()), lambda t: t):
        out = train(layer, x)
    actual = gradients(out, layer, x, grad_for(x))
    assert all(t.dtype == torch.float32 for t in actual.values())
    assert_all_close(actual, expected, tolerance)


def test_autocast_around_the_backward():
    layer = create()
    x = picture(layer)
    expected, out = gradients(train(layer, x), layer, x, grad_for(x)), train(layer, x)
    with torch.autocast('cpu', torch.bfloat16):
        actual = gradients(out, layer, x, grad_for(x))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize('frozen', [('x',), *((name,) for name in CONVS), ('x', *CONVS), ('bn.weight', 'se.0.weight')])
def test_frozen(frozen):
    """Others get none, and gradients do not change; second ones can be taken."""
    layer = create(CoxtLayer)
    x = picture(layer)
    expected, leaves = gradients(train(layer, x), layer, x, grad_for(x)), leaves_of(layer, x)
    for name in frozen:
        leaves[name].requires_grad_(False)
    out = train(layer, x)
    out.backward(grad_for(x), retain_graph=True)
    for name, leaf in leaves.items():
        assert leaf.grad is None if name in frozen else difference(leaf.grad, expected[name]) < 1e-5, name
    first, = torch.autograd.grad(out.square().sum(), layer.bn.bias, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), layer.bn.bias)[0].isfinite().all()


def test_checkpointing():
    layer = create()
    x, results = picture(layer), []
    for use in (False, True):
        copied = copy.deepcopy(layer)
        out = torch.utils.checkpoint.checkpoint(train, copied, x, use_reentrant=False) if use else train(copied, x)
        results.append(gradients(out, copied, x, grad_for(x)))
    assert_all_close(*results, 1e-6)
