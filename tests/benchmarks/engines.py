"""How a network becomes a task in an engine, and how tasks in processes of their own are timed in turn.

A task is described by a dict, its spec: `dict(work='inference', name='cotnet50', batch=8, engine='onnxruntime')`. Each
has a process of its own, as what one leaves of its memory would decide how much of it the next has to ask for anew.
"""
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Union

import timm
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import timm_cotnet.layers
from timm_cotnet import local_conv
from timm_cotnet.ops import dispatch

Task = Callable[[], object]
Spec = Dict[str, Any]
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels-last': torch.channels_last}
INSTRUCTION_SETS = ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16')
TURN = 0.3  # seconds of a task's turn: enough to warm caches up again
LIMIT = 1800.0  # seconds in which a task has to be ready: compilers may take long, or never end


class CannotRun(Exception):
    """This machine cannot run a task; the message says why."""


class Result(NamedTuple):
    """What a task took: the median of its turns, and its peak memory above what its process began with."""
    milliseconds: float
    megabytes: float


# Engines: each makes a task of a network in evaluation and an input


def _eager(net: nn.Module, x: torch.Tensor) -> Task:
    @torch.no_grad()
    def task():
        net(x)
    return task


def _compiled(net: nn.Module, x: torch.Tensor) -> Task:
    return _eager(torch.compile(net), x)


def _frozen(net: nn.Module, x: torch.Tensor) -> Task:
    import torch._inductor.config
    torch._inductor.config.freezing = True
    return _compiled(net, x)


def _onnxruntime(net: nn.Module, x: torch.Tensor) -> Task:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        session = onnxruntime.InferenceSession(_export(net, x, folder), options, providers=['CPUExecutionProvider'])
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: session.run(None, feed)


def _openvino(net: nn.Module, x: torch.Tensor, **config: Any) -> Task:
    import openvino
    config.update(PERFORMANCE_HINT='LATENCY', INFERENCE_NUM_THREADS=torch.get_num_threads())
    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        compiled = core.compile_model(core.read_model(_export(net, x, folder)), 'CPU', config)
    precision = compiled.get_property('INFERENCE_PRECISION_HINT').to_string()
    if 'INFERENCE_PRECISION_HINT' not in config and precision != 'bf16':
        raise CannotRun(f'the default precision of OpenVINO is {precision} on this processor')
    request, array = compiled.create_infer_request(), x.contiguous().numpy()
    return lambda: request.infer([array], share_inputs=True)


def _export(net: nn.Module, x: torch.Tensor, folder: str) -> str:
    path = str(Path(folder, 'network.onnx'))
    torch.onnx.export(net, (x,), path, dynamo=True, external_data=False, verbose=False)
    return path


ENGINES: Dict[str, Callable[[nn.Module, torch.Tensor], Task]] = {
    'eager': _eager,
    'torch.compile': _compiled,
    'torch.compile with freezing': _frozen,
    'onnxruntime': _onnxruntime,
    'OpenVINO': lambda net, x: _openvino(net, x, INFERENCE_PRECISION_HINT='f32'),
    'OpenVINO in its default precision': _openvino,  # bfloat16 on processors that are fast at it
}


# Work: each makes a task of a spec


def inference(
        name: str,
        batch: int,
        size: int = 224,
        dtype: str = 'float32',
        engine: str = 'eager',
        layout: str = 'channels-last',
        folded: bool = True,
        official: bool = False,
) -> Task:
    """The network in an engine, its batch norms folded unless told otherwise."""
    _check_dtype(dtype)
    net = timm.create_model(name).eval()
    if folded and not official:
        net = reparameterize_model(net) if 'cotnet' in name else fold(net)
    if official:
        use_official_formula()
    dtype, memory_format = getattr(torch, dtype), LAYOUTS[layout]
    net = net.to(dtype=dtype, memory_format=memory_format)
    x = torch.randn(batch, 3, size, size, dtype=dtype).to(memory_format=memory_format)
    return ENGINES[engine](net, x)


def training(
        name: str,
        batch: int,
        size: int = 224,
        engine: str = 'eager',
        layout: str = 'channels-last',
        official: bool = False,
) -> Task:
    """One step: forward, backward, SGD; in float32."""
    if official:
        use_official_formula()
    net = timm.create_model(name).to(memory_format=LAYOUTS[layout])
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    run = {'eager': lambda net: net, 'torch.compile': torch.compile}[engine](net.train())
    x = torch.randn(batch, 3, size, size).to(memory_format=LAYOUTS[layout])
    target = torch.randint(1000, (batch,))
    last = []  # output and loss, as in training scripts; where nothing lives on, glibc gives back all memory

    def task():
        out = run(x)
        last[:] = out, F.cross_entropy(out, target)
        optimizer.zero_grad()
        last[1].backward()
        optimizer.step()
    return task


def operator(
        function: str,
        channels: int,
        side: int,
        batch: int = 8,
        backward: bool = False,
        dtype: str = 'float32',
        layout: str = 'channels-last',
) -> Task:
    """Local convolution, by 'local_conv' or by the official 'formula'."""
    _check_dtype(dtype)

    def random(channels: int) -> torch.Tensor:
        x = torch.randn(batch, channels, side, side, dtype=getattr(torch, dtype))
        return x.to(memory_format=LAYOUTS[layout])
    x, filters, grad = random(channels), random(channels // 8 * 9), random(channels)
    x.requires_grad_(backward)
    filters.requires_grad_(backward)

    def task():
        run = local_conv if function == 'local_conv' else official_local_conv
        out = run(x, filters.view(batch, -1, 9, side, side))
        if backward:
            torch.autograd.grad(out, (x, filters), grad)
    return task


def fold(model: nn.Module) -> nn.Module:
    """Fold the batch norms of a timm ResNet with PyTorch's own utility."""
    for module in model.eval().modules():
        children = list(module.named_children())
        for (name, conv), (norm_name, norm) in zip(children, children[1:]):
            parent = module
            if isinstance(conv, nn.Sequential):  # a stem, whose last convolution is normed outside of it
                parent, (name, conv) = conv, list(conv.named_children())[-1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return model


def official_local_conv(x: torch.Tensor, weight: torch.Tensor, kernel_size: int = 3, dilation: int = 1) -> torch.Tensor:
    """The formula of the official unit test: unfold, multiply, sum."""
    B, C, H, W = x.shape
    G, taps = weight.shape[1:3]
    columns = F.unfold(x, kernel_size, dilation, dilation * (kernel_size // 2)).view(B, C // G, G, taps, H, W)
    return (columns * weight.unsqueeze(1)).sum(3).view(B, C, H, W)


def use_official_formula() -> None:
    """From now on every CoT layer of this process computes what the official one does, by its formula."""
    def grouped(x, attn, kernel_size, dilation, groups):
        B, _, H, W = x.shape
        return official_local_conv(x, attn.view(B, -1, kernel_size * kernel_size, H, W), kernel_size, dilation)

    timm_cotnet.layers.grouped_local_conv = grouped
    dispatch._ON_CPU.clear()


def _check_dtype(dtype: str) -> None:
    if dtype == 'bfloat16' and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise CannotRun('oneDNN has no bfloat16 on this processor')


def make_task(work: str, **spec: Any) -> Task:
    """The task of a spec."""
    return {'inference': inference, 'training': training, 'operator': operator}[work](**spec)


# Turns


def take_turns(script: str, specs: Sequence[Spec], seconds: float) -> List[Union[Result, str]]:
    """What the task of each spec took, or the reason why it did not run.

    Args:
        script: File that calls `serve` with a spec when it is started as `script --work SPEC`.
        specs: Of the tasks.
        seconds: Time for each task, building it not included; each has at least three turns.
    """
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(script, spec)) for spec in specs]
        for worker in workers:
            worker.get_ready()
        running = [worker for worker in workers if worker.error is None]
        end, rounds = time.perf_counter() + seconds * len(running), 0
        while running and (rounds < 3 or time.perf_counter() < end):
            for worker in running:
                time.sleep(0.02)  # threads of the one before may still spin
                worker.take_turn()
            running = [worker for worker in running if worker.error is None]
            rounds += 1
        return [worker.error or Result(statistics.median(worker.times), worker.megabytes) for worker in workers]


class Worker:
    """A process with a task, which answers each line that it is sent with one of JSON."""

    def __init__(self, script: str, spec: Spec, env: Optional[Dict[str, str]] = None):
        self._process = subprocess.Popen(
            [sys.executable, script, '--work', json.dumps(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=env)
        self.error: Optional[str] = None
        self.times: List[float] = []
        self.megabytes = 0.
        self.first = float('nan')  # milliseconds of the task's first time

    def __enter__(self) -> 'Worker':
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # which ends it
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def get_ready(self) -> None:
        answer = self._ask()
        self.megabytes, self.first = answer.get('megabytes', 0.), answer.get('first', self.first)

    def take_turn(self) -> None:
        answer = self._ask()
        if self.error is None:
            self.times.append(answer['milliseconds'])

    def _ask(self) -> Dict:
        timer = threading.Timer(LIMIT, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write('\n')
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ''
        finally:
            timer.cancel()
        answer = json.loads(line) if line else {'error': f'its process ended with code {self._process.wait()}'}
        self.error = answer.get('error')
        return answer


def serve(make: Callable[..., Task], spec: Spec) -> None:
    """The process of a task: the first line of standard input makes it, and each line after that is a turn."""
    channel = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what engines print is no answer

    def answer(**values: object) -> None:
        print(json.dumps(values), file=channel, flush=True)

    sys.stdin.readline()
    before = _peak_megabytes()
    try:
        task = make(**spec)
        start = time.perf_counter()
        task()
        first = 1e3 * (time.perf_counter() - start)
        _reset_peak()  # compiling takes memory of its own
        task()
    except (CannotRun, ImportError) as reason:
        return answer(error=one_line(str(reason)))
    except Exception as error:
        traceback.print_exc()
        return answer(error=one_line(f'{type(error).__name__}: {error}'))
    answer(megabytes=_peak_megabytes() - before, first=first)
    for _ in sys.stdin:
        times = []
        end = time.perf_counter() + TURN
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            task()
            times.append(1e3 * (time.perf_counter() - start))
        answer(milliseconds=statistics.median(times))


def one_line(message: str) -> str:
    """As a cell of a Markdown table can hold it."""
    return ' '.join(message.split()).replace('|', '/')[:160]


def _peak_megabytes() -> float:
    """Of this process alone: `ru_maxrss` would start at what the process that started it had."""
    with contextlib.suppress(OSError):
        lines = Path('/proc/self/status').read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith('VmHWM'))
    return float('nan')


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')


# Where it runs


def hardware() -> str:
    """Processor, its instruction sets that matter here, threads and versions."""
    facts: Dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            name, _, value = line.partition(':')
            facts.setdefault(name.strip(), value.strip())
    sets = [name for name in INSTRUCTION_SETS if name in facts.get('flags', '').split()]
    versions = [f'Python {platform.python_version()}']
    for package in ('torch', 'timm', 'onnx', 'onnxruntime', 'openvino'):
        try:
            versions.append(f'{package} {importlib.metadata.version(package)}')
        except importlib.metadata.PackageNotFoundError:
            versions.append(f'no {package}')
    return (f'{facts.get("model name") or platform.processor() or platform.machine()} ({", ".join(sets) or "none"} of '
            f'{", ".join(INSTRUCTION_SETS)}), {torch.get_num_threads()} threads; {", ".join(versions)}')


if __name__ == '__main__':
    serve(make_task, json.loads(sys.argv[2]))
