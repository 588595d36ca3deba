"""C kernels for channels-last tensors on the CPU: an optional wing, without which everything works, only slower.

Each kernel stands in for what the operators define in plain PyTorch, and knows nothing of models. Bindings lie beside
the C files they call:

- `build.py` compiles, caches and loads the libraries; `memory.h` and `vectors.h` are what all C files build on.
- `local_conv.py`: the local convolution and its gradients (`local_conv.c`, on rows as in `local_conv.h`).
- `batch_norm.py`: batch norm in training with what follows it in a block (`batch_norm.c`).
- `contexts.py`: all that lies behind a CoT layer's convolutions, folded (`contexts_folded.c`) and in training
  (`contexts_training.c`).
- `cot_layer.py`: a whole layer in training.
- `stand_ins.py`: what is made of them for folded layers, and for blocks in training.
"""
from typing import Optional

import torch

from .build import load
from .cot_layer import train_cot_layer
from .local_conv import MAX_KERNEL_SIZE, local_conv
from .stand_ins import folded_cot_layer, train_bottleneck

__all__ = [
    'MAX_KERNEL_SIZE', 'folded_cot_layer', 'local_conv', 'train_bottleneck', 'train_cot_layer', 'why_not']


@torch.compiler.assume_constant_result
def why_not(dtype: torch.dtype) -> Optional[str]:
    """The reason why the kernels cannot run on tensors of a dtype; None if they can."""
    library = load(dtype)
    return library if isinstance(library, str) else None
