"""The 1x1 convolutions of a folded CoT layer in one kernel: against plain PyTorch in double precision."""
import pytest
import torch
import torch.nn.functional as F

from timm_cotnet import CotLayer
from timm_cotnet.ops import folded
from timm_cotnet.ops.pointwise import pack_pairs, pointwise, why_not_pointwise

from golden import filled, golden_input

X = torch.zeros(1, 8, 1, 1, dtype=torch.bfloat16)
needs_pointwise = pytest.mark.skipif(why_not_pointwise(X) is not None, reason=f'no kernel: {why_not_pointwise(X)}')
# (B, C, H, W): panels that are full, half full, and not; pixels for all numbers of rows, and for several blocks
SHAPES = [(1, 8, 1, 1), (2, 16, 3, 5), (1, 40, 7, 7), (3, 64, 9, 11), (1, 136, 5, 3), (2, 256, 14, 14), (1, 512, 7, 7)]


def operands(shape):
    """x, static, and weights and biases of the query, key (no bias), filter and value convolutions."""
    B, C, H, W = shape
    generator = torch.Generator().manual_seed(C)

    def make(*size, scale=1.0):
        return (torch.randn(size, generator=generator) * scale).bfloat16()

    def conv(inputs, outputs):
        return make(outputs, inputs, 1, 1, scale=inputs ** -0.5), make(outputs)

    x, static = (make(*shape).contiguous(memory_format=torch.channels_last) for _ in range(2))
    return (x, static, *conv(C, C // 2), conv(C, C // 2)[0], *conv(C // 2, C * 9 // 8), *conv(C, C))


def run(x, static, query, query_bias, key, attn, attn_bias, value, value_bias):
    query, key, attn, value = map(pack_pairs, (query, key, attn, value))
    return pointwise(x, static, query, query_bias, key, attn, attn_bias, value, value_bias)


def plain(*tensors):
    x, static, query, query_bias, key, attn, attn_bias, value, value_bias = (t.double() for t in tensors)
    hidden = F.relu(F.conv2d(x, query, query_bias) + F.conv2d(static, key))
    return F.conv2d(hidden, attn, attn_bias), F.conv2d(x, value, value_bias)


@needs_pointwise
@pytest.mark.parametrize('threads', [1, 2, 5])
@pytest.mark.parametrize('shape', SHAPES)
def test_pointwise(shape, threads):
    tensors = operands(shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = run(*tensors)
    finally:
        torch.set_num_threads(before)
    for out, expected in zip(actual, plain(*tensors)):
        assert out.dtype == torch.bfloat16 and out.shape == expected.shape
        assert out.is_contiguous(memory_format=torch.channels_last)
        # a rounding of the result, and for the filters one of what lies between the convolutions
        assert (out - expected).abs().max() < 6e-3 * expected.abs().max()


@needs_pointwise
def test_exact_for_small_integers():
    """Each number lands where it belongs: nothing is rounded here."""
    tensors = [(t * 2).round().clamp(-1, 1) for t in operands((2, 40, 5, 3))]
    for out, expected in zip(run(*tensors), plain(*tensors)):
        assert torch.equal(out.double(), expected.bfloat16().double())


@needs_pointwise
def test_nan_and_infinity_stay_in_their_pixel():
    x, *others = operands((2, 16, 3, 5))
    x[0, 3, 1, 1], x[1, 0, 2, 4] = float('nan'), float('inf')
    for out in run(x, *others):
        finite = out.isfinite().all(1)
        assert not finite[0, 1, 1] and not finite[1, 2, 4] and finite.sum() == finite.numel() - 2
        assert out[0, :, 1, 1].isnan().all()


@needs_pointwise
def test_any_memory_format():
    x, static, *others = operands((2, 16, 3, 5))
    for actual, expected in zip(run(x.contiguous(), static.contiguous(), *others), run(x, static, *others)):
        assert torch.equal(actual, expected)


@needs_pointwise
def test_layers_use_it(monkeypatch):
    calls = []
    monkeypatch.setattr(folded, 'pointwise', lambda *args: calls.append(1) or pointwise(*args))
    layer = filled(CotLayer(16)).eval().fuse().bfloat16()
    x = golden_input((2, 16, 6, 5), 'x').bfloat16()
    with torch.no_grad():
        layer(x)
        layer.float()(x.float())
    assert calls == [1]


@torch.no_grad()
def test_parameters_made_in_inference_mode():
    """They have no version, so no filters of theirs are kept."""
    layer = filled(CotLayer(16)).eval().fuse().bfloat16()
    x = golden_input((2, 16, 6, 5), 'x').bfloat16()
    expected = layer(x)
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            with torch.inference_mode():
                module._parameters[name] = torch.nn.Parameter(parameter.clone(), requires_grad=False)
    assert layer.query.weight.is_inference()
    assert (layer(x).float() - expected.float()).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize('reason, x', [
    ('contiguous bfloat16', X.float()), ('no pairs', torch.zeros(1, 6, 1, 1, dtype=torch.bfloat16))])
def test_why_not(reason, x):
    assert reason in why_not_pointwise(x)
    assert 'contiguous bfloat16' in why_not_pointwise(X, torch.zeros(8, dtype=torch.bfloat16)[::2])


def test_no_library(monkeypatch):
    monkeypatch.setitem(why_not_pointwise.__globals__, 'load', lambda *_: 'no compiler')
    assert why_not_pointwise(X) == 'no compiler'
