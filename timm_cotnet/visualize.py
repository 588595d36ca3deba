"""Draws what CoT layers see in images: `python -m timm_cotnet.visualize IMAGE... --model cotnet50 --output DIR`.

For each image the energy and the main direction of the dynamic filters, the static and the dynamic context, how both
are mixed, and Grad-CAM of the top classes, as PNG files and as one page, `index.html`, that opens from disk.

What the layers compute is taken by hooks on their children, so that the model stays as it is.
"""
import argparse
import contextlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple, Union

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import Tensor, nn

from .checkpoint import UNLOADABLE, explained, read_config
from .hub import WEIGHTS_NAME
from .layers import CotLayer
from .misfit import first_few

__all__ = ['GradCam', 'LayerMaps', 'cot_layers', 'grad_cam', 'layer_maps', 'load_model', 'visualize']

# what Pillow raises for a file that is missing, broken, no image, or (NotImplementedError) of a kind it cannot decode
UNREADABLE = (OSError, SyntaxError, ValueError, NotImplementedError, Image.DecompressionBombError)


@dataclass(frozen=True)
class LayerMaps:
    """What one CoT layer computes on one image; float32 on the CPU.

    Attributes:
        name: Name of the layer in the model.
        filters: Dynamic filters, (groups, k * k, H, W); taps row by row.
        static: Static context, (C, H, W).
        dynamic: Dynamic context, (C, H, W).
        mixing: Weights of the dynamic and of the static context, (2, C); the two of a channel add up to one.
    """
    name: str
    filters: Tensor
    static: Tensor
    dynamic: Tensor
    mixing: Tensor

    def energy(self) -> Tensor:
        """Length of the filter at each pixel, root mean square over the groups, (H, W)."""
        return self.filters.square().sum(1).mean(0).sqrt()

    def direction(self) -> Tuple[Tensor, Tensor]:
        """Along which line through the pixel its filter gathers, (H, W) each.

        Each tap but the central one votes with its energy for the line on which it lies. An angle is doubled before
        the votes are added, as a line has no front: opposite taps agree, perpendicular ones cancel.

        Returns:
            Angle of the line in radians, from 0 (to the right) to pi, counter-clockwise; and its coherence, from 0 (no
            line is preferred) to 1 (all energy lies on it).
        """
        votes = self.filters.square().sum(0)  # (k * k, H, W)
        side = round(len(votes) ** 0.5)
        offsets = torch.arange(side) - side // 2
        angles = torch.atan2(-offsets[:, None], offsets[None]).flatten()  # rows count downwards
        is_neighbour = torch.arange(side * side) != side * side // 2
        votes, doubled = votes[is_neighbour], 2 * angles[is_neighbour].view(-1, 1, 1)
        x, y = (votes * doubled.cos()).sum(0), (votes * doubled.sin()).sum(0)
        coherence = torch.hypot(x, y) / votes.sum(0).clamp(min=torch.finfo(votes.dtype).tiny)
        return (torch.atan2(y, x) / 2) % torch.pi, coherence

    def dynamic_share(self) -> Tensor:
        """Share of the dynamic context in the length of what is mixed at each pixel, from 0 to 1, (H, W)."""
        dynamic, static = (
            (weight.view(-1, 1, 1) * context).norm(dim=0)
            for weight, context in zip(self.mixing, (self.dynamic, self.static)))
        return dynamic / (dynamic + static).clamp(min=torch.finfo(dynamic.dtype).tiny)


@dataclass(frozen=True)
class GradCam:
    """Grad-CAM of the classes that a model finds most probable.

    Attributes:
        classes: Class indices, the most probable first.
        probabilities: Their probabilities.
        maps: One map per class, (K, H, W), from 0 up.
    """
    classes: List[int]
    probabilities: List[float]
    maps: Tensor


def cot_layers(model: nn.Module, names: Optional[Sequence[str]] = None) -> Dict[str, CotLayer]:
    """CoT layers of a model by name: those that are named, or the last one of each width, which ends a stage.

    Raises:
        ValueError: If there are none, or a name is that of no CoT layer.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, CotLayer)}
    if not found:
        what = 'has no CoT layer'
        if any('Folded' in type(module).__name__ for module in model.modules()):
            what = 'has folded CoT layers, which keep no contexts; visualize it before reparameterize_model'
        name = getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__
        raise ValueError(f'{name} {what}; timm.list_models("*cotne*") are models that have')
    if names is None:
        return {name: found[name] for name in {layer.dim: name for name, layer in found.items()}.values()}
    for name in names:
        if name not in found:
            raise ValueError(f'{name!r} is no CoT layer of the model; it has {first_few(list(found))}')
    return {name: found[name] for name in names}


@torch.no_grad()
def layer_maps(model: nn.Module, x: Tensor, layers: Optional[Sequence[str]] = None) -> List[LayerMaps]:
    """What CoT layers of a model compute on one image, in evaluation mode.

    Args:
        model: Any model that has CoT layers.
        x: The image as the model takes it, (1, C, H, W).
        layers: Names of the layers; by default the last CoT layer of each width.

    Raises:
        ValueError: If x is not one image, or the model has no such layers.
    """
    _check_single(x)
    chosen = cot_layers(model, layers)
    kept = {}

    def keep(key):
        def hook(module, args, output):
            kept[key] = output[0].detach().to('cpu', torch.float32, copy=True)  # what follows may work in place
        return hook

    with contextlib.ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        for name, layer in chosen.items():
            for child in ('embed', 'key_embed', 'act', 'se'):
                handle = getattr(layer, child).register_forward_hook(keep((name, child)))
                stack.callback(handle.remove)
        model(x.to(next(model.parameters())))
    maps = []
    for name, layer in chosen.items():
        if (name, 'se') not in kept:
            raise ValueError(f'{name} was not called by the model')
        filters = kept[name, 'embed'].unflatten(0, (-1, layer.kernel_size ** 2))
        mixing = kept[name, 'se'].view(layer.dim, 2).softmax(1).T
        maps.append(LayerMaps(name, filters, kept[name, 'key_embed'], kept[name, 'act'], mixing))
    return maps


def grad_cam(model: nn.Module, x: Tensor, top: int = 3) -> GradCam:
    """Grad-CAM (arXiv:1610.02391) of the most probable classes, at the output of the network's last stage.

    That is the last module of timm's `feature_info`, or the last CoT layer of a model that has none.

    Args:
        model: A classifier.
        x: The image as the model takes it, (1, C, H, W).
        top: Number of classes.

    Raises:
        ValueError: If x is not one image, the model gives no class scores, or its last stage is not called as a module.
    """
    _check_single(x)
    stages = [stage['module'] for stage in getattr(model, 'feature_info', ()) or ()]
    target = model.get_submodule(stages[-1] if stages else list(cot_layers(model))[-1])
    features = []

    def cut(module, args, output):  # gradients are needed from here on only
        features.append(output.detach().requires_grad_())
        return features[-1].clone()

    handle = target.register_forward_hook(cut)
    try:
        with _evaluating(model), torch.inference_mode(False), torch.enable_grad():
            scores = model(x.clone().to(next(model.parameters())))
            if not isinstance(scores, Tensor) or scores.ndim != 2 or getattr(model, 'num_classes', 1) == 0:
                raise ValueError('the model gives no class scores')
            if not features:
                raise ValueError(
                    'the model passes the call of its last stage by, as gradient checkpointing does: turn that off by '
                    'set_grad_checkpointing(False)')
            probabilities, classes = scores[0].softmax(0).topk(min(top, scores.shape[1]))
            maps = []
            for index in classes:
                gradient, = torch.autograd.grad(scores[0, index], features[0], retain_graph=True)
                maps.append((gradient.mean((2, 3), keepdim=True) * features[0]).sum(1)[0].relu())
    finally:
        handle.remove()
    return GradCam(classes.tolist(), probabilities.tolist(), torch.stack(maps).detach().float().cpu())


def _check_single(x: Tensor) -> None:
    if x.ndim != 4 or x.shape[0] != 1:
        raise ValueError(f'x has shape {tuple(x.shape)}, expected (1, C, H, W): one image')


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode while it lasts, and as it was afterwards, module by module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def visualize(
        model: nn.Module,
        images: Sequence[Union[str, Path]],
        output: Union[str, Path],
        img_size: Optional[Sequence[int]] = None,
        layers: Optional[Sequence[str]] = None,
        top: int = 3,
        class_names: Optional[Sequence[str]] = None,
        title: Optional[str] = None,
        note: str = '',
) -> Path:
    """Writes pictures of what a model's CoT layers see in images, and a page with all of them.

    Args:
        model: Any model that has CoT layers, on any device.
        images: Image files.
        output: Folder to write to; made if it does not exist.
        img_size: Height and width to which images are resized and cropped; by default that of the model.
        layers: Names of the layers; by default the last CoT layer of each width.
        top: Number of classes for Grad-CAM.
        class_names: Name of each class; by default those that the model knows, ImageNet's for 1000 classes, or numbers.
        title: What the model is called; by default its architecture.
        note: Stands above all, such as that weights are random.

    Returns:
        The page, `index.html`.

    Raises:
        ValueError: If the model has no such layers, takes no images of 1 or 3 channels or has weights that are not
            finite, a file is no image, or output cannot be made or holds one of the images.
    """
    from . import pictures

    cot_layers(model, layers)
    config = getattr(model, 'pretrained_cfg', {})
    size = {} if img_size is None else {'input_size': (3, *img_size)}
    data_config = resolve_data_config(size, model=model, use_test_size=True)
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    if channels not in (1, 3):
        raise ValueError(f'{config.get("architecture", "the model")} takes {channels} channels; images have 1 or 3')
    if channels == 1:
        data_config.update((key, (sum(data_config[key]) / 3,)) for key in ('mean', 'std'))
    transform = create_transform(**data_config)
    mean, std = (torch.tensor(data_config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    names = class_names or _class_names(model)
    title = title or config.get('architecture') or type(model).__name__
    images, mode, output = [Path(path) for path in images], 'L' if channels == 1 else 'RGB', Path(output)
    for path in images:  # refused before anything is written
        _open(path, mode)
        if path.resolve().parent == output.resolve():
            raise ValueError(f'output is {output}, where {path.name} lies and may be written over: give another folder')
    if not all(t.isfinite().all() for t in model.state_dict().values()):
        raise ValueError('the model has weights that are not finite, so there is nothing to see: its training diverged')
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f'output is {output}, where nothing can be written: {error}') from error

    sections, stems = [], set()
    for path in images:
        x = transform(_open(path, mode))
        pixels = (x * std + mean).clamp(0, 1).permute(1, 2, 0).float()  # (H, W, C)
        maps = layer_maps(model, x[None], layers)
        try:
            cam, no_cam = grad_cam(model, x[None], top), ''
        except ValueError as error:
            cam, no_cam = None, f'No Grad-CAM: {error}.'
        stem = _unused(re.sub(r'[^\w.-]+', '_', path.stem), stems)
        head = f'{title} on {path.name}' + (f'\n{note}' if note else '')
        sections.append(pictures.draw_section(output, stem, path.name, head, pixels, maps, cam, names, no_cam))
    return pictures.write_page(output / 'index.html', title, note, sections)


def _unused(stem: str, taken: set) -> str:
    """The stem, numbered if it is taken; it is taken afterwards."""
    name, count = stem, 1
    while name in taken:
        count += 1
        name = f'{stem}-{count}'
    taken.add(name)
    return name


def _open(path: Path, mode: str) -> Image.Image:
    try:
        return Image.open(path).convert(mode)
    except UNREADABLE as error:
        raise ValueError(f'{path} cannot be read as an image: {error}') from error


def _class_names(model: nn.Module) -> List[str]:
    known = getattr(model, 'pretrained_cfg', {}).get('label_names')
    count = getattr(model, 'num_classes', 0)
    if known and len(known) == count:
        return list(known)
    if count == 1000:
        info = ImageNetInfo()
        return [info.index_to_description(index).split(',')[0] for index in range(count)]
    return [f'class {index}' for index in range(count)]


def load_model(
        name: str,
        checkpoint: Optional[Path] = None,
        num_classes: Optional[int] = None,
        pretrained: bool = True,
) -> Tuple[nn.Module, str]:
    """A model and, if its weights are random, why.

    Args:
        name: Model of timm, or a folder with `config.json` and `model.safetensors`, as `convert` and `demo` write them.
        checkpoint: File with weights, which timm loads.
        num_classes: Number of classes, by default the model's.
        pretrained: Whether pretrained weights are sought where there is no checkpoint.

    Raises:
        RuntimeError: If timm knows no such model, or the checkpoint does not fit.
        OSError: If there is no such checkpoint, or a folder has no config.json or no weights.
        CheckpointError: If the config.json is not that of a classifier.
    """
    if checkpoint is not None and not checkpoint.is_file():
        raise FileNotFoundError(f'--checkpoint is {checkpoint}, where no file is')
    classes = {} if num_classes is None else {'num_classes': num_classes}
    folder = Path(name.removeprefix('local-dir:'))
    if (folder / 'config.json').is_file():  # timm before 1.0.16 reads no folders
        config = read_config(folder)
        known = dict(config['pretrained_cfg'], label_names=config.get('label_names'))
        options = {**(config.get('model_args') or {}), 'num_classes': config.get('num_classes', 1000), **classes}
        if checkpoint is None and not (folder / WEIGHTS_NAME).is_file():
            raise FileNotFoundError(f'{folder} has no {WEIGHTS_NAME}; give weights by --checkpoint')
        model = timm.create_model(
            config['architecture'], pretrained_cfg=known, checkpoint_path=checkpoint or folder / WEIGHTS_NAME,
            **options)
        return model.eval(), ''
    if folder.is_dir() and not timm.is_model(name):
        raise FileNotFoundError(f'{folder} is a folder without config.json, which convert and demo write')
    if checkpoint is not None:
        return timm.create_model(name, checkpoint_path=checkpoint, **classes).eval(), ''
    with torch.device('meta'):
        cot_layers(timm.create_model(name))  # refused before weights are sought
    why = 'none were asked for'
    if pretrained:
        try:
            return timm.create_model(name, pretrained=True, **classes).eval(), ''
        except (OSError, RuntimeError) as error:
            why = str(error)
    return timm.create_model(name, **classes).eval(), why


def main(argv: Optional[List[str]] = None) -> int:
    """The command `python -m timm_cotnet.visualize`; returns its exit status."""
    parser = argparse.ArgumentParser(prog='python -m timm_cotnet.visualize', description=__doc__.splitlines()[0])
    parser.add_argument('images', nargs='+', type=Path, metavar='IMAGE', help='image file')
    parser.add_argument(
        '--model', default='cotnet50', help='model of timm, or a folder with its weights and config.json, as convert '
        'and demo write them (default: %(default)s)')
    parser.add_argument('--checkpoint', type=Path, metavar='FILE', help='weights of the model')
    parser.add_argument(
        '--pretrained', action=argparse.BooleanOptionalAction, default=True,
        help='seek pretrained weights where there is no checkpoint (default); without weights, random ones are shown')
    parser.add_argument('--num-classes', type=int, metavar='N', help="default: the model's")
    parser.add_argument('--output', type=Path, default=Path('cotnet-views'), metavar='DIR', help='default: %(default)s')
    parser.add_argument(
        '--img-size', type=int, nargs='+', metavar='N', help="side, or height and width; default: the model's")
    parser.add_argument(
        '--layers', nargs='+', metavar='NAME', help='CoT layers by name; default: the last one of each stage')
    parser.add_argument('--top', type=int, default=3, metavar='N', help='classes for Grad-CAM (default: %(default)s)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='default: %(default)s')
    args = parser.parse_args(argv)
    size = args.img_size and (args.img_size * 2 if len(args.img_size) == 1 else args.img_size)
    if size and (len(size) != 2 or min(size) < 32):
        parser.error(f'--img-size is {" ".join(map(str, args.img_size))}, expected one or two numbers from 32 on')
    if args.top < 1:
        parser.error(f'--top is {args.top}, expected 1 or more')
    if importlib.util.find_spec('matplotlib') is None:
        parser.error('matplotlib is not installed; get it by: pip install "timm-cotnet[demo]"')
    torch.manual_seed(0)  # random weights, if need be, are the same each time
    try:
        model, why_random = load_model(args.model, args.checkpoint, args.num_classes, args.pretrained)
        note = ''
        if why_random:
            note = 'RANDOM WEIGHTS: these maps show the layers at work, not what a trained network sees'
            print(f'{note}.\nWhy: {why_random}\n--checkpoint FILE gives the model weights.', file=sys.stderr)
        elif not args.checkpoint and args.num_classes and args.num_classes != model.pretrained_cfg['num_classes']:
            note = 'RANDOM CLASSIFIER: Grad-CAM and probabilities are those of classes that it has not learned'
            print(f'{note}.', file=sys.stderr)
        try:
            model.to(args.device)
        except (AssertionError, RuntimeError) as error:  # the first: torch without CUDA
            parser.error(f'--device is {args.device}, which cannot be used: {error}')
        page = visualize(
            model, args.images, args.output, size, args.layers, args.top, title=args.model, note=note)
    except UNLOADABLE as error:
        print(f'error: {explained(error)}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'\nStopped. Pictures that were drawn before are in {args.output}.', file=sys.stderr)
        return 130
    print(f'Written: {page}, and the pictures that it shows; open it in a browser.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
