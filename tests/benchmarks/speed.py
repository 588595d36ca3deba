"""Speed of CoTNet against its rivals, on this machine: `python tests/benchmarks/speed.py`.

Both sides of a row run in turn, each in the memory format that suits it better; medians are compared. Networks on the
CPU have a process each: what one leaves of its memory would decide how much of it the other has to ask for anew.
Prints the table and writes it to `speed.md` and `speed.png` in `--output`. A row that cannot run here says why.
"""
import argparse
import contextlib
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

import timm
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import timm_cotnet.layers
from timm_cotnet import local_conv

FORMATS = {'contiguous': torch.contiguous_format, 'channels-last': torch.channels_last}
NAMES = ('cotnet50', 'resnet50')
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels and side of the CoT layers of each stage
Task = Callable[[], object]
Sides = Tuple[Dict[str, Task], Dict[str, Task]]  # ours and the other one's, by memory format


@dataclass
class Row:
    """One line of the table.

    Args:
        name: What is compared.
        goal: Bound of the ratio of ours to the other.
        run: Measures both sides; returns what they took, and the memory format of each.
        unit: Of what run returns.
        at_least: Whether the goal is a lower bound, as for throughput.
    """
    name: str
    goal: float
    run: Callable[[], Tuple[float, float, str]]
    unit: str = 'ms'
    at_least: bool = False


class CannotRun(Exception):
    """This machine cannot run a row; the message says why."""


SECONDS = 6.0  # for each row and side; --quick takes a tenth
TURN = 0.3  # seconds of a network's turn: enough to warm caches up again


def measure(sides: Sides) -> Tuple[float, float, str]:
    """Median milliseconds of each side in its better format; all candidates run in turn."""
    tasks = [(side, name, task) for side, candidates in enumerate(sides) for name, task in candidates.items()]
    times: Dict[Tuple[int, str], List[float]] = {(side, name): [] for side, name, _ in tasks}
    for _, _, task in tasks:
        task()
    end = time.perf_counter() + SECONDS * len(tasks)
    while time.perf_counter() < end or len(times[tasks[0][:2]]) < 3:
        for side, name, task in tasks:
            start = time.perf_counter()
            task()
            times[side, name].append(1e3 * (time.perf_counter() - start))
    return _better(times)


def _better(times: Dict[Tuple[int, str], List[float]]) -> Tuple[float, float, str]:
    best = []
    for side in (0, 1):
        best.append(min((statistics.median(t), name) for (s, name), t in times.items() if s == side))
    return best[0][0], best[1][0], ' / '.join(name for _, name in best)


def measure_apart(ours: Dict, other: Dict) -> Tuple[float, float, str]:
    """The same for the networks that `build` makes of ours and other, each candidate in a process of its own."""
    times: Dict[Tuple[int, str], List[float]] = {(side, name): [] for side in (0, 1) for name in FORMATS}
    with contextlib.ExitStack() as stack:
        workers = {}
        for side, name in times:
            command = [sys.executable, __file__, '--work', json.dumps((ours, other)[side]), name]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.stdin.close)
            workers[side, name] = process
            process.stdout.readline()  # ready
        end = time.perf_counter() + SECONDS * len(workers)
        while time.perf_counter() < end or len(times[0, 'contiguous']) < 3:
            for key, process in workers.items():
                time.sleep(0.02)  # threads of the one before may still spin
                process.stdin.write('\n')
                process.stdin.flush()
                times[key].append(float(process.stdout.readline()))
    return _better(times)


def work(network: Dict, memory_format: str) -> None:
    """For each line of standard input run the task for TURN seconds, and print the median milliseconds of a run."""
    task = build(only=memory_format, **network)[memory_format]
    task()
    task()
    print('ready', flush=True)
    for _ in sys.stdin:
        times = []
        end = time.perf_counter() + TURN
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            task()
            times.append(1e3 * (time.perf_counter() - start))
        print(statistics.median(times), flush=True)


def build(name: str, batch: int, train: bool = False, dtype: str = 'float32', official: bool = False, **kwargs):
    """Tasks for a network, see `inference` and `training`; folded for inference, except with the official formula."""
    model = timm.create_model(name)
    if train:
        return training(model, batch, **kwargs)
    if official:
        return {key: official_formula(task) for key, task in inference(model, batch, **kwargs).items()}
    model = reparameterize_model(model.eval()) if 'cotnet' in name else fold(model)
    return inference(model, batch, dtype=getattr(torch, dtype), **kwargs)


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


def evaluation_size(name: str) -> int:
    config = timm.get_pretrained_cfg(name)
    return (config.test_input_size or config.input_size)[-1]


def inference(
        model: nn.Module, batch: int, size: int = 224, dtype=torch.float32, device='cpu', compiled=False, only=None):
    """A task for each memory format that runs the model without gradients."""
    tasks = {}
    for name, memory_format in FORMATS.items():
        if only and name != only:
            continue
        net = copy.deepcopy(model).eval().to(device=device, dtype=dtype, memory_format=memory_format)
        if compiled:
            torch._dynamo.reset()
            net = torch.compile(net)
        x = torch.randn(batch, 3, size, size, device=device, dtype=dtype).to(memory_format=memory_format)
        tasks[name] = _without_grad(net, x)
    return tasks


def _without_grad(net: nn.Module, x: torch.Tensor) -> Task:
    def task():
        with torch.no_grad():
            net(x)
        _synchronize(x)
    return task


def training(model: nn.Module, batch: int, size: int = 224, device='cpu', compiled=False, only=None):
    """A task for each memory format that takes one step: forward, backward, SGD; under bf16 autocast on a GPU."""
    tasks = {}
    for name, memory_format in FORMATS.items():
        if only and name != only:
            continue
        net = copy.deepcopy(model).train().to(device=device, memory_format=memory_format)
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        x = torch.randn(batch, 3, size, size, device=device).to(memory_format=memory_format)
        target = torch.randint(1000, (batch,), device=device)
        tasks[name] = _step(torch.compile(net) if compiled else net, optimizer, x, target)
    return tasks


def _step(net: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, target: torch.Tensor) -> Task:
    def task():
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type != 'cpu'):
            loss = F.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        _synchronize(x)
    return task


def _synchronize(x: torch.Tensor) -> None:
    if x.device.type == 'cuda':
        torch.cuda.synchronize()


def official_local_conv(x: torch.Tensor, weight: torch.Tensor, kernel_size: int = 3, dilation: int = 1) -> torch.Tensor:
    """The formula of the official unit test: unfold, multiply, sum."""
    B, C, H, W = x.shape
    G, taps = weight.shape[1:3]
    columns = F.unfold(x, kernel_size, dilation, dilation * (kernel_size // 2)).view(B, C // G, G, taps, H, W)
    return (columns * weight.unsqueeze(1)).sum(3).view(B, C, H, W)


def official_formula(task: Task) -> Task:
    """The task with the official formula in every CoT layer."""
    def grouped(x, attn, kernel_size, dilation, groups):
        B, _, H, W = x.shape
        return official_local_conv(x, attn.view(B, -1, kernel_size * kernel_size, H, W), kernel_size, dilation)

    def run():
        ours = timm_cotnet.layers.grouped_local_conv
        timm_cotnet.layers.grouped_local_conv = grouped
        try:
            task()
        finally:
            timm_cotnet.layers.grouped_local_conv = ours
    return run


def operator(channels: int, side: int, backward: bool, function: Callable, batch: int = 8) -> Dict[str, Task]:
    """A task for each memory format that runs local convolution alone."""
    tasks = {}
    for name, memory_format in FORMATS.items():
        groups = channels // 8
        x = torch.randn(batch, channels, side, side).to(memory_format=memory_format).requires_grad_(backward)
        filters = torch.randn(batch, groups * 9, side, side).to(memory_format=memory_format).requires_grad_(backward)
        grad = torch.randn(batch, channels, side, side).to(memory_format=memory_format)
        tasks[name] = _operator_task(function, x, filters, grad, backward)
    return tasks


def _operator_task(
        function: Callable, x: torch.Tensor, filters: torch.Tensor, grad: torch.Tensor, backward: bool) -> Task:
    B, _, H, W = x.shape

    def task():
        out = function(x, filters.view(B, -1, 9, H, W))
        if backward:
            torch.autograd.grad(out, (x, filters), grad)
    return task


def peak_memory(name: str) -> float:
    """Peak memory of two training steps of a batch of 8 in channels-last, in MB above the start, in a new process."""
    if not Path('/proc/self/status').exists():
        raise CannotRun('peak memory is read from /proc')
    result = subprocess.run([sys.executable, __file__, '--peak', name], capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def print_peak(name: str) -> None:
    before = _peak_kilobytes()
    task = training(timm.create_model(name), 8, only='channels-last')['channels-last']
    task()
    task()
    print((_peak_kilobytes() - before) / 1024)


def _peak_kilobytes() -> int:
    """Of this process alone: `ru_maxrss` would start at what the process that started it had."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))


def needs_bf16() -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise CannotRun('oneDNN has no bfloat16 on this processor')


def needs_gpu() -> None:
    if not torch.cuda.is_available():
        raise CannotRun('no GPU')


def compare_bf16(batch: int):
    needs_bf16()
    return measure_apart(*(dict(name=name, batch=batch, dtype='bfloat16') for name in NAMES))


def compare_hybrid(**kwargs):
    names = ('se_cotnetd_101', 'resnest101e')
    return measure_apart(*(dict(name=name, size=evaluation_size(name), **kwargs) for name in names))


def compare_gpu(train: bool, compiled: bool):
    """Images per second."""
    needs_gpu()
    batch, kwargs = 256, dict(device='cuda', compiled=compiled, only='channels-last')
    if train:
        sides = tuple(build(name, batch, train=True, **kwargs) for name in NAMES)
    else:
        sides = tuple(build(name, batch, dtype='bfloat16', **kwargs) for name in NAMES)
    ours, other, formats = measure(sides)
    return 1e3 * batch / ours, 1e3 * batch / other, formats


def compare_gpu_traffic(channels: int, side: int):
    """The operator against the time that a copy of as many bytes as it has to move takes."""
    needs_gpu()
    batch = 256
    kwargs = dict(device='cuda', dtype=torch.bfloat16)
    x = torch.randn(batch, channels, side, side, **kwargs).to(memory_format=torch.channels_last)
    filters = torch.randn(batch, channels // 8 * 9, side, side, **kwargs).to(memory_format=torch.channels_last)
    weight = filters.view(batch, -1, 9, side, side)
    moved = 2 * x.numel() + filters.numel()
    source = torch.empty(moved // 2, **kwargs)
    target = torch.empty_like(source)

    def ours():
        local_conv(x, weight)
        torch.cuda.synchronize()

    def copy_():
        target.copy_(source)
        torch.cuda.synchronize()
    return measure(({'channels-last': ours}, {'copy': copy_}))


def compare_gpu_memory():
    needs_gpu()
    peaks = []
    for name in NAMES:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        training(timm.create_model(name), 256, device='cuda', only='channels-last')['channels-last']()
        peaks.append(torch.cuda.max_memory_allocated() / 2 ** 20)
    return (*peaks, 'channels-last')


def rows() -> List[Row]:
    """The whole table."""
    table = []
    for batch in (1, 8):
        what = f'CoTNet-50 / ResNet-50, inference, batch {batch}'
        table += [
            Row(f'{what}, float32', 0.80, lambda b=batch: measure_apart(*(dict(name=n, batch=b) for n in NAMES))),
            Row(f'{what}, float32, compiled', 0.85, lambda b=batch: measure_apart(
                *(dict(name=n, batch=b, compiled=True) for n in NAMES))),
            Row(f'{what}, bfloat16', 0.85, lambda b=batch: compare_bf16(b)),
        ]
    table += [
        Row('CoTNet-50 / official formula, inference, batch 8', 0.45, lambda: measure_apart(
            dict(name=NAMES[0], batch=8), dict(name=NAMES[0], batch=8, official=True))),
        Row('CoTNet-50 / ResNet-50, training step, batch 8', 0.90, lambda: measure_apart(
            *(dict(name=n, batch=8, train=True) for n in NAMES))),
        Row('CoTNet-50 / ResNet-50, training step, peak memory', 1.15,
            lambda: (*(peak_memory(name) for name in NAMES), 'channels-last'), unit='MB'),
        Row('SE-CoTNetD-101 / resnest101e, inference, batch 8', 0.8, lambda: compare_hybrid(batch=8)),
        Row('SE-CoTNetD-101 / resnest101e, training step, batch 4', 0.8, lambda: compare_hybrid(batch=4, train=True)),
    ]
    for backward in (False, True):
        for (channels, side), goal in zip(STAGES, (0.1, 0.25, 0.4, 0.5)):
            what = 'forward + backward' if backward else 'forward'
            table.append(Row(
                f'local_conv / unfold formula, {channels} x {side} x {side}, {what}', goal,
                lambda c=channels, s=side, b=backward: measure(
                    (operator(c, s, b, local_conv), operator(c, s, b, official_local_conv)))))
    table += [
        Row('local_conv, 448 / 224 (112 x 112 / 56 x 56)', 4.2, lambda: measure(
            (operator(64, 112, True, local_conv), operator(64, 56, True, local_conv)))),
        Row('CoTNet-50, inference, batch 2, 448 / 224', 4.2, lambda: measure_apart(
            dict(name=NAMES[0], batch=2, size=448), dict(name=NAMES[0], batch=2))),
    ]
    for train in (False, True):
        for compiled in (False, True):
            name = f'CoTNet-50 / ResNet-50, GPU, bf16, batch 256, {"training" if train else "inference"}'
            table.append(Row(
                name + (', compiled' if compiled else ''), 1.0,
                lambda t=train, c=compiled: compare_gpu(t, c), unit='images/s', at_least=True))
    table += [
        Row(f'local_conv / copy of its traffic, GPU, bf16, {channels} x {side} x {side}', 1.3,
            lambda c=channels, s=side: compare_gpu_traffic(c, s)) for channels, side in STAGES]
    table.append(Row('CoTNet-50 / ResNet-50, GPU, training step, peak memory', 1.15, compare_gpu_memory, unit='MB'))
    return table


def hardware() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next((line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')), name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
    return (f'{name}, {torch.get_num_threads()} threads ({torch.backends.cpu.get_cpu_capability()}); {gpu}; '
            f'PyTorch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}')


def plot(results: List[Tuple[Row, Optional[float]]], path: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    results = [(row, ratio) for row, ratio in results if ratio is not None]
    figure, axes = plt.subplots(figsize=(10, 1 + 0.3 * len(results)), layout='constrained')
    met = [ratio >= row.goal if row.at_least else ratio <= row.goal for row, ratio in results]
    y = range(len(results))
    axes.barh(y, [ratio for _, ratio in results], color=['tab:green' if ok else 'tab:orange' for ok in met])
    axes.scatter([row.goal for row, _ in results], y, marker='|', s=150, color='black', label='goal', zorder=3)
    axes.set_yticks(y, [row.name for row, _ in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale('log')
    axes.set_xlabel('ratio')
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: Optional[List[str]] = None) -> None:
    global SECONDS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', nargs='+', default=[''], metavar='TEXT',
                        help='only rows whose name contains one of these')
    parser.add_argument('--quick', action='store_true', help='shorter runs: a look, not a result')
    parser.add_argument('--output', type=Path, default=Path('.'), help='folder for speed.md and speed.png')
    parser.add_argument('--peak', help=argparse.SUPPRESS)
    parser.add_argument('--work', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.peak:
        return print_peak(args.peak)
    if args.work:
        return work(json.loads(args.work[0]), args.work[1])
    SECONDS /= 10 if args.quick else 1

    lines = [
        hardware(), '',
        '| work | ours | other | ratio | goal | memory formats |',
        '| --- | --- | --- | --- | --- | --- |']
    print('\n'.join(lines), flush=True)
    results = []
    for row in rows():
        if not any(text in row.name for text in args.rows):
            continue
        goal = f'at {"least" if row.at_least else "most"} {row.goal}'
        try:
            ours, other, formats = row.run()
        except CannotRun as reason:
            results.append((row, None))
            lines.append(f'| {row.name} | not run: {reason} | | | {goal} | |')
        else:
            results.append((row, ours / other))
            lines.append(
                f'| {row.name} | {ours:.4g} {row.unit} | {other:.4g} {row.unit} | {ours / other:.3f} | {goal} '
                f'| {formats} |')
        print(lines[-1], flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / 'speed.md').write_text('\n'.join(lines) + '\n')
    plot(results, args.output / 'speed.png')


if __name__ == '__main__':
    main()
