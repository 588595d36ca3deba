"""Pictures of what CoT layers see, drawn with matplotlib, and the page that shows them. See `visualize.py`.

Colour maps are those that colour-blind people can read. Maps are enlarged to the image by interpolation.
"""
import html
import textwrap
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence
from urllib.parse import quote

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

__all__ = ['Picture', 'Section', 'draw_predictions', 'draw_section', 'draw_training', 'shorten', 'write_page']

OPACITY = 0.75  # of a map over its image
DARKEST = 0.4  # grey of black in an image under a map, so that the map's colours can be told apart there
CELLS = 16  # most lines of direction in a row
COLUMNS = 4  # of Grad-CAM in a row
DPI = 110


class Picture(NamedTuple):
    """One file of the page.

    Args:
        path: The PNG file, beside the page.
        heading: What it shows, in a few words.
        text: How it is read.
        alt: What stands for it where it cannot be seen.
    """
    path: Path
    heading: str
    text: str
    alt: str


class Section(NamedTuple):
    """The part of the page about one image."""
    heading: str
    pictures: List[Picture]
    note: str = ''


FILTERS = '''\
For every pixel a CoT layer makes a small filter with which it gathers the values around the pixel. Energy: length of
the filter, brighter where it is larger. Main direction: the filters gather most along each line; the longer and
brighter it is, the clearer; a dot stands where no direction is preferred.'''
CONTEXTS = '''\
Static context: a 3x3 convolution of the keys, with the same weights at every pixel. Dynamic context: what the filter of
each pixel gathers. Colours give the length of the context vector of the pixel; a colour means the same for both
contexts of a layer, but not from one layer to another.'''
MIXING = '''\
Each channel weighs dynamic against static context; the two weights add up to 100 %. Above: how much of what is mixed
at each pixel is dynamic; orange: mostly dynamic, purple: mostly static, white: half and half. Below: how many channels
have which weight.'''
GRAD_CAM = '''\
Brighter regions speak more for the class, in the last stage of the network. Each map is scaled to its own largest
value; the percentage is the probability that the network gives to the class.'''


def draw_section(
        folder: Path,
        stem: str,
        heading: str,
        head: str,
        pixels: Tensor,
        maps: Sequence,
        cam: Optional[NamedTuple],
        class_names: Sequence[str],
        note: str = '',
) -> Section:
    """Draws all pictures of one image.

    Args:
        folder: Where files go.
        stem: How their names begin.
        heading: What the image is called on the page.
        head: What stands above each picture.
        pixels: The image as the network sees it, (H, W, 3) or (H, W, 1), from 0 to 1.
        maps: `LayerMaps` of each layer to show.
        cam: `GradCam`, if there is one.
        class_names: Name of each class.
        note: Stands below the heading.
    """
    where = f'{heading}, for layers {", ".join(layer.name for layer in maps)}'
    pictures = []
    if cam is not None:
        labels = [f'{shorten(class_names[index])}, {p:.1%}' for index, p in zip(cam.classes, cam.probabilities)]
        pictures.append(Picture(
            draw_grad_cam(folder / f'{stem}-grad-cam.png', head, pixels, cam.maps, labels), 'Grad-CAM', GRAD_CAM,
            f'Grad-CAM over {heading} for {"; ".join(labels)}'))
    for draw, name, title, text in (
            (draw_filters, 'filters', 'Dynamic filters', FILTERS),
            (draw_contexts, 'contexts', 'Static and dynamic context', CONTEXTS),
            (draw_mixing, 'mixing', 'Mixing weights', MIXING)):
        path = draw(folder / f'{stem}-{name}.png', head, pixels, maps)
        pictures.append(Picture(path, title, text, f'{title} over {where}'))
    return Section(heading, pictures, note)


def draw_filters(path: Path, head: str, pixels: Tensor, maps: Sequence) -> Path:
    """Energy and main direction of the dynamic filters of each layer."""
    figure, grid = _grid(f'Dynamic filters: {head}', FILTERS, pixels, maps)
    for (above, below), layer in zip(grid, maps):
        energy = layer.energy()
        overlay(above, pixels, energy, 'viridis', *_limits(energy), 'length of the filter')
        _draw_lines(below, pixels, *layer.direction())
    _name_rows(grid, 'energy', 'main direction')
    return _save(figure, path)


def draw_contexts(path: Path, head: str, pixels: Tensor, maps: Sequence) -> Path:
    """Length of the static and of the dynamic context of each layer, on one scale."""
    figure, grid = _grid(f'Static and dynamic context: {head}', CONTEXTS, pixels, maps)
    for axes, layer in zip(grid, maps):
        lengths = torch.stack([layer.static, layer.dynamic]).norm(dim=1)
        low, high = _limits(lengths)
        for ax, values in zip(axes, lengths):
            overlay(ax, pixels, values, 'magma', low, high, 'length of the vector')
    _name_rows(grid, 'static context', 'dynamic context')
    return _save(figure, path)


def draw_mixing(path: Path, head: str, pixels: Tensor, maps: Sequence) -> Path:
    """Share of the dynamic context in the mix at each pixel, and the weights of the channels."""
    figure, grid = _grid(f'Mixing weights: {head}', MIXING, pixels, maps)
    for (above, below), layer in zip(grid, maps):
        overlay(above, pixels, 100 * layer.dynamic_share(), 'PuOr_r', 0, 100, 'dynamic part in %')
        weights = 100 * layer.mixing[0]
        _, edges, bars = below.hist(weights.numpy(), bins=np.linspace(0, 100, 26), edgecolor='#888888', linewidth=0.5)
        for edge, bar in zip(edges, bars):
            bar.set_facecolor(colormaps['PuOr_r']((edge + 2) / 100))
        below.axvline(weights.mean().item(), color='black', linestyle='--')
        below.set_title(f'mean {weights.mean():.0f} %', fontsize=9)
        below.set(xlim=(0, 100))
        below.set_xlabel('weight of dynamic context in %', fontsize=8)
        below.tick_params(labelsize=8)
        below.yaxis.get_major_locator().set_params(integer=True)
    _name_rows(grid, 'dynamic part', 'number of channels')
    return _save(figure, path)


def draw_grad_cam(path: Path, head: str, pixels: Tensor, maps: Tensor, labels: Sequence[str]) -> Path:
    """The image, and the Grad-CAM of each class over it."""
    count = 1 + len(labels)
    columns, rows = min(count, COLUMNS), -(-count // COLUMNS)
    figure = Figure(figsize=_size(pixels, columns, rows), layout='constrained')
    _explain(figure, f'Grad-CAM: {head}', GRAD_CAM)
    first, *others = figure.subplots(rows, columns, squeeze=False).flat
    for ax in others[len(labels):]:
        ax.axis('off')
    first.imshow(_grey_or_colour(pixels).numpy(), cmap='gray', vmin=0, vmax=1)
    first.set_title('as the network sees it', fontsize=10)
    first.set(xticks=[], yticks=[])
    for ax, values, label in zip(others, maps, labels):
        overlay(ax, pixels, values / values.max().clamp(min=torch.finfo(values.dtype).tiny), 'inferno', 0, 1,
                'part of the largest value' if values.max() > 0 else 'nothing speaks for it')
        ax.set_title(plain(label), fontsize=10)
    return _save(figure, path)


def draw_training(path: Path, title: str, losses: Sequence[float], floor: float, accuracies: Sequence[float]) -> Path:
    """The training curve: loss of each step, and accuracy after each epoch.

    Args:
        path: The PNG file.
        title: What stands above.
        losses: Loss of each step.
        floor: Least loss that there can be.
        accuracies: Percentage of held-out images that are right after each whole epoch.
    """
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    figure.suptitle(plain(title), fontsize=12)
    left, right = figure.subplots(1, 2)
    steps = np.arange(1, len(losses) + 1)
    left.plot(steps, losses, '-' if len(losses) > 20 else '.-', color='#99b3cc', linewidth=1, label='each step')
    window = len(losses) // 20
    if window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, 'valid')
        left.plot(steps[:len(smooth)] + (window - 1) / 2, smooth, color='#225588', label=f'mean of {window} steps')
    left.axhline(floor, color='black', linestyle='--', linewidth=1, label=f'least possible, {floor:.2f}')
    left.set(xlabel='step', ylabel='training loss', ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    right.plot(np.arange(1, len(accuracies) + 1), accuracies, 'o-', color='#aa5500')
    for epoch, value in list(enumerate(accuracies, 1))[-1:]:
        right.annotate(
            f'{value:.1f} %', (epoch, value), (0, -15 if value > 90 else 8), textcoords='offset points', ha='center')
    right.set(xlabel='epoch', ylabel='held-out accuracy in %', xlim=(0.5, max(len(accuracies), 1) + 0.5))
    right.set_ylim(max(0, min(accuracies, default=0) - 4), 100.5)
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.grid(alpha=0.3)
        ax.spines[['top', 'right']].set_visible(False)
    return _save(figure, path)


def draw_predictions(
        path: Path,
        title: str,
        pixels: Tensor,
        maps: Sequence,
        labels: Sequence[str],
        are_right: Sequence[bool],
) -> Path:
    """Images with what a model says of them, and the contexts of one of its layers, one scale for each kind.

    Args:
        path: The PNG file.
        title: What stands above.
        pixels: The images, (N, H, W, 3), from 0 to 1.
        maps: `LayerMaps` of the layer for each image.
        labels: What the model says of each.
        are_right: Whether that is right.
    """
    rows = {name: torch.stack([getattr(layer, name).norm(dim=0) for layer in maps]) for name in ('static', 'dynamic')}
    height, width = maps[0].static.shape[1:]
    figure = Figure(figsize=(max(1.25 * len(labels) + 1.5, 7.5), 5.4), layout='constrained')
    _explain(figure, title, (
        f"Colours: length of each pixel's context vector in a CoT layer ({maps[0].name}, {height} x {width} pixels, "
        'enlarged). A colour means the same in all images of a row: brighter is longer, and says more to the layers '
        'that follow.'))
    grid = figure.subplots(3, len(labels), squeeze=False)
    for ax, image, label, is_right in zip(grid[0], pixels, labels, are_right):
        ax.imshow(image.numpy())
        ax.set(xticks=[], yticks=[])
        ax.set_title(
            f'{"✓" if is_right else "✗"} {plain(label)}', fontsize=9, color='#226688' if is_right else '#bb3300')
    for axes, (name, lengths) in zip(grid[1:], rows.items()):
        high = lengths.max().item()
        for ax, image, values in zip(axes, pixels, lengths):
            overlay(ax, image, values, 'magma', 0, high, None)
        axes[0].set_ylabel(f'{name}\ncontext')
        figure.colorbar(ScalarMappable(Normalize(0, high), 'magma'), ax=axes, label='length', fraction=0.02, pad=0.01)
    grid[0][0].set_ylabel('input')
    return _save(figure, path)


def overlay(ax, pixels: Tensor, values: Tensor, cmap: str, low: float, high: float, label: Optional[str]) -> None:
    """Draws a map over an image, enlarged to its size, with a colour bar if that has a label.

    Args:
        ax: Where to draw.
        pixels: The image, (H, W, 3) or (H, W, 1), from 0 to 1.
        values: The map, (h, w).
        cmap: Colour map of matplotlib.
        low: Value of its first colour.
        high: Value of its last colour.
        label: What the colours mean.
    """
    _background(ax, pixels)
    height, width = pixels.shape[:2]
    image = ax.imshow(
        values.numpy(), cmap=cmap, vmin=low, vmax=high, alpha=OPACITY, interpolation='bilinear',
        extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    if label is not None:
        below, above = values.min() < low, values.max() > high
        _bar(ax, image, label, 'both' if below and above else 'min' if below else 'max' if above else 'neither')


def plain(text: str) -> str:
    """Text that Matplotlib takes for no formula."""
    return text.replace('$', r'\$')


def shorten(name: str, length: int = 24) -> str:
    """The name, cut where it is too long for a title."""
    return name if len(name) <= length else name[:length - 3] + '...'


def _background(ax, pixels: Tensor) -> None:
    """The image in grey, so that colours belong to the map."""
    ax.imshow((DARKEST + (1 - DARKEST) * pixels.mean(2)).numpy(), cmap='gray', vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])


def _grey_or_colour(pixels: Tensor) -> Tensor:
    return pixels if pixels.shape[2] == 3 else pixels.mean(2)


def _bar(ax, mappable, label: str, extend: str = 'neither') -> None:
    bar = ax.figure.colorbar(mappable, ax=ax, fraction=0.05, pad=0.02, extend=extend)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _draw_lines(ax, pixels: Tensor, angle: Tensor, coherence: Tensor) -> None:
    """Lines along the angle at the centres of cells; where pixels share a cell, their votes are added."""
    _background(ax, pixels)
    votes = torch.stack([(2 * angle).cos(), (2 * angle).sin()]) * coherence
    step = max(-(-side // CELLS) for side in angle.shape)
    if step > 1:
        votes = torch.nn.functional.avg_pool2d(votes[None], step, ceil_mode=True)[0]
    length, angle = votes.norm(dim=0), torch.atan2(votes[1], votes[0]) / 2
    most = max(length.max().item(), 1e-6)
    rows, columns = length.shape
    cell_y, cell_x = pixels.shape[0] / rows, pixels.shape[1] / columns
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) * cell_y - 0.5, (torch.arange(columns) + 0.5) * cell_x - 0.5,
                          indexing='ij')
    size = 0.9 * min(cell_x, cell_y) * length / most
    places = [values.numpy() for values in (x, y, size * angle.cos(), size * angle.sin())]
    for width, colors in ((0.011, dict(color='black')), (0.006, dict(cmap='plasma'))):  # a dark rim shows on any image
        values = () if 'color' in colors else (length.numpy(),)
        lines = ax.quiver(
            *places, *values, angles='uv', scale_units='x', scale=1,
            units='width', width=width, pivot='mid', headwidth=0, headlength=0, headaxislength=0, **colors)
    lines.set_clim(0, most)
    _bar(ax, ScalarMappable(Normalize(0, most), 'plasma'), 'clarity, 0 to 1')


def _grid(head: str, text: str, pixels: Tensor, maps: Sequence):
    """A figure with a column for each layer and two rows; axes column by column."""
    figure = Figure(figsize=_size(pixels, len(maps), 2), layout='constrained')
    _explain(figure, head, text)
    grid = figure.subplots(2, len(maps), squeeze=False).T
    for (above, _), layer in zip(grid, maps):
        channels, height, width = layer.static.shape
        above.set_title(f'{layer.name}\n{channels} channels, {height} x {width} pixels', fontsize=10)
    return figure, grid


def _explain(figure: Figure, head: str, text: str) -> None:
    """A title above, and below how the picture is read."""
    width = figure.get_figwidth()
    lines = [textwrap.fill(line, int(8.5 * width)) for line in head.splitlines()]
    figure.suptitle(plain('\n'.join(lines)), fontsize=12)
    figure.supxlabel(textwrap.fill(' '.join(text.split()), int(13 * width)), fontsize=9)


def _size(pixels: Tensor, columns: int, rows: int):
    """Inches; the parts of an image are about three wide and at least two high."""
    aspect = min(max(pixels.shape[0] / pixels.shape[1], 0.5), 2.)
    return max(3.2 * columns + 0.3, 6.), 2.6 * aspect * rows + 1.8


def _name_rows(grid, *names: str) -> None:
    for ax, name in zip(grid[0], names):
        ax.set_ylabel(name, fontsize=10)


def _limits(values: Tensor):
    """Range of all but the two outermost percents; a constant map gets a range that it lies in."""
    low, high = values.flatten().quantile(torch.tensor([0.01, 0.99], dtype=values.dtype)).tolist()
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path


PAGE = '''\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{color-scheme: light dark}}
body {{font: 16px/1.5 sans-serif; max-width: 90rem; margin: 0 auto; padding: 1rem}}
p, li {{max-width: 50rem}}
img {{max-width: 100%; height: auto; background: white}}
figure {{margin: 1rem 0 2rem}}
.note {{border: 3px solid #cc3311; padding: .5rem 1rem; font-weight: bold}}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
'''


def write_page(path: Path, model: str, note: str, sections: Sequence[Section]) -> Path:
    """Writes a page with all pictures, which opens from disk, without a network.

    Args:
        path: The HTML file, in the folder of the pictures.
        model: What the model is called.
        note: Stands above all.
        sections: One for each image.
    """
    parts = [f'<p class="note">{html.escape(note)}</p>'] if note else []
    if len(sections) > 1:
        links = (f'<li><a href="#image-{i}">{html.escape(s.heading)}</a></li>' for i, s in enumerate(sections))
        parts.append(f'<nav><ul>{"".join(links)}</ul></nav>')
    for i, section in enumerate(sections):
        parts.append(f'<section id="image-{i}">\n<h2>{html.escape(section.heading)}</h2>')
        if section.note:
            parts.append(f'<p>{html.escape(section.note)}</p>')
        for picture in section.pictures:
            source, alt = quote(picture.path.name), html.escape(picture.alt)
            parts.append(
                f'<h3>{picture.heading}</h3>\n<p>{html.escape(picture.text)}</p>\n'
                f'<figure><a href="{source}"><img src="{source}" alt="{alt}"></a></figure>')
        parts.append('</section>')
    title = html.escape(f'What the CoT layers of {model} see')
    path.write_text(PAGE.format(title=title, body='\n'.join(parts)), encoding='utf-8')
    return path
