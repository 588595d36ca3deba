"""All of a CoT layer behind its convolutions in C, in training and folded, against the definition in float64."""
import copy

import pytest
import torch

from timm_cotnet import CotLayer, CoxtLayer, local_conv
from timm_cotnet.ops.batch_norm import averages_of
from timm_cotnet.ops.contexts import ContextsParameters, ContextsSettings, contexts
from timm_cotnet.ops.cpu import contexts as cpu_contexts
from timm_cotnet.ops.cpu.contexts import contexts_backward, contexts_folded, contexts_forward

from helpers import needs_kernels, threads_set

pytestmark = needs_kernels

# Batches are not tiny, as the norm of the mix, which is over pooled images, makes noise of few.
LAYERS = [
    (CotLayer, dict(dim=64), (7, 9, 7)), (CotLayer, dict(dim=16, kernel_size=5, dilation=2), (8, 8, 8)),
    (CotLayer, dict(dim=136, kernel_size=7), (6, 5, 6)), (CoxtLayer, dict(dim=96), (6, 6, 5)),
    (CotLayer, dict(dim=8, kernel_size=1), (6, 3, 1)), (CoxtLayer, dict(dim=32, dilation=3), (9, 1, 4)),
    (CotLayer, dict(dim=32), (6, 5, 7)), (CotLayer, dict(dim=64, dilation=4), (6, 3, 2)),  # smaller than a filter
    (CotLayer, dict(dim=128, dilation=2), (6, 5, 9)), (CotLayer, dict(dim=192), (7, 4, 3)),
    (CotLayer, dict(dim=40), (6, 4, 5)), (CoxtLayer, dict(dim=192), (6, 3, 5)), (CoxtLayer, dict(dim=256), (6, 4, 4))]


def create(layer_cls=CotLayer, **kwargs):
    torch.manual_seed(0)
    layer = layer_cls(**{'dim': 16, **kwargs}).train()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return layer


def inputs(layer, B=2, H=4, W=5, dtype=torch.float32):
    """Values, filters before their norm, and static context."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(B, n, H, W, generator=generator).add_(1).to(dtype).contiguous(memory_format=torch.channels_last)
        for n in (layer.dim, layer.embed[4].num_channels, layer.dim)]


def parameters_of(layer):
    """In the order of `ContextsParameters`."""
    modules = (layer.conv1x1[1], layer.embed[4], layer.bn, layer.se[0], layer.se[1], layer.se[3])
    return [p for module in modules for p in (module.weight, module.bias)]


def settings_of(layer):
    return ContextsSettings(
        layer.kernel_size, layer.dilation, layer.groups, layer.embed[4].num_groups,
        layer.conv1x1[1].eps, layer.embed[4].eps, layer.bn.eps, layer.se[1].eps)


@torch.no_grad()
def trained(layer, tensors, grad=None):
    """Output of the kernels, and the gradients of the tensors and of `ContextsParameters` for that of the output."""
    parameters, averages = parameters_of(layer), [averages_of(m) for m in (layer.conv1x1[1], layer.bn, layer.se[1])]
    out, pooled, attn, *tables = contexts_forward(*tensors, parameters, averages, settings_of(layer))
    if grad is None:
        return out
    grad = grad.contiguous(memory_format=torch.channels_last)
    return out, contexts_backward(grad, *tensors, pooled, attn, tables, parameters, settings_of(layer))


def exact(layer, tensors, parameters=None):
    """The definition in double precision, and the leaves it was computed from."""
    parameters = parameters_of(layer) if parameters is None else parameters
    leaves = [t if t is None else t.detach().double().requires_grad_() for t in (*tensors, *parameters)]
    return contexts(*leaves[:3], ContextsParameters(*leaves[3:]), settings_of(layer)), leaves


def assert_close(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-2)


def assert_gradients_close(actual, expected, tolerance=1e-3):
    """Those of three tensors and of `ContextsParameters`."""
    for i, (one, other) in enumerate(zip(actual, expected)):
        if i != 3 + 7:  # a bias that a norm takes out again: zero but for rounding
            assert_close(one, other, tolerance)


@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('layer_cls, kwargs, shape', LAYERS)
def test_training(layer_cls, kwargs, shape, threads):
    layer = create(layer_cls, **kwargs)
    tensors = inputs(layer, *shape)
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(2))
    with threads_set(threads):
        out, actual = trained(layer, tensors, grad)
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected, leaves = exact(layer, tensors)
    assert_close(out, expected)
    assert_gradients_close(actual, torch.autograd.grad(expected, leaves, grad.double()))


def test_running_statistics():
    layer = create()
    expected = copy.deepcopy(layer).double()
    value, logits, static = inputs(layer)
    for _ in range(2):
        trained(layer, (value, logits, static))
        with torch.no_grad():
            normed = expected.conv1x1[1](value.double())
            filters = expected.embed[4](logits.double()).unflatten(1, (-1, layer.kernel_size ** 2))
            dynamic = expected.bn(local_conv(normed, filters, layer.kernel_size, layer.dilation))
            pooled = torch.nn.functional.silu(dynamic).mean((2, 3), True) + static.double().mean((2, 3), True)
            expected.se(pooled)
    for name, statistic in expected.named_buffers():
        if not name.startswith(('key_embed', 'embed')):
            assert_close(layer.get_buffer(name), statistic)
    assert layer.bn.num_batches_tracked == layer.conv1x1[1].num_batches_tracked == layer.se[1].num_batches_tracked == 2


def test_large_mean():
    """Statistics are taken from differences, so a mean far from zero costs no accuracy."""
    layer = create(dim=32)
    value, logits, static = inputs(layer, 2, 6, 6)
    tensors = value + 100, logits + 100, static
    assert_close(trained(layer, tensors), exact(layer, tensors)[0], 1e-3)


def folded_parameters(layer, paired=True):
    """Those of `contexts_folded`, in order."""
    norm, se = layer.embed[4], layer.se
    last = [se[3].weight, se[3].bias] if paired else [t[1::2] - t[::2] for t in (se[3].weight, se[3].bias)]
    return [norm.weight, norm.bias, layer.bn.bias, se[0].weight, se[0].bias, *last]


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('paired', [True, False])
@pytest.mark.parametrize('layer_cls, kwargs, shape', LAYERS)
def test_folded(layer_cls, kwargs, shape, paired, threads, dtype, tolerance):
    layer = create(layer_cls, **kwargs).to(dtype)
    tensors = inputs(layer, *shape, dtype=dtype)
    p = folded_parameters(layer, paired)
    settings = layer.kernel_size, layer.dilation, layer.groups, layer.embed[4].eps
    expected, _ = exact(layer, tensors, [None, None, p[0], p[1], None, *p[2:5], None, None, *p[5:]])
    with threads_set(threads), torch.no_grad():
        out = contexts_folded(*tensors, p, *settings)
        alone = contexts_folded(*(t[:1] for t in tensors), p, *settings)  # an image that threads share
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out.double(), expected, tolerance)
    assert_close(alone, out[:1], 1e-5 if dtype == torch.float32 else 2 ** -7)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('B, threads', [(1, 1), (2, 3), (3, 3), (7, 3)])
@pytest.mark.parametrize('layer_cls, kwargs, shape', LAYERS)
def test_folded_over_values(layer_cls, kwargs, shape, B, threads, dtype):
    """The result may take the memory of the values, but not where threads share an image."""
    layer = create(layer_cls, **kwargs).to(dtype)
    value, *others = inputs(layer, B, *shape[1:], dtype=dtype)
    args = (*others, folded_parameters(layer), layer.kernel_size, layer.dilation, layer.groups, layer.embed[4].eps)
    with threads_set(threads), torch.no_grad():
        before = value.clone()
        expected = contexts_folded(value, *args)
        assert torch.equal(value, before)
        out = contexts_folded(value, *args, overwrite=True)
    assert torch.equal(out, expected)
    assert (out.data_ptr() == value.data_ptr()) == (B >= threads)
    if B < threads:
        assert torch.equal(value, before)


def test_threads_never_share_an_image_over_values(monkeypatch):
    """Not even if another Python thread sets more of them in between."""
    layer = create(dim=64)
    value, *others = inputs(layer, 1, 24, 24)
    args = (*others, folded_parameters(layer), 3, 1, 1, 1e-5)
    with threads_set(3), torch.no_grad():
        expected = contexts_folded(value, *args)
        monkeypatch.setattr(cpu_contexts, 'num_threads', lambda: 1)
        out = contexts_folded(value, *args, overwrite=True)
    assert out.data_ptr() == value.data_ptr()
    assert_close(out, expected, 1e-5)


def test_folded_takes_any_layout():
    layer = create()
    tensors = inputs(layer)
    parameters = [p.detach() for p in folded_parameters(layer)]
    expected = contexts_folded(*tensors, parameters, 3, 1, 1, 1e-5)
    parameters[3] = parameters[3].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(contexts_folded(*(t.contiguous() for t in tensors), parameters, 3, 1, 1, 1e-5), expected)
