"""How programs of the Triton kernels share tensors, chosen by shape without timing anything."""
import functools
import importlib
import math
import types
from typing import Dict, NamedTuple, Tuple

import torch
from torch import Tensor

PROGRAMS = 1056  # eight for each of an H100's multiprocessors
THREADS = 128
VECTOR = 16  # bytes that a thread loads at once


class Walk(NamedTuple):
    """How programs share rows of channels: runs of LENGTH pixels, RUNS for each image, in tiles of BLOCK_C channels."""
    grid: Tuple[int]
    sizes: Tuple[int, int, int]  # pixels of an image, LENGTH, RUNS
    blocks: Dict[str, int]
    rows: Tuple[int, int, int, int] = ()  # sizes, and channels divided by ALIGN

    @property
    def runs(self) -> int:
        return self.sizes[2]


def power_of_2(size: int) -> int:
    """The smallest power of two that is not below size."""
    return 1 << (size - 1).bit_length()


def _walk(images: int, pixels: int, tiles: int, block_p: int, programs: int = PROGRAMS, **blocks: int) -> Walk:
    """As many programs as keep a GPU busy, if there is work for them, and no more: each leaves sums of its own."""
    blocks_p = -(-pixels // block_p)
    steps = max(1, min(blocks_p, images * blocks_p * tiles // programs))
    runs = -(-blocks_p // steps)
    return Walk((images * runs * tiles,), (pixels, steps * block_p, runs), dict(blocks, BLOCK_P=block_p))


@functools.lru_cache(maxsize=4096)
def over_rows(
        images: int, pixels: int, channels: int, itemsize: int, loads: int = 4, sums: bool = True) -> Walk:
    """For kernels over rows of channels, of which each thread loads `loads` vectors at a time.

    Where programs leave sums behind they are fewer, and of few pixels each is one warp, as several would take longer to
    add up theirs than to make them.
    """
    widest = 128 // itemsize
    tiles = [t for t in (16, 32, 64, 128) if min(32, widest) <= t <= widest]
    tile = min(tiles, key=lambda t: (-(-channels // t) * t, -t))  # of which few channels are left over
    warps = 1 if sums and pixels <= 256 else THREADS // 32
    vectors = 32 * warps * VECTOR // itemsize  # elements of one vector for each thread
    block_p = min(loads * vectors // tile, power_of_2(pixels))
    align = math.gcd(channels, 16)
    walk = _walk(
        images, pixels, -(-channels // tile), block_p, PROGRAMS * (4 // warps if sums else 4),
        BLOCK_C=tile, FOLD=max(1, block_p * tile // vectors), ALIGN=align, num_warps=warps)
    return walk._replace(rows=(*walk.sizes, channels // align))


@functools.lru_cache(maxsize=4096)
def over_halves(images: int, pixels: int, channels: int, filters: int, groups: int, itemsize: int) -> Walk:
    """For the local convolution, whose threads have a filter for two channels: `contexts_kernels.place_halves`."""
    filters, channels = filters // groups, channels // groups
    half = -(-channels // filters // 2) * filters
    tile = min(power_of_2(half), 128 // itemsize)
    vectors = THREADS * VECTOR // itemsize
    block_p = max(1, min(vectors // tile, power_of_2(pixels)))
    return _walk(
        images, pixels, groups * -(-half // tile), block_p, 2 * PROGRAMS,
        HALF=half, BLOCK_C=tile, FOLD=max(1, block_p * tile // vectors))


def more_threads(itemsize: int) -> Dict[str, int]:
    """Options of a kernel that waits for memory more than it computes: fewer registers for each of more threads.

    ROCm has no such option, and of 64 bits it would be too few.
    """
    return {} if torch.version.hip or itemsize == 8 else dict(maxnreg=128)


@functools.lru_cache(maxsize=4096)
def over_filters(images: int, pixels: int, channels: int, filters: int, groups: int, itemsize: int) -> Walk:
    """For the gradient of filters, whose programs have all channels of BLOCK_G filters."""
    block_g = min(power_of_2(filters // groups), 64)
    block_m = max(1, power_of_2(channels // filters) // 2)
    block_p = max(1, min(2 * 32 * VECTOR // itemsize // (block_g * block_m), power_of_2(pixels)))
    tiles = groups * -(-(filters // groups) // block_g)
    # one warp, as several would have to wait for each other at every tap
    return _walk(images, pixels, tiles, block_p, 4 * PROGRAMS, BLOCK_G=block_g, BLOCK_M=block_m, num_warps=1)


@functools.lru_cache(maxsize=None)
def kernels_of(name: str) -> types.ModuleType:
    """A module of kernels, which imports Triton; looked up once, as import statements take time each time."""
    return importlib.import_module(f'.{name}', __package__)


@functools.lru_cache(maxsize=None)
def accumulator(dtype: torch.dtype):
    """The dtype in which kernels compute for tensors of dtype, for PyTorch and for Triton."""
    import triton.language as tl

    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def all_rows(x: Tensor, loads: int = 2, sums: bool = True) -> Walk:
    """A walk over x, (B, C, H, W), all of whose images are one."""
    return over_rows(1, x.numel() // x.shape[1], x.shape[1], x.element_size(), loads, sums)


def image_rows(x: Tensor, loads: int = 2, sums: bool = True) -> Walk:
    """A walk over x, (B, C, H, W), image by image."""
    B, C, H, W = x.shape
    return over_rows(B, H * W, C, x.element_size(), loads, sums)
