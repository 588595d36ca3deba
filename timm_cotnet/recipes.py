"""Training recipes for timm's train.py, the published ones and two of ours: `python -m timm_cotnet.recipes`.

Without a name, lists them. With one, writes it as YAML for `train.py --config`, its learning rate scaled to the number
of images in a step, and prints the command that trains.
"""
import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

import timm
import yaml

__all__ = ['RECIPES', 'Recipe']

TIMM = 'https://github.com/huggingface/pytorch-image-models'


@dataclass(frozen=True)
class Recipe:
    """How to train a model.

    Attributes:
        about: Where it comes from.
        gpus: Number of processes, with `args['batch_size']` images each, to which `args['lr']` belongs.
        args: Arguments of timm's train.py.
    """
    about: str
    gpus: int
    args: Dict[str, Any]

    def scaled(self, processes: int, batch_size: int, grad_accum_steps: int = 1) -> Dict[str, Any]:
        """The arguments for other numbers of processes, images in each, and batches in a step.

        The learning rate grows with the images in a step, for adaptive optimizers with the root of their number, as
        timm scales `--lr-base`. The rates at which warm-up starts and the schedule ends stay. Repeated augmentation is
        for several processes only.
        """
        ratio = processes * batch_size * grad_accum_steps / (self.gpus * self.args['batch_size'])
        if any(name in self.args['opt'] for name in ('ada', 'lamb')):
            ratio **= 0.5
        args = {**self.args, 'batch_size': batch_size, 'lr': float(f'{self.args["lr"] * ratio:.6g}')}
        if processes == 1:
            args.pop('aug_repeats', None)  # which timm refuses there
        return args if grad_accum_steps == 1 else {**args, 'grad_accum_steps': grad_accum_steps}


def _load() -> Dict[str, Recipe]:
    content = yaml.safe_load(Path(__file__).with_name('recipes.yaml').read_text(encoding='utf-8'))
    official = content['official']
    recipes = {
        model: Recipe(official['about'], official['gpus'], {'model': model, **official['common'], **args})
        for model, args in official['models'].items()}
    return recipes | {name: Recipe(**recipe) for name, recipe in content['ours'].items()}


RECIPES = _load()


def main(argv: Optional[List[str]] = None) -> int:
    """The command `python -m timm_cotnet.recipes`; returns its exit status."""
    parser = argparse.ArgumentParser(prog='python -m timm_cotnet.recipes', description=__doc__.splitlines()[0])
    parser.add_argument('name', nargs='?', help='recipe to write; without it, all are listed')
    parser.add_argument('--gpus', type=int, metavar='N', help='GPUs in each machine (default: as in the recipe)')
    parser.add_argument('--nodes', type=int, default=1, metavar='N', help='number of machines (default: 1)')
    parser.add_argument('--batch-size', type=int, metavar='N', help='images on each GPU (default: as in the recipe)')
    parser.add_argument('--grad-accum-steps', type=int, default=1, metavar='N', help='batches in a step (default: 1)')
    parser.add_argument('--model', help='another model in timm')
    parser.add_argument('--num-classes', type=int, metavar='N', help='classes of the data (default: as in the model)')
    parser.add_argument('--output', type=Path, metavar='FILE', help='what to write (default: NAME.yaml)')
    args = parser.parse_args(argv)
    if args.name is None:
        print('\n'.join(_rows()))
        return 0
    if args.name not in RECIPES:
        parser.error(f'there is no recipe {args.name!r}; there are {", ".join(RECIPES)}')
    recipe = RECIPES[args.name]
    for option in ('gpus', 'nodes', 'batch_size', 'grad_accum_steps', 'num_classes'):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f'--{option.replace("_", "-")} is {value}, expected 1 or more')
    gpus, batch_size = args.gpus or recipe.gpus, args.batch_size or recipe.args['batch_size']
    model = args.model or recipe.args['model']
    if not timm.is_model(model):
        parser.error(f'timm knows no model {model!r}; timm.list_models() lists them')
    try:
        timm.models.get_pretrained_cfg(model, allow_unregistered=False)
    except RuntimeError as error:
        parser.error(f'--model is {model}: {error}')
    content = {**recipe.scaled(args.nodes * gpus, batch_size, args.grad_accum_steps), 'model': model}
    if args.num_classes is not None:
        content['num_classes'] = args.num_classes

    path = args.output or Path(f'{args.name}.yaml')
    if path.exists():
        parser.error(f'{path} exists; remove it or name another file by --output')
    images = args.nodes * gpus * batch_size * args.grad_accum_steps
    header = f'# {args.name} of timm_cotnet, {recipe.about}. Images in a step: {images}, GPUs: {args.nodes * gpus}\n'
    try:
        path.write_text(header + yaml.safe_dump(content, sort_keys=False, default_flow_style=None), encoding='utf-8')
    except OSError as error:
        parser.error(f'--output is {path}, which cannot be written: {error}')
    print(f'{path}: {images} images in a step, learning rate {content["lr"]:g}. Train by')
    print(f'  {_launcher(args.nodes, gpus)} train.py --config {shlex.quote(str(path))} --data-dir DIR')
    if args.nodes > 1:
        print('on each machine, where HOST is the name of one of them.')
    print(f'train.py is that of {TIMM}.')
    return 0


def _rows() -> List[str]:
    rows = [
        f'{name:16}  {recipe.gpus} x {recipe.args["batch_size"]:3} images, {recipe.args["opt"]:5} '
        f'{recipe.args["lr"]:<6g}  {recipe.args["epochs"]} epochs  {recipe.about}' for name, recipe in RECIPES.items()]
    return [*rows, 'python -m timm_cotnet.recipes NAME writes one; --help tells how to fit it to your GPUs']


def _launcher(nodes: int, gpus: int) -> str:
    if nodes * gpus == 1:
        return 'python'
    if nodes == 1:
        return f'torchrun --nproc-per-node {gpus}'
    return f'torchrun --nnodes {nodes} --nproc-per-node {gpus} --rdzv-backend c10d --rdzv-endpoint HOST:29500'


if __name__ == '__main__':
    sys.exit(main())
