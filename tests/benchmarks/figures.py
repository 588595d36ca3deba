"""The figures of the README, as SVG: `python tests/benchmarks/figures.py`, which writes them to `plots` beside it.

`cot_layer.svg` is drawn here. `accuracy.svg` shows published numbers: those of `timm_cotnet.published` for CoTNets, and
those of timm's repository (https://github.com/huggingface/pytorch-image-models, folder `results`) for others.
`speed.svg` shows the tables of the README, and is drawn again when they change.
"""
import re
from pathlib import Path
from typing import Dict, List, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from timm_cotnet.published import PUBLISHED

PLOTS = Path(__file__).with_name('plots')
README = Path(__file__).resolve().parents[2] / 'README.md'
BLUE, ORANGE, GREEN, GREY = '#0072b2', '#d55e00', '#009e73', '#777777'  # told apart by colour-blind people

# family: name, GMACs and top-1 accuracy. Accuracy from results-imagenet.csv: of each network at this size the best
# weights that were trained on ImageNet-1k alone. GMACs from benchmark-infer-amp-nchw-pt240-cu124-rtx4090.csv.
OTHERS = {
    'ResNet, 224 pixels': [
        ('50', 4.11, 80.846),  # resnet50.tv2_in1k
        ('101', 7.83, 81.950),  # resnet101.a1h_in1k
        ('152', 11.56, 82.818),  # resnet152.a1h_in1k
    ],
    'ResNet-D, 224 to 320 pixels': [
        ('50-D', 4.35, 80.956),  # resnet50d.ra4_e3600_r224_in1k, 224
        ('101-D', 10.55, 82.254),  # resnet101d.ra2_in1k, 256
        ('152-D', 15.41, 83.160),  # resnet152d.ra2_in1k, 256
        ('152-D @320', 24.08, 83.684),  # resnet152d.ra2_in1k, 320
    ],
    'ResNeSt, 224 to 416 pixels': [
        ('50d', 5.40, 80.958),  # resnest50d.in1k, 224
        ('101e', 13.38, 82.916),  # resnest101e.in1k, 256
        ('200e', 35.69, 83.880),  # resnest200e.in1k, 320
        ('269e', 77.69, 84.542),  # resnest269e.in1k, 416
    ],
}


class SpeedRow(NamedTuple):
    """One line of a table of the README."""
    name: str
    ours: str
    other: str
    ratio: float


def draw_layer() -> Figure:
    """The CoT layer, with the names of its children."""
    figure, ax = _axes(10.4, 4.9)
    ax.set(xlim=(0, 104), ylim=(0, 49))
    ax.axis('off')
    boxes = {  # name: x, y, width, height, colour, text
        'x': (1, 18, 11, 9, '#eeeeee', 'input\nC x H x W'),
        'key': (18, 34, 19, 10, '#cfe3f2', '3x3 convolution\n$\\tt{key\\_embed}$'),
        'static': (43, 34, 16, 10, '#9cc7e6', 'static context'),
        'embed': (37, 18, 25, 10, '#fbe1cc', 'two 1x1 convolutions\n$\\tt{embed}$'),
        'value': (18, 3, 19, 10, '#fbe1cc', '1x1 convolution\n$\\tt{conv1x1}$'),
        'local': (43, 3, 19, 10, '#f3bf96', 'filter of each pixel\nover the values'),
        'dynamic': (69, 3, 13, 10, '#ee9d60', 'dynamic\ncontext'),
        'se': (72, 34, 20, 10, '#d5ecd9', 'pool, 2 x 1x1, softmax\n$\\tt{se}$'),
        'mix': (83, 18, 19, 10, '#a8d8b0', 'weighted sum\noutput, C x H x W'),
    }
    for x, y, width, height, color, text in boxes.values():
        ax.add_patch(FancyBboxPatch(
            (x, y), width, height, boxstyle='round,pad=0,rounding_size=1.2', facecolor=color, edgecolor='#444444'))
        ax.text(x + width / 2, y + height / 2, text, ha='center', va='center', fontsize=9)

    def line(*points):
        for start, end in zip(points[:-2], points[1:-1]):
            ax.plot(*zip(start, end), color='#444444', linewidth=1.3, solid_capstyle='round')
        ax.annotate('', points[-1], points[-2], arrowprops=dict(
            arrowstyle='-|>', color='#444444', linewidth=1.3, shrinkA=0, shrinkB=0))

    line((12, 22.5), (15, 22.5), (15, 39), (18, 39))
    line((15, 22.5), (37, 22.5))
    line((12, 22.5), (15, 22.5), (15, 8), (18, 8))
    line((37, 39), (43, 39))
    line((49.5, 34), (49.5, 28))
    line((52.5, 18), (52.5, 13))
    line((37, 8), (43, 8))
    line((62, 8), (69, 8))
    line((59, 39), (72, 39))
    line((66, 39), (66, 24.5), (83, 24.5))
    line((75.5, 13), (75.5, 34))
    line((75.5, 20.5), (83, 20.5))
    line((87.5, 34), (87.5, 28))
    for x, y, text in (
            (24, 23, 'query'), (38.5, 39.5, 'key'), (53.5, 15, '3x3 filters'), (38, 8.5, 'values'),
            (88.5, 30.5, 'weights of'), (88.5, 28.6, 'the channels')):
        ax.text(x, y, text, fontsize=8, color='#444444')
    return figure


def draw_accuracy() -> Figure:
    """Accuracy over GMACs of all variants, and of others."""
    figure, ax = _axes(9, 5.2)
    families: Dict[str, List] = {'CoTNet': [], 'CoTNeXt': [], 'SE-CoTNetD': []}
    for facts in PUBLISHED.values():
        family, _, depth = facts.name.rpartition('-')
        families[family].append((depth, facts.gmacs, facts.top1))
    styles = zip(
        [*families.items(), *OTHERS.items()], (BLUE, ORANGE, GREEN, *3 * (GREY,)), 'osDv^x', 3 * (1,) + 3 * (0.8,))
    for (family, points), color, marker, alpha in styles:
        ours = family in families
        points = sorted(points, key=lambda point: point[1])
        ax.plot(
            [x for _, x, _ in points], [y for *_, y in points], marker=marker, color=color, alpha=alpha, label=family,
            linewidth=1.6 if ours else 1, linestyle='-' if ours else '--', markersize=6)
        for depth, x, y in points:
            right = family in ('CoTNet', *OTHERS) or family == 'SE-CoTNetD' and x < 10  # where there is room
            ax.annotate(
                depth, (x, y), (6, -10) if right else (-5, 6), textcoords='offset points', fontsize=8, color=color,
                ha='left' if right else 'right')
    ax.set_xscale('log')
    ticks = (3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    ax.set(xlim=(2.7, 100), ylim=(80.2, 85), xlabel='GMACs at the size of evaluation', ylabel='ImageNet-1k top-1 in %')
    ax.grid(alpha=0.3)
    ax.spines[['top', 'right']].set_visible(False)
    ax.legend(frameon=False, loc='lower right', fontsize=9)
    return figure


def speed_tables() -> Dict[str, List[SpeedRow]]:
    """The tables of the README that compare times, by what was measured on."""
    text = README.read_text()
    tables = {}
    for lead, table in re.findall(
            r'(\S[^|]*?)\n\n\| CoTNet-50 against ResNet-50 \| ours .*?\n\|[ \-|]*\n((?:\|.*\n)+)', text):
        rows, before = [], ''
        for line in table.splitlines():
            name, ours, other, ratio = (cell.strip(' `') for cell in line.strip('|').split('|'))
            name = name.replace('`', '')
            if ours.endswith('B'):  # memory
                continue
            group, colon, engine = name.partition(': ')
            before = group if colon else before
            name = f'{before}: {engine if colon else name}' if before and not name.startswith('training') else name
            rows.append(SpeedRow(name, ours, other, float(ratio)))
        tables['GPU' if 'GPU' in lead.split('\n\n')[-1] else 'CPU'] = rows
    return tables


def draw_speed() -> Figure:
    """Times of CoTNet-50 in terms of those of ResNet-50."""
    tables = speed_tables()
    figure = Figure(figsize=(9, 0.9 + 0.3 * sum(len(rows) + 1 for rows in tables.values())), layout='constrained')
    grid = figure.subplots(
        len(tables), 1, sharex=True, squeeze=False, height_ratios=[len(rows) + 1 for rows in tables.values()])[:, 0]
    for ax, (where, rows) in zip(grid, tables.items()):
        for y, row in enumerate(rows):
            ax.barh(y, row.ratio - 1, left=1, height=0.6, color=BLUE if row.ratio <= 1 else ORANGE)
            times = f'{re.sub(r" [(].*", "", row.ours)} : {re.sub(r" [(].*", "", row.other)}'
            ax.text(max(row.ratio, 1) + 0.03, y, f'{row.ratio:.2f}  ({times})', va='center', fontsize=8)
        ax.axvline(1, color='#444444', linewidth=1)
        ax.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
        ax.set_title(f'{where}: CoTNet-50 against ResNet-50', fontsize=10, loc='left')
        ax.invert_yaxis()
        ax.grid(axis='x', alpha=0.3)
        ax.spines[['top', 'right', 'left']].set_visible(False)
        ax.tick_params(axis='y', length=0)
    most = max(row.ratio for rows in tables.values() for row in rows)
    grid[-1].set(xlim=(0.7, most + 0.9), xlabel='time of CoTNet-50 / time of ResNet-50: left of 1 it is faster')
    return figure


def _axes(width: float, height: float):
    figure = Figure(figsize=(width, height), layout='constrained')
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure, figure.subplots()


FIGURES = {'cot_layer': draw_layer, 'accuracy': draw_accuracy, 'speed': draw_speed}


def draw(folder: Path) -> None:
    """Writes all figures, the same each time; white behind them, so that they can be read on any page."""
    with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'cotnet', 'font.family': 'sans-serif'}):
        for name, make in FIGURES.items():
            make().savefig(folder / f'{name}.svg', metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')), facecolor='white')


if __name__ == '__main__':
    draw(PLOTS)
