"""What is launched again is what Triton launched at first: checked with a driver that only listens."""
import contextlib
import ctypes
import functools
import re
import shutil
import threading
from concurrent.futures import wait
from types import SimpleNamespace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from triton_helpers import INTERPRETED, has_old_triton

from timm_cotnet import CotBottleneck, CotLayer, CoxtLayer
from timm_cotnet.ops.compiled import arguments_of
from timm_cotnet.ops.gpu import launch, walks
from timm_cotnet.ops.gpu.launch import made, repeated
from timm_cotnet.ops.gpu.stand_ins import (
    infer_bottleneck, infer_cot_layer, infer_folded_cot_layer, pool, train_bottleneck, train_cot_layer)

triton = pytest.importorskip('triton', reason='Triton is not installed')
compiler = pytest.importorskip('triton.compiler', reason='this Triton has no compiler')
backends = pytest.importorskip('triton.backends.compiler', reason='this Triton has no compiler')
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason='the interpreter compiles nothing'),
    pytest.mark.skipif(not any(map(shutil.which, ('cc', 'gcc', 'clang'))), reason='there is no C compiler')]

FUNCTION, STREAM, SHARED = 0x7f1234567890, 0x7fabcdef0120, 2560


class Launch(NamedTuple):
    """What the driver was given."""
    function: int
    grid: tuple
    block: tuple
    shared: int
    stream: int
    arguments: list  # eight bytes from the address of each
    extra: object


class Driver:
    """In place of `libcuda.so.1`: a C function that tells what it is called with."""
    made = []  # what one test records is launched again in others

    def __init__(self, arguments=6):
        self.launches, self.codes, number, pointer = [], [], ctypes.c_uint, ctypes.c_void_p
        self.arguments = arguments
        self.cuLaunchKernel = ctypes.CFUNCTYPE(
            ctypes.c_int, pointer, *[number] * 7, pointer, ctypes.POINTER(pointer), pointer)(self._launch)
        self.made.append(self)

    def _launch(self, function, *args):
        *sizes, shared, stream, addresses, extra = args
        count = self.arguments if isinstance(self.arguments, int) else self.arguments[function]
        arguments = [ctypes.c_uint64.from_address(addresses[i]).value for i in range(count)]
        self.launches.append(Launch(function, tuple(sizes[:3]), tuple(sizes[3:]), shared, stream, arguments, extra))
        return self.codes.pop(0) if self.codes else 0


class Kernel:
    """What `triton.jit` makes, as far as `launch` sees it; launched by Triton it is counted."""

    def __init__(self, function=FUNCTION, **metadata):
        self.by_triton, self.function = [], function
        self.metadata = SimpleNamespace(**{**dict(num_warps=2, shared=SHARED), **metadata})

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.by_triton.append((grid, args, constants))
            kinds = [
                '*fp32' if isinstance(a, torch.Tensor) else 'i32' if -2 ** 31 <= a < 2 ** 31 else 'i64' for a in args]
            signature = dict(enumerate([*kinds, 'constexpr', 'constexpr']))
            return SimpleNamespace(
                packed_metadata=(), metadata=self.metadata, src=SimpleNamespace(signature=signature),
                function=self.function)
        return run


class Forgetful(dict):
    def __setitem__(self, key, value):
        pass


compiled_launches = functools.lru_cache(launch.compiled_launches)


def launcher_of(driver):
    return launch.Launcher(compiled_launches(), ctypes.cast(driver.cuLaunchKernel, ctypes.c_void_p).value)


@pytest.fixture
def driver(monkeypatch):
    """A function that is recorded is launched by Triton here, whatever was compiled before."""
    found = Driver()
    monkeypatch.setattr(launch, '_launcher', lambda: launcher_of(found))
    monkeypatch.setattr(launch, '_entries', Forgetful())
    monkeypatch.setattr(torch._C, '_cuda_getCurrentRawStream', lambda device: STREAM, raising=False)
    return found


def numbers(size=32, dtype=torch.float32):
    return torch.zeros(size, dtype=dtype)


def function_of(kernel, returned=lambda x, y, out, work: out):
    """One that launches a kernel twice: on what is given and made, and on a part of the latter."""
    @repeated()
    def function(x, y, *, number=7, grid=40, **constants):
        out, work = made(torch.empty_like(x)), made(x.new_empty(64))
        launch.launch(kernel, (grid,), x, work, number, -1, **constants)
        launch.launch(kernel, (grid + 1,), work[8:], out if y is None else y, number, 3, **constants)
        return returned(x, y, out, work)
    return function


# What the driver is given


def test_launches(driver):
    kernel = Kernel()
    function, x, y = function_of(kernel, lambda *all: all[2:]), numbers(), numbers()
    first = function(x, y, C=64, RELU=True)
    assert [(grid, constants) for grid, _, constants in kernel.by_triton] == [
        ((40,), dict(C=64, RELU=True)), ((41,), dict(C=64, RELU=True))] and not driver.launches
    x, y = numbers(), numbers()
    out, work = function(x, y, C=64, RELU=True)
    assert len(kernel.by_triton) == 2
    for i, (found, pointers, last) in enumerate(zip(
            driver.launches, ((x, work), (work[8:], y)), (2 ** 64 - 1, 3), strict=True)):
        assert found.arguments == [*(t.data_ptr() for t in pointers), 7, last, 0, 0]
        assert found._replace(arguments=None) == (FUNCTION, (40 + i, 1, 1), (64, 1, 1), SHARED, STREAM, None, None)
    for made_first, made_now in zip(first, (out, work)):
        assert made_first.data_ptr() != made_now.data_ptr() and made_first.shape == made_now.shape


@pytest.mark.parametrize('returned', [
    lambda x, y, out, work: out, lambda x, y, out, work: (out,), lambda x, y, out, work: (y, work, None, x, out),
    lambda x, y, out, work: None, lambda x, y, out, work: (x, x)])
def test_results(driver, returned):
    x, y, function = numbers(), numbers((2, 16), torch.bfloat16), function_of(Kernel(), returned)
    first, then = function(x, y), function(x, y)
    assert type(first) is type(then) and driver.launches
    if not isinstance(first, tuple):
        first, then = (first,), (then,)
    for one, other in zip(first, then, strict=True):
        assert (one is other) == (one is None or one is x or one is y)
        if one is not None:
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_memory_that_is_not_returned_is_one_piece(driver):
    kernel, sizes = Kernel(), (3, 64, 65, 1)

    @repeated()
    def function(x):
        parts = [made(x.new_empty(size)) for size in sizes]
        for part in parts:
            launch.launch(kernel, (1,), x, part, 1, 1)

    for _ in range(2):
        function(numbers())
    begins = [found.arguments[1] for found in driver.launches]
    assert [b - begins[0] for b in begins] == [0, 256, 512, 1024]


def test_layouts_are_kept(driver):
    kernel = Kernel()

    @repeated()
    def function(x):
        out = made(torch.empty_like(x))
        launch.launch(kernel, (1,), x, out, 1, 1)
        return out

    x = torch.zeros(2, 8, 3, 4).contiguous(memory_format=torch.channels_last)
    assert function(x).stride() == function(x).stride() == x.stride() and len(driver.launches) == 1


def test_each_thread_has_arguments_of_its_own(driver, monkeypatch):
    """The driver reads them while another thread may launch."""
    class Slow(Driver):
        def _launch(self, *args):
            if not self.threads:
                self.threads.append(threading.Thread(target=function, args=(y, None)))
                self.threads[0].start()
                self.threads[0].join()
            return super()._launch(*args)

    kernel, x, y, slow = Kernel(), numbers(), numbers(), Slow()
    slow.threads = []
    monkeypatch.setattr(launch, '_launcher', lambda: launcher_of(slow))
    function = function_of(kernel)
    for _ in range(2):
        function(x, None)
    assert [found.arguments[0] == t.data_ptr() for found, t in zip(slow.launches[::2], (y, x))] == [True, True]


# What is recorded anew


@pytest.mark.parametrize('change', ['dtype', 'shape', 'number', 'constant', 'name', 'missing'])
def test_another_kind(driver, change):
    kernel = Kernel()
    function = function_of(kernel)
    function(numbers(), numbers(), C=64)
    x = numbers(64) if change == 'shape' else numbers()
    y = None if change == 'missing' else numbers(32, torch.float64 if change == 'dtype' else torch.float32)
    constants = {
        'constant': dict(C=32), 'name': dict(B=64), 'number': dict(C=64, number=8)}.get(change, dict(C=64))
    function(x, y, **constants)
    assert len(kernel.by_triton) == 4 and not driver.launches
    function(x, y, **constants)
    function(numbers(), numbers(), C=64)
    assert len(kernel.by_triton) == 4 and len(driver.launches) == 4


def test_shapes_that_count(driver):
    kernel = Kernel()

    @repeated(1)
    def function(x, y):
        launch.launch(kernel, (y.numel(),), x, y, 1, 1)

    for sizes in ((4, 8), (16, 8), (4, 12), (4, 12)):
        function(*map(numbers, sizes))
    assert [grid for grid, *_ in kernel.by_triton] == [(8,), (12,)]
    assert [found.grid[0] for found in driver.launches] == [8, 12]


def test_images_of_other_sizes_have_the_same_kernels(driver, monkeypatch):
    """So a new kind is launched without Triton: not where its arguments need another kernel, or something watches."""
    monkeypatch.setattr(launch, '_entries', {})
    kernel = Kernel()
    function = function_of(kernel, lambda x, y, out, work: (out, work))
    function(numbers(), numbers())
    assert len(kernel.by_triton) == 1 and len(driver.launches) == 1
    x, y = numbers(48), numbers(48)
    _, work = function(x, y)
    assert len(kernel.by_triton) == 1 and [found.arguments[:2] for found in driver.launches[1:]] == [
        [x.data_ptr(), work.data_ptr()], [work[8:].data_ptr(), y.data_ptr()]]
    assert driver.launches[1]._replace(arguments=None) == (FUNCTION, (40, 1, 1), (64, 1, 1), SHARED, STREAM, None, None)
    assert driver.launches[1].arguments[2:] == [7, 2 ** 64 - 1, 0, 0]
    function(x, y)
    assert len(driver.launches) == 5
    function(numbers(80)[1:65], numbers(64))
    function(numbers(), numbers(), number=2 ** 31)
    function(numbers(), numbers(), C=2)
    assert len(kernel.by_triton) == 1 + 2 + 2 + 1
    driver.codes = [700]
    function(numbers(96), numbers(96))
    assert len(kernel.by_triton) == 7  # Triton says what is wrong
    monkeypatch.setattr(launch, '_is_watched', lambda: True)
    function(numbers(112), numbers(112))
    assert len(kernel.by_triton) == 9


# What is left to Triton


@pytest.mark.parametrize('large', [2 ** 31, -2 ** 31 - 1, 2 ** 40])
def test_integers_of_64_bits(driver, large):
    kernel = Kernel()
    function = function_of(kernel)
    for number in (large, large, 2 ** 31 - 1, 2 ** 31 - 1, -2 ** 31, -2 ** 31):
        function(numbers(), numbers(), number=number)
    assert [args[2] for _, args, _ in kernel.by_triton[::2]] == [large, large, 2 ** 31 - 1, -2 ** 31]
    assert [found.arguments[2] % 2 ** 32 for found in driver.launches[::2]] == [2 ** 31 - 1, 2 ** 31]


def test_memory_that_is_not_aligned(driver):
    kernel = Kernel()
    function = function_of(kernel)
    for first in (1, 0, 0, 2, 4, 1):
        function(numbers(), numbers(40)[first:])
    assert len(kernel.by_triton) // 2 == 4 and len(driver.launches) // 2 == 2


def test_memory_that_is_never_aligned(driver, monkeypatch):
    """As parts of one flat parameter are: it is not tried for ever to record that."""
    begun, kernel = [], Kernel()
    function, record = function_of(kernel), launch._record
    monkeypatch.setattr(launch, '_record', lambda *args: begun.append(args) or record(*args))
    for _ in range(9):
        function(numbers(), numbers(40)[1:])
    assert len(begun) == launch._OFTEN < 9 and len(kernel.by_triton) == 18 and not driver.launches


def test_tensors_that_are_one(driver):
    """Which of two a kernel was given cannot be told then."""
    kernel, x = Kernel(), numbers()
    function = function_of(kernel)
    for y in (x, numbers(), numbers()):
        function(x, y)
    assert len(kernel.by_triton) == 4 and driver.launches[1].arguments[1] != x.data_ptr()


def test_tensors_that_are_unknown(driver):
    kernel, other = Kernel(), numbers()

    @repeated()
    def function(x):
        launch.launch(kernel, (1,), x, other, 1, 1)

    for _ in range(3):
        function(numbers())
    assert len(kernel.by_triton) == 3 and not driver.launches


def test_functions_within_others(driver):
    """They are parts of these."""
    kernel = Kernel()
    inner = function_of(kernel)

    @repeated()
    def outer(x, y):
        return inner(made(torch.empty_like(x)), y)

    for _ in range(3):
        outer(numbers(), numbers())
    assert len(kernel.by_triton) == 2 and len(driver.launches) == 4
    inner(numbers(), numbers())
    assert len(kernel.by_triton) == 4


@pytest.mark.parametrize('code', [1, 201, 700])
def test_failures(driver, code):
    """Triton says what is wrong at a first launch, and makes the device's context that of a new thread."""
    kernel = Kernel()
    function = function_of(kernel)
    function(numbers(), numbers())
    driver.codes = [code]
    function(numbers(), numbers())
    assert len(kernel.by_triton) == 4 and len(driver.launches) == 1
    driver.codes = [0, code]
    with pytest.raises(RuntimeError, match=f'error {code}'):
        function(numbers(), numbers())


def test_an_error_leaves_nothing_behind(driver):
    kernel = Kernel()

    @repeated()
    def function(x, *, fails):
        launch.launch(kernel, (1,), x, x, 1, 1)
        if fails:
            raise ValueError

    with pytest.raises(ValueError):
        function(numbers(), fails=True)
    for _ in range(2):
        function(numbers(), fails=False)
    assert len(driver.launches) == 1


@pytest.mark.parametrize('hook', ['launch_enter_hook', 'launch_exit_hook'])
def test_hooks_see_each_launch(driver, hook, monkeypatch):
    knobs = getattr(triton, 'knobs', None)
    holder, kernel = compiler.CompiledKernel if knobs is None else knobs.runtime, Kernel()
    function = function_of(kernel)
    function(numbers(), numbers())
    hooks = getattr(holder, hook)
    if hasattr(hooks, 'add'):
        monkeypatch.setattr(hooks, 'calls', [print])
    else:
        monkeypatch.setattr(holder, hook, print)
    function(numbers(), numbers())
    assert len(kernel.by_triton) == 4 and not driver.launches
    monkeypatch.undo()


@pytest.mark.parametrize('metadata', [
    dict(num_ctas=2), dict(launch_cooperative_grid=True), dict(launch_pdl=True), dict(global_scratch_size=128),
    dict(profile_scratch_size=8), dict(hip=True), dict(no_driver=True)], ids=lambda metadata: next(iter(metadata)))
def test_kernels_that_need_more(driver, metadata, monkeypatch):
    """Or another device than NVIDIA's, or no driver where it is looked for."""
    if metadata.pop('hip', False):
        monkeypatch.setattr(torch.version, 'hip', '6.0')
    if metadata.pop('no_driver', False):
        monkeypatch.setattr(launch, '_launcher', lambda: None)
    kernel = Kernel(**metadata)
    function = function_of(kernel)
    for _ in range(2):
        function(numbers(), numbers())
    assert len(kernel.by_triton) == 4 and not driver.launches


def test_few_kinds_are_remembered(driver, monkeypatch):
    monkeypatch.setattr(launch, '_MOST', 3)
    kernel = Kernel()
    function = function_of(kernel)
    for number in (1, 2, 3, 3, 4, 4, 1):
        function(numbers(), numbers(), number=number)
    assert len(kernel.by_triton) // 2 == 5 and len(driver.launches) // 2 == 2


# Compiling


def test_kernels_are_compiled_at_the_same_time(driver, monkeypatch):
    """Each kind once, before one is launched; what fails then fails again when it is launched."""
    monkeypatch.setattr(launch, '_compiles_in_threads', lambda tensor: True)
    monkeypatch.setattr(torch.cuda, 'device', lambda device: contextlib.nullcontext())
    monkeypatch.setattr('os.cpu_count', lambda: 3)
    warm, both = [], threading.Barrier(3)

    class Warm(Kernel):
        def warmup(self, *args, grid, **constants):
            assert not self.by_triton and args[0].shape == (32,)
            warm.append((threading.current_thread(), constants))
            both.wait(20)
            raise ValueError

    first, second = Warm(), Warm()

    @repeated()
    def function(x):
        out = made(torch.empty_like(x))
        for kernel, size in ((first, 8), (first, 8), (first, 16), (second, 8)):
            launch.launch(kernel, (1,), x, out, 1, 1, C=size)
        return out

    for _ in range(2):
        function(numbers())
    assert sorted(constants['C'] for _, constants in warm) == [8, 8, 16]
    assert len({thread for thread, _ in warm}) == 3 and threading.current_thread() not in dict(warm)
    assert [len(kernel.by_triton) for kernel in (first, second)] == [3, 1] and len(driver.launches) == 4


def test_compiling_ahead(driver, monkeypatch):
    """Without waiting; a call that follows waits for what has begun instead of beginning again."""
    monkeypatch.setattr(launch, '_compiles_in_threads', lambda tensor: True)
    monkeypatch.setattr(torch.cuda, 'device', lambda device: contextlib.nullcontext())
    may_end, warm = threading.Event(), []

    class Warm(Kernel):
        def warmup(self, *args, grid, **constants):
            assert args[0].is_meta and may_end.wait(20)
            warm.append(len(self.by_triton))

    kernel = Warm()
    second = function_of(kernel)
    first = repeated(ahead=lambda results, x, y: second.compile_ahead(x, results))(
        lambda x, y: launch.launch(Kernel(), (1,), x, y, 1, 1) or y)
    monkeypatch.setattr(Kernel, 'warmup', lambda self, *args, **kwargs: None, raising=False)
    for _ in range(2):
        first(numbers(), numbers())
    assert not warm and not kernel.by_triton
    threading.Timer(0.2, may_end.set).start()
    second(numbers(), numbers())
    assert warm == [0] and len(kernel.by_triton) == 2  # one kind, of which nothing was launched before


def test_where_kernels_are_compiled_in_threads():
    assert not launch._compiles_in_threads(numbers())
    on_a_gpu = SimpleNamespace(is_cuda=True)
    assert launch._compiles_in_threads(on_a_gpu) == hasattr(triton, 'AsyncCompileMode')


# Layers and blocks


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def block(**kwargs):
    return CotBottleneck(32, 8, **kwargs)


def strided_block():
    return block(stride=2, downsample=torch.nn.Sequential(
        torch.nn.Conv2d(32, 32, 1, 2, bias=False), torch.nn.BatchNorm2d(32)))


def operator(layer, x):
    """What a graph calls in place of the layer."""
    return train_cot_layer.operator(*arguments_of(layer, x)[0])[0]


MODULES = {
    'CotLayer': (train_cot_layer, lambda: CotLayer(24)),
    'operator': (operator, lambda: CotLayer(24)),
    'CoxtLayer': (train_cot_layer, lambda: CoxtLayer(32)),
    'block': (train_bottleneck, block),
    'strided block': (train_bottleneck, strided_block),
    'pool': (pool, lambda: torch.nn.AvgPool2d(3, 2, 1)),
    'layer in evaluation': (infer_cot_layer, lambda: CotLayer(24).eval()),
    'folded layer': (infer_folded_cot_layer, lambda: CoxtLayer(32).eval().fuse().bfloat16()),
    'block in evaluation': (infer_bottleneck, lambda: block().eval()),
    'contiguous block in evaluation': (infer_bottleneck, lambda: block().eval()),
}


@pytest.fixture
def stubs(monkeypatch):
    """In place of all kernels, by name."""
    kernels = {}

    class Module:
        def __init__(self, name):
            self.name = name

        def __getattr__(self, name):
            if name not in kernels:
                kernels[name] = Kernel(FUNCTION + len(kernels))
            return kernels[name]

    for file in ('contexts', 'folding', 'images', 'matrices', 'norm', 'pool'):
        monkeypatch.setattr(f'timm_cotnet.ops.gpu.{file}.kernels_of', Module)
    return kernels


@pytest.mark.parametrize('name', ['CotLayer', 'CoxtLayer', 'block', 'strided block'])
def test_what_follows_is_compiled_ahead(name, driver, stubs, monkeypatch):
    """A forward leaves nothing to compile to its backward but a kernel or two."""
    warm = []
    monkeypatch.setattr(launch, '_compiles_in_threads', lambda tensor: True)
    monkeypatch.setattr(launch, '_compiled', {})
    monkeypatch.setattr(torch.cuda, 'device', lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        Kernel, 'warmup', lambda self, *args, grid, **constants: warm.append(self.function), raising=False)
    run, create = MODULES[name]
    module = create()
    with torch.autocast('cpu', torch.bfloat16):
        out = run(module, channels_last(2, getattr(module, 'dim', 32), 4, 3).requires_grad_())
        wait(launch._compiled.values())
        forward = len(warm)
        out.sum().backward()
    names = {kernel.function: name for name, kernel in stubs.items()}
    late = {names[function] for function in warm[forward:]}
    assert {'norm_backward_kernel'} <= {names[function] for function in warm[:forward]}
    assert late <= {'from_matrices_kernel', 'avg_pool_kernel'} and len(warm) == len(launch._compiled)


@pytest.mark.parametrize('name', ['CotLayer', 'block', 'strided block', 'pool'])
def test_images_of_as_many_pixels(name, driver, stubs):
    """Whose rows do not tell height from width, nor images from pixels."""
    run, create = MODULES[name]
    module = create()
    for B, H, W in ((2, 4, 6), (2, 4, 6), (2, 6, 4), (4, 2, 6), (2, 4, 6)):
        x = channels_last(B, getattr(module, 'dim', 32), H, W).requires_grad_()
        with torch.autocast('cpu', torch.bfloat16):
            out = run(module, x)
            out.sum().backward()
        assert x.grad.shape == x.shape and out.shape[0] == B


@pytest.mark.parametrize('name', MODULES)
def test_modules(name, driver, stubs, monkeypatch):
    """Each of their functions is launched again as Triton launched it: the same kernels, the same memory."""
    run, create = MODULES[name]
    module = create()
    x = channels_last(2, getattr(module, 'dim', 32), 4, 3)
    x = x.contiguous() if name.startswith('contiguous') else x
    calls, driver.arguments = [], {}
    monkeypatch.setattr('timm_cotnet.ops.gpu.stand_ins._is_fused', lambda dtype: False)
    monkeypatch.setattr(torch, 'cudnn_convolution_relu', lambda x, w, b, *args: torch.conv2d(x, w, b, *args).relu_())
    monkeypatch.setattr(
        torch, 'cudnn_convolution_add_relu', lambda x, w, z, _, b, *args: torch.conv2d(x, w, b, *args).add_(z).relu_())
    add, call = launch.Recording.launch, launch.Repeat.__call__

    def adding(self, kernel, grid, args, constants):
        calls.append((id(self), kernel.function, grid[0], *(
            a if isinstance(a, int) else a.data_ptr() for a in args)))
        held.append((self, args))
        driver.arguments[kernel.function] = len(args)
        add(self, kernel, grid, args, constants)

    def calling(self, tensors):
        first = len(driver.launches)
        held.append((self, tensors))
        results = call(self, tensors)
        assert results is not None
        calls.extend((id(held[-1]), found.function, found.grid[0], *found.arguments)
                     for found in driver.launches[first:])
        return results

    monkeypatch.setattr(launch.Recording, 'launch', adding)
    monkeypatch.setattr(launch.Repeat, '__call__', calling)
    patterns = []
    for _ in range(2):
        held = []
        calls.clear()
        with torch.autocast('cpu', torch.bfloat16), torch.set_grad_enabled(module.training):
            out = run(module, x.requires_grad_() if module.training else x)
            if module.training:
                out.sum().backward()
        patterns.append(_pattern(calls))
    assert patterns[0] == patterns[1] and len(driver.launches) == sum(map(len, patterns[1]))


def _pattern(calls):
    """For each function its launches, addresses numbered as they come."""
    functions, found = {}, []
    for function, *launched in calls:
        if function not in functions:
            functions[function] = {}
            found.append([])
        seen = functions[function]
        found[-1].append([seen.setdefault(a, -len(seen)) if a > 2 ** 32 else a for a in launched[1:]])
    return found


# The library, and what the compiler makes


@pytest.mark.parametrize('compiler', ['', 'env -u NOTHING cc', 'there-is-no-such-compiler'])
def test_the_library(compiler, monkeypatch):
    monkeypatch.setenv('CC', compiler)
    launch_kernels, listening = launch.compiled_launches(), Driver(arguments={FUNCTION: 3, FUNCTION + 1: 5})
    launches = (ctypes.c_int64 * 22)(
        FUNCTION, 2 ** 31 - 1, 128, SHARED, 3, -1, -2, 1, 16, 0, 0, FUNCTION + 1, 1, 1024, 0, 3, -1, 2 ** 31 - 1, 0, 8)
    begins = (ctypes.c_int64 * 2)(2 ** 47 - 256, 4096)
    driver = ctypes.cast(listening.cuLaunchKernel, ctypes.c_void_p)
    assert launch_kernels(driver, launches, begins, STREAM, 2) == 0
    assert listening.launches == [
        Launch(FUNCTION, (2 ** 31 - 1, 1, 1), (128, 1, 1), SHARED, STREAM, [2 ** 64 - 2, 4112, 2 ** 47 - 256], None),
        Launch(FUNCTION + 1, (1, 1, 1), (1024, 1, 1), 0, STREAM, [2 ** 31 - 1, 2 ** 47 - 248, 2 ** 47 - 256, 0, 0],
               None)]
    for codes, code, count in (([700], 700, 1), ([0, 700], -700, 2)):
        listening.launches.clear()
        listening.codes = codes
        assert launch_kernels(driver, launches, begins, STREAM, 2) == code
        assert len(listening.launches) == count


def test_the_driver(monkeypatch):
    listening, load = Driver(), ctypes.CDLL
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: listening if name == 'libcuda.so.1' else load(name))
    launcher = launch._launcher.__wrapped__()
    assert launcher.driver == ctypes.cast(listening.cuLaunchKernel, ctypes.c_void_p).value
    monkeypatch.setattr(launch, '_launcher', lambda: launcher)
    monkeypatch.setattr(torch._C, '_cuda_getCurrentRawStream', lambda device: STREAM, raising=False)
    assert launch._start(launch.Entry(None, FUNCTION, 64, SHARED), 7, [2 ** 47, -1], 0) == 0
    assert listening.launches == [
        Launch(FUNCTION, (7, 1, 1), (64, 1, 1), SHARED, STREAM, [2 ** 47, 2 ** 64 - 1, 0, 0, 0, 0], None)]


@pytest.mark.parametrize('missing, reason', [
    ('driver', ''), ('compiler', 'there is no C compiler; install one or set CC'), ('source', 'exit code')])
def test_what_is_missing(missing, reason, monkeypatch, caplog):
    """Triton launches each kernel then, and the log says why where that is no matter of course."""
    caplog.set_level('INFO', 'timm_cotnet')
    library = ctypes.CDLL
    if missing != 'driver':  # where there is none this fails by itself
        monkeypatch.setattr(ctypes, 'CDLL', lambda name: Driver() if name == 'libcuda.so.1' else library(name))
    else:
        monkeypatch.setattr(ctypes, 'CDLL', lambda name: library('no-such-library.so'))
    if missing == 'compiler':
        monkeypatch.setattr(shutil, 'which', lambda program: None)
    if missing == 'source':
        monkeypatch.setattr(launch, '__file__', '/nowhere/launch.py')
    assert launch._launcher.__wrapped__() is None
    assert reason in caplog.text and bool(caplog.text) == bool(reason)


@pytest.mark.parametrize('count', [61, 62, 63])
def test_many_arguments(count, driver):
    """As many as there is room for in C, less two that a kernel may have besides."""
    source = Path(launch.__file__).with_name('launches.c').read_text()
    assert int(re.search(r'MOST_ARGUMENTS = (\d+)', source)[1]) == launch._MOST_ARGUMENTS == 64
    driver.arguments, kernel = count + 2 if count < 63 else 0, Kernel()

    @repeated()
    def function(x):
        launch.launch(kernel, (1,), x, *range(count - 1))

    for _ in range(2):
        function(numbers())
    assert len(kernel.by_triton) == (1 if count < 63 else 2)
    for found in driver.launches:
        assert found.arguments[1:] == [*range(count - 1), 0, 0]
    assert len(driver.launches) == (count < 63)


@pytest.mark.slow
def test_arguments_of_a_compiled_kernel(driver, monkeypatch):
    """Those of the machine code lie as the driver is given them, and Triton says of the kernel what is asked here."""
    kernel = walks.kernels_of('rows').moments_kernel
    constants = dict(ALIGN=16, BLOCK_P=32, BLOCK_C=64, FOLD=1, ACC=triton.language.float32)
    signature = dict(x_ptr='*bf16', moments_ptr='*fp32', P='i32', LENGTH='i32', RUNS='i32', PARTS='i32')
    if has_old_triton():
        source = compiler.ASTSource(kernel, signature, constants)
    else:
        source = compiler.ASTSource(kernel, {**signature, **dict.fromkeys(constants, 'constexpr')}, constants)
    compiled = compiler.compile(source, target=backends.GPUTarget('cuda', 90, 32))
    entry = compiled.asm['ptx'][compiled.asm['ptx'].index('.entry'):]
    parameters = re.findall(r'\.param \.([bu]\d\d)', entry[:entry.index('{')])
    assert [kind[1:] for kind in parameters[:6]] == ['64', '64', '32', '32', '32', '32']
    assert len(parameters) <= 8 and set(kind[1:] for kind in parameters[6:]) <= {'64'}

    compiled.function, driver.arguments = FUNCTION, 8
    monkeypatch.setattr(type(kernel), '__getitem__', lambda *_: lambda *_, **__: compiled)

    @repeated(0, 1)
    def function(x, moments):
        launch.launch(kernel, (98,), x, moments, 3136, 64, 49, 4, **constants)

    x, moments = numbers(64, torch.bfloat16), numbers()
    for _ in range(2):
        function(x, moments)
    found, = driver.launches
    assert found.arguments == [x.data_ptr(), moments.data_ptr(), 3136, 64, 49, 4, 0, 0]
    assert found.block == (32 * compiled.metadata.num_warps, 1, 1) and found.shared == compiled.metadata.shared
