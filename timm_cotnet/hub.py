"""Files of the Hub: downloads that are verified before they are used.

A file is compared with its digest; a damaged one is removed and fetched once more. What broken downloads left in the
cache is swept away. `timm_cotnet.pretrained` loads the files into models.
"""
import errno
import functools
import json
import logging
import os
import time
import uuid
from pathlib import Path
from typing import Callable, Optional, Union

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open

from .digest import digest_in, find_difference

__all__ = ['DEFAULT_NAMESPACE', 'HUB_NAMESPACE', 'WEIGHTS_NAME', 'DamagedFileError', 'describe_error', 'fetch', 'lacks']

_logger = logging.getLogger(__name__)

DEFAULT_NAMESPACE = 'timm-cotnet'
#: Account on the Hub that serves all variants: a mirror's or one's own, where TIMM_COTNET_HUB names it.
HUB_NAMESPACE = os.environ.get('TIMM_COTNET_HUB', '').strip().strip('/') or DEFAULT_NAMESPACE
WEIGHTS_NAME = 'model.safetensors'

# Answers that stay the same when asked again.
_FINAL = (EntryNotFoundError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)


class DamagedFileError(OSError):
    """A file is not what its digest says, and could not be mended."""


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


def lacks(
        error: EntryNotFoundError,
        repo_id: str,
        filename: str,
        revision: Optional[str] = None,
        cache_dir: Optional[Union[str, Path]] = None,
) -> bool:
    """Whether the Hub itself said, now or at an earlier time, that the repository has no such file.

    Args:
        error: What `fetch` raised for the file; it also means that the Hub could not be asked.
        repo_id: Repository, `owner/name`.
        filename: File that was sought.
        revision: Branch, tag or commit, by default main.
        cache_dir: Cache of the Hub, by default huggingface_hub's own.
    """
    if not isinstance(error, LocalEntryNotFoundError):
        return True
    cached = try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision)
    return cached is not None and not isinstance(cached, str)


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
    digest = sha256 or (digest_in(os.path.basename(os.readlink(path))) if os.path.islink(path) else None)
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
    damage = find_difference(path, digest)
    if not damage:
        try:
            _write(record, json.dumps(dict(file=state, digest=digest)))
        except OSError:
            pass  # a cache that cannot be written: hashed every time
    return damage


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


def _ask_digest(path: str, repo_id: str, filename: str) -> Optional[str]:
    """Asks the Hub for the digest of a file whose name in the cache does not tell it."""
    commit = Path(path).parent.name
    try:
        digest = digest_in(get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=commit)).etag)
        if digest:
            return digest
        info = HfApi().model_info(repo_id, revision=commit, files_metadata=True, timeout=10)
        file = next(file for file in info.siblings if file.rfilename == filename)
        return digest_in(file.lfs.sha256 if file.lfs else file.blob_id)
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


# Explain


def describe_error(error: Exception, cache_dir: Optional[Union[str, Path]] = None) -> str:
    """Says in words what went wrong with a file of the Hub, and what to do.

    Args:
        error: What `fetch` raised: an error of huggingface_hub, of the network or of the disk.
        cache_dir: The cache that `fetch` was given.
    """
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
