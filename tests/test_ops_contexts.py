"""What lies behind the convolutions of a CoT layer as one function, against the layer in double precision."""
import copy

import pytest
import torch
from torch import nn

from timm_cotnet import CotLayer, CoxtLayer
from timm_cotnet.ops import native

pytestmark = pytest.mark.skipif(
    isinstance(native.load(torch.float32), str), reason=f'no native kernels: {native.load(torch.float32)}')

LAYERS = [
    (CotLayer, dict(dim=64), (3, 9, 7)), (CotLayer, dict(dim=16, kernel_size=5, dilation=2), (4, 8, 8)),
    (CotLayer, dict(dim=136, kernel_size=7), (2, 5, 6)), (CoxtLayer, dict(dim=96), (2, 6, 5)),
    (CotLayer, dict(dim=8, kernel_size=1), (2, 3, 1)), (CoxtLayer, dict(dim=32, dilation=3), (5, 1, 4)),
    (CotLayer, dict(dim=32), (2, 5, 7)), (CotLayer, dict(dim=64, dilation=4), (2, 3, 2)),  # smaller than a filter
    (CotLayer, dict(dim=128, dilation=2), (2, 5, 9)), (CotLayer, dict(dim=192), (3, 4, 3)),
    (CoxtLayer, dict(dim=192), (2, 3, 5)), (CoxtLayer, dict(dim=256), (2, 4, 4))]


def create(layer_cls, kwargs, seed=0):
    torch.manual_seed(seed)
    layer = layer_cls(**kwargs).train()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return layer


def image(B, C, H, W, seed=1):
    x = torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def is_fused(out):
    return out.grad_fn.name() == 'FuseContextsBackward'


def assert_close(actual, expected, tolerance=1e-4):
    scale = expected.abs().max().clamp(min=1e-2)
    assert (actual - expected).abs().max() < tolerance * scale


@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('layer_cls, kwargs, shape', LAYERS)
def test_against_double_precision(layer_cls, kwargs, shape, threads):
    layer = create(layer_cls, kwargs)
    expected = copy.deepcopy(layer).double()
    x = image(shape[0], kwargs['dim'], *shape[1:])
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = layer(x)
        assert is_fused(out) and out.is_contiguous(memory_format=torch.channels_last)
        out.backward(grad)
    finally:
        torch.set_num_threads(before)
    x2 = x.detach().double().requires_grad_()
    out2 = expected(x2)
    assert not is_fused(out2)
    out2.backward(grad.double())
    assert_close(out, out2)
    assert_close(x.grad, x2.grad, 1e-3)
    for (name, p), p2 in zip(layer.named_parameters(), expected.parameters()):
        if name not in ('se.0.bias', 'embed.3.bias'):  # what a norm takes out again: zero but for rounding
            assert_close(p.grad, p2.grad, 1e-3)
    for a, b in zip(layer.buffers(), expected.buffers()):
        assert_close(a.double(), b.double())


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('layer_cls, kwargs, shape', LAYERS)
def test_folded(layer_cls, kwargs, shape, threads, dtype, tolerance, monkeypatch):
    layer = create(layer_cls, kwargs).eval().to(dtype).double()
    fused = layer.fuse().to(dtype)
    x = image(shape[0], kwargs['dim'], *shape[1:]).detach().to(dtype)
    shapes = []
    fuse_contexts = native.fuse_contexts
    monkeypatch.setattr(native, 'fuse_contexts', lambda *args: shapes.append(args[0].shape) or fuse_contexts(*args))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            out, expected = fused(x), layer(x.double())
    finally:
        torch.set_num_threads(before)
    assert shapes == [x.shape] or dtype == torch.bfloat16  # which not every processor takes
    assert_close(out.double(), expected, tolerance)


def test_large_mean():
    """Statistics are taken from differences, so a mean far from zero costs no accuracy."""
    layer = create(CotLayer, dict(dim=32))
    with torch.no_grad():
        layer.embed[3].bias.add_(100)
    expected = copy.deepcopy(layer).double()
    x = image(2, 32, 6, 6)
    assert_close(layer(x), expected(x.double()), 1e-3)


def test_little_is_saved():
    layer = create(CotLayer, dict(dim=64))
    x = image(2, 64, 16, 16)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    in_function = {t.data_ptr() for t in out.grad_fn.saved_tensors if t.numel() >= x.numel()}
    assert len(in_function) == 3  # values, filters, static context
    unit = x.numel() * x.element_size()
    # x, key convolution, static context, query + key before and behind the ReLU, filters, values
    assert sum(size for size in kept.values() if size >= unit // 2) <= (1 + 1 + 1 + .5 + .5 + 72 / 64 + 1) * unit


@pytest.mark.parametrize('change', [
    'eval', 'double', 'contiguous', 'no_grad', 'hook', 'act', 'momentum', 'sync', 'autocast', 'frozen_norm'])
def test_where_it_is_not_fused(change):
    layer = create(CotLayer, dict(dim=32))
    x = image(2, 32, 6, 6)
    reference = copy.deepcopy(layer)
    for layer_ in (layer, reference):
        if change == 'eval':
            layer_.eval()
        if change == 'act':
            layer_.act = nn.SiLU() if layer_ is reference else type('Other', (nn.SiLU,), {})()
        if change == 'momentum':
            layer_.bn.momentum = None
        if change == 'frozen_norm':
            layer_.conv1x1[1].eval()
    if change == 'sync':
        layer.bn = type('Other', (nn.BatchNorm2d,), {})(32)
        layer.bn.load_state_dict(reference.bn.state_dict())
    if change == 'hook':
        seen = []
        layer.conv1x1[1].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    if change == 'double':
        layer, x = layer.double(), x.detach().double().requires_grad_()
    if change == 'contiguous':
        x = x.detach().contiguous().requires_grad_()
    if change == 'autocast':
        with torch.autocast('cpu', torch.bfloat16):
            out = layer(x)
    elif change == 'no_grad':
        with torch.no_grad():
            out = layer(x)
    else:
        out = layer(x)
    assert out.grad_fn is None if change == 'no_grad' else not is_fused(out)
    expected = reference.double()(x.double())
    assert_close(out.double(), expected, 0.1 if change == 'autocast' else 1e-4)
    if change == 'hook':
        assert seen == [x.shape]


def test_hook_on_the_values():
    """A hook on convolution and norm together sees them run."""
    layer = create(CotLayer, dict(dim=16))
    expected = copy.deepcopy(layer)
    seen = []
    layer.conv1x1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    x = image(2, 16, 4, 5)
    assert_close(layer(x), expected(x))
    assert seen == [x.shape]


def test_backward_through_fused_and_plain_passes():
    """Plain batch norm saves running statistics, which it changes without telling autograd."""
    layer = create(CotLayer, dict(dim=16))
    expected = copy.deepcopy(layer).double()
    x = image(2, 16, 4, 5)
    x64 = x.detach().double().requires_grad_()
    first, second = layer(x.contiguous()), layer(x)
    assert not is_fused(first) and is_fused(second)
    (first.sum() + (second ** 2).sum()).backward()
    (expected(x64).sum() + (expected(x64) ** 2).sum()).backward()
    assert_close(x.grad, x64.grad)


def test_second_derivative():
    layer = create(CotLayer, dict(dim=16))
    expected = copy.deepcopy(layer).double()
    x = image(2, 16, 4, 5)
    results = []
    for layer_, input_ in ((layer, x), (expected, x.detach().double().requires_grad_())):
        out = layer_(input_)
        grad, = torch.autograd.grad(out.square().sum(), input_, create_graph=True)
        results.append((grad, *torch.autograd.grad(grad.square().sum(), [input_, layer_.bn.weight])))
    for actual, wanted in zip(*results):
        assert_close(actual, wanted, 1e-3)


def test_backward_twice_and_batched():
    if torch.__version__.startswith('2.6.'):
        pytest.skip('torch 2.6 cannot take many gradients at once through a group norm')
    layer = create(CotLayer, dict(dim=16))
    x = image(2, 16, 4, 5)
    out = layer(x)
    grads = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(3))
    batched, = torch.autograd.grad(out, x, grads, retain_graph=True, is_grads_batched=True)
    for i in range(3):
        grad, = torch.autograd.grad(out, x, grads[i], retain_graph=True)
        assert_close(batched[i], grad)


def test_frozen_parameters():
    layer = create(CotLayer, dict(dim=16))
    layer.bn.requires_grad_(False)
    layer.se.requires_grad_(False)
    x = image(2, 16, 4, 5)
    out = layer(x)
    assert is_fused(out)
    out.square().sum().backward()
    assert layer.bn.weight.grad is None and layer.se[0].weight.grad is None
    assert layer.conv1x1[1].weight.grad.abs().max() > 0


def test_checkpointing():
    layer = create(CotLayer, dict(dim=16))
    x = image(2, 16, 4, 5)
    grads = []
    for use in (False, True):
        layer_ = copy.deepcopy(layer)
        if use:
            out = torch.utils.checkpoint.checkpoint(layer_, x, use_reentrant=False)
        else:
            out = layer_(x)
        out.square().sum().backward()
        grads.append((x.grad.clone(), layer_.bn.weight.grad))
        x.grad = None
    for a, b in zip(*grads):
        assert_close(a, b, 1e-5)


def test_one_image():
    """The norm of the fusion needs more than one value, and says so."""
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        create(CotLayer, dict(dim=16))(image(1, 16, 4, 4))
