"""Facts and numbers of the official implementation (https://github.com/JDAI-CV/CoTNet), run in float64 on the CPU.

Its CUDA-only operator was computed by the formula of its own unit test: unfold, multiply, sum.

- `variants.json`: of each official variant the state-dict keys and shapes, parameter count, measured GMACs, evaluation
  config, published accuracy, link to the official checkpoint, training recipe.
- `<variant>.npz`: logits, stage features, training-mode logits, gradients and running statistics of the whole network.
- `layers.npz`: outputs and gradients of the layers and of the operator.
- `fill.py`: weights and inputs, drawn from a stream that is seeded by the name of each tensor.
"""
import json
from pathlib import Path
from typing import Any, Dict

import numpy as np
import torch

from .fill import fill_state_dict, golden_input

FOLDER = Path(__file__).parent
_FACTS = json.loads((FOLDER / 'variants.json').read_text())
VARIANTS: Dict[str, Dict[str, Any]] = _FACTS['variants']
RECIPE_COMMON: Dict[str, Any] = _FACTS['recipe_common']  # what all training recipes share


def load(name: str) -> Dict[str, Any]:
    """The arrays of `<name>.npz`: numbers as tensors, texts as lists."""
    with np.load(FOLDER / f'{name}.npz') as data:
        return {
            key: torch.from_numpy(data[key]) if data[key].dtype.kind in 'fi' else [str(text) for text in data[key]]
            for key in data
        }


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """The module in float64, with the weights that the numbers belong to."""
    module = module.double()
    module.load_state_dict(fill_state_dict(module))
    return module
