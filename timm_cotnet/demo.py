"""Fine-tunes a CoTNet on real images with timm's own tools: `python -m timm_cotnet.demo`, options with `--help`.

Writes scikit-learn's digits as an image folder, evaluates the weights of `test_cotnet` that come with the package,
trains them with a new classifier, saves safetensors and config, loads these back, and draws what the first CoT layer
sees. Ends with a message and status 1 if anything is off.

The weights of `test_cotnet` were made by `--no-pretrained --epochs 25 --lr 3e-3`.
"""
import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import _hub
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, random_seed
from torch import nn

from .digits import write_digits
from .layers import CotLayer

EMBEDDED = 'test_cotnet'  # the model whose weights are in the package
EMBEDDED_ACCURACY = 97.  # percent of the held-out digits that they get right at least
NUM_CLASSES = 10


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Runs the demonstration.

    Raises:
        SystemExit: With a message, if anything is off.
    """
    args = parse_args(argv)
    for name in ('sklearn', 'matplotlib'):
        if importlib.util.find_spec(name) is None:
            sys.exit(f'{name} is not installed; get it by: pip install "timm-cotnet[demo]"')
    start = time.time()
    random_seed(args.seed)
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        sys.exit(f'--device is {args.device}, which cannot be used: {error}')
    try:
        digits = write_digits(args.output / 'digits')
    except OSError as error:
        sys.exit(f'--output is {args.output}, where nothing can be written: {error}')
    try:
        model = timm.create_model(
            args.model, pretrained=args.pretrained, num_classes=NUM_CLASSES,
            pretrained_cfg_overlay=dict(input_size=(3, args.img_size, args.img_size), pool_size=None, crop_pct=1.))
    except RuntimeError as error:
        sys.exit(str(error))
    if not any(isinstance(module, CotLayer) for module in model.modules()):
        sys.exit(f'{args.model} has no CoT layer; timm.list_models("*cotne*") are the models that have')
    model.to(device)
    data_config = resolve_data_config({}, model=model)
    train_loader, val_loader = create_loaders(digits, data_config, args.batch_size)
    if len(train_loader) == 0:
        sys.exit(f'--batch-size is {args.batch_size}, expected at most the {len(train_loader.dataset)} training images')
    print(f'Digits: {len(train_loader.dataset)} images to train on, {len(val_loader.dataset)} held out, in {digits}')

    if args.pretrained:
        if args.model == EMBEDDED:
            check_embedded_weights(digits, args.batch_size, device)
        model.reset_classifier(NUM_CLASSES)
        model.to(device)
        print(f'{args.model} is fine-tuned with a new classifier, as it would be for classes of your own.')
    else:
        print(f'{args.model} starts from random weights.')

    ema = fine_tune(model, train_loader, val_loader, args.epochs, args.lr, device)
    final_accuracy, logits, targets = evaluate(ema, val_loader, device)

    folder = args.output / 'model'
    save_folder(ema, folder)
    _, loaded_logits, _ = evaluate(load_folder(folder).to(device), val_loader, device)
    difference = (loaded_logits - logits).abs().max().item()
    print(f'Saved to and loaded back from {folder}: logits differ by {difference:g} at most.')
    if not difference < 1e-5:
        sys.exit('They should be the same: the saved model is not the trained one')

    picture = args.output / 'predictions.png'
    title = f'{args.model}: {final_accuracy:.1f} % of {len(targets)} held-out digits right'
    draw_predictions(picture, title, ema, val_loader.dataset, data_config, logits, targets, device)
    print(f'Drawn to {picture}: predictions with their static and dynamic contexts.')

    print(f'Accuracy: {final_accuracy:.1f} % of the held-out digits, after {time.time() - start:.0f} seconds.')
    if not final_accuracy >= args.min_accuracy:
        sys.exit(f'It should be {args.min_accuracy} % or more (--min-accuracy); more --epochs or another --lr may help')


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m timm_cotnet.demo', description=__doc__.split('\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--model', default=EMBEDDED, help='a model of this package, such as cotnet50')
    parser.add_argument(
        '--pretrained', action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
        help=f'start from pretrained weights (default: only {EMBEDDED} does)')
    parser.add_argument('--epochs', type=int, default=5, help='passes over the training images')
    parser.add_argument('--batch-size', type=int, default=64, help='images per step')
    parser.add_argument('--lr', type=float, default=1e-3, help='highest learning rate')
    parser.add_argument('--img-size', type=int, default=64, help='side to which images are resized')
    parser.add_argument('--min-accuracy', type=float, default=90., help='percent below which the demonstration fails')
    parser.add_argument('--output', type=Path, default='cotnet-demo', help='folder for all that is written')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='where to compute')
    parser.add_argument('--seed', type=int, default=0, help='seed of all that is random')
    args = parser.parse_args(argv)
    args.pretrained = getattr(args, 'pretrained', args.model == EMBEDDED)
    for name in ('epochs', 'batch_size', 'img_size'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} is {getattr(args, name)}, expected 1 or more')
    return args


def check_embedded_weights(digits: Path, batch_size: int, device: torch.device) -> None:
    """Evaluates the weights in the package as they are.

    Raises:
        SystemExit: If they are worse than they should be.
    """
    model = timm.create_model(EMBEDDED, pretrained=True).to(device)
    _, loader = create_loaders(digits, resolve_data_config({}, model=model), batch_size)
    top1, *_ = evaluate(model, loader, device)
    print(f'{EMBEDDED} as it comes gets {top1:.1f} % of the held-out digits right.')
    if top1 < EMBEDDED_ACCURACY:
        sys.exit(f'It should be {EMBEDDED_ACCURACY} % or more: its weights are damaged or do not fit the model')


def create_loaders(digits: Path, data_config: Dict[str, Any], batch_size: int):
    """timm's loaders of the two splits of an image folder, with an augmentation that leaves digits readable."""
    train, val = (create_dataset('', root=digits, split=split) for split in ('train', 'val'))
    shared = dict(batch_size=batch_size, num_workers=0, persistent_workers=False, use_prefetcher=False)
    shared.update((key, data_config[key]) for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct'))
    train_loader = create_loader(
        train, is_training=True, scale=(0.7, 1.), ratio=(0.8, 1.25), hflip=0., color_jitter=None, **shared)
    return train_loader, create_loader(val, **shared)


def fine_tune(model: nn.Module, train_loader, val_loader, epochs: int, lr: float, device: torch.device) -> nn.Module:
    """Trains the model and returns the moving average of its weights, also a model."""
    optimizer = create_optimizer_v2(model, opt='adamw', lr=lr, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=epochs, warmup_epochs=min(1, epochs - 1),
        step_on_epochs=False, updates_per_epoch=len(train_loader))
    ema = ModelEmaV3(model, decay=0.999, use_warmup=True)
    for epoch in range(epochs):
        start = time.time()
        loss = train_one_epoch(model, ema, train_loader, optimizer, scheduler, epoch, device)
        model_accuracy, *_ = evaluate(model, val_loader, device)
        ema_accuracy, *_ = evaluate(ema.module, val_loader, device)
        print(
            f'epoch {epoch + 1}/{epochs}: loss {loss:.3f}, held-out accuracy {model_accuracy:.1f} % '
            f'(averaged weights {ema_accuracy:.1f} %), {time.time() - start:.1f} s', flush=True)
    return ema.module


def train_one_epoch(model, ema, loader, optimizer, scheduler, epoch: int, device: torch.device) -> float:
    """Returns the mean loss."""
    losses = AverageMeter()
    model.train()
    for step, (images, targets) in enumerate(loader):
        images, targets = images.to(device), targets.to(device)
        loss = F.cross_entropy(model(images), targets, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), len(targets))
        num_updates = epoch * len(loader) + step + 1
        ema.update(model, step=num_updates)
        scheduler.step_update(num_updates)
        if sys.stdout.isatty():
            print(f'  step {step + 1}/{len(loader)}, loss {losses.avg:.3f}', end='\r', flush=True)
    return losses.avg


@torch.inference_mode()
def evaluate(model: nn.Module, loader, device: torch.device) -> Tuple[float, torch.Tensor, torch.Tensor]:
    """Returns the percentage of right predictions, the logits (N, num_classes) and the targets (N,)."""
    model.eval()
    batches = [(model(images.to(device)).cpu(), targets) for images, targets in loader]
    logits, targets = (torch.cat(parts) for parts in zip(*batches))
    return accuracy(logits, targets)[0].item(), logits, targets


def save_folder(model: nn.Module, folder: Path) -> None:
    """Writes weights and config as timm's `save_for_hf` does, which an old timm refuses with a new huggingface_hub."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / 'model.safetensors')
    label_names = [str(digit) for digit in range(NUM_CLASSES)]
    path = folder / 'config.json'
    _hub.save_config_for_hf(model, path, model_config=dict(label_names=label_names))
    config = json.loads(path.read_text())
    config.get('model_args', {}).pop('num_classes', None)  # stands above them too; transformers takes it only once
    path.write_text(json.dumps(config, indent=2))


def load_folder(folder: Path) -> nn.Module:
    """The model that `save_folder` wrote."""
    if hasattr(_hub, 'load_model_config_from_path'):
        return timm.create_model(f'local-dir:{folder}', pretrained=True)
    config = json.loads((folder / 'config.json').read_text())  # an older timm has no `local-dir:`
    return timm.create_model(
        config['architecture'], num_classes=config['num_classes'], checkpoint_path=folder / 'model.safetensors')


@torch.inference_mode()
def first_contexts(model: nn.Module, images: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    """Length (over the channels) of the static and the dynamic context in the first CoT layer, (B, H, W) each."""
    layer = next(module for module in model.modules() if isinstance(module, CotLayer))
    inputs = []
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(images)
    handle.remove()
    return tuple(context.norm(dim=1).cpu() for context in layer.contexts(inputs[0]))


def draw_predictions(
        path: Path,
        title: str,
        model: nn.Module,
        dataset,
        data_config: Dict[str, Any],
        logits: torch.Tensor,
        targets: torch.Tensor,
        device: torch.device,
) -> None:
    """Draws up to two mistakes and one right prediction of each class, with the contexts of the first CoT layer."""
    from matplotlib.figure import Figure

    confidence, predicted = logits.softmax(1).max(1)
    is_right = predicted == targets
    chosen = torch.nonzero(~is_right).flatten()[:2].tolist()
    for label in range(NUM_CLASSES):
        chosen += torch.nonzero(is_right & (targets == label)).flatten()[:1].tolist()
    images = torch.stack([dataset[index][0] for index in chosen])
    static, dynamic = first_contexts(model, images.to(device))
    mean, std = (torch.tensor(data_config[key]).view(3, 1, 1) for key in ('mean', 'std'))
    pixels = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)  # (N, H, W, 3)

    rows = {'input': pixels, 'static\ncontext': static, 'dynamic\ncontext': dynamic}
    figure = Figure(figsize=(1.1 * len(chosen) + 0.5, 4.7), layout='constrained')
    figure.suptitle(title)
    figure.supxlabel('length of each pixel\'s context vector in the first CoT layer, brighter is longer', fontsize=10)
    grid = figure.subplots(len(rows), len(chosen), squeeze=False)
    for axes, (name, maps) in zip(grid, rows.items()):
        axes[0].set_ylabel(name)
        for ax, values in zip(axes, maps):
            ax.imshow(values, cmap='magma')
            ax.set(xticks=[], yticks=[])
    for ax, index in zip(grid[0], chosen):
        mistake = '' if is_right[index] else f', is {targets[index]}'
        ax.set_title(
            f'{predicted[index]}{mistake}\n{confidence[index]:.0%} sure', fontsize=9,
            color='tab:red' if mistake else 'tab:green')
    figure.savefig(path, dpi=130)


if __name__ == '__main__':
    main()
