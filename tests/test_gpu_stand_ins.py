"""Norms, blocks, inference and pools by Triton kernels against plain PyTorch; see `triton_helpers.py`."""
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import FORMAT_NAMES, FORMATS, image, shaken, shortcut
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from triton_helpers import (
    DEVICE, INTERPRETED, LAYERS_AND_FORMATS, TOLERANCE, assert_all_close, assert_trains_like_plain, create, error,
    exact, gradient_for, gradients_of_gradients, kernels, outside, passed_in_the_interpreter, plain, value_and_grads)

from timm_cotnet import CotBottleneck, SplitAttnBottleneck
from timm_cotnet.deploy import FoldedStem
from timm_cotnet.ops import conditions, dispatch, watch
from timm_cotnet.ops.gpu import contexts
from timm_cotnet.ops.gpu.images import change_format
from timm_cotnet.ops.gpu.norm import norm_act, norm_act_eval
from timm_cotnet.ops.gpu.stand_ins import (
    infer_bottleneck, infer_cot_layer, infer_folded_bottleneck, infer_folded_cot_layer, infer_folded_stem, padded_pool,
    pool, train_bottleneck)


pytestmark = pytest.mark.usefixtures('exact_convolutions')


@pytest.mark.slow
@outside
def test_kernels_in_the_interpreter():
    passed, skipped = passed_in_the_interpreter(__file__)
    assert passed >= 75 and skipped == 1  # this test


# Norms


def create_norm(C=16, dtype=torch.float64):
    torch.manual_seed(0)
    return shaken(nn.BatchNorm2d(C)).to(DEVICE, dtype)


class Tail(nn.Module):
    """A norm and what follows it."""

    def __init__(self, norm, relu, residual):
        super().__init__()
        self.norm, self.relu, self.residual = norm, relu, residual

    def own(self, x):
        out = self.norm(x)
        if self.residual:
            out = out + x[:, :, :1].cos()
        return F.relu(out) if self.relu else out

    def by_kernels(self, x):
        residual = x[:, :, :1].cos().expand_as(x) if self.residual else None
        return (norm_act if self.training else norm_act_eval)(x, self.norm, self.relu, residual)


@kernels
def test_norm_of_a_large_mean():
    norm, x = create_norm(16, torch.float32), image(2, 16, 9, 7, torch.channels_last) + 1000
    reference, exact_x = exact(norm, x)
    assert error(norm_act(x.to(DEVICE), norm), F.relu(reference(exact_x))) < 1e-3
    assert error(norm.running_var, reference.running_var) < 1e-4


@kernels
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('C, shape', [(16, (2, 5, 3)), (40, (1, 2, 3)), (9, (3, 1, 1))])
def test_norm_act(C, shape, relu, residual):
    tail, x = Tail(create_norm(C), relu, residual), image(shape[0], C, *shape[1:], dtype=torch.float64).to(DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    reference, exact_x = exact(tail, x)
    got = value_and_grads(Tail.by_kernels, tail, x)
    assert_all_close(got, value_and_grads(Tail.own, reference, exact_x), 1e-9)
    for name, buffer in tail.named_buffers():
        torch.testing.assert_close(buffer.cpu(), reference.get_buffer(name))
    expected = gradients_of_gradients(Tail.own, reference, exact_x)
    assert_all_close(gradients_of_gradients(Tail.by_kernels, tail, x), expected, 1e-7)


@kernels
@pytest.mark.parametrize('memory_format', FORMATS, ids=FORMAT_NAMES.get)
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('residual', [False, True])
def test_norm_act_in_evaluation(residual, dtype, memory_format):
    tail = Tail(create_norm(24), True, residual).eval()
    x = image(2, 24, 3, 5, memory_format, dtype).to(DEVICE)
    residual = image(2, 24, 3, 5, seed=5).to(DEVICE) if residual else None
    with torch.no_grad():
        got = norm_act_eval(x, tail.norm, True, residual)
        exact_norm, exact_x = exact(tail.norm, x)
        expected = exact_norm(exact_x) + (0 if residual is None else residual.cpu().double())
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    assert error(got, F.relu(expected)) < (1e-12 if dtype == torch.float64 else 2 ** -7)


@kernels
def test_norm_act_of_mixed_dtypes():
    """As under autocast: parameters in float32, and a residual in another dtype than x."""
    norm = create_norm(16, torch.float32)
    x = image(2, 16, 4, 3, torch.channels_last, torch.bfloat16).to(DEVICE).requires_grad_()
    residual = image(2, 16, 4, 3, seed=5).to(DEVICE).requires_grad_()
    exact_norm, exact_x = exact(norm, x)
    out = norm_act(x, norm, residual=residual)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    exact_x, exact_residual = exact_x.requires_grad_(), residual.detach().cpu().double().requires_grad_()
    expected = F.relu(exact_norm(exact_x) + exact_residual)
    expected.square().sum().backward()
    assert error(out, expected) < 2 ** -6
    pairs = (x, exact_x), (residual, exact_residual), (norm.weight, exact_norm.weight), (norm.bias, exact_norm.bias)
    for ours, theirs in pairs:
        assert ours.grad.dtype == ours.dtype and error(ours.grad, theirs.grad) < 0.03


@kernels
@pytest.mark.parametrize('training', [False, True])
def test_nan_stays_nan(training):
    norm, x = create_norm(16), image(2, 16, 3, 4, torch.channels_last, torch.float64).to(DEVICE)
    x[1, 3, 2, 1] = float('nan')
    with torch.no_grad():
        out = (norm_act if training else norm_act_eval)(x, norm.train(training))
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[(slice(None), 3) if training else (1, 3, 2, 1)] = True
    assert torch.equal(out.isnan(), expected)


@kernels
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('shape', [(2, 64, 8, 8), (3, 5, 7, 7), (1, 70, 13, 10), (2, 16, 1, 1)], ids=str)
def test_memory_formats(shape, dtype):
    x = image(*shape, dtype=dtype).to(DEVICE).contiguous()
    for back, memory_format in ((False, torch.channels_last), (True, torch.contiguous_format)):
        x = change_format(x, back=back)
        assert x.is_contiguous(memory_format=memory_format) and torch.equal(x.cpu(), image(*shape, dtype=dtype))


# Blocks, and inference


def create_block(cls, downsample, dtype=torch.float64):
    torch.manual_seed(0)
    if downsample == 'pool':
        block = cls(16, 16, 2, shortcut(16, 64))
    elif downsample == 'stride':
        block = cls(16, 16, 2, nn.Sequential(nn.Conv2d(16, 64, 1, 2, bias=False), nn.BatchNorm2d(64)))
    else:
        block = cls(64, 16)
    x = image(4, 64 if downsample is None else 16, 6, 5, torch.channels_last, dtype)
    return shaken(block).to(DEVICE, dtype), x.to(DEVICE)


BLOCKS = [
    (CotBottleneck, None), (CotBottleneck, 'pool'), (CotBottleneck, 'stride'),
    (functools.partial(CotBottleneck, cardinality=2, base_width=64), 'pool'), (SplitAttnBottleneck, 'pool')]
BLOCK_NAMES = ['cot', 'cot_pool', 'cot_stride', 'coxt_pool', 'split_pool']


@kernels
@pytest.mark.parametrize('cls, downsample', BLOCKS, ids=BLOCK_NAMES)
def test_train_bottleneck(cls, downsample):
    block, x = create_block(cls, downsample)
    names = [name for name, module in block.named_modules() if name == 'conv2.se.0' or name == 'conv2.fc1']
    assert_trains_like_plain(train_bottleneck, block, x, zero=[f'{name}.bias' for name in names])


@kernels
def test_train_bottleneck_with_a_shortcut_that_is_spread():
    """What is added in place may have fewer values."""
    block, x = create_block(CotBottleneck, None)
    block.downsample = nn.AdaptiveAvgPool2d(1)
    assert_trains_like_plain(train_bottleneck, block, x, zero=('conv2.se.0.bias',))


@kernels
def test_train_bottleneck_of_a_frozen_input():
    block, x = create_block(CotBottleneck, 'pool')
    reference, exact_x = exact(block, x)
    out, expected = train_bottleneck(block, x), plain(reference, exact_x)
    grad = torch.empty_like(out).copy_(gradient_for(out))
    out.backward(grad), expected.backward(grad.cpu())
    assert x.grad is None
    for name, parameter in block.named_parameters():
        if name != 'conv2.se.0.bias':
            assert error(parameter.grad, reference.get_parameter(name).grad) < 1e-9, name


@pytest.fixture
def folded_dtype(monkeypatch):
    """The most exact one that cuDNN has fused convolutions for; in the interpreter plain PyTorch stands in for it."""
    if not INTERPRETED:
        return torch.float32

    def add_relu(x, w, z, alpha, b, *args):
        out = F.conv2d(x, w, b, *args)
        assert out.shape == z.shape and out.dtype == z.dtype  # nothing is spread or cast
        return F.relu(out + alpha * z)

    monkeypatch.setattr(torch, 'cudnn_convolution_relu', lambda x, w, b, *args: F.relu(F.conv2d(x, w, b, *args)))
    monkeypatch.setattr(torch, 'cudnn_convolution_add_relu', add_relu)
    return torch.float64


@kernels
@torch.no_grad()
@pytest.mark.parametrize('cls, downsample', BLOCKS, ids=BLOCK_NAMES)
def test_infer_bottleneck(cls, downsample):
    block, x = create_block(cls, downsample)
    expected = plain(*exact(block.eval(), x))
    for x in (x, x.contiguous()):
        out = infer_bottleneck(block, x)
        assert error(out, expected) < 1e-9 and out.is_contiguous() == x.is_contiguous()


@kernels
@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('downsample', [None, 'pool', 'stride'])
def test_infer_bottleneck_in_other_dtypes(downsample, dtype, folded_dtype):
    block, x = create_block(CotBottleneck, downsample, dtype)
    expected = plain(*exact(block.eval(), x))
    out = infer_bottleneck(block, x)
    assert out.dtype == dtype and error(out, expected) < TOLERANCE[dtype] / 4
    if dtype != torch.float32:
        block, x = create_block(CotBottleneck, downsample, torch.float32)
        expected = plain(*exact(block.eval(), x))
        with torch.autocast(DEVICE, dtype):
            out = infer_bottleneck(block, x)
        assert out.dtype == dtype and error(out, expected) < TOLERANCE[dtype] / 4


@kernels
@torch.no_grad()
@pytest.mark.parametrize('memory_format', FORMATS, ids=FORMAT_NAMES.get)
def test_folded_blocks_and_stems(memory_format, folded_dtype):
    """What they give is of the memory format of what they get."""
    tolerance = 1e-12 if folded_dtype == torch.float64 else 1e-4
    for downsample in (None, 'pool', 'stride'):
        block, x = create_block(CotBottleneck, downsample)
        expected, x = plain(*exact(block.eval(), x)), x.to(folded_dtype).contiguous(memory_format=memory_format)
        block = block.fuse().to(folded_dtype)
        out = infer_folded_bottleneck(block, x)
        assert error(out, expected) < tolerance and out.is_contiguous(memory_format=memory_format)
    for convs in (1, 3):
        layers = [layer for i in range(convs) for layer in (nn.Conv2d(3 if i == 0 else 8, 8, 3), nn.ReLU())]
        stem, x = FoldedStem(*layers).to(DEVICE), image(2, 3, 9, 8, memory_format).to(DEVICE)
        expected, stem = nn.Sequential(*stem).double()(x.double()), stem.to(folded_dtype)
        out = infer_folded_stem(stem, x.to(folded_dtype))
        assert error(out, expected.cpu()) < tolerance and out.is_contiguous(memory_format=memory_format)


@kernels
@torch.no_grad()
def test_infer_bottleneck_with_a_shortcut_that_is_spread(folded_dtype):
    """What is added in place may have fewer values."""
    block, x = create_block(CotBottleneck, 'stride', torch.float32)
    block.eval().downsample[0].stride = 6, 5
    expected = plain(*exact(block, x))
    assert error(infer_bottleneck(block, x), expected) < 1e-5
    assert error(infer_folded_bottleneck(block.fuse(), x), expected) < 1e-5


@kernels
@torch.no_grad()
@pytest.mark.parametrize('children', [(), (nn.Identity(),)], ids=['nothing', 'identity'])
def test_infer_bottleneck_with_a_shortcut_that_does_nothing(children, folded_dtype):
    block, x = create_block(CotBottleneck, None, torch.float32)
    block.eval().downsample = nn.Sequential(*children)
    expected = plain(*exact(block, x))
    assert error(infer_bottleneck(block, x), expected) < 1e-5
    assert error(infer_folded_bottleneck(block.fuse(), x), expected) < 1e-5


@kernels
@torch.no_grad()
def test_infer_bottleneck_whose_norms_do_not_fold():
    for change in (lambda block: block.downsample[2].register_forward_hook(lambda *args: None),
                   lambda block: setattr(block.downsample, '2', nn.BatchNorm2d(64, affine=False).double()),
                   lambda block: setattr(block, 'conv1', nn.Conv2d(16, 16, 3, padding=1).double()),
                   lambda block: setattr(block, 'conv3', nn.Conv2d(16, 64, 1).double())):
        block, x = create_block(CotBottleneck, 'pool')
        change(block.eval())
        block = block.to(DEVICE).eval()
        assert error(infer_bottleneck(block, x), plain(*exact(block, x))) < 1e-9


@kernels
@torch.no_grad()
@pytest.mark.parametrize('tag, memory_format', LAYERS_AND_FORMATS, ids=str)
def test_infer_cot_layer(tag, memory_format):
    layer, x = create(tag, memory_format=memory_format)
    expected = plain(*exact(layer.eval(), x))
    out = infer_cot_layer(layer, x)
    assert error(out, expected) < 1e-9 and out.is_contiguous(memory_format=memory_format)
    assert error(infer_cot_layer(layer, x[:1]), expected[:1]) < 1e-9


@kernels
@pytest.mark.parametrize('mean', [0, 1000])
@pytest.mark.parametrize('kernel_size, groups, filters', [(3, 1, 4), (5, 2, 6), (1, 1, 20)])
def test_norm_of_filters_of_small_images(kernel_size, groups, filters, mean, monkeypatch):
    """One launch gives what several do."""
    N = filters * kernel_size ** 2
    logits = mean + image(2, N, 7, 6, torch.channels_last, torch.float64).to(DEVICE)
    parameters = [image(1, N, 1, 1, seed=i, dtype=torch.float64).to(DEVICE).flatten() for i in range(3)]
    s = contexts.ContextsSettings(kernel_size, 1, groups, filters)
    got, several, means = contexts.infer_filter_table(logits, *parameters, s), logits.new_empty(2, 4, N), \
        logits.new_empty(2, N)
    contexts.filter_table(logits, *parameters, s, several, means)
    torch.testing.assert_close(got[:, :2], several[:, :2], rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(contexts, '_SMALL', 7 * 6 - 1)
    assert contexts.infer_filter_table(logits, *parameters, s)[:, :2].equal(several[:, :2])


@kernels
@pytest.mark.parametrize('B, C, hidden, runs, dtype', [
    (1, 64, 32, 98, torch.float32), (3, 48, 24, 9, torch.float64), (33, 96, 48, 3, torch.float32),
    (2, 40, 20, 1, torch.float32), (2, 128, 64, 8, torch.float32), (40, 64, 32, 5, torch.float64)])
@pytest.mark.parametrize('normed', [False, True])
@pytest.mark.parametrize('logits', [1, 2])  # of a channel
def test_mixing_weights(B, C, hidden, runs, dtype, normed, logits):
    """Of any number of images and runs: several programs have the logits of an image if images are few."""
    torch.manual_seed(0)
    shapes = (B, runs, C), (hidden, C), (hidden,), (2, hidden), (logits * C, hidden), (logits * C,)
    tensors = [torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes]
    pooled, weight1, bias1, table, weight2, bias2 = tensors
    out = contexts.infer_attention(pooled, contexts.Mixing(weight1, bias1, table if normed else None, weight2, bias2))
    pooled, weight1, bias1, (scale, shift), weight2, bias2 = (t.cpu().double() for t in tensors)
    expected = F.linear(pooled.sum(1), weight1, bias1)
    expected = F.linear(F.relu(expected * scale + shift if normed else expected), weight2, bias2)
    assert error(out, expected) < (1e-14 if dtype == torch.float64 else 1e-6)


@kernels
@torch.no_grad()
def test_infer_cot_layer_of_filters_in_any_memory(folded_dtype):
    """Nothing is kept of parameters between calls, however they change."""
    layer, x = create('coxt', torch.float32)
    for change in (lambda t: t.contiguous(memory_format=torch.channels_last), lambda t: 2 * t,
                   lambda t: torch.stack([t, -t], 4)[..., 0]):
        for module in layer.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = change(module.weight.data)
        for tensor in (*layer.parameters(), layer.bn.running_var):
            tensor.data.mul_(1.25)
        assert error(infer_cot_layer(layer.eval(), x), plain(*exact(layer, x))) < 1e-5


@kernels
@torch.no_grad()
@pytest.mark.parametrize('tag', ['cot', 'coxt'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infer_cot_layer_in_other_dtypes(dtype, tag, folded_dtype):
    layer, x = create(tag, dtype)
    out = infer_cot_layer(layer.eval(), x)
    assert out.dtype == dtype and error(out, plain(*exact(layer, x))) < TOLERANCE[dtype]
    if dtype != torch.float32:
        layer, x = create(tag, torch.float32)
        with torch.autocast(DEVICE, dtype):
            out = infer_cot_layer(layer.eval(), x)
        assert out.dtype == dtype and error(out, plain(*exact(layer, x))) < TOLERANCE[dtype]


@kernels
@torch.no_grad()
@pytest.mark.parametrize('tag, memory_format', LAYERS_AND_FORMATS, ids=str)
def test_infer_folded_cot_layer(tag, memory_format, folded_dtype):
    layer, x = create(tag, folded_dtype, memory_format)
    expected = plain(*exact(layer.eval(), x))
    out = infer_folded_cot_layer(layer.fuse(), x)
    assert error(out, expected) < TOLERANCE[folded_dtype] and out.is_contiguous(memory_format=memory_format)


@kernels
@torch.no_grad()
def test_parameters_that_are_not_contiguous(folded_dtype):
    layer, x = create('cot', folded_dtype)
    expected = plain(*exact(layer.eval(), x))
    layer = layer.fuse()
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 1:
                module._parameters[name] = nn.Parameter(torch.stack([parameter, -parameter], 1)[:, 0])
                assert not module._parameters[name].is_contiguous()
    assert error(infer_folded_cot_layer(layer, x), expected) < TOLERANCE[folded_dtype]


@kernels
@torch.no_grad()
@pytest.mark.parametrize('cls, downsample', BLOCKS, ids=BLOCK_NAMES)
def test_infer_folded_bottleneck(cls, downsample, folded_dtype):
    block, x = create_block(cls, downsample, folded_dtype)
    expected = plain(*exact(block.eval(), x))
    assert error(infer_folded_bottleneck(block.fuse(), x), expected) < TOLERANCE[folded_dtype]


@pytest.fixture
def contiguous_convolutions(monkeypatch, folded_dtype):
    """Those of cuDNN in float64 know no channels-last: what they give is contiguous for any input."""
    def contiguous(function):
        return lambda *args, **kwargs: function(*args, **kwargs).contiguous()

    for module, name in ((F, 'conv2d'), (torch, 'conv2d'), (torch, 'cudnn_convolution_relu'),
                         (torch, 'cudnn_convolution_add_relu')):
        monkeypatch.setattr(module, name, contiguous(getattr(module, name)))
    # part of the device, so to say, not what a program replaced
    monkeypatch.setattr(watch, '_WRITTEN', [written for written in watch._WRITTEN if written[:2] != (F, 'conv2d')])


@kernels
@torch.no_grad()
@pytest.mark.parametrize('tag', ['cot', 'coxt'])
def test_convolutions_that_give_contiguous_images(tag, contiguous_convolutions, folded_dtype):
    tolerance = TOLERANCE[folded_dtype]
    layer, x = create(tag, folded_dtype)
    expected = plain(*exact(layer.eval(), x))
    for module, run in ((layer, infer_cot_layer), (layer.fuse(), infer_folded_cot_layer)):
        out = run(module, x)
        assert error(out, expected) < tolerance and out.is_contiguous(memory_format=torch.channels_last)
    block, x = create_block(BLOCKS[BLOCK_NAMES.index(f'{tag}_pool')][0], 'pool', folded_dtype)
    expected = plain(*exact(block.eval(), x))
    with pytest.MonkeyPatch.context() as patch:  # the layer in the block by kernels too
        patch.setattr(dispatch, '_stand_ins', lambda kind, device_type: dispatch._ON_GPU.get(kind, ()))
        patch.setattr(conditions, '_why_not_cudnn', lambda x: None)
        for module, run in ((block, infer_bottleneck), (copy.deepcopy(block).fuse(), infer_folded_bottleneck)):
            assert error(run(module, x), expected) < tolerance


# Pools


def assert_pools_like_plain(module, x, tolerance):
    """Output, gradient and the gradient of that."""
    exact_x = x.detach().cpu().double().requires_grad_()
    expected = nn.AvgPool2d.forward(module, exact_x)
    expected_grad = gradient_for(expected).requires_grad_()
    expected_x_grad, = torch.autograd.grad(expected, exact_x, expected_grad, create_graph=True)
    x = x.detach().requires_grad_()
    out = pool(module, x)
    grad = torch.empty_like(out).copy_(expected_grad.detach()).requires_grad_()
    x_grad, = torch.autograd.grad(out, x, grad, retain_graph=True)
    assert out.dtype == x_grad.dtype == x.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, expected) <= tolerance and error(x_grad, expected_x_grad) <= tolerance
    x_grad, = torch.autograd.grad(out, x, grad, create_graph=True)
    onto = gradient_for(x_grad)
    again, = torch.autograd.grad(x_grad, grad, onto.to(x_grad))
    assert error(again, torch.autograd.grad(expected_x_grad, expected_grad, onto)[0]) <= tolerance


@kernels
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_pool_dtypes(dtype):
    x = image(2, 24, 7, 6, torch.channels_last, dtype).to(DEVICE)
    assert_pools_like_plain(nn.AvgPool2d(3, 2, 1), x, 1e-12 if dtype == torch.float64 else 2 ** -7)


@kernels
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_any_pool(data):
    def size(low, high):
        return data.draw(st.integers(low, high))

    kernel_size, stride = (size(1, 4), size(1, 4)), (size(1, 3), size(1, 3))
    padding = tuple(size(0, k // 2) for k in kernel_size)
    H, W = (size(max(1, k - 2 * p), 9) for k, p in zip(kernel_size, padding))
    x = image(size(1, 2), size(2, 20), H, W, torch.channels_last, torch.float64).to(DEVICE)
    module = nn.AvgPool2d(kernel_size, stride, padding)
    assert_pools_like_plain(module, x, 1e-12)
    torch.testing.assert_close(padded_pool(module, x), pool(module, x), rtol=0, atol=1e-12)


@kernels
def test_padded_pool():
    x = image(2, 8, 7, 6, torch.channels_last, torch.float64).to(DEVICE).requires_grad_()
    module = nn.AvgPool2d(3, 2, (1, 0))
    outs = pool(module, x), padded_pool(module, x)
    torch.testing.assert_close(*outs, rtol=0, atol=1e-12)
    grad = gradient_for(outs[0]).to(DEVICE)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in outs), rtol=0, atol=1e-12)
