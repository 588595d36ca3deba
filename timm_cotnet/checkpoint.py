"""Reading official checkpoints, and finding out which model they hold.

The checkpoints of https://github.com/JDAI-CV/CoTNet are a bare state dict, or a training checkpoint; those of its
detection repository have a backbone whose layers carry detectron2's names. A pickle is read with `weights_only=True`
alone; the classes that official checkpoints hold besides tensors are replaced by stand-ins that do nothing.
"""
import json
import re
import warnings
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
from safetensors import SafetensorError

from .cotnet import default_cfgs
from .misfit import classes_instead, differences, first_few
from .published import PUBLISHED

__all__ = [
    'CheckpointError', 'find_state_dict', 'find_tag', 'find_variant', 'is_detection', 'meta_model', 'published_tags',
    'read_checkpoint', 'read_config', 'rename_detection', 'resolve_model',
]


class CheckpointError(ValueError):
    """A file that cannot be converted; the message says why and what to do."""


# of files with weights that timm and PyTorch load
UNLOADABLE = (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError)


def explained(error: Exception) -> str:
    """What an error says; with its kind, where that alone says little."""
    return str(error) if isinstance(error, (OSError, RuntimeError, ValueError)) and str(error) else repr(error)


def read_config(folder: Path) -> Dict[str, Any]:
    """The `config.json` of a classifier, as `convert`, `demo` and timm write it.

    Raises:
        CheckpointError: If it is damaged, or of something else.
        OSError: If there is none.
    """
    path = Path(folder, 'config.json')
    try:
        config = json.loads(path.read_text())
    except ValueError as e:
        raise CheckpointError(f'{path} is damaged ({e}); write it again') from e
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str) \
            or not isinstance(config.get('pretrained_cfg'), dict):
        raise CheckpointError(f'{path} names no architecture and pretrained_cfg, as that of a classifier does')
    return config


# Reading

class _Mapping:
    """Stand-in for a class of settings: an ordered dict is made in its place."""

    def __new__(cls, *args):
        return OrderedDict()


class _Ignored:
    """Stand-in for a scalar: an object that holds nothing is made in its place."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def _stand_in(path: str, base: type) -> type:
    module, name = path.rsplit('.', 1)
    return type(name, (base,), {'__module__': module})


STAND_INS = [
    *(_stand_in(path, _Mapping) for path in ('yacs.config.CfgNode', 'argparse.Namespace')),
    *(_stand_in(path, _Ignored) for path in (
        'numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar', 'numpy.dtype')),
]


def read_checkpoint(path: Path) -> Any:
    """Reads a PyTorch checkpoint, running nothing that it says.

    Args:
        path: File in any format of `torch.save`.

    Raises:
        CheckpointError: If the file is no checkpoint, is damaged, or asks for code outside the allowed list.
    """
    if path.stat().st_size == 0:
        raise CheckpointError(f'{path} is empty; download it again')
    with path.open('rb') as file:
        if file.read(256).lstrip().lower().startswith((b'<!doctype', b'<html')):
            raise CheckpointError(f'{path} is a web page, not a checkpoint; open the link in a browser to download it')
    try:
        with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return torch.load(path, map_location='cpu', weights_only=True)
    except UnpicklingError as e:
        asked = re.search(r'GLOBAL (\S+)|function (<.+?>)', str(e))
        if asked is None:
            raise CheckpointError(f'{path} is not a PyTorch checkpoint, or a damaged one; download it again') from e
        raise CheckpointError(
            f'{path} is refused: it asks for {asked[1] or asked[2]}, which no official checkpoint needs and which '
            'could run code; nothing of it was run') from e
    except Exception as e:  # what a damaged or forged file raises has no common class
        reason = str(e).split('. ')[0]
        raise CheckpointError(f'{path} cannot be read as a PyTorch checkpoint ({reason}); download it again') from e


def find_state_dict(checkpoint: Any, use_ema: bool = True) -> Tuple[Dict[str, torch.Tensor], str]:
    """Takes the weights out of a checkpoint.

    Args:
        checkpoint: What `read_checkpoint` returns.
        use_ema: Prefer the moving average of the weights where the checkpoint has one.

    Returns:
        State dict without `module.` prefixes, and where it was found, in words.

    Raises:
        CheckpointError: If there are no weights.
    """
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'the file holds one {type(checkpoint).__name__}, not a checkpoint')
    names = (('state_dict_ema', 'model_ema') if use_ema else ()) + ('state_dict', 'model')
    name = next((name for name in names if isinstance(_get(checkpoint, name), dict)), None)
    state = dict(dict.items(checkpoint if name is None else _get(checkpoint, name)))
    foreign = [key for key, value in state.items() if not (isinstance(key, str) and torch.is_tensor(value))]
    if foreign or not state:
        raise CheckpointError(
            f'the file holds no weights: {first_few(map(str, foreign)) or "nothing"} where a state dict, or a training '
            'checkpoint with state_dict or model, or with _ema behind these, was expected')
    while all(key.startswith('module.') for key in state):
        state = {key[len('module.'):]: value for key, value in state.items()}
    return state, f'{name} of a training checkpoint' if name else 'bare state dict'


def _get(mapping: Any, name: str) -> Any:
    """Item of a dict; a forged pickle may have given it attributes that hide its methods."""
    return dict.get(mapping, name) if isinstance(mapping, dict) else None


DETECTION_PREFIX = 'backbone.bottom_up.'
# A detectron2 convolution has its norm as a child, so that the places after it shift. The first rule that fits, counts.
DETECTION_STEM_RULES = [
    (r'stem\.conv1\.norm\.', 'bn1.'),
    (r'stem\.conv1\.7\.', 'bn1.'),
    (r'stem\.', ''),
    (r'linear\.', 'fc.'),
]
DETECTION_BLOCK_RULES = [
    (r'conv([13])\.norm\.', r'bn\1.'),
    (r'shortcut\.norm\.', 'downsample.1.'),
    (r'shortcut\.1\.norm\.', 'downsample.2.'),
    (r'shortcut\.1\.', 'downsample.1.'),
    (r'shortcut\.', 'downsample.0.'),
    (r'conv2\.(key_embed|embed|se)\.0\.norm\.', r'conv2.\1.1.'),
    (r'conv2\.embed\.2\.', 'conv2.embed.3.'),
    (r'conv2\.embed\.3\.', 'conv2.embed.4.'),
    (r'conv2\.se\.2\.', 'conv2.se.3.'),
]


def is_detection(state_dict: Dict[str, torch.Tensor]) -> bool:
    """Whether the keys of a state dict are those of a detector, or of its backbone, in detectron2's layout."""
    return any(key.removeprefix(DETECTION_PREFIX).startswith('stem.') for key in state_dict)


def rename_detection(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """The backbone of a detector under the names of the classification models; other parts are left out.

    Frozen batch norms count no batches; their counters are set to zero.

    Args:
        state_dict: Weights of a detector, or of its backbone, for which `is_detection` is true.
    """
    prefix = DETECTION_PREFIX if any(key.startswith(DETECTION_PREFIX) for key in state_dict) else ''
    renamed = {
        _classification_name(key[len(prefix):]): value for key, value in state_dict.items() if key.startswith(prefix)}
    counters = {
        re.sub('running_var$', 'num_batches_tracked', key): torch.tensor(0)
        for key in renamed if key.endswith('.running_var')}
    return {**counters, **renamed}


def _classification_name(key: str) -> str:
    block = re.match(r'res([2-5])\.(\d+)\.', key)
    start, rest = (f'layer{int(block[1]) - 1}.{block[2]}.', key[block.end():]) if block else ('', key)
    for pattern, name in DETECTION_BLOCK_RULES if block else DETECTION_STEM_RULES:
        renamed, count = re.subn('^' + pattern, name, rest)
        if count:
            return start + renamed
    return start + rest


# Finding the model

def meta_model(name: str, num_classes: Optional[int] = None) -> torch.nn.Module:
    """A registered model on the meta device, which takes no memory.

    Args:
        name: Name of a model of this package, with or without a tag.
        num_classes: Number of classes, by default that of the model's pretrained config.

    Raises:
        RuntimeError: If there is no such model, or no such tag.
    """
    with warnings.catch_warnings(), torch.device('meta'):
        warnings.simplefilter('ignore')  # an official name that is an alias here is welcome
        return timm.create_model(name, **({} if num_classes is None else {'num_classes': num_classes}))


@lru_cache(maxsize=None)
def _expected(variant: str, num_classes: int) -> Dict[str, torch.Tensor]:
    return meta_model(variant, num_classes).state_dict()


def find_variant(state_dict: Dict[str, torch.Tensor], num_classes: int, variant: Optional[str] = None) -> str:
    """Finds the variant that the keys and shapes fit.

    Args:
        state_dict: Weights under official names.
        num_classes: Classes of the model.
        variant: What it is said to be.

    Raises:
        CheckpointError: If the weights do not fit the variant, or fit none; it says which is nearest and what differs.
    """
    found = {}
    for name in ([variant] if variant else []) + [name for name in default_cfgs if name != variant]:
        found[name] = differences(state_dict, _expected(name, num_classes))
        if not any(found[name].values()):
            if variant in (None, name):
                return name
            raise CheckpointError(f'the weights are not those of {variant}, but fit {name}: pass --model {name}')
    nearest = min(found, key=lambda name: sum(map(len, found[name].values())))
    expected, count = _expected(nearest, num_classes), sum(map(len, found[nearest].values()))
    said = f'the weights fit neither {variant} nor another variant' if variant else 'the weights fit no variant'
    lines = [f'{said}; nearest is {nearest}, with {count} differences to its {len(expected)} entries:']
    lines += [f'  {what}: {first_few(keys)}' for what, keys in found[nearest].items() if keys]
    classes = classes_instead(state_dict, expected)
    if classes is not None:
        lines.append(f'only the classifier differs: it has {classes} classes instead of {num_classes}')
    raise CheckpointError('\n'.join(lines))


def resolve_model(name: str) -> Tuple[str, str]:
    """Variant and tag of a model's name, the variant's first tag if it names none.

    Args:
        name: What was said after --model.

    Raises:
        CheckpointError: If there is no such model, no such tag, or the model is not of this package.
    """
    if not timm.is_model(name):
        raise CheckpointError(f'--model {name} is unknown; it may be {_all_names()}')
    try:
        cfg = meta_model(name).pretrained_cfg
    except RuntimeError as e:
        raise CheckpointError(f'--model {name} has an unknown tag; it may be {_all_names()}') from e
    if cfg['architecture'] not in default_cfgs:
        raise CheckpointError(f'--model {name} is no model of this package; it may be {_all_names()}')
    return cfg['architecture'], cfg['tag']


def _all_names() -> str:
    return ', '.join([*default_cfgs, *(name for name in PUBLISHED if len(published_tags(name.split('.')[0])) > 1)])


def published_tags(variant: str) -> List[str]:
    """Tags of a variant's official checkpoints, none if the authors published none."""
    return [name.split('.')[1] for name in PUBLISHED if name.split('.')[0] == variant]


def find_tag(variant: str, checkpoint: Dict[str, Any], path: Path) -> Tuple[str, str]:
    """Finds the tag of a variant's published checkpoint, as several may have equal keys and shapes.

    Args:
        variant: Name of the architecture.
        checkpoint: What `read_checkpoint` returns.
        path: File that it was read from.

    Returns:
        Tag, and what decided, in words.

    Raises:
        CheckpointError: If nothing tells the variant's checkpoints apart.
    """
    tags = published_tags(variant)
    if len(tags) == 1:
        return tags[0], 'keys and shapes'
    recorded = _get(_get(_get(checkpoint, 'args'), 'model'), 'name')
    if recorded in (variant, f'{variant}_L'):
        return resolve_model(recorded)[1], f'keys, shapes and the recorded model name {recorded}'
    if re.search(r'320|152_?L', path.name):
        return 'jd_in1k_320', 'keys, shapes and the name of the file'
    raise CheckpointError(
        f'the weights fit {variant}, of which {len(tags)} checkpoints with equal keys and shapes are published: say '
        'which one it is, with ' + ' or '.join(f'--model {variant}.{tag}' for tag in tags))
