"""Evaluation of converted weights with timm's loaders, beside the published accuracy."""
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Tuple

import timm
import torch
from timm.data import ImageNetInfo, create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy

from .checkpoint import CheckpointError
from .hub import WEIGHTS_NAME
from .published import PUBLISHED

__all__ = ['Verification', 'verify']

TOLERANCE = 0.2  # points of accuracy: published numbers are rounded to 0.1, and libraries decode and resize differently


@dataclass(frozen=True)
class Verification:
    """Measured beside published accuracy, in percent.

    Attributes:
        name: Variant and tag.
        images: Number of images.
        measured: Top-1 and top-5.
        published: Top-1 and top-5 as reported by the authors.
        tolerance: Largest difference that counts as agreement, in points, for top-1 and top-5.
    """
    name: str
    images: int
    measured: Tuple[float, float]
    published: Tuple[float, float]
    tolerance: Tuple[float, float]

    @property
    def agrees(self) -> bool:
        """Whether both differences are within the tolerance."""
        return all(abs(m - p) <= t for m, p, t in zip(self.measured, self.published, self.tolerance))


def verify(
        folder: Path,
        data: Path,
        batch_size: int = 64,
        workers: int = 2,
        device: str = 'cpu',
) -> Verification:
    """Evaluates a converted model with timm's loader, and compares with the published accuracy.

    The tolerance is `TOLERANCE` on the 50,000 images of ImageNet's validation set. On fewer it is wider by three
    standard errors of a proportion.

    Args:
        folder: What `convert` wrote.
        data: Image folder with one folder per class, or one that holds it as `val` or `validation`. If the names are
            ImageNet's, such as n01440764, they name the classes; otherwise their order does.
        batch_size: Images at once.
        workers: Processes that load images.
        device: Where the model runs.

    Raises:
        CheckpointError: If nothing was published to compare with, or there are no such images.
    """
    config = json.loads(Path(folder, 'config.json').read_text())
    name = f'{config["architecture"]}.{config["pretrained_cfg"].get("tag")}'
    if name not in PUBLISHED:
        raise CheckpointError(f'{folder} holds {name}, for which no ImageNet accuracy was published')
    if not Path(data).is_dir():
        raise CheckpointError(f'{data} is no folder; give one with a folder of images per class')
    dataset = create_dataset('', root=str(data), split='validation')
    classes = ImageNetInfo().label_names()
    if set(dataset.reader.class_to_idx) <= set(classes):
        class_map = {label: index for index, label in enumerate(classes)}
        dataset = create_dataset('', root=str(data), split='validation', class_map=class_map)
    elif len(dataset.reader.class_to_idx) != len(classes):
        raise CheckpointError(
            f'{data} has {len(dataset.reader.class_to_idx)} class folders; expected 1000, or folders with the names of '
            'ImageNet classes such as n01440764')

    model = timm.create_model(
        config['architecture'], pretrained_cfg=config['pretrained_cfg'], checkpoint_path=Path(folder, WEIGHTS_NAME))
    model = model.to(device).eval()
    cfg = resolve_data_config({}, model=model, use_test_size=True)
    loader = create_loader(
        dataset, cfg['input_size'], batch_size, use_prefetcher=False, interpolation=cfg['interpolation'],
        mean=cfg['mean'], std=cfg['std'], crop_pct=cfg['crop_pct'], crop_mode=cfg['crop_mode'], num_workers=workers,
        persistent_workers=False)
    top1, top5 = AverageMeter(), AverageMeter()
    with torch.inference_mode():
        for images, labels in loader:
            correct1, correct5 = accuracy(model(images.to(device)), labels.to(device), topk=(1, 5))
            top1.update(correct1.item(), len(labels))
            top5.update(correct5.item(), len(labels))
            print(f'\r{name}: {top1.count} of {len(dataset)} images', end='', file=sys.stderr, flush=True)
    print(file=sys.stderr)
    published = (PUBLISHED[name].top1, PUBLISHED[name].top5)
    errors = [math.sqrt(p * (100 - p) / top1.count) if top1.count < 50000 else 0 for p in published]
    tolerance = tuple(TOLERANCE + 3 * error for error in errors)
    return Verification(name, top1.count, (top1.avg, top5.avg), published, tolerance)
