"""Packed convolutions of folded models: equal to plain ones, packed once, and never older than their filters."""
import copy
import ctypes
import gc
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_cotnet.ops import onednn
from timm_cotnet.ops.onednn import conv2d_act, kept, run_conv2d

from helpers import needs_onednn, run_python

pytestmark = needs_onednn
CONVOLUTIONS = [
    dict(kernel_size=1),
    dict(kernel_size=1, stride=2),
    dict(kernel_size=1, groups=2, bias=False),
    dict(kernel_size=3, padding=1, groups=4),
    dict(kernel_size=3, padding=2, dilation=2),
    dict(kernel_size=7, padding=3, stride=2, bias=False),
]


@pytest.mark.parametrize('kwargs', CONVOLUTIONS, ids=str)
@pytest.mark.parametrize('act, addend', [
    ('none', None), ('relu', None), ('swish', None),
    ('none', 'added'), ('relu', 'added'), ('none', 'overwritten'), ('relu', 'overwritten')])
@torch.no_grad()
def test_equals_plain_convolution(kwargs, act, addend):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, **kwargs)
    for size in (9, 6):  # the second input meets filters that were packed for the first
        x = torch.randn(2, 16, size, size + 1)
        expected = F.conv2d(
            x.double(), conv.weight.double(), None if conv.bias is None else conv.bias.double(), conv.stride,
            conv.padding, conv.dilation, conv.groups)
        other = None if addend is None else torch.randn(expected.shape)
        expected = onednn.POST_OPS[act](expected if other is None else expected + other.double())
        before = None if other is None else other.contiguous(memory_format=torch.channels_last).clone()
        other = None if before is None else before.clone(memory_format=torch.preserve_format)
        out = run_conv2d(conv, x, act, addend=other, overwrite=addend == 'overwritten')
        assert (out - expected).abs().max() < 1e-5 * expected.abs().max()
        assert out.is_contiguous(memory_format=torch.channels_last)
        if addend is not None:
            assert torch.equal(other, before) == (addend == 'added')  # overwritten only where that was allowed


@pytest.mark.parametrize('kwargs', CONVOLUTIONS[:4], ids=str)
def test_operator(kwargs):
    conv = nn.Conv2d(16, 24, **kwargs).requires_grad_(False)
    args = (conv.stride, conv.padding, conv.dilation, conv.groups)
    x = torch.randn(2, 16, 5, 4)
    torch.library.opcheck(torch.ops.timm_cotnet.conv2d_act, (x, conv.weight, conv.bias, None, *args, 'relu'))


@pytest.mark.parametrize('memory_format', [torch.channels_last, torch.contiguous_format])
@torch.no_grad()
def test_operator_that_overwrites(memory_format):
    conv = nn.Conv2d(16, 24, 3, padding=1).requires_grad_(False)
    args = (conv.weight, conv.bias)
    x, addend = torch.randn(2, 16, 5, 4), torch.randn(2, 24, 5, 4).contiguous(memory_format=memory_format)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups, 'relu')
    torch.library.opcheck(torch.ops.timm_cotnet.conv2d_act_, (x, *args, addend, *geometry))
    expected = F.relu(conv(x) + addend)
    torch.ops.timm_cotnet.conv2d_act_(x, *args, addend, *geometry)
    assert (addend - expected).abs().max() < 1e-5


# What may happen to the filters of a convolution between two calls.


def by_data(conv):
    conv.weight.data.mul_(0.5)


def one_number_by_data(conv):
    conv.weight.data[3, 2, 0, 0] += 1


def by_data_that_was_taken_before(conv, data):
    data.mul_(0.5)


def by_numpy(conv):
    conv.weight.detach().numpy()[:] *= 0.5


def by_numpy_that_was_taken_before(conv, array):
    array *= 0.5


def by_address(conv):
    ctypes.memset(conv.weight.data_ptr(), 0, 4 * conv.weight.numel() // 2)


def by_storage(conv):
    conv.weight.untyped_storage().fill_(0)


def by_load_state_dict(conv):
    conv.load_state_dict({name: 0.5 * value for name, value in conv.state_dict().items()})


def by_assigning_state_dict(conv):
    conv.load_state_dict({name: 0.5 * value for name, value in conv.state_dict().items()}, assign=True)


def by_state_dict_that_was_taken_before(conv, state_dict):
    for value in state_dict.values():
        value.mul_(0.5)


def by_optimizer(conv):
    conv.weight.grad = torch.ones_like(conv.weight)
    torch.optim.SGD(conv.parameters(), 0.1).step()
    conv.weight.grad = None


def by_foreach(conv):
    torch._foreach_mul_([p.data for p in conv.parameters()], 0.5)


def by_new_data(conv):
    conv.weight.data = 0.5 * conv.weight.data


def by_rolled_data(conv):
    conv.weight.data = conv.weight.data.roll(1, 0)


def by_new_parameter(conv):
    conv.weight = nn.Parameter(0.5 * conv.weight.detach())


def by_swapping(conv):
    torch.utils.swap_tensors(conv.weight, nn.Parameter(0.5 * conv.weight.detach()))


def by_other_dtype_and_back(conv):
    conv.to(torch.bfloat16).to(torch.float32)


def in_inference_mode(conv):
    with torch.inference_mode():
        conv.weight.data.mul_(0.5)


BEFORE = {
    by_data_that_was_taken_before: lambda conv: conv.weight.data,
    by_numpy_that_was_taken_before: lambda conv: conv.weight.detach().numpy(),
    by_state_dict_that_was_taken_before: lambda conv: conv.state_dict(),
}
EDITS = [
    by_data, one_number_by_data, by_data_that_was_taken_before, by_numpy, by_numpy_that_was_taken_before, by_address,
    by_storage, by_load_state_dict, by_assigning_state_dict, by_state_dict_that_was_taken_before, by_optimizer,
    by_foreach, by_new_data, by_rolled_data, by_new_parameter, by_swapping, by_other_dtype_and_back,
    in_inference_mode]


@pytest.mark.parametrize('kernel_size', [1, 3])
@pytest.mark.parametrize('edit', EDITS, ids=lambda edit: edit.__name__)
def test_never_older_than_the_filters(edit, kernel_size):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, kernel_size, padding=kernel_size // 2)
    x = torch.randn(2, 8, 5, 5)
    taken = [BEFORE[edit](conv)] if edit in BEFORE else []
    with torch.no_grad():
        first = run_conv2d(conv, x)
        assert torch.equal(run_conv2d(conv, x), first)
    for _ in range(2):  # also the second time
        edit(conv, *taken)
        with torch.no_grad():
            expected = conv(x)
            assert (run_conv2d(conv, x) - expected).abs().max() < 1e-5
            assert edit is by_other_dtype_and_back or (expected - first).abs().max() > 0.01


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda conv: pickle.loads(pickle.dumps(conv))])
@torch.no_grad()
def test_copies_go_their_own_way(copied):
    conv, x = nn.Conv2d(8, 8, 1), torch.randn(2, 8, 5, 5)
    first = run_conv2d(conv, x)
    other = copied(conv)
    other.weight.data.mul_(2)
    assert torch.equal(run_conv2d(conv, x), first)
    assert (run_conv2d(other, x) - other(x)).abs().max() < 1e-5
    conv.weight.data, other.weight.data = other.weight.data, conv.weight.data
    assert (run_conv2d(conv, x) - conv(x)).abs().max() < 1e-5
    assert (run_conv2d(other, x) - other(x)).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('how', ['whole', 'whole and mapped', 'assigned'])
def test_loaded_weights_may_be_written_to(how, tmp_path):
    """Their memory is not as other memory of PyTorch's is; a mistake ends the process, so it has one of its own."""
    run_python('-c', f"""
import torch
from torch import nn
from timm_cotnet.ops.onednn import run_conv2d
conv, x = nn.Conv2d(8, 8, 1), torch.randn(2, 8, 5, 5)
with torch.no_grad():
    if {how == 'assigned'}:
        torch.save(nn.Conv2d(8, 8, 1).state_dict(), 'conv.pt')
        conv.load_state_dict(torch.load('conv.pt'), assign=True)
    else:
        torch.save(conv, 'conv.pt')
        conv = torch.load('conv.pt', weights_only=False, mmap={'mapped' in how})
    for _ in range(3):
        conv.weight.data.mul_(0.5)
        assert (run_conv2d(conv, x) - conv(x)).abs().max() < 1e-5
""", cwd=tmp_path)


@torch.no_grad()
@pytest.mark.parametrize('kwargs, counts', [  # of products of matrices, and of convolutions
    (dict(kernel_size=1), (1, 1, 1)), (dict(kernel_size=3, padding=1, groups=4), (1, 2, 4))], ids=str)
def test_packed_once_for_one_image_and_once_for_several(monkeypatch, kwargs, counts):
    packed = []
    for name in ('pack', 'pack_linear'):
        make = getattr(onednn, name)
        monkeypatch.setattr(onednn, name, lambda *args, make=make: packed.append(make) or make(*args))
    conv = nn.Conv2d(16, 16, **kwargs)
    inputs = [(1, 7)], [(8, 7), (3, 7), (1, 7), (64, 7)], [(2, 14), (1, 5), (5, 14), (1, 7), (3, 7)]
    for count, shapes in zip(counts, inputs):
        for batch, size in shapes:
            x = torch.randn(batch, 16, size, size)
            assert (run_conv2d(conv, x) - conv(x)).abs().max() < 1e-5
        assert len(packed) == count


@torch.no_grad()
def test_no_more_than_a_few_are_kept():
    conv, storages = nn.Conv2d(16, 16, 3), onednn._KEPT
    for size in range(3, 20):
        x = torch.randn(1, 16, size, size)
        assert (run_conv2d(conv, x) - conv(x)).abs().max() < 1e-5
    assert len(storages[conv.weight.untyped_storage()._cdata].made) == 8
    conv.weight.data.mul_(0.5)  # what was made before is of no use
    assert (run_conv2d(conv, x) - conv(x)).abs().max() < 1e-5
    assert len(storages[conv.weight.untyped_storage()._cdata].made) == 1


@torch.no_grad()
def test_what_cannot_be_watched_is_not_packed():
    conv, x = nn.Conv2d(8, 8, 1), torch.randn(2, 8, 5, 5)
    conv.weight.data = torch.from_numpy(conv.weight.numpy().copy())  # not PyTorch's memory
    assert kept(conv.weight, onednn.pack_linear) is None
    assert (run_conv2d(conv, x) - conv(x)).abs().max() < 1e-5
    conv = nn.Conv2d(8, 8, 1)
    tied = conv.weight.data  # whoever has it may have a raw view of it, too
    assert kept(conv.weight, onednn.pack_linear) is None
    del tied
    assert kept(conv.weight, onednn.pack_linear) is not None


@torch.no_grad()
def test_nothing_is_kept_of_what_is_gone():
    gc.collect()
    before = len(onednn._KEPT)
    conv = nn.Conv2d(8, 8, 1)
    run_conv2d(conv, torch.randn(1, 8, 5, 5))
    assert len(onednn._KEPT) == before + 1
    torch.save(conv.state_dict(), io.BytesIO())  # reading the memory is allowed
    del conv
    gc.collect()
    assert len(onednn._KEPT) == before


@torch.no_grad()
def test_without_packing_results_are_equal(monkeypatch):
    monkeypatch.setattr(onednn, 'kept', lambda *args, **kwargs: None)
    conv, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 5, 5)
    other = torch.randn(2, 8, 5, 5)
    expected = F.relu(conv(x) + other)
    args = (conv.weight, conv.bias, other, conv.stride, conv.padding, conv.dilation, conv.groups, 'relu')
    assert (conv2d_act(x, *args) - expected).abs().max() < 1e-5
