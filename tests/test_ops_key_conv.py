"""The key convolution by Winograd's algorithm: against F.conv2d in double precision, and the reasons not to use it.

Errors are stated relative to the largest number of the result. Sums of n products in float32 are off by a few times
2^-24 * sqrt(n); the transforms add about as much. Bounds are several times what was measured.
"""
import contextlib

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from timm_cotnet.ops import native
from timm_cotnet.ops.key_conv import KeyConv, key_conv, transform_filters, why_not_key_conv

LIBRARY = native.load(torch.float32, 'key_conv.c')
needs_native = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f'no native kernels: {LIBRARY}')
TOLERANCE = 3e-6  # of outputs and input gradients: at most 128 * 9 products a sum; measured: 6e-7
TOLERANCE_WEIGHT = 1e-5  # of filter gradients, whose sums are over all pixels; measured: 2.4e-6
COT = [(64, 4, 56), (128, 4, 28), (256, 4, 14), (512, 4, 7), (96, 8, 56), (192, 8, 28), (384, 8, 14), (768, 8, 7)]
SIZES = [(1, 1), (1, 5), (2, 2), (3, 1), (7, 7), (13, 9), (6, 17)]
AWKWARD = [(1, 8, 8), (3, 12, 20), (2, 44, 28), (5, 8, 36), (1, 100, 132), (1, 192, 8), (7, 20, 24)]  # groups, in, out


def inputs(batch, groups, in_channels, out_channels, height, width, memory_format=torch.channels_last):
    """x, weight, bias and an output gradient; channels are of one group."""
    generator = torch.Generator().manual_seed(batch + 10 * in_channels + height)
    x = torch.randn(batch, groups * in_channels, height, width, generator=generator)
    weight = torch.randn(groups * out_channels, in_channels, 3, 3, generator=generator)
    bias = torch.randn(groups * out_channels, generator=generator)
    grad = torch.randn(batch, groups * out_channels, height, width, generator=generator)
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    return x.requires_grad_(), weight.contiguous(memory_format=memory_format).requires_grad_(), bias, grad


def conv(x, weight, groups, bias=None):
    return F.conv2d(x, weight, bias, padding=1, groups=groups)


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


def check(x, weight, groups, bias, grad):
    """Inference, training and gradients, against F.conv2d in float64."""
    assert why_not_key_conv(x, weight, groups, bias) is None
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = conv(x64, weight64, groups)
    out = KeyConv.apply(x, weight, groups)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out.detach(), expected.detach())
    actual = torch.autograd.grad(out, (x, weight), grad)
    wanted = torch.autograd.grad(expected, (x64, weight64), grad.double())
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    assert actual[1].stride() == weight.stride()
    assert_close(actual[0], wanted[0])
    assert_close(actual[1], wanted[1], TOLERANCE_WEIGHT)

    x, filters = x.detach(), transform_filters(weight.detach(), groups)
    assert torch.equal(key_conv(x, filters), out)  # sums are taken in the same order
    shifted = expected.detach() + bias.double().view(-1, 1, 1)
    assert_close(key_conv(x, filters, bias), shifted)
    assert_close(key_conv(x, filters, bias, relu=True), shifted.relu())
    assert_close(key_conv(x, filters, relu=True), expected.detach().relu())


@needs_native
@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('channels, groups, size', COT)
def test_cot_layers(channels, groups, size, batch):
    x, weight, bias, grad = inputs(batch, groups, channels // groups, channels // groups, size, size)
    check(x, weight, groups, bias, grad)


@needs_native
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['plain', 'last'])
@pytest.mark.parametrize('height, width', SIZES)
def test_sizes(height, width, memory_format):
    for batch, groups, channels in [(3, 4, 16), (1, 8, 12), (2, 2, 96)]:
        x, weight, bias, grad = inputs(batch, groups, channels, channels, height, width, memory_format)
        check(x, weight, groups, bias, grad)


@needs_native
@pytest.mark.parametrize('groups, in_channels, out_channels', AWKWARD)
def test_awkward_channels(groups, in_channels, out_channels):
    x, weight, bias, grad = inputs(2, groups, in_channels, out_channels, 9, 6)
    check(x, weight, groups, bias, grad)


@needs_native
def test_large_batch():
    x, weight, bias, grad = inputs(70, 4, 32, 32, 7, 5)
    check(x, weight, 4, bias, grad)


@needs_native
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 5), groups=st.integers(1, 6), in_channels=st.integers(2, 12), out_channels=st.integers(2, 12),
    height=st.integers(1, 12), width=st.integers(1, 12), threads=st.integers(1, 6))
def test_any_shape(batch, groups, in_channels, out_channels, height, width, threads):
    with threads_set(threads):
        x, weight, bias, grad = inputs(batch, groups, 4 * in_channels, 4 * out_channels, height, width)
        check(x, weight, groups, bias, grad)


@contextlib.contextmanager
def threads_set(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize('threads', [1, 2, 3, 7, 70])
@pytest.mark.parametrize('groups, channels', [(4, 16), (3, 128), (8, 12)])
def test_threads(groups, channels, threads):
    x, weight, bias, grad = inputs(2, groups, channels, channels, 9, 7)
    with threads_set(1):
        expected = KeyConv.apply(x, weight, groups)
    with threads_set(threads):
        check(x, weight, groups, bias, grad)
        out = KeyConv.apply(x, weight, groups)
        assert torch.equal(out, expected)  # threads cut the tiles, not the sums
        again = [torch.autograd.grad(out, (x, weight), grad, retain_graph=True) for _ in range(2)]
    for first, second in zip(*again):
        assert torch.equal(first, second)


@needs_native
def test_numbers_of_any_magnitude():
    x, weight, bias, grad = inputs(2, 4, 16, 16, 9, 7)
    check(x.detach().mul(1e18).requires_grad_(), weight.detach().mul(1e-12).requires_grad_(), 4, bias, grad * 1e-9)
    check(x.detach().add(100).requires_grad_(), weight, 4, bias, grad)


@needs_native
def test_zeros():
    x, weight, bias, _ = inputs(2, 4, 16, 16, 9, 7)
    out = key_conv(torch.zeros_like(x), transform_filters(weight.detach(), 4), bias)
    assert torch.equal(out, bias.view(-1, 1, 1).expand_as(out))


@needs_native
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('at', [(0, 0), (4, 3), (5, 2), (8, 6)])
def test_not_finite(at, relu, value):
    """A NaN stays one, an infinity stays or becomes NaN; nothing else changes but in the same tiles and group."""
    x, weight, bias, _ = inputs(2, 4, 16, 16, 9, 7)
    x, weight = x.detach(), weight.detach()
    filters = transform_filters(weight, 4)
    clean = key_conv(x, filters, bias, relu)
    x[1, 17, at[0], at[1]] = value
    out, expected = key_conv(x, filters, bias, relu), conv(x, weight, 4, bias)
    touched = ~expected.isfinite()
    expected = expected.relu() if relu else expected
    assert touched.sum() >= 4 * 16
    assert (out.isnan() | (out == expected))[touched].all()
    assert value == value or out[touched].isnan().all()
    tiles = F.max_pool2d(F.pad(touched.float(), (0, 1, 0, 1)), 2)
    tiles = tiles.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :9, :7] > 0
    assert not tiles[0].any() and not tiles[1, :16].any() and not tiles[1, 32:].any()
    assert torch.equal(out[~tiles], clean[~tiles])


@needs_native
@pytest.mark.parametrize('position', ['x', 'weight', 'grad'])
def test_nan_in_training(position):
    x, weight, _, grad = inputs(2, 4, 16, 16, 8, 8)
    tensors = {'x': x.data, 'weight': weight.data, 'grad': grad}
    tensors[position][0, 3, 1, 1] = float('nan')
    expected = conv(x, weight, 4)
    out = KeyConv.apply(x, weight, 4)
    results = zip((out, *torch.autograd.grad(out, (x, weight), grad)),
                  (expected, *torch.autograd.grad(expected, (x, weight), grad)))
    for actual, wanted in results:
        assert actual[wanted.isnan()].isnan().all()
    assert out.isnan().any() == (position != 'grad')
    assert out.isfinite().any()


@needs_native
@pytest.mark.parametrize('wanted', ['x', 'weight'])
def test_one_gradient_alone(wanted):
    x, weight, _, grad = inputs(2, 4, 16, 16, 9, 7)
    both = dict(zip(('x', 'weight'), torch.autograd.grad(KeyConv.apply(x, weight, 4), (x, weight), grad)))
    tensors = {'x': x, 'weight': weight}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    out = KeyConv.apply(x, weight, 4)
    out.backward(grad)
    for name, tensor in tensors.items():
        assert torch.equal(tensor.grad, both[name]) if name == wanted else tensor.grad is None
    again, = torch.autograd.grad(KeyConv.apply(x, weight, 4), tensors[wanted], grad, create_graph=True)
    assert_close(again.detach(), both[wanted].double(), TOLERANCE_WEIGHT)


@needs_native
def test_expanded_gradient():
    x, weight, _, _ = inputs(2, 4, 16, 16, 9, 7)
    actual = torch.autograd.grad(KeyConv.apply(x, weight, 4).sum(), (x, weight))  # one number, expanded
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    for ours, expected in zip(actual, torch.autograd.grad(conv(x64, weight64, 4).sum(), (x64, weight64))):
        assert_close(ours, expected, TOLERANCE_WEIGHT)


@needs_native
def test_second_derivative():
    def derivatives(function, dtype):
        x, weight, _, grad = inputs(2, 2, 8, 12, 5, 4)
        x, weight, grad = (t.detach().to(dtype).requires_grad_() for t in (x, weight, grad))
        first = torch.autograd.grad(function(x, weight, 2), (x, weight), grad, create_graph=True)
        return *first, *torch.autograd.grad(sum((g ** 2).sum() for g in first), (x, weight, grad))

    for actual, expected in zip(derivatives(KeyConv.apply, torch.float32), derivatives(conv, torch.float64)):
        assert_close(actual.detach(), expected.detach(), 1e-5)


@needs_native
@pytest.mark.filterwarnings('ignore:Input.*double precision')
def test_gradcheck():
    x, weight, _, _ = inputs(1, 2, 8, 8, 3, 2)
    assert torch.autograd.gradcheck(
        lambda x, weight: KeyConv.apply(x, weight, 2), (x, weight), eps=1e-1, atol=1e-3, rtol=1e-3)  # it is linear


@needs_native
def test_many_gradients_at_once():
    x, weight, _, grad = inputs(2, 4, 16, 16, 9, 7)
    out = KeyConv.apply(x, weight, 4)
    both = torch.autograd.grad(
        out, (x, weight), torch.stack([grad, -2 * grad]), is_grads_batched=True, retain_graph=True)
    for two, one in zip(both, torch.autograd.grad(out, (x, weight), grad)):
        assert_close(two[0], one.double(), TOLERANCE_WEIGHT)
        assert_close(two[1], -2 * one.double(), TOLERANCE_WEIGHT)


@needs_native
def test_saved_tensors_may_come_back_in_another_memory_format():
    x, weight, _, grad = inputs(2, 4, 16, 16, 9, 7)
    expected = torch.autograd.grad(KeyConv.apply(x, weight, 4), (x, weight), grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        out = KeyConv.apply(x, weight, 4)
    for actual, wanted in zip(torch.autograd.grad(out, (x, weight), grad.contiguous()), expected):
        assert torch.equal(actual, wanted)


@needs_native
@pytest.mark.parametrize('changed', ['x', 'weight'])
def test_changed_in_place(changed):
    x, weight, _, grad = inputs(2, 4, 16, 16, 9, 7)
    x = x * 1
    out = KeyConv.apply(x, weight, 4)
    with torch.no_grad():
        {'x': x, 'weight': weight}[changed].add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.backward(grad)


@needs_native
def test_other_default_dtype():
    x, weight, bias, grad = inputs(2, 4, 16, 16, 9, 7)
    torch.set_default_dtype(torch.float64)
    try:
        check(x, weight, 4, bias, grad)
    finally:
        torch.set_default_dtype(torch.float32)


class Subclass(torch.Tensor):
    pass


REASONS = {
    'contiguous': (lambda a: a.update(x=a['x'].detach().contiguous()), 'x is not a channels-last'),
    'double': (lambda a: a.update(x=a['x'].double()), 'x is not a channels-last float32'),
    'bfloat16': (lambda a: a.update(x=a['x'].bfloat16()), 'x is not a channels-last float32'),
    'meta': (lambda a: a.update(x=a['x'].to('meta')), 'on the CPU'),
    '3 dimensions': (lambda a: a.update(x=a['x'][0]), 'x is not a channels-last'),
    'empty': (lambda a: a.update(x=a['x'][:0]), 'make no 4 groups'),
    'cropped': (lambda a: a.update(x=a['x'][:, :, 1:, 1:]), 'x is not a channels-last'),
    'double weight': (lambda a: a.update(weight=a['weight'].double()), 'weight is not a dense float32'),
    'strided weight': (
        lambda a: a.update(weight=a['weight'].detach().repeat(2, 1, 1, 1)[::2]), 'weight is not a dense'),
    'subclass': (lambda a: a.update(x=a['x'].detach().as_subclass(Subclass)), 'operators are watched'),
    'weight of a subclass': (
        lambda a: a.update(weight=a['weight'].detach().as_subclass(Subclass)), 'weight is not a dense'),
    'bias': (lambda a: a.update(bias=a['bias'][:32]), 'bias is not a contiguous'),
    'double bias': (lambda a: a.update(bias=a['bias'].double()), 'bias is not a contiguous'),
    '1x1': (lambda a: a.update(weight=a['weight'][:, :, :1, :1]), 'not a 3x3 convolution'),
    'stride': (lambda a: a.update(stride=(2, 2)), 'of stride 1'),
    'padding': (lambda a: a.update(padding=(0, 0)), 'padding 1'),
    'padding by name': (lambda a: a.update(padding='same'), 'padding 1'),
    'dilation': (lambda a: a.update(dilation=(2, 2)), 'dilation 1'),
    'other groups': (lambda a: a.update(groups=2), 'make no 2 groups'),
    'no groups': (lambda a: a.update(groups=0), 'make no 0 groups'),
    'few channels': (
        lambda a: a.update(x=a['x'][:, :16].contiguous(memory_format=torch.channels_last),
                           weight=a['weight'][:, :4].contiguous()), 'a group has 4 channels'),
    'odd channels': (lambda a: a.update(weight=a['weight'][:40].contiguous(), bias=None), 'a group has 10 channels'),
    'autocast': (lambda a: torch.autocast('cpu', torch.bfloat16), 'autocast'),
    'forward mode': (lambda a: torch.autograd.forward_ad.dual_level(), 'forward-mode'),
    'dispatch mode': (lambda a: FlopCounterMode(display=False), 'operators are watched'),
}


@pytest.mark.parametrize('condition', REASONS)
def test_reasons(condition):
    x, weight, bias, _ = inputs(2, 4, 16, 16, 9, 7)
    a = {'x': x, 'weight': weight, 'groups': 4, 'bias': bias}
    change, reason = REASONS[condition]
    context = change(a)
    with context if hasattr(context, '__enter__') else contextlib.nullcontext():
        assert reason in why_not_key_conv(**a)


def test_reason_without_library(monkeypatch):
    x, weight, _, _ = inputs(2, 4, 16, 16, 9, 7)
    monkeypatch.setenv('TIMM_COTNET_NATIVE', '0')
    native.load.cache_clear()
    try:
        assert why_not_key_conv(x, weight, 4) == 'TIMM_COTNET_NATIVE is 0'
    finally:
        native.load.cache_clear()


def test_watched():
    class Layer(nn.Module):
        def forward(self, x, weight):
            if why_not_key_conv(x, weight, 4) is None:
                return KeyConv.apply(x, weight, 4)
            return conv(x, weight, 4)

    x, weight, _, _ = inputs(2, 4, 16, 16, 9, 7)
    x, weight = x.detach(), weight.detach()
    expected = conv(x.double(), weight.double(), 4)
    assert_close(torch.func.vmap(Layer(), (0, None))(x[:, None], weight)[:, 0], expected)
    graph = torch.jit.trace(Layer(), (x, weight), check_trace=False)
    assert 'aten::_convolution' in str(graph.graph)
    assert_close(graph(x, weight), expected)
    assert_close(torch.compile(Layer(), backend='eager', fullgraph=True)(x, weight), expected)
