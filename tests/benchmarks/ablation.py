"""What each CPU kernel brings to CoTNet-50 on this machine: `python tests/benchmarks/ablation.py`.

Each part is left out in turn, and the time without it is divided by the time with it. Every configuration has a process
of its own, and they run in turn; medians are compared. Lines are counted in the files of a part, and in all that these
need. Prints the table and writes it, as it comes, to `ablation.md` in `--output`.
"""
import argparse
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import engines
import torch
from engines import CannotRun, Result, Spec, Task, take_turns

from timm_cotnet.ops import conditions, dispatch, onednn
from timm_cotnet.ops.contexts import ContextsParameters, ContextsSettings, contexts

OPS = Path(dispatch.__file__).parent
TRAINING = ('training step, batch 8, float32',)
LAYERS = 'CoT layers in training: C kernels and products of matrices'


class Part(NamedTuple):
    """What can be left out.

    Args:
        name: What it is.
        leave_out: Makes this process work without it.
        works: Keys of `WORKS` that it has a share in.
        files: What it mainly is, below `timm_cotnet/ops`.
        shared: What it needs besides, and others need as well; headers that C files include come by themselves.
    """
    name: str
    leave_out: Callable[[], object]
    works: Tuple[str, ...]
    files: Tuple[str, ...]
    shared: Tuple[str, ...] = ()


def _without_row(kind: str) -> Callable[[], object]:
    return lambda: dispatch._ON_CPU.pop(kind)


def _contexts_by_definition() -> None:
    """The CoT layers' convolutions stay packed, and what is behind them is plain PyTorch."""
    def contexts_folded(value, logits, static, parameters, kernel_size, dilation, groups, filter_eps):
        filter_weight, filter_bias, shift, weight1, bias1, weight2, bias2 = parameters
        p = ContextsParameters(
            None, None, filter_weight, filter_bias, None, shift, weight1, bias1, None, None, weight2, bias2)
        filters = logits.shape[1] // kernel_size ** 2
        s = ContextsSettings(kernel_size, dilation, groups, filters, filter_eps=filter_eps)
        return contexts(value, logits, static, p, s)
    _replace(conditions.cpu.stand_ins, 'contexts_folded', contexts_folded)


def _without_norms() -> None:
    """Batch norms of bottlenecks are PyTorch's."""
    def norm_act(x, norm, residual=None, shortcut=None, relu=True):
        out = norm(x)
        if residual is not None:
            out += residual
        return torch.relu_(out) if relu else out
    _replace(conditions.cpu.stand_ins, '_norm_act', norm_act)


def _without_pointwise() -> None:
    """1x1 convolutions of bottlenecks are PyTorch's in training, with its gradients."""
    _replace(conditions.cpu.stand_ins, 'run_pointwise', lambda conv, x: conv(x))
    _replace(conditions.cpu.stand_ins, 'run_pointwise_with_shortcut', lambda conv, x: (conv(x), x))


def _replace(module: ModuleType, name: str, value: object) -> None:
    getattr(module, name)  # what is not there would be left out without a trace
    setattr(module, name, value)


# What runs: a spec, and the parts that are left out from the beginning
WORKS: Dict[str, Tuple[Spec, Tuple[str, ...]]] = {
    **{f'inference, batch {batch}, {dtype}': (dict(work='inference', batch=batch, dtype=dtype), ())
       for dtype in ('float32', 'bfloat16') for batch in (1, 8)},
    **{f'inference, not folded, batch {batch}, float32': (dict(work='inference', batch=batch, folded=False), ())
       for batch in (1, 8)},
    TRAINING[0]: (dict(work='training', batch=8), ()),
    f'{TRAINING[0]}, without CoT layers': (dict(work='training', batch=8), (LAYERS,)),
}
FOLDED = tuple(name for name, (spec, _) in WORKS.items() if spec['work'] == 'inference' and spec.get('folded', True))
OWN_LOCAL_CONV = tuple(name for name in WORKS if 'not folded' in name or 'without' in name)
BINDINGS = ('cpu/build.py', 'cpu/contexts.py', 'cpu/local_conv.py', 'cpu/stand_ins.py')

PARTS = [
    Part('CoT layers: packed convolutions and C kernel', _without_row('folded_cot_layer'), FOLDED,
         ('cpu/contexts_folded.c',), (*BINDINGS, 'onednn.py')),
    Part('C kernel of contexts in folded layers', _contexts_by_definition, FOLDED,
         ('cpu/contexts_folded.c',), BINDINGS),
    Part('packed filters, kept', lambda: _replace(onednn, 'kept', lambda *args, **kwargs: None), FOLDED,
         ('onednn.py',)),
    Part('packed convolutions in bottlenecks', _without_row('folded_bottleneck'), FOLDED, ('onednn.py',)),
    Part(LAYERS, _without_row('cot_layer'), TRAINING, ('cpu/contexts_training.c', 'cpu/cot_layer.py'),
         ('cpu/build.py', 'cpu/contexts.py', 'cpu/local_conv.py', 'cpu/batch_norm.c', 'cpu/batch_norm.py',
          'cot_layer.py', 'compiled.py')),
    Part('C kernels of batch norms in bottlenecks in training', _without_norms, TRAINING,
         ('cpu/batch_norm.c', 'cpu/batch_norm.py'), ('cpu/build.py', 'cpu/stand_ins.py')),
    Part('products of matrices for gradients of 1x1 convolutions in bottlenecks', _without_pointwise, TRAINING,
         ('pointwise.py',)),
    Part('both: what is not CoT in training', lambda: (_without_norms(), _without_pointwise()), TRAINING,
         ('cpu/batch_norm.c', 'cpu/batch_norm.py', 'pointwise.py'), ('cpu/build.py', 'cpu/stand_ins.py')),
    Part('C local convolution', lambda: _replace(conditions, 'why_not_native_local_conv', lambda *args: 'left out'),
         OWN_LOCAL_CONV, ('cpu/local_conv.c', 'cpu/local_conv.py'), ('cpu/build.py',)),
]


def make_task(without: List[str], **spec) -> Task:
    """The task of a spec in this process, which from now on works without these parts."""
    dtype = getattr(torch, spec.get('dtype', 'float32'))
    reason = 'ops/cpu is missing' if conditions.cpu is None else conditions.cpu.why_not(dtype)
    if reason is not None:
        raise CannotRun(reason)
    for part in PARTS:
        if part.name in without:
            part.leave_out()
    return engines.make_task(name='cotnet50', **spec)


def count_lines(part: Part) -> Tuple[int, int]:
    """Lines of what a part mainly is, and of all files that it needs."""
    found: Dict[Path, int] = {}
    waiting = [OPS / name for name in part.files + part.shared]
    while waiting:
        path = waiting.pop()
        text = path.read_text()
        found[path] = len(text.splitlines())
        headers = [path.with_name(name) for name in re.findall(r'^#include "(.*)"', text, flags=re.M)]
        waiting += [header for header in headers if header not in found]
    return sum(found[OPS / name] for name in part.files), sum(found.values())


def row_name(work: str, part: Part) -> str:
    return f'{work}: {part.name}'


def run(work: str, parts: List[Part], seconds: float) -> List[str]:
    """The lines of the table for parts that are left out of one work."""
    spec, base = WORKS[work]
    specs = [dict(spec, without=[*base, *left_out]) for left_out in ([], *([part.name] for part in parts))]
    with_all, *without = take_turns(__file__, specs, seconds)
    lines = []
    for part, result in zip(parts, without):
        cells = [f'{r.milliseconds:.4g} ms' if isinstance(r, Result) else f'not run: {r}' for r in (with_all, result)]
        both = isinstance(with_all, Result) and isinstance(result, Result)
        ratio = f'{result.milliseconds / with_all.milliseconds:.3f}' if both else ''
        own, needed = count_lines(part)
        lines.append(f'| {work} | {part.name} | {" | ".join(cells)} | {ratio} | {own} | {needed} |')
    return lines


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', nargs='+', default=[''], metavar='TEXT',
                        help='only rows whose name contains one of these')
    parser.add_argument('--list', action='store_true', help='print the names of the rows and leave')
    parser.add_argument('--seconds', type=float, default=10., help='for each configuration')
    parser.add_argument('--quick', action='store_true', help='a tenth of the time: a look, not a result')
    parser.add_argument('--output', type=Path, default=Path('.'), help='folder for ablation.md')
    args = parser.parse_args(argv)
    selected = {work: [part for part in PARTS if work in part.works
                       and any(text in row_name(work, part) for text in args.rows)] for work in WORKS}
    if args.list:
        return print('\n'.join(row_name(work, part) for work, parts in selected.items() for part in parts))

    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / 'ablation.md', 'w') as file:
        def write(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        write(f'{engines.hardware()}\n')
        write('| work | left out | with | without | without / with | its lines | with what it shares |')
        write('| --- | --- | --- | --- | --- | --- | --- |')
        for work, parts in selected.items():
            if parts:
                for line in run(work, parts, args.seconds / (10 if args.quick else 1)):
                    write(line)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--work']:
        engines.serve(make_task, json.loads(sys.argv[2]))
    else:
        main()
