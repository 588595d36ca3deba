"""Fine-tunes a CoTNet on real images with timm's own tools: `python -m timm_cotnet.demo`, options with `--help`.

Writes scikit-learn's digits as an image folder, evaluates the weights of `test_cotnet` that come with the package,
trains them with a new classifier, saves safetensors and config, loads these back, and draws the training curve and what
the first CoT layer sees. With `--data` it does so on images of one's own. Ctrl-C ends the training early, with all
that. Ends with a message and status 1 if anything is off.

The weights of `test_cotnet` were made by `--no-pretrained --epochs 25 --lr 3e-3`.
"""
import argparse
import json
import importlib.util
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import _hub
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, accuracy, random_seed
from torch import nn

from .digits import HELD_OUT, write_digits
from .layers import CotLayer
from .misfit import first_few
from .progress import BusyWatch, Progress, StopRequest
from .visualize import UNREADABLE, cot_layers, layer_maps, load_model

EMBEDDED = 'test_cotnet'  # the model whose weights are in the package
EMBEDDED_ACCURACY = 97.  # percent of the held-out digits that they get right at least
SMOOTHING = 0.1  # of labels
DRAWN = 10  # classes of which a right prediction is drawn
DIGITS_AUGMENTATION = dict(scale=(0.7, 1.), ratio=(0.8, 1.25), hflip=0., color_jitter=None)  # leaves digits readable
AUGMENTATION = dict(scale=(0.35, 1.), hflip=0.5, color_jitter=0.3)
OWN_IMAGES = """
images of your own: --data DIR, where each class has a folder of images named after it:

  DIR/train/cat/1.jpg  DIR/train/dog/1.jpg  ...  images to train on
  DIR/val/cat/9.jpg    DIR/val/dog/9.jpg    ...  images held out, of the same classes

Without train and val (DIR/cat/1.jpg, DIR/dog/1.jpg, ...) every fifth image of a class is held out.
For example: python -m timm_cotnet.demo --data DIR --model cotnet50 --img-size 224
"""


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Runs the demonstration.

    Raises:
        SystemExit: With a message, if anything is off; with status 130, if it was stopped by Ctrl-C.
    """
    args = parse_args(argv)
    for name in ('matplotlib',) if args.data else ('sklearn', 'matplotlib'):
        if importlib.util.find_spec(name) is None:
            sys.exit(f'{name} is not installed; get it by: pip install "timm-cotnet[demo]"')
    try:
        with StopRequest() as stop:
            run(args, stop)
    except KeyboardInterrupt:
        print(f'\nStopped at once. What was written before is in {args.output}.', file=sys.stderr)
        sys.exit(130)


def run(args: argparse.Namespace, stop: StopRequest) -> None:
    """What `main` does, with its options parsed."""
    start = time.time()
    random_seed(args.seed)
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        sys.exit(f'--device is {args.device}, which cannot be used: {error}')
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        data = args.data or write_digits(args.output / 'digits')
    except OSError as error:
        sys.exit(f'--output is {args.output}, where nothing can be written: {error}')
    what = 'images' if args.data else 'digits'
    try:
        datasets = train_set, val_set = create_datasets(data, args.output if args.data else None)
        class_names = sorted(train_set.reader.class_to_idx, key=train_set.reader.class_to_idx.get)
        size = {} if args.img_size is None else dict(input_size=(3, args.img_size, args.img_size), pool_size=None)
        model = timm.create_model(
            args.model, pretrained=args.pretrained, num_classes=len(class_names),
            pretrained_cfg_overlay=dict(size, crop_pct=1.))
        cot_layers(model)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(str(error))
    model.to(device)
    data_config = resolve_data_config({}, model=model)
    batch_size = args.batch_size or min(64, len(train_set))
    if batch_size > len(train_set):
        sys.exit(f'--batch-size is {batch_size}, expected at most the {len(train_set)} training images')
    train_loader, val_loader = create_loaders(
        datasets, data_config, batch_size, AUGMENTATION if args.data else DIGITS_AUGMENTATION, args.workers)
    print(f'{what.capitalize()}: {len(train_set)} to train on, {len(val_set)} held out, in {data}')
    print(f'Classes: {len(class_names)} ({", ".join(class_names[:10])}{", ..." if len(class_names) > 10 else ""})')

    if args.pretrained:
        if args.model == EMBEDDED and not args.data:
            check_embedded_weights(data, batch_size, device)
        model.reset_classifier(len(class_names))
        model.to(device)
        print(f'{args.model} is fine-tuned with a new classifier, as it would be for classes of your own.')
    else:
        print(f'{args.model} starts from random weights.')
    count = torch.get_num_threads()
    threads = f' with {count} thread{"s" if count > 1 else ""}' if device.type == 'cpu' else ''
    print(
        f'It trains on {device_name(device)}{threads}, {len(train_loader)} steps of {batch_size} images an epoch, at '
        f'{"x".join(map(str, data_config["input_size"][1:]))} pixels. Ctrl-C ends it early.', flush=True)

    trained = fine_tune(model, train_loader, val_loader, args.epochs, args.lr, device, stop)
    if not trained.losses:
        print('Stopped before the first step: there is nothing to save.', file=sys.stderr)
        sys.exit(130)
    folder = args.output / 'model'
    final_accuracy, logits, targets = evaluate(trained.model, val_loader, device)
    if not logits.isfinite().all():
        sys.exit(f'The training diverged: outputs are no finite numbers. --lr is {args.lr}, a smaller one may help')
    save_folder(trained.model, folder, class_names)

    loaded, _ = load_model(str(folder))
    _, loaded_logits, _ = evaluate(loaded.to(device), val_loader, device)
    difference = (loaded_logits - logits).abs().max().item()
    print(f'Saved to and loaded back from {folder}: logits differ by {difference:g} at most.')
    if not difference < 1e-5:
        sys.exit('They should be the same: the saved model is not the trained one')

    from .pictures import draw_training

    curve, picture = args.output / 'training.png', args.output / 'predictions.png'
    title = f'{args.model}: {final_accuracy:.1f} % of {len(targets)} held-out {what} right'
    draw_training(curve, title, trained.losses, loss_floor(len(class_names)), trained.accuracies)
    print(f'Drawn to {curve}: loss and accuracy over time.')
    shown = show_predictions(
        picture, title, trained.model, val_loader.dataset, data_config, logits, targets, class_names)
    print(f'Drawn to {picture}: predictions with their static and dynamic contexts.')

    done = ' so far' if trained.stopped else ''
    print(f'Accuracy: {final_accuracy:.1f} % of the held-out {what}{done}, after {time.time() - start:.0f} seconds.')
    print_next(args, folder, shown)
    if trained.stopped:
        sys.exit(130)
    if not final_accuracy >= args.min_accuracy:
        sys.exit(f'It should be {args.min_accuracy} % or more (--min-accuracy); more --epochs or another --lr may help')


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m timm_cotnet.demo', description=__doc__.split('\n')[0], epilog=OWN_IMAGES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, metavar='DIR', help='images of your own, see below (default: the digits)')
    parser.add_argument(
        '--model', default=EMBEDDED, help='a model with CoT layers, such as cotnet50, or with --pretrained '
        'local-dir:DIR of converted weights (default: %(default)s)')
    parser.add_argument(
        '--pretrained', action=argparse.BooleanOptionalAction, default=None,
        help=f'start from pretrained weights (default: only {EMBEDDED} does)')
    parser.add_argument('--epochs', type=int, default=5, help='passes over the training images (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, help='images per step (default: 64, or all if there are fewer)')
    parser.add_argument('--lr', type=float, default=1e-3, help='highest learning rate (default: %(default)s)')
    parser.add_argument(
        '--img-size', type=int, help="side to which images are resized (default: 64 for the digits, else the model's)")
    parser.add_argument(
        '--min-accuracy', type=float,
        help='percent below which the demonstration fails (default: 90 for the digits, 0 for images of your own)')
    parser.add_argument(
        '--output', type=Path, default=Path('cotnet-demo'), metavar='DIR',
        help='folder for all that is written (default: %(default)s)')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu',
        help='where to compute (default: the GPU if there is one, here %(default)s)')
    parser.add_argument(
        '--workers', type=int, default=0, help='processes that load images (default: %(default)s; more help a GPU)')
    parser.add_argument('--seed', type=int, default=0, help='seed of all that is random (default: %(default)s)')
    args = parser.parse_args(argv)
    args.given = sys.argv[1:] if argv is None else list(argv)
    if args.pretrained is None:
        args.pretrained = args.model.split('.')[0] == EMBEDDED
    if args.min_accuracy is None:
        args.min_accuracy = 0. if args.data else 90.
    if args.img_size is None and not args.data:
        args.img_size = 64
    for name, least in (('epochs', 1), ('batch_size', 2), ('img_size', 1), ('workers', 0), ('lr', 0), ('seed', 0)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            parser.error(f'--{name.replace("_", "-")} is {value}, expected {least} or more')
    if args.seed >= 2 ** 32:
        parser.error(f'--seed is {args.seed}, expected less than 2 ** 32')
    return args


def device_name(device: torch.device) -> str:
    """What a device is called in a sentence."""
    if device.type == 'cpu':
        return 'the CPU'
    return f'{device} ({torch.cuda.get_device_name(device)})' if device.type == 'cuda' else str(device)


def check_embedded_weights(digits: Path, batch_size: int, device: torch.device) -> None:
    """Evaluates the weights in the package as they are.

    Raises:
        SystemExit: If they are worse than they should be.
    """
    model = timm.create_model(EMBEDDED, pretrained=True).to(device)
    _, loader = create_loaders(create_datasets(digits), resolve_data_config({}, model=model), batch_size)
    top1, *_ = evaluate(model, loader, device)
    print(f'{EMBEDDED} as it comes gets {top1:.1f} % of the held-out digits right.')
    if top1 < EMBEDDED_ACCURACY:
        sys.exit(f'It should be {EMBEDDED_ACCURACY} % or more: its weights are damaged or do not fit the model')


def create_datasets(data: Path, output: Optional[Path] = None):
    """timm's datasets of an image folder, to train on and held out; see `OWN_IMAGES`.

    Files that do not begin as an image does are left out, with a word on stderr.

    Raises:
        ValueError: If the folder has not what it should have.
        RuntimeError: If there are no images.
    """
    train_folder = _first_folder(data, 'train', 'training')
    val_folder = _first_folder(data, 'val', 'valid', 'validation', 'eval', 'evaluation')
    if not data.is_dir():
        raise ValueError(f'--data is {data}, which is no folder')
    for folder in (train_folder or data, val_folder):
        if None not in (folder, output) and Path(folder).resolve() in (output.resolve(), *output.resolve().parents):
            raise ValueError(
                f'--output is {output}, inside of {folder}, whose folders are classes: pictures would become one')
    if val_folder and not train_folder:
        raise ValueError(f'{val_folder} has no folder named train beside it; --help says what --data should hold')
    train = create_dataset('', root=train_folder or data, search_split=False)
    classes = train.reader.class_to_idx
    if len(classes) < 2:
        raise ValueError(f'{train_folder or data} has images of one class only, a folder for each of two is needed')
    if val_folder:
        val = create_dataset('', root=val_folder, search_split=False)
        unknown = sorted(set(val.reader.class_to_idx) - set(classes))
        if unknown:
            raise ValueError(f'{val_folder} has the class {unknown[0]!r}, of which there is no image to train on')
        val = create_dataset('', root=val_folder, search_split=False, class_map=classes)
        for folder, dataset in ((train_folder, train), (val_folder, val)):
            dataset.reader.samples = _readable(folder, dataset.reader.samples)
        _check_all_there(train_folder, classes, train.reader.samples)
        return train, val

    val = create_dataset('', root=train_folder or data, search_split=False)
    samples, ranks, counts = _readable(train_folder or data, train.reader.samples), [], {}
    _check_all_there(train_folder or data, classes, samples)
    for _, label in samples:
        counts[label] = counts.get(label, 0) + 1
        ranks.append(counts[label])
    for dataset, held_out in ((train, False), (val, True)):
        dataset.reader.samples = [
            sample for sample, rank in zip(samples, ranks) if (rank % HELD_OUT == 0) == held_out]
    if not val.reader.samples:
        raise ValueError(f'{data} has less than {HELD_OUT} images of each class: too few to hold one out')
    return train, val


def _check_all_there(folder: Path, classes: Dict[str, int], samples: Sequence[Tuple[str, int]]) -> None:
    there = {label for _, label in samples}
    for name, label in classes.items():
        if label not in there:
            raise ValueError(f'{folder} has no image of the class {name!r} that can be read')


def _readable(folder: Path, samples: Sequence[Tuple[str, int]]) -> List[Tuple[str, int]]:
    """The samples (file, class) whose file begins as an image does."""
    readable, others = [], []
    for sample in samples:
        try:
            Image.open(sample[0]).close()
            readable.append(sample)
        except UNREADABLE:
            others.append(sample[0])
    if not readable:
        raise ValueError(f'{folder} has no image that can be read; {others[0]} is none')
    if others:
        print(f'{len(others)} of {len(samples)} files are no images and left out: {first_few(others)}', file=sys.stderr)
    return readable


def _first_folder(data: Path, *names: str) -> Optional[Path]:
    return next((data / name for name in names if (data / name).is_dir()), None)


def create_loaders(
        datasets: Tuple[Any, Any],
        data_config: Dict[str, Any],
        batch_size: int,
        augmentation: Dict[str, Any] = DIGITS_AUGMENTATION,
        workers: int = 0,
):
    """timm's loaders of what `create_datasets` found."""
    train, val = datasets
    shared = dict(batch_size=batch_size, num_workers=workers, persistent_workers=False, use_prefetcher=False)
    shared.update((key, data_config[key]) for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct'))
    return create_loader(train, is_training=True, **augmentation, **shared), create_loader(val, **shared)


class Training(NamedTuple):
    """What was trained.

    Args:
        model: The moving average of the weights, also a model.
        losses: Loss of each step.
        accuracies: Percentage of held-out images that it gets right after each whole epoch.
        stopped: Whether it was to end early.
    """
    model: nn.Module
    losses: List[float]
    accuracies: List[float]
    stopped: bool


def loss_floor(num_classes: int, smoothing: float = SMOOTHING) -> float:
    """Least cross entropy that there can be with label smoothing: the entropy of the smoothed label."""
    other = smoothing / num_classes
    right = 1 - smoothing + other
    return -right * math.log(right) - (num_classes - 1) * other * math.log(other)


def fine_tune(
        model: nn.Module,
        train_loader,
        val_loader,
        epochs: int,
        lr: float,
        device: torch.device,
        stop: StopRequest,
) -> Training:
    """Trains the model, until the end or until it is asked to stop."""
    optimizer = create_optimizer_v2(model, opt='adamw', lr=lr, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=epochs, warmup_epochs=min(1, epochs - 1),
        step_on_epochs=False, updates_per_epoch=len(train_loader))
    ema = ModelEmaV3(model, decay=0.999, use_warmup=True)
    progress, busy = Progress(epochs * len(train_loader)), BusyWatch(device.type == 'cpu')
    losses, accuracies = [], []
    for epoch in range(epochs):
        start, before = time.time(), len(losses)
        model.train()
        for images, targets in train_loader:
            if stop.asked:
                return Training(ema.module, losses, accuracies, True)
            with busy:
                images, targets = images.to(device), targets.to(device)
                loss = F.cross_entropy(model(images), targets, label_smoothing=SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                ema.update(model, step=len(losses))
                scheduler.step_update(len(losses))
            progress.step(len(losses), f'epoch {epoch + 1}/{epochs}, loss {mean(losses[before:]):.3f}')
        model_accuracy, logits, _ = evaluate(model, val_loader, device)
        accuracies.append(evaluate(ema.module, val_loader, device)[0])
        progress.clear()
        print(
            f'epoch {epoch + 1}/{epochs}: loss {mean(losses[before:]):.3f}, held-out accuracy {model_accuracy:.1f} % '
            f'(averaged weights {accuracies[-1]:.1f} %), {time.time() - start:.1f} s', flush=True)
        if epoch == 0:
            num_classes = logits.shape[1]
            print(
                f'  (labels are smoothed by {SMOOTHING}: even a perfect model has a loss of '
                f'{loss_floor(num_classes):.3f}; that of guessing is {math.log(num_classes):.3f})', flush=True)
    return Training(ema.module, losses, accuracies, False)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@torch.inference_mode()
def evaluate(model: nn.Module, loader, device: torch.device) -> Tuple[float, torch.Tensor, torch.Tensor]:
    """Returns the percentage of right predictions, the logits (N, num_classes) and the targets (N,)."""
    model.eval()
    batches = [(model(images.to(device)).cpu(), targets) for images, targets in loader]
    logits, targets = (torch.cat(parts) for parts in zip(*batches))
    return accuracy(logits, targets)[0].item(), logits, targets


def save_folder(model: nn.Module, folder: Path, class_names: Sequence[str]) -> None:
    """Writes weights and config as timm's `save_for_hf` does, which an old timm refuses with a new huggingface_hub."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / 'model.safetensors')
    path = folder / 'config.json'
    _hub.save_config_for_hf(model, path, model_config=dict(label_names=list(class_names)))
    config = json.loads(path.read_text())
    config.get('model_args', {}).pop('num_classes', None)  # stands above them too; transformers takes it only once
    path.write_text(json.dumps(config, indent=2))


def show_predictions(
        path: Path,
        title: str,
        model: nn.Module,
        dataset,
        data_config: Dict[str, Any],
        logits: torch.Tensor,
        targets: torch.Tensor,
        class_names: Sequence[str],
) -> Path:
    """Draws up to two mistakes and one right prediction of each class, with the contexts of the first CoT layer.

    Returns:
        File of one of the images.
    """
    from .pictures import draw_predictions, shorten

    confidence, predicted = logits.softmax(1).max(1)
    is_right = predicted == targets
    chosen = torch.nonzero(~is_right).flatten()[:2].tolist()
    for label in range(min(len(class_names), DRAWN)):
        chosen += torch.nonzero(is_right & (targets == label)).flatten()[:1].tolist()
    chosen = chosen or [0]  # all right, and all of classes that are not drawn
    images = torch.stack([dataset[index][0] for index in chosen])
    first = next(name for name, module in model.named_modules() if isinstance(module, CotLayer))
    maps = [layer_maps(model, image[None], [first])[0] for image in images]
    mean, std = (torch.tensor(data_config[key]).view(3, 1, 1) for key in ('mean', 'std'))
    pixels = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)  # (N, H, W, 3)
    labels = []
    for index in chosen:
        truth = '' if is_right[index] else f'\nis {shorten(class_names[targets[index]], 12)}'
        labels.append(f'{shorten(class_names[predicted[index]], 12)}{truth}\n{confidence[index]:.0%} sure')
    draw_predictions(path, title, pixels, maps, labels, is_right[chosen].tolist())
    return Path(dataset.filename(chosen[0], absolute=True))


def print_next(args: argparse.Namespace, folder: Path, image: Path) -> None:
    """Prints the commands to try next."""
    def line(*command):
        print('  ' + shlex.join(['python', '-m', *map(str, command)]))

    print('\nNext, look at what all layers see in an image:')
    line('timm_cotnet.visualize', image, '--model', folder, '--output', args.output / 'views')
    if args.data is None:
        print('or fine-tune on images of your own (--help says what DIR should hold):')
        line('timm_cotnet.demo', '--data', 'DIR')
    elif args.model == EMBEDDED:
        print('or take a larger model:')
        line('timm_cotnet.demo', *args.given, '--model', 'cotnet50')
    else:
        print('or train it longer:')
        line('timm_cotnet.demo', *args.given, '--epochs', 4 * args.epochs)


if __name__ == '__main__':
    main()
