"""Converted weights evaluated beside their published accuracy: `python -m timm_cotnet.verify DIR --data IMAGENET`.

The images are loaded and the model is run as timm's `validate.py` does.
"""
import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
from timm.data import ImageNetInfo, create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy

from .checkpoint import UNLOADABLE, CheckpointError, explained, read_config
from .hub import WEIGHTS_NAME
from .published import PUBLISHED

__all__ = ['Verification', 'verify', 'verify_all']

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
        CheckpointError: If nothing was published to compare with, or the images are not of ImageNet's classes.
        RuntimeError: If there are no images, or the weights do not fit.
    """
    config = read_config(folder)
    name = _published_name(folder, config)
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


def _published_name(folder: Path, config: Dict[str, Any]) -> str:
    name = f'{config["architecture"]}.{config["pretrained_cfg"].get("tag")}'
    if name not in PUBLISHED:
        raise CheckpointError(f'{folder} holds {name}, for which no ImageNet accuracy was published')
    return name


def verify_all(folder: Path, data: Path, batch_size: int = 64, workers: int = 2, device: str = 'cpu') -> int:
    """Evaluates one converted model, or each in a folder of them, and prints how each compares once that is known.

    Of several, those for which no accuracy was published are left out, and one that fails does not stop the others.

    Args:
        folder: What `convert` wrote, or a folder that holds such folders.
        data: Image folder with one folder per class, or one that holds it as `val` or `validation`.
        batch_size: Images at once.
        workers: Processes that load images.
        device: Where the model runs.

    Returns:
        Exit status: 0 if all models that were evaluated agree with their published accuracy, else 1.

    Raises:
        CheckpointError: If there is no converted model, nothing was published to compare with, or the images are not of
            ImageNet's classes.
        RuntimeError: If there are no images, or the weights do not fit.
    """
    folder = Path(folder)
    folders = [folder] if (folder / 'config.json').exists() else sorted(
        path.parent for path in folder.glob(f'*/{WEIGHTS_NAME}'))
    if not folders:
        raise CheckpointError(f'{folder} holds no converted model; make one with python -m timm_cotnet.convert')
    known = []
    for one in folders:
        try:
            _published_name(one, read_config(one))
            known.append(one)
        except (CheckpointError, OSError) as e:
            if len(folders) == 1:
                raise
            print(f'left out: {e}', file=sys.stderr)
    if not known:
        raise CheckpointError(f'{folder} holds no model for which an ImageNet accuracy was published')
    failed = False
    for one in known:
        try:
            result = verify(one, data, batch_size, workers, device)
        except UNLOADABLE as e:
            if len(known) == 1:
                raise
            print(f'\n{one}: {explained(e)}', file=sys.stderr)
            failed = True
            continue
        failed = failed or not result.agrees
        for what, measured, published, tolerance in zip(
                ('top-1', 'top-5'), result.measured, result.published, result.tolerance):
            print(
                f'{result.name}: {what} {measured:.3f} %, published {published:.1f} %, '
                f'difference {measured - published:+.3f}, tolerance {tolerance:.2f} points')
        print(f'{result.name}: {"agrees" if result.agrees else "DOES NOT AGREE"} on {result.images} images')
    return int(failed)


def add_data_options(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Adds what a command needs to know of images and of how they are evaluated.

    Args:
        parser: Parser of the command.
        required: Whether the command cannot do without images.
    """
    parser.add_argument(
        '--data', type=Path, required=required,
        help="ImageNet's validation images, or some of them: a folder with a folder per class")
    parser.add_argument('--batch-size', type=int, default=64, help='images evaluated at once (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=2, help='processes that load images (default: %(default)s)')
    parser.add_argument('--device', default='cpu', help='where the model runs (default: %(default)s)')


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m timm_cotnet.verify', description=__doc__.split('\n')[0])
    parser.add_argument('folder', type=Path, help='what timm_cotnet.convert wrote: one model, or a folder of them')
    add_data_options(parser, required=True)
    args = parser.parse_args(argv)
    try:
        return verify_all(args.folder, args.data, args.batch_size, args.workers, args.device)
    except UNLOADABLE as e:  # of timm, about images or weights, too
        print(f'error: {explained(e)}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
