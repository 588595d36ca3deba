"""Large tensors on huge pages: the same tensors."""
import pytest
import torch

from timm_cotnet.ops.cpu import memory


@pytest.mark.parametrize('size', [0, 3, memory._MIN_BYTES // 4 + 7])
def test_memory_on_huge_pages_is_memory(size):
    out = memory.empty_like(torch.zeros(size, dtype=torch.float32))
    assert out.shape == (size,) and out.fill_(2).sum() == 2 * size


def test_strides_are_those_of_the_other():
    x = torch.zeros(2, 64, 128, 128).contiguous(memory_format=torch.channels_last)
    assert x.numel() * x.element_size() > memory._MIN_BYTES
    out = memory.empty_like(x)
    assert out.stride() == x.stride() and out.data_ptr() != x.data_ptr()
    assert memory.on_huge_pages(out) is out
