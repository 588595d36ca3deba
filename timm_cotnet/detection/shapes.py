"""Drawn shapes as a small data set in COCO's layout: `python -m timm_cotnet.detection.shapes DIR`.

Circles, squares and triangles on noise; later ones hide parts of earlier ones. Boxes and masks are exact to the pixel.
"""
import argparse
import json
import random
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

import numpy as np
from PIL import Image, ImageDraw

__all__ = ['write_shapes']

CLASSES = ('circle', 'square', 'triangle')
SIZES = ((160, 128), (128, 160), (144, 144))  # width and height of the images
VISIBLE = 0.5  # a shape of which less can be seen is not drawn


def write_shapes(folder: Union[str, Path], train: int = 300, val: int = 40, seed: int = 0) -> Path:
    """Writes the data set and returns its folder.

    Args:
        folder: Where to write; made if it does not exist.
        train: Number of images to train on.
        val: Number of images to evaluate with.
        seed: Seed of all that is drawn.
    """
    folder = Path(folder)
    (folder / 'annotations').mkdir(parents=True, exist_ok=True)
    for split, count in (('train', train), ('val', val)):
        (folder / split).mkdir(exist_ok=True)
        content: Dict[str, List[Dict[str, Any]]] = dict(
            images=[], annotations=[], categories=[dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)])
        for image_id in range(1, count + 1):
            image, masks = _draw(random.Random(f'{seed} {split} {image_id}'))
            name = f'{image_id:06d}.png'
            image.save(folder / split / name)
            content['images'].append(dict(id=image_id, file_name=name, width=image.width, height=image.height))
            for category, mask in masks:
                content['annotations'].append(dict(
                    id=len(content['annotations']) + 1, image_id=image_id, category_id=category, iscrowd=0,
                    **_annotation(mask)))
        (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
    return folder


def _draw(rng: random.Random):
    """An image, and of each shape its category and which pixels of it can be seen (H, W), bool."""
    width, height = rng.choice(SIZES)
    noise = np.random.default_rng(rng.getrandbits(32))
    pixels = noise.normal(rng.randint(60, 190), 12, (height, width, 3))
    masks: List[Any] = []
    for _ in range(rng.randint(2, 4)):
        category, mask = rng.randint(1, len(CLASSES)), Image.new('1', (width, height))
        _fill(ImageDraw.Draw(mask), CLASSES[category - 1], rng, width, height)
        mask = np.array(mask)
        rest = [(c, m & ~mask, whole) for c, m, whole in masks]
        if any(m.sum() < VISIBLE * whole for _, m, whole in rest):
            continue
        masks = [*rest, (category, mask, mask.sum())]
        color = np.array([rng.choice((0, 255)), rng.randint(0, 255), rng.randint(0, 255)])
        pixels[mask] = color + noise.normal(0, 8, (int(mask.sum()), 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image, [(category, mask) for category, mask, _ in masks]


def _fill(draw: ImageDraw.ImageDraw, shape: str, rng: random.Random, width: int, height: int) -> None:
    side = rng.randint(28, 72)
    x, y = rng.randint(0, width - side - 1), rng.randint(0, height - side - 1)
    if shape == 'circle':
        draw.ellipse((x, y, x + side, y + side), fill=1)
    elif shape == 'square':
        draw.rectangle((x, y, x + side, y + side), fill=1)
    else:
        draw.polygon([(x + side // 2, y), (x + side, y + side), (x, y + side)], fill=1)


def _annotation(mask: np.ndarray) -> Dict[str, Any]:
    """Box, area and run lengths, down the columns, of a mask (H, W)."""
    ys, xs = np.nonzero(mask)
    flat = mask.flatten(order='F')
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    if flat[0]:
        counts.insert(0, 0)  # the first run is one of background
    return dict(
        bbox=[int(xs.min()), int(ys.min()), int(xs.max() - xs.min()) + 1, int(ys.max() - ys.min()) + 1],
        area=int(mask.sum()),
        segmentation=dict(counts=counts, size=list(mask.shape)),
    )


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_cotnet.detection.shapes', description=__doc__.split('\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('folder', type=Path, help='where to write the data set')
    parser.add_argument('--train', type=int, default=300, help='images to train on')
    parser.add_argument('--val', type=int, default=40, help='images to evaluate with')
    parser.add_argument('--seed', type=int, default=0, help='seed of all that is drawn')
    args = parser.parse_args(argv)
    print(f'Written to {write_shapes(args.folder, args.train, args.val, args.seed)}')


if __name__ == '__main__':
    main()
