"""How `gpu.py` measures: tasks in turn, between CUDA events or in processes of their own, and kernels one by one."""
import contextlib
import gc
import os
import re
import statistics
import tempfile
import time
import traceback
from argparse import Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Set, Tuple, Union

import engines
import timm
import torch
import torch.nn.functional as F
from engines import LAYOUTS, CannotRun, Spec, Task, one_line
from gpu_checks import graph_of, shake
from timm.utils import reparameterize_model
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from timm_cotnet import CotLayer, local_conv

SCRIPT = str(Path(__file__).with_name('gpu.py'))  # what processes of their own run
PRODUCTS = re.compile(  # names of kernels of convolutions and matrix products, and of their changes of format
    r'gemm|gemv|conv(?!ert)|fprop|dgrad|wgrad|xmma|cutlass|nvjet|cublas|split_?k|winograd|fft|nchwToNhwc|nhwcToNchw|'
    r'scalePackedTensor|_cudnn::Kernel|\b(add|b)?mm\b', re.I)
OURS = re.compile(r'^_?(weighted_sum|weight_grad|local_conv|context|cot)|timm_cotnet', re.I)
MARKS = ('Optimizer.', 'ProfilerStep', '##', 'Torch-Compiled')  # annotations on the time line of a GPU, no kernels


class Measured(NamedTuple):
    """What one side of a row took."""
    ms: float
    megabytes: float = float('nan')
    first_ms: float = float('nan')


Results = Dict[str, Union[Measured, str]]  # by keys; text: why there is none


# Tasks


def make_task(
        work: str,
        name: str,
        batch: int,
        size: int,
        device: str,
        dtype: str = 'bfloat16',
        layout: str = 'channels-last',
        folded: bool = False,
        graph: bool = False,
        compiled: str = '',
) -> Task:
    """A network's work on random images, without waiting for the GPU.

    Inference is all in dtype. A training step (SGD with momentum) keeps its weights in float32, and is under autocast
    in bfloat16. compiled is a mode of `torch.compile`.
    """
    if graph and device != 'cuda':
        raise CannotRun('needs CUDA')
    torch.manual_seed(0)
    memory_format, training = LAYOUTS[layout], work == 'training'
    net = shake(timm.create_model(name)).train(training)
    if folded:
        net = reparameterize_model(net) if 'cot' in name else engines.fold(net)
    held = torch.float32 if training else getattr(torch, dtype)
    net = net.to(device, held, memory_format=memory_format)
    x = torch.randn(batch, 3, size, size, device=device, dtype=held).to(memory_format=memory_format)
    if graph:
        captured, out = graph_of(net, x)

        def replay():
            captured.replay()
            return net, x, out  # whose memory it uses
        return replay
    run = torch.compile(net, mode=compiled) if compiled else net
    if not training:
        return torch.no_grad()(lambda: run(x))
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
    target = torch.randint(1000, (batch,), device=device)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16'):
            loss = F.cross_entropy(run(x), target)
        loss.backward()
        optimizer.step()
    return step


def make_waiting_task(device: str, **spec) -> Task:
    """For a process of its own: a task that ends when the GPU has done it."""
    task = make_task(device=device, **spec)

    def wait():
        task()
        synchronize(device)
    return wait


def synchronize(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


# Measuring


def milliseconds(task: Task, repeat: int, device: str) -> float:
    """Time of a task, mean of this many in a row."""
    if device == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeat):
            task()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeat
    begin = time.perf_counter()
    for _ in range(repeat):
        task()
    return 1e3 * (time.perf_counter() - begin) / repeat


def in_turn(tasks: Dict[str, Task], device: str, seconds: float) -> Dict[str, float]:
    """Medians of tasks that have run before, which take turns until each has had these seconds, and five turns."""
    repeat = {key: max(1, min(50, int(20 / max(1e-3, milliseconds(task, 1, device))))) for key, task in tasks.items()}
    times: Dict[str, List[float]] = {key: [] for key in tasks}
    end, least = time.perf_counter() + seconds * len(tasks), 5 if device == 'cuda' else 1
    while tasks and (time.perf_counter() < end or len(next(iter(times.values()))) < least):
        for key, task in tasks.items():
            times[key].append(milliseconds(task, repeat[key], device))
    return {key: statistics.median(values) for key, values in times.items()}


def measure_here(specs: Dict[str, Spec], seconds: float, keys: Set[str], benchmark: bool = False) -> Results:
    """Tasks in this process; their memory is what they add to what was there before them."""
    results: Results = {}
    tasks, megabytes, device = {}, {}, next(iter(specs.values()))['device']
    torch.backends.cudnn.benchmark = benchmark
    try:
        for key in filter(keys.__contains__, specs):
            try:
                free(device)
                before = torch.cuda.memory_allocated() if device == 'cuda' else 0
                task = make_task(**specs[key])
                for i in range(3 if device == 'cuda' else 1):
                    if device == 'cuda' and i > 0:  # tuning and compiling take memory of their own
                        torch.cuda.reset_peak_memory_stats()
                    task()
                synchronize(device)
                tasks[key] = task
                peak = torch.cuda.max_memory_allocated() - before if device == 'cuda' else float('nan')
                megabytes[key] = peak / 2 ** 20
            except Exception as error:
                results[key] = reason_of(error)
            task = None
        for key, ms in in_turn(tasks, device, seconds).items():
            results[key] = Measured(ms, megabytes[key])
        return results
    finally:
        torch.backends.cudnn.benchmark = False


def measure_apart(
        specs: Dict[str, Spec], seconds: float, left: Callable[[], float], keys: Set[str], cached: bool = True,
) -> Results:
    """Tasks in processes of their own, which get ready at once, or without `cached` one by one and without caches."""
    free('cuda' if torch.cuda.is_initialized() else 'cpu')
    wanted = [key for key in specs if key in keys]

    def get_ready(worker: engines.Worker) -> None:
        engines.LIMIT = max(20., left() + 20)  # what hangs ends
        worker.get_ready()

    with contextlib.ExitStack() as stack:
        workers = {}
        for key in wanted:
            env = dict(os.environ)
            if not cached:
                folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
                env.update({name: f'{folder}/{name}' for name in ('TRITON_CACHE_DIR', 'TORCHINDUCTOR_CACHE_DIR')})
            workers[key] = stack.enter_context(engines.Worker(SCRIPT, specs[key], env))
        with ThreadPoolExecutor(len(workers) if cached else 1) as pool:
            list(pool.map(get_ready, workers.values()))
        end, rounds = time.perf_counter() + seconds * len(workers), 0
        while seconds and (time.perf_counter() < end or rounds < 3):
            for worker in workers.values():
                if worker.error is None:
                    worker.take_turn()
            rounds += 1
        return {key: worker.error or Measured(statistics.median(worker.times or [float('nan')]),
                                              first_ms=worker.first) for key, worker in workers.items()}


def kernels(run: Task, device: str, repeat: int = 3) -> Dict[str, Tuple[float, float]]:
    """Of one run the milliseconds and the number of calls of each kernel; on a CPU, those of operators."""
    run()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == 'cuda')) as profiler:
        for _ in range(repeat):
            run()
        synchronize(device)
    times, counts = Counter(), Counter()
    for event in profiler.events():
        if device == 'cuda' and event.device_type == DeviceType.CUDA:
            if getattr(event, 'is_user_annotation', False) or event.name.startswith(MARKS):
                continue
            time_us = event.time_range.elapsed_us()
        elif device == 'cpu':
            time_us = event.self_cpu_time_total
        else:
            continue
        times[event.name] += time_us / 1e3 / repeat
        counts[event.name] += 1 / repeat
    if not times:
        raise CannotRun('the profiler sees no kernels')
    return {name: (ms, counts[name]) for name, ms in times.most_common()}


def is_product(kernel: str) -> bool:
    """Whether a kernel belongs to a convolution or a matrix product, by its name."""
    return not OURS.search(kernel) and PRODUCTS.search(kernel) is not None


def measure_layer(
        args: Namespace, details: Dict[str, object], channels: int, side: int, keys: Set[str]) -> Results:
    """Of a CoT layer in training all kernels that are no convolutions or matrix products by their names; copies.

    The layer runs under bfloat16 autocast, as in a training step. Its kernels are summed up by the profiler, so
    launching costs nothing, and `gpu.json` has their names, to see what was counted. A unit is a bfloat16 activation of
    the layer: behind the convolutions at least 10 of them have to be read or written in the forward, 22 in the
    backward. So many bytes are copied, half of them read and half written. The same for local convolution alone.
    """
    side = max(2, side * args.size // 224)
    shape, how = (args.batch or 256, channels, side, side), dict(device=args.device, dtype=torch.bfloat16)
    x, grad = (torch.randn(shape, **how).to(memory_format=torch.channels_last) for _ in range(2))
    x.requires_grad_()
    filters = torch.randn(shape[0], channels // 8 * 9, side, side, **how).to(memory_format=torch.channels_last)
    filters.requires_grad_()
    layer = shake(CotLayer(channels)).to(args.device, memory_format=torch.channels_last).train()

    def forward():
        with torch.autocast(args.device, torch.bfloat16):
            return layer(x)

    def convolve():
        return local_conv(x, filters.view(shape[0], -1, 9, side, side))

    results: Results = {}
    for name, run, inputs, amounts in (
            ('layer', forward, (x, *layer.parameters()), (10, 22)),
            ('operator', convolve, (x, filters), (2 + 9 / 8, 3 + 2 * 9 / 8))):
        if not any(key.startswith(name) for key in keys):
            continue
        run()
        outs = [run() for _ in range(4)]  # a graph for each backward
        of_out = grad.to(outs[0].dtype)

        def backward(outs=outs, inputs=inputs, of_out=of_out):
            torch.autograd.grad(outs.pop(), inputs, of_out)

        for direction, task, amount in zip(('forward', 'backward'), (run, backward), amounts):
            found = kernels(task, args.device, 3)
            products = {kernel: ms for kernel, (ms, _) in found.items() if name == 'layer' and is_product(kernel)}
            rest = {kernel: ms for kernel, (ms, _) in found.items() if kernel not in products}
            results[f'{name} {direction}'] = Measured(sum(rest.values()))
            details[f'{channels} {name} {direction}'] = dict(counted=rest, left_out=products)
            source = torch.randn(int(amount * x.numel() / 2), **how)
            copied = kernels(partial(torch.empty_like(source).copy_, source), args.device, 10)
            results[f'{name} {direction} copy'] = Measured(sum(ms for ms, _ in copied.values()))
            source = None
    return results


def free(device: str) -> None:
    gc.collect()
    if device == 'cuda':
        torch.cuda.empty_cache()


def as_json(result: Union[Measured, str]) -> object:
    if isinstance(result, str):
        return result
    return {name: value for name, value in result._asdict().items() if value == value}


def reason_of(error: BaseException) -> str:
    if not isinstance(error, (AssertionError, CannotRun)):
        traceback.print_exception(type(error), error, error.__traceback__, limit=-3)
    return one_line(str(error) if isinstance(error, CannotRun) else f'{type(error).__name__}: {error}')


def profile_network(work: str, name: str, args: Namespace) -> str:
    """Kernels of one training step or folded inference pass, and the host's time to enqueue it."""
    task = make_task(work, name, args.batch or 256, args.size, args.device, folded=work == 'inference')
    for _ in range(2):
        task()
    times = []
    for _ in range(5):
        synchronize(args.device)
        start = time.perf_counter()
        task()
        times.append(1e3 * (time.perf_counter() - start))
    synchronize(args.device)
    found = kernels(task, args.device)
    total, products = sum(ms for ms, _ in found.values()), sum(ms for k, (ms, _) in found.items() if is_product(k))
    lines = [f'{statistics.median(times):.2f} ms to enqueue; {total:.2f} ms in {sum(n for _, n in found.values()):.0f} '
             f'kernels, of which {products:.2f} ms in convolutions and matrix products, {total - products:.2f} ms in '
             f'the rest', '', '| ms | calls | product | kernel |', '| --- | --- | --- | --- |']
    lines += [f'| {ms:.3f} | {count:.0f} | {"yes" if is_product(kernel) else ""} | {one_line(kernel)} |'
              for kernel, (ms, count) in list(found.items())[:40]]
    return '\n'.join(lines)
