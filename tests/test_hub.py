"""Download of files against a server of the Hub's protocol, in processes of their own with the package installed.

Whatever a server, a network or a disk does, a model has the published weights bit for bit, or an error says what to do.
"""
import ctypes
import gzip
import hashlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import safetensors.torch
from hub_client import CONFIG, JUNK_HEADER, OTHER, RIGHT, SAFE, WEIGHTS, arguments, blob, check_error, digest_of
from hub_client import leftovers, pickled
from hub_server import HubServer, flip, git_sha1, sha256
from huggingface_hub import constants

from timm_cotnet import hub

WRONG_SIZE = dict(body=lambda body: body[:-1000])
#: name: (faults, does the model come)
FAULTS = {
    'no fault': ([], True),
    'byte changed once': ([('GET', 1, dict(body=flip))], True),
    'byte changed for ever': ([('GET', 99, dict(body=flip))], False),
    'header damaged once': ([('GET', 1, JUNK_HEADER)], True),
    'header damaged for ever': ([('GET', 99, JUNK_HEADER)], False),
    'body too short once': ([('GET', 1, WRONG_SIZE)], True),
    'body too short for ever': ([('GET', 99, WRONG_SIZE)], False),
    'body too long once': ([('GET', 1, dict(body=lambda body: body + b'0'))], True),
    'empty body once': ([('GET', 1, dict(body=b''))], True),
    'closed midway once': ([('GET', 1, dict(cut=400000))], True),
    'reset midway once': ([('GET', 1, dict(cut=400000, end='reset'))], True),
    'reset at once': ([('GET', 1, dict(cut=0, end='reset'))], True),
    'reset for ever': ([('GET', 99, dict(cut=400000, end='reset'))], False),
    'stalls once': ([('GET', 1, dict(cut=400000, end='stall'))], True),
    'late answer': ([('GET', 1, dict(delay=0.3))], True),
    'head late': ([('HEAD', 1, dict(delay=0.3))], True),
    'head stalls once': ([('HEAD', 1, dict(delay=3))], True),
    'head 503 three times': ([('HEAD', 3, dict(status=503))], True),
    'head 429 once': ([('HEAD', 1, dict(status=429))], True),
    'head reset once': ([('HEAD', 1, dict(cut=0, end='reset'))], True),
    'head 403': ([('HEAD', 99, dict(status=403))], False),
    'head 401 without code': ([('HEAD', 99, dict(status=401))], False),
    'head 404 without code': ([('HEAD', 99, dict(status=404))], False),
    'head 400': ([('HEAD', 99, dict(status=400))], False),
    'get 500 once': ([('GET', 1, dict(status=500))], True),
    'get 503 once': ([('GET', 1, dict(status=503))], True),
    'get 429 once': ([('GET', 1, dict(status=429, headers={'Retry-After': '1'}))], True),
    'get 416 once': ([('GET', 1, dict(status=416, body=b''))], True),
    'get 403': ([('GET', 99, dict(status=403))], False),
    'get 404': ([('GET', 99, dict(status=404))], False),
    'get 500 for ever': ([('GET', 99, dict(status=500))], False),
    'page of a portal once': ([('GET', 1, dict(body=b'<html>log in</html>'))], True),
    'no commit in the answer': ([('HEAD', 99, dict(headers={'X-Repo-Commit': None}))], False),
    'no etag': ([('HEAD', 99, dict(headers={'ETag': None, 'X-Linked-Etag': None}))], False),
    'chunked': ([('GET', 99, dict(headers={'Transfer-Encoding': 'chunked'}))], True),
    'chunked and cut once': ([('GET', 1, dict(headers={'Transfer-Encoding': 'chunked'}, cut=4000))], True),
    'gzip': ([('GET', 99, dict(headers={'Content-Encoding': 'gzip'}, body=gzip.compress))], True),
    'length too large once': ([('GET', 1, dict(headers={'Content-Length': str(len(SAFE) + 5)}, cut=len(SAFE)))], True),
    'length too small once': ([('GET', 1, dict(headers={'Content-Length': str(len(SAFE) - 5)}))], True),
    'size in head wrong': ([('HEAD', 1, dict(headers={'X-Linked-Size': '17'}))], True),
}


@pytest.mark.parametrize('name', FAULTS)
def test_fault(server, client, repo, tmp_path, name):
    faults, succeeds = FAULTS[name]
    for method, times, changes in faults:
        server.fault(method, f'{repo}/resolve/.*/model.safetensors', times, **changes)
    answer = client.create(**arguments(repo, cache_dir=tmp_path))
    assert leftovers(tmp_path) == []
    assert answer.get('weights') == (RIGHT if succeeds else None)
    if not succeeds:
        check_error(answer, repo)
        # What was wrong for once leaves nothing behind: the next try works.
        server.faults.clear()
        assert client.create(**arguments(repo, cache_dir=tmp_path))['weights'] == RIGHT


# The cache


def flip_in_place(path: Path) -> None:
    """Changes a byte and sets the times back, as far as a program can."""
    status = path.stat()
    with path.open('r+b') as file:
        file.seek(-10, os.SEEK_END)
        byte = file.read(1)
        file.seek(-10, os.SEEK_END)
        file.write(bytes([byte[0] ^ 0xff]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut_in_place(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def replace_by_other(path: Path) -> None:
    other = path.with_name('other')
    other.write_bytes(safetensors.torch.save(OTHER))
    other.replace(path)


@pytest.mark.parametrize('damage', [flip_in_place, cut_in_place, replace_by_other, Path.unlink])
def test_damaged_cache_heals(server, client, repo, tmp_path, damage):
    for _ in range(2):
        assert client.create(**arguments(repo, cache_dir=tmp_path))['weights'] == RIGHT
    assert server.count('GET', f'{repo}/resolve') == 1
    damage(blob(tmp_path, repo))
    answer = client.create(**arguments(repo, cache_dir=tmp_path))
    assert answer['weights'] == RIGHT and server.count('GET', f'{repo}/resolve') == 2
    assert ('is damaged' in answer['log']) == (damage is not Path.unlink)
    assert client.create(**arguments(repo, cache_dir=tmp_path))['weights'] == RIGHT
    assert server.count('GET', f'{repo}/resolve') == 2 and leftovers(tmp_path) == []


def test_damaged_twice(server, client, repo, tmp_path):
    server.fault('GET', f'{repo}/resolve', body=flip)
    answer = client.create(**arguments(repo, cache_dir=tmp_path))
    check_error(answer, repo)
    assert sha256(SAFE) in answer['message'] and sha256(flip(SAFE)) in answer['message']
    assert server.count('GET', f'{repo}/resolve') == 2
    assert [path for path in tmp_path.rglob('*') if path.is_file() and path.stat().st_size == len(SAFE)] == []


def test_damaged_cache_offline(server, client, start, repo, tmp_path):
    server.commit('me/pickle', {'config.json': CONFIG, 'pytorch_model.bin': pickled(WEIGHTS)})
    offline = start(env=dict(HF_HUB_OFFLINE='1'))
    model = arguments(repo, cache_dir=tmp_path)
    answer = offline.create(**model)
    check_error(answer, repo)
    assert 'HF_HUB_OFFLINE' in answer['message'] and str(tmp_path) in answer['message']
    assert client.create(**model)['weights'] == RIGHT
    assert offline.create(**model)['weights'] == RIGHT
    flip_in_place(blob(tmp_path, repo))
    check_error(offline.create(**model), repo)
    assert leftovers(tmp_path) == []
    assert client.create(**model)['weights'] == RIGHT
    lines = offline.create('cotnet50', cache_dir=tmp_path)['message'].splitlines()  # to go online would not help
    assert lines[0] == 'No weights for cotnet50.jd_in1k: this project has not published them on the Hub yet.'
    assert 'HF_HUB_OFFLINE' in lines[1]
    # A pickle that was fetched is found again, too.
    assert client.create('hf-hub:me/pickle', cache_dir=tmp_path)['weights'] == RIGHT
    assert offline.create('hf-hub:me/pickle', cache_dir=tmp_path)['weights'] == RIGHT


@pytest.mark.parametrize('links', [True, False])
def test_verified_once(server, repo, tmp_path, monkeypatch, links):
    """The digest is computed once per version of the file, with symbolic links in the cache and without."""
    commit = server.repos[repo].sha('main')
    storage = tmp_path / f'models--{repo.replace("/", "--")}'
    path = storage / 'snapshots' / commit / 'model.safetensors'
    path.parent.mkdir(parents=True)
    target = storage / 'blobs' / sha256(SAFE) if links else path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(SAFE)
    if links:
        path.symlink_to(target)
    time.sleep(0.05)  # a record must be younger than the file
    hashed = []
    monkeypatch.setattr(
        hub, 'find_difference', lambda *args, original=hub.find_difference: hashed.append(1) or original(*args))
    monkeypatch.setattr(hub, '_ask_digest', lambda *args: sha256(SAFE))

    def damage(digest=None):
        return hub._damage(str(path), repo, 'model.safetensors', digest)

    assert [damage() for _ in range(3)] == ['', '', ''] and len(hashed) == 1
    assert damage(sha256(SAFE)) == '' and len(hashed) == 1
    assert sha256(SAFE) in damage('0' * 64) and len(hashed) == 2  # a digest recorded with the tag is another question
    os.utime(target)
    assert damage() == '' and damage() == '' and len(hashed) == 3
    flip_in_place(target)
    assert sha256(flip(SAFE)) in damage() and sha256(flip(SAFE)) in damage() and len(hashed) == 5
    record, = storage.rglob('*.verified')
    record.write_text('[')
    target.write_bytes(SAFE)
    assert damage() == '' and len(hashed) == 6


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(constants, 'HF_HUB_DISABLE_SYMLINKS'), reason='this huggingface_hub always links where it can')
def test_without_links(server, start, repo, tmp_path):
    client = start(env=dict(HF_HUB_DISABLE_SYMLINKS='1', HF_HUB_CACHE=str(tmp_path)))
    server.fault('GET', f'{repo}/resolve', 1, body=flip)
    assert client.create(**arguments(repo))['weights'] == RIGHT
    assert not blob(tmp_path, repo).parts[-2] == 'blobs'
    flip_in_place(blob(tmp_path, repo))
    assert client.create(**arguments(repo))['weights'] == RIGHT
    assert server.count('GET', f'{repo}/resolve') == 3 and leftovers(tmp_path) == []


DIGEST = sha256(SAFE)
ETAGS = {
    'weak': (f'W/"{DIGEST}"', None, True),
    'bare': (DIGEST, None, True),
    'linked only': (None, f'"{DIGEST}"', True),
    'linked wins': ('"abc"', f'"{DIGEST}"', True),
    'capitals': (f'"{DIGEST.upper()}"', None, True),
    'compressed': (f'"{DIGEST}-gzip"', None, True),
    'git': (f'"{git_sha1(SAFE)}"', None, True),
    'sha1': (f'"{hashlib.sha1(SAFE).hexdigest()}"', None, True),
    'something else, but there is the API': ('"5f3c-60a1b2"', None, True),
    'something else': ('"5f3c-60a1b2"', None, False),
}


@pytest.mark.parametrize('form', ETAGS)
def test_names_of_blobs(server, client, repo, tmp_path, form):
    """Verified by whatever digest the server names; where it names none, at least the file must be readable."""
    etag, linked, verifies = ETAGS[form]
    server.fault('HEAD', f'{repo}/resolve', headers={'ETag': etag, 'X-Linked-Etag': linked})
    server.fault('GET', f'{repo}/resolve', 1, body=flip if verifies else JUNK_HEADER['body'])
    if not verifies:
        server.fault('GET', f'/api/models/{repo}', status=404)
    answer = client.create(**arguments(repo, cache_dir=tmp_path))
    assert answer['weights'] == RIGHT and server.count('GET', f'{repo}/resolve') == 2
    assert ('cannot be verified' in answer['log']) == (not verifies)
    asked = server.count('GET', f'/api/models/{repo}')
    assert client.create(**arguments(repo, cache_dir=tmp_path))['weights'] == RIGHT
    assert (server.count('GET', f'/api/models/{repo}') == asked) == verifies  # what was verified is not asked for again


def test_commit_changes_midway(server, client, repo, tmp_path):
    """The body is already that of a newer commit: taken for damage, and fetched again by its own name."""
    other = safetensors.torch.save(OTHER)

    def push(body):
        server.commit(repo, {'model.safetensors': other})
        return other

    server.fault('GET', f'{repo}/resolve', 1, body=push)
    assert client.create(**arguments(repo, cache_dir=tmp_path))['weights'] == digest_of(OTHER)


def test_new_commit(server, client, repo, tmp_path):
    assert client.create(**arguments(repo, cache_dir=tmp_path))['weights'] == RIGHT
    old = server.repos[repo].sha('main')
    server.commit(repo, {'model.safetensors': safetensors.torch.save(OTHER)})
    assert client.create(**arguments(repo, cache_dir=tmp_path))['weights'] == digest_of(OTHER)
    asked = len(server.requests)
    assert client.create(**arguments(f'{repo}@{old}', cache_dir=tmp_path))['weights'] == RIGHT
    assert len(server.requests) == asked  # a commit that is there is never asked for


# What the machine may do


@pytest.mark.slow
def test_server_gone(server, start, repo, tmp_path):
    """No network: the cache serves, and without it there is an error."""
    with HubServer() as short:
        short.commit('me/cached', {'config.json': CONFIG, 'model.safetensors': SAFE})
        client = start(env=dict(short.env, HF_HUB_CACHE=str(tmp_path)))
        assert client.create(**arguments('me/cached'))['weights'] == RIGHT
    assert client.create(**arguments('me/cached'))['weights'] == RIGHT
    answer = client.create(**arguments('me/uncached'))
    check_error(answer, 'me/uncached')
    assert 'not in the cache' in answer['message'] and answer['causes'][:1] == ['LocalEntryNotFoundError']


@pytest.mark.slow
def test_full_disk(server, start, repo, tmp_path):
    mount = ('unshare', '--user', '--map-root-user', '--mount', 'sh', '-c')
    cache = tmp_path / 'small'
    cache.mkdir()
    script = f'mount -t tmpfs -o size=600k tmpfs {cache} && exec "$@"'
    if subprocess.run([*mount, script, 'sh', 'true'], capture_output=True).returncode:
        pytest.skip('this system lets nobody mount a small disk')
    client = start((*mount, script, 'sh'))
    answer = client.create(**arguments(repo, cache_dir=cache))
    check_error(answer, repo)
    assert 'is full' in answer['message'] and str(cache) in answer['message'] and answer['causes'][0] == 'OSError'
    # Nothing of it fills the disk any more: a small file still fits.
    assert client.create(f'hf-hub:{repo}', cache_dir=cache)['error'] == 'WeightsError'
    assert client.create(**arguments(repo, cache_dir=tmp_path / 'roomy'))['weights'] == RIGHT


def drop_privileges() -> None:
    """Lets read-only folders be read-only for root, too: takes CAP_DAC_OVERRIDE and its like from the new process."""
    if os.geteuid() == 0:
        for capability in (1, 2, 3):
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


@pytest.mark.slow
def test_read_only_cache(server, start, client, repo, tmp_path):
    cache = tmp_path / 'cache'
    assert client.create(**arguments(repo, cache_dir=cache))['weights'] == RIGHT
    shutil.rmtree(next(cache.glob('*/.timm_cotnet')))
    folders = [cache, *(path for path in cache.rglob('*') if path.is_dir())]
    reader = start(preexec_fn=drop_privileges)
    for folder in folders:
        folder.chmod(0o555)
    try:
        for _ in range(2):
            assert reader.create(**arguments(repo, cache_dir=cache))['weights'] == RIGHT
        other = f'{repo}-other'
        server.commit(other, {'model.safetensors': SAFE})
        answer = reader.create(**arguments(other, cache_dir=cache))
        check_error(answer, other)
        assert 'cannot be used' in answer['message'] and 'HF_HOME' in answer['message']
        flip_in_place(blob(cache, repo))
        answer = reader.create(**arguments(repo, cache_dir=cache))
        check_error(answer, repo)
        assert 'damaged' in answer['message'] and sha256(SAFE) in answer['message']
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert client.create(**arguments(repo, cache_dir=cache))['weights'] == RIGHT


@pytest.mark.slow
def test_killed_midway(server, start, client, repo, tmp_path):
    server.fault('GET', f'{repo}/resolve', 1, cut=400000, end='stall')
    victim = start(env=dict(HF_HUB_DOWNLOAD_TIMEOUT='60'))
    victim.send(**arguments(repo, cache_dir=tmp_path))
    wait_for(lambda: server.count('GET', f'{repo}/resolve') == 1 and list(tmp_path.rglob('*.incomplete')))
    victim.process.send_signal(signal.SIGKILL)
    victim.process.wait()
    assert list(tmp_path.rglob('*.incomplete'))
    assert client.create(**arguments(repo, cache_dir=tmp_path))['weights'] == RIGHT
    assert leftovers(tmp_path) == []


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it did not happen in time'
        time.sleep(0.02)


@pytest.mark.slow
def test_many_processes(server, client, start, repo, tmp_path):
    """Three processes, one cache: first empty and the download damaged, then the cached file damaged."""
    clients = [client, start(), start()]
    server.fault('GET', f'{repo}/resolve', 1, body=flip)
    for downloads in (2, 3):
        for client in clients:
            client.send(**arguments(repo, cache_dir=tmp_path))
        assert [client.receive().get('weights') for client in clients] == [RIGHT] * len(clients)
        assert server.count('GET', f'{repo}/resolve') == downloads and leftovers(tmp_path) == []
        flip_in_place(blob(tmp_path, repo))
