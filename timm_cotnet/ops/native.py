"""Kernels in C for channels-last tensors on the CPU, compiled from the `.c` files here when they are first needed.

The library lands in the user's cache (`$XDG_CACHE_HOME/timm_cotnet`), one file for each compiler, processor and version
of the source. Where anything is missing (a compiler, a place to write), plain PyTorch does the work; `why_not_native`
says why. `TIMM_COTNET_NATIVE=0` turns the kernels off.
"""
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Optional, Union

import torch
from torch.autograd import forward_ad

from .memory import empty_like
from .shifted import LocalConvShifted

_DEFINES = {torch.float32: [], torch.bfloat16: ['-DBFLOAT16']}
_FLAGS = ['-O3', '-std=gnu11', '-march=native', '-fno-math-errno', '-fno-trapping-math', '-fopenmp', '-shared', '-fPIC']
_X86_FLAGS = ['-mprefer-vector-width=512']
MAX_KERNEL_SIZE = 7  # MAX_TAPS in native.c
MAX_NUMBERS = 32768  # filters and channels of one pixel, which threads keep on their stacks


class Shape(ctypes.Structure):
    """`Shape` of native.c."""
    _fields_ = [(name, ctypes.c_long) for name in (
        'batch', 'channels', 'groups', 'slices', 'height', 'width', 'kernel_size', 'dilation', 'stride_g', 'stride_t')]


class Parameters(ctypes.Structure):
    """`Parameters` of native.c."""
    _fields_ = [
        ('gamma', ctypes.c_void_p), ('beta', ctypes.c_void_p), ('eps', ctypes.c_double), ('shift', ctypes.c_void_p),
        ('weight1', ctypes.c_void_p), ('bias1', ctypes.c_void_p), ('weight2', ctypes.c_void_p),
        ('bias2', ctypes.c_void_p), ('hidden', ctypes.c_long)]


def why_not_native(x: torch.Tensor) -> Optional[str]:
    """The reason why the kernels cannot run on tensors like x here and now; None if they can."""
    if x.device.type != 'cpu' or x.dtype not in _DEFINES:
        return f'there are no kernels for {x.dtype} on {x.device.type}'
    library = load(x.dtype)
    return library if isinstance(library, str) else None


@functools.lru_cache(maxsize=None)
def load(dtype: torch.dtype, source: str = 'native.c') -> Union[ctypes.CDLL, str]:
    """The library for one dtype, or the reason why there is none."""
    if os.environ.get('TIMM_COTNET_NATIVE') == '0':
        return 'TIMM_COTNET_NATIVE is 0'
    try:
        return ctypes.CDLL(str(_build(Path(__file__).with_name(source), _DEFINES[dtype])))
    except Exception as error:  # whatever it is, it costs speed only
        return f'the kernels cannot be compiled or loaded ({type(error).__name__}: {error})'


def _build(source: Path, defines: list) -> Path:
    """Path of the compiled library, which is compiled first where it is not there yet."""
    compiler = shutil.which(os.environ.get('CC', 'cc'))
    if compiler is None:
        raise FileNotFoundError('no C compiler; install one or set CC')
    flags = [*_FLAGS, *(_X86_FLAGS if platform.machine() in ('x86_64', 'AMD64') else []), *defines]
    made = os.stat(compiler)
    sources = [source, *sorted(source.parent.glob('*.h'))]
    key = [*(path.read_text() for path in sources), flags, compiler, made.st_size, made.st_mtime_ns, _processor()]
    name = f'{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.so'
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_cotnet'
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (folder / name).exists():
        with tempfile.TemporaryDirectory(dir=folder) as building:  # renamed when whole, as many processes may do this
            result = subprocess.run(
                [compiler, *flags, '-o', name, str(source), '-lm'],
                cwd=building, capture_output=True, text=True, timeout=120)
            if result.returncode != 0:
                raise OSError(f'{compiler} failed: {result.stderr[-500:]}')
            os.replace(Path(building) / name, folder / name)
    return folder / name


def _processor() -> str:
    """What `-march=native` depends on: a cache may be shared by different machines."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return '\n'.join(dict.fromkeys(line for line in lines if line.startswith(('model name', 'flags', 'Features'))))
    except OSError:
        return f'{platform.node()} {platform.processor()}'


class LocalConvNative(LocalConvShifted):
    """`apply(x, weight, kernel_size, dilation)` where `why_not_local_conv(x, weight, kernel_size)` is None."""

    @staticmethod
    def forward(x, weight, kernel_size, dilation):
        out = empty_like(x)
        load(x.dtype).local_conv(
            _shape(x, weight, kernel_size, dilation), *_pointers(x, weight, out), ctypes.c_int(torch.get_num_threads()))
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if (
                torch.is_grad_enabled()
                or torch._C._functorch.is_legacy_batchedtensor(grad)
                or x.dtype != torch.float32
                or not all(ctx.needs_input_grad[:2])
                or why_not_local_conv(x, weight, ctx.kernel_size) is not None  # hooks may change the strides
        ):
            return LocalConvShifted.gradients(ctx, grad, x, weight)
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x, grad_weight = empty_like(x), empty_like(weight)
        load(x.dtype).local_conv_backward(
            _shape(x, weight, ctx.kernel_size, ctx.dilation), *_pointers(grad, x, weight, grad_x, grad_weight),
            ctypes.c_int(torch.get_num_threads()))
        return grad_x, grad_weight, None, None


def why_not_local_conv(x: torch.Tensor, weight: torch.Tensor, kernel_size: int) -> Optional[str]:
    """The reason why `LocalConvNative` cannot take these; None if it can."""
    too_large = why_not_sizes(kernel_size, weight.shape[1], x.shape[1])
    if too_large is not None:
        return too_large
    if not x.is_contiguous(memory_format=torch.channels_last) or not weight.permute(0, 3, 4, 1, 2).is_contiguous():
        return 'x or weight is not channels-last'
    if forward_ad._current_level >= 0:
        return 'the kernels have no forward-mode derivative'
    return why_not_native(x)


def why_not_sizes(kernel_size: int, groups: int, channels: int) -> Optional[str]:
    """The reason why the kernels cannot work with such sizes; None if they can."""
    if kernel_size > MAX_KERNEL_SIZE:
        return f'kernel_size is {kernel_size}, more than {MAX_KERNEL_SIZE}'
    numbers = groups * kernel_size ** 2 + channels
    return f'a pixel has {numbers} filters and channels, more than {MAX_NUMBERS}' if numbers > MAX_NUMBERS else None


def _shape(x: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int):
    (B, C, H, W), groups = x.shape, weight.shape[1]
    return ctypes.byref(Shape(B, C, groups, 1, H, W, kernel_size, dilation, kernel_size * kernel_size, 1))


def _pointers(*tensors: torch.Tensor):
    return (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)


def fuse_contexts(
        value: torch.Tensor,
        logits: torch.Tensor,
        static: torch.Tensor,
        parameters: Parameters,
        kernel_size: int,
        dilation: int,
        slices: int,
        tap_by_tap: bool,
) -> torch.Tensor:
    """A folded CoT layer behind its convolutions: group norm, local convolution, shift, SiLU, fusion of the contexts.

    Args:
        value: (B, C, H, W), channels-last like the others, and of their dtype; the result may take its memory.
        logits: Filters before their norm, (B, G * k * k, H, W).
        static: Static context, (B, C, H, W).
        parameters: Pointers to parameters of the same dtype, which the caller keeps alive.
        kernel_size: k, at most `MAX_KERNEL_SIZE`.
        dilation: Distance between the taps of a filter, in pixels.
        slices: Number of slices of the channels, each of which has its own slice of the filters.
        tap_by_tap: Whether the channels of the logits (and of the parameters of their norm) are ordered (k * k, G).
    """
    B, C, H, W = value.shape
    taps = kernel_size ** 2
    groups = logits.shape[1] // taps
    threads = torch.get_num_threads()
    out = value if B >= threads else torch.empty_like(value)  # threads that share an image read each other's rows
    strides = (1, groups) if tap_by_tap else (taps, 1)
    shape = Shape(B, C, groups, slices, H, W, kernel_size, dilation, *strides)
    load(value.dtype).fuse_contexts(
        ctypes.byref(shape), ctypes.byref(parameters),
        *_pointers(value, logits, static, out), ctypes.c_int(threads))
    return out


def max_pool(x: torch.Tensor) -> torch.Tensor:
    """3x3 max-pool with a stride of two, padded by one: (B, C, H, W) -> (B, C, (H + 1) // 2, (W + 1) // 2).

    Args:
        x: Channels-last, of a dtype for which `why_not_native(x)` is None.
    """
    B, C, H, W = x.shape
    out = torch.empty(
        (B, C, (H + 1) // 2, (W + 1) // 2), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    load(x.dtype).max_pool(*_pointers(x, out), *map(ctypes.c_long, (B, H, W, C)), ctypes.c_int(torch.get_num_threads()))
    return out
