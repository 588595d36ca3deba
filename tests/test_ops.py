"""Local convolution on the CPU: every implementation against the unfold formula, and all that looks inside it."""
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import given, settings, strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from timm_cotnet import local_conv
from timm_cotnet.ops import conditions
from timm_cotnet.ops.dispatch import choose_local_conv
from timm_cotnet.ops.reference import local_conv_reference
from timm_cotnet.ops.shifted import LocalConvShifted

from golden import golden_input, load
from helpers import has_kernels, needs_kernels

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2 ** -6, torch.float16: 2 ** -9}
GOLDEN = {'c16_g2_k3': (3, 1), 'c16_g2_k3_dil2': (3, 2), 'c24_g3_k5': (5, 1)}


def formula(x, weight, kernel_size=3, dilation=1):
    """Unfold, multiply, sum."""
    B, C, H, W = x.shape
    G = weight.shape[1]
    columns = F.unfold(x, kernel_size, dilation, dilation * (kernel_size // 2))
    return (columns.view(B, C // G, G, kernel_size ** 2, H, W) * weight.unsqueeze(1)).sum(3).view(B, C, H, W)


def inputs(B=2, C=16, G=2, H=5, W=6, k=3, dtype=torch.float32, channels_last=False):
    """x, weight and an output gradient; channels-last filters as a channels-last convolution makes them."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(B + 10 * C + 100 * H + W)
    x, weight, grad = (
        torch.randn(B, channels, H, W, generator=generator).to(dtype).contiguous(memory_format=memory_format)
        for channels in (C, G * k * k, C))
    return x, weight.view(B, G, k * k, H, W), grad


def assert_close(actual, expected, dtype):
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs().max().item() if expected.numel() else 0.0) <= TOLERANCE[dtype] * scale


def check(function, x, weight, grad, kernel_size, dilation):
    """Values and both gradients of function against the formula in float64."""
    dtype = x.dtype
    x, weight = x.requires_grad_(), weight.requires_grad_()
    out = function(x, weight, kernel_size, dilation)
    grads = torch.autograd.grad(out, (x, weight), grad)
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = formula(x64, weight64, kernel_size, dilation)
    expected_grads = torch.autograd.grad(expected, (x64, weight64), grad.double())
    assert out.dtype == dtype and all(g.dtype == dtype for g in grads)
    for actual, wanted in zip((out, *grads), (expected, *expected_grads)):
        assert_close(actual, wanted.detach(), dtype)
    return out


@pytest.mark.parametrize('tag', GOLDEN)
@pytest.mark.parametrize('function', [local_conv, local_conv_reference, LocalConvShifted.apply])
def test_golden(tag, function):
    data = load('layers')
    expected, expected_x, expected_w = (data[f'op_{tag}_{name}'] for name in ('out', 'grad_x', 'grad_w'))
    x = golden_input(expected.shape, f'op{tag}x').requires_grad_()
    weight = golden_input(expected_w.shape, f'op{tag}w').requires_grad_()
    out = function(x, weight, *GOLDEN[tag])
    grads = torch.autograd.grad(out, (x, weight), golden_input(out.shape, f'op{tag}g'))
    assert (out - expected).abs().max() < 1e-12
    assert (grads[0] - expected_x).abs().max() < 1e-12
    assert (grads[1] - expected_w).abs().max() < 1e-12


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3), m=st.integers(1, 3), G=st.sampled_from([1, 2, 3, 5, 8, 16, 21]), H=st.integers(1, 7),
    W=st.integers(1, 7), k=st.sampled_from([1, 3, 5, 7]), dilation=st.integers(1, 3),
    channels_last=st.booleans(), dtype=st.sampled_from(list(TOLERANCE)))
def test_any_shape(B, m, G, H, W, k, dilation, channels_last, dtype):
    x, weight, grad = inputs(B, m * G, G, H, W, k, dtype, channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert check(local_conv, x, weight, grad, k, dilation).is_contiguous(memory_format=memory_format)


@settings(max_examples=20, deadline=None)
@given(a=st.floats(-3, 3), b=st.floats(-3, 3), channels_last=st.booleans())
def test_linear_in_values_and_in_filters(a, b, channels_last):
    x, weight, y = inputs(dtype=torch.float64, channels_last=channels_last)
    other = weight.roll(1, 2)
    expected = a * local_conv(x, weight) + b * local_conv(y, weight)
    assert (local_conv(a * x + b * y, weight) - expected).abs().max() < 1e-12
    expected = a * local_conv(x, weight) + b * local_conv(x, other)
    assert (local_conv(x, a * weight + b * other) - expected).abs().max() < 1e-12


def test_choice():
    x, weight, _ = inputs()
    assert choose_local_conv(x, weight, 3) == LocalConvShifted.apply
    assert choose_local_conv(x.double(), weight.double(), 3) == LocalConvShifted.apply
    assert choose_local_conv(x.to('meta'), weight.to('meta'), 3) == local_conv_reference
    x, weight, _ = inputs(channels_last=True)
    chosen = choose_local_conv(x, weight, 3)
    assert chosen == (conditions.cpu.local_conv if has_kernels() else LocalConvShifted.apply)
    assert choose_local_conv(x, weight, 9) == LocalConvShifted.apply
    assert choose_local_conv(x.double(), weight.double(), 3) == LocalConvShifted.apply


@needs_kernels
@pytest.mark.parametrize('threads', [1, 2, 5])
def test_kernel_threads_give_the_same_bits(threads):
    x, weight, grad = inputs(B=3, C=48, G=12, channels_last=True)
    x.requires_grad_(), weight.requires_grad_()
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            out = conditions.cpu.local_conv(x, weight, 3, 1)
            results.append((out, *torch.autograd.grad(out, (x, weight), grad)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert_close(results[0][0], formula(x.double(), weight.double()).detach(), torch.float32)


@pytest.mark.parametrize('channels_last', [False, True])
def test_first_and_second_derivatives(channels_last):
    x, weight, _ = inputs(B=1, C=4, G=2, H=3, W=4, dtype=torch.float64, channels_last=channels_last)
    args = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(local_conv, args, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(local_conv, args)


@needs_kernels
def test_second_derivative_of_the_c_kernel():
    x, weight, _ = inputs(B=1, C=4, G=2, H=3, W=4, channels_last=True)
    results = []
    for dtype in (torch.float32, torch.float64):
        a, b = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        grad_x, grad_w = torch.autograd.grad(local_conv(a, b).square().sum(), (a, b), create_graph=True)
        results.append(torch.autograd.grad((grad_x.square().sum() + grad_w.square().sum()), (a, b)))
    for actual, expected in zip(*results):
        assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize('channels_last', [False, True])
def test_gradients_of_saved_tensors_that_hooks_replace(channels_last):
    """Checkpointing may unpack saved tensors only once, and hooks may return them with other strides."""
    x, weight, grad = inputs(channels_last=channels_last)
    a, b = x.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(formula(a, b), (a, b), grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().contiguous(), lambda t: t):
        out = local_conv(a, b)
    actual = torch.autograd.grad(out, (a, b), grad)
    out = torch.utils.checkpoint.checkpoint(local_conv, a, b.detach(), use_reentrant=False)
    actual += torch.autograd.grad(out, a, grad)
    for one, other in zip(actual, (*expected, expected[0])):
        assert_close(one, other.double(), torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        out = torch.utils.checkpoint.checkpoint(local_conv, a, b, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(out, (a, b), grad.bfloat16()), expected):
        assert_close(one, other.double(), torch.bfloat16)


@pytest.mark.parametrize('channels_last', [False, True])
def test_many_gradients_at_once(channels_last):
    x, weight, grad = inputs(B=1, C=4, G=2, H=3, W=4, channels_last=channels_last)
    a, b = x.requires_grad_(), weight.requires_grad_()
    out = local_conv(a, b)
    batched = torch.autograd.grad(out, (a, b), torch.stack([grad, 2 * grad]), is_grads_batched=True, retain_graph=True)
    for many, one in zip(batched, torch.autograd.grad(out, (a, b), grad)):
        assert_close(many[1], 2 * one.double(), torch.float32)


@pytest.mark.parametrize('channels_last', [False, True])
def test_jvp_and_vmap(channels_last):
    x, weight, tangent = inputs(channels_last=channels_last)
    _, actual = torch.func.jvp(lambda x: local_conv(x, weight), (x,), (tangent,))
    assert_close(actual, formula(tangent.double(), weight.double()), torch.float32)
    stacked = torch.func.vmap(local_conv)(torch.stack([x, tangent]), torch.stack([weight, weight]))
    assert_close(stacked[1], formula(tangent.double(), weight.double()), torch.float32)
    grads = torch.func.vmap(torch.func.grad(lambda x, w: local_conv(x[None], w[None]).sum()))(x, weight)
    expected = torch.autograd.grad(local_conv(x.requires_grad_(), weight).sum(), x)[0]
    assert (grads - expected).abs().max() < 1e-5


@pytest.mark.parametrize('channels_last', [False, True])
def test_forward_mode(channels_last):
    x, weight, tangent = inputs(channels_last=channels_last)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        actual = torch.autograd.forward_ad.unpack_dual(local_conv(dual, weight)).tangent
    assert_close(actual, formula(tangent.double(), weight.double()), torch.float32)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, weight, _ = inputs()
    with torch.autocast('cpu', dtype):
        out = local_conv(x, weight.to(dtype))
        assert local_conv(x.double(), weight.double()).dtype == torch.float64
    assert out.dtype == dtype
    assert_close(out, formula(x.double(), weight.double()), dtype)


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('shape', [(0, 16, 5, 6), (2, 16, 0, 6), (2, 16, 5, 0)])
def test_empty(shape, channels_last):
    B, C, H, W = shape
    x, weight, grad = inputs(B, C, 2, H, W, channels_last=channels_last)
    out = local_conv(x.requires_grad_(), weight.requires_grad_())
    grads = torch.autograd.grad(out, (x, weight), grad)
    assert out.shape == shape and grads[0].shape == shape and grads[1].shape == weight.shape


class Module(torch.nn.Module):
    def forward(self, x, weight):
        return local_conv(x, weight, 3, 2)


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('how', ['script', 'trace', 'fx', 'make_fx', 'export'])
def test_captured(how):
    x, weight, _ = inputs()
    expected = formula(x, weight, 3, 2)
    batch = torch.export.Dim('batch', min=1, max=64)
    sides = {2: torch.export.Dim('height', min=2, max=64), 3: torch.export.Dim('width', min=2, max=64)}
    function = {
        'script': lambda: torch.jit.script(Module()),
        'trace': lambda: torch.jit.trace(Module(), (x, weight)),
        'fx': lambda: torch.fx.symbolic_trace(Module()),
        'make_fx': lambda: make_fx(Module())(x, weight),
        'export': lambda: torch.export.export(Module(), (x, weight), dynamic_shapes=(
            {0: batch, **sides}, {0: batch, 3: sides[2], 4: sides[3]})).module(),
    }[how]()
    assert (function(x, weight) - expected).abs().max() < 1e-5
    if how in ('script', 'fx', 'export'):
        x, weight, _ = inputs(B=3, H=8, W=7)
        assert (function(x, weight) - formula(x, weight, 3, 2)).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('channels_last', [False, True])
def test_compiled_without_graph_breaks(channels_last):
    x, weight, grad = inputs(channels_last=channels_last)
    check(torch.compile(local_conv, fullgraph=True), x, weight, grad, 3, 1)


@pytest.mark.parametrize('kwargs, message', [
    (dict(kernel_size=2), 'kernel_size is 2, expected a positive odd integer'),
    (dict(kernel_size=0), 'kernel_size is 0'),
    (dict(kernel_size=3.0), 'kernel_size is 3.0'),
    (dict(dilation=0), 'dilation is 0, expected a positive integer'),
    (dict(kernel_size=5), r'weight has shape \(2, 2, 9, 5, 6\), expected \(2, 2, 25, 5, 6\)'),
    (dict(x=torch.zeros(2, 16, 5)), r'x has shape \(2, 16, 5\), expected 4 dimensions'),
    (dict(weight=torch.zeros(2, 18, 5, 6)), r'weight has shape \(2, 18, 5, 6\), expected 5 dimensions'),
    (dict(x=torch.zeros(2, 15, 5, 6)), 'weight has 2 groups, expected a divisor of the 15 channels'),
    (dict(x=torch.zeros(2, 16, 6, 5)), r'weight has shape \(2, 2, 9, 5, 6\), expected \(2, 2, 9, 6, 5\)'),
    (dict(x=torch.zeros(2, 16, 5, 6, dtype=torch.int64)), 'x has dtype torch.int64, expected one of'),
    (dict(weight=torch.zeros(2, 2, 9, 5, 6, dtype=torch.float64)), 'weight has dtype torch.float64, x has'),
    (dict(weight=torch.zeros(2, 2, 9, 5, 6, device='meta')), 'weight is on meta, expected it on cpu'),
])
def test_wrong_input_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        local_conv(**{'x': torch.zeros(2, 16, 5, 6), 'weight': torch.zeros(2, 2, 9, 5, 6), **kwargs})


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operator returns."""
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr():
            self.size = max(self.size, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize('function', [local_conv_reference, LocalConvShifted.apply, local_conv])
def test_memory_is_linear(function):
    """No buffer of k * k times x, and nothing larger than the padded x."""
    x, weight, grad = inputs(C=64, G=1, H=16, W=16, k=5, channels_last=True)
    x.requires_grad_()
    with Largest() as largest:
        out = function(x, weight, 5, 1)
        torch.autograd.grad(out, x, grad)
    assert x.numel() <= largest.size <= 2 * 64 * 20 * 20


@pytest.mark.parametrize('name', ['x', 'weight'])
@pytest.mark.parametrize('change, message', [
    (lambda tensor: None, 'is a NoneType, expected a tensor'),
    (lambda tensor: tensor.to_sparse(), 'has layout torch.sparse_coo, expected a dense tensor'),
    (lambda tensor: tensor.to_mkldnn(), 'has layout torch._mkldnn, expected a dense tensor'),
    (lambda tensor: tensor.long(), 'has dtype torch.int64, expected one of'),
])
def test_only_dense_floating_tensors(name, change, message):
    tensors = dict(zip(('x', 'weight'), inputs()))
    tensors[name] = change(tensors[name])
    with torch.autocast('cpu', torch.bfloat16), pytest.raises(ValueError, match=f'{name} {message}'):
        local_conv(**tensors)


def test_reference_makes_no_padding_beyond_the_image():
    x, weight, _ = inputs()
    expected = local_conv_reference(x, weight[:, :, 4:5], 1)  # the middle tap
    torch.testing.assert_close(local_conv_reference(x, weight, 3, 10 ** 9), expected)
