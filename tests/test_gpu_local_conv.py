"""Triton kernels of local convolution against the reference; see `triton_helpers.py`."""
import re
import sys

import pytest
import torch

from timm_cotnet.ops.gpu import local_conv as ops
from timm_cotnet.ops.reference import local_conv_reference
from timm_cotnet.ops.gpu.local_conv import local_conv_triton, needs_64_bits, why_not_triton

from golden import golden_input, load
from triton_helpers import DEVICE, INTERPRETED, kernels, outside, passed_in_the_interpreter

# the result is compared after rounding to its dtype; the interpreter cuts bfloat16 off instead of rounding it
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2 ** -7, torch.float16: 2 ** -10}
FORMATS = ('contiguous', 'channels_last', 'channels_last_taps_first')


def set_config(monkeypatch, kernel, config):
    """Make a kernel run with this configuration, where it would take another or, if told to, time several."""
    if hasattr(kernel, 'values'):
        values = {name: lambda args, value=value: value for name, value in config.kwargs.items()}
        monkeypatch.setattr(kernel, 'values', values)
    else:
        monkeypatch.setattr(kernel, 'configs', [config])


@pytest.fixture(autouse=INTERPRETED)
def small_tiles(monkeypatch):
    """Small images then have several tiles; it is also faster."""
    triton = pytest.importorskip('triton', reason='Triton is not installed')
    from timm_cotnet.ops.gpu import local_conv_kernels
    set_config(monkeypatch, local_conv_kernels.weighted_sum_kernel, triton.Config({'FILTERS': 128, 'M_AXIS': 0}))
    set_config(monkeypatch, local_conv_kernels.weight_grad_kernel, triton.Config({'FILTERS': 128}))


def inputs(B, C, G, H, W, k, dtype=torch.float64, memory_format='contiguous', seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, C, H, W, generator=generator, dtype=torch.float64)
    weight = torch.randn(B, G, k * k, H, W, generator=generator, dtype=torch.float64)
    x, weight = x.to(DEVICE, dtype), weight.to(DEVICE, dtype)
    if memory_format != 'contiguous':
        x = x.contiguous(memory_format=torch.channels_last)
        order = (0, 3, 4, 1, 2) if memory_format == 'channels_last' else (0, 3, 4, 2, 1)
        back = (0, 3, 4, 1, 2) if memory_format == 'channels_last' else (0, 4, 3, 1, 2)
        weight = weight.permute(order).contiguous().permute(back)
    return x.requires_grad_(), weight.requires_grad_()


def value_and_grads(function, x, weight, grad, *args):
    out = function(x, weight, *args)
    return (out, *torch.autograd.grad(out, (x, weight), grad))


def assert_like_reference(x, weight, *args):
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad = torch.empty_like(x).copy_(grad)  # the memory format of x
    got = value_and_grads(local_conv_triton, x, weight, grad, *args)
    exact = [t.detach().cpu().double() for t in (x, weight, grad)]
    expected = value_and_grads(
        local_conv_reference, exact[0].requires_grad_(), exact[1].requires_grad_(), exact[2], *args)
    for name, a, b in zip(('out', 'grad_x', 'grad_weight'), got, expected):
        assert a.dtype == x.dtype and a.shape == b.shape, name
        error = (a.cpu().double() - b).abs().max() / b.abs().max()
        assert error < TOLERANCE[x.dtype], f'{name}: relative error {error:.1e}'
    return got


@pytest.mark.slow
@outside
def test_kernels_in_the_interpreter():
    passed, skipped = passed_in_the_interpreter(__file__, loops=False)
    assert passed >= 60 and skipped == 2  # this test and the one for CUDA graphs


@kernels
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_dtypes(dtype, memory_format):
    x, weight = inputs(1, 16, 2, 5, 7, 3, dtype, memory_format)
    out, grad_x, grad_weight = assert_like_reference(x, weight, 3, 1)
    assert out.stride() == grad_x.stride() == x.stride()  # and so nothing has to be copied before or after
    assert grad_weight.stride() == weight.stride()


@kernels
@pytest.mark.parametrize('memory_format', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('B, C, G, H, W, k, dilation', [
    (1, 3, 3, 5, 3, 3, 1),  # a filter for every channel
    (2, 3, 1, 4, 9, 3, 1),  # one filter for all channels
    (1, 12, 3, 7, 5, 3, 2),  # G is no power of two
    (1, 10, 1, 3, 4, 3, 1),  # more channels share a filter than a contiguous tile holds
    (1, 65, 1, 3, 2, 1, 1),  # the same for a channels-last tile
    (1, 70, 70, 2, 3, 1, 1),  # more filters than a tile holds
    (1, 2, 2, 3, 70, 3, 1),  # wider than a tile
    (1, 2, 1, 20, 2, 3, 3),  # higher than a tile is wide
    (1, 4, 2, 6, 5, 5, 1),
    (1, 4, 2, 5, 6, 5, 2),
    (1, 4, 2, 5, 6, 7, 1),
    (1, 4, 2, 1, 1, 3, 1),
    (1, 4, 2, 3, 3, 3, 5),  # the outer taps see only padding
    (1, 4, 2, 3, 4, 1, 1),
])
def test_shapes(B, C, G, H, W, k, dilation, memory_format):
    assert_like_reference(*inputs(B, C, G, H, W, k, torch.float64, memory_format), k, dilation)


@kernels
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('config', range(4))
def test_configs(config, memory_format, monkeypatch):
    """Whatever the autotuner may choose."""
    from timm_cotnet.ops.gpu import local_conv_kernels as module
    set_config(monkeypatch, module.weighted_sum_kernel, module.WEIGHTED_SUM_CONFIGS[config])
    set_config(monkeypatch, module.weight_grad_kernel, module.WEIGHT_GRAD_CONFIGS[config % 3])
    assert_like_reference(*inputs(1, 12, 2, 9, 5, 3, torch.float32, memory_format), 3, 1)


@kernels
def test_golden():
    golden = load('layers')
    cases = (('c16_g2_k3', 2, 3, 1), ('c16_g2_k3_dil2', 2, 3, 2), ('c24_g3_k5', 3, 5, 1))
    for tag, groups, kernel_size, dilation in cases:
        expected = [golden[f'op_{tag}_{name}'] for name in ('out', 'grad_x', 'grad_w')]
        B, C, H, W = expected[0].shape
        x = golden_input((B, C, H, W), f'op{tag}x').to(DEVICE).requires_grad_()
        weight = golden_input((B, groups, kernel_size ** 2, H, W), f'op{tag}w').to(DEVICE).requires_grad_()
        grad = golden_input((B, C, H, W), f'op{tag}g').to(DEVICE)
        got = value_and_grads(local_conv_triton, x, weight, grad, kernel_size, dilation)
        for a, b in zip(got, expected):
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-9)


@kernels
def test_strides():
    """Inputs and output gradients as views: expanded, sliced, and of another memory format than x."""
    x, weight = inputs(2, 8, 2, 6, 10, 3)
    sliced = torch.randn(2, 9, 8, 21, dtype=torch.float64, device=DEVICE)[:, 1:, 2:, 1::2].detach().requires_grad_()
    assert_like_reference(sliced, weight, 3, 1)
    expanded = torch.randn(2, 1, 9, 1, 10, dtype=torch.float64, device=DEVICE).expand(2, 2, 9, 6, 10).detach()
    assert expanded.stride(1) == expanded.stride(3) == 0
    assert_like_reference(x, expanded.requires_grad_(), 3, 1)
    one_more = torch.randn(2, 3, 9, 6, 11, dtype=torch.float64, device=DEVICE)[:, 1:, :, :, 1:].requires_grad_()
    assert_like_reference(x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(), one_more, 3, 1)

    for grad in (
            torch.ones((), dtype=torch.float64, device=DEVICE).expand(x.shape),
            torch.randn(x.shape, dtype=torch.float64, device=DEVICE).contiguous(memory_format=torch.channels_last),
    ):
        got = value_and_grads(local_conv_triton, x, weight, grad, 3, 1)
        expected = value_and_grads(local_conv_reference, x, weight, grad, 3, 1)
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@kernels
@pytest.mark.parametrize('shape', [(0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0)])
def test_empty(shape):
    B, C, H, W = shape
    x, weight = inputs(B, C, 2, H, W, 3)
    got = value_and_grads(local_conv_triton, x, weight, torch.ones_like(x), 3, 1)
    assert [t.shape for t in got] == [x.shape, x.shape, weight.shape]


@kernels
def test_gradcheck():
    x, weight = inputs(1, 2, 1, 2, 2, 3)
    assert torch.autograd.gradcheck(local_conv_triton, (x, weight, 3, 1))
    for which in (0, 1):  # with only one of them wanting a gradient
        one = [t.detach().requires_grad_(i == which) for i, t in enumerate((x, weight))]
        assert torch.autograd.gradcheck(local_conv_triton, (*one, 3, 1), fast_mode=True)


@kernels
def test_gradgradcheck():
    """Of each operator, so that the derivatives that they make of each other are all seen; in random directions."""
    x, weight = inputs(1, 2, 1, 2, 3, 3)
    grad = torch.randn_like(x).requires_grad_()
    like = weight.detach()
    input_grad, weight_grad = torch.ops.timm_cotnet.local_conv_input_grad, torch.ops.timm_cotnet.local_conv_weight_grad
    assert torch.autograd.gradgradcheck(local_conv_triton, (x, weight, 3, 1), fast_mode=True)
    assert torch.autograd.gradgradcheck(input_grad, (grad, weight, 3, 1), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda a, b: weight_grad(a, b, like, 3, 1), (grad, x), fast_mode=True)


@kernels
@pytest.mark.parametrize('memory_format', FORMATS)
def test_opcheck(memory_format):
    x, weight = inputs(1, 4, 2, 3, 5, 3, torch.float32, memory_format)
    grad = torch.randn_like(x).requires_grad_()
    for op, args in (
            (torch.ops.timm_cotnet.local_conv, (x, weight)),
            (torch.ops.timm_cotnet.local_conv_input_grad, (grad, weight)),
            (torch.ops.timm_cotnet.local_conv_weight_grad, (grad, x, weight.detach())),
    ):
        results = torch.library.opcheck(op.default, (*args, 3, 1))
        assert len(results) >= 4 and set(results.values()) == {'SUCCESS'}


@kernels
def test_deterministic():
    x, weight = inputs(2, 16, 2, 9, 8, 3, torch.float32, 'channels_last')
    first, second = (value_and_grads(local_conv_triton, x, weight, torch.ones_like(x), 3, 1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@kernels
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    x, weight = inputs(1, 4, 2, 3, 4, 3, torch.float32)
    with torch.autocast(DEVICE, dtype=dtype):
        out = local_conv_triton(x, weight.to(dtype), 3, 1)  # as convolutions leave them: in different dtypes
        double = local_conv_triton(x.double(), weight.double(), 3, 1)
    assert out.dtype == dtype and double.dtype == torch.float64
    expected = local_conv_triton(x.to(dtype), weight.to(dtype), 3, 1)
    assert torch.equal(out, expected) and out.float().abs().max() > 0.1
    out.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32 and x.grad.abs().max() > 0.1


@kernels
@pytest.mark.parametrize('memory_format', FORMATS)
def test_64_bit_offsets(memory_format, monkeypatch):
    """The path for huge images, taken by small ones."""
    monkeypatch.setattr(ops, 'needs_64_bits', lambda *tensors: True)
    assert_like_reference(*inputs(2, 4, 1, 5, 4, 3, torch.float32, memory_format), 3, 1)


@kernels
def test_half_types_accumulate_in_float32():
    """2048 + 1 is 2048 in float16: a sum kept in it would lose eight of the nine taps."""
    x = torch.ones(1, 1, 3, 3, dtype=torch.float16, device=DEVICE)
    weight = torch.ones(1, 1, 9, 3, 3, dtype=torch.float16, device=DEVICE)
    weight[:, :, 0] = 2048
    assert local_conv_triton(x, weight, 3, 1)[0, 0, 1, 1] == 2056


@kernels
def test_mismatched_tensors_are_refused():
    x, weight = inputs(1, 4, 2, 3, 4, 3, torch.float32)
    with pytest.raises(ValueError, match='weight has shape'):
        local_conv_triton(x[..., 1:], weight, 3, 1)
    with pytest.raises(ValueError, match='weight has shape'):
        local_conv_triton(x[:, 1:], weight, 3, 1)
    with pytest.raises(ValueError, match='weight has dtype torch.float64'):
        local_conv_triton(x, weight.double(), 3, 1)
    with pytest.raises(ValueError, match='grad has shape'):
        torch.ops.timm_cotnet.local_conv_weight_grad(x[:, :2], x, weight, 3, 1)


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason='CUDA graphs need a GPU')
def test_cuda_graph():
    x, weight = inputs(2, 16, 2, 9, 8, 3, torch.bfloat16, 'channels_last')
    x, weight = x.detach(), weight.detach()
    expected = local_conv_triton(2 * x, weight, 3, 1)  # warms up, as capturing asks for
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = local_conv_triton(x, weight, 3, 1)
    x.mul_(2)
    graph.replay()
    assert torch.equal(out, expected)


def test_needs_64_bits():
    def image(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device='meta')

    assert not needs_64_bits(image(256, 64, 56, 56), image(256, 8, 9, 56, 56))
    assert not needs_64_bits(image(2 ** 20, 64, 56, 56))  # many images are no matter: each has its own 64-bit start
    assert not needs_64_bits(image(1, 64, 4096, 4096)[:, :, :, :4095])
    assert needs_64_bits(image(1, 64, 4096, 4097))
    assert needs_64_bits(image(1, 64, 4096, 4096, dtype=torch.float32))
    assert needs_64_bits(image(1, 2, 3, 3), image(1, 64, 4096, 8192))
    assert needs_64_bits(image(1, 2, 3, 2 ** 31)[..., :: 2 ** 29])  # few elements, far apart


def test_meta_shapes():
    x = torch.empty(2, 8, 5, 6, device='meta').to(memory_format=torch.channels_last)
    weight = torch.empty(2, 2, 9, 5, 6, device='meta')
    out = local_conv_triton(x, weight, 3, 1)
    assert out.device.type == 'meta' and out.shape == x.shape and out.stride() == x.stride()
    like = torch.ops.timm_cotnet.local_conv_weight_grad(x, x, weight, 3, 1)
    assert like.shape == weight.shape and like.stride() == weight.stride()


def test_why_not(monkeypatch):
    x = torch.zeros(1, 2, 3, 3)
    assert 'torch.int64' in why_not_triton(x.long())
    with torch.autograd.forward_ad.dual_level():
        assert 'forward-mode' in why_not_triton(x)
    if INTERPRETED:
        assert why_not_triton(x) is None
    else:
        assert re.search('not on cpu|Triton cannot be imported', why_not_triton(x))
        with pytest.raises(RuntimeError, match='not on cpu|Triton cannot be imported'):
            local_conv_triton(x, torch.zeros(1, 1, 9, 3, 3), 3, 1)
    ops._try_device.cache_clear()
    monkeypatch.setitem(sys.modules, 'timm_cotnet.ops.gpu.local_conv_kernels', None)
    monkeypatch.delattr(sys.modules['timm_cotnet.ops.gpu'], 'local_conv_kernels', raising=False)
    assert 'Triton cannot be imported' in why_not_triton(x)
    ops._try_device.cache_clear()
