"""1x1 convolutions with their norms in one autograd function against plain PyTorch; see `triton_helpers.py`."""
import pytest
import torch
import torch.nn.functional as F
from helpers import image, shaken, shortcut
from torch import nn
from triton_helpers import (
    DEVICE, TOLERANCE, assert_all_close, assert_trains_like_plain, error, exact, gradient_for, gradients_of_gradients,
    kernels, outside, passed_in_the_interpreter, plain, tensors_of, value_and_grads)

from timm_cotnet import CotBottleneck
from timm_cotnet.ops.gpu import conv_norm, stand_ins
from timm_cotnet.ops.gpu.conv_norm import conv_norm_act
from timm_cotnet.ops.gpu.stand_ins import train_bottleneck

pytestmark = pytest.mark.usefixtures('exact_convolutions')


@pytest.mark.slow
@outside
def test_kernels_in_the_interpreter():
    passed, skipped = passed_in_the_interpreter(__file__)
    assert passed >= 36 and skipped == 1  # this test


class Unit(nn.Module):
    """A convolution, its norm and what follows."""

    def __init__(self, inputs=8, outputs=24, relu=True, residual=True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu, self.residual = relu, residual

    def _residual(self, x):
        return x.cos().repeat(1, 3, 1, 1) if self.residual else None

    def forward(self, x):
        out = self.norm(self.conv(x))
        out = out if self._residual(x) is None else out + self._residual(x)
        return F.relu(out) if self.relu else out

    forward.__wrapped__ = forward  # what `plain` calls


def fused(unit, x):
    return conv_norm_act(x, unit.conv, unit.norm, unit.relu, unit._residual(x))


def create(dtype=torch.float64, size=(3, 4, 3), relu=True, residual=True):
    torch.manual_seed(0)
    unit = shaken(Unit(relu=relu, residual=residual)).to(DEVICE, dtype)
    return unit, image(size[0], 8, *size[1:], torch.channels_last, dtype).to(DEVICE)


@kernels
@pytest.mark.parametrize('size', [(3, 4, 3), (5, 1, 1), (1, 2, 1)], ids=str)
@pytest.mark.parametrize('relu, residual', [(True, False), (True, True), (False, False), (False, True)])
def test_like_its_modules(relu, residual, size):
    unit, x = create(size=size, relu=relu, residual=residual)
    got = assert_trains_like_plain(fused, unit, x)
    assert got['out'].is_contiguous(memory_format=torch.channels_last)
    unit, x = create(size=size, relu=relu, residual=residual)
    expected = gradients_of_gradients(Unit.forward, *exact(unit, x))
    assert_all_close(gradients_of_gradients(fused, unit, x), expected, 1e-7)


@kernels
def test_filters_in_any_memory():
    """With gaps, in which the gradient lies as well."""
    unit, x = create()
    unit.conv.weight.data = torch.stack([unit.conv.weight.data] * 2, -1)[..., 0]
    assert_trains_like_plain(fused, unit, x)


@kernels
@pytest.mark.parametrize('mixed', [False, True])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, mixed):
    """With filters and norm of the same dtype, and as under autocast in float32, as their gradients are."""
    unit, x = create(dtype)
    unit = unit.float() if mixed else unit
    got = assert_trains_like_plain(fused, unit, x, 0.1)
    assert got.pop('out').dtype == got.pop('x').dtype == dtype
    assert {grad.dtype for grad in got.values()} == {torch.float32 if mixed else dtype}


@kernels
def test_backward_under_another_autocast():
    unit, x = create(torch.bfloat16)
    expected = value_and_grads(fused, unit, x)
    tensors, out = tensors_of(unit, x), fused(unit, x)
    with torch.autocast(DEVICE, torch.float16):
        grads = torch.autograd.grad(out, list(tensors.values()), torch.empty_like(out).copy_(gradient_for(out)))
    assert all(torch.equal(grad, expected[name]) for name, grad in zip(tensors, grads))


@kernels
@pytest.mark.parametrize('frozen', [('x',), ('conv.weight',), ('x', 'conv.weight'), ('norm.weight',)], ids=str)
def test_frozen(frozen):
    unit, x = create(residual=False)
    expected = value_and_grads(fused, unit, x)
    x = x.detach().requires_grad_('x' not in frozen)
    for name in set(frozen) - {'x'}:
        unit.get_parameter(name).requires_grad_(False)
    out = fused(unit, x)
    out.backward(torch.empty_like(out).copy_(gradient_for(out)))
    for name, tensor in {'x': x, **dict(unit.named_parameters())}.items():
        assert tensor.grad is None if name in frozen else torch.equal(tensor.grad, expected[name]), name


@kernels
def test_many_gradients_at_once():
    unit, x = create()
    tensors, out = list(tensors_of(unit, x).values()), fused(unit, x)
    grads = torch.stack([gradient_for(out, seed) for seed in (2, 3)]).to(out)
    together = torch.autograd.grad(out, tensors, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for one, of_all in zip(torch.autograd.grad(out, tensors, grad, retain_graph=True), together):
            torch.testing.assert_close(of_all[i], one, rtol=1e-9, atol=1e-9)


@kernels
def test_memory():
    """Gradients lie like their tensors, hooks may change what is saved, and the output may change in place."""
    unit, x = create(torch.float32)
    unit, x = unit.to(memory_format=torch.channels_last), x.bfloat16()
    expected = value_and_grads(fused, unit, x)
    assert expected['conv.weight'].stride() == unit.conv.weight.stride()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        got = value_and_grads(fused, unit, x)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    unit.relu = False  # whose output is kept
    assert not fused(unit, x).mul_(2).isnan().any()


# In blocks


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the filters that go into one function with their norm."""
    found = []

    def call(x, conv, *args, **kwargs):
        found.append((conv.in_channels, conv.out_channels))
        return conv_norm_act(x, conv, *args, **kwargs)

    monkeypatch.setattr(stand_ins, 'conv_norm_act', call)
    return found


def create_block(dtype=torch.float32):
    torch.manual_seed(0)
    block = shaken(CotBottleneck(16, 16, 2, shortcut(16, 64)))
    return block.to(DEVICE, dtype), image(4, 16, 6, 5, torch.channels_last, dtype).to(DEVICE)


@kernels
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_block_under_autocast(dtype, calls):
    block, x = create_block()

    def run(block, x):
        with torch.autocast(DEVICE, dtype):
            return train_bottleneck(block, x)

    got, expected = value_and_grads(run, block, x), value_and_grads(plain, *exact(block, x))
    assert got['out'].dtype == dtype and {got[name].dtype for name in got if name != 'out'} == {torch.float32}
    for name in got:
        if not name.startswith('conv2.'):
            assert error(got[name], expected[name]) < (0.02 if name == 'out' else TOLERANCE[dtype]), name
    assert calls == [(16, 16), (16, 64), (16, 64)]


CHANGED = {
    'convolution of 3x3': (lambda block: setattr(block, 'conv1', nn.Conv2d(16, 16, 3, padding=1, bias=False)), 2),
    'bias': (lambda block: setattr(block, 'conv3', nn.Conv2d(16, 64, 1)), 2),
    'hook on the shortcut': (lambda block: block.downsample[1].register_forward_hook(lambda *args: None), 2),
    'another forward': (
        lambda block: setattr(block.downsample[1], 'forward', lambda x: nn.Conv2d.forward(block.downsample[1], x)), 2),
    'groups in the shortcut': (
        lambda block: setattr(block.downsample, '1', nn.Conv2d(16, 64, 1, groups=2, bias=False)), 2),
    'stride in the shortcut': (
        lambda block: setattr(block, 'downsample', nn.Sequential(
            nn.Conv2d(16, 64, 1, 2, bias=False), nn.BatchNorm2d(64))), 2),
    'frozen norm in the shortcut': (lambda block: block.downsample[2].eval(), 2),
    'norm alone in the shortcut': (
        lambda block: setattr(block, 'downsample', nn.Sequential(
            nn.Sequential(nn.Conv2d(16, 64, 1, 2, bias=False)), nn.BatchNorm2d(64))), 2),
}


@kernels
@pytest.mark.parametrize('what', CHANGED)
def test_block_with_others(what, calls):
    """Each is computed as its module does it."""
    change, count = CHANGED[what]
    block, x = create_block()
    change(block)
    block, x = block.to(DEVICE).double(), x.double()
    got = value_and_grads(train_bottleneck, block, x)
    assert len(calls) == count
    reference, exact_x = (block, x) if what == 'another forward' else exact(block, x)
    expected = value_and_grads(CotBottleneck.forward.__wrapped__, reference, exact_x)
    assert_all_close(got, {name: t.cpu() for name, t in expected.items()}, 1e-9, ('conv2.se.0.bias', 'conv3.bias'))


WITHOUT = {
    'as it is': (lambda block: None, 2),
    'another output': (lambda block: setattr(block, 'conv3', nn.Conv2d(16, 64, 1, groups=2, bias=False)), 1),
}


@kernels
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize('what', WITHOUT)
def test_block_without_a_shortcut(what, dtype, calls):
    """Of which x is added at the end: the gradient of this sum is the first convolution's to add to."""
    torch.manual_seed(0)
    change, count = WITHOUT[what]
    block, x = shaken(CotBottleneck(64, 16)), image(4, 64, 6, 5, torch.channels_last, dtype).to(DEVICE)
    change(block)
    block = block.to(DEVICE, dtype)
    expected = value_and_grads(plain, *exact(block, x))
    got = value_and_grads(train_bottleneck, block, x)
    for name in ('out', 'x', 'conv1.weight', 'conv3.weight', 'bn3.weight'):
        assert error(got[name], expected[name]) < TOLERANCE[dtype], name
    assert len(calls) == count


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


@kernels
def test_block_whose_gradient_goes_by_the_shortcut_alone():
    torch.manual_seed(0)
    block, x = shaken(CotBottleneck(64, 16)), image(4, 64, 6, 5, torch.channels_last, torch.float64).to(DEVICE)
    block.conv2 = Detached()
    block = block.to(DEVICE).double()
    reference, exact_x = exact(block, x)
    plain(reference, exact_x.requires_grad_()).sum().backward()
    train_bottleneck(block, x.requires_grad_()).sum().backward()
    assert error(x.grad, exact_x.grad) < 1e-9 and block.conv1.weight.grad is None


@kernels
def test_second_derivatives_of_a_block_without_a_shortcut():
    torch.manual_seed(0)
    block, x = shaken(CotBottleneck(32, 8)), image(2, 32, 3, 2, torch.channels_last, torch.float64).to(DEVICE)
    block = block.to(DEVICE).double()
    block.conv2 = nn.Identity()
    expected = gradients_of_gradients(plain, *exact(block, x))
    assert_all_close(gradients_of_gradients(train_bottleneck, block, x), expected, 1e-7)


@kernels
def test_float32_stays_a_convolution(calls):
    """Convolutions may run in TF32 where products do not."""
    block, x = create_block()
    assert error(train_bottleneck(block, x), CotBottleneck.forward.__wrapped__(*exact(block, x))) < 1e-4
    assert calls == []


@kernels
def test_filters_of_another_dtype_are_an_error(calls):
    block, x = create_block(torch.bfloat16)
    block.conv1.float()
    with pytest.raises(RuntimeError, match='type'):
        train_bottleneck(block, x)
    assert calls == []


def test_gradient_of_an_image_has_its_memory_alone(monkeypatch):
    """Autograd adds in place to what nothing else holds."""
    monkeypatch.setattr(conv_norm, 'norm_backward', lambda grad, x, *_, **__: (x, grad, torch.zeros(5, 8)))
    x, grad = (torch.ones(2, C, 3, 3).contiguous(memory_format=torch.channels_last) for C in (4, 8))
    matrix, product = torch.ones(8, 4), torch.ones(18, 8)
    saved = x, matrix[:, :, None, None], product[0], product[0], matrix, product, None, None
    grad_x, _, grad_filters, *_ = conv_norm._gradients(grad, saved, (True, False, True, True, True), True)
    assert grad_x.is_contiguous(memory_format=torch.channels_last) and not grad_x._is_view()
    assert (grad_x == 8).all() and grad_filters.shape == (8, 4, 1, 1) and (grad_filters == 18).all()
    for of_shortcut, is_over in ((torch.full_like(x, 2), True), (torch.full_like(x, 2).contiguous(), False)):
        grad_x, *_ = conv_norm._gradients(grad, saved, (True, False, True, True, True), True, of_shortcut)
        assert (grad_x is of_shortcut) == is_over and (grad_x == 10).all() and not grad_x._is_view()
