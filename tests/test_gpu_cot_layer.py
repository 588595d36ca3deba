"""CoT layers in training by Triton kernels against plain PyTorch in float64; see `triton_helpers.py`."""
import copy
import functools

import pytest
import torch
from golden import filled, golden_input, load
from helpers import FORMAT_NAMES, FORMATS, image, maps_group_norm, shaken
from torch import nn
from triton_helpers import (
    DEVICE, LAYERS_AND_FORMATS, SMALL, TOLERANCE, assert_all_close, assert_trains_like_plain, create, error, exact,
    gradient_for, gradients_of_gradients, kernels, of_zero_gradient, outside, passed_in_the_interpreter, plain,
    tensors_of, value_and_grads)

from timm_cotnet import CotLayer, CoxtLayer
from timm_cotnet.ops.contexts import ContextsSettings
from timm_cotnet.ops.cot_layer import grouped, parameters_of, settings_of
from timm_cotnet.ops.gpu import walks
from timm_cotnet.ops.gpu.contexts import (
    attend, attend_backward, filter_table, grads_like, like_tables, split_grads, split_tables, tap_by_tap)
from timm_cotnet.ops.gpu.stand_ins import train_cot_layer

CONVS = ('key_embed.0.weight', 'embed.0.weight', 'embed.3.weight', 'conv1x1.0.weight')


pytestmark = pytest.mark.usefixtures('exact_convolutions')


@pytest.mark.slow
@outside
def test_kernels_in_the_interpreter():
    passed, skipped = passed_in_the_interpreter(__file__)
    assert passed >= 45 and skipped == 1  # this test


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
    walk = walks._walk
    monkeypatch.setattr(
        walks, '_walk', lambda images, pixels, tiles, block_p, programs=0, **blocks:
        walk(images, pixels, tiles, block_p, images * tiles, **blocks))
    caches = walks.over_rows, walks.over_halves, walks.over_filters
    for cache in caches:
        cache.cache_clear()
    try:
        layer, _ = create(tag)
        x = image(2, layer.dim, 9, 9, torch.channels_last, torch.float64)
        found = walks.image_rows(x, 2)
        assert found.runs == 1 and found.sizes[1] > 2 * found.blocks['BLOCK_P']
        assert 9 * 9 % found.blocks['BLOCK_P'] != 0
        x = x.to(DEVICE)
        assert_trains_like_plain(train_cot_layer, layer, x, zero=of_zero_gradient(layer))
    finally:
        for cache in caches:
            cache.cache_clear()


@kernels
@pytest.mark.parametrize('tag', SMALL)
def test_parameters_in_any_memory(tag):
    """Those of convolutions and of the norm of the filters may lie with gaps; gradients lie as they do."""
    layer, x = create(tag)
    for module in layer.modules():
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
            for parameter in module.parameters():
                parameter.data = torch.stack([parameter.data, -parameter.data], -1)[..., 0]
    assert_trains_like_plain(train_cot_layer, layer, x, zero=of_zero_gradient(layer))


@kernels
@pytest.mark.parametrize('cut', [
    lambda x: x[:, :8], lambda x: x[:, 8:], lambda x: x[:, :8, 1:], lambda x: x[:, :8, :, ::2]])
def test_images_with_gaps_in_memory(cut):
    """Whose strides are those of channels-last all the same."""
    layer, _ = create('small_cot')
    x = cut(image(3, 16, 4, 6, torch.channels_last, torch.float64)).to(DEVICE)
    assert_trains_like_plain(train_cot_layer, layer, x, zero=of_zero_gradient(layer))


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
    if not maps_group_norm(backward=True):
        pytest.skip('this PyTorch cannot map the backward of its own group norm of channels-last images')
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


@kernels
@pytest.mark.parametrize('dtype, weights', [
    (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_mixing_of_many_images(dtype, weights):
    """Programs walk through several blocks of images and of channels, and the last ones are not full."""
    layer = create('small_cot')[0]
    B, C, A = 150, 100, 6
    layer.se = reference = nn.Sequential(nn.Conv2d(C, A, 1), nn.BatchNorm2d(A), nn.ReLU(), nn.Conv2d(A, 2 * C, 1))
    reference = copy.deepcopy(shaken(reference).to(weights)).double()
    p, s = grouped(parameters_of(layer.to(DEVICE))).rest, settings_of(layer, torch.zeros(1, dtype=dtype))
    run_sums = torch.randn(B, 3, C, dtype=dtype, generator=torch.Generator().manual_seed(1))
    pooled = run_sums.double().sum(1)[:, :, None, None].requires_grad_()
    expected = reference(pooled)
    grad = torch.randn(B, 2 * C, dtype=dtype, generator=torch.Generator().manual_seed(2))
    expected_grads = torch.autograd.grad(
        expected, [pooled, *reference.parameters()], grad.double()[:, :, None, None])
    with torch.no_grad():
        memory = like_tables(torch.empty(B, C, 1, 1, dtype=dtype, device=DEVICE), 0, A)
        t = split_tables(memory, B, C, 0, A)
        attend(run_sums.to(DEVICE), p[-6:], s.averages[2], s.contexts.se_eps, t)
        g = split_grads(grads_like(memory, C, A), C, A)
        grad = grad.to(DEVICE)
        grad_pooled = attend_backward(grad, p.se_weight1, p.se_norm_weight, p.se_weight2, t, g)
    got, grads = t.attn, (
        grad_pooled, g.se_weight1, g.se_bias1, g.se_norm_weight, g.se_norm_bias, g.se_weight2, grad.sum(0))
    tolerance = TOLERANCE[weights] / 4
    assert error(got[:, :, None, None], expected) < tolerance
    largest = max(g.norm() for g in expected_grads)
    for i, (actual, want) in enumerate(zip(grads, expected_grads)):
        difference = (actual.cpu().double().reshape(want.shape) - want).norm()
        assert difference <= tolerance * (largest if i == 2 else want.norm()), i  # the norm takes a bias out again
    for name, buffer in layer.se.named_buffers():
        assert error(buffer.double(), reference.get_buffer(name).double()) < tolerance, name


# Statistics of numbers far from zero


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
        table, means = ours.new_empty(2, 4, norm.num_channels), ours.new_empty(2, norm.num_channels)
        filter_table(ours, attn.bias, norm.weight, norm.bias, s, table, means)
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
