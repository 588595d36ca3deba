"""How programs of the Triton kernels share tensors, chosen by shape without timing anything; and their launch."""
import ctypes
import functools
import importlib
import math
import struct
import threading
import types
from functools import reduce
from operator import or_
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

PROGRAMS = 1056  # eight for each of an H100's multiprocessors
THREADS = 128
VECTOR = 16  # bytes that a thread loads at once


class Repeat(NamedTuple):
    """What launches again what a kernel was compiled to; by Triton if `start` is None."""
    compiled: Any  # has the function, which goes with it
    tail: tuple  # constants, which Triton takes behind the arguments
    start: Optional[Callable[..., int]] = None  # `cuLaunchKernel` of the CUDA driver
    pack_into: Optional[Callable[..., None]] = None
    function: int = 0
    threads: int = 0
    shared: int = 0
    stream_of: Optional[Callable[[int], int]] = None
    hooks: Any = None  # holds what wants to know of each launch, as profilers do


_kernels: Dict[int, Tuple[Any, int, Dict[tuple, Repeat]]] = {}


def launch(kernel, grid: Tuple[int], *args, **constants) -> None:
    """`kernel[grid](*args, **constants)`; from the second time on in a small part of the host's time.

    Args:
        kernel: A function of `triton.jit`, whose integers are all among its `do_not_specialize`.
        grid: Number of programs.
        *args: Tensors, as many each time, then integers.
        **constants: Its `constexpr` arguments, and options.
    """
    known = _kernels.get(id(kernel))  # whose hash takes longer than all the rest
    if known is None:
        known = _kernels[id(kernel)] = kernel, sum(isinstance(a, Tensor) for a in args), {}
    _, count, repeats = known
    tensors = args[:count]
    pointers = [t.data_ptr() for t in tensors]
    if reduce(or_, pointers) % VECTOR:  # these need kernels of their own
        kernel[grid](*args, **constants)
        return
    device = tensors[0].get_device()
    key = (device, *[t.dtype for t in tensors], *constants, *constants.values())
    repeat = repeats.get(key)
    if repeat is None:
        repeat = repeat_of(kernel[grid](*args, **constants), kernel, args, constants)
        if repeat is not None:
            repeats[key] = repeat
        return
    compiled, tail, start, pack_into, function, threads, shared, stream_of, hooks = repeat
    if start is None:
        compiled[(grid[0], 1, 1)](*args, *tail)
        return
    try:
        memory, addresses = _arguments.of_thread
    except AttributeError:
        memory, addresses = _arguments.of_thread = _argument_slots()
    try:
        pack_into(memory, 0, *pointers, *args[count:])
    except struct.error:  # an integer of 64 bits, for which there is another kernel
        kernel[grid](*args, **constants)
        return
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    if getattr(enter, 'calls', enter) or getattr(leave, 'calls', leave) \
            or start(function, grid[0], 1, 1, threads, 1, 1, shared, stream_of(device), addresses, None) != 0:
        # Triton says why something fails; and makes the device's context that of a new thread
        kernel[grid](*args, **constants)


def repeat_of(compiled, kernel, args: Sequence, constants: Dict[str, Any]) -> Optional[Repeat]:
    """Of what a kernel was compiled to; None in Triton's interpreter, and with integers of 64 bits.

    The driver takes the addresses of a kernel's arguments, and reads as many as it has. Behind those of its source
    these may be two pointers to memory for the kernel to work in, of which none is needed.
    """
    if not hasattr(compiled, 'packed_metadata'):
        return None
    count, metadata = sum(isinstance(a, Tensor) for a in args), compiled.metadata
    types = [kind for kind in compiled.src.signature.values() if kind != 'constexpr']
    if [kind[:1] for kind in types] != ['*'] * count + ['i'] * (len(args) - count) or set(types[count:]) - {'i32'}:
        return None
    if torch.version.hip is None and getattr(metadata, 'num_ctas', 1) == 1 \
            and not any(getattr(metadata, name, None) for name in _BEYOND_A_PLAIN_LAUNCH):
        arguments = struct.Struct('=' + 'Q' * count + 'i4x' * (len(args) - count) + '16x')
        return Repeat(
            compiled, (), _driver().cuLaunchKernel, arguments.pack_into, compiled.function, 32 * metadata.num_warps,
            metadata.shared, torch._C._cuda_getCurrentRawStream, _hooks())
    if _has_old_launcher():
        return None
    return Repeat(compiled, tuple(constants[p.name] for p in kernel.params if p.is_constexpr))


_BEYOND_A_PLAIN_LAUNCH = (
    'launch_cooperative_grid', 'launch_pdl', 'global_scratch_size', 'profile_scratch_size', 'instrumentation_mode')
_arguments = threading.local()  # of the launch that a thread is at: a backward runs in another one
_SLOTS = 64


def _argument_slots() -> Tuple[ctypes.Array, ctypes.Array]:
    """Memory for the arguments of a launch, eight bytes each, and the addresses of these."""
    memory = (ctypes.c_uint64 * _SLOTS)()
    first = ctypes.addressof(memory)
    return memory, (ctypes.c_void_p * _SLOTS)(*range(first, first + 8 * _SLOTS, 8))


@functools.lru_cache(maxsize=None)
def _driver() -> ctypes.CDLL:
    library, number = ctypes.CDLL('libcuda.so.1'), ctypes.c_uint
    library.cuLaunchKernel.argtypes = [
        ctypes.c_void_p, *[number] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.cuLaunchKernel.restype = ctypes.c_int
    return library


def _hooks() -> Any:
    import triton

    knobs = getattr(triton, 'knobs', None)  # of Triton 3.4 and later
    return triton.compiler.CompiledKernel if knobs is None else knobs.runtime


@functools.lru_cache(maxsize=None)
def _has_old_launcher() -> bool:
    import triton

    return tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3)


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
