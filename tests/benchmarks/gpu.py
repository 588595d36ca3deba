"""Correctness and speed on a GPU, for rare minutes on one: `python tests/benchmarks/gpu.py`.

First the checks of `gpu_checks.py`, then the rows of a table: networks as they are trained and used in bfloat16, in
channels-last memory, at batch 256 with 224 pixels, unless a row says otherwise. Both sides of a row run in turn in one
process, and medians of times between CUDA events are compared; what compiles has processes of its own. What takes more
than the time that is left is not begun, and named at the end: `--only` runs it in another call.

Each line is printed as soon as it is known, and kept in `gpu.md` and `gpu.json` in `--output`. Needs torch and timm
only. `--device cpu --batch 2 --size 64` tries everything that needs no CUDA.
"""
import argparse
import contextlib
import datetime
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Set, Tuple, Union

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]  # a checkout is enough, nothing has to be installed

import engines  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from engines import LAYOUTS, CannotRun, Spec, Task, one_line  # noqa: E402
from gpu_checks import all_checks, exact_float32, graph_of, shake  # noqa: E402
from timm.utils import reparameterize_model  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from timm_cotnet import CotLayer, local_conv  # noqa: E402

COT, RESNET = 'cotnet50', 'resnet50'
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels and side of the CoT layers of each stage
OFFICIAL = 130.4 / 128  # ms of an image: a training step of the official code at its best, float32, on an H200
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


class Row(NamedTuple):
    """One line of the table.

    Args:
        name: What is compared.
        ours: Key of our side among what its group measures.
        rivals: Keys of the other side, of which the fastest counts.
        goal: Bound of the ratio: of a throughput from below, of all else from above.
        quantity: 'throughput', 'time', 'memory' or 'first' (step).
        only_on: Part of the name of the GPU without which the ratio says nothing.
    """
    name: str
    ours: str
    rivals: Tuple[str, ...]
    goal: Optional[float] = None
    quantity: str = 'throughput'
    only_on: str = ''


Results = Dict[str, Union[Measured, str]]  # by keys; text: why there is none


class Group(NamedTuple):
    """Rows that are measured together.

    Args:
        seconds: What it takes on an H100, nothing cached.
        measure: Measures what has these keys.
        rows: Lines of the table.
    """
    seconds: float
    measure: Callable[[Set[str]], Results]
    rows: List[Row]


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
        compiled: bool = False,
) -> Task:
    """A network's work on random images, without waiting for the GPU.

    Inference is all in dtype. A training step (SGD with momentum) keeps its weights in float32, and is under autocast
    in bfloat16.
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
    run = torch.compile(net) if compiled else net
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
        _synchronize(device)
    return wait


def _synchronize(device: str) -> None:
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
                _free(device)
                before = torch.cuda.memory_allocated() if device == 'cuda' else 0
                task = make_task(**specs[key])
                for i in range(3 if device == 'cuda' else 1):
                    if device == 'cuda' and i > 0:  # tuning and compiling take memory of their own
                        torch.cuda.reset_peak_memory_stats()
                    task()
                _synchronize(device)
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
        specs: Dict[str, Spec], seconds: float, report: 'Report', keys: Set[str], cached: bool = True,
) -> Results:
    """Tasks in processes of their own, which get ready at once, or without `cached` one by one and without caches."""
    _free('cuda' if torch.cuda.is_initialized() else 'cpu')
    wanted = [key for key in specs if key in keys]
    engines.LIMIT = max(20., report.left() + 20)  # what hangs ends
    with contextlib.ExitStack() as stack:
        workers = {}
        for key in wanted:
            env = dict(os.environ)
            if not cached:
                folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
                env.update({name: f'{folder}/{name}' for name in ('TRITON_CACHE_DIR', 'TORCHINDUCTOR_CACHE_DIR')})
            workers[key] = stack.enter_context(engines.Worker(__file__, specs[key], env))
        with ThreadPoolExecutor(len(workers) if cached else 1) as pool:
            list(pool.map(engines.Worker.get_ready, workers.values()))
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
    _synchronize(device)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == 'cuda')) as profiler:
        for _ in range(repeat):
            run()
        _synchronize(device)
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
    return {name: (ms, counts[name]) for name, ms in times.most_common()}


def is_product(kernel: str) -> bool:
    """Whether a kernel belongs to a convolution or a matrix product, by its name."""
    return not OURS.search(kernel) and PRODUCTS.search(kernel) is not None


def measure_layer(
        args: argparse.Namespace, report: 'Report', channels: int, side: int, keys: Set[str]) -> Results:
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

        def backward(outs=outs, inputs=inputs):
            torch.autograd.grad(outs.pop(), inputs, grad)

        for direction, task, amount in zip(('forward', 'backward'), (run, backward), amounts):
            found = kernels(task, args.device, 3)
            products = {kernel: ms for kernel, (ms, _) in found.items() if name == 'layer' and is_product(kernel)}
            rest = {kernel: ms for kernel, (ms, _) in found.items() if kernel not in products}
            results[f'{name} {direction}'] = Measured(sum(rest.values()))
            report.details[f'{channels} {name} {direction}'] = dict(counted=rest, left_out=products)
            source = torch.randn(int(amount * x.numel() / 2), **how)
            copied = kernels(partial(torch.empty_like(source).copy_, source), args.device, 10)
            results[f'{name} {direction} copy'] = Measured(sum(ms for ms, _ in copied.values()))
            source = None
    return results


def _free(device: str) -> None:
    gc.collect()
    if device == 'cuda':
        torch.cuda.empty_cache()


def as_json(result: Union[Measured, str]) -> object:
    if isinstance(result, str):
        return result
    return {name: value for name, value in result._asdict().items() if value == value}


def reason_of(error: BaseException) -> str:
    if not isinstance(error, (AssertionError, CannotRun)):
        traceback.print_exception(type(error), error, error.__traceback__)
    return one_line(str(error) if isinstance(error, CannotRun) else f'{type(error).__name__}: {error}')


# Rows


def all_groups(args: argparse.Namespace, report: 'Report') -> List[Group]:
    """All that is measured, in turn: what compiles comes last."""
    batch, ratio = args.batch or 256, f'{COT} / {RESNET}'
    common = dict(batch=batch, size=args.size, device=args.device)

    def here(seconds: float, specs: Dict[str, Spec], rows: List[Row], **kwargs) -> Group:
        specs = {key: {**common, **spec} for key, spec in specs.items()}
        return Group(seconds, partial(measure_here, specs, args.seconds, **kwargs), rows)

    def apart(seconds: float, specs: Dict[str, Spec], rows: List[Row], each: float = args.seconds, **kwargs) -> Group:
        specs = {key: {**common, **spec} for key, spec in specs.items()}
        return Group(seconds, partial(measure_apart, specs, each, report, **kwargs), rows)

    def infer(name: str, **spec) -> Spec:
        return dict(work='inference', name=name, **spec)

    def train(name: str, **spec) -> Spec:
        return dict(work='training', name=name, **spec)

    groups = [
        here(15, {'plain': infer(COT), 'folded': infer(COT, folded=True), 'rival': infer(RESNET),
                  'rival folded': infer(RESNET, folded=True)}, [
            Row(f'{ratio}, inference, eager, neither folded', 'plain', ('rival',), 1.0),
            Row(f'{ratio}, inference, eager, ours folded', 'folded', ('rival',), 1.0),
            Row(f'{ratio}, inference, eager, both folded', 'folded', ('rival folded',)),
        ]),
        here(25, {'ours': train(COT), 'rival': train(RESNET), 'resnest': train('resnest50d')}, [
            Row(f'{ratio}, training, eager', 'ours', ('rival',), 0.70),
            Row(f'{ratio}, training, eager, peak memory', 'ours', ('rival',), 1.3, 'memory'),
            Row(f'{COT} / resnest50d, training, eager', 'ours', ('resnest',), 2.0),
        ]),
    ]
    half = args.batch or 128
    official = f'{COT} / official code at its best (a constant, of an H200 in float32), training, batch {half}'
    constant, contiguous = lambda keys: {'official': Measured(OFFICIAL * half)}, dict(layout='contiguous')
    group = here(20, {'bfloat16': train(COT, batch=half), 'float32': train(COT, batch=half, dtype='float32')}, [
        Row(f'{official}, bfloat16', 'bfloat16', ('official',), 3.5, only_on='H200'),
        Row(f'{official}, float32', 'float32', ('official',), 1.6, only_on='H200'),
    ])
    groups += [
        group._replace(measure=lambda keys, measure=group.measure: {**measure(keys), **constant(keys)}),
        here(20, {'ours': train(COT, **contiguous), 'rival': train(RESNET, **contiguous)}, [
            Row(f'{ratio}, training, eager, contiguous memory', 'ours', ('rival',), 0.70)]),
        here(12, {'plain': infer(COT, **contiguous), 'folded': infer(COT, folded=True, **contiguous),
                  'rival': infer(RESNET, **contiguous)}, [
            Row(f'{ratio}, inference, eager, contiguous memory, neither folded', 'plain', ('rival',), 1.0),
            Row(f'{ratio}, inference, eager, contiguous memory, ours folded', 'folded', ('rival',), 1.0)]),
        here(20, {'coxt': train('cotnext50_2x48d'), 'cot': train(COT)}, [
            Row(f'cotnext50_2x48d / {COT}, training, eager', 'coxt', ('cot',), 1.5, 'time')]),
        here(15, {'ours': train(COT), 'rival': train(RESNET)}, [
            Row(f'{ratio}, training, eager, cudnn.benchmark', 'ours', ('rival',))], benchmark=True),
        here(20, {f'{name} {how} {graph}': infer(name, batch=1, folded=how == 'folded', graph=graph == 'graph')
                  for graph in ('eager', 'graph') for name in (COT, RESNET) for how in ('plain', 'folded')}, [
            Row(f'{ratio}, batch 1, {text}, {fold}', f'{COT} {ours} {graph}', (f'{RESNET} {rival} {graph}',), goal,
                'time')
            for graph, text, goal in (('eager', 'eager', 1.8), ('graph', 'CUDA graphs', 1.3))
            for fold, ours, rival in (('neither folded', 'plain', 'plain'), ('ours folded', 'folded', 'plain'),
                                      ('both folded', 'folded', 'folded'))]),
    ]
    for channels, side in STAGES:
        groups.append(Group(8, partial(measure_layer, args, report, channels, side), [
            Row(f'{what}, {channels} x {side} x {side}, {direction}', f'{key} {direction}',
                (f'{key} {direction} copy',), goal, 'time')
            for key, what, goal in (
                ('layer', 'kernels of a CotLayer that are no convolutions by their names / copy of 10, 22 units', 1.5),
                ('operator', 'local_conv / copy of its traffic', 1.3))
            for direction in ('forward', 'backward')]))
    first = apart(25, {'ours': train(COT)}, [
        Row(f'{COT}, first training step, nothing cached / 15 s', 'ours', ('limit',), 1.0, 'first')], 0, cached=False)
    compiled = dict(compiled=True)
    return groups + [
        first._replace(measure=lambda keys, measure=first.measure: {
            **measure(keys), 'limit': Measured(15e3, first_ms=15e3)}),
        apart(70, {'ours': infer(COT, folded=True, **compiled), 'rival': infer(RESNET, **compiled),
                   'eager rival': infer(RESNET)}, [
            Row(f'{ratio}, inference, compiled, ours folded, the better of rival compiled and eager', 'ours',
                ('rival', 'eager rival'), 0.75)]),
        apart(130, {'rival': train(RESNET, **compiled), 'ours': train(COT, **compiled)}, [
            Row(f'{ratio}, training, compiled', 'ours', ('rival',), 0.70),
            Row(f'{ratio}, first compiled training step, nothing cached', 'ours', ('rival',), 1.5, 'first')],
            cached=False),
    ]


def line_of(row: Row, results: Results, gpu: str) -> Tuple[str, Optional[float]]:
    """The line of a row, and its ratio."""
    field = {'memory': 'megabytes', 'first': 'first_ms'}.get(row.quantity, 'ms')
    cells, values = [], []
    for keys in ((row.ours,), row.rivals):
        found = [getattr(results[key], field) for key in keys if isinstance(results[key], Measured)]
        values.append(min(found, default=None))
        unit = 'MB' if field == 'megabytes' else 'ms'
        cells.append(f'{values[-1]:.4g} {unit}' if found else f'not run: {results[keys[0]]}')
    ratio, holds, bound = None, '', ''
    if None not in values:
        ours, rival = values
        ratio = rival / ours if row.quantity == 'throughput' else ours / rival
    if row.goal:
        bound = f'{"at least" if row.quantity == "throughput" else "at most"} {row.goal}'
        if row.only_on not in gpu:
            holds = f'only on an {row.only_on}'
        elif ratio is not None and ratio == ratio:
            holds = 'yes' if (ratio >= row.goal if row.quantity == 'throughput' else ratio <= row.goal) else 'NO'
    number = '' if ratio is None else f'{ratio:.3f}'
    return f'| {row.name} | {" | ".join(cells)} | {number} | {bound} | {holds} |', ratio


def profile_network(work: str, name: str, args: argparse.Namespace) -> str:
    """Kernels of one training step or folded inference pass, and the host's time to enqueue it."""
    task = make_task(work, name, args.batch or 256, args.size, args.device, folded=work == 'inference')
    for _ in range(2):
        task()
    times = []
    for _ in range(5):
        _synchronize(args.device)
        start = time.perf_counter()
        task()
        times.append(1e3 * (time.perf_counter() - start))
    _synchronize(args.device)
    found = kernels(task, args.device)
    total, products = sum(ms for ms, _ in found.values()), sum(ms for k, (ms, _) in found.items() if is_product(k))
    lines = [f'{statistics.median(times):.2f} ms to enqueue; {total:.2f} ms in {sum(n for _, n in found.values()):.0f} '
             f'kernels, of which {products:.2f} ms in convolutions and matrix products, {total - products:.2f} ms in '
             f'the rest', '', '| ms | calls | product | kernel |', '| --- | --- | --- | --- |']
    lines += [f'| {ms:.3f} | {count:.0f} | {"yes" if is_product(kernel) else ""} | {one_line(kernel)} |'
              for kernel, (ms, count) in list(found.items())[:40]]
    return '\n'.join(lines)


# Reporting


class Report:
    """Prints each line as it comes, keeps all in two files, and knows how much time is left."""

    def __init__(self, args: argparse.Namespace):
        self._folder, self._end = args.output, time.perf_counter() + 60 * args.minutes
        self._start = time.perf_counter()
        self.details: Dict[str, object] = {}
        self._data = dict(header=header(args.device), lines=[], rows=[], details=self.details, unfinished=[])
        self._write(self._data['header'])

    def left(self) -> float:
        return self._end - time.perf_counter()

    def allows(self, name: str, seconds: float) -> bool:
        """Whether there is time for it; if not, its name is kept."""
        if self.left() < seconds:
            self._data['unfinished'].append(name)
            return False
        return True

    def line(self, text: str, **row) -> None:
        if row:
            self._data['rows'].append(dict(row, seconds=round(time.perf_counter() - self._start, 1)))
        self._write(text)

    def end(self) -> None:
        names = self._data['unfinished']
        self._write(f'\n{time.perf_counter() - self._start:.0f} s' + '; no time was left for:' * bool(names))
        for name in names:
            self._write(f'- {name}')

    def _write(self, text: str) -> None:
        print(text, flush=True)
        self._data['lines'].append(text)
        (self._folder / 'gpu.md').write_text('\n'.join(self._data['lines']) + '\n')
        (self._folder / 'gpu.json').write_text(json.dumps(self._data, indent=1) + '\n')


def header(device: str) -> str:
    """Where it runs: GPU, versions, date, commit."""
    name = 'no GPU'
    if device == 'cuda':
        facts = torch.cuda.get_device_properties(0)
        name = f'{facts.name}, {facts.total_memory / 2 ** 30:.0f} GiB, {facts.multi_processor_count} multiprocessors'
    try:
        import triton
        triton_version = triton.__version__
    except ImportError:
        triton_version = 'none'
    commit = 'unknown'
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=HERE, capture_output=True, text=True,
                                timeout=10, check=True).stdout.strip()
    return (f'{name}; Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN '
            f'{torch.backends.cudnn.version()}, Triton {triton_version}, timm {timm.__version__}; '
            f'{datetime.datetime.now():%Y-%m-%d %H:%M}, commit {commit}')


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', action='append', metavar='TEXT', help='only what has this in its name; repeatable')
    parser.add_argument('--list', action='store_true', help='print the names and leave')
    parser.add_argument('--minutes', type=float, default=5., help='nothing is begun that would take longer in all')
    parser.add_argument('--seconds', type=float, default=1., help='of measuring each side of a row')
    parser.add_argument('--batch', type=int, help='for a trial; 256 and 128 otherwise')
    parser.add_argument('--size', type=int, default=224, help='pixels')
    parser.add_argument('--device', default='cuda', choices=('cuda', 'cpu'))
    parser.add_argument('--profile', action='store_true', help='kernels of a training step and an inference pass, too')
    parser.add_argument('--output', type=Path, default=Path('.'), help='folder for gpu.md and gpu.json')
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available() and not args.list:
        parser.error('PyTorch finds no GPU here; --device cpu tries the rest')
    args.output.mkdir(parents=True, exist_ok=True)

    def wanted(name: str) -> bool:
        return args.only is None or any(text in name for text in args.only)

    checks = [check._replace(name=f'check: {check.name}') for check in all_checks()]
    checks = [check for check in checks if wanted(check.name)]
    profiles = [(f'profile: {work}, {name}', work, name) for work in ('training', 'inference')
                for name in (COT, RESNET)] if args.profile else []
    profiles = [entry for entry in profiles if wanted(entry[0])]
    if args.list:
        names = [row.name for group in all_groups(args, None) for row in group.rows if wanted(row.name)]
        return print('\n'.join([check.name for check in checks] + [name for name, *_ in profiles] + names))

    report = Report(args)
    for check in checks:
        if report.allows(check.name, check.seconds):
            run_check(check, args, report)
    for name, work, network in profiles:
        if report.allows(name, 12):
            try:
                report.line(f'\n### {name}\n\n{profile_network(work, network, args)}')
            except Exception as error:
                report.line(f'\n### {name}\n\nnot run: {reason_of(error)}')
            _free(args.device)
    gpu = torch.cuda.get_device_name() if args.device == 'cuda' else ''
    report.line('\n| work | ours | other | ratio | goal | holds |\n| --- | --- | --- | --- | --- | --- |')
    for group in all_groups(args, report):
        rows = [row for row in group.rows if wanted(row.name) and report.allows(row.name, group.seconds)]
        if not rows:
            continue
        try:
            results = group.measure({key for row in rows for key in (row.ours, *row.rivals)})
        except Exception as error:
            results = dict.fromkeys([key for row in rows for key in (row.ours, *row.rivals)], reason_of(error))
        for row in rows:
            line, ratio = line_of(row, results, gpu)
            report.line(line, name=row.name, ratio=ratio, goal=row.goal, quantity=row.quantity,
                        sides={key: as_json(results[key]) for key in (row.ours, *row.rivals)})
        _free(args.device)
    report.end()


def run_check(check, args: argparse.Namespace, report: Report) -> None:
    try:
        with exact_float32():
            verdict, text = 'ok', check.run(args.device)
    except CannotRun as reason:
        verdict, text = 'skipped', str(reason)
    except Exception as error:
        verdict, text = 'FAILED', reason_of(error)
    report.line(f'- {verdict} {check.name}: {text}', name=check.name, verdict=verdict, numbers=text)
    _free(args.device)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--work']:
        engines.serve(make_waiting_task, json.loads(sys.argv[2]))
    else:
        main()
