"""How the C kernels are compiled, kept and loaded, and what they withstand: forks, threads, small stacks, no memory."""
import ctypes
import errno
import logging
import os
import platform
import stat
import subprocess
import sys
import threading

import pytest
import torch

from timm_cotnet.ops.cpu import build
from timm_cotnet.ops.cpu.contexts import contexts_folded
from timm_cotnet.ops.cpu.local_conv import local_conv
from timm_cotnet.ops.reference import local_conv_reference

from helpers import needs_kernels

pytestmark = needs_kernels
DTYPE = torch.bfloat16  # of which the library is smaller, and compiled sooner


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The folder of an empty cache; libraries are loaded anew."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    for name in ('CC', 'TIMM_COTNET_CFLAGS', 'TIMM_COTNET_NATIVE'):
        monkeypatch.delenv(name, raising=False)
    build.load.cache_clear()
    yield tmp_path / 'timm_cotnet'
    build.load.cache_clear()


@pytest.fixture
def compiler(tmp_path):
    """Makes a compiler out of a shell script's body, which counts its runs in the file `runs`."""
    def make(body):
        path = tmp_path / 'compiler'
        path.write_text(f'#!/bin/sh\necho run >> {tmp_path}/runs\n{body}\n')
        path.chmod(0o755)
        return str(path)
    return make


def inputs(B=2, C=16, G=2, H=5, W=6, dtype=DTYPE):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(B, n, H, W, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
                 for n in (C, G * 9))
    return x, weight.view(B, G, 9, H, W)


def check(dtype=DTYPE, **sizes):
    x, weight = inputs(dtype=dtype, **sizes)
    expected = local_conv_reference(x, weight)
    tolerance = 2 ** -6 if dtype == torch.bfloat16 else 2e-5
    assert (local_conv(x, weight, 3, 1) - expected).abs().max() <= tolerance * expected.abs().max()


def load_again():
    build.load.cache_clear()
    return build.load(DTYPE)


def run(code, **env):
    """What a new process prints."""
    result = subprocess.run(
        [sys.executable, '-c', code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_compiled_once(fresh, caplog):
    caplog.set_level(logging.INFO, 'timm_cotnet')
    check()
    library, digest = sorted(fresh.iterdir())  # and no temporary folder left
    assert digest.name == f'{library.name}.sha256' and digest.read_text() == build._digest(library)
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    message, = (record.message for record in caplog.records)
    assert message.startswith('compiled kernels in ') and message.endswith(f' s: {library}')
    made = library.stat().st_mtime_ns
    assert isinstance(load_again(), ctypes.CDLL)
    check()
    assert library.stat().st_mtime_ns == made and len(caplog.records) == 1


def test_one_openmp_runtime():
    """That of PyTorch: a second one would have threads of its own."""
    code = (
        'import re, torch\n'
        'runtimes = lambda: {line.split()[-1] for line in open("/proc/self/maps") '
        'if re.search(r"/lib(gomp|iomp5|omp)\\b", line)}\n'
        'before = runtimes()\n'
        'from timm_cotnet.ops.cpu.build import load\n'
        'assert not isinstance(load(torch.float32), str)\n'
        'print(len(before), runtimes() == before)')
    if sys.platform != 'linux':
        pytest.skip('only Linux tells in /proc which libraries a process has loaded')
    assert run(code).split() == ['1', 'True']


@pytest.mark.parametrize('command', ['g++', 'env gcc', 'gcc -pipe'])
def test_other_compilers(fresh, monkeypatch, command):
    monkeypatch.setenv('CC', command)
    if command == 'g++':
        monkeypatch.setenv('TIMM_COTNET_NATIVE', '1')
    check()


@pytest.mark.skipif(platform.machine() != 'x86_64', reason='compiles for other processors of the x86 family')
@pytest.mark.parametrize('processor', ['haswell', 'x86-64'])
def test_other_processors(monkeypatch, processor):
    monkeypatch.setenv('TIMM_COTNET_CFLAGS', f'-march={processor}')
    build.load.cache_clear()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            check(dtype)
            check(dtype, C=30, G=5)
        x, weight = inputs(C=32, G=8, dtype=torch.float32)
        x.requires_grad_(), weight.requires_grad_()
        grads = [torch.autograd.grad(f(x, weight, 3, 1).square().sum(), (x, weight))
                 for f in (local_conv, local_conv_reference)]
        for actual, expected in zip(*grads):
            assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    finally:
        build.load.cache_clear()


def test_without_openmp(fresh, monkeypatch, caplog, compiler):
    caplog.set_level(logging.INFO, 'timm_cotnet')
    monkeypatch.setenv('CC', compiler(
        'for arg; do test "$arg" = -fopenmp && echo what is OpenMP >&2 && exit 1; done; exec cc "$@"'))
    check()
    assert 'for one thread, as OpenMP is missing' in caplog.text and 'what is OpenMP' in caplog.text


def test_failure_is_remembered(fresh, monkeypatch, caplog, compiler):
    caplog.set_level(logging.INFO, 'timm_cotnet')
    monkeypatch.setenv('CC', compiler('echo no such header >&2; exit 3'))
    reason = build.load(DTYPE)
    assert 'compiler failed with exit code 3: no such header' in reason
    assert reason in caplog.text
    failure, = fresh.iterdir()
    runs = fresh.parent / 'runs'
    # how many sources are tried before the first failure is known is a matter of time
    tries = [len(runs.read_text().split())]
    again = load_again()
    assert 'no such header' in again and str(failure) in again and 'TIMM_COTNET_NATIVE=1' in again
    assert len(runs.read_text().split()) == tries[-1]
    with pytest.raises(RuntimeError, match='no kernel local_conv for .*no such header'):
        local_conv(*inputs(), 3, 1)
    monkeypatch.setenv('TIMM_COTNET_NATIVE', '1')
    with pytest.raises(RuntimeError, match='TIMM_COTNET_NATIVE is 1, but the kernels .*no such header'):
        load_again()
    tries.append(len(runs.read_text().split()))
    failure.unlink()
    monkeypatch.delenv('TIMM_COTNET_NATIVE')
    load_again()
    tries.append(len(runs.read_text().split()))
    assert tries[0] < tries[1] < tries[2]


def test_success_makes_a_failure_forgotten(fresh, monkeypatch):
    def fail(*args):
        raise OSError('disk full')

    monkeypatch.setattr(build, '_run', fail)
    assert 'disk full' in build.load(DTYPE)
    monkeypatch.undo()
    monkeypatch.setenv('XDG_CACHE_HOME', str(fresh.parent))
    assert 'compiling failed before' in load_again()
    monkeypatch.setenv('TIMM_COTNET_NATIVE', '1')
    load_again()
    assert sorted(path.suffix for path in fresh.iterdir()) == ['.sha256', '.so']


def test_too_many_processes(fresh, monkeypatch):
    """The next process may be luckier."""
    def fail(*args, **kwargs):
        raise BlockingIOError(errno.EAGAIN, 'fork failed')

    monkeypatch.setattr(subprocess, 'run', fail)
    assert 'too many processes' in build.load(DTYPE) and not list(fresh.iterdir())
    monkeypatch.undo()
    monkeypatch.setenv('XDG_CACHE_HOME', str(fresh.parent))
    assert isinstance(load_again(), ctypes.CDLL)


def test_without_a_compiler(fresh, monkeypatch):
    monkeypatch.setenv('CC', 'no-such-compiler -O1')
    assert "there is no C compiler 'no-such-compiler'; install one or set CC" in build.load(DTYPE)
    monkeypatch.setenv('TIMM_COTNET_NATIVE', '0')
    assert load_again() == 'TIMM_COTNET_NATIVE is 0'
    monkeypatch.setenv('TIMM_COTNET_NATIVE', '1')
    assert build.load(torch.float64) == 'there are no kernels for torch.float64'


@pytest.mark.parametrize('damage', [b'', b'\x7fELF', None])
def test_damaged_library(fresh, damage):
    build.load(DTYPE)
    library, digest = sorted(fresh.iterdir())
    whole = library.read_bytes()
    library.unlink()  # as it is mapped
    if damage is None:
        digest.unlink()
    library.write_bytes(whole if damage is None else damage)
    assert isinstance(load_again(), ctypes.CDLL)
    check()
    assert digest.read_text() == build._digest(library)


@pytest.mark.parametrize('mode', [0o770, 0o702])
def test_folder_that_others_may_write_to(fresh, mode):
    fresh.mkdir()
    fresh.chmod(mode)
    assert f'with mode {mode:o}' in build.load(DTYPE)
    assert not list(fresh.iterdir())


def test_folder_of_somebody_else(fresh, monkeypatch):
    build.load(DTYPE)
    user = os.geteuid()
    monkeypatch.setattr(os, 'geteuid', lambda: user + 1)
    reason = load_again()
    assert f'belongs to user {user}' in reason and 'XDG_CACHE_HOME' in reason


def test_place_that_cannot_be_a_folder(fresh):
    fresh.write_text('')
    assert 'FileExistsError' in build.load(DTYPE)


@pytest.mark.slow
def test_processes_may_compile_at_once(fresh):
    code = (
        'import torch; from timm_cotnet.ops.cpu.build import load; print(isinstance(load(torch.bfloat16), str))')
    processes = [
        subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in processes] == ['False'] * 3
    library, digest = sorted(fresh.iterdir())
    assert digest.read_text() == build._digest(library)


@pytest.mark.slow
def test_small_stacks_of_threads():
    """Nothing that grows with the number of channels lies on a thread's stack."""
    code = '''
import torch
from timm_cotnet import CotLayer
from timm_cotnet.ops.cpu.batch_norm import train_batch_norm
from timm_cotnet.ops.cpu.contexts import contexts_folded
from timm_cotnet.ops.cpu.cot_layer import train_cot_layer
from timm_cotnet.ops.cpu.local_conv import local_conv
torch.set_num_threads(3)
C, G, k = 4096, 512, 3
image = lambda n: torch.randn(4, n, 2, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
x, logits, static = image(C), image(G * k * k), image(C)
local_conv(x, logits.view(4, G, k * k, 2, 3), k, 1).sum().backward()
layer = CotLayer(C)
train_cot_layer(layer, x).sum().backward()
train_batch_norm(x, layer.bn, True, static).sum().backward()
norm, se = layer.embed[4], layer.se
parameters = [norm.weight, norm.bias, layer.bn.bias, se[0].weight, se[0].bias, se[3].weight, se[3].bias]
with torch.no_grad():
    contexts_folded(x, logits, static, parameters, k, 1, 1, 1e-5)
    contexts_folded(x[:1], logits[:1], static[:1], parameters, k, 1, 1, 1e-5)
print('done')
'''
    assert run(code, OMP_STACKSIZE='64k', OMP_NUM_THREADS='3').strip() == 'done'


def test_forked_process():
    """OpenMP's threads are gone in the child, whose kernels run on one thread."""
    code = '''
import os
import torch
from timm_cotnet.ops.cpu import build
from timm_cotnet.ops.cpu.local_conv import local_conv
torch.set_num_threads(3)
x, weight = torch.randn(3, 32, 5, 6, requires_grad=True), torch.randn(3, 4, 9, 5, 6, requires_grad=True)
def results():
    out = local_conv(x, weight, 3, 1)
    return out, *torch.autograd.grad(out.square().sum(), (x, weight))
expected = results()
def report(name):
    print(name, build.num_threads(), all(map(torch.equal, results(), expected)), flush=True)
child = os.fork()
if child == 0:
    report('child')
    os._exit(0)
os.waitpid(child, 0)
report('parent')
'''
    assert run(code).splitlines() == ['child 1 True', 'parent 3 True']


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other allocators decide otherwise what they keep')
def test_freed_memory_is_kept():
    """Large tensors lie in the heap, which keeps what they leave; else each would be new memory of the system."""
    code = '''
import ctypes
import torch
from timm_cotnet.ops.cpu import build
end_of_heap = ctypes.CDLL(None).sbrk
end_of_heap.restype, end_of_heap.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
assert isinstance(build.load(torch.float32), ctypes.CDLL)
print(torch.empty(30 << 20, dtype=torch.uint8).data_ptr() < end_of_heap(0))
'''
    assert run(code).strip() == 'True'


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='glibc alone is known to pass over blocks that just fit')
def test_freed_memory_is_found():
    """A tensor takes the memory that one of its size has left between others. Plain ones do so now and then."""
    code = '''
import ctypes
import torch
from timm_cotnet.ops.cpu import build
from timm_cotnet.ops.cpu.local_conv import empty_like
assert isinstance(build.load(torch.float32), ctypes.CDLL)
kept, again = [], 0
for i in range(20):
    x = torch.zeros(4, 64, 50 + i, 56)
    first = empty_like(x)
    kept.append((x, torch.empty(2, 64, 50 + i, 56)))
    for n in range(8, 120, 16):
        ctypes.CDLL(None).malloc(n)  # takes what is left over beside large blocks
    address = first.data_ptr()
    del first
    kept.append(torch.empty_like(x))
    again += abs(kept[-1].data_ptr() - address) < 128
print(again)
'''
    assert min(int(run(code)) for _ in range(3)) >= 16  # of 20


def test_neither_fork_nor_users():
    """As on Windows: no kernels, and plain PyTorch does the work."""
    code = '''
import os
import torch, torchvision
for name in ('fork', 'register_at_fork', 'geteuid'):
    delattr(os, name)
import timm
import timm_cotnet
from timm_cotnet.ops import cpu
print(cpu.why_not(torch.float32))
model = timm.utils.reparameterize_model(timm.create_model('test_cotnet').eval())
with torch.no_grad():
    print(tuple(model(torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)).shape))
'''
    reason, shape = run(code, TIMM_COTNET_NATIVE='').splitlines()
    assert 'OSError: there are no kernels for' in reason and shape == '(2, 10)'


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return local_conv(*(t[index:index + 1] for t in inputs(B=4)), 3, 1)[0]


def test_workers_of_a_data_loader():
    expected = local_conv(*inputs(B=4), 3, 1)
    loader = torch.utils.data.DataLoader(Images(), batch_size=4, num_workers=2, multiprocessing_context='fork')
    batch, = loader
    assert torch.equal(batch, expected)


def results():
    x, weight = inputs(B=3, C=32, G=4, dtype=torch.float32)
    x.requires_grad_(), weight.requires_grad_()
    out = local_conv(x, weight, 3, 1)
    return out, *torch.autograd.grad(out.square().sum(), (x, weight))


def test_several_python_threads():
    expected = results()
    same = []
    threads = [
        threading.Thread(target=lambda: same.extend(all(map(torch.equal, results(), expected)) for _ in range(20)))
        for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 80


@pytest.mark.slow
def test_missing_memory(monkeypatch, tmp_path):
    """Whichever allocation fails, the kernel says so, and works the next time."""
    from timm_cotnet import CotLayer
    from timm_cotnet.ops.cpu.batch_norm import train_batch_norm
    from timm_cotnet.ops.cpu.cot_layer import train_cot_layer
    header = tmp_path / 'failing.h'
    header.write_text(
        '#include <stdlib.h>\n__attribute__((weak)) int left = 1 << 30;\n'
        '#define aligned_alloc(alignment, size) (left-- > 0 ? (aligned_alloc)(alignment, size) : NULL)\n')
    x, weight = inputs(C=16, G=2, dtype=torch.float32)
    layer = CotLayer(16)
    norm, se = layer.embed[4], layer.se
    parameters = [norm.weight, norm.bias, layer.bn.bias, se[0].weight, se[0].bias, se[3].weight, se[3].bias]
    logits = weight.flatten(1, 2)
    wanting = [t.detach().requires_grad_() for t in (x, weight)]

    kernels = {
        'local_conv': lambda: local_conv(x, weight, 3, 1),
        'local_conv_backward': lambda: local_conv(*wanting, 3, 1).sum().backward(),
        'contexts_folded': lambda: contexts_folded(x, logits, x, parameters, 3, 1, 1, 1e-5),
        'contexts_backward': lambda: train_cot_layer(layer, wanting[0]).sum().backward(),
        'batch_norm_backward': lambda: train_batch_norm(wanting[0], layer.bn).sum().backward(),
    }
    monkeypatch.setenv('TIMM_COTNET_CFLAGS', f'-include {header}')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    build.load.cache_clear()
    try:
        left = ctypes.c_int.in_dll(build.load(torch.float32), 'left')
        for name, run_kernel in kernels.items():
            missing = set()
            for allocations in range(200):
                left.value = allocations
                try:
                    with torch.set_grad_enabled('backward' in name or 'gradient' in name):
                        run_kernel()
                    break
                except MemoryError as error:
                    missing.add(str(error).split()[3])
            assert allocations > 0 and name in missing, (name, missing)
    finally:
        build.load.cache_clear()
