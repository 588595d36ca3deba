"""Exported networks in their runtimes, on this machine's CPU: `python tests/benchmarks/runtimes.py`.

CoTNets and their rivals, norms folded, static shapes, 224 x 224, in turn, each in a process of its own. Prints one
table and writes it to `runtimes.md` in `--output`. What cannot run here says why.
"""
import argparse
from pathlib import Path
from typing import List, Optional

import engines
from engines import Result, take_turns

NETWORKS = {'cotnet50': 'CoTNet-50', 'se_cotnetd_50': 'SE-CoTNetD-50', 'resnet50': 'ResNet-50',
            'resnest50d': 'ResNeSt-50d'}
RUNTIMES = ('onnxruntime', 'OpenVINO', 'OpenVINO in its default precision', 'torch.compile with freezing')
BATCHES = (1, 8)


def rows() -> List[str]:
    return [f'{runtime}, batch {batch}' for runtime in RUNTIMES for batch in BATCHES]


def line(row: str, networks: List[str], seconds: float) -> str:
    """The line of one runtime and batch: milliseconds of each network, and what CoTNet-50 takes of its rivals' time."""
    runtime, batch = row.rsplit(', batch ', 1)
    specs = [dict(work='inference', name=name, batch=int(batch), engine=runtime) for name in networks]
    found = dict(zip(networks, take_turns(engines.__file__, specs, seconds)))
    cells = [f'{result.milliseconds:.4g} ms' if isinstance(result, Result) else f'not run: {result}'
             for result in found.values()]
    for rival in ('resnet50', 'resnest50d'):
        pair = found.get('cotnet50'), found.get(rival)
        cells.append(f'{pair[0].milliseconds / pair[1].milliseconds:.2f}'
                     if all(isinstance(result, Result) for result in pair) else '')
    return f'| {row} | {" | ".join(cells)} |'


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', nargs='+', default=[''], metavar='TEXT', help='only rows that contain one of these')
    parser.add_argument('--networks', nargs='+', default=list(NETWORKS), choices=NETWORKS, help='only these')
    parser.add_argument('--list', action='store_true', help='print the names of the rows and leave')
    parser.add_argument('--seconds', type=float, default=6., help='for each network, runtime and batch')
    parser.add_argument('--output', type=Path, default=Path('.'), help='folder for runtimes.md')
    args = parser.parse_args(argv)
    selected = [row for row in rows() if any(text in row for text in args.rows)]
    if args.list:
        return print('\n'.join(selected))
    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / 'runtimes.md', 'w') as file:
        def write(text: str) -> None:
            for target in (None, file):
                print(text, file=target, flush=True)

        write(f'{engines.hardware()}\n')
        names = [NETWORKS[name] for name in args.networks]
        write(f'| runtime | {" | ".join(names)} | CoTNet-50 / ResNet-50 | CoTNet-50 / ResNeSt-50d |')
        write('| ' + ' | '.join(['---'] * (len(names) + 3)) + ' |')
        for row in selected:
            write(line(row, args.networks, args.seconds))


if __name__ == '__main__':
    main()
