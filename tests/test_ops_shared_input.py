"""Convolutions that read the same tensor: gradients against those of the modules, and where they run themselves."""
import copy

import pytest
import torch
from torch import nn

from timm_cotnet.ops import shared_input as module
from timm_cotnet.ops.shared_input import shared_input


@pytest.fixture(autouse=True)
def two_images_at_a_time(monkeypatch):
    monkeypatch.setattr(module, 'PART_BYTES', 2 * 4 * 8 * 5 * 7)


def inputs(batch=5, strides=(1, 2)):
    """x, convolutions that read it, and gradients of x and of what they make of it."""
    generator = torch.Generator().manual_seed(0)
    convs = [nn.Conv2d(8, 4 * (i + 1), 1, stride, bias=False) for i, stride in enumerate(strides)]
    x = torch.randn(batch, 8, 5, 7, generator=generator).contiguous(memory_format=torch.channels_last)
    grads = [torch.randn(conv(x).shape, generator=generator) for conv in convs]
    return x.requires_grad_(), convs, [torch.randn(x.shape, generator=generator), *grads]


def run_both(derive, batch=5, strides=(1, 2)):
    """derive(outputs, inputs, gradients) for `shared_input`, and for the modules in float64."""
    x, convs, grads = inputs(batch, strides)
    x64, convs64 = x.detach().double().requires_grad_(), [conv.double() for conv in copy.deepcopy(convs)]
    outs = shared_input(x, convs)
    assert outs is not None and torch.equal(outs[0], x)
    wanted = [x64 * 1, *(conv(x64) for conv in convs64)]
    for out, expected in zip(outs, wanted):
        assert (out - expected).abs().max() < 1e-5
    actual = derive(outs, [x, *(conv.weight for conv in convs)], grads)
    expected = derive(wanted, [x64, *(conv.weight for conv in convs64)], [grad.double() for grad in grads])
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        assert a.shape == e.shape and (a - e).abs().max() < 1e-5 * e.abs().max().clamp(min=1)


@pytest.mark.parametrize('batch', [3, 4, 5])
@pytest.mark.parametrize('strides', [(1,), (1, 2), (2, 2, 1)])
def test_gradients(batch, strides):
    run_both(lambda outs, inputs, grads: torch.autograd.grad(outs, inputs, grads), batch, strides)


@pytest.mark.parametrize('used', [[0], [1], [2], [1, 2]])
def test_not_everything_is_used(used):
    def derive(outs, inputs, grads):
        return torch.autograd.grad([outs[i] for i in used], inputs[0], [grads[i] for i in used])
    run_both(derive)


def test_second_derivative():
    def derive(outs, inputs, grads):
        grads = torch.autograd.grad(outs, inputs, grads, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)
    run_both(derive)


def test_many_gradients_at_once():
    def derive(outs, inputs, grads):
        return torch.autograd.grad(outs, inputs, [torch.stack([g, 2 * g]) for g in grads], is_grads_batched=True)
    run_both(derive)


def test_gradients_in_another_memory_format():
    def derive(outs, inputs, grads):
        return torch.autograd.grad(outs, inputs, [g[:1].expand(g.shape) for g in grads])
    run_both(derive)


@pytest.mark.parametrize('how', [
    'few', 'contiguous', 'float64', 'bias', '3x3', 'groups', 'frozen', 'no grad', 'hook', 'autocast', 'leaf', 'meta'])
def test_modules_run_themselves(how):
    x, convs, _ = inputs(batch=2 if how == 'few' else 5)
    if how == 'contiguous':
        x = x.contiguous()
    elif how == 'float64':
        x, convs = x.double(), [conv.double() for conv in convs]
    elif how == 'bias':
        convs[1] = nn.Conv2d(8, 4, 1)
    elif how == '3x3':
        convs[1] = nn.Conv2d(8, 4, 3, padding=1, bias=False)
    elif how == 'groups':
        convs[1] = nn.Conv2d(8, 4, 1, groups=2, bias=False)
    elif how == 'frozen':
        convs[0].weight.requires_grad_(False)
    elif how == 'hook':
        convs[0].register_forward_hook(lambda module, args, out: None)
    elif how == 'leaf':
        x = x.detach()
    elif how == 'meta':
        x = x.detach().to('meta').requires_grad_()
    with torch.set_grad_enabled(how != 'no grad'), torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
        assert shared_input(x, convs) is None


def test_tracers_see_the_convolutions():
    x, convs, _ = inputs()
    traced = torch.fx.symbolic_trace(lambda x: (shared_input(x, convs), x * 1)[1])
    assert torch.equal(traced(x), x)
