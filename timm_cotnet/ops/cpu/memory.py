"""Large tensors on huge pages."""
import ctypes
import mmap
import sys

import torch

_MIN_BYTES = 4 << 20
_LIBC = ctypes.CDLL(None) if sys.platform == 'linux' and hasattr(mmap, 'MADV_HUGEPAGE') else None


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """`on_huge_pages(torch.empty_like(x))`."""
    return on_huge_pages(torch.empty_like(x))


def on_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, for which Linux is asked for huge pages if it is large; to be called before it is written to.

    Large tensors are often memory that comes fresh from the system. It comes page by page as it is first written to,
    and with small pages that may take as long as what a kernel computes.
    """
    size = tensor.numel() * tensor.element_size()
    if _LIBC is not None and size >= _MIN_BYTES:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        # a hint: without huge pages, or with the right to them withdrawn, it fails and nothing is lost
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return tensor
