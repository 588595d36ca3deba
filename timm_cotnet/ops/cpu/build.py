"""Compiles the C files beside it when they are first needed, keeps the libraries in the user's cache, and loads them.

There is one library for each dtype, compiler, processor and version of the sources, in `$XDG_CACHE_HOME/timm_cotnet`
or `~/.cache/timm_cotnet`. Where something is missing (a compiler, a safe place to write), `load` gives the reason, and
plain PyTorch does the work. Environment variables:

- `TIMM_COTNET_NATIVE`: 0 turns the kernels off; 1 insists on them, so that their first use fails where there are none.
- `TIMM_COTNET_CFLAGS`: flags for the compiler, behind the project's own; `-march=haswell` makes an AVX2 library.
- `CC`: the compiler and its first arguments, such as `ccache gcc`; else `cc`.
"""
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, Optional, Union

import torch

_logger = logging.getLogger('timm_cotnet')
_FOLDER = Path(__file__).parent
_SOURCES = {torch.bfloat16: ['local_conv.c', 'contexts_folded.c']}
_SOURCES[torch.float32] = [*_SOURCES[torch.bfloat16], 'contexts_training.c', 'batch_norm.c']
_KERNELS = {torch.bfloat16: {'local_conv': 4, 'contexts_folded': 6}}  # pointers before the number of threads
_KERNELS[torch.float32] = {
    **_KERNELS[torch.bfloat16], 'local_conv_backward': 6, 'contexts_forward': 1, 'contexts_mix': 1,
    'contexts_recompute': 1, 'contexts_backward': 1, 'batch_norm_forward': 1, 'batch_norm_backward': 1}
_DEFINES = {torch.float32: [], torch.bfloat16: ['-DBFLOAT16']}
_FLAGS = ['-O3', '-std=gnu11', '-march=native', '-fno-math-errno', '-fno-trapping-math', '-fPIC',
          *(['-mprefer-vector-width=512'] if platform.machine() in ('x86_64', 'AMD64') else [])]

_PROCESS = os.getpid()
_LARGEST_IN_HEAP = (32 << 20) - (64 << 10)  # bytes: glibc's limit (mallopt(3)), less what it adds to each block


def num_threads() -> int:
    """The number of threads for a kernel: PyTorch's, but one in a forked process, as OpenMP's do not survive a fork."""
    return torch.get_num_threads() if os.getpid() == _PROCESS else 1


def call(kernel: str, dtype: torch.dtype, *args) -> None:
    """Runs a kernel of the library for one dtype.

    Args:
        kernel: Name of the function.
        args: Its arguments except the number of threads: pointers, and tensors for their memory, which must be laid out
            as the kernel expects.

    Raises:
        RuntimeError: If there is no library.
        MemoryError: If the kernel found no memory to work in.
    """
    library = load(dtype)
    if isinstance(library, str):
        raise RuntimeError(f'timm_cotnet: no kernel {kernel} for {dtype}: {library}')
    pointers = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]  # args keep the memory
    if getattr(library, kernel)(*pointers, num_threads()) != 0:
        raise MemoryError(f'timm_cotnet: the kernel {kernel} found no memory to work in; use smaller batches or images')


@functools.lru_cache(maxsize=None)
def load(dtype: torch.dtype) -> Union[ctypes.CDLL, str]:
    """The library for one dtype, or the reason why there is none.

    Raises:
        RuntimeError: If there is none though `TIMM_COTNET_NATIVE` is 1.
    """
    wish = os.environ.get('TIMM_COTNET_NATIVE')
    if wish == '0':
        return 'TIMM_COTNET_NATIVE is 0'
    if dtype not in _KERNELS:
        return f'there are no kernels for {dtype}'
    try:
        library = _cached_library(dtype, retry=wish == '1')
        for name, pointers in _KERNELS[dtype].items():
            kernel = getattr(library, name)
            kernel.argtypes, kernel.restype = [*[ctypes.c_void_p] * pointers, ctypes.c_int], ctypes.c_int
        # glibc takes blocks from its heap up to the size of the largest that was freed, and keeps twice as much of it:
        # else what a pass frees may go to the system, and come back page by page. Nothing touches this block
        torch.UntypedStorage(_LARGEST_IN_HEAP, device='cpu')
        return library
    except Exception as error:  # whatever it is, it costs speed only
        reason = f'the kernels for {dtype} cannot be compiled or loaded ({type(error).__name__}: {error})'
        if wish == '1':
            raise RuntimeError(f'timm_cotnet: TIMM_COTNET_NATIVE is 1, but {reason}') from error
        _logger.info('%s; plain PyTorch does their work', reason)
        return reason


def _cached_library(dtype: torch.dtype, retry: bool) -> ctypes.CDLL:
    """The library out of the cache, compiled first where it is not there; a failure is remembered unless `retry`."""
    compiler = shlex.split(os.environ.get('CC') or 'cc')
    programs = [path for path in map(shutil.which, compiler) if path is not None]
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f'there is no C compiler {compiler[0]!r}; install one or set CC')
    flags = [*_FLAGS, *_DEFINES[dtype], *shlex.split(os.environ.get('TIMM_COTNET_CFLAGS', ''))]
    sources = [_FOLDER / name for name in _SOURCES[dtype]]
    runtime = _openmp_runtime()
    key = [
        *(path.read_text() for path in (Path(__file__), *sources, *sorted(_FOLDER.glob('*.h')))),
        *((path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in programs),
        compiler, flags, runtime, _processor()]
    path = _cache_folder() / f'{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.so'
    failure = path.with_suffix('.failed')
    if _is_whole(path):
        return ctypes.CDLL(str(path))
    if failure.exists() and not retry:
        raise OSError(
            f'{failure.read_text()} [compiling failed before: to try again, remove {failure} or set '
            'TIMM_COTNET_NATIVE=1]')
    with tempfile.TemporaryDirectory(dir=path.parent) as building:
        try:
            return _build(Path(building), path, compiler, flags, sources, runtime)
        except (OSError, subprocess.SubprocessError) as error:
            (Path(building) / failure.name).write_text(str(error))
            os.replace(Path(building) / failure.name, failure)
            raise


def _build(
        building: Path, path: Path, compiler: List[str], flags: List[str], sources: List[Path],
        runtime: Optional[str]) -> ctypes.CDLL:
    """Compiles in the folder `building` and moves what is whole to its place, as many processes may do this at once."""
    start = time.perf_counter()
    # linked with the runtime itself: with -fopenmp the compiler's own would come into the process as a second one
    note = ''
    try:
        library = _compile(building, path.name, [*compiler, *flags], sources, '-fopenmp', runtime or '-fopenmp')
    except OSError as error:
        library = _compile(building, path.name, [*compiler, *flags], sources, '-fopenmp-simd')
        note = f' for one thread, as OpenMP is missing ({error})'
    digest = building / f'{path.name}.sha256'
    digest.write_text(_digest(building / path.name))
    os.replace(digest, path.with_name(digest.name))
    os.replace(building / path.name, path)
    path.with_suffix('.failed').unlink(missing_ok=True)
    _logger.info('compiled kernels in %.1f s%s: %s', time.perf_counter() - start, note, path)
    return library


def _compile(
        building: Path, name: str, compiler: List[str], sources: List[Path], openmp: str, *link: str) -> ctypes.CDLL:
    objects = [source.with_suffix('.o').name for source in sources]
    with ThreadPoolExecutor() as pool:
        list(pool.map(
            lambda source, out: _run([*compiler, openmp, '-c', '-x', 'c', str(source), '-o', out], building),
            sources, objects))
    _run([*compiler, '-shared', '-o', name, *objects, *link, '-lm'], building)
    return ctypes.CDLL(str(building / name))


def _run(command: List[str], folder: Path) -> None:
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors='replace', timeout=300)
    except BlockingIOError as error:  # no failure of the compiler, to be remembered or to be tried without OpenMP
        raise RuntimeError(f'{command[0]} cannot be started, as there are too many processes') from error
    if result.returncode != 0:
        raise OSError(f'{command[0]} failed with exit code {result.returncode}: {result.stderr[-500:].strip()}')


def _cache_folder() -> Path:
    """The folder of the libraries, which nobody else can write to."""
    if not hasattr(os, 'geteuid'):
        raise OSError(f'there are no kernels for {platform.system()}')
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_cotnet'
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(
            f'the cache {folder} belongs to user {found.st_uid} with mode {found.st_mode & 0o777:o}, expected user '
            f'{os.geteuid()} and no right to write for others; mend that or set XDG_CACHE_HOME to another folder')
    return folder


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_whole(path: Path) -> bool:
    """Whether the library is what was once compiled."""
    digest = path.with_name(f'{path.name}.sha256')
    return path.exists() and digest.exists() and digest.read_text().strip() == _digest(path)


def _openmp_runtime() -> Optional[str]:
    """Path of the OpenMP runtime that PyTorch has loaded, None where it cannot be told."""
    torch_folder = str(Path(torch.__file__).parent)  # wheels have it in torch/lib or torch.libs
    try:
        loaded = [line.split(maxsplit=5)[-1].strip() for line in Path('/proc/self/maps').read_text().splitlines()]
    except OSError:
        loaded = sorted(map(str, Path(torch_folder, 'lib').iterdir()))
    runtimes = [path for path in loaded if re.search(r'/lib(gomp|iomp5|omp)\b[^/]*\.(so|dylib)[.\d]*$', path)]
    runtimes.sort(key=lambda path: not path.startswith(torch_folder))
    return runtimes[0] if runtimes else None


def _processor() -> str:
    """What `-march=native` depends on: a cache may be shared by different machines."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return '\n'.join(dict.fromkeys(line for line in lines if line.startswith(('model name', 'flags', 'Features'))))
    except OSError:
        return f'{platform.node()} {platform.processor()}'
