"""Digests of files: how they are computed, and how the Hub names files by them."""
import hashlib
import os
import re
from pathlib import Path
from typing import List, Optional, Union

__all__ = ['digest_in', 'find_difference', 'sha256']

# A large file is named by its sha256, a small one by its git object id; proxies put something before or behind.
_DIGEST = re.compile(r'(?:sha256:)?([0-9a-f]{64}|[0-9a-f]{40})(?:-\w+)?', re.IGNORECASE)


def sha256(path: Union[str, Path]) -> str:
    """sha256 of a file, in hexadecimal.

    Args:
        path: File to read.

    Raises:
        OSError: If the file cannot be read.
    """
    return _hash(path, hashlib.sha256())[0]


def digest_in(name: Optional[str]) -> Optional[str]:
    """Digest by which the Hub names a file.

    Args:
        name: ETag of an answer, or name of a file in the Hub's cache.

    Returns:
        A sha256 (64 digits), a git object id or a sha1 (40 digits each), in small letters; None if the name is none.
    """
    match = _DIGEST.fullmatch(name or '')
    return match[1].lower() if match else None


def find_difference(path: Union[str, Path], digest: str) -> str:
    """Compares a file with its digest.

    Args:
        path: File to read.
        digest: A digest as `digest_in` returns it.

    Returns:
        How they differ, in words; '' if they do not.

    Raises:
        OSError: If the file cannot be read.
    """
    size = os.path.getsize(path)
    if len(digest) == 64:
        name, found = 'sha256', [sha256(path)]
    else:
        name, found = 'git sha1', _hash(path, hashlib.sha1(b'blob %d\0' % size), hashlib.sha1())
    return '' if digest in found else f'its {name} is {found[0]} instead of {digest}, its size {size} bytes'


def _hash(path: Union[str, Path], *hashes) -> List[str]:
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            for value in hashes:
                value.update(chunk)
    return [value.hexdigest() for value in hashes]
