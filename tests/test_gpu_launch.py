"""A repeated launch of a Triton kernel hands the driver what Triton would: checked with a driver that only listens."""
import ctypes
import re
import threading
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from triton_helpers import INTERPRETED

from timm_cotnet.ops.gpu import launch

triton = pytest.importorskip('triton', reason='Triton is not installed')
compiler = pytest.importorskip('triton.compiler', reason='this Triton has no compiler')
backends = pytest.importorskip('triton.backends.compiler', reason='this Triton has no compiler')
pytestmark = pytest.mark.skipif(INTERPRETED, reason='the interpreter compiles nothing')

FUNCTION, STREAM, SHARED = 0x7f1234567890, 0x7fabcdef0120, 2560
ADDRESS = 0x7f45_0000_0000  # of tensors; beyond 32 bits


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

    def __init__(self):
        self.launches, self.code, number, pointer = [], 0, ctypes.c_uint, ctypes.c_void_p
        self.cuLaunchKernel = ctypes.CFUNCTYPE(
            ctypes.c_int, pointer, *[number] * 7, pointer, ctypes.POINTER(pointer), pointer)(self._launch)

    def _launch(self, function, *args):
        *sizes, shared, stream, addresses, extra = args
        arguments = [ctypes.c_uint64.from_address(addresses[i]).value for i in range(8)]
        self.launches.append(Launch(function, tuple(sizes[:3]), tuple(sizes[3:]), shared, stream, arguments, extra))
        return self.code


class Buffer(torch.Tensor):
    """A tensor that says where it lies."""

    def __new__(cls, address, dtype=torch.float32):
        tensor = torch.empty(4, dtype=dtype).as_subclass(cls)
        tensor.address = address
        return tensor

    def data_ptr(self):
        return self.address

    def get_device(self):
        return 1


class Kernel:
    """What `triton.jit` makes, as far as `launch` sees it; launched by Triton it is counted."""

    def __init__(self, tensors=3, integers=2, **metadata):
        self.by_triton, self.tensors, self.integers = [], tensors, integers
        self.metadata = SimpleNamespace(**{**dict(num_warps=2, shared=SHARED), **metadata})

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.by_triton.append((grid, args, constants))
            kinds = [
                '*fp32' if isinstance(a, torch.Tensor) else 'i32' if -2 ** 31 <= a < 2 ** 31 else 'i64' for a in args]
            signature = dict(enumerate([*kinds, 'constexpr', 'constexpr']))
            return SimpleNamespace(
                packed_metadata=(), metadata=self.metadata, src=SimpleNamespace(signature=signature),
                function=FUNCTION)
        return run


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(launch, '_driver', lambda: made)
    monkeypatch.setattr(torch._C, '_cuda_getCurrentRawStream', lambda device: STREAM + device, raising=False)
    return made


@pytest.fixture
def tensors():
    return [Buffer(ADDRESS + 16 * i) for i in range(3)]


def test_what_the_driver_is_given(driver, tensors):
    kernel = Kernel()
    for i in range(3):
        launch.launch(kernel, (40 + i,), *tensors, 7 + i, -1, C=64, RELU=True)
    assert [grid for grid, *_ in kernel.by_triton] == [(40,)]
    for i, found in enumerate(driver.launches, 1):
        *arguments, last, scratch, profile = found.arguments[:7]
        assert arguments == [ADDRESS, ADDRESS + 16, ADDRESS + 32, 7 + i] and last == 2 ** 32 - 1
        assert scratch == profile == 0
        assert found._replace(arguments=None) == (
            FUNCTION, (40 + i, 1, 1), (64, 1, 1), SHARED, STREAM + 1, None, None)
    assert len(driver.launches) == 2


def test_each_thread_has_arguments_of_its_own(driver, tensors):
    kernel, others = Kernel(), [Buffer(3 * ADDRESS + 16 * i) for i in range(3)]
    launch.launch(kernel, (1,), *tensors, 1, 2, C=64)
    thread = threading.Thread(target=launch.launch, args=(kernel, (2,), *others, 3, 4), kwargs=dict(C=64))
    launch.launch(kernel, (1,), *tensors, 1, 2, C=64)
    memory = launch._arguments.of_thread[0]
    thread.start()
    thread.join()
    assert [found.arguments[0] for found in driver.launches] == [ADDRESS, 3 * ADDRESS]
    assert memory[0] == ADDRESS and launch._arguments.of_thread[0] is memory


@pytest.mark.parametrize('change', ['dtype', 'constant', 'name', 'option'])
def test_another_variant_is_compiled(driver, tensors, change):
    kernel = Kernel()
    launch.launch(kernel, (1,), *tensors, 1, 2, C=64, RELU=True)
    other = [*tensors[:2], Buffer(ADDRESS, torch.bfloat16)] if change == 'dtype' else tensors
    constants = {
        'constant': dict(C=32, RELU=True), 'name': dict(C=64, SILU=True), 'option': dict(C=64, RELU=True, num_warps=8),
    }.get(change, dict(C=64, RELU=True))
    launch.launch(kernel, (1,), *other, 1, 2, **constants)
    assert len(kernel.by_triton) == 2 and not driver.launches
    launch.launch(kernel, (1,), *other, 1, 2, **constants)
    launch.launch(kernel, (1,), *tensors, 1, 2, C=64, RELU=True)
    assert len(kernel.by_triton) == 2 and len(driver.launches) == 2


@pytest.mark.parametrize('large', [2 ** 31, -2 ** 31 - 1, 2 ** 40])
def test_integers_of_64_bits_are_left_to_triton(driver, tensors, large):
    kernel = Kernel()
    for size in (large, large, 5, 2 ** 31 - 1, large, -2 ** 31):
        launch.launch(kernel, (1,), *tensors, size, 1, C=64)
    assert [args[3] for _, args, _ in kernel.by_triton] == [large, large, 5, large]
    assert [found.arguments[3] for found in driver.launches] == [2 ** 31 - 1, 2 ** 31]


def test_memory_that_is_not_aligned_is_left_to_triton(driver, tensors):
    kernel = Kernel()
    for address in (ADDRESS, ADDRESS + 8, ADDRESS + 16):
        launch.launch(kernel, (1,), *tensors[:2], Buffer(address), 1, 2, C=64)
    assert [args[2].data_ptr() for _, args, _ in kernel.by_triton] == [ADDRESS, ADDRESS + 8]
    assert [found.arguments[2] for found in driver.launches] == [ADDRESS + 16]


@pytest.mark.parametrize('code', [1, 201, 700])
def test_what_fails_is_launched_by_triton(driver, tensors, code):
    kernel, driver.code = Kernel(), code
    for _ in range(2):
        launch.launch(kernel, (1,), *tensors, 1, 2, C=64)
    assert len(kernel.by_triton) == 2 and len(driver.launches) == 1


@pytest.mark.parametrize('hook', ['launch_enter_hook', 'launch_exit_hook'])
def test_hooks_see_each_launch(driver, tensors, hook, monkeypatch):
    knobs = getattr(triton, 'knobs', None)
    holder, kernel = compiler.CompiledKernel if knobs is None else knobs.runtime, Kernel()
    launch.launch(kernel, (1,), *tensors, 1, 2, C=64)
    hooks = getattr(holder, hook)
    if hasattr(hooks, 'add'):
        monkeypatch.setattr(hooks, 'calls', [print])
    else:
        monkeypatch.setattr(holder, hook, print)
    launch.launch(kernel, (1,), *tensors, 1, 2, C=64)
    assert len(kernel.by_triton) == 2 and not driver.launches
    monkeypatch.undo()


def test_another_device_than_nvidias(driver, tensors, monkeypatch):
    """Launched by Triton, but without asking again what fits."""
    launched, kernel = [], Kernel()
    kernel.params = [SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in ('x_ptr', 'RELU', 'C')]
    monkeypatch.setattr(torch.version, 'hip', '6.0')
    monkeypatch.setattr(launch, '_has_old_launcher', lambda: False)

    class Compiled(SimpleNamespace):
        def __getitem__(self, grid):
            return lambda *args: launched.append((grid, args))

    run = Kernel.__getitem__
    monkeypatch.setattr(Kernel, '__getitem__', lambda self, grid: lambda *args, **constants: Compiled(
        **vars(run(self, grid)(*args, **constants))))
    for i in range(2):
        launch.launch(kernel, (5 + i,), *tensors, 1, 2, C=64, RELU=True)
    assert len(kernel.by_triton) == 1 and not driver.launches
    (grid, args), = launched
    assert grid == (6, 1, 1) and all(a is b for a, b in zip(args, tensors)) and args[3:] == (1, 2, True, 64)


@pytest.mark.parametrize('metadata', [
    dict(num_ctas=2), dict(launch_cooperative_grid=True), dict(launch_pdl=True), dict(global_scratch_size=128),
    dict(profile_scratch_size=8)], ids=lambda metadata: next(iter(metadata)))
def test_kernels_that_need_more_are_left_to_triton(driver, tensors, metadata, monkeypatch):
    monkeypatch.setattr(launch, '_has_old_launcher', lambda: True)
    kernel = Kernel(**metadata)
    kernel.params = []
    for _ in range(2):
        launch.launch(kernel, (1,), *tensors, 1, 2, C=64)
    assert len(kernel.by_triton) == 2 and not driver.launches


def test_the_library(monkeypatch):
    listening = Driver()
    monkeypatch.setattr(ctypes, 'CDLL', {'libcuda.so.1': listening}.__getitem__)
    library = launch._driver.__wrapped__()
    memory, addresses = launch._argument_slots()
    memory[:8] = range(8)
    assert library.cuLaunchKernel(FUNCTION, 2 ** 31 - 1, 1, 1, 128, 1, 1, SHARED, STREAM, addresses, None) == 0
    assert listening.launches == [
        Launch(FUNCTION, (2 ** 31 - 1, 1, 1), (128, 1, 1), SHARED, STREAM, list(range(8)), None)]


@pytest.mark.slow
def test_arguments_of_a_compiled_kernel(driver, monkeypatch):
    """Those of the machine code lie as the driver is given them, and Triton says of the kernel what is asked here."""
    from timm_cotnet.ops.gpu import rows

    kernel = rows.moments_kernel
    constants = dict(ALIGN=16, BLOCK_P=32, BLOCK_C=64, FOLD=1, ACC=triton.language.float32)
    signature = dict(x_ptr='*bf16', moments_ptr='*fp32', P='i32', LENGTH='i32', RUNS='i32', PARTS='i32')
    if launch._has_old_launcher():
        source = compiler.ASTSource(kernel, signature, constants)
    else:
        source = compiler.ASTSource(kernel, {**signature, **dict.fromkeys(constants, 'constexpr')}, constants)
    made = compiler.compile(source, target=backends.GPUTarget('cuda', 90, 32))
    entry = made.asm['ptx'][made.asm['ptx'].index('.entry'):]
    parameters = re.findall(r'\.param \.([bu]\d\d)', entry[:entry.index('{')])
    assert [kind[1:] for kind in parameters[:6]] == ['64', '64', '32', '32', '32', '32']
    assert len(parameters) <= 8 and set(kind[1:] for kind in parameters[6:]) <= {'64'}

    made.function = FUNCTION
    args = (Buffer(ADDRESS, torch.bfloat16), Buffer(2 * ADDRESS), 3136, 64, 49, 4)
    monkeypatch.setattr(type(kernel), '__getitem__', lambda *_: lambda *_, **__: made)
    monkeypatch.setattr(launch, '_kernels', {})
    for _ in range(2):
        launch.launch(kernel, (98,), *args, **constants)
    found, = driver.launches
    assert found.arguments == [ADDRESS, 2 * ADDRESS, 3136, 64, 49, 4, 0, 0]
    assert found.block == (32 * made.metadata.num_warps, 1, 1) and found.shared == made.metadata.shared
