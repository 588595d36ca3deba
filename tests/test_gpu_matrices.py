"""Filters of a CoT layer as matrices, and back, by Triton kernels against PyTorch; see `triton_helpers.py`."""
import pytest
import torch
from triton_helpers import DEVICE, create, kernels, outside, passed_in_the_interpreter

from timm_cotnet.ops.cot_layer import grouped, parameters_of, settings_of
from timm_cotnet.ops.gpu.contexts import tap_by_tap
from timm_cotnet.ops.gpu.cot_layer import dense, query_key
from timm_cotnet.ops.gpu.matrices import Matrices, from_matrices, key_groups, to_matrices

pytest.importorskip('triton', reason='Triton is not installed')


@pytest.mark.slow
@outside
def test_kernels_in_the_interpreter():
    passed, skipped = passed_in_the_interpreter(__file__)
    assert passed == 17 and skipped == 1  # this test


def expected(p, s):
    """By PyTorch, one after the other."""
    groups = s.contexts.groups
    key = p.key if key_groups(p, s) == s.key_groups else dense(p.key, s.key_groups)
    halves = query_key(p.first, groups)
    attn = tap_by_tap(dense(p.attn, groups), s.contexts.kernel_size, groups)
    return Matrices(key, *(t.flatten(1) for t in (*halves, attn, dense(p.value, groups))))


def layer_of(tag, dtype, lies):
    layer, x = create(tag, torch.float32)
    layer, x = layer.to(memory_format=lies or torch.contiguous_format), x.to(dtype)
    if lies is None:  # in no format
        for name, parameter in layer.named_parameters():
            parameter.data = parameter.data.transpose(0, 1).contiguous().transpose(0, 1) if parameter.ndim == 4 \
                else parameter.data
    return grouped(parameters_of(layer)), settings_of(layer, x)


LIES = [torch.contiguous_format, torch.channels_last, None]


@kernels
@pytest.mark.parametrize('lies', LIES, ids=str)
@pytest.mark.parametrize('dtype', [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize('tag', ['cot24', 'coxt_k5_dilation2'])
def test_to_matrices_and_back(tag, dtype, lies):
    p, s = layer_of(tag, dtype, lies)
    with torch.no_grad():
        made = to_matrices(p, s)
        for name, got, want in zip(Matrices._fields, made, expected(p, s)):
            assert got.dtype == dtype and torch.equal(got, want.to(dtype)), name
        assert made.key.is_contiguous(memory_format=torch.channels_last)

        image_sums = torch.randn(5, 3, len(p.attn), dtype=torch.float32, device=DEVICE)
        found, sums = from_matrices(made, image_sums, p, s)
    torch.testing.assert_close(torch.stack(sums), image_sums.sum(0))
    for got, filters in zip(found, (p.key, p.first, p.attn, p.value)):
        assert torch.equal(got, filters.to(dtype).to(filters.dtype)) and got.dtype == filters.dtype
        assert got.stride() == torch.empty_like(filters).stride()


@kernels
@pytest.mark.parametrize('missing', range(4))
def test_gradients_that_are_not_needed(missing):
    p, s = layer_of('coxt_k5_dilation2', torch.float64, torch.contiguous_format)
    made = to_matrices(p, s)
    of_filters = [(0,), (1, 2), (3,), (4,)]
    grads = [None if i in of_filters[missing] else t for i, t in enumerate(made)]
    found, _ = from_matrices(grads, made.value.new_zeros(1, 3, len(p.attn)), p, s)
    assert [i for i, t in enumerate(found) if t is None] == [missing]
    for got, filters in zip(found, (p.key, p.first, p.attn, p.value)):
        assert got is None or torch.equal(got, filters.to(got.dtype))


@kernels
def test_empty_gradients_only_sum():
    p, s = layer_of('cot24', torch.float32, torch.contiguous_format)
    image_sums = torch.ones(70, 3, len(p.attn), device=DEVICE)
    found, sums = from_matrices([None] * 5, image_sums, p, s)
    assert found == (None,) * 4 and all(torch.equal(t, torch.full_like(t, 70)) for t in sums)
