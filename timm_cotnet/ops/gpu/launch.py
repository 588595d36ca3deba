"""Launches of Triton kernels: what a function launches is recorded once, and from then on launched without running it.

A launch by Triton takes fifty microseconds of the host, which is more than most kernels take of a GPU, and what
surrounds it in Python as much again. `cuLaunchKernel` of the CUDA driver takes about eight, and less where C code
(`launches.c`) calls it for all that a function launches.

For that a function runs up to twice when it is called for a size that is new: as `Planned`, on tensors without memory,
to have all its kernels compiled at once, and as `Recording`, which launches them; from then on it is a `Repeat`.
"""
import contextlib
import ctypes
import functools
import logging
import os
import shlex
import shutil
import struct
import subprocess
import tempfile
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .walks import VECTOR

_logger = logging.getLogger('timm_cotnet')
_of_thread = threading.local()  # what is recorded there; a backward runs in another thread


def launch(kernel, grid: Tuple[int], *args, **constants) -> None:
    """`kernel[grid](*args, **constants)`, which `repeated` can launch again.

    Args:
        kernel: A function of `triton.jit`, whose integers are all among its `do_not_specialize`.
        grid: Number of programs.
        *args: Tensors, then integers.
        **constants: Its `constexpr` arguments, and options.
    """
    recording = getattr(_of_thread, 'recording', None)
    if recording is None:
        kernel[grid](*args, **constants)
    else:
        recording.launch(kernel, grid, args, constants)


def made(tensor: Tensor) -> Tensor:
    """A new tensor, of which `repeated` has to make another one each time."""
    recording = getattr(_of_thread, 'recording', None)
    if recording is not None:
        recording.made.append(tensor)
    return tensor


def repeated(*sized: int, ahead: Optional[Callable[..., None]] = None) -> Callable[[Callable], Callable]:
    """Decorator of a function that does nothing but make tensors and launch kernels, so that it runs once.

    At a second call of the same kind memory is taken for all that it makes, and the kernels are launched. Kinds differ
    in the device, the dtypes of tensors, the shapes of some, and the numbers.

    The function takes dense tensors (or None) by position and numbers by keyword, calls `made` for each tensor that it
    makes, and returns some of these or of what it was given. Views of either may be launched on, but not returned.
    Without CUDA, in Triton's interpreter and where something watches launches, it runs each time.

    Its kernels are compiled all at the same time, each of which takes some tenths of a second. `compile_ahead` of what
    comes out compiles what a call would launch, and does not wait for it.

    Args:
        *sized: Positions of the tensors whose shapes tell those of all; the first tensor if none is given.
        ahead: Called with the results and all arguments of the first call of a kind, to `compile_ahead` what follows.
    """
    sized = sized or (0,)

    def decorate(function: Callable) -> Callable:
        known: Dict[tuple, Optional[Repeat]] = {}  # None: it runs each time
        unusual: Dict[tuple, int] = Counter()

        @functools.wraps(function)
        def run(*tensors: Optional[Tensor], **numbers):
            if getattr(_of_thread, 'recording', None) is not None:  # as a part of another function
                return function(*tensors, **numbers)
            key = (
                tensors[0].get_device(), *[tensors[i].shape for i in sized],
                *[None if t is None else t.dtype for t in tensors], *numbers, *numbers.values())
            try:
                repeat = known[key]
            except KeyError:
                if len(known) < _MANY and _compiles_in_threads(tensors[0]):  # else most are compiled by now
                    wait(_plan(function, tensors, numbers))
                recording, results = _record(function, tensors, numbers)
                if len(known) + len(unusual) >= _MOST:
                    known.clear()
                    unusual.clear()
                if recording.is_usual:
                    known[key] = Repeat(recording, results) if recording.is_plain and recording.launches else None
                else:
                    unusual[key] += 1
                    if unusual[key] == _OFTEN:
                        known[key] = None
                if ahead is not None:
                    ahead(results, *tensors, **numbers)
                return results
            results = None if repeat is None else repeat(tensors)
            return function(*tensors, **numbers) if results is None else results[0]

        def compile_ahead(*tensors: Optional[Tensor], **numbers) -> None:
            if _compiles_in_threads(tensors[0]):
                with contextlib.suppress(RuntimeError):  # no more threads: it only takes longer then
                    _plan(function, tensors, numbers)

        run.compile_ahead = compile_ahead
        return run
    return decorate


_MANY, _MOST = 16, 1024  # kinds of a function
_OFTEN = 4


def _record(function: Callable, tensors: tuple, numbers: Dict[str, Any]) -> Tuple['Recording', Any]:
    recording = Recording(tensors)
    try:
        _of_thread.recording = recording
        return recording, function(*tensors, **numbers)
    finally:
        _of_thread.recording = None


def _compiles_in_threads(tensor: Tensor) -> bool:
    if not tensor.is_cuda:
        return False
    import triton

    return hasattr(triton, 'AsyncCompileMode')  # which does so, too


def _plan(function: Callable, tensors: tuple, numbers: Dict[str, Any]) -> List[Future]:
    """Begin to compile all kernels that a function would launch, in threads; what has begun already goes on."""
    before, planned = getattr(_of_thread, 'recording', None), Planned()
    try:
        _of_thread.recording = planned
        function(*[None if t is None else torch.empty_like(t, device='meta') for t in tensors], **numbers)
    finally:
        _of_thread.recording = before
    return planned.compile(tensors[0].device)


class Planned:
    """What a function would launch."""

    def __init__(self):
        self.made, self._calls = [], {}

    def launch(self, kernel: Any, grid: Tuple[int], args: Sequence, constants: Dict[str, Any]) -> None:
        key = (kernel, *[a.dtype for a in args if isinstance(a, Tensor)], *constants.items())
        self._calls[key] = grid, args, constants

    def compile(self, device: torch.device) -> List[Future]:
        with _lock:
            missing = [key for key in self._calls if (device, *key) not in _compiled]
            if missing:
                pool = ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1, 16))
                for key in missing:
                    _compiled[(device, *key)] = pool.submit(_compile, device, key[0], *self._calls[key])
                pool.shutdown(wait=False)
            return [_compiled[(device, *key)] for key in self._calls]


def _compile(device: torch.device, kernel: Any, grid: Tuple[int], args: Sequence, constants: Dict[str, Any]) -> None:
    """What fails here fails again when it is launched."""
    with torch.cuda.device(device):
        kernel.warmup(*args, grid=grid, **constants)


_lock, _compiled = threading.Lock(), {}  # futures, by device and what is compiled


class Entry(NamedTuple):
    """A compiled kernel as the driver launches it."""
    compiled: Any  # has the function, which goes with it
    function: int
    threads: int
    shared: int


class Launch(NamedTuple):
    """A launch of a compiled kernel."""
    entry: Entry
    grid: int
    arguments: List[Union[int, Tuple[Tensor, int]]]  # a tensor in whose memory another one begins, and after which byte


class Recording:
    """What a function launches and makes.

    Attributes:
        is_usual: Whether other calls of the same kind are like this one.
        is_plain: Whether all can be launched without Triton.
    """

    def __init__(self, tensors: Sequence[Optional[Tensor]]):
        self.given, self.made, self.launches = [t for t in tensors if t is not None], [], []
        # what is given twice would be taken for one tensor
        self.is_usual, self.is_plain = len({id(t) for t in self.given}) == len(self.given), True
        self.tensors = tensors

    def launch(self, kernel: Any, grid: Tuple[int], args: Sequence, constants: Dict[str, Any]) -> None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        numbers, pointers = args[len(tensors):], [t.data_ptr() for t in tensors]
        if reduce(or_, pointers) % VECTOR:
            self.is_usual = False  # these need kernels of their own
        key = (id(kernel), tensors[0].get_device(), *[t.dtype for t in tensors], *constants.items())
        _, entry = _entries.get(key, (None, None))  # images of another size have the same
        if not self.is_usual or entry is None or _is_watched() or any(not -2 ** 31 <= n < 2 ** 31 for n in numbers) \
                or _start(entry, grid[0], [*pointers, *numbers], tensors[0].get_device()) != 0:
            entry = entry_of(kernel[grid](*args, **constants), args, len(tensors))
            if entry is not None and self.is_usual:
                _entries[key] = kernel, entry  # an id is one only as long as what it is of
        places = [self._place(t) for t in tensors]
        if entry is None or None in places:
            self.is_plain = False
        else:
            self.launches.append(Launch(entry, grid[0], [*places, *numbers]))

    def _place(self, tensor: Tensor) -> Optional[Tuple[Tensor, int]]:
        """The tensor that this is or in which it lies; None if that cannot be told."""
        known = [*self.given, *self.made]
        for other in known:
            if tensor is other:
                return other, 0
        offsets = [(other, tensor.data_ptr() - other.data_ptr()) for other in known]
        found = [(other, offset) for other, offset in offsets if 0 <= offset < _span(other)]
        return found[0] if len(found) == 1 else None


def _span(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last one."""
    return tensor.element_size() * (1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride())))


def entry_of(compiled: Any, args: Sequence, count: int) -> Optional[Entry]:
    """That of a kernel that needs nothing more to be launched with as many tensors.

    None on other GPUs than NVIDIA's, in Triton's interpreter, without a C compiler, and with integers of 64 bits.

    Behind the arguments of its source a kernel may have two pointers to memory to work in, of which none is needed.
    """
    if not hasattr(compiled, 'packed_metadata') or torch.version.hip is not None or _launcher() is None:
        return None
    metadata = compiled.metadata
    types = [kind for kind in compiled.src.signature.values() if kind != 'constexpr']
    if [kind[:1] for kind in types] != ['*'] * count + ['i'] * (len(args) - count) or set(types[count:]) - {'i32'} \
            or len(args) + 2 > _MOST_ARGUMENTS or getattr(metadata, 'num_ctas', 1) != 1 \
            or any(getattr(metadata, name, None) for name in _BEYOND_A_PLAIN_LAUNCH):
        return None
    return Entry(compiled, compiled.function, 32 * metadata.num_warps, metadata.shared)


class Launcher(NamedTuple):
    """What launches kernels."""
    launch_kernels: Callable  # of `launches.c`
    driver: int  # address of the driver's function


def _start(entry: Entry, grid: int, arguments: Sequence[int], device: int) -> int:
    """A launch by the driver, which gives its error code."""
    launcher = _launcher()
    return launcher.launch_kernels(
        launcher.driver, _packed([Launch(entry, grid, arguments)], {}), None,
        torch._C._cuda_getCurrentRawStream(device), 1)


def _packed(launches: Sequence[Launch], begins: Dict[int, Tuple[int, int]]) -> ctypes.Array:
    """Launches as `launches.c` reads them, for tensors that begin behind some byte of a base, by their ids."""
    numbers = []
    for entry, grid, arguments in launches:
        numbers += entry.function, grid, entry.threads, entry.shared, len(arguments)
        for argument in arguments:
            if isinstance(argument, int):
                numbers += -1, argument
            else:
                tensor, offset = argument
                base, begin = begins[id(tensor)]
                numbers += base, begin + offset
    return (ctypes.c_int64 * len(numbers))(*numbers)


_entries: Dict[tuple, Tuple[Any, Entry]] = {}
_ALIGN = 256  # bytes
_MOST_ARGUMENTS = 64  # of `launches.c`
_BEYOND_A_PLAIN_LAUNCH = (
    'launch_cooperative_grid', 'launch_pdl', 'global_scratch_size', 'profile_scratch_size', 'instrumentation_mode')


class Repeat:
    """Launches what was recorded again: called with other tensors of the same kind.

    All that was made and not returned is one piece of memory.
    """

    def __init__(self, recording: Recording, results: Any):
        self._is_single = not isinstance(results, tuple)
        results = (results,) if self._is_single else results
        kept = [t for t in recording.made if any(t is result for result in results)]
        self._kept = [(tuple(t.shape), t.stride(), t.dtype) for t in kept]
        bases = [*recording.tensors, *kept]
        self._results = [None if t is None else next(i for i, base in enumerate(bases) if base is t) for t in results]
        # where tensors begin: after a byte of one of the bases, behind which comes working memory
        begins, self._working = {id(t): (i, 0) for i, t in enumerate(bases)}, 0
        for tensor in recording.made:
            if id(tensor) not in begins:
                begins[id(tensor)] = len(bases), self._working
                self._working += -(-_span(tensor) // _ALIGN) * _ALIGN
        self._entries = [launch.entry for launch in recording.launches]  # keep the kernels
        self._launches = _packed(recording.launches, begins)
        self._pack = struct.Struct(f'={len(bases) + (self._working > 0)}Q').pack
        self._device, self._launcher = bases[0].get_device(), _launcher()

    def __call__(self, tensors: Sequence[Optional[Tensor]]) -> Optional[Tuple]:
        """What the function would return, in a tuple; None: it has to run."""
        if _is_watched():
            return None
        first = tensors[0]
        bases = [*tensors, *[first.new_empty_strided(size, stride, dtype=dtype) for size, stride, dtype in self._kept]]
        begins = [0 if t is None else t.data_ptr() for t in bases]
        if self._working:
            working = first.new_empty(self._working, dtype=torch.uint8)  # has to outlive the launches, no more
            begins.append(working.data_ptr())
        if reduce(or_, begins) % VECTOR:
            return None
        launch_kernels, driver = self._launcher
        code = launch_kernels(
            driver, self._launches, self._pack(*begins), torch._C._cuda_getCurrentRawStream(self._device),
            len(self._entries))
        if code > 0:  # Triton says why something fails; and makes the device's context that of a new thread
            return None
        if code < 0:
            raise RuntimeError(f'the CUDA driver could not launch a kernel: cuLaunchKernel gave error {-code}')
        results = tuple([None if i is None else bases[i] for i in self._results])
        return results if self._is_single else (results,)


@functools.lru_cache(maxsize=None)
def _launcher() -> Optional[Launcher]:
    """None where the driver or a C compiler is missing."""
    try:
        driver = ctypes.CDLL('libcuda.so.1')
    except OSError:
        return None
    try:
        return Launcher(compiled_launches(), ctypes.cast(driver.cuLaunchKernel, ctypes.c_void_p).value)
    except (OSError, subprocess.SubprocessError) as error:
        _logger.info('launches.c cannot be compiled or loaded (%s); Triton launches each kernel', error)
        return None


def compiled_launches() -> Callable:
    """The function of `launches.c`; it is compiled for each process, which takes less than a tenth of a second.

    Raises:
        OSError: If there is no compiler, or if it fails, or if its file cannot be loaded.
        subprocess.SubprocessError: If it takes too long.
    """
    commands = [shlex.split(command) for command in (os.environ.get('CC', ''), 'cc', 'gcc', 'clang')]
    compiler = next((command for command in commands if command and shutil.which(command[0])), None)
    if compiler is None:
        raise FileNotFoundError('there is no C compiler; install one or set CC')
    with tempfile.TemporaryDirectory() as folder:  # what is loaded outlives its file
        path = Path(folder, 'launches.so')
        result = subprocess.run(
            [*compiler, '-O2', '-std=gnu11', '-shared', '-fPIC', '-o', str(path),
             str(Path(__file__).with_name('launches.c'))],
            capture_output=True, text=True, errors='replace', timeout=60)
        if result.returncode != 0:
            raise OSError(f'{compiler[0]} failed with exit code {result.returncode}: {result.stderr[-500:].strip()}')
        launch_kernels = ctypes.CDLL(str(path)).launch_kernels
    launch_kernels.argtypes, launch_kernels.restype = [*[ctypes.c_void_p] * 4, ctypes.c_int], ctypes.c_int
    return launch_kernels


def _is_watched() -> bool:
    """Whether hooks want to know of each launch, as those of profilers do."""
    hooks = _hooks()
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    return bool(getattr(enter, 'calls', enter) or getattr(leave, 'calls', leave))


@functools.lru_cache(maxsize=None)
def _hooks() -> Any:
    import triton

    knobs = getattr(triton, 'knobs', None)  # of Triton 3.4 and later
    return triton.compiler.CompiledKernel if knobs is None else knobs.runtime
