"""Download of weights against a server of the Hub's protocol, in processes of their own with the package installed.

Whatever a server, a network or a disk does, a model has the published weights bit for bit, or an error says what to do.
"""
import ctypes
import errno
import gzip
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
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
        print(json.dumps(dict(model_name=model_name, pretrained=pretrained, **kwargs)), file=self.process.stdin, flush=True)

    def receive(self) -> dict:
        while (line := self.process.stdout.readline()).strip() in ('ready',):
            pass
        assert line, self.process.stderr.read()
        return json.loads(line)

    def create(self, model_name: str, **kwargs) -> dict:
        self.send(model_name, **kwargs)
        return self.receive()

    def close(self) -> None:
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
    import io
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.fixture(scope='module')
def config(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp('config') / 'config.json'
    save_config_for_hf(timm.create_model('test_cotnet'), path)
    return path.read_bytes()


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
    """What a cache has beside the weights as they should be, config.json and the records and locks."""
    contents = (SAFE,)
    return [
        str(path) for path in cache.rglob('*')
        if path.is_file() and '.locks' not in path.parts and (
            path.suffix == '.incomplete' or path.name == 'model.safetensors' and path.read_bytes() not in contents)
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
    print(json.dumps(answer, indent=1).replace('\\n', '\n'))
    assert leftovers(tmp_path) == []
    assert answer.get('weights') == (RIGHT if succeeds else None)
    if not succeeds:
        check_error(answer, repo)
        # What was wrong for once leaves nothing behind: the next try works.
        server.faults.clear()
        assert client.create(**arguments(repo, cache_dir=tmp_path))['weights'] == RIGHT


def check_error(answer: dict, repo_id: str) -> None:
    assert answer['error'] == 'WeightsError' and answer['causes']
    for part in ('test_cotnet', repo_id, 'timm_cotnet.convert', 'local-dir:', 'TIMM_COTNET_HUB'):
        assert part in answer['message']
