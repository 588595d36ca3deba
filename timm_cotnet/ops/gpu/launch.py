"""How programs of the Triton kernels share tensors, chosen by shape without timing anything; and their launch."""
import functools
from typing import Any, Dict, NamedTuple, Tuple

import torch
from torch import Tensor

PROGRAMS = 1056  # eight for each of an H100's multiprocessors
THREADS = 128
VECTOR = 16  # bytes that a thread loads at once
LINE = 64  # bytes of a pixel beside each other, at least, that threads load at once
LOADS = 1

_compiled: Dict[tuple, Tuple[Any, tuple]] = {}


def launch(kernel, grid: Tuple[int], *args, **constants) -> None:
    """`kernel[grid](*args, **constants)`; from the second time on in less than half of the host's time.

    Args:
        kernel: A function of `triton.jit`, whose integers are all among its `do_not_specialize`.
        grid: Number of programs.
        *args: Tensors, then integers.
        **constants: Its `constexpr` arguments, and options.
    """
    dtypes = [a.dtype for a in args if isinstance(a, Tensor)]
    if any(a.data_ptr() % VECTOR for a in args[:len(dtypes)]):  # these need kernels of their own
        kernel[grid](*args, **constants)
        return
    key = (kernel, args[0].get_device(), *constants.items(), *dtypes)
    found = _compiled.get(key)
    if found is not None:
        compiled, tail = found
        compiled[(grid[0], 1, 1)](*args, *tail)
        return
    compiled = kernel[grid](*args, **constants)
    if hasattr(compiled, 'packed_metadata') and not _has_old_launcher():  # neither is so in Triton's interpreter
        _compiled[key] = compiled, tuple(constants[p.name] for p in kernel.params if p.is_constexpr)


@functools.lru_cache(maxsize=None)
def _has_old_launcher() -> bool:
    import triton

    return tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3)


class Walk(NamedTuple):
    """How programs share rows of channels: runs of LENGTH pixels, RUNS for each image, in tiles of BLOCK_C channels."""
    grid: Tuple[int]
    sizes: Tuple[int, int, int]  # pixels of an image, LENGTH, RUNS
    blocks: Dict[str, int]

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
def over_rows(images: int, pixels: int, channels: int, itemsize: int, loads: int = 4) -> Walk:
    """For kernels over rows of channels, of which each thread loads `loads` vectors at a time."""
    widest = 128 // itemsize
    tiles = [t for t in (16, 32, 64, 128) if min(32, widest) <= t <= widest]
    tile = min(tiles, key=lambda t: (-(-channels // t) * t, -t))  # of which few channels are left over
    vectors = THREADS * VECTOR // itemsize  # elements of one vector for each thread
    block_p = min(loads * vectors // tile, power_of_2(pixels))
    fold = max(1, block_p * tile // vectors)
    return _walk(images, pixels, -(-channels // tile), block_p, BLOCK_C=tile, FOLD=fold)


@functools.lru_cache(maxsize=4096)
def over_filters(
        images: int, pixels: int, channels: int, filters: int, groups: int, itemsize: int, repeats: int = 4) -> Walk:
    """For kernels of the local convolution, which share out filters, and with each the channels that it is for.

    A thread has one vector of filters for up to `repeats` vectors of channels; None: for all of them.
    """
    filters //= groups
    shared_by = channels // groups // filters
    block_g = min(power_of_2(filters), 128 // itemsize)
    block_l = max(1, min(power_of_2(shared_by), LINE // itemsize // block_g))
    block_m = power_of_2(-(-shared_by // block_l))
    block_m = min(block_m, repeats or block_m)
    tiles = groups * -(-filters // block_g) * -(-shared_by // (block_m * block_l))
    vectors = THREADS * VECTOR // itemsize
    block_p = max(1, min(LOADS * vectors // (block_g * block_l), power_of_2(pixels)))
    fold = max(1, block_p * block_g * block_l // vectors)
    return _walk(
        images, pixels, tiles, block_p, BLOCK_M=block_m, BLOCK_L=block_l, BLOCK_G=block_g, FOLD=fold)


def accumulator(dtype: torch.dtype):
    """The dtype in which kernels compute for tensors of dtype, for PyTorch and for Triton."""
    import triton.language as tl

    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def all_rows(x: Tensor, loads: int = 4) -> Walk:
    """A walk over x, (B, C, H, W), all of whose images are one."""
    return over_rows(1, x.numel() // x.shape[1], x.shape[1], x.element_size(), loads)


def image_rows(x: Tensor, loads: int = 4) -> Walk:
    """A walk over x, (B, C, H, W), image by image."""
    B, C, H, W = x.shape
    return over_rows(B, H * W, C, x.element_size(), loads)
