"""Synthetic checkpoints in every layout that the official repositories write."""
import json
import re
import sys
import types
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import numpy as np
import torch

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'variants.json').read_text())['variants']


class CfgNode(dict):
    """The official settings, as yacs pickles them: a dict with attributes beside its items."""

    def __init__(self, items: dict):
        super().__init__(items)
        self.__dict__.update({
            '__immutable__': False, '__deprecated_keys__': set(), '__renamed_keys__': {}, '__new_allowed__': True})


CfgNode.__module__, CfgNode.__qualname__ = 'yacs.config', 'CfgNode'


def official_state_dict(name: str, seed: int = 0) -> OrderedDict:
    """Random weights with the keys and shapes of an official checkpoint."""
    return random_state_dict(GOLDEN[name]['state_dict'], seed)


def random_state_dict(shapes: dict, seed: int = 0) -> OrderedDict:
    """Random weights of given shapes; counters of batches are 7."""
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (key, torch.tensor(7) if key.endswith('num_batches_tracked') else torch.rand(*shape, generator=generator) - 0.5)
        for key, shape in shapes.items())


def training_checkpoint(state_dict: OrderedDict, name: str, ema: OrderedDict | None = None, prefix: str = '') -> dict:
    """What the official training script saves."""
    key = next(iter(state_dict))
    parameter = torch.nn.Parameter(state_dict[key].float().clone())
    optimizer = torch.optim.SGD([parameter], lr=0.25, momentum=0.9)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    settings = CfgNode({'seed': 1.0, 'model': CfgNode({'name': name, 'drop_path': 0.1}), 'steps': (1, [2.0, None])})
    checkpoint = {
        'epoch': 350,
        'arch': settings['model'],
        'state_dict': OrderedDict((prefix + key, value) for key, value in state_dict.items()),
        'optimizer': optimizer.state_dict(),
        'version': 2,
        'args': settings,
        'metric': np.float64(81.3),
    }
    if ema is not None:
        checkpoint['state_dict_ema'] = ema
    return checkpoint


DETECTION_NAMES = [  # of the parts of a block, by their names in a classification model
    (r'\.bn([13])\.', r'.conv\1.norm.'),
    (r'\.key_embed\.1\.', '.key_embed.0.norm.'),
    (r'\.embed\.1\.', '.embed.0.norm.'),
    (r'\.embed\.3\.', '.embed.2.'),
    (r'\.embed\.4\.', '.embed.3.'),
    (r'\.se\.1\.', '.se.0.norm.'),
    (r'\.se\.3\.', '.se.2.'),
]


def detection_key(key: str, hybrid: bool) -> str:
    """Name in a detector's backbone of an entry of a classification model; `hybrid` for SE-CoTNetD."""
    if not key.startswith('layer'):
        bn1 = 'stem.conv1.7.' if hybrid else 'stem.conv1.norm.'
        return 'backbone.bottom_up.' + (bn1 + key[len('bn1.'):] if key.startswith('bn1.') else f'stem.{key}')
    stage, block, rest = re.fullmatch(r'layer(\d)\.(\d+)(\..*)', key).groups()
    if rest.startswith('.downsample'):
        _, index, leaf = rest[1:].split('.')
        shortcut, norm_index = ('.shortcut.1', '2') if hybrid else ('.shortcut', '1')
        rest = f'{shortcut}.norm.{leaf}' if index == norm_index else f'{shortcut}.{leaf}'
    elif '.conv2.bn' not in rest:  # bn0 and bn1 of split attention, and bn of CoT, keep their names
        for pattern, name in DETECTION_NAMES:
            rest, count = re.subn(pattern, name, rest, count=1)
            if count:
                break
    return f'backbone.bottom_up.res{int(stage) + 1}.{block}{rest}'


def detection_checkpoint(state_dict: OrderedDict) -> dict:
    """A trained detector with this backbone: frozen norms in stem and first stage, no classifier, other parts."""
    hybrid = 'conv1.0.weight' in state_dict
    renamed = OrderedDict(
        (detection_key(key, hybrid), value) for key, value in state_dict.items()
        if not key.startswith('fc.')
        and not (key.endswith('num_batches_tracked') and not re.match('layer[234]', key)))
    renamed['backbone.fpn_lateral2.weight'] = torch.ones(256, 256, 1, 1)
    renamed['proposal_generator.rpn_head.conv.weight'] = torch.ones(2, 2)
    return {'model': renamed, 'iteration': 89999, 'optimizer': {'state': {}, 'param_groups': []}}


def save(checkpoint, path: Path, legacy: bool = False) -> Path:
    """Saves as the official code does, with yacs importable only while saving."""
    module = types.ModuleType('yacs.config')
    module.CfgNode = CfgNode
    with mock.patch.dict(sys.modules, {'yacs': types.ModuleType('yacs'), 'yacs.config': module}):
        torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    return path
