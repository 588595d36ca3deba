"""Tells which implementation runs in each layer of a model of timm's registry, and why the faster ones do not.

The command of `timm_cotnet.explain(model, x)`, which does the same for a model of one's own.
"""
import argparse
import sys
from contextlib import nullcontext
from typing import List, Optional

import timm
import torch
from timm.utils import reparameterize_model

from .explanation import explain


def main(argv: Optional[List[str]] = None) -> int:
    """The command `python -m timm_cotnet.explain`; returns its exit status."""
    parser = argparse.ArgumentParser(prog='python -m timm_cotnet.explain', description=__doc__.splitlines()[0])
    parser.add_argument('model', help='name of a model in timm, such as cotnet50')
    parser.add_argument('--reparam', action='store_true', help='fold the batch norms first')
    parser.add_argument('--train', action='store_true', help='training mode, with gradients')
    parser.add_argument('--batch-size', type=int, default=2, metavar='N')
    parser.add_argument('--img-size', type=int, metavar='N', help='default: that of the model')
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16', 'float16', 'float64'])
    parser.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--contiguous', action='store_true', help='contiguous memory instead of channels-last')
    args = parser.parse_args(argv)
    if args.reparam and args.train:
        parser.error('--reparam is for evaluation: leave --train out')
    if not timm.is_model(args.model):
        parser.error(f'timm knows no model {args.model!r}; timm.list_models() lists them')
    for option in ('batch_size', 'img_size'):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f'--{option.replace("_", "-")} is {value}, expected 1 or more')
    try:
        torch.empty(0, device=args.device)
    except (AssertionError, RuntimeError) as error:  # the first: torch without CUDA
        parser.error(f'--device is {args.device}, which cannot be used: {error}')

    memory_format = torch.contiguous_format if args.contiguous else torch.channels_last
    try:
        model = timm.create_model(args.model).train(args.train)
    except RuntimeError as error:  # there is no such tag
        parser.error(str(error))
    size = args.img_size or model.default_cfg['input_size'][-1]
    if args.reparam:
        model = reparameterize_model(model)
    dtype = getattr(torch, args.dtype)
    model = model.to(args.device, dtype).to(memory_format=memory_format)
    x = torch.randn(args.batch_size, 3, size, size, device=args.device, dtype=dtype).to(memory_format=memory_format)
    amp = torch.autocast(x.device.type, torch.bfloat16) if args.amp else nullcontext()
    try:
        with torch.set_grad_enabled(args.train), amp:
            explain(model, x)
    except ValueError as error:  # of norms, which refuse a single value of each channel in training
        sys.exit(f'{args.model} does not run on {tuple(x.shape)}: {error}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
