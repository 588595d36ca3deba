"""What a training run leaves on the disk: its state, to go on from, and the trained detector."""
import json
import os
from pathlib import Path
from typing import Any, Dict, Optional

import torch
from torch import nn

from ..convert import write_folder

__all__ = ['StateError', 'load_state', 'save_detector', 'save_state']

STATE = 'state.pth'


class StateError(RuntimeError):
    """A file of a run that cannot be used; the message says which and why."""


def save_state(folder: Path, iteration: int, settings: Dict[str, Any], **parts: Any) -> None:
    """Writes the state of a run, in one piece or not at all.

    Args:
        folder: Where to write `state.pth`.
        iteration: Number of iterations done.
        settings: All that the run depends on.
        **parts: What has a `state_dict`.
    """
    state = dict(iteration=iteration, settings=settings, **{name: part.state_dict() for name, part in parts.items()})
    unfinished = folder / f'{STATE}.part'
    torch.save(state, unfinished)
    os.replace(unfinished, folder / STATE)


def load_state(folder: Path, settings: Dict[str, Any], **parts: Any) -> Optional[int]:
    """Puts the state of a run into its parts.

    Random numbers need no state here: those of an iteration follow from the seed and the iteration's number.

    Args:
        folder: Where `state.pth` is.
        settings: All that the run depends on.
        **parts: What takes a state, as in `save_state`.

    Returns:
        Number of iterations done.

    Raises:
        StateError: If there is no whole state, or if it is one of a run with other settings.
    """
    path = folder / STATE
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        found = state['settings']
    except FileNotFoundError as error:
        raise StateError(f'{path} does not exist, so there is no run to resume; leave out --resume') from error
    except Exception as error:  # a damaged file ends in errors of many kinds
        raise StateError(f'{path} is no state of a run: {type(error).__name__}: {error}') from error
    differing = [f'{key} was {found.get(key)!r} and is {value!r}' for key, value in settings.items()
                 if found.get(key) != value]
    if differing:
        raise StateError(f'{path} belongs to another run: {"; ".join(differing)}')
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state['iteration']


def save_detector(folder: Path, model: nn.Module, config: Dict[str, Any]) -> None:
    """Writes a trained detector as `model.safetensors`, and `config.json` that tells `weights=folder` what it is.

    Args:
        folder: Where to write.
        model: The detector.
        config: How it was made.

    Raises:
        OSError: If a file cannot be written.
    """
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    write_folder({'config.json': json.dumps(config, indent=2) + '\n'}, weights, folder)
