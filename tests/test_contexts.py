"""The definition of contexts, against the layers that it is cut from."""
import copy

import pytest
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import nn

from timm_cotnet import CotLayer, CoxtLayer
from timm_cotnet.ops import (
    ContextsParameters, ContextsSettings, contexts, grouped_local_conv, mix_contexts, pool_contexts)

from helpers import FORMATS, difference, image, shaken

LAYERS = [
    (CotLayer, dict(dim=16), (3, 4, 5)), (CotLayer, dict(dim=24, kernel_size=5, dilation=2), (4, 8, 7)),
    (CoxtLayer, dict(dim=32), (2, 6, 5)), (CoxtLayer, dict(dim=48, kernel_size=1), (3, 3, 1)),
    (CotLayer, dict(dim=16, kernel_size=7), (2, 3, 2))]  # smaller than a filter


def create(layer_cls, kwargs):
    torch.manual_seed(0)
    layer = shaken(layer_cls(**kwargs)).double().train()
    for i, norm in enumerate((layer.conv1x1[1], layer.embed[4], layer.bn, layer.se[1])):
        norm.eps = 1e-5 * (i + 1)  # each is to be found in its own place
    return layer


def of_training(layer):
    """Parameters and numbers of `contexts` for a layer in training."""
    value, filters, first, second = layer.conv1x1[1], layer.embed[4], layer.se[0], layer.se[3]
    p = ContextsParameters(
        value.weight, value.bias, filters.weight, filters.bias, layer.bn.weight, layer.bn.bias,
        first.weight, first.bias, layer.se[1].weight, layer.se[1].bias, second.weight, second.bias)
    return p, ContextsSettings(
        layer.kernel_size, layer.dilation, layer.groups, filters.num_groups,
        value.eps, filters.eps, layer.bn.eps, layer.se[1].eps)


def of_folded(layer):
    """The same for a folded layer: of its batch norms a shift is left."""
    filters, first, second = layer.embed[2], layer.se[0], layer.se[2]
    p = ContextsParameters(
        None, None, filters.weight, filters.bias, None, layer.shift,
        first.weight, first.bias, None, None, second.weight, second.bias)
    return p, ContextsSettings(
        layer.kernel_size, layer.dilation, layer.groups, filters.num_groups, filter_eps=filters.eps)


def inputs_of(layer, x):
    """What comes from the convolutions of a layer, folded or not: values, filters before their norm, static context."""
    static = layer.key_embed(x)
    if hasattr(layer, 'query'):
        return layer.value(x), layer.embed[:2](layer.query(x) + layer.key(static)), static
    return layer.conv1x1[0](x), layer.embed[:4](layer._concatenate(x, static)), static


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('layer_cls, kwargs, shape', LAYERS)
def test_equals_the_layer(layer_cls, kwargs, shape, memory_format):
    layer = create(layer_cls, kwargs)
    x = image(shape[0], kwargs['dim'], *shape[1:], memory_format, torch.float64).requires_grad_()
    grad = image(shape[0], kwargs['dim'], *shape[1:], dtype=torch.float64, seed=2)
    expected = layer(x)
    wanted = torch.autograd.grad(expected, [x, *layer.parameters()], grad)
    p, s = of_training(layer)
    out = contexts(*inputs_of(layer, x), p, s)
    assert difference(out, expected) < 1e-12
    grads = torch.autograd.grad(out, [x, *layer.parameters()], grad)
    largest = max(t.abs().max() for t in wanted)
    assert all((a - b).abs().max() < 1e-12 * largest for a, b in zip(grads, wanted))


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('layer_cls, kwargs, shape', LAYERS)
def test_equals_the_folded_layer(layer_cls, kwargs, shape, memory_format):
    layer = create(layer_cls, kwargs).eval()
    folded = reparameterize_model(nn.Sequential(layer))[0]
    x = image(shape[0], kwargs['dim'], *shape[1:], memory_format, torch.float64)
    out = contexts(*inputs_of(folded, x), *of_folded(folded))
    assert difference(out, folded(x)) < 1e-12
    assert difference(out, layer(x)) < 1e-10


def test_neither_reads_nor_writes_running_statistics():
    layer = create(CotLayer, dict(dim=16))
    other = copy.deepcopy(layer)
    for name, buffer in other.named_buffers():
        if 'running' in name:
            buffer.fill_(float('nan'))
    x = image(3, 16, 4, 5, dtype=torch.float64)
    inputs = inputs_of(layer, x)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    assert torch.equal(contexts(*inputs, *of_training(layer)), contexts(*inputs, *of_training(other)))
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
def test_scripts():
    scripted = torch.jit.script(contexts)
    for layer_cls in (CotLayer, CoxtLayer):
        layer = create(layer_cls, dict(dim=16))
        inputs = inputs_of(layer, image(3, 16, 4, 5, dtype=torch.float64))
        p, s = of_training(layer)
        assert difference(scripted(*inputs, p, s), contexts(*inputs, p, s)) < 1e-12
        folded = reparameterize_model(nn.Sequential(layer.eval()))[0]
        inputs = inputs_of(folded, image(3, 16, 4, 5, dtype=torch.float64))
        assert difference(scripted(*inputs, *of_folded(folded)), contexts(*inputs, *of_folded(folded))) < 1e-12


@pytest.mark.parametrize('folded', [False, True])
@pytest.mark.parametrize('groups', [1, 2])
def test_first_and_second_derivatives(folded, groups):
    """On a tiny shape, of every input."""
    C, G, taps, hidden, B, H, W = 4, 2, 9, 3, 3, 2, 2
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    norm = (lambda n: (None, None)) if folded else lambda n: (tensor(n), tensor(n))
    p = [*norm(C), tensor(G * taps), tensor(G * taps), norm(C)[0], tensor(C), tensor(hidden, C, 1, 1), tensor(hidden),
         *norm(hidden), tensor(2 * C, hidden, 1, 1), tensor(2 * C)]
    settings = ContextsSettings(3, 1, groups, G, 0.1, 0.1, 0.1, 0.1)
    inputs = [tensor(B, C, H, W), tensor(B, G * taps, H, W), tensor(B, C, H, W)]

    def function(value, logits, static, *rest):
        rest = iter(rest)
        parameters = ContextsParameters(*(None if t is None else next(rest) for t in p))
        return contexts(value, logits, static, parameters, settings)
    args = [*inputs, *(t for t in p if t is not None)]
    assert torch.autograd.gradcheck(function, args, check_batched_grad=True)
    fixed = [t.detach() for t in args[3:]]
    assert torch.autograd.gradgradcheck(lambda *three: function(*three, *fixed), inputs)


def test_weights_of_the_mix_sum_to_one():
    attn = image(2, 32, 1, 1, dtype=torch.float64) * 5
    dynamic, static = image(2, 16, dtype=torch.float64), image(2, 16, dtype=torch.float64, seed=2)
    ones = torch.ones_like(dynamic)
    assert difference(mix_contexts(dynamic, dynamic, attn), dynamic) < 1e-14
    assert difference(mix_contexts(ones, 0 * ones, attn) + mix_contexts(0 * ones, ones, attn), ones) < 1e-14
    weight = mix_contexts(ones, 0 * ones, attn)[:, :, :1, :1]  # of the dynamic context: its logit comes first
    assert difference(weight, torch.sigmoid(attn[:, 0::2] - attn[:, 1::2])) < 1e-14
    expected = dynamic * weight + static * (1 - weight)
    assert difference(mix_contexts(dynamic, static, attn), expected) < 1e-14
    certain = torch.tensor([100., -100.], dtype=torch.float64).repeat(16).view(1, 32, 1, 1).expand(2, -1, -1, -1)
    assert difference(mix_contexts(dynamic, static, certain), dynamic) < 1e-14


def test_pool_is_the_mean_over_pixels():
    dynamic, static = image(2, 16, dtype=torch.float64), image(2, 16, dtype=torch.float64, seed=2)
    pooled = pool_contexts(dynamic, static)
    assert pooled.shape == (2, 16, 1, 1)
    assert difference(pooled, F.adaptive_avg_pool2d(dynamic + static, 1)) < 1e-14


@pytest.mark.parametrize('memory_format', FORMATS)
def test_dtype_and_memory_format(memory_format):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        layer = create(CotLayer, dict(dim=16)).to(dtype)
        inputs = [t.contiguous(memory_format=memory_format) for t in inputs_of(layer, image(3, 16, 4, 5, dtype=dtype))]
        out = contexts(*inputs, *of_training(layer))
        assert out.dtype == dtype and out.is_contiguous(memory_format=memory_format)
        p, s = of_training(copy.deepcopy(layer).double())
        assert difference(out, contexts(*(t.double() for t in inputs), p, s)) < tolerance


def test_groups_are_slices_of_channels_and_filters():
    value, filters = image(2, 16, dtype=torch.float64), image(2, 4 * 9, dtype=torch.float64, seed=2)
    halves = [grouped_local_conv(value[:, i:i + 8], filters[:, j:j + 18], 3, 1, 1) for i, j in ((0, 0), (8, 18))]
    assert torch.equal(grouped_local_conv(value, filters, 3, 1, 2), torch.cat(halves, 1))
