"""Pretrained weights: downloads that are verified before a tensor is used, and errors that say what to do.

timm finds out where weights come from and adapts them to the model. What lies between is done here, for the models of
this package only: a file of the Hub is compared with its digest, a damaged one is removed and fetched once more, a
pickle never stands in for a safetensors file, and a checkpoint has to fit the network.
"""
import errno
import functools
import hashlib
import json
import logging
import os
import re
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Type, Union

import torch
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import REGEX_COMMIT_HASH
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open
from timm.models import _factory
from timm.models._builder import _resolve_pretrained_source, build_model_with_cfg, resolve_pretrained_cfg
from timm.models._helpers import load_state_dict
from timm.models._hub import hf_split
from timm.models._registry import is_model, model_entrypoint
from torch import nn

from .published import PUBLISHED

__all__ = [
    'DEFAULT_NAMESPACE', 'HUB_NAMESPACE', 'WEIGHTS_NAME',
    'CheckedLoading', 'DamagedFileError', 'WeightsError', 'build_pretrained', 'fetch', 'hook_config_loader',
]

_logger = logging.getLogger(__name__)

DEFAULT_NAMESPACE = 'timm-cotnet'
#: Account on the Hub that serves all variants: a mirror's or one's own, where TIMM_COTNET_HUB names it.
HUB_NAMESPACE = os.environ.get('TIMM_COTNET_HUB', '').strip().strip('/') or DEFAULT_NAMESPACE
WEIGHTS_NAME = 'model.safetensors'
PICKLE_NAME = 'pytorch_model.bin'

# Answers that stay the same when asked again.
_FINAL = (EntryNotFoundError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
# The Hub names a blob by its sha256, or a small one by its git object id; proxies put something before or behind.
_DIGEST = re.compile(r'(?:sha256:)?([0-9a-f]{64}|[0-9a-f]{40})(?:-\w+)?', re.IGNORECASE)


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
    source, location = _resolve_pretrained_source(cfg)
    where = f'the {source} that was given'
    if source == 'hf-hub':
        repo_id, filename = location if isinstance(location, tuple) else (location, None)
        where = f'{repo_id} at {constants.ENDPOINT}'
        # For timm the verified file is a local one.
        overlay.update(source=None, **_fetch_weights(variant, cfg, repo_id, filename, cache_dir))
    elif source in ('file', 'local-dir'):
        where = str(location)
        if not os.path.exists(where):
            raise WeightsError(_message(variant, cfg, where, 'there is no such file or folder'))

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
        raise WeightsError(_message(variant, cfg, where, f'it is not a readable safetensors file ({error})')) from error

    # What the model says of its origin is what timm would say.
    for key in ('file', 'source', 'state_dict'):
        model.pretrained_cfg.pop(key, None)
        if key in cfg:
            model.pretrained_cfg[key] = cfg[key]
    return model


def _fetch_weights(
        variant: str,
        cfg: Dict[str, Any],
        hub_id: str,
        filename: Optional[str],
        cache_dir: Optional[Union[str, Path]],
) -> Dict[str, Any]:
    """Fetches a repository's weights; returns what tells timm to load them, `file` or `state_dict`."""
    repo_id, revision = hf_split(hub_id)
    tag = f'{variant}.{cfg.get("tag")}'
    sha256 = PUBLISHED[tag].sha256 if tag in PUBLISHED and hub_id == f'{HUB_NAMESPACE}/{tag}' else None
    name = filename or WEIGHTS_NAME
    try:
        try:
            path = fetch(repo_id, name, revision, cache_dir, sha256)
        except EntryNotFoundError as error:
            # Only a repository that has no safetensors at all is read from a pickle.
            if filename or not _is_absent(error, repo_id, name, revision, cache_dir):
                raise
            name = PICKLE_NAME
            path = fetch(repo_id, name, revision, cache_dir)
        if path.endswith('.safetensors'):
            return dict(file=path)
        return dict(state_dict=load_state_dict(path, weights_only=True))
    except Exception as error:
        where = f'{repo_id} ({name}, revision {revision or "main"}) at {constants.ENDPOINT}'
        raise WeightsError(_message(variant, cfg, where, _reason(error, cache_dir))) from error


def _is_absent(error: EntryNotFoundError, repo_id: str, name: str, revision: Optional[str], cache_dir) -> bool:
    """Whether the Hub itself said, now or at an earlier time, that the repository has no such file."""
    if not isinstance(error, LocalEntryNotFoundError):
        return True
    cached = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision)
    return cached is not None and not isinstance(cached, str)


def hook_config_loader() -> None:
    """Lets timm read `config.json` of `hf-hub:` models of this package verified, too."""
    load = _factory.load_model_config_from_hf
    if getattr(load, '__module__', None) != __name__:
        _factory.load_model_config_from_hf = functools.wraps(load, assigned=())(functools.partial(_load_config, load))
        _factory.load_model_config_from_hf.__module__ = __name__


def _load_config(load: Callable[..., Tuple], model_id: str, cache_dir: Optional[Union[str, Path]] = None) -> Tuple:
    """timm's `load_model_config_from_hf` (`load`): as it is for the models of others, verified for ours."""
    repo_id, revision = hf_split(model_id)
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
        where = f'{repo_id} (config.json, revision {revision or "main"}) at {constants.ENDPOINT}'
        raise WeightsError(_message(variant, {}, where, _reason(error, cache_dir))) from error
    commit = Path(path).parent.name
    # The commit just verified is not asked for again.
    config = load(f'{repo_id}@{commit}' if REGEX_COMMIT_HASH.fullmatch(commit) else model_id, cache_dir=cache_dir)
    config[0]['hf_hub_id'] = model_id
    return config


def _is_ours(name: str) -> bool:
    return is_model(name) and model_entrypoint(name).__module__.startswith(f'{__package__}.')


# Fetch


def fetch(
        repo_id: str,
        filename: str,
        revision: Optional[str] = None,
        cache_dir: Optional[Union[str, Path]] = None,
        sha256: Optional[str] = None,
) -> str:
    """Downloads a file with huggingface_hub, or takes it from the cache, and verifies it.

    A file whose digest is wrong is removed and fetched once more. A digest that was right is recorded beside the cached
    file, together with what the file system knows of it, so that it is computed once per version of the file: 213 MB
    take 0.12 s of a processor with SHA instructions, and 50 microseconds from then on.

    Args:
        repo_id: Repository, `owner/name`.
        filename: File in the repository.
        revision: Branch, tag or commit, by default main.
        cache_dir: Cache of the Hub, by default huggingface_hub's own.
        sha256: Digest that the file must have, by default the one by which the Hub names it.

    Returns:
        Path of the file in the cache.

    Raises:
        DamagedFileError: If the file is damaged for the second time.
        Exception: Those of huggingface_hub's `hf_hub_download`.
    """
    download = functools.partial(_download, repo_id, filename, revision=revision, cache_dir=cache_dir)
    find_damage = functools.partial(_damage, repo_id=repo_id, filename=filename, sha256=sha256)
    path = download()
    damage = find_damage(path)
    return _mend(path, damage, download, find_damage) if damage else path


def _mend(path: str, damage: str, download: Callable[[], str], find_damage: Callable[[str], str]) -> str:
    """Removes a damaged file and fetches it once more. One process does, those that wait for it find it mended."""
    storage = _storage(path)
    lock = storage.parent / '.locks' / storage.name / f'{os.path.basename(path)}.mend.lock'
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            damage = find_damage(path)
            if damage:
                _logger.warning(f'{path} is damaged ({damage}): it is removed and fetched once more')
                _remove(path)
                path = download()
                damage = find_damage(path)
            if damage:
                _remove(path)
                raise DamagedFileError(f'it is damaged, twice: {damage}; nothing of it was kept')
    except OSError as error:
        if error.errno in _NO_ACCESS:
            raise DamagedFileError(f'{path} is damaged ({damage}), and the cache cannot be written: {error}') from error
        raise
    return path


class DamagedFileError(OSError):
    """A file is not what its digest says."""


def _download(repo_id: str, filename: str, cache_dir: Optional[Union[str, Path]], **kwargs) -> str:
    """Downloads, and again after a fault that may pass; at last, what the cache has is good enough."""
    get = functools.partial(hf_hub_download, repo_id, filename, cache_dir=cache_dir, library_name='timm', **kwargs)
    storage = Path(cache_dir or constants.HF_HUB_CACHE) / f'models--{repo_id.replace("/", "--")}'
    for pause in (1, 2, 3, None):
        start = time.monotonic()
        try:
            return get()
        except Exception as error:
            if not _may_pass(error, time.monotonic() - start):
                raise
            if pause is None:
                try:
                    return get(local_files_only=True)
                except LocalEntryNotFoundError:
                    raise error
            _logger.warning(f'Download failed, trying again: {_brief(error)}')
            time.sleep(pause)
        finally:
            _sweep(storage)


def _may_pass(error: BaseException, seconds: float) -> bool:
    """Whether another try may help: not after a final answer, a fault of the disk, or a long wait in vain."""
    waits = 'Timeout' in type(error).__name__
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        error, waits = error.__cause__, True
    status = getattr(getattr(error, 'response', None), 'status_code', 500)
    if isinstance(error, _FINAL) or waits and seconds > 10 or status < 500 and status not in (408, 416, 429):
        return False
    # An error with a number is the disk's, unless a connection broke, or the file of another process went away.
    return isinstance(error, (ConnectionError, FileNotFoundError)) or getattr(error, 'errno', None) is None


def _sweep(storage: Path) -> None:
    """Removes what broken downloads left in a repository's cache: `.incomplete` files whose lock is free."""
    for part in (storage / 'blobs').glob('*.incomplete'):
        lock = storage.parent / '.locks' / storage.name / f'{part.name.split(".")[0]}.lock'
        try:
            with FileLock(lock, timeout=0):
                part.unlink(missing_ok=True)
        except (NotImplementedError, OSError, Timeout) as error:  # the first: filelock's, on file systems without locks
            _logger.debug(f'{part} stays: {error!r}')


# Verify


def _damage(path: str, repo_id: str, filename: str, sha256: Optional[str]) -> str:
    """Says what is wrong with a downloaded file, '' if nothing is.

    The record of an intact file holds its size, times and inode. The change time cannot be set by programs, and a
    record counts only if it is younger: so a file changed after it was hashed is always hashed again.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return 'it is gone'
    state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    record = _storage(path) / '.timm_cotnet' / Path(path).parent.name / f'{filename}.verified'
    digest = sha256 or (_digest_in(os.path.basename(os.readlink(path))) if os.path.islink(path) else None)
    try:
        recorded = json.loads(record.read_text())
        if (
                recorded['file'] == state
                and record.stat().st_mtime_ns > status.st_ctime_ns
                and digest in (None, recorded['digest'])
        ):
            return ''
    except (OSError, ValueError, LookupError, TypeError):
        pass  # no record, or none that can be read

    digest = digest or _ask_digest(path, repo_id, filename)
    if not digest:
        _logger.warning(f'{path} cannot be verified: {constants.ENDPOINT} does not name it by a digest')
        return _malformed(path)
    damage = _differs(path, digest)
    if not damage:
        try:
            _write(record, json.dumps(dict(file=state, digest=digest)))
        except OSError:
            pass  # a cache that cannot be written: hashed every time
    return damage


def _differs(path: str, digest: str) -> str:
    """Compares a file with its sha256, or with its git object id or sha1; says how they differ, '' if they do not."""
    size = os.path.getsize(path)
    if len(digest) == 64:
        name, hashes = 'sha256', [hashlib.sha256()]
    else:
        name, hashes = 'git sha1', [hashlib.sha1(b'blob %d\0' % size), hashlib.sha1()]
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            for value in hashes:
                value.update(chunk)
    found = [value.hexdigest() for value in hashes]
    return '' if digest in found else f'its {name} is {found[0]} instead of {digest}, its size {size} bytes'


def _malformed(path: str) -> str:
    """Says why a file cannot be read, '' if it can: all that is known without a digest."""
    try:
        if path.endswith('.safetensors'):
            with safe_open(path, 'pt'):
                pass
        elif path.endswith('.json'):
            json.loads(Path(path).read_text(encoding='utf-8'))
    except (SafetensorError, ValueError) as error:
        return f'it cannot be read: {error}'
    return ''


def _digest_in(name: Optional[str]) -> Optional[str]:
    """The digest that the Hub's name of a file is, if it is one."""
    match = _DIGEST.fullmatch(name or '')
    return match[1].lower() if match else None


def _ask_digest(path: str, repo_id: str, filename: str) -> Optional[str]:
    """Asks the Hub for the digest of a file whose name in the cache does not tell it."""
    commit = Path(path).parent.name
    try:
        digest = _digest_in(get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=commit)).etag)
        if digest:
            return digest
        info = HfApi().model_info(repo_id, revision=commit, files_metadata=True, timeout=10)
        file = next(file for file in info.siblings if file.rfilename == filename)
        return _digest_in(file.lfs.sha256 if file.lfs else file.blob_id)
    except Exception as error:
        _logger.debug(f'No digest of {path}: {error!r}')
        return None


def _storage(path: str) -> Path:
    """Folder of a repository in the cache, from `<folder>/snapshots/<commit>/<file>`."""
    return Path(path).parents[2]


def _remove(path: str) -> None:
    """Removes a file of the cache together with what it links to, as far as that is in the cache."""
    cache = os.path.realpath(_storage(path).parent)
    while os.path.commonpath([cache, os.path.realpath(os.path.dirname(path))]) == cache:
        target = os.path.join(os.path.dirname(path), os.readlink(path)) if os.path.islink(path) else None
        Path(path).unlink(missing_ok=True)
        if target is None:
            return
        path = target


def _write(path: Path, text: str) -> None:
    """Writes a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}')
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
            misfit = _misfit(state_dict, self.state_dict())
            if not misfit:
                raise
            cfg = getattr(self, 'pretrained_cfg', {})
            variant = cfg.get('architecture', type(self).__name__)
            raise WeightsError(_message(variant, cfg, 'the checkpoint that was given', misfit)) from error


def _check_fit(
        variant: str,
        cfg: Dict[str, Any],
        where: str,
        has_head: bool,
        state_dict: Dict[str, torch.Tensor],
        model: nn.Module,
) -> Dict[str, torch.Tensor]:
    """A weight filter for timm that changes nothing: it raises where timm would leave layers at random in silence."""
    found, expected = dict(state_dict), model.state_dict()
    if not has_head or model.num_classes != cfg['num_classes']:
        for name in _names(cfg.get('classifier'), 'weight', 'bias'):
            found.pop(name, None)
            expected.pop(name, None)
    for name in _names(cfg.get('first_conv'), 'weight'):
        # timm adapts the weights to another number of channels.
        if name in found and expected[name].shape[1] != cfg['input_size'][0]:
            found[name] = expected[name]
    misfit = _misfit(found, expected)
    if misfit:
        raise WeightsError(_message(variant, cfg, where, misfit))
    return state_dict


def _names(modules: Union[None, str, Tuple[str, ...]], *parameters: str) -> List[str]:
    modules = (modules,) if isinstance(modules, str) else modules or ()
    return [f'{module}.{parameter}' for module in modules for parameter in parameters]


def _misfit(found: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> str:
    """Says how many keys and shapes differ and which are the first, '' if all fit."""
    # torch itself makes up the counters of batch norms where they are missing.
    expected = {key: value.shape for key, value in expected.items() if not key.endswith('num_batches_tracked')}
    found = {
        key: getattr(value, 'shape', None) for key, value in found.items() if not key.endswith('num_batches_tracked')
    }
    differences = {
        'missing': [key for key in expected if key not in found],
        'unexpected': [key for key in found if key not in expected],
        'of another shape': [
            f'{key}: {_shape(found[key])} instead of {_shape(shape)}'
            for key, shape in expected.items() if key in found and found[key] != shape
        ],
    }
    return '; '.join(
        f'{len(keys)} of {len(expected)} tensors are {what} ({", ".join(keys[:3])}{", ..." if len(keys) > 3 else ""})'
        for what, keys in differences.items() if keys
    )


def _shape(shape: Optional[torch.Size]) -> str:
    return 'no tensor' if shape is None else 'x'.join(map(str, shape)) or 'a scalar'


# Explain


def _message(variant: str, cfg: Mapping[str, Any], where: str, reason: str) -> str:
    tag = f'{variant}.{cfg.get("tag")}'
    model = tag if tag in PUBLISHED else variant if _is_ours(variant) else 'MODEL'
    tags = [tag] if tag in PUBLISHED else [name for name in PUBLISHED if name.split('.')[0] == variant]
    links = [f'the official checkpoint of {name}, {PUBLISHED[name].url}' for name in tags]
    return '\n'.join([
        f'No weights for {variant} from {where}: {reason}.',
        'Ways to get weights:',
        *(f'- {link}' for link in links or ['a checkpoint of your own']),
        f'  converted by `python -m timm_cotnet.convert CHECKPOINT --model {model} --output DIR`',
        '  and loaded by `timm.create_model(\'local-dir:DIR\', pretrained=True)`',
        f'- a mirror, or an account of your own: TIMM_COTNET_HUB names it (now {HUB_NAMESPACE})',
        f'- HF_ENDPOINT chooses another Hub (now {constants.ENDPOINT}); pretrained=False starts at random',
    ])


def _reason(error: Exception, cache_dir: Optional[Union[str, Path]]) -> str:
    """Says in words what an error of huggingface_hub, of the network or of the disk means."""
    cache = cache_dir or constants.HF_HUB_CACHE
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if isinstance(error, GatedRepoError):
        return 'access to the repository has to be asked for on its page, and HF_TOKEN to belong to who was granted it'
    if isinstance(error, RepositoryNotFoundError):
        return 'there is no such repository, or it is private: then log in (`hf auth login`) or set HF_TOKEN'
    if isinstance(error, RevisionNotFoundError):
        return 'the repository has no such revision'
    if constants.HF_HUB_OFFLINE and isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return f'it is not in the cache {cache}, and HF_HUB_OFFLINE forbids to download it'
    if isinstance(error, LocalEntryNotFoundError):
        return f'it is not in the cache {cache}, and the Hub gave no good answer ({_brief(error.__cause__ or error)})'
    if isinstance(error, EntryNotFoundError):
        return 'the repository has no such file'
    if getattr(error, 'errno', None) in _DISK_FULL:
        return f'the disk of the cache {cache} is full: make room, or choose another by HF_HOME ({_brief(error)})'
    if getattr(error, 'errno', None) in _NO_ACCESS:
        return f'the cache {cache} cannot be used: choose another by HF_HOME or cache_dir ({_brief(error)})'
    if status in (401, 403):
        return f'access was refused: check HF_TOKEN ({_brief(error)})'
    return str(error) if isinstance(error, DamagedFileError) else f'{type(error).__name__}: {_brief(error)}'


def _brief(error: BaseException) -> str:
    """One line of an error, which may hold the whole body of an answer."""
    line = ' '.join(str(error).split())
    return line if len(line) <= 300 else f'{line[:300]} ...'
