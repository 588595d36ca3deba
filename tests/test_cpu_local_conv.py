"""The local convolution in C: values and gradients against the definition in double precision."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_cotnet.ops.cpu.local_conv import empty_like, local_conv, local_conv_backward
from timm_cotnet.ops.reference import local_conv_reference

from helpers import needs_kernels, threads_set

pytestmark = needs_kernels
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2 ** -6}


def inputs(B=2, C=16, G=2, H=5, W=6, k=3, dtype=torch.float32):
    """x, weight and an output gradient."""
    generator = torch.Generator().manual_seed(B + 10 * C + 100 * H + W)
    x, weight, grad = (
        torch.randn(B, n, H, W, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
        for n in (C, G * k * k, C))
    return x.requires_grad_(), weight.view(B, G, k * k, H, W).requires_grad_(), grad


def exact(x, weight, kernel_size=3, dilation=1):
    """The definition in double precision, of leaves that are returned as well."""
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    return local_conv_reference(x, weight, kernel_size, dilation), x, weight


def assert_close(actual, expected, dtype=torch.float32):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max().clamp(min=1)


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 4), m=st.integers(1, 3), G=st.sampled_from([1, 2, 3, 4, 5, 8, 16, 21, 32]), H=st.integers(1, 7),
    W=st.integers(1, 7), k=st.sampled_from([1, 3, 3, 5, 7]), dilation=st.integers(1, 3), threads=st.integers(1, 3),
    dtype=st.sampled_from(list(TOLERANCE)))
def test_any_shape(B, m, G, H, W, k, dilation, threads, dtype):
    x, weight, grad = inputs(B, m * G, G, H, W, k, dtype)
    with threads_set(threads):
        out = local_conv(x, weight, k, dilation)
        actual = torch.autograd.grad(out, (x, weight), grad)
    expected, *leaves = exact(x, weight, k, dilation)
    assert_close(out, expected, dtype)
    for one, other, leaf in zip(actual, torch.autograd.grad(expected, leaves, grad.double()), (x, weight)):
        assert one.dtype == dtype
        assert_close(one, other, dtype)
    if dtype == torch.float32:
        for one, other in zip(local_conv_backward(grad, x.detach(), weight.detach(), k, dilation), (x, weight)):
            assert one.stride() == other.stride()
    with torch.no_grad():
        assert torch.equal(local_conv(x, weight, k, dilation), out)


@pytest.mark.parametrize('threads', [2, 5])
def test_threads_give_the_same_bits(threads):
    x, weight, grad = inputs(B=3, C=48, G=12)
    results = []
    for n in (1, threads):
        with threads_set(n):
            out = local_conv(x, weight, 3, 1)
            results.append((out, *torch.autograd.grad(out, (x, weight), grad)))
    assert all(map(torch.equal, *results))


def test_second_derivative():
    x, weight, _ = inputs(B=1, C=4, G=2, H=3, W=4)
    results = []
    for out, *leaves in ((local_conv(x, weight, 3, 1), x, weight), exact(x, weight)):
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves))
    for actual, expected in zip(*results):
        assert_close(actual, expected)


@pytest.mark.parametrize('how', ['vmap', 'is_grads_batched'])
def test_many_gradients_at_once(how):
    x, weight, grad = inputs()
    out = local_conv(x, weight, 3, 1)
    grads = torch.stack([grad, 2 * grad])
    if how == 'vmap':
        batched = torch.vmap(lambda grad: torch.autograd.grad(out, (x, weight), grad, retain_graph=True))(grads)
    else:
        batched = torch.autograd.grad(out, (x, weight), grads, is_grads_batched=True, retain_graph=True)
    for many, one in zip(batched, torch.autograd.grad(out, (x, weight), grad)):
        assert_close(many, torch.stack([one, 2 * one]))


@pytest.mark.parametrize('wanted', [0, 1])
def test_one_gradient_alone(wanted):
    tensors = inputs()
    grad = tensors[2]
    both = torch.autograd.grad(local_conv(*tensors[:2], 3, 1), tensors[:2], grad)
    tensors[1 - wanted].requires_grad_(False)
    local_conv(*tensors[:2], 3, 1).backward(grad)
    assert tensors[1 - wanted].grad is None
    assert_close(tensors[wanted].grad, both[wanted])


@pytest.mark.parametrize('change', [
    lambda t: t.contiguous(), lambda t: t.double(), lambda t: t.bfloat16(), lambda t: t.bfloat16().float()],
    ids=['contiguous', 'double', 'bfloat16', 'rounded'])
def test_saved_tensors_that_hooks_change(change):
    x, weight, grad = inputs()
    expected = torch.autograd.grad(local_conv(x, weight, 3, 1), (x, weight), grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: change(t.detach()), lambda t: t):
        out = local_conv(x, weight, 3, 1)
    for actual, wanted in zip(torch.autograd.grad(out, (x, weight), grad), expected):
        assert actual.dtype == torch.float32
        assert_close(actual, wanted, torch.bfloat16)


def test_gradient_of_any_layout():
    x, weight, _ = inputs()
    actual = torch.autograd.grad(local_conv(x, weight, 3, 1).sum(), (x, weight))  # one number, expanded
    out, *leaves = exact(x, weight)
    for one, other in zip(actual, torch.autograd.grad(out.sum(), leaves)):
        assert_close(one, other)


@pytest.mark.parametrize('shape', [(0, 16, 5, 6), (2, 16, 0, 6), (2, 16, 5, 0)])
def test_empty(shape):
    B, C, H, W = shape
    x, weight, grad = inputs(B, C, 2, H, W)
    out = local_conv(x, weight, 3, 1)
    grads = torch.autograd.grad(out, (x, weight), grad)
    assert out.shape == shape and grads[0].shape == shape and grads[1].shape == weight.shape


def test_what_is_not_finite_stays_where_it_is():
    x, weight, _ = inputs(B=2, C=16, G=2)
    with torch.no_grad():
        x[0, 3, 2, 2], weight[1, 1, 4, 0, 0] = float('nan'), float('inf')
        out, expected = local_conv(x, weight, 3, 1), local_conv_reference(x.double(), weight.double())
    assert torch.equal(out.isfinite(), expected.isfinite()) and not out.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(2, 16, 5, 6), (1, 8, 1, 1), (0, 16, 5, 6)])
def test_empty_like(shape, dtype):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    out = empty_like(x)
    assert (out.shape, out.stride(), out.dtype) == (x.shape, x.stride(), dtype) and not out._is_view()
    assert out.untyped_storage().nbytes() >= x.numel() * x.element_size() + 112
