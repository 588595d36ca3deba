"""Tells which implementation runs in each layer of a model, and why the faster ones do not."""
from typing import Optional, TextIO

import torch
from torch import nn

from .ops.dispatch import recorded


def explain(model: nn.Module, x: torch.Tensor, file: Optional[TextIO] = None) -> None:
    """Runs `model(x)` and prints, for each layer of this package, what computed it and why nothing faster did.

    Modes count (training or evaluation, gradients, autocast): call it as the model will be called. In training mode it
    changes running statistics, as every call does.

    Args:
        model: A model, or a layer alone.
        x: Input of the model.
        file: Where to print, by default standard output.
    """
    with recorded() as choices:
        model(x)
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    rows = []
    for choice in choices:
        name = '' if choice.module is None else names.get(choice.module, type(choice.module).__name__)
        rows.append((name, choice.implementation, choice.why_not))
    width = max((len(name) for name, _, _ in rows), default=0)
    for name, implementation, why_not in rows:
        print(f'{name:{width}}  {implementation}', file=file)
        for faster, reason in why_not:
            print(f'{"":{width}}    not {faster}: {reason}', file=file)
    if not rows:
        print('no layer of timm_cotnet was called', file=file)
