"""Blocks in training on kernels, and what of a shortcut these know, against plain PyTorch in float64."""
import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from timm_cotnet import CotBottleneck, SplitAttnBottleneck
from timm_cotnet.ops.cpu import stand_ins

from helpers import FORMATS, difference, image, needs_kernels, shaken

pytestmark = needs_kernels


class Conv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def convolution(**kwargs):
    return nn.Conv2d(16, 64, **{'kernel_size': 1, 'stride': 2, 'bias': False, **kwargs})


def create(downsample, cls=CotBottleneck, stride=2):
    torch.manual_seed(0)
    return shaken(cls(16, 16, stride, downsample)).train()


def with_norm(conv, **kwargs):
    return create(nn.Sequential(conv, nn.BatchNorm2d(64, **kwargs)))


def changed(change):
    """A block whose shortcut was changed after it had been made."""
    block = with_norm(convolution())
    change(block.downsample)
    return block


KNOWN = {
    'stride of two': lambda: with_norm(convolution()),
    'stride of one': lambda: create(nn.Sequential(convolution(stride=1), nn.BatchNorm2d(64)), stride=1),
    'bias': lambda: with_norm(convolution(bias=True)),
    'split attention': lambda: create(nn.Sequential(convolution(), nn.BatchNorm2d(64)), SplitAttnBottleneck),
    'frozen filters': lambda: changed(lambda shortcut: shortcut[0].requires_grad_(False)),
    'frozen': lambda: changed(lambda shortcut: shortcut.requires_grad_(False)),
}
CALLED = {
    'pool': lambda: create(nn.Sequential(nn.AvgPool2d(2), convolution(stride=1), nn.BatchNorm2d(64))),
    'kernel of three': lambda: with_norm(convolution(kernel_size=3, padding=1)),
    'groups': lambda: with_norm(convolution(groups=4)),
    'circular padding': lambda: with_norm(convolution(padding_mode='circular')),
    'a subclass': lambda: changed(lambda shortcut: setattr(shortcut, '0', Conv(16, 64, 1, 2))),
    'a parametrization': lambda: changed(
        lambda shortcut: parametrize.register_parametrization(shortcut[0], 'weight', Half())),
    'a norm in evaluation': lambda: changed(lambda shortcut: shortcut[1].eval()),
    'no statistics': lambda: with_norm(convolution(), track_running_stats=False),
    'no weight': lambda: with_norm(convolution(), affine=False),
    'one more': lambda: changed(lambda shortcut: shortcut.append(nn.Tanh())),
    'a hook on the convolution': lambda: changed(
        lambda shortcut: shortcut[0].register_forward_hook(lambda *args: 3 * args[2])),
    'a hook on the norm': lambda: changed(
        lambda shortcut: shortcut[1].register_full_backward_hook(lambda *args: (2 * args[1][0],))),
    'a hook on both': lambda: changed(
        lambda shortcut: shortcut.register_forward_pre_hook(lambda module, args: (args[0].sin(),))),
}


@pytest.fixture
def norms(monkeypatch):
    """The norms that kernels compute."""
    found, train_batch_norm = [], stand_ins.train_batch_norm

    def seen(x, norm, *args):
        found.append(norm)
        return train_batch_norm(x, norm, *args)
    monkeypatch.setattr(stand_ins, 'train_batch_norm', seen)
    return found


def assert_trains_like_plain(block, x):
    exact = copy.deepcopy(block).double()  # has no kernels
    exact_x = x.detach().double().requires_grad_()
    out, expected = block(x), exact(exact_x)
    assert difference(out, expected) < 1e-4
    grad = torch.randn(out.shape).contiguous(memory_format=torch.channels_last)
    before = grad.clone()
    out.backward(grad)
    expected.backward(grad.double())
    assert torch.equal(grad, before)
    for one, other in zip([x, *block.parameters()], [exact_x, *exact.parameters()]):
        assert one.requires_grad == (one.grad is not None)
        if one.grad is not None:  # some are zero but for rounding: compared with 0.3
            assert (one.grad - other.grad).abs().max() <= 1e-3 * other.grad.abs().max().clamp(min=0.3)
    for one, other in zip(block.buffers(), exact.buffers()):
        assert difference(one, other) < 1e-4


@pytest.mark.parametrize('name', [*KNOWN, *CALLED])
def test_shortcut(name, norms):
    """It is the kernels' where they know all of it, or else called."""
    block = {**KNOWN, **CALLED}[name]().to(memory_format=torch.channels_last)
    x = image(5, 16, 6, 8, memory_format=torch.channels_last).requires_grad_()
    assert_trains_like_plain(block, x)
    assert norms[0] is block.bn1 and norms[-1] is block.bn3
    if name in KNOWN:
        assert len(norms) == 3 and norms[1] is block.downsample[1]
    else:
        assert len(norms) == 2


class Gives(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize('path, function', [
    ('conv2', lambda x: x[:1]), ('downsample', lambda x: x[:1]), ('downsample', torch.Tensor.double)],
    ids=['fewer images than the shortcut', 'a shortcut of one image', 'a shortcut in float64'])
def test_sum_is_in_place(path, function):
    """As in timm's block: its shape and dtype are those of the norm, or it is an error."""
    results = []
    for memory_format in (torch.channels_last, torch.contiguous_format):  # nothing stands in for the latter
        torch.manual_seed(0)
        block = CotBottleneck(64, 16).train()
        block.downsample = nn.Identity()
        setattr(block, path, Gives(function))
        try:
            out = block(image(4, 64, 6, 8, memory_format=memory_format))
            results.append((out.dtype, out.shape))
        except RuntimeError as error:
            results.append(str(error))
    assert results[0] == results[1]


def test_without_a_shortcut(norms):
    block = shaken(CotBottleneck(64, 16)).train()
    assert_trains_like_plain(block, image(5, 64, 6, 8, memory_format=torch.channels_last).requires_grad_())
    assert norms == [block.bn1, block.bn3]


@pytest.mark.parametrize('known', [True, False])
def test_gradients_that_somebody_holds_stay(known):
    """Memory of gradients is used again only where nobody can have seen them."""
    block = KNOWN['stride of one']() if known else shaken(CotBottleneck(64, 16)).train()
    channels = block.conv1.in_channels
    before = nn.Conv2d(channels, channels, 1)
    net, held = nn.Sequential(before, block), []
    x = before(image(4, channels, 6, 8, memory_format=torch.channels_last))
    x.register_hook(lambda grad: held.append((grad, grad.clone())))
    out = block(x)
    out.register_hook(lambda grad: held.append((grad, grad.clone())))
    first = torch.autograd.grad(out.square().sum(), list(net.parameters()), retain_graph=True)
    second = torch.autograd.grad(out.square().sum(), list(net.parameters()))
    assert len(held) == 4 and all(torch.equal(*pair) for pair in held)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize('memory_format', FORMATS)
def test_only_a_gradient_of_the_kernel_may_be_written_over(memory_format):
    """PyTorch's sum gives norm and residual the same gradient: then the residual itself is read."""
    torch.manual_seed(0)
    norm = shaken(nn.BatchNorm2d(8)).train()
    x, residual = (image(2, 8, 5, 4, memory_format, seed=seed).requires_grad_() for seed in (1, 2))
    shortcut = residual.view_as(residual)
    shortcut.retain_grad()
    exact = torch.relu(copy.deepcopy(norm).double()(x.double()) + residual.double())
    out = stand_ins._norm_act(x, norm, residual, shortcut)
    assert difference(out, exact) < 1e-5
    out.sum().backward()
    assert residual.grad is not None
    assert (shortcut.grad is None) == (memory_format == torch.contiguous_format)
