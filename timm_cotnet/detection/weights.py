"""Weights of whole detectors: found in a folder or on the Hub, verified, checked for fit, and loaded."""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Union

from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ..hub import DEFAULT_NAMESPACE, HUB_NAMESPACE, WEIGHTS_NAME, describe_error, fetch
from ..misfit import differences, first_few
from ..pretrained import WeightsError
from .published import CHECKPOINTS_URL, PUBLISHED_DETECTORS, TAG, detector_name

__all__ = ['CONFIG_KEYS', 'DetectorWeights', 'find_weights', 'has_norms', 'load_weights', 'read_keys']

CONFIG_KEYS = ('detector', 'backbone', 'num_classes', 'image_mean', 'image_std')


@dataclass(frozen=True)
class DetectorWeights:
    """Where the weights of a detector lie.

    Attributes:
        name: What they were called: a folder, or a repository of the Hub.
        path: `model.safetensors`.
        config: Content of `config.json`: at least the `CONFIG_KEYS`.
    """
    name: str
    path: Path
    config: Dict[str, Any]


def find_weights(weights: Union[str, Path], kind: str, backbone: str) -> DetectorWeights:
    """Finds the weights of a detector; files of the Hub are downloaded and verified.

    Args:
        weights: 'coco', 'hf-hub:NAME/REPOSITORY[@REVISION]', or a folder.
        kind: Function that makes the detector.
        backbone: Name of its backbone.

    Raises:
        ValueError: If `weights` is none of these.
        WeightsError: If they cannot be had, or are those of another detector.
    """
    text = str(weights)
    name = f'{detector_name(kind, backbone)}.{TAG}'
    if text == 'coco':
        if name not in PUBLISHED_DETECTORS:
            backbones = sorted({facts.backbone for facts in PUBLISHED_DETECTORS.values()})
            raise WeightsError(f"No weights 'coco' for {backbone}: there are some for {', '.join(backbones)}.")
        found = _fetch(f'{HUB_NAMESPACE}/{name}', PUBLISHED_DETECTORS[name].sha256)
    elif text.startswith('hf-hub:'):
        found = _fetch(text.removeprefix('hf-hub:'))
    elif Path(weights).is_dir():
        found = _read(text, Path(weights, 'config.json'), Path(weights, WEIGHTS_NAME))
    else:
        raise ValueError(
            f"weights is {text!r}; it may be 'coco', 'hf-hub:NAME/REPOSITORY', or a folder; this is no folder")
    said = (found.config['detector'], found.config['backbone'])
    if said != (kind, backbone):
        raise WeightsError(f'{found.name} holds weights of {said[0]}({said[1]!r}), not of {kind}({backbone!r}).')
    return found


def _fetch(repo: str, sha256: Optional[str] = None) -> DetectorWeights:
    repo_id, _, revision = repo.partition('@')
    try:
        config = fetch(repo_id, 'config.json', revision or None)
        path = fetch(repo_id, WEIGHTS_NAME, revision or None, sha256=sha256)
    except Exception as error:  # those of huggingface_hub and of its transport have no common class
        where = f'{repo_id} (revision {revision or "main"}) at {constants.ENDPOINT}'
        unpublished = repo_id.startswith(f'{DEFAULT_NAMESPACE}/') and sha256 is None
        reason = 'this project has not published them on the Hub yet' if unpublished else describe_error(error)
        raise WeightsError(
            f'No weights from {where}: {reason}.\n'
            f'Ways to get weights:\n- an official checkpoint, from {CHECKPOINTS_URL}\n'
            '  converted by `python -m timm_cotnet.detection.convert CHECKPOINT --output DIR` and loaded by '
            "`weights='DIR'`\n"
            '- an account of your own, to which `python -m timm_cotnet.publish DIR --namespace NAME` uploads, or a\n'
            f'  mirror: TIMM_COTNET_HUB names it (now {HUB_NAMESPACE})') from error
    return _read(repo, Path(config), Path(path))


def _read(name: str, config_path: Path, path: Path) -> DetectorWeights:
    try:
        config = json.loads(config_path.read_text(encoding='utf-8'))
        missing = [key for key in CONFIG_KEYS if key not in config]
    except (OSError, ValueError) as error:
        raise WeightsError(f'{name} holds no config.json of a detector that can be read ({error}).') from error
    if missing:
        raise WeightsError(f'The config.json of {name} is not that of a detector: it has no {", ".join(missing)}.')
    if not path.is_file():
        raise WeightsError(f'{name} holds no {WEIGHTS_NAME}.')
    return DetectorWeights(name, path, config)


def read_keys(weights: DetectorWeights) -> List[str]:
    """Names of the tensors, without reading these.

    Args:
        weights: What `find_weights` returned.

    Raises:
        WeightsError: If the file is damaged.
    """
    try:
        with safe_open(weights.path, 'pt') as file:
            return list(file.keys())
    except SafetensorError as error:
        raise WeightsError(f'{weights.path} is not a readable safetensors file ({error}).') from error


def has_norms(keys: Iterable[str]) -> bool:
    """Whether pyramid and heads have norms; those trained without weights and with norm='frozen' have none.

    Args:
        keys: Names of the tensors of a detector.
    """
    return any(key.startswith('backbone.fpn.') and key.endswith('.running_mean') for key in keys)


def load_weights(model: nn.Module, weights: DetectorWeights, num_classes: int) -> None:
    """Loads weights into a detector.

    Where the model has another number of classes than the weights, what depends on it stays as it is.

    Args:
        model: The detector that the weights were found for.
        weights: What `find_weights` returned.
        num_classes: Number of classes of the model, the background included.

    Raises:
        WeightsError: If keys or shapes differ elsewhere, or the file is damaged.
    """
    try:
        state_dict = load_file(weights.path)
    except SafetensorError as error:
        raise WeightsError(f'{weights.path} is not a readable safetensors file ({error}).') from error
    expected = model.state_dict()
    if num_classes != weights.config['num_classes']:
        for key in [key for key in state_dict if '_predictor.' in key]:
            if key in expected and expected[key].shape != state_dict[key].shape:
                state_dict[key] = expected[key]
    counters = {key: value for key, value in expected.items() if key.endswith('num_batches_tracked')}
    state_dict = {key: value for key, value in state_dict.items() if not key.endswith('num_batches_tracked')}
    misfit = {what: keys for what, keys in differences({**state_dict, **counters}, expected).items() if keys}
    if misfit:
        listed = '; '.join(f'{len(keys)} tensors are {what} ({first_few(keys)})' for what, keys in misfit.items())
        raise WeightsError(f'The weights of {weights.name} do not fit the detector: {listed}.')
    model.load_state_dict({**state_dict, **counters})
