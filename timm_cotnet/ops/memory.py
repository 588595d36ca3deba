"""Large tensors on huge pages."""
import ctypes
import mmap
import sys

import torch

_MIN_BYTES = 4 << 20
_LIBC = ctypes.CDLL(None) if sys.platform == 'linux' and hasattr(mmap, 'MADV_HUGEPAGE') else None


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """`torch.empty_like(x)`, which asks Linux for huge pages if it is large.

    Large tensors are often memory that comes fresh from the system. It comes page by page as it is first written to,
    and with small pages that may take as long as what a kernel computes.
    """
    out = torch.empty_like(x)
    size = out.numel() * out.element_size()
    if _LIBC is not None and size >= _MIN_BYTES:
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (out.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        # a hint: without huge pages, or with the right to them withdrawn, it fails and nothing is lost
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return out
