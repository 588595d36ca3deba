"""Loading of pretrained weights into models: verified, checked for fit, and with errors that say what to do.

timm finds out where weights come from and adapts them to the model. What lies between is done here, for the models of
this package only: a file of the Hub is verified by `timm_cotnet.hub`, a pickle never stands in for a safetensors file,
and a checkpoint has to fit the network.
"""
import functools
import json
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Type, Union

import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError
from timm.models import build_model_with_cfg, is_model, load_state_dict, model_entrypoint, resolve_pretrained_cfg
from torch import nn

from .hub import DEFAULT_NAMESPACE, HUB_NAMESPACE, WEIGHTS_NAME, describe_error, fetch, lacks
from .misfit import classes_instead, differences, first_few
from .published import PUBLISHED

__all__ = ['CheckedLoading', 'WeightsError', 'build_pretrained', 'hook_config_loader']

PICKLE_NAME = 'pytorch_model.bin'


class WeightsError(RuntimeError):
    """Weights could not be had, or do not fit. The message says where they were sought, why it failed, what to do."""


# Build


def build_pretrained(
        model_cls: Type[nn.Module],
        variant: str,
        pretrained_cfg: Optional[Union[str, Dict[str, Any]]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Optional[Union[str, Path]] = None,
        **kwargs,
) -> nn.Module:
    """Builds a model with timm's `build_model_with_cfg`, its pretrained weights verified first.

    Args:
        model_cls: Class of the network.
        variant: Name of the architecture.
        pretrained_cfg: As in timm.
        pretrained_cfg_overlay: As in timm.
        cache_dir: Cache of the Hub, by default huggingface_hub's own.
        kwargs: Further arguments of timm's `build_model_with_cfg`.

    Raises:
        WeightsError: If the weights could not be had, are damaged, or do not fit the network.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, dict(overlay)).to_dict()
    if _is_on_hub(cfg):
        where = f'{cfg["hf_hub_id"]} at {constants.ENDPOINT}'
        # For timm the verified file is a local one.
        overlay.update(source=None, **_fetch_weights(variant, cfg, cache_dir))
    elif cfg.get('file') and not cfg.get('state_dict'):
        where = str(cfg['file'])
        if not os.path.exists(where):
            raise _error(variant, cfg, where, 'there is no such file or folder')
    else:
        where = 'the weights that were given'

    if kwargs.get('pretrained_strict', True):
        head = not kwargs.get('features_only')
        kwargs.setdefault('pretrained_filter_fn', functools.partial(_check_fit, variant, cfg, where, head))
    try:
        model = build_model_with_cfg(
            model_cls,
            variant,
            True,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=overlay,
            cache_dir=cache_dir,
            **kwargs,
        )
    except SafetensorError as error:
        raise _error(variant, cfg, where, f'it is not a readable safetensors file ({error})') from error

    # What the model says of its origin is what timm would say.
    for key in ('file', 'source', 'state_dict'):
        model.pretrained_cfg.pop(key, None)
        if key in cfg:
            model.pretrained_cfg[key] = cfg[key]
    return model


def _is_on_hub(cfg: Mapping[str, Any]) -> bool:
    """Whether timm would take the weights from the Hub."""
    if cfg.get('source') in ('hf-hub', 'local-dir'):
        return cfg['source'] == 'hf-hub'
    return bool(cfg.get('hf_hub_id')) and not cfg.get('state_dict') and not cfg.get('file')


def _fetch_weights(
        variant: str,
        cfg: Mapping[str, Any],
        cache_dir: Optional[Union[str, Path]],
) -> Dict[str, Any]:
    """Fetches a repository's weights; returns what tells timm to load them, `file` or `state_dict`."""
    hub_id, filename = cfg['hf_hub_id'], cfg.get('hf_hub_filename')
    repo_id, revision = _split_revision(hub_id)
    tag = f'{variant}.{cfg.get("tag")}'
    sha256 = PUBLISHED[tag].sha256 if tag in PUBLISHED and hub_id == f'{HUB_NAMESPACE}/{tag}' else None
    name = filename or WEIGHTS_NAME
    try:
        try:
            path = fetch(repo_id, name, revision, cache_dir, sha256)
        except EntryNotFoundError as error:
            # Only a repository that has no safetensors at all is read from a pickle.
            if filename or not lacks(error, repo_id, name, revision, cache_dir):
                raise
            name = PICKLE_NAME
            path = fetch(repo_id, name, revision, cache_dir)
        if path.endswith('.safetensors'):
            return dict(file=path)
        return dict(state_dict=load_state_dict(path, weights_only=True))
    except Exception as error:
        raise _hub_error(variant, cfg, repo_id, name, revision, error, cache_dir) from error


def _split_revision(hub_id: str) -> Tuple[str, Optional[str]]:
    """Repository and revision of timm's `owner/name@revision`."""
    repo_id, _, revision = hub_id.partition('@')
    return repo_id, revision or None


def hook_config_loader() -> None:
    """Lets timm read `config.json` of `hf-hub:` models of this package verified, too.

    This replaces a function inside timm, for want of another way: `timm.create_model` reads and parses the file to find
    out which model it is, before any code of the model's package runs. Without this a damaged file in the cache would
    end in an error of the JSON parser, again and again, and a missing repository in one that names no other source.
    Calling it again changes nothing.
    """
    from timm.models import _factory

    load = _factory.load_model_config_from_hf
    if getattr(load, 'func', None) is not _load_config:
        _factory.load_model_config_from_hf = functools.partial(_load_config, load)


def _load_config(load: Callable[..., Tuple], model_id: str, cache_dir: Optional[Union[str, Path]] = None) -> Tuple:
    """timm's `load_model_config_from_hf` (`load`): as it is for the models of others, verified for ours."""
    repo_id, revision = _split_revision(model_id)
    variant = repo_id.split('/')[-1].split('.')[0]
    if not _is_ours(variant):
        try:
            config = load(model_id, cache_dir=cache_dir)
            if not _is_ours(config[1]):
                return config
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError):
            pass  # whose model it is cannot be read; if the file is damaged, it is mended
    try:
        path = fetch(repo_id, 'config.json', revision, cache_dir)
    except Exception as error:
        raise _hub_error(variant, {}, repo_id, 'config.json', revision, error, cache_dir) from error
    commit = Path(path).parent.name
    # The commit just verified is not asked for again.
    known = re.fullmatch('[0-9a-f]{40}', commit)
    config = load(f'{repo_id}@{commit}' if known else model_id, cache_dir=cache_dir)
    config[0]['hf_hub_id'] = model_id
    return config


def _is_ours(name: str) -> bool:
    return is_model(name) and model_entrypoint(name).__module__.startswith(f'{__package__}.')


# Fit


class CheckedLoading:
    """Mixin of the networks: a checkpoint that does not fit is described in a line, not key by key."""

    def load_state_dict(self, state_dict: Mapping[str, Any], *args, **kwargs):
        """As in torch.

        Raises:
            WeightsError: If torch cannot load the state dict; its own error is the cause.
        """
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            found, expected = _without_counters(state_dict), _without_counters(self.state_dict())
            misfit = _describe(found, expected)
            if not misfit:
                raise
            cfg = getattr(self, 'pretrained_cfg', {})
            variant = cfg.get('architecture', type(self).__name__)
            classes = classes_instead(found, expected)
            advice = None if classes is None else (
                f'The checkpoint has {classes} classes, the model {self.num_classes}: make the model with '
                f'num_classes={classes}. After that, model.reset_classifier({self.num_classes}) makes a new '
                'classifier.')
            raise _error(variant, cfg, 'the checkpoint that was given', misfit, advice) from error


def _check_fit(
        variant: str,
        cfg: Dict[str, Any],
        where: str,
        has_head: bool,
        state_dict: Dict[str, torch.Tensor],
        model: nn.Module,
) -> Dict[str, torch.Tensor]:
    """A weight filter for timm that changes nothing: it raises where timm would leave layers at random in silence."""
    found, expected = _without_counters(state_dict), _without_counters(model.state_dict())
    if not has_head or model.num_classes != cfg['num_classes']:
        for name in _names(cfg.get('classifier'), 'weight', 'bias'):
            found.pop(name, None)
            expected.pop(name, None)
    for name in _names(cfg.get('first_conv'), 'weight'):
        # timm adapts the weights to another number of channels.
        if name in found and expected[name].shape[1] != cfg['input_size'][0]:
            found[name] = expected[name]
    misfit = _describe(found, expected)
    if misfit:
        classes = classes_instead(found, expected)
        advice = None if classes is None else (
            f'The weights have {classes} classes, where the pretrained config says {cfg["num_classes"]}: pass '
            f'pretrained_cfg_overlay=dict(num_classes={classes}).')
        raise _error(variant, cfg, where, misfit, advice)
    return state_dict


def _names(modules: Union[None, str, Tuple[str, ...]], *parameters: str) -> List[str]:
    modules = (modules,) if isinstance(modules, str) else modules or ()
    return [f'{module}.{parameter}' for module in modules for parameter in parameters]


def _without_counters(state_dict: Mapping[str, Any]) -> Dict[str, Any]:
    """A state dict less the counters of batch norms, which torch itself makes up where they are missing."""
    return {key: value for key, value in state_dict.items() if not key.endswith('num_batches_tracked')}


def _describe(found: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> str:
    """Says how many keys and shapes differ and which are the first, '' if all fit."""
    return '; '.join(
        f'{len(keys)} of {len(expected)} tensors are {what} ({first_few(keys)})'
        for what, keys in differences(found, expected).items() if keys)


# Explain


def _hub_error(
        variant: str,
        cfg: Mapping[str, Any],
        repo_id: str,
        filename: str,
        revision: Optional[str],
        error: Exception,
        cache_dir: Optional[Union[str, Path]],
) -> WeightsError:
    """The error to raise where a file of the Hub could not be had."""
    where = f'{repo_id} ({filename}, revision {revision or "main"}) at {constants.ENDPOINT}'
    namespace, _, name = repo_id.partition('/')
    unpublished = namespace == DEFAULT_NAMESPACE and name in PUBLISHED and PUBLISHED[name].sha256 is None
    unseen = isinstance(error, (RepositoryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled))
    if not unpublished or not unseen or isinstance(error, GatedRepoError):
        return _error(variant, cfg, where, describe_error(error, cache_dir))
    missing = isinstance(error, RepositoryNotFoundError)
    reason = 'there is no such repository' if missing else describe_error(error, cache_dir)
    return WeightsError(
        f'No weights for {name}: this project has not published them on the Hub yet.\n'
        f'Sought in {where}: {reason}.\n{_ways(variant, cfg)}')


def _error(
        variant: str,
        cfg: Mapping[str, Any],
        where: str,
        reason: str,
        advice: Optional[str] = None,
) -> WeightsError:
    """The error to raise: its message ends with the advice, by default the ways to get weights."""
    return WeightsError(f'No weights for {variant} from {where}: {reason}.\n{advice or _ways(variant, cfg)}')


def _ways(variant: str, cfg: Mapping[str, Any]) -> str:
    tag = f'{variant}.{cfg.get("tag")}'
    model = tag if tag in PUBLISHED else variant if _is_ours(variant) else 'MODEL'
    tags = [tag] if tag in PUBLISHED else [name for name in PUBLISHED if name.split('.')[0] == variant]
    links = [f'the official checkpoint of {name}, {PUBLISHED[name].url}' for name in tags]
    return '\n'.join([
        'Ways to get weights:',
        *(f'- {link}' for link in links or ['a checkpoint of your own']),
        f'  converted by `python -m timm_cotnet.convert CHECKPOINT --model {model} --output DIR`',
        '  and loaded by `timm.create_model(\'local-dir:DIR\', pretrained=True)`',
        '- an account of your own, to which `python -m timm_cotnet.publish DIR --namespace NAME` uploads, or a mirror:',
        f'  TIMM_COTNET_HUB names it (now {HUB_NAMESPACE})',
        f'- HF_ENDPOINT chooses another Hub (now {constants.ENDPOINT}); pretrained=False starts at random',
    ])
