"""Fused 1x1 convolution, batch norm, sum and ReLU in training: against the modules in double precision, and when these
run themselves."""
import contextlib
import copy

import pytest
import torch
import torch.nn as nn
from torch.fx.experimental.proxy_tensor import make_fx

from timm_cotnet.ops import native
from timm_cotnet.layers import QueryKeyConv2d
from timm_cotnet.ops.batch_norm import batch_norm_act, conv_norm_act, why_not_conv, why_not_fused

LIBRARY = native.load(torch.float32, 'batch_norm.c')
needs_native = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f'no native kernels: {LIBRARY}')
SHAPES = [(2, 1, 3, 5), (3, 5, 7, 1), (2, 16, 5, 6), (1, 64, 9, 11), (3, 130, 4, 3), (2, 1, 1, 1), (4, 33, 17, 19)]


def plain(x, norm, act, residual=None):
    x = norm(x)
    if residual is not None:
        x = x + residual
    return act(x)


def inputs(shape=(2, 16, 5, 6), residual=True, mean=0.5, eps=1e-5, momentum=0.1):
    """x, norm, residual (or None) and an output gradient; every channel of x and of norm is different."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, other, grad = (
        torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last) for _ in range(3))
    norm = nn.BatchNorm2d(shape[1], eps, momentum)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.copy_(torch.rand(shape[1], generator=generator) + 0.1)
    x = x * (1 + torch.arange(shape[1]).view(-1, 1, 1) % 3) + mean
    return x.requires_grad_(), norm, other.requires_grad_() if residual else None, grad


def is_fused(out):
    return type(out.grad_fn).__name__ == 'BatchNormActBackward'


def assert_close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def check(x, norm, act, residual, grad):
    """Output, gradients and what is tracked, against the modules in float64."""
    x64, norm64, residual64 = copy.deepcopy((x, norm, residual))
    norm64 = norm64.double()
    x64 = x64.detach().double().requires_grad_()
    residual64 = None if residual is None else residual64.detach().double().requires_grad_()
    out, expected = batch_norm_act(x, norm, act, residual), plain(x64, norm64, act, residual64)
    assert is_fused(out) and out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, expected)
    out.backward(grad), expected.backward(grad.double())
    assert_close(x.grad, x64.grad)
    assert_close(norm.weight.grad, norm64.weight.grad)
    assert_close(norm.bias.grad, norm64.bias.grad)
    assert_close(norm.running_mean, norm64.running_mean)
    assert_close(norm.running_var, norm64.running_var)
    assert norm.num_batches_tracked == norm64.num_batches_tracked == 1
    if residual is not None:
        assert_close(residual.grad, residual64.grad)


@needs_native
@pytest.mark.parametrize('act', [nn.ReLU(), nn.ReLU(inplace=True), nn.Identity()], ids=['relu', 'inplace', 'identity'])
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_fused(shape, residual, act):
    x, norm, residual, grad = inputs(shape, residual)
    check(x, norm, act, residual, grad)


@needs_native
@pytest.mark.parametrize('threads', [1, 2, 3, 70])
@pytest.mark.parametrize('residual', [False, True])
def test_threads(threads, residual):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, norm, residual, grad = inputs((2, 40, 5, 6), residual)  # 60 pixels
        again = copy.deepcopy(norm)
        check(x, norm, nn.ReLU(), residual, grad)
        out = batch_norm_act(x, again, nn.ReLU(), residual)
        assert torch.equal(torch.autograd.grad(out, x, grad)[0], x.grad)
        assert torch.equal(again.running_var, norm.running_var)
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize('mean', [1e3, -3e4])
def test_mean_far_larger_than_deviation(mean):
    x, norm, residual, grad = inputs((4, 24, 17, 19), mean=mean)
    check(x, norm, nn.ReLU(), residual, grad)


@needs_native
def test_outlier_in_the_first_pixel():
    x, norm, residual, grad = inputs((2, 16, 30, 30))
    x.data[0, :, 0, 0] += 1000
    check(x, norm, nn.ReLU(), residual, grad)


@needs_native
def test_constant_channels():
    x, norm, _, grad = inputs()
    x.data.copy_(torch.arange(16.0).view(-1, 1, 1) / 7)
    expected = norm.bias.detach().view(-1, 1, 1).expand(2, 16, 5, 6)
    assert torch.equal(batch_norm_act(x, norm, nn.ReLU()), expected)


@needs_native
def test_eps_and_momentum():
    x, norm, residual, grad = inputs(eps=0.5, momentum=0.7)
    check(x, norm, nn.ReLU(), residual, grad)


@needs_native
@pytest.mark.parametrize('residual', [False, True])
def test_nan_stays(residual):
    x, norm, residual, _ = inputs(residual=residual)
    x.data[1, 3, 2, 2] = float('nan')
    out = batch_norm_act(x, norm, nn.ReLU(), residual)
    assert is_fused(out)
    assert out.isnan().sum() == out[:, 3].numel() == out[:, 3].isnan().sum()


@needs_native
@pytest.mark.parametrize('act', [nn.ReLU(), nn.Identity()], ids=['relu', 'identity'])
@pytest.mark.parametrize('wanted', ['x', 'weight', 'bias', 'residual'])
def test_one_gradient_alone(wanted, act):
    x, norm, residual, grad = inputs()
    tensors = {'x': x, 'weight': norm.weight, 'bias': norm.bias, 'residual': residual}
    expected, = torch.autograd.grad(plain(x, copy.deepcopy(norm), act, residual), x, grad) if wanted == 'x' else (None,)
    full = torch.autograd.grad(batch_norm_act(x, norm, act, residual), list(tensors.values()), grad)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    out = batch_norm_act(x, norm, act, residual)
    assert is_fused(out)
    out.backward(grad)
    for (name, tensor), g in zip(tensors.items(), full):
        if name == wanted:
            assert torch.equal(tensor.grad, g)
        else:
            assert tensor.grad is None
    if expected is not None:
        assert_close(x.grad, expected.double())
    out = batch_norm_act(x, norm, act, residual)
    again, = torch.autograd.grad(out, tensors[wanted], grad, create_graph=True)
    assert_close(again.detach(), tensors[wanted].grad.double())


@needs_native
@pytest.mark.parametrize('residual', [False, True])
def test_expanded_gradient(residual):
    x, norm, residual, _ = inputs(residual=residual)
    other = copy.deepcopy(norm)
    fused, = torch.autograd.grad((batch_norm_act(x, norm, nn.ReLU(), residual) * 3).sum((2, 3))[:, 0].sum(), x)
    expected, = torch.autograd.grad((plain(x, other, nn.ReLU(), residual) * 3).sum((2, 3))[:, 0].sum(), x)
    assert_close(fused, expected.double())
    out = batch_norm_act(x, norm, nn.ReLU(), residual)
    out.sum().backward()  # its gradient is one number, expanded
    assert_close(norm.bias.grad, (out > 0).sum((0, 2, 3)).double())


@needs_native
@pytest.mark.parametrize('act', [nn.ReLU(), nn.Identity()], ids=['relu', 'identity'])
@pytest.mark.parametrize('residual', [False, True])
def test_second_derivative(residual, act):
    def second(function, dtype):
        x, norm, other, grad = inputs(residual=residual)
        norm = norm.to(dtype)
        x, grad = x.detach().to(dtype).requires_grad_(), grad.to(dtype).requires_grad_()
        tensors = [x, norm.weight, norm.bias]
        if residual:
            other = other.detach().to(dtype).requires_grad_()
            tensors.append(other)
        out = function(x, norm, act, other)
        assert is_fused(out) == (function is batch_norm_act)
        first = torch.autograd.grad(out, tensors, grad, create_graph=True)
        return first, torch.autograd.grad(sum((g ** 2).sum() for g in first), (x, norm.weight, grad))

    for ours, expected in zip(second(batch_norm_act, torch.float32), second(plain, torch.float64)):
        assert len(ours) == len(expected) >= 3
        for actual, wanted in zip(ours, expected):
            assert_close(actual.detach(), wanted.detach(), 1e-4)


@needs_native
@pytest.mark.parametrize('residual', [False, True])
def test_many_gradients_at_once(residual):
    x, norm, residual, grad = inputs(residual=residual)
    tensors = [x, norm.weight, norm.bias] + ([] if residual is None else [residual])
    out = batch_norm_act(x, norm, nn.ReLU(), residual)
    assert is_fused(out)
    both = torch.autograd.grad(out, tensors, torch.stack([grad, -2 * grad]), is_grads_batched=True, retain_graph=True)
    for two, one in zip(both, torch.autograd.grad(out, tensors, grad)):
        assert_close(two[0], one.double())
        assert_close(two[1], -2 * one.double())


@needs_native
@pytest.mark.parametrize('act, residual, kept', [
    (nn.ReLU(), False, False), (nn.ReLU(), True, True), (nn.Identity(), False, False), (nn.Identity(), True, False)])
def test_what_is_saved(act, residual, kept):
    x, norm, residual, _ = inputs(residual=residual)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        out = batch_norm_act(x, norm, act, residual)
    assert is_fused(out)
    assert x.data_ptr() in saved
    assert (out.data_ptr() in saved) == kept
    assert residual is None or residual.data_ptr() not in saved


@needs_native
def test_saved_tensors_may_come_back_in_another_memory_format():
    x, norm, residual, grad = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        out = batch_norm_act(x, norm, nn.ReLU(), residual)
    expected = torch.autograd.grad(batch_norm_act(x, norm, nn.ReLU(), residual), (x, residual), grad)
    for actual, wanted in zip(torch.autograd.grad(out, (x, residual), grad.contiguous()), expected):
        assert torch.equal(actual, wanted)


@needs_native
@pytest.mark.parametrize('changed', ['x', 'weight', 'out'])
def test_changed_in_place(changed):
    x, norm, residual, grad = inputs()
    x = x * 1
    out = batch_norm_act(x, norm, nn.ReLU(), residual)
    with torch.no_grad():
        {'x': x, 'weight': norm.weight, 'out': out}[changed].add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.backward(grad)


def _global_hook():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    return contextlib.closing(type('', (), {'close': handle.remove}))


PLAIN = {
    'eval': lambda a: a['norm'].eval(),
    'double': lambda a: [a.update({k: a[k].detach().double().requires_grad_() for k in ('x', 'residual')}),
                         a['norm'].double()],
    'contiguous': lambda a: a.update(x=a['x'].detach().contiguous().requires_grad_()),
    'contiguous residual': lambda a: a.update(residual=a['residual'].detach().contiguous()),
    'broadcast residual': lambda a: a.update(residual=a['residual'].detach()[:, :, :1, :1]),
    'hook': lambda a: a['norm'].register_forward_hook(lambda module, args, out: out * 2),
    'hook of act': lambda a: a['act'].register_forward_pre_hook(lambda module, args: args[0] * 2),
    'backward hook': lambda a: [a.update(residual=None),  # hooks forbid changes of the output in place
                                a['norm'].register_full_backward_hook(lambda module, grads, _: (grads[0] * 2,))],
    'global hook': lambda a: _global_hook(),
    'other forward': lambda a: setattr(a['act'], 'forward', torch.sigmoid),
    'other norm': lambda a: a.update(norm=type('Norm', (nn.BatchNorm2d,), {})(16)),
    'group norm': lambda a: a.update(norm=nn.GroupNorm(2, 16)),
    'no norm': lambda a: a.update(norm=nn.Identity(), x=a['x'] * 1),
    'SiLU': lambda a: a.update(act=nn.SiLU()),
    'no_grad': lambda a: torch.no_grad(),
    'autocast': lambda a: torch.autocast('cpu', torch.bfloat16),
    'not affine': lambda a: a.update(norm=nn.BatchNorm2d(16, affine=False)),
    'not tracked': lambda a: a.update(norm=nn.BatchNorm2d(16, track_running_stats=False)),
    'cumulative': lambda a: a.update(norm=nn.BatchNorm2d(16, momentum=None)),
    'many channels': lambda a: a.update(
        x=torch.randn(2, 32769, 1, 1, requires_grad=True), norm=nn.BatchNorm2d(32769), residual=None),
    'strided weight': lambda a: setattr(a['norm'], 'weight', nn.Parameter(torch.ones(32)[::2])),
}


@pytest.mark.parametrize('condition', PLAIN)
def test_not_fused(condition):
    x, norm, residual, _ = inputs()
    a = {'x': x, 'norm': norm, 'act': nn.ReLU(), 'residual': residual}
    change = PLAIN[condition](a)
    other = copy.deepcopy(a['norm'])
    with change if condition in ('global hook', 'no_grad', 'autocast') else contextlib.nullcontext():
        assert why_not_fused(**a)
        expected = plain(a['x'], other, a['act'], a['residual'])
        out = batch_norm_act(**a)
    assert not is_fused(out)
    torch.testing.assert_close(out, expected)
    for buffer, wanted in zip(a['norm'].buffers(), other.buffers()):
        torch.testing.assert_close(buffer, wanted)
    if condition not in ('no_grad', 'no norm'):
        g, = torch.autograd.grad(out.square().sum(), a['x'])
        wanted, = torch.autograd.grad(expected.square().sum(), a['x'])
        assert g.abs().sum() > 0
        torch.testing.assert_close(g, wanted)


def test_errors_are_those_of_the_module():
    x, norm, _, _ = inputs((1, 16, 1, 1), residual=False)
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        batch_norm_act(x, norm, nn.ReLU())
    with pytest.raises(ValueError, match='expected 4D input'):
        batch_norm_act(x[0], norm, nn.ReLU())
    x, _, _, _ = inputs((2, 8, 3, 3), residual=False)
    with pytest.raises(RuntimeError, match='running_mean should contain 8 elements'):
        batch_norm_act(x, norm, nn.ReLU())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(16), nn.ReLU()

    def forward(self, x, residual):
        return batch_norm_act(x, self.norm, self.act, residual)


def _functional(block, *args):
    def call(*args):
        buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
        return torch.func.functional_call(block, buffers, args)

    return torch.func.vjp(call, *args)[0]


@pytest.mark.parametrize('watch', [
    lambda block, *args: torch.fx.symbolic_trace(block)(*args),
    lambda block, *args: torch.jit.trace(block, args, check_trace=False)(*args),
    lambda block, *args: make_fx(block)(*args)(*args),
    lambda block, *args: torch.compile(block, backend='eager', fullgraph=True)(*args),
    _functional,
], ids=['fx', 'jit.trace', 'make_fx', 'compile', 'func'])
def test_watched(watch):
    x, _, residual, _ = inputs()
    x, residual = x * 1, residual * 1
    out = watch(Block(), x, residual)
    assert not is_fused(out)
    assert_close(out, plain(x.double(), Block().norm.double(), nn.ReLU(), residual.double()))


def test_fx_sees_the_modules():
    graph = torch.fx.symbolic_trace(Block()).graph
    assert [node.target for node in graph.nodes if node.op == 'call_module'] == ['norm', 'act']


@needs_native
def test_forward_mode():
    x, norm, residual, grad = inputs()
    expected = torch.func.jvp(lambda x: plain(x, copy.deepcopy(norm), nn.ReLU(), residual), (x,), (grad,))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, grad)
        tangent = torch.autograd.forward_ad.unpack_dual(batch_norm_act(dual, norm, nn.ReLU(), residual)).tangent
    assert_close(tangent, expected.double())


# (B, C_in, C_out, H, W): widths of all panels, pixels that are no multiple of the rows, more than one block of them
CONV_SHAPES = [
    (2, 4, 4, 8, 8), (3, 12, 20, 5, 7), (1, 64, 32, 9, 9), (2, 8, 100, 9, 11), (1, 300, 64, 11, 7), (3, 64, 256, 13, 11)]


def conv_inputs(shape=(2, 12, 20, 7, 5), sources=1, residual=True):
    """Inputs, convolution, norm, residual (or None) and an output gradient."""
    B, C, out, H, W = shape
    _, norm, residual, grad = inputs((B, out, H, W), residual)
    generator = torch.Generator().manual_seed(sum(shape))
    xs = [torch.randn(B, C, H, W, generator=generator).contiguous(memory_format=torch.channels_last).requires_grad_()
          for _ in range(sources)]
    conv = nn.Conv2d(C, out, 1, bias=False) if sources == 1 else QueryKeyConv2d(C, out)
    conv.weight.data.copy_(torch.randn(conv.weight.shape, generator=generator) / (sources * C) ** 0.5)
    return xs, conv, norm, residual, grad


def in_double(*things):
    copies = copy.deepcopy([t.detach() if isinstance(t, torch.Tensor) else t for t in things])
    return [t if t is None else t.double().requires_grad_() for t in copies]


def plain_conv(conv, norm, act, *xs, residual=None):
    return plain(torch.nn.functional.conv2d(torch.cat(xs, 1), conv.weight), norm, act, residual)


@needs_native
@pytest.mark.parametrize('act', [nn.ReLU(), None], ids=['relu', 'none'])
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('sources', [1, 2])
@pytest.mark.parametrize('shape', CONV_SHAPES)
def test_conv(shape, sources, residual, act):
    xs, conv, norm, residual, grad = conv_inputs(shape, sources, residual)
    conv64, norm64, residual64, *xs64 = in_double(conv, norm, residual, *xs)
    out = conv_norm_act(conv, norm, act, *xs, residual=residual)
    expected = plain_conv(conv64, norm64, act or nn.Identity(), *xs64, residual=residual64)
    assert is_fused(out) and out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, expected)
    out.backward(grad), expected.backward(grad.double())
    tensors = (*xs, conv.weight, norm.weight, norm.bias)
    for ours, wanted in zip(tensors, (*xs64, conv64.weight, norm64.weight, norm64.bias)):
        assert_close(ours.grad, wanted.grad)
    if residual is not None:
        assert_close(residual.grad, residual64.grad)
    assert_close(norm.running_mean, norm64.running_mean)
    assert_close(norm.running_var, norm64.running_var)


@needs_native
@pytest.mark.parametrize('threads', [1, 3, 70])
def test_conv_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        xs, conv, norm, residual, grad = conv_inputs((2, 64, 40, 35, 33), 2)  # 33 pixels for each of 70 threads
        conv64, norm64, residual64, *xs64 = in_double(conv, norm, residual, *xs)
        first = torch.autograd.grad(
            conv_norm_act(conv, norm, nn.ReLU(), *xs, residual=residual), (*xs, conv.weight, residual), grad)
        again = torch.autograd.grad(
            conv_norm_act(conv, norm, nn.ReLU(), *xs, residual=residual), (*xs, conv.weight, residual), grad)
        expected = torch.autograd.grad(
            plain_conv(conv64, norm64, nn.ReLU(), *xs64, residual=residual64), (*xs64, conv64.weight, residual64),
            grad.double())
        for one, two, wanted in zip(first, again, expected):
            assert torch.equal(one, two)
            assert_close(one, wanted)
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize('read', ['both', 'out', 'shared'])
def test_shared_input(read):
    (x,), conv, norm, residual, grad = conv_inputs()
    conv64, norm64, residual64, x64 = in_double(conv, norm, residual, x)
    out, shared = conv_norm_act(conv, norm, nn.ReLU(), x, residual=residual, share=True)
    assert is_fused(out) and shared.data_ptr() == x.data_ptr() and torch.equal(shared, x)
    expected = plain_conv(conv64, norm64, nn.ReLU(), x64, residual=residual64)
    for o, s in ((out, shared), (expected, x64)):
        {'both': (o * grad).sum() + (s ** 3).sum(), 'out': (o * grad).sum(), 'shared': (s ** 3).sum()}[read].backward()
    assert_close(x.grad, x64.grad)
    if read != 'shared':
        assert_close(conv.weight.grad, conv64.weight.grad)


@needs_native
def test_backward_again():
    """Memory of what was saved is used again only where the graph is not kept."""
    xs, conv, norm, residual, grad = conv_inputs((2, 64, 40, 5, 7))
    out = conv_norm_act(conv, norm, nn.ReLU(), *xs, residual=residual)
    tensors = (*xs, conv.weight, norm.weight, norm.bias, residual)
    grads = [torch.autograd.grad(out, tensors, grad, retain_graph=keep) for keep in (True, True, False)]
    for several in zip(*grads):
        assert torch.equal(several[0], several[1])
        assert torch.equal(several[0], several[2])
    assert grads[0][-1].data_ptr() != grads[1][-1].data_ptr()
    with pytest.raises(RuntimeError, match='a second time'):
        torch.autograd.grad(out, tensors, grad)


@needs_native
@pytest.mark.parametrize('wanted', ['x', 'other', 'filters', 'weight', 'bias', 'residual'])
def test_one_gradient_of_conv_alone(wanted):
    xs, conv, norm, residual, grad = conv_inputs(sources=2)
    tensors = dict(zip(('x', 'other', 'filters', 'weight', 'bias', 'residual'), (
        *xs, conv.weight, norm.weight, norm.bias, residual)))
    full = torch.autograd.grad(
        conv_norm_act(conv, norm, nn.ReLU(), *xs, residual=residual), list(tensors.values()), grad)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    out = conv_norm_act(conv, norm, nn.ReLU(), *xs, residual=residual)
    assert is_fused(out)
    out.backward(grad)
    for (name, tensor), g in zip(tensors.items(), full):
        assert torch.equal(tensor.grad, g) if name == wanted else tensor.grad is None


@needs_native
@pytest.mark.parametrize('residual', [False, True])
def test_second_derivative_of_conv(residual):
    def second(double):
        xs, conv, norm, other, grad = conv_inputs(sources=2, residual=residual)
        if double:
            conv, norm, other, grad, *xs = in_double(conv, norm, other, grad, *xs)
        tensors = [*xs, conv.weight, norm.weight, norm.bias] + ([] if other is None else [other])
        function = plain_conv if double else conv_norm_act
        out = function(conv, norm, nn.ReLU(), *xs, residual=other)
        assert is_fused(out) != double
        first = torch.autograd.grad(out, tensors, grad.requires_grad_(), create_graph=True)
        return first, torch.autograd.grad(sum((g ** 2).sum() for g in first), (*xs, conv.weight, grad))

    for ours, expected in zip(second(False), second(True)):
        assert len(ours) == len(expected) >= 4
        for actual, wanted in zip(ours, expected):
            assert_close(actual.detach(), wanted.detach(), 1e-4)


@needs_native
def test_second_derivative_with_a_shared_input():
    def second(function, double):
        (x,), conv, norm, residual, grad = conv_inputs()
        if double:
            conv, norm, residual, grad, x = in_double(conv, norm, residual, grad, x)
        out, shared = function(conv, norm, nn.ReLU(), x, residual=residual)
        first, = torch.autograd.grad((out * grad).sum() + (shared ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad((first ** 2).sum(), (x, conv.weight))

    ours = second(lambda *args, **kwargs: conv_norm_act(*args, **kwargs, share=True), False)
    expected = second(lambda *args, **kwargs: (plain_conv(*args, **kwargs), args[3]), True)
    for actual, wanted in zip(ours, expected):
        assert_close(actual, wanted, 1e-4)


@needs_native
def test_many_gradients_of_conv_at_once():
    xs, conv, norm, residual, grad = conv_inputs(sources=2)
    tensors = [*xs, conv.weight, norm.weight, residual]
    out = conv_norm_act(conv, norm, nn.ReLU(), *xs, residual=residual)
    both = torch.autograd.grad(out, tensors, torch.stack([grad, -2 * grad]), is_grads_batched=True, retain_graph=True)
    for two, one in zip(both, torch.autograd.grad(out, tensors, grad)):
        assert_close(two[0], one.double())
        assert_close(two[1], -2 * one.double())


@needs_native
def test_what_conv_saved_may_come_back_in_another_memory_format():
    xs, conv, norm, residual, grad = conv_inputs(sources=2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        out = conv_norm_act(conv, norm, nn.ReLU(), *xs, residual=residual)
    tensors = (*xs, conv.weight, residual)
    expected = torch.autograd.grad(conv_norm_act(conv, norm, nn.ReLU(), *xs, residual=residual), tensors, grad)
    for actual, wanted in zip(torch.autograd.grad(out, tensors, grad.contiguous()), expected):
        assert torch.equal(actual, wanted)


class OtherConv2d(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def _replace(a, conv):
    a['conv'] = conv


PLAIN_CONV = {
    'bias': lambda a: _replace(a, nn.Conv2d(12, 20, 1)),
    'stride': lambda a: [_replace(a, nn.Conv2d(12, 20, 1, 2, bias=False)), a.update(residual=None)],
    'groups': lambda a: _replace(a, nn.Conv2d(12, 20, 1, groups=2, bias=False)),
    '3x3': lambda a: _replace(a, nn.Conv2d(12, 20, 3, padding=1, bias=False)),
    'parametrized': lambda a: torch.nn.utils.parametrize.register_parametrization(a['conv'], 'weight', nn.Identity()),
    'subclass': lambda a: _replace(a, OtherConv2d(12, 20, 1, bias=False)),
    'hook': lambda a: a['conv'].register_forward_hook(lambda module, args, out: out * 2),
    'odd channels': lambda a: [
        _replace(a, nn.Conv2d(11, 20, 1, bias=False)),
        a.update(x=a['x'].detach()[:, :11].contiguous(memory_format=torch.channels_last).requires_grad_())],
    'many filters': lambda a: [
        _replace(a, nn.Conv2d(16384, 20, 1, bias=False)),
        a.update(x=torch.randn(2, 16384, 7, 5).contiguous(memory_format=torch.channels_last).requires_grad_())],
    'few pixels': lambda a: a.update(
        x=torch.randn(3, 12, 3, 2).contiguous(memory_format=torch.channels_last).requires_grad_(), residual=None),
    'contiguous': lambda a: a.update(x=a['x'].detach().contiguous().requires_grad_()),
    'eval': lambda a: a['norm'].eval(),
}


@pytest.mark.parametrize('condition', PLAIN_CONV)
def test_conv_not_fused(condition):
    (x,), conv, norm, residual, _ = conv_inputs()
    a = {'x': x, 'conv': conv, 'norm': norm, 'residual': residual}
    PLAIN_CONV[condition](a)
    x, conv, norm, residual = a.values()
    other = copy.deepcopy(norm)
    assert why_not_conv(conv, [x]) or condition == 'eval'
    expected = plain(conv(x), other, nn.ReLU(), residual)
    out, shared = conv_norm_act(conv, norm, nn.ReLU(), x, residual=residual, share=True)
    assert shared is x
    torch.testing.assert_close(out, expected)
    g, = torch.autograd.grad(out.square().sum(), x)
    wanted, = torch.autograd.grad(expected.square().sum(), x)
    assert g.abs().sum() > 0
    torch.testing.assert_close(g, wanted)


@needs_native
def test_more_threads_than_pixels_in_the_backward():
    xs, conv, norm, residual, grad = conv_inputs((1, 16, 32, 8, 5))
    tensors = (*xs, conv.weight, residual)
    expected = torch.autograd.grad(conv_norm_act(conv, norm, nn.ReLU(), *xs, residual=residual), tensors, grad)
    before = torch.get_num_threads()
    out = conv_norm_act(conv, norm, nn.ReLU(), *xs, residual=residual)
    torch.set_num_threads(70)
    try:
        actual = torch.autograd.grad(out, tensors, grad)
    finally:
        torch.set_num_threads(before)
    for ours, wanted in zip(actual, expected):
        assert_close(ours, wanted.double())


@needs_native
def test_what_hooks_keep_stays_as_it_is():
    xs, conv, norm, residual, grad = conv_inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or len(kept) - 1, lambda i: kept[i]):
        out = conv_norm_act(conv, norm, nn.ReLU(), *xs, residual=residual)
    before = [tensor.clone() for tensor in kept]
    out.backward(grad)
    assert len(kept) == 7 and all(map(torch.equal, before, kept))


@needs_native
def test_hooks_that_change_strides_or_dtype():
    xs, conv, norm, residual, grad = conv_inputs()
    tensors = (*xs, conv.weight, norm.weight, residual)
    expected = torch.autograd.grad(conv_norm_act(conv, norm, nn.ReLU(), *xs, residual=residual), tensors, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: torch.stack([t, -t], -1), lambda t: t[..., 0]):
        out = conv_norm_act(conv, norm, nn.ReLU(), *xs, residual=residual)
    assert all(map(torch.equal, torch.autograd.grad(out, tensors, grad), expected))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t):
        out = conv_norm_act(conv, norm, nn.ReLU(), *xs, residual=residual)
    with pytest.raises(TypeError, match='another dtype'):
        out.backward(grad)


@needs_native
def test_backward_through_fused_and_plain_passes():
    (x,), conv, norm, _, _ = conv_inputs(residual=False)
    conv64, norm64, x64 = in_double(conv, norm, x)
    loss, loss64 = (
        f(c, n, nn.ReLU(), i.contiguous()).sum() + (f(c, n, nn.ReLU(), i) ** 2).sum()
        for f, c, n, i in ((conv_norm_act, conv, norm, x), (plain_conv, conv64, norm64, x64)))
    loss.backward(), loss64.backward()
    assert_close(x.grad, x64.grad)
    assert_close(norm.running_var, norm64.running_var)


@needs_native
def test_shared_input_without_gradient():
    (x,), conv, norm, residual, grad = conv_inputs()
    x = x.detach()
    out, shared = conv_norm_act(conv, norm, nn.ReLU(), x, residual=residual, share=True)
    assert is_fused(out) and shared is x
    out.backward(grad)
    assert conv.weight.grad.abs().sum() > 0


@needs_native
def test_negated_views():
    xs, conv, norm, residual, grad = conv_inputs()
    out = conv_norm_act(conv, norm, nn.ReLU(), torch._neg_view(xs[0]), residual=residual)
    assert_close(out, conv_norm_act(conv, norm, nn.ReLU(), -xs[0], residual=residual).detach().double())
    out = conv_norm_act(conv, norm, nn.ReLU(), *xs, residual=residual)
    negated, = torch.autograd.grad(out, conv.weight, torch._neg_view(grad), retain_graph=True)
    assert torch.equal(negated, -torch.autograd.grad(out, conv.weight, grad)[0])


def test_conv_errors_are_those_of_the_module():
    (x,), conv, norm, _, _ = conv_inputs(residual=False)
    with pytest.raises(RuntimeError, match='to have 12 channels, but got 8'):
        conv_norm_act(conv, norm, nn.ReLU(), x[:, :8].contiguous(memory_format=torch.channels_last))
    with pytest.raises(RuntimeError, match='must match'):
        conv_norm_act(conv, norm, nn.ReLU(), x, residual=torch.zeros(2, 20, 7, 4))
