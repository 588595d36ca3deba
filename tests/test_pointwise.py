"""The 1x1 convolution whose gradients are products of matrices, against PyTorch's convolution in float64."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_cotnet.ops.pointwise import pointwise, run_pointwise_with_shortcut

from helpers import FORMATS, difference, image


def inputs(B=3, C_in=8, C=6, H=5, W=4, memory_format=torch.channels_last, filters=torch.channels_last):
    torch.manual_seed(0)
    weight = torch.randn(C, C_in, 1, 1).to(memory_format=filters)
    return [t.requires_grad_() for t in (image(B, C_in, H, W, memory_format), weight, torch.randn(C))]


def in_double(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def derivatives(out, leaves):
    """First derivatives, and second ones by all leaves."""
    first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


@pytest.mark.parametrize('filters', FORMATS)
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('sizes', [{}, dict(B=1), dict(H=1, W=1), dict(C_in=1), dict(C=1), dict(B=0)])
def test_values_and_derivatives(sizes, memory_format, filters):
    leaves = inputs(**sizes, memory_format=memory_format, filters=filters)
    exact = in_double(leaves)
    out, expected = pointwise(*leaves), F.conv2d(*exact)
    assert difference(out, expected) < 1e-5
    for actual, wanted in zip(derivatives(out, leaves), derivatives(expected, exact)):
        assert difference(actual, wanted) < 1e-4


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('stride', [(2, 2), (1, 3), (3, 2)])
def test_stride(stride, memory_format):
    leaves = inputs(H=7, W=8, memory_format=memory_format)
    exact = in_double(leaves)
    out, expected = pointwise(*leaves, stride), F.conv2d(*exact, stride)
    assert difference(out, expected) < 1e-5
    for actual, wanted in zip(torch.autograd.grad(out.square().sum(), leaves, retain_graph=True),
                              torch.autograd.grad(expected.square().sum(), exact, retain_graph=True)):
        assert difference(actual, wanted) < 1e-5
    for actual, wanted in zip(derivatives(out, leaves), derivatives(expected, exact)):
        assert difference(actual, wanted) < 1e-4


def test_gradcheck_with_a_stride():
    def strided(*leaves):
        return pointwise(*leaves, (2, 1))
    exact = in_double(inputs())
    assert torch.autograd.gradcheck(strided, exact, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(strided, exact, check_batched_grad=True)


def test_gradcheck():
    exact = in_double(inputs())
    assert torch.autograd.gradcheck(pointwise, exact) and torch.autograd.gradgradcheck(pointwise, exact)


def test_frozen():
    leaves = inputs()
    expected = torch.autograd.grad(pointwise(*leaves).square().sum(), leaves)
    for wanted in itertools.product((False, True), repeat=3):
        for leaf, want in zip(leaves, wanted):
            leaf.grad = None
            leaf.requires_grad_(want)
        out = pointwise(*leaves)
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.square().sum().backward()
        for leaf, want, gradient in zip(leaves, wanted, expected):
            assert torch.equal(leaf.grad, gradient) if want else leaf.grad is None


@pytest.mark.parametrize('filters', FORMATS)
def test_gradients_have_the_strides_of_their_parameters(filters):
    """So that nothing copies them, and distributed training finds what it expects."""
    x, weight, bias = inputs(filters=filters)
    grads = torch.autograd.grad(pointwise(x, weight, bias).sum(), (x, weight, bias))
    for gradient, tensor in zip(grads, (x, weight, bias)):
        assert gradient.stride() == tensor.stride()


@pytest.mark.parametrize('how', ['vmap', 'is_grads_batched'])
def test_many_gradients_at_once(how):
    leaves = inputs()
    out = pointwise(*leaves)
    grads = torch.randn(3, *out.shape)
    if how == 'vmap':
        batched = torch.vmap(lambda grad: torch.autograd.grad(out, leaves, grad, retain_graph=True))(grads)
    else:
        batched = torch.autograd.grad(out, leaves, grads, retain_graph=True, is_grads_batched=True)
    for i, grad in enumerate(grads):
        for many, one in zip(batched, torch.autograd.grad(out, leaves, grad, retain_graph=True)):
            assert difference(many[i], one) < 1e-5


def forked(x, weight, bias):
    """What a convolution and the shortcut around it make of an input."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    conv._parameters.update(weight=weight, bias=bias)  # as they are, for derivatives by them
    out, shortcut = run_pointwise_with_shortcut(conv, x)
    return torch.cat([out.flatten(1), shortcut.sin().flatten(1)], 1)


def forked_plainly(x, weight, bias):
    return torch.cat([F.conv2d(x, weight, bias).flatten(1), x.sin().flatten(1)], 1)


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('sizes', [{}, dict(B=1), dict(H=1, W=1), dict(C_in=1), dict(C=1), dict(B=0)])
def test_with_shortcut(sizes, memory_format):
    leaves = inputs(**sizes, memory_format=memory_format)
    exact = in_double(leaves)
    out, expected = forked(*leaves), forked_plainly(*exact)
    assert difference(out, expected) < 1e-5
    grad = torch.randn(out.shape)
    for actual, wanted in zip(torch.autograd.grad(out, leaves, grad, retain_graph=True),
                              torch.autograd.grad(expected, exact, grad.double(), retain_graph=True)):
        assert difference(actual, wanted) < 1e-5
    for actual, wanted in zip(derivatives(out, leaves), derivatives(expected, exact)):
        assert difference(actual, wanted) < 1e-4


def test_gradcheck_with_shortcut():
    exact = in_double(inputs())
    assert torch.autograd.gradcheck(forked, exact, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(forked, exact)


@pytest.mark.parametrize('reader', ['convolution', 'shortcut'])
def test_one_of_both_is_read(reader):
    (x, weight, bias), C = inputs(), 6
    exact = in_double((x, weight, bias))
    at = slice(None, C * 20) if reader == 'convolution' else slice(C * 20, None)
    outs = forked(x, weight, bias)[:, at], forked_plainly(*exact)[:, at]
    actual, expected = (torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, materialize_grads=True)
                        for out, leaves in zip(outs, ((x, weight, bias), exact)))
    for one, other in zip(actual, expected):
        assert difference(one, other) < 1e-5


def test_gradient_is_added_in_place():
    x, conv = inputs()[0], nn.Conv2d(8, 6, 1)
    expected, = torch.autograd.grad(conv(x).square().sum() + x.sin().sum(), x)
    out, shortcut = run_pointwise_with_shortcut(conv, x)
    seen = []
    shortcut.register_hook(lambda grad: seen.append(grad.data_ptr()))
    grad, = torch.autograd.grad(out.square().sum() + shortcut.sin().sum(), x)
    assert [grad.data_ptr()] == seen and difference(grad, expected) < 1e-5


def test_shortcut_of_a_frozen_input():
    x, conv = image(2, 8, 3, 3, torch.channels_last), nn.Conv2d(8, 6, 1)
    out, shortcut = run_pointwise_with_shortcut(conv, x)
    assert out.requires_grad and not shortcut.requires_grad and torch.equal(shortcut, x)


def test_gradients_under_autocast():
    """Gradients are as exact as those of PyTorch's convolution, which autocast leaves alone."""
    leaves = inputs(C=64)
    expected = torch.autograd.grad(forked(*leaves).square().sum(), leaves)
    out = forked(*leaves).square().sum()
    with torch.autocast('cpu', torch.bfloat16):
        actual = torch.autograd.grad(out, leaves)
    for one, other in zip(actual, expected):
        assert torch.equal(one, other)
