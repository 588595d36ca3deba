"""Batch norm with what follows it in C, in training, against the definition and PyTorch's modules in float64."""
import copy
import itertools

import pytest
import torch
from torch import nn

from timm_cotnet import CotBottleneck
from timm_cotnet.ops.batch_norm import batch_norm_act
from timm_cotnet.ops.cpu.batch_norm import train_batch_norm

from helpers import FORMATS, difference, needs_kernels, shaken, shortcut, threads_set

pytestmark = needs_kernels

SHAPES = [
    (4, 64, 6, 5), (8, 48, 8, 8), (1, 33, 7, 9), (3, 1, 4, 4), (2, 130, 1, 1), (1, 7, 1, 2), (5, 16, 16, 12),
    (1, 256, 56, 3)]
KINDS = [(relu, residual) for relu in (True, False) for residual in (True, False)]


def create(channels):
    torch.manual_seed(0)
    return shaken(nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3))


def inputs(B, C, H, W, residual=True):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, C, H, W, generator=generator).contiguous(memory_format=torch.channels_last).requires_grad_()
            for _ in range(1 + residual)]


def exact(norm, x, residual=None, relu=True):
    """Output in float64 by the definition, and the leaves that it was computed from."""
    tensors = (x, norm.weight, norm.bias, residual)
    leaves = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    return batch_norm_act(*leaves, relu, norm.eps), [t for t in leaves if t is not None]


def leaves_of(norm, x, residual=None):
    return [x, norm.weight, norm.bias, *([] if residual is None else [residual])]


def some_grad(x, seed=2):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected, tolerance=1e-4):
    """Gradients that are zero but for rounding are compared with 0.01."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-2)


@pytest.mark.parametrize('threads', [1, 2, 7])
@pytest.mark.parametrize('relu, residual', KINDS)
@pytest.mark.parametrize('shape', SHAPES)
def test_values_and_gradients(shape, relu, residual, threads):
    norm, tensors = create(shape[1]), inputs(*shape, residual)
    expected, exact_leaves = exact(norm, *tensors, relu=relu)
    grad = some_grad(expected)
    with threads_set(threads):
        out = train_batch_norm(tensors[0], norm, relu, *tensors[1:])
        actual = torch.autograd.grad(out, leaves_of(norm, *tensors), grad)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, expected)
    for one, other in zip(actual, torch.autograd.grad(expected, exact_leaves, grad.double())):
        assert_close(one, other, 1e-3)


@pytest.mark.parametrize('shape', SHAPES)
def test_running_statistics(shape):
    norm, (x, residual) = create(shape[1]), inputs(*shape)
    expected = copy.deepcopy(norm).double()
    for factor in (1, 2):
        train_batch_norm(factor * x, norm, True, residual)
        expected(factor * x.double())
    for name, statistic in expected.named_buffers():
        assert_close(norm.get_buffer(name), statistic, 1e-5)
    assert norm.num_batches_tracked == 2


def test_large_mean():
    """Statistics are taken from differences, so a mean far from zero costs no accuracy."""
    norm, (x, residual) = create(32), inputs(4, 32, 9, 7)
    x = x.detach() + 100
    assert_close(train_batch_norm(x, norm, True, residual), exact(norm, x, residual)[0], 1e-3)


@pytest.mark.parametrize('residual', [False, True])
def test_what_is_no_number(residual):
    """It spreads as in PyTorch's modules."""
    norm, tensors = create(3), [t.detach() for t in inputs(2, 3, 4, 5, residual)]
    tensors[-1][0, 1, 2, 3] = float('nan')
    expected = torch.relu(copy.deepcopy(norm)(tensors[0]) + (tensors[1] if residual else 0))
    assert torch.equal(train_batch_norm(tensors[0], norm, True, *tensors[1:]).isnan(), expected.isnan())


@pytest.mark.parametrize('residual', [False, True])
def test_frozen(residual):
    """Each subset of what wants a gradient: others get none, and gradients do not change."""
    norm, tensors = create(20), inputs(3, 20, 5, 4, residual)
    leaves = leaves_of(norm, *tensors)
    grad = some_grad(tensors[0])
    expected = torch.autograd.grad(train_batch_norm(tensors[0], norm, True, *tensors[1:]), leaves, grad)
    for wanted in itertools.product((False, True), repeat=len(leaves)):
        for leaf, want in zip(leaves, wanted):
            leaf.grad = None
            leaf.requires_grad_(want)
        out = train_batch_norm(tensors[0], norm, True, *tensors[1:])
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.backward(grad, retain_graph=True)
            some = [leaf for leaf in leaves if leaf.requires_grad]
            for one, leaf in zip(torch.autograd.grad(out, some, grad, create_graph=True), some):
                assert_close(one, leaf.grad)
        for leaf, want, gradient in zip(leaves, wanted, expected):
            assert torch.equal(leaf.grad, gradient) if want else leaf.grad is None


@pytest.mark.parametrize('change', [
    lambda t: t.contiguous(), lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    lambda t: torch.stack([t, t], -1)[..., 0], lambda t: t[:1, :1, :1, :1].expand_as(t), torch._neg_view],
    ids=['contiguous', 'turned', 'not dense', 'expanded', 'negative'])
def test_gradient_of_any_layout(change):
    norm, tensors = create(24), inputs(3, 24, 5, 4)
    out, grad = train_batch_norm(tensors[0], norm, True, tensors[1]), change(some_grad(tensors[0]))
    expected, exact_leaves = exact(norm, *tensors)
    for one, other in zip(
            torch.autograd.grad(out, leaves_of(norm, *tensors), grad),
            torch.autograd.grad(expected, exact_leaves, grad.double())):
        assert_close(one, other, 1e-3)


@pytest.mark.parametrize('relu, residual', KINDS)
def test_second_derivative(relu, residual):
    norm, tensors = create(6), inputs(3, 6, 4, 5, residual)
    grad = some_grad(tensors[0])

    def derivatives(out, leaves):
        first = torch.autograd.grad(out, leaves, grad.to(out.dtype), create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves[:2])
    actual = derivatives(train_batch_norm(tensors[0], norm, relu, *tensors[1:]), leaves_of(norm, *tensors))
    for one, other in zip(actual, derivatives(*exact(norm, *tensors, relu=relu))):
        assert_close(one, other, 1e-3)


@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('how', ['vmap', 'is_grads_batched'])
def test_many_gradients_at_once(how, residual):
    norm, tensors = create(6), inputs(3, 6, 4, 5, residual)
    out, leaves = train_batch_norm(tensors[0], norm, True, *tensors[1:]), leaves_of(norm, *tensors)
    grads = torch.stack([some_grad(out, seed) for seed in range(3)])
    if how == 'vmap':
        batched = torch.vmap(lambda grad: torch.autograd.grad(out, leaves, grad, retain_graph=True))(grads)
    else:
        batched = torch.autograd.grad(out, leaves, grads, retain_graph=True, is_grads_batched=True)
    for i, grad in enumerate(grads):
        for many, one in zip(batched, torch.autograd.grad(out, leaves, grad, retain_graph=True)):
            assert_close(many[i], one, 1e-3)


@pytest.mark.parametrize('change, tolerance', [
    (lambda t: t.contiguous(), 1e-6), (lambda t: t.double(), 1e-6), (lambda t: t.bfloat16(), 0.5)],
    ids=['contiguous', 'double', 'bfloat16'])
def test_saved_tensors_that_hooks_change(change, tolerance):
    norm, tensors = create(32), inputs(3, 32, 5, 4)
    leaves, grad = leaves_of(norm, *tensors), some_grad(tensors[0])
    expected = torch.autograd.grad(train_batch_norm(tensors[0], norm, True, tensors[1]), leaves, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: change(t.detach()), lambda t: t):
        out = train_batch_norm(tensors[0], norm, True, tensors[1])
    for one, other in zip(torch.autograd.grad(out, leaves, grad), expected):
        assert one.dtype == torch.float32
        assert_close(one, other, tolerance)


def test_little_is_saved():
    """The input, and the output only where it tells what a residual let through."""
    norm, (x, residual) = create(8), inputs(2, 8, 4, 5)
    for args, count in (((True,), 1), ((False, residual), 1), ((True, residual), 2)):
        out = train_batch_norm(x, norm, *args)  # as long as it lives, PyTorch 2.6 keeps what is saved
        saved = out.grad_fn.saved_tensors
        assert sum(t is not None and t.shape == x.shape for t in saved) == count


def test_equal_bits():
    """Nothing depends on which thread comes first."""
    norm, tensors = create(16), inputs(5, 16, 9, 7)
    with threads_set(4):
        results = []
        for _ in range(3):
            out = train_batch_norm(tensors[0], copy.deepcopy(norm), True, tensors[1])
            results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))


def test_checkpointing_a_block():
    torch.manual_seed(0)
    block = shaken(CotBottleneck(16, 16, 2, shortcut(16, 64))).train()
    x = torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    results = []
    for use in (False, True):
        copied = copy.deepcopy(block)
        out = torch.utils.checkpoint.checkpoint(copied, x, use_reentrant=False) if use else copied(x)
        results.append(torch.autograd.grad(out.square().sum(), [x, *copied.parameters()]))
    for one, other in zip(*results):
        assert_close(one, other, 1e-5)


class Gives(nn.Module):
    """A module that gives the same tensor, whatever it gets."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x):
        return self.out


@pytest.mark.parametrize('out', [
    torch.ones(4, 8, 8, 8), torch.ones(1, 16, 1, 1), torch.ones(16, 8, 8), torch.ones(4, 16, 8, 8).bfloat16(),
    torch.ones(4, 16, 8, 8).double(), torch.ones(4, 16, 8, 8, device='meta'), torch.ones(0, 16, 8, 8)],
    ids=lambda out: f'{out.dtype}, {tuple(out.shape)}, {out.device}')
@pytest.mark.filterwarnings('ignore')
def test_children_that_give_what_the_kernel_cannot_take(out):
    """The block raises, or goes on, as where nothing stands in."""
    results = []
    for kernels in (True, False):
        torch.manual_seed(0)
        block = CotBottleneck(64, 16).train()
        block.conv2 = Gives(out)
        x = torch.randn(4, 64, 8, 8).contiguous(memory_format=FORMATS[kernels]).requires_grad_()
        try:
            results.append(block(x).shape)
        except (RuntimeError, ValueError) as error:
            results.append(str(error))
    assert results[0] == results[1]


def test_shortcut_that_is_spread():
    """What is added in place may have fewer values."""
    block = CotBottleneck(64, 16).train()
    block.downsample = nn.AdaptiveAvgPool2d(1)
    x = torch.randn(4, 64, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = copy.deepcopy(block).double()(x.double())
    assert difference(block(x), expected) < 1e-4
