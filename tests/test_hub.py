"""Download of weights against a server of the Hub's protocol, in processes of their own with the package installed.

Whatever a server, a network or a disk does, a model has the published weights bit for bit, or an error says what to do.
"""
import ctypes
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from hub_server import TOKEN, HubServer, flip, git_sha1, sha256
from timm.models._hub import save_config_for_hf

from timm_cotnet import hub

# Answers each line of arguments for `timm.create_model` with a line: a digest of the model's tensors, or the error.
CLIENT = '''
import hashlib, io, json, logging, sys
import timm, torch
torch.set_num_threads(1)
assert 'timm_cotnet' in sys.modules  # nobody imported it here
log = io.StringIO()
logging.getLogger('timm_cotnet').addHandler(logging.StreamHandler(log))
print('ready', flush=True)
for line in sys.stdin:
    log.truncate(log.seek(0))
    try:
        model = timm.create_model(**json.loads(line))
        digest = hashlib.sha256()
        for name, value in sorted(model.state_dict().items()):
            digest.update(name.encode() + value.numpy().tobytes())
        answer = dict(weights=digest.hexdigest(), cfg={k: str(v) for k, v in model.pretrained_cfg.items()})
    except Exception as error:
        cause, seen = error.__cause__, []
        while cause:
            seen.append(type(cause).__name__)
            cause = cause.__cause__ or cause.__context__
        answer = dict(error=type(error).__name__, message=str(error), causes=seen)
    print(json.dumps(dict(answer, log=log.getvalue())), flush=True)
'''


class Client:
    """A new process that makes models on demand.

    Args:
        environment: Where the package is installed.
        env: Environment variables.
        prefix: Command that runs Python.
        options: For `subprocess.Popen`.
    """

    def __init__(self, environment, env: dict, prefix: tuple = (), **options):
        inherited = {
            key: value for key, value in os.environ.items()
            if not key.startswith(('PYTHON', 'TIMM_COTNET', 'HF_')) and not key.lower().endswith('_proxy')
        }
        limits = dict(HF_HUB_DOWNLOAD_TIMEOUT='2', HF_HUB_ETAG_TIMEOUT='2', OMP_NUM_THREADS='1')
        self.process = subprocess.Popen(
            [*prefix, environment.path / 'bin' / 'python', '-c', CLIENT],
            cwd=environment.path, env=inherited | limits | env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)

    def send(self, model_name: str, pretrained: bool = True, **kwargs) -> None:
        kwargs = {key: str(value) if isinstance(value, Path) else value for key, value in kwargs.items()}
        line = json.dumps(dict(model_name=model_name, pretrained=pretrained, **kwargs))
        print(line, file=self.process.stdin, flush=True)

    def receive(self) -> dict:
        while (line := self.process.stdout.readline()).strip() in ('ready',):
            pass
        assert line, self.process.stderr.read()
        print(line)  # seen where a test fails
        return json.loads(line)

    def create(self, model_name: str, **kwargs) -> dict:
        self.send(model_name, **kwargs)
        return self.receive()

    def close(self) -> None:
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.stderr.close()
        self.process.wait()


def digest_of(state_dict: dict) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def official_weights(seed: int = 0) -> dict:
    torch.manual_seed(seed)
    return timm.create_model('test_cotnet').state_dict()


WEIGHTS = official_weights()
OTHER = official_weights(1)
RIGHT = digest_of(WEIGHTS)
SAFE = safetensors.torch.save(WEIGHTS)


def pickled(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.fixture(scope='module')
def config(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp('config') / 'config.json'
    save_config_for_hf(timm.create_model('test_cotnet'), path)
    config = json.loads(path.read_text())
    config.pop('model_args', None)  # new versions of timm add these defaults, which transformers does not expect
    return json.dumps(config).encode()


@pytest.fixture(scope='module')
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_faults(server):
    server.faults.clear()
    server.redirect = False


@pytest.fixture
def repo(server, config, request) -> str:
    """A new repository with weights and config.json; its name does not say what model it has."""
    repo_id = f'faults/r{len(server.repos)}'
    server.commit(repo_id, {'config.json': config, 'model.safetensors': SAFE})
    return repo_id


@pytest.fixture
def start(server, installed_venv, tmp_path):
    """Starts clients; they end with the test."""
    clients = []

    def start(*args, env: dict = {}, **kwargs):
        env = server.env | dict(HF_HOME=str(tmp_path / 'home')) | env
        clients.append(Client(installed_venv, env, *args, **kwargs))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


@pytest.fixture(scope='module')
def client(server, installed_venv, tmp_path_factory):
    """One process for all tests that need no other; each test has a cache of its own."""
    client = Client(installed_venv, server.env | dict(HF_HOME=str(tmp_path_factory.mktemp('home'))))
    yield client
    client.close()


def arguments(repo_id: str, **kwargs) -> dict:
    """Arguments that make the small model with a repository's weights, without config.json."""
    return dict(
        model_name='test_cotnet',
        pretrained_cfg_overlay=dict(file=None, hf_hub_id=repo_id, hf_hub_filename='model.safetensors'),
        **kwargs,
    )


def leftovers(cache: Path) -> list[str]:
    """What a cache has of downloads that broke off, and of weights that are not as they should be."""
    return [
        str(path) for path in cache.rglob('*')
        if path.suffix == '.incomplete' or path.name == 'model.safetensors' and path.read_bytes() != SAFE
    ]


WRONG_SIZE = dict(body=lambda body: body[:-1000])
JUNK_HEADER = dict(body=lambda body: b'\xff' * 100 + body[100:])
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
    'late answer': ([('GET', 1, dict(delay=1))], True),
    'head late': ([('HEAD', 1, dict(delay=1))], True),
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


def check_error(answer: dict, repo_id: str) -> None:
    assert answer['error'] == 'WeightsError' and answer['causes'] and len(answer['message']) < 2000
    for part in ('test_cotnet', repo_id, 'timm_cotnet.convert', 'local-dir:', 'TIMM_COTNET_HUB'):
        assert part in answer['message']


# The cache


def blob(cache: Path, repo_id: str, name: str = 'model.safetensors') -> Path:
    """The one file behind a repository's snapshot."""
    pointer, = cache.glob(f'models--{repo_id.replace("/", "--")}/snapshots/*/{name}')
    return pointer.resolve()


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


def test_damaged_cache_offline(server, start, repo, tmp_path):
    env = dict(HF_HUB_CACHE=str(tmp_path))
    online, offline = start(env=env), start(env=env | dict(HF_HUB_OFFLINE='1'))
    answer = offline.create(**arguments(repo))
    check_error(answer, repo)
    assert 'HF_HUB_OFFLINE' in answer['message'] and str(tmp_path) in answer['message']
    assert online.create(**arguments(repo))['weights'] == RIGHT
    assert offline.create(**arguments(repo))['weights'] == RIGHT
    flip_in_place(blob(tmp_path, repo))
    check_error(offline.create(**arguments(repo)), repo)
    assert leftovers(tmp_path) == []
    assert online.create(**arguments(repo))['weights'] == RIGHT


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
    monkeypatch.setattr(hub, '_differs', lambda *args, differs=hub._differs: hashed.append(1) or differs(*args))
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


# config.json, hf-hub:


@pytest.mark.parametrize('damage', [flip, lambda body: body[:50], lambda body: b'\xff' + body[1:]])
def test_config_heals(server, client, repo, tmp_path, damage):
    server.fault('GET', f'{repo}/resolve/.*/config.json', 1, body=lambda body: damage(body).ljust(len(body)))
    answer = client.create(f'hf-hub:{repo}', cache_dir=tmp_path)
    assert answer['weights'] == RIGHT and answer['cfg']['hf_hub_id'] == repo and answer['cfg']['source'] == 'hf-hub'
    assert 'file' not in answer['cfg']
    path = blob(tmp_path, repo, 'config.json')
    path.write_bytes(damage(path.read_bytes()))
    assert client.create(f'hf-hub:{repo}', cache_dir=tmp_path)['weights'] == RIGHT
    assert server.count('GET', f'{repo}/resolve/.*/config.json') == 3


def test_config_damaged_for_ever(server, client, repo, tmp_path):
    server.fault('GET', f'{repo}/resolve/.*/config.json', body=flip)
    answer = client.create(f'hf-hub:{repo}', cache_dir=tmp_path)
    assert answer['error'] == 'WeightsError' and 'config.json' in answer['message'] and 'damaged' in answer['message']


def test_revisions(server, client, repo, tmp_path):
    old = server.repos[repo].sha('main')
    server.commit(repo, {'model.safetensors': safetensors.torch.save(OTHER)}, branch='second')
    assert client.create(f'hf-hub:{repo}@second', cache_dir=tmp_path)['weights'] == digest_of(OTHER)
    assert client.create(f'hf-hub:{repo}@{old}', cache_dir=tmp_path)['weights'] == RIGHT
    answer = client.create(f'hf-hub:{repo}@third', cache_dir=tmp_path)
    assert answer['error'] == 'RevisionNotFoundError'  # whose model it would be, nobody knows
    answer = client.create(**arguments(f'{repo}@third', cache_dir=tmp_path))
    check_error(answer, repo)
    assert 'third' in answer['message'] and 'revision' in answer['message']


def test_models_of_others_are_left_alone(server, client, tmp_path):
    resnet = timm.create_model('test_resnet', num_classes=7)
    save_config_for_hf(resnet, tmp_path / 'config.json')
    weights = safetensors.torch.save(resnet.state_dict())
    server.commit('them/resnet', {
        'config.json': (tmp_path / 'config.json').read_bytes(), 'model.safetensors': weights})
    assert client.create('hf-hub:them/resnet', cache_dir=tmp_path)['weights'] == digest_of(resnet.state_dict())
    answer = client.create('hf-hub:them/missing', cache_dir=tmp_path)
    assert answer['error'] == 'RepositoryNotFoundError'


# What a person has to act on


def test_missing_and_private(server, client, start, config, tmp_path):
    for model in (arguments('me/nothing'), dict(model_name='hf-hub:me/test_cotnet.nothing')):
        answer = client.create(**model, cache_dir=tmp_path)
        check_error(answer, 'nothing')
        assert 'private' in answer['message'] and 'HF_TOKEN' in answer['message']
        assert answer['causes'][0] == 'RepositoryNotFoundError'

    server.redirect = True
    files = {'config.json': config, 'model.safetensors': SAFE}
    server.commit('me/private', files, private=True)
    server.commit('me/gated', files, gated=True)
    check_error(client.create(**arguments('me/private', cache_dir=tmp_path)), 'me/private')
    answer = client.create(**arguments('me/gated', cache_dir=tmp_path))
    check_error(answer, 'me/gated')
    assert 'page' in answer['message'] and answer['causes'][0] == 'GatedRepoError'
    assert client.create(**arguments('me/absent', cache_dir=tmp_path))['error'] == 'WeightsError'

    asked = len(server.requests)
    trusted = start(env=dict(HF_TOKEN=TOKEN))
    assert trusted.create(**arguments('me/private', cache_dir=tmp_path))['weights'] == RIGHT
    assert trusted.create('hf-hub:me/private', cache_dir=tmp_path)['weights'] == RIGHT
    hosts = {
        (request.host.split(':')[0], request.token)
        for request in server.requests[asked:] if request.path.startswith(('/me/', '/cdn/'))
    }
    assert hosts == {('127.0.0.1', TOKEN), ('localhost', None)}


def test_no_file(server, client, config, tmp_path):
    server.commit('me/empty', {'config.json': config})
    answer = client.create(**arguments('me/empty', cache_dir=tmp_path))
    check_error(answer, 'me/empty')
    assert 'no such file' in answer['message'] and 'model.safetensors' in answer['message']


def test_not_safetensors(server, client, tmp_path):
    """A file that is what the Hub says, and still no weights."""
    server.commit('me/text', {'model.safetensors': b'version https://git-lfs.github.com/spec/v1'})
    answer = client.create(**arguments('me/text', cache_dir=tmp_path))
    check_error(answer, 'me/text')
    assert 'not a readable safetensors file' in answer['message']


@pytest.mark.slow
def test_server_gone(server, start, repo, config, tmp_path):
    """No network: the cache serves, and without it the error comes after huggingface_hub's own retries (20 s)."""
    with HubServer() as short:
        short.commit('me/cached', {'config.json': config, 'model.safetensors': SAFE})
        client = start(env=dict(short.env, HF_HUB_CACHE=str(tmp_path)))
        assert client.create(**arguments('me/cached'))['weights'] == RIGHT
    assert client.create(**arguments('me/cached'))['weights'] == RIGHT
    answer = client.create(**arguments('me/uncached'))
    check_error(answer, 'me/uncached')
    assert 'not in the cache' in answer['message'] and answer['causes'][:1] == ['LocalEntryNotFoundError']


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


def test_many_processes(server, start, repo, tmp_path):
    """Four processes, one cache: first empty and the download damaged, then the cached file damaged."""
    clients = [start() for _ in range(4)]
    server.fault('GET', f'{repo}/resolve', 1, body=flip)
    for downloads in (2, 3):
        for client in clients:
            client.send(**arguments(repo, cache_dir=tmp_path))
        assert [client.receive().get('weights') for client in clients] == [RIGHT] * len(clients)
        assert server.count('GET', f'{repo}/resolve') == downloads and leftovers(tmp_path) == []
        flip_in_place(blob(tmp_path, repo))


# Pickles


class Evil:
    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_pickle_never_instead(server, client, repo, tmp_path):
    server.commit(repo, {'pytorch_model.bin': pickled(OTHER)})
    assert client.create(f'hf-hub:{repo}', cache_dir=tmp_path)['weights'] == RIGHT
    for fault in (dict(status=403), dict(status=404), dict(status=400), dict(body=flip), dict(cut=9, end='reset')):
        server.faults.clear()
        server.fault('HEAD' if 'status' in fault else 'GET', f'{repo}/resolve/.*safetensors', **fault)
        answer = client.create(f'hf-hub:{repo}', cache_dir=tmp_path / str(fault))
        check_error(answer, repo)
    assert server.count('GET', f'{repo}/resolve/.*bin') == server.count('HEAD', f'{repo}/resolve/.*bin') == 0


@pytest.mark.slow
def test_pickle_never_instead_when_down(server, client, repo, tmp_path):
    """huggingface_hub's own retries take 20 s."""
    server.commit(repo, {'pytorch_model.bin': pickled(OTHER)})
    server.fault('HEAD', f'{repo}/resolve/.*safetensors', status=503)
    check_error(client.create(f'hf-hub:{repo}', cache_dir=tmp_path), repo)
    assert server.count('HEAD', f'{repo}/resolve/.*bin') == 0


def test_only_a_pickle(server, client, start, config, tmp_path):
    """As in timm a repository without safetensors is read from its pickle, but verified, and with weights_only."""
    server.commit('me/pickle', {'config.json': config, 'pytorch_model.bin': pickled({'state_dict_ema': WEIGHTS})})
    server.fault('GET', 'me/pickle/resolve/.*bin', 1, body=flip)
    answer = client.create('hf-hub:me/pickle', cache_dir=tmp_path)
    assert answer['weights'] == RIGHT and 'state_dict' not in answer['cfg']
    offline = start(env=dict(HF_HUB_OFFLINE='1'))
    assert offline.create('hf-hub:me/pickle', cache_dir=tmp_path)['weights'] == RIGHT
    evil = pickled({'state_dict': Evil(tmp_path / 'evil')})
    server.commit('me/evil', {'config.json': config, 'pytorch_model.bin': evil})
    check_error(client.create('hf-hub:me/evil', cache_dir=tmp_path), 'me/evil')
    assert not (tmp_path / 'evil').exists()


# Does it fit


def run_script(installed_venv, server, script: str, *args, **env) -> dict:
    """Runs a script in a new process and returns what its last line says in JSON."""
    env = server.env | dict(OMP_NUM_THREADS='1') | env
    return json.loads(installed_venv.check_output('-c', script, *map(str, args), env=env).splitlines()[-1])


def weights_of(name: str, seed: int = 0, **kwargs) -> dict:
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs).state_dict()


MISFITS = {
    'another architecture': (lambda: weights_of('test_resnet'), ['missing', 'unexpected']),
    'missing': (
        lambda: {key: value for key, value in WEIGHTS.items() if key != 'layer4.0.conv3.weight'},
        ['1 of', 'missing (layer4.0.conv3.weight)'],
    ),
    'unexpected': (lambda: WEIGHTS | {f'extra{i}': torch.ones(1) for i in range(9)}, ['9 of', 'extra0', '...']),
    'shape': (
        lambda: WEIGHTS | {'conv1.3.weight': torch.ones(2, 3, 1, 1)},
        ['1 of', 'of another shape (conv1.3.weight: 2x3x1x1 instead of '],
    ),
    'classes': (
        lambda: weights_of('test_cotnet', num_classes=7),
        ['2 of', 'fc.weight: 7x256 instead of 10x256, fc.bias: 7 instead of 10'],
    ),
}
TARGETS = [{}, dict(num_classes=3), dict(features_only=True)]


@pytest.mark.parametrize('kwargs, name', [
    (kwargs, name) for kwargs in TARGETS for name in MISFITS if not kwargs or name != 'classes'
], ids=str)
def test_misfit(server, client, tmp_path, name, kwargs):
    """Also where timm loads what fits and leaves the rest at random: with another head, or none."""
    make, parts = MISFITS[name]
    repo_id = f'misfit/{name.replace(" ", "-")}'
    server.commit(repo_id, {'model.safetensors': safetensors.torch.save(make())})
    answer = client.create(**arguments(repo_id, cache_dir=tmp_path), **kwargs)
    assert answer['error'] == 'WeightsError'
    for part in (*parts, 'test_cotnet', repo_id):
        assert part in answer['message']
    assert len(answer['message']) < 1500


def test_misfit_of_a_file(tmp_path):
    path = tmp_path / 'resnet.safetensors'
    safetensors.torch.save_file(weights_of('test_resnet'), path)
    with pytest.raises(hub.WeightsError, match='of .* tensors are missing') as info:
        timm.create_model('test_cotnet', checkpoint_path=path)
    assert isinstance(info.value.__cause__, RuntimeError)
    with pytest.raises(hub.WeightsError, match='of .* tensors are missing') as info:
        timm.create_model('test_cotnet', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert str(path) in str(info.value)
    with pytest.raises(hub.WeightsError, match='no such file') as info:
        timm.create_model('test_cotnet', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'none')))
    assert str(tmp_path / 'none') in str(info.value)


def adapted(**kwargs) -> dict:
    """What timm itself makes of the weights."""
    model = timm.models._builder.build_model_with_cfg(
        timm.create_model('test_cotnet').__class__, 'test_cotnet', True,
        pretrained_cfg_overlay=dict(file=None, state_dict=WEIGHTS),
        layers=(1, 1, 1, 1), channels=(16, 32, 48, 64), stem_type='deep', stem_width=16, **kwargs)
    return model.state_dict()


@pytest.mark.parametrize('kwargs', [
    dict(num_classes=3), dict(num_classes=0), dict(in_chans=1), dict(in_chans=6), dict(features_only=True),
    dict(features_only=True, in_chans=1, out_indices=(1, 3)),
], ids=str)
def test_adapts_as_timm(server, client, repo, tmp_path, kwargs):
    answer = client.create(**arguments(repo, cache_dir=tmp_path), **kwargs)
    assert 'error' not in answer, answer
    # A new classifier is at random: compared without.
    expected = {key: value for key, value in adapted(**kwargs).items() if key.split('.')[0] != 'fc'}
    torch.manual_seed(0)
    path = blob(tmp_path, repo).with_suffix('.safetensors')
    path.write_bytes(SAFE)
    model = timm.create_model(
        'test_cotnet', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs)
    found = {key: value for key, value in model.state_dict().items() if key.split('.')[0] != 'fc'}
    assert digest_of(found) == digest_of(expected)
    if kwargs.get('num_classes') != 3:
        assert answer['weights'] == digest_of(model.state_dict())


def test_fine_tuned(tmp_path):
    """Checkpoints of timm's train.py: with EMA, prefixes, another number of classes."""
    tuned, ema = weights_of('test_cotnet', 2, num_classes=5), weights_of('test_cotnet', 3, num_classes=5)
    path = tmp_path / 'model_best.pth.tar'
    torch.save({'epoch': 1, 'arch': 'test_cotnet', 'state_dict': {f'module.{k}': v for k, v in tuned.items()}}, path)

    def load(**kwargs):
        return timm.create_model('test_cotnet', num_classes=5, **kwargs).state_dict()

    assert digest_of(load(checkpoint_path=path)) == digest_of(tuned)
    overlay = dict(file=str(path), num_classes=5)
    assert digest_of(load(pretrained=True, pretrained_cfg_overlay=overlay)) == digest_of(tuned)
    # --pretrained-path says num_classes=-1, which leaves the classifier at random.
    found = load(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=-1))
    assert {key for key in tuned if not torch.equal(found[key], tuned[key])} == {'fc.weight', 'fc.bias'}
    torch.save({'state_dict': tuned, 'state_dict_ema': ema}, path)
    assert digest_of(load(checkpoint_path=path)) == digest_of(ema)
    assert digest_of(load(pretrained=True, pretrained_cfg_overlay=overlay)) == digest_of(ema)


@pytest.mark.skipif(not hasattr(timm.models._hub, 'load_model_config_from_path'), reason='timm has it since 1.0.16')
def test_local_dir(config, tmp_path):
    (tmp_path / 'config.json').write_bytes(config)
    with pytest.raises(RuntimeError, match='No suitable checkpoints'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    (tmp_path / 'pytorch_model.bin').write_bytes(pickled(OTHER))
    (tmp_path / 'model.safetensors').write_bytes(SAFE)
    assert digest_of(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).state_dict()) == RIGHT
    (tmp_path / 'model.safetensors').write_bytes(JUNK_HEADER['body'](SAFE))
    with pytest.raises(hub.WeightsError, match='not a readable safetensors file') as info:
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert str(tmp_path) in str(info.value)


# The registered tags


def test_tags_name_their_repositories(installed_venv, server):
    script = '''
import json, timm
print(json.dumps({name: [timm.get_pretrained_cfg(name).hf_hub_id, timm.get_pretrained_cfg(name).hf_hub_filename]
                  for name in timm.list_models('*cotne*', include_tags=True)}))
'''
    for env, namespace in (({}, hub.DEFAULT_NAMESPACE), (dict(TIMM_COTNET_HUB='mirror/'), 'mirror')):
        found = run_script(installed_venv, server, script, **env)
        assert len(found) >= 11
        for name, (hub_id, filename) in found.items():
            published = name in hub.PUBLISHED
            assert (hub_id, filename) == ((f'{namespace}/{name}', 'model.safetensors') if published else (None, None))


def test_published_tag(server, start, tmp_path):
    """A mirror serves the real size, and the connection breaks off in the middle of it."""
    weights = weights_of('cotnet50')
    server.commit('mirror/cotnet50.jd_in1k', {'model.safetensors': safetensors.torch.save(weights)})
    server.fault('GET', 'mirror/.*safetensors', 1, cut=60_000_000)
    client = start(env=dict(TIMM_COTNET_HUB='mirror', HF_HUB_DOWNLOAD_TIMEOUT='20'))
    assert client.create('cotnet50.jd_in1k')['weights'] == digest_of(weights)
    assert client.create('cotnet50')['weights'] == digest_of(weights)
    assert server.count('GET', 'mirror/.*safetensors') == 2  # resumed
    answer = client.create('se_cotnetd_50')
    assert answer['error'] == 'WeightsError' and hub.PUBLISHED['se_cotnetd_50.jd_in1k'].url in answer['message']
    assert 'mirror/se_cotnetd_50.jd_in1k' in answer['message']


def test_recorded_digest(server, installed_venv, tmp_path):
    """What was recorded with the tag goes before what the Hub says."""
    weights = safetensors.torch.save(weights_of('cotnet50', in_chans=3))
    server.commit('mirror/cotnet50.jd_in1k', {'model.safetensors': weights})
    script = '''
import dataclasses, json, sys, timm
from timm_cotnet import published
facts = published.PUBLISHED['cotnet50.jd_in1k']
answers = []
for digest in sys.argv[1:]:
    published.PUBLISHED['cotnet50.jd_in1k'] = dataclasses.replace(facts, sha256=digest)
    try:
        answers.append(type(timm.create_model('cotnet50', pretrained=True)).__name__)
    except RuntimeError as error:
        answers.append(str(error))
print(json.dumps(answers))
'''
    env = dict(TIMM_COTNET_HUB='mirror', HF_HOME=str(tmp_path))
    right, wrong = run_script(installed_venv, server, script, sha256(weights), '1' * 64, **env)
    assert right == 'CotNet'
    assert sha256(weights) in wrong and '1' * 64 in wrong and 'damaged' in wrong


def test_transformers(server, installed_venv, repo, tmp_path):
    """Without an import of the plugin; there the download of `TimmBackbone` is timm's, and so verified."""
    pytest.importorskip('transformers', reason='transformers, of the extra "test", is not installed')
    script = '''
import json, sys, torch
from transformers import AutoModelForImageClassification, TimmBackbone
model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
logits = model(torch.ones(1, 3, 64, 64)).logits
backbone = TimmBackbone.from_pretrained(f'hf-hub:{sys.argv[1]}').eval()
maps = backbone(torch.ones(1, 3, 64, 64)).feature_maps
print(json.dumps([logits.tolist(), maps[-1].mean((2, 3)).tolist()]))
'''
    logits, pooled = run_script(installed_venv, server, script, repo, HF_HOME=str(tmp_path))
    model = timm.create_model('test_cotnet').eval()
    model.load_state_dict(WEIGHTS)
    with torch.no_grad():
        features = model.forward_features(torch.ones(1, 3, 64, 64))
        torch.testing.assert_close(torch.tensor(pooled), features.mean((2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(logits), model(torch.ones(1, 3, 64, 64)), rtol=1e-4, atol=1e-5)
