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
import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Set, Tuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]  # a checkout is enough, nothing has to be installed
os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler is silent

import engines  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from engines import CannotRun, Spec  # noqa: E402
from gpu_checks import Check, all_checks, exact_float32  # noqa: E402
from gpu_measure import (  # noqa: E402
    Measured, Results, as_json, free, make_waiting_task, measure_apart, measure_here, measure_layer, profile_network,
    reason_of)

COT, RESNET = 'cotnet50', 'resnet50'
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels and side of the CoT layers of each stage
OFFICIAL = 130.4 / 128  # ms of an image: a training step of the official code at its best, float32, on an H200


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


# Rows


def all_groups(args: argparse.Namespace, left: Callable[[], float], details: Dict[str, object]) -> List[Group]:
    """All that is measured, in turn: what compiles comes last.

    Args:
        args: Of the command.
        left: Gives the seconds that are left.
        details: Where the names and times of kernels go.
    """
    batch, ratio = args.batch or 256, f'{COT} / {RESNET}'
    common = dict(batch=batch, size=args.size, device=args.device)

    def here(seconds: float, specs: Dict[str, Spec], rows: List[Row], **kwargs) -> Group:
        specs = {key: {**common, **spec} for key, spec in specs.items()}
        return Group(seconds, partial(measure_here, specs, args.seconds, **kwargs), rows)

    def apart(seconds: float, specs: Dict[str, Spec], rows: List[Row], each: float = args.seconds, **kwargs) -> Group:
        specs = {key: {**common, **spec} for key, spec in specs.items()}
        return Group(seconds, partial(measure_apart, specs, each, left, **kwargs), rows)

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
        groups.append(Group(8, partial(measure_layer, args, details, channels, side), [
            Row(f'{what}, {channels} x {side} x {side}, {direction}', f'{key} {direction}',
                (f'{key} {direction} copy',), goal, 'time')
            for key, what, goal in (
                ('layer', 'kernels of a CotLayer that are no convolutions by their names / copy of 10, 22 units', 1.5),
                ('operator', 'local_conv / copy of its traffic', 1.3))
            for direction in ('forward', 'backward')]))
    first = apart(25, {'ours': train(COT)}, [
        Row(f'{COT}, first training step, nothing cached / 15 s', 'ours', ('limit',), 1.0, 'first')], 0, cached=False)
    groups += [first._replace(measure=lambda keys, measure=first.measure: {
        **measure(keys), 'limit': Measured(15e3, first_ms=15e3)})]
    for mode, text in (('reduce-overhead', 'compiled to CUDA graphs'), ('default', 'compiled')):
        compiled = dict(compiled=mode)
        inference = apart(70, {'ours': infer(COT, folded=True, **compiled), 'rival': infer(RESNET, **compiled),
                               'eager rival': infer(RESNET)}, [
            Row(f'{ratio}, inference, {text}, ours folded, the better of rival {text} and eager', 'ours',
                ('rival', 'eager rival'), 0.75)])
        training = apart(130, {'rival': train(RESNET, **compiled), 'ours': train(COT, **compiled)}, [
            Row(f'{ratio}, training, {text}', 'ours', ('rival',), 0.70),
            Row(f'{ratio}, first training step, {text}, nothing cached', 'ours', ('rival',), 1.5, 'first')],
            cached=False)
        groups += [inference, training]
    return groups


def line_of(row: Row, results: Results, gpu: str) -> Tuple[str, Optional[float]]:
    """The line of a row, and its ratio."""
    field = {'memory': 'megabytes', 'first': 'first_ms'}.get(row.quantity, 'ms')
    cells, values = [], []
    for keys in ((row.ours,), row.rivals):
        found = [getattr(results[key], field) for key in keys if isinstance(results[key], Measured)]
        if any(map(math.isnan, found)) or 0. in found:
            return f'| {row.name} | not run: needs CUDA | | | | |', None
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
        elif ratio is not None:
            holds = 'yes' if (ratio >= row.goal if row.quantity == 'throughput' else ratio <= row.goal) else 'NO'
    number = '' if ratio is None else f'{ratio:.3f}'
    return f'| {row.name} | {" | ".join(cells)} | {number} | {bound} | {holds} |', ratio


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
    parser.add_argument('--skip', action='append', metavar='TEXT', default=[], help='nothing that has this in its name')
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
        selected = args.only is None or any(text in name for text in args.only)
        return selected and not any(text in name for text in args.skip)

    checks = [check._replace(name=f'check: {check.name}') for check in all_checks()]
    checks = [check for check in checks if wanted(check.name)]
    profiles = [(f'profile: {work}, {name}', work, name) for work in ('training', 'inference')
                for name in (COT, RESNET)] if args.profile else []
    profiles = [entry for entry in profiles if wanted(entry[0])]
    if args.list:
        names = [row.name for group in all_groups(args, float, {}) for row in group.rows if wanted(row.name)]
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
            free(args.device)
    gpu = torch.cuda.get_device_name() if args.device == 'cuda' else ''
    report.line('\n| work | ours | other | ratio | goal | holds |\n| --- | --- | --- | --- | --- | --- |')
    for group in all_groups(args, report.left, report.details):
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
        free(args.device)
    report.end()


def run_check(check: Check, args: argparse.Namespace, report: Report) -> None:
    try:
        with exact_float32():
            verdict, text = 'ok', check.run(args.device)
    except CannotRun as reason:
        verdict, text = 'skipped', str(reason)
    except Exception as error:
        verdict, text = 'FAILED', reason_of(error)
    report.line(f'- {verdict} {check.name}: {text}', name=check.name, verdict=verdict, numbers=text)
    free(args.device)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--work']:
        engines.serve(make_waiting_task, json.loads(sys.argv[2]))
    else:
        main()
