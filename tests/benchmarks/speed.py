"""Speed of CoTNet against its rivals, on this machine's CPU: `python tests/benchmarks/speed.py`.

Both sides of a row run in turn, each network in a process of its own and in the memory format that suits it better;
medians are compared. There is a row for each engine, and one in which each side has the engine that suits it best.
Prints the tables and writes them to `speed.md`, as they come, and to `speed.png` in `--output`. What cannot run here
says why.
"""
import argparse
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple, Union

import engines
import timm
from engines import LAYOUTS, Result, Spec, take_turns

CNN, HYBRID = ('cotnet50', 'resnet50'), ('se_cotnetd_101', 'resnest101e')
PYTORCH = ('eager', 'torch.compile', 'torch.compile with freezing')
FLOAT32 = (*PYTORCH, 'onnxruntime', 'OpenVINO')
TRAINING = ('eager', 'torch.compile')
OWN = 'OpenVINO in its default precision'
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels and side of the CoT layers of each stage
BEST = 'best against best'


class Race(NamedTuple):
    """What runs in turn.

    Args:
        table: Title of the table to which its rows belong.
        name: What is compared.
        ours: Specs of our tasks.
        other: Specs of those that they are compared with.
        goals: Upper bounds of the ratio of ours to the other, by what a row's name adds to that of the race.
        memory: Whether there are rows for the peak memory as well.
    """
    table: str
    name: str
    ours: List[Spec]
    other: List[Spec]
    goals: Dict[str, float] = {}
    memory: bool = False


class Row(NamedTuple):
    """One line of a table."""
    name: str
    race: Race
    engine: Optional[str]  # None: each side's best
    unit: str
    goal: Optional[float]


def rows_of(race: Race) -> List[Row]:
    """The rows of a race: its engines, the best of each side, and the peak memory."""
    names = list(dict.fromkeys(map(engine_of, race.ours)))
    chosen = {**{name: name for name in names}, BEST: None} if len(names) > 1 else {'': None}
    rows = [(suffix, engine, 'ms') for suffix, engine in chosen.items()]
    if race.memory:
        rows += [(_join(suffix, 'peak memory'), engine, 'MB') for suffix, engine in chosen.items() if suffix != BEST]
    return [Row(_join(race.name, suffix), race, engine, unit, race.goals.get(suffix)) for suffix, engine, unit in rows]


def _join(*parts: str) -> str:
    return ', '.join(filter(None, parts))


def engine_of(spec: Spec) -> str:
    return spec.get('engine', 'eager')


def in_engines(names: Tuple[str, ...], **spec) -> List[Spec]:
    """The spec in each engine, in both memory formats where it runs eagerly."""
    return [dict(spec, engine=name, layout=layout) for name in names for layout in LAYOUTS
            if layout == 'channels-last' or name == 'eager']


def in_layouts(**spec) -> List[Spec]:
    return [dict(spec, layout=layout) for layout in LAYOUTS]


def evaluation_size(name: str) -> int:
    config = timm.get_pretrained_cfg(name)
    return (config.test_input_size or config.input_size)[-1]


def inference_races(table: str, batch: int) -> List[Race]:
    """CoTNet-50 against ResNet-50 in every engine, in float32 and in bfloat16."""
    races = []
    for dtype, names in (('float32', FLOAT32), ('bfloat16', PYTORCH)):
        sides = []
        for name in CNN:
            spec = dict(work='inference', name=name, batch=batch)
            sides.append(in_engines(names, dtype=dtype, **spec) + [dict(spec, engine=OWN)] * (dtype == 'bfloat16'))
        races.append(Race(
            table, f'CoTNet-50 / ResNet-50, inference, batch {batch}, {dtype}', *sides,
            {BEST: 0.95, 'onnxruntime': 1.25, 'OpenVINO': 1.25, OWN: 1.25}))
    return races


def all_races() -> List[Race]:
    """All that is measured, table by table."""
    first, second = 'Inference, norms folded', 'Training step'
    third = 'Hybrid networks, the official formula, scaling'
    what, training = 'CoTNet-50 / ResNet-50', dict(work='training', batch=8)
    races = [*inference_races(first, 1), *inference_races(first, 8)]
    races.append(Race(
        second, f'{what}, training step, batch 8', *(in_engines(TRAINING, name=name, **training) for name in CNN),
        {BEST: 1.0}, memory=True))

    what = 'SE-CoTNetD-101 / resnest101e'
    races.append(Race(third, f'{what}, inference, batch 8, float32', *(in_engines(
        PYTORCH, work='inference', name=name, batch=8, size=evaluation_size(name)) for name in HYBRID), {BEST: 0.8}))
    races.append(Race(third, f'{what}, training step, batch 4', *(in_engines(
        TRAINING, work='training', name=name, batch=4, size=evaluation_size(name)) for name in HYBRID), {BEST: 0.8}))
    for work, title, goals in (('inference', 'inference', {'': 0.45}), ('training', 'training step', {})):
        spec = dict(work=work, name=CNN[0], batch=8)
        races.append(Race(
            third, f'CoTNet-50 / official formula, {title}, batch 8', in_layouts(**spec),
            in_layouts(official=True, **spec), goals, memory=work == 'training'))
    for backward, direction in ((False, 'forward'), (True, 'forward + backward')):
        for (channels, side), goal in zip(STAGES, (0.1, 0.25, 0.4, 0.5)):
            spec = dict(work='operator', channels=channels, side=side, backward=backward)
            races.append(Race(
                third, f'local_conv / unfold formula, {channels} x {side} x {side}, {direction}',
                in_layouts(function='local_conv', **spec), in_layouts(function='formula', **spec), {'': goal}))
    spec = dict(work='operator', function='local_conv', channels=64, backward=True)
    races.append(Race(third, 'local_conv, 448 / 224 (112 x 112 / 56 x 56)', in_layouts(side=112, **spec),
                      in_layouts(side=56, **spec), {'': 4.2}))
    spec = dict(work='inference', name=CNN[0], batch=2)
    races.append(Race(third, 'CoTNet-50, inference, batch 2, 448 / 224', in_layouts(size=448, **spec),
                      in_layouts(size=224, **spec), {'': 4.2}))
    return races


def run(rows: List[Row], seconds: float) -> List[Tuple[str, Optional[float]]]:
    """The lines of rows of one race, and their ratios."""
    race = rows[0].race
    wanted = {row.engine for row in rows}
    specs = [spec for spec in race.ours + race.other if None in wanted or engine_of(spec) in wanted]
    found = take_turns(engines.__file__, specs, seconds)
    lines = []
    for row in rows:
        sides = []
        for side in (race.ours, race.other):
            results = [(spec, result) for spec, result in zip(specs, found)
                       if spec in side and row.engine in (None, engine_of(spec))]
            sides.append(best(results, row))
        (ours, text, how), (other, other_text, other_how) = sides
        ratio = ours / other if ours is not None and other is not None else None
        goal = f'at most {row.goal}' if row.goal else ''
        number = '' if ratio is None else f'{ratio:.3f}'
        how = f'{how} / {other_how}' if how or other_how else ''
        lines.append((f'| {row.name} | {text} | {other_text} | {number} | {goal} | {how} |', ratio))
    return lines


def best(results: List[Tuple[Spec, Union[Result, str]]], row: Row) -> Tuple[Optional[float], str, str]:
    """Of one side the number of the fastest, the cell that says it, and what the fastest is."""
    ran = [(result, spec) for spec, result in results if isinstance(result, Result)]
    if not ran:
        return None, f'not run: {results[0][1]}', ''
    result, spec = min(ran, key=lambda pair: pair[0].milliseconds)
    value = result.milliseconds if row.unit == 'ms' else result.megabytes
    how = [engine_of(spec)] if row.engine is None and len({engine_of(s) for s, _ in results}) > 1 else []
    how += [spec['layout']] if 'layout' in spec and engine_of(spec) in PYTORCH else []
    return value, f'{value:.4g} {row.unit}', _join(*how)


def plot(results: List[Tuple[Row, float]], path: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(11, 1 + 0.3 * len(results)), layout='constrained')
    colors = ['tab:blue' if row.goal is None else 'tab:green' if ratio <= row.goal else 'tab:orange'
              for row, ratio in results]
    axes.barh(range(len(results)), [ratio for _, ratio in results], color=colors)
    goals = [(row.goal, y) for y, (row, _) in enumerate(results) if row.goal is not None]
    if goals:
        axes.scatter(*zip(*goals), marker='|', s=150, color='black', label='goal: at most', zorder=3)
        axes.legend()
    axes.set_yticks(range(len(results)), [row.name for row, _ in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale('log')
    axes.set_xlabel('ratio of ours to the other')
    figure.savefig(path, dpi=120)


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', nargs='+', default=[''], metavar='TEXT',
                        help='only rows whose name contains one of these; the best of a side is the best of what runs')
    parser.add_argument('--list', action='store_true', help='print the names of the rows and leave')
    parser.add_argument('--seconds', type=float, default=6., help='for each row, side, engine and memory format')
    parser.add_argument('--quick', action='store_true', help='a tenth of the time: a look, not a result')
    parser.add_argument('--output', type=Path, default=Path('.'), help='folder for speed.md and speed.png')
    args = parser.parse_args(argv)
    selected = [[row for row in rows_of(race) if any(text in row.name for text in args.rows)] for race in all_races()]
    selected = list(filter(None, selected))
    if args.list:
        return print('\n'.join(row.name for rows in selected for row in rows))

    args.output.mkdir(parents=True, exist_ok=True)
    results = []
    with open(args.output / 'speed.md', 'w') as file:
        def write(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        write(engines.hardware())
        table = None
        for rows in selected:
            if rows[0].race.table != table:
                table = rows[0].race.table
                write(f'\n### {table}\n')
                write('| work | ours | other | ratio | goal | how (ours / other) |')
                write('| --- | --- | --- | --- | --- | --- |')
            for row, (line, ratio) in zip(rows, run(rows, args.seconds / (10 if args.quick else 1))):
                write(line)
                if ratio is not None:
                    results.append((row, ratio))
    if results:
        plot(results, args.output / 'speed.png')


if __name__ == '__main__':
    main()
