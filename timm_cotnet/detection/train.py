"""Trains and evaluates detectors on data in COCO's layout: `python -m timm_cotnet.detection.train --data DIR`.

    python -m timm_cotnet.detection.train --model maskrcnn_cotnet_fpn --backbone cotnet50 --data DIR
    torchrun --nproc-per-node 8 -m timm_cotnet.detection.train --data DIR

Trains by the paper's 1x schedule unless told otherwise, writes the state of the run as it goes, the trained detector
and a picture of what it finds, and prints COCO's average precision as one JSON object in the last line.
"""
import argparse
import importlib.util
import json
import math
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from timm.utils import ParseKwargs
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torchvision.models.detection import FasterRCNN

from ..hub import WEIGHTS_NAME
from ..misfit import first_few
from ..pretrained import WeightsError
from .data import AugmentedDataset, CocoDataset, DataError, TrainingSampler, find_split, seed_of, training_transforms
from .evaluate import evaluate
from .models import DETECTORS
from .pictures import draw_predictions
from .schedule import Schedule, create_optimizer
from .state import STATE, StateError, load_state, save_detector, save_state
from .weights import find_weights

# options on which the result of a run depends, beside its schedule
SETTINGS = (
    'model', 'backbone', 'pretrained_backbone', 'norm', 'model_kwargs', 'weights', 'batch_size', 'seed', 'amp',
    'amp_dtype')


class DataParallel(DistributedDataParallel):
    """PyTorch's, which refuses synchronized norms on the CPU; those of the detectors work there."""

    def _passing_sync_batchnorm_handle(self, module):
        pass


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why."""


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Trains, evaluates and reports.

    Raises:
        SystemExit: With a message, if anything is off.
    """
    args = parse_args(argv)
    if importlib.util.find_spec('faster_coco_eval') is None:
        sys.exit('faster_coco_eval is not installed; get it by: pip install "timm-cotnet[detection]"')
    try:
        with process_group(args.device) as device:
            run(args, device)
    except DataError as error:
        sys.exit(str(error).splitlines()[-1])  # a worker of the loader puts its traceback before
    except (StateError, TrainingError, WeightsError) as error:
        sys.exit(str(error))


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m timm_cotnet.detection.train', description=__doc__.split('\n')[0])
    add = parser.add_argument
    add('--data', type=Path, required=True, metavar='DIR', help='data in COCO\'s layout')
    add('--model', choices=DETECTORS, default='maskrcnn_cotnet_fpn', help='detector (default: %(default)s)')
    add('--backbone', default='cotnet50', help='a timm model, such as cotnet50 (the default)')
    add('--pretrained-backbone', action=argparse.BooleanOptionalAction, default=True,
        help='start from the backbone\'s pretrained weights (the default)')
    add('--weights', metavar='NAME',
        help='start from a whole detector: coco (the official weights), hf-hub:NAME/REPOSITORY, or a folder')
    add('--norm', default='sync', choices=('sync', 'batch', 'frozen'), help='norms (default: %(default)s)')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE',
        help='further arguments of the detector, such as min_size=800 trainable_backbone_layers=5; those with which a '
             'folder of --weights was trained need not be repeated')
    add('--output', type=Path, default='cotnet-detection', metavar='DIR', help='for all files (default: %(default)s)')
    add('--eval', action='store_true', help='do not train, evaluate --weights, or what a run left in --output')
    add('--resume', action='store_true', help=f'go on from {STATE} in --output')
    add('--epochs', type=float,
        help='passes over the training images (default: the paper\'s 1x schedule, 90000 iterations of 16 images)')
    add('--batch-size', type=int, default=16, help='images of an iteration in all processes (default: %(default)s)')
    add('--lr', type=float, help='highest learning rate (default: 0.02 for 16 images, in proportion to the batch)')
    add('--limit', type=int, metavar='N', help='use the first N images of each split only')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', default='bfloat16', choices=('bfloat16', 'float16'), help='(default: %(default)s)')
    add('--channels-last', action='store_true', help='memory format of the weights')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='(default here: %(default)s)')
    add('--workers', type=int, default=4, help='processes that load images (default: %(default)s)')
    add('--seed', type=int, default=0, help='seed of all that is random (default: %(default)s)')
    add('--log-interval', type=int, default=20, help='iterations between lines (default: %(default)s)')
    add('--save-interval', type=int, default=1000, help='iterations between states (default: %(default)s)')
    args, _ = parser.parse_known_args(argv)
    if args.eval and not args.weights:
        args.weights = str(args.output)
    made = _how_made(Path(args.weights, 'config.json')) if args.weights else {}
    parser.set_defaults(**made)  # a folder knows what detector it holds
    args = parser.parse_args(argv, argparse.Namespace(weights=args.weights))
    args.model_kwargs = {**made.get('model_kwargs', {}), **args.model_kwargs}
    for name in ('epochs', 'batch_size', 'lr', 'limit', 'log_interval', 'save_interval'):
        value = getattr(args, name)
        if value is not None and not 0 < value < float('inf'):
            parser.error(f'--{name.replace("_", "-")} is {value}, expected more than 0')
    for name in ('workers', 'seed'):
        if not 0 <= getattr(args, name) < 2 ** 32:
            parser.error(f'--{name} is {getattr(args, name)}, expected 0 or more, and less than 2 ** 32')
    if args.batch_size % world_size():
        parser.error(f'--batch-size is {args.batch_size}, which {world_size()} processes cannot share equally')
    return args


def _how_made(config: Path) -> Dict[str, Any]:
    """The options that make the detector of a folder, as far as it tells them."""
    try:
        content = json.loads(config.read_text())
        return {'model': content['detector'], 'backbone': content['backbone'], **content.get('made', {})}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # whoever loads the weights says what is wrong


def rank() -> int:
    return int(os.environ.get('RANK', 0))  # set by torchrun


def world_size() -> int:
    return int(os.environ.get('WORLD_SIZE', 1))


def say(*values: Any) -> None:
    """Prints in the first process only."""
    if rank() == 0:
        print(*values, flush=True)


@contextmanager
def process_group(name: str) -> Iterator[torch.device]:
    """The device of this process, which belongs to a group if torchrun started it."""
    try:
        device = torch.device(name)
        if world_size() > 1 and device.type == 'cuda':
            device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise TrainingError(f'--device is {name}, which cannot be used: {error}') from error
    if world_size() == 1:
        yield device
        return
    distributed.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def run(args: argparse.Namespace, device: torch.device) -> None:
    masks = 'mask' in args.model
    val = CocoDataset(*find_split(args.data, 'val'), masks=masks, limit=args.limit)
    train = None
    if not args.eval:
        train = CocoDataset(*find_split(args.data, 'train'), masks=masks, only_annotated=True, limit=args.limit)
        if train.categories != val.categories:
            raise DataError(f'{train.path} and {val.path} have different categories: {train.names}, {val.names}')
        check_output(args)
    torch.manual_seed(args.seed)
    model = create_model(args, val).to(device)
    if args.eval:
        check_output(args)  # not before, as weights may be looked for in this folder
    if train is not None:
        fit(args, model, train, device)

    picture = args.output / 'predictions.png'
    say(f'Evaluation on {len(val)} images of {val.path}, some of which are drawn to {picture}')
    metrics = evaluate(model, evaluation_loader(args, val), val, device)
    if rank() == 0:
        say(json.dumps(metrics))
        try:
            draw_predictions(picture, model, val, device)
        except OSError as error:
            raise TrainingError(f'{picture} cannot be written: {error}') from error


def check_output(args: argparse.Namespace) -> None:
    """Makes the output folder, in which files can be written; training refuses one of another run."""
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output):
            is_taken = (args.output / STATE).exists()
    except OSError as error:
        raise TrainingError(f'--output is {args.output}, where nothing can be written: {error}') from error
    if is_taken and not args.resume and not args.eval:
        raise TrainingError(f'--output is {args.output}, which holds {STATE} of a run: go on with it by --resume, or '
                            'take another folder')


def create_model(args: argparse.Namespace, dataset: CocoDataset) -> FasterRCNN:
    """The detector that the arguments describe, with the classes of the data."""
    num_classes = dataset.num_classes
    try:
        if args.weights:
            check_classes(args, find_weights(args.weights, args.model, args.backbone).config, dataset)
        return DETECTORS[args.model](
            args.backbone,
            weights=args.weights,
            weights_backbone='DEFAULT' if args.pretrained_backbone else None,
            num_classes=num_classes,
            norm=args.norm,
            **args.model_kwargs,
        )
    except WeightsError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise TrainingError(f'{args.model} on {args.backbone} cannot be made: {error}') from error


def check_classes(args: argparse.Namespace, config: Dict[str, Any], dataset: CocoDataset) -> None:
    """Compares the classes of the weights with those of the data, and warns in training where these have other names.

    Raises:
        ValueError: In evaluation, if they differ.
    """
    known = config['num_classes']
    if known != dataset.num_classes:
        if args.eval:
            raise ValueError(
                f'{args.weights} has {known} classes with the background, the data {dataset.num_classes}')
        return  # predictors start at random
    differing = [f'{label} is {name!r} in the weights and {ours!r} in the data'
                 for label, name, ours in differing_names(config.get('categories'), dataset.names)]
    if not differing:
        return
    text = f'{args.weights} has other classes than {dataset.path}: {first_few(differing)}'
    if args.eval:
        raise ValueError(f'{text}. If they mean the same, give them the same names in config.json or in the data')
    if rank() == 0:
        print(f'Warning: {text}. Its predictors are trained further all the same', file=sys.stderr, flush=True)


def differing_names(stored: Any, names: Dict[int, str]) -> List[Tuple[int, Optional[str], str]]:
    """Labels whose names differ, with both names.

    Args:
        stored: What a config.json says: names by label, a list of them, or nothing.
        names: Names of the labels in the data; a category without one is called by its id.
    """
    if not stored:
        return []
    stored = stored if isinstance(stored, dict) else dict(enumerate(stored))
    known = {str(label): str(name) for label, name in stored.items()}  # in JSON, keys are text
    found = [(label, known.get(str(label)), name) for label, name in names.items()]
    return [(label, other, name) for label, other, name in found
            if other != name and (other is None or other.isdigit() == name.isdigit())]


def fit(args: argparse.Namespace, model: FasterRCNN, dataset: CocoDataset, device: torch.device) -> None:
    """Trains a detector by the schedule, from the state in the output folder if the run is resumed."""
    schedule = Schedule.scaled(args.batch_size, len(dataset), args.epochs, args.lr)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer(model, schedule.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and args.amp_dtype == 'float16')
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings.update(schedule._asdict(), images=len(dataset), categories=dataset.names)
    start = load_state(args.output, settings, **parts) if args.resume else 0

    say(f'Training on {len(dataset)} images of {dataset.path}: {schedule.iterations} iterations of {args.batch_size} '
        f'images in {world_size()} process{"es" * (world_size() > 1)}, learning rate {schedule.lr:g}')
    if start:
        say(f'Resumed after iteration {start}')
    network = model
    if world_size() > 1:
        network = DataParallel(model, device_ids=[device] if device.type == 'cuda' else None)
    network.train()
    sampler = TrainingSampler(
        dataset, args.batch_size, schedule.iterations, start, args.seed, rank(), world_size())
    loader = DataLoader(
        AugmentedDataset(dataset, training_transforms()), batch_sampler=sampler, num_workers=args.workers,
        collate_fn=collate, pin_memory=device.type == 'cuda')
    began = last = time.perf_counter()
    for iteration, (images, targets) in enumerate(loader, start + 1):
        # What is drawn in an iteration follows from its number, so that a resumed run draws the same.
        torch.manual_seed(seed_of(args.seed, iteration, rank()))
        with torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.amp):
            losses = network(*to_device(images, targets, device))
            loss = sum(losses.values())
        losses = {name.removeprefix('loss_'): value.item() for name, value in losses.items()}
        if not math.isfinite(sum(losses.values())):
            raise TrainingError(f'The losses of iteration {iteration} are {losses}; a lower --lr may help')
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        if iteration % args.log_interval == 0 or iteration == schedule.iterations:
            now = time.perf_counter()
            done = iteration - start
            left = timedelta(seconds=round((now - began) / done * (schedule.iterations - iteration)))
            values = ', '.join(f'{name} {value:.3f}' for name, value in losses.items())
            say(f'iteration {iteration}/{schedule.iterations}: loss {sum(losses.values()):.3f} ({values}), '
                f'{(now - last) / ((done - 1) % args.log_interval + 1):.2f} s each, {left} left')
            last = now
        if rank() == 0 and (iteration % args.save_interval == 0 or iteration == schedule.iterations):
            save_state(args.output, iteration, settings, **parts)
    if rank() == 0:
        save_detector(args.output, model, dict(
            detector=args.model, backbone=args.backbone, num_classes=dataset.num_classes, categories=dataset.names,
            image_mean=model.transform.image_mean, image_std=model.transform.image_std,
            made=dict(norm=args.norm, model_kwargs=args.model_kwargs)))
        say(f'Written: {args.output / WEIGHTS_NAME}')


def to_device(images: List[torch.Tensor], targets: List[Dict[str, Any]], device: torch.device):
    """A batch where the detector is, without what it has no use for."""
    return [image.to(device, non_blocking=True) for image in images], [
        {key: value.to(device, non_blocking=True) for key, value in target.items() if torch.is_tensor(value)}
        for target in targets]


def evaluation_loader(args: argparse.Namespace, dataset: CocoDataset) -> DataLoader:
    """One image after another, of which this process has its share."""
    share = Subset(dataset, range(rank(), len(dataset), world_size()))
    return DataLoader(share, num_workers=args.workers, collate_fn=collate)


def collate(items: List[Any]) -> List[Any]:
    """Lists of images and of targets."""
    return [list(values) for values in zip(*items)]


if __name__ == '__main__':
    main()
