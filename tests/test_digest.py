"""Digests: of which kind a name is, and whether a file has them."""
import hashlib

import pytest
from hub_server import git_sha1

from timm_cotnet.digest import digest_in, find_difference, sha256

CONTENT = b'weights' * 300000  # more than is read at once
DIGESTS = [hashlib.sha256(CONTENT).hexdigest(), git_sha1(CONTENT), hashlib.sha1(CONTENT).hexdigest()]


@pytest.mark.parametrize('digest', DIGESTS)
def test_names(digest):
    for name in (digest, digest.upper(), f'sha256:{digest}', f'{digest}-gzip'):
        assert digest_in(name) == digest
    for name in (None, '', digest[1:], f'{digest}0', f'W/"{digest}"', '5f3c-60a1b2'):
        assert digest_in(name) is None


def test_files(tmp_path):
    path = tmp_path / 'x'
    path.write_bytes(CONTENT)
    assert sha256(path) == sha256(str(path)) == DIGESTS[0]
    assert [find_difference(path, digest) for digest in DIGESTS] == ['', '', '']
    assert find_difference(path, '0' * 64) == (
        f'its sha256 is {DIGESTS[0]} instead of {"0" * 64}, its size 2100000 bytes')
    assert find_difference(path, '0' * 40).startswith(f'its git sha1 is {DIGESTS[1]} instead of {"0" * 40}')
