"""Converted weights to the Hub: `python -m timm_cotnet.publish DIR --namespace NAME`.

Uploads what `timm_cotnet.convert` wrote, in one commit per model, then downloads it again and compares the digests.
What the Hub has already is not uploaded again, so that a push that broke off can simply be repeated.
"""
import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import List, Optional

import torch
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open

from .checkpoint import CheckpointError, find_variant
from .convert import CHECKPOINT_SUFFIXES
from .cotnet import default_cfgs
from .digest import digest_in, find_difference, sha256
from .hub import WEIGHTS_NAME

__all__ = ['PublishError', 'Publication', 'publish']

TEXT_NAMES = ('README.md', 'config.json', 'figure.svg')
REFUSED_SUFFIXES = (*CHECKPOINT_SUFFIXES, '.ckpt', '.pickle', '.npz')


class PublishError(RuntimeError):
    """Weights that were not published; the message says why and what to do."""


@dataclass(frozen=True)
class Publication:
    """What became of a converted model.

    Attributes:
        repo_id: Repository on the Hub.
        uploaded: Names of the files that the Hub did not have like this, none if it had all.
        revision: Commit, or pull request, in which all files were found to be whole.
        url: Where to look at it.
        sha256: Digest of `model.safetensors`.
    """
    repo_id: str
    uploaded: List[str]
    revision: str
    url: str
    sha256: str


def publish(
        folder: Path,
        namespace: str,
        private: bool = False,
        create_pr: bool = False,
        dry_run: bool = False,
        token: Optional[str] = None,
) -> Publication:
    """Publishes one converted model as `<namespace>/<variant>.<tag>`.

    Args:
        folder: What `timm_cotnet.convert` wrote.
        namespace: User or organization on the Hub.
        private: Create the repository as a private one; one that exists stays as it is.
        create_pr: Open a pull request instead of a commit to the main branch.
        dry_run: Find out what would be uploaded, and upload nothing.
        token: Access token, by default huggingface_hub's.

    Raises:
        PublishError: If the folder is no whole converted model, or the Hub does not take or keep it.
    """
    folder = Path(folder)
    repo_id = f'{namespace}/{_check_folder(folder)}'
    paths = {name: folder / name for name in (*TEXT_NAMES, WEIGHTS_NAME) if (folder / name).exists()}
    api = HfApi(token=token, library_name='timm-cotnet')
    try:
        changed = [name for name, path in paths.items() if not _is_there(api, repo_id, name, path)]
        revision, url = 'main', f'{api.endpoint}/{repo_id}'
        if changed and not dry_run:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            commit = api.create_commit(
                repo_id,
                [CommitOperationAdd(name, str(paths[name])) for name in changed],
                commit_message=f'Publish {repo_id.split("/")[1]}, converted by timm-cotnet',
                create_pr=create_pr,
            )
            revision, url = (commit.pr_revision, commit.pr_url) if create_pr else (commit.oid, url)
        digests = {name: sha256(path) for name, path in paths.items()}
        if not dry_run:
            for name, digest in digests.items():
                _check_download(api, repo_id, name, revision, digest)
    except PublishError:
        raise
    except Exception as e:  # the client's and its transport's errors have no common class
        raise PublishError(
            f'{folder} could not be published as {repo_id} at {api.endpoint}: {type(e).__name__}: {e}\n'
            f'Uploading needs a token that may write to {namespace} (HF_TOKEN, or `hf auth login`). The command can be '
            'run again.') from e
    return Publication(repo_id, changed, revision, url, digests[WEIGHTS_NAME])


def _check_folder(folder: Path) -> str:
    """Checks that the folder holds a converted model and no pickle, and returns the name of its repository."""
    refused = sorted(path.name for path in folder.glob('*') if path.suffix in REFUSED_SUFFIXES)
    if refused:
        raise PublishError(f'{folder} holds {", ".join(refused)}; only safetensors are published, so take it away')
    for name in ('README.md', 'config.json', WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise PublishError(f'{folder} has no {name}; make it with python -m timm_cotnet.convert')
    try:
        config = json.loads((folder / 'config.json').read_text())
        detector = 'detector' in config
        if not detector:
            variant, tag, classes = config['architecture'], config['pretrained_cfg'].get('tag'), config['num_classes']
    except (ValueError, KeyError) as e:
        raise PublishError(f'{folder}/config.json is damaged ({e!r}); convert the checkpoint again') from e
    try:
        with safe_open(folder / WEIGHTS_NAME, 'pt') as weights:
            shapes = {key: torch.empty(weights.get_slice(key).get_shape(), device='meta') for key in weights.keys()}
        if detector:
            from .detection.convert import check_detector  # only here, as torchvision's detectors are slow to import

            return check_detector(shapes, config)
        if variant not in default_cfgs:
            raise CheckpointError(f'config.json names {variant}, which is no model of this package')
        find_variant(shapes, classes, variant)
    except (SafetensorError, CheckpointError) as e:
        raise PublishError(f'{folder}/{WEIGHTS_NAME} is not published: {e}') from e
    return f'{variant}.{tag}' if tag else variant


def _is_there(api: HfApi, repo_id: str, name: str, path: Path) -> bool:
    """Whether the Hub has the file with this content, by the digest it names it by, or else by a download."""
    try:
        etag = api.get_hf_file_metadata(url=hf_hub_url(repo_id, name, endpoint=api.endpoint)).etag
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return False
    digest = digest_in(etag)
    if digest:
        return not find_difference(path, digest)
    return _download_digest(api, repo_id, name, 'main') == sha256(path)


def _download_digest(api: HfApi, repo_id: str, name: str, revision: str) -> str:
    with TemporaryDirectory() as cache_dir:
        return sha256(Path(api.hf_hub_download(repo_id, name, revision=revision, cache_dir=cache_dir)))


def _check_download(api: HfApi, repo_id: str, name: str, revision: str, digest: str) -> None:
    """Downloads a file, once more if it arrives damaged."""
    for _ in range(2):
        found = _download_digest(api, repo_id, name, revision)
        if found == digest:
            return
    raise PublishError(
        f'{name} of {repo_id} at {revision} comes back with the sha256 {found}, where {digest} was uploaded; '
        'run the command again')


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m timm_cotnet.publish', description=__doc__.split('\n')[0])
    parser.add_argument('folder', type=Path, help='what timm_cotnet.convert wrote: one model, or a folder of them')
    parser.add_argument('--namespace', required=True, help='user or organization on the Hub')
    parser.add_argument('--private', action='store_true', help='create repositories as private ones')
    parser.add_argument('--create-pr', action='store_true', help='open pull requests instead of committing to main')
    parser.add_argument('--dry-run', action='store_true', help='say what would be uploaded, and upload nothing')
    args = parser.parse_args(argv)
    folder: Path = args.folder
    folders = [folder] if (folder / 'config.json').exists() else sorted(
        path.parent for path in folder.glob('*/config.json'))
    if not folders:
        print(f'error: {folder} holds no converted model; make one with python -m timm_cotnet.convert', file=sys.stderr)
        return 1
    failed = False
    for folder in folders:
        try:
            done = publish(folder, args.namespace, args.private, args.create_pr, args.dry_run)
        except PublishError as e:
            failed = True
            print(f'error: {e}', file=sys.stderr)
            continue
        what = ', '.join(done.uploaded) or 'nothing, all files are there'
        print(f'{done.repo_id}: {"would upload" if args.dry_run else "uploaded"} {what}')
        if not args.dry_run:
            print(f'{done.repo_id}: downloaded again from {done.revision}, all digests agree; see {done.url}')
            print(f'{done.repo_id}: sha256 of {WEIGHTS_NAME} {done.sha256}, for PUBLISHED in timm_cotnet/published.py')
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
