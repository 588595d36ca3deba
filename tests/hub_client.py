"""A client of the Hub in a process of its own, the weights that it downloads, and what is said of them."""
import hashlib
import io
import json
import os
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf

# Answers each line with a line. What comes is `create`, arguments for `timm.create_model`, answered by a digest of the
# model's tensors, or `code` that sets `result`; where either raises, the answer is the error.
CLIENT = '''
import hashlib, io, json, logging, sys, time
import timm, torch
torch.set_num_threads(1)
sleep, time.sleep = time.sleep, lambda seconds: sleep(min(seconds, 0.05))  # no long pauses between tries
log = io.StringIO()
logging.getLogger('timm_cotnet').addHandler(logging.StreamHandler(log))

def create(**kwargs):
    model = timm.create_model(**kwargs)
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return dict(weights=digest.hexdigest(), cfg={k: str(v) for k, v in model.pretrained_cfg.items()})

for line in sys.stdin:
    log.truncate(log.seek(0))
    request = json.loads(line)
    try:
        if 'create' in request:
            answer = create(**request['create'])
        else:
            names = request['names']
            exec(request['code'], names)
            answer = dict(result=names['result'])
    except Exception as error:
        cause, seen = error.__cause__, []
        while cause:
            seen.append(type(cause).__name__)
            cause = cause.__cause__ or cause.__context__
        answer = dict(error=type(error).__name__, message=str(error), causes=seen)
    print(json.dumps(dict(answer, log=log.getvalue())), flush=True)
'''


class Client:
    """A new process that makes models, or runs code, on demand.

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
        self._send(create=dict(model_name=model_name, pretrained=pretrained, **kwargs))

    def _send(self, **request) -> None:
        print(json.dumps(request, default=str), file=self.process.stdin, flush=True)

    def receive(self) -> dict:
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        print(line)  # seen where a test fails
        return json.loads(line)

    def create(self, model_name: str, **kwargs) -> dict:
        """Makes a model; returns the digest of its `weights` and its `cfg`, or `error`, `message` and `causes`."""
        self.send(model_name, **kwargs)
        return self.receive()

    def run(self, code: str, **names):
        """Runs code that finds `names` and sets `result`, which is returned."""
        self._send(code=code, names=names)
        return self.receive()['result']

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


def config_of(model) -> bytes:
    """`config.json` as timm writes it."""
    with TemporaryDirectory() as folder:
        save_config_for_hf(model, Path(folder, 'config.json'))
        config = json.loads(Path(folder, 'config.json').read_text())
    config.pop('model_args', None)  # new versions of timm add these defaults, which transformers does not expect
    return json.dumps(config).encode()


CONFIG = config_of(timm.create_model('test_cotnet'))


def pickled(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


JUNK_HEADER = dict(body=lambda body: b'\xff' * 100 + body[100:])


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


def check_error(answer: dict, repo_id: str) -> None:
    assert answer['error'] == 'WeightsError' and answer['causes'] and len(answer['message']) < 2000
    for part in ('test_cotnet', repo_id, 'timm_cotnet.convert', 'local-dir:', 'TIMM_COTNET_HUB'):
        assert part in answer['message']


def blob(cache: Path, repo_id: str, name: str = 'model.safetensors') -> Path:
    """The one file behind a repository's snapshot."""
    pointer, = cache.glob(f'models--{repo_id.replace("/", "--")}/snapshots/*/{name}')
    return pointer.resolve()
