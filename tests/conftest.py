"""Fixtures that more than one test file uses."""
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


class Environment:
    """A new virtual environment, in which the torch and timm of the running one can be imported.

    Paths are shared, start-up files are not: only what is installed here acts when its Python starts.

    Args:
        path: Folder to create.
    """

    def __init__(self, path: Path):
        venv.create(path, symlinks=True)
        self.path = path
        self.site_packages = next((path / 'lib').glob('python*')) / 'site-packages'
        shared = [entry for entry in sys.path if Path(entry).name in ('site-packages', 'dist-packages')]
        (self.site_packages / 'shared.pth').write_text(''.join(f'{entry}\n' for entry in shared))

    def run(self, *args: str, env: dict[str, str] | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
        """Runs this environment's Python outside the checkout and returns the finished process, its output as text.

        Args:
            args: Arguments of `python`.
            env: Environment variables on top of the current ones, less those that change how Python starts.
            timeout: Seconds until the process is killed.
        """
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(('PYTHON', 'TIMM_COTNET'))}
        return subprocess.run(
            [self.path / 'bin' / 'python', *args],
            cwd=self.path,
            env=inherited | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def check_output(self, *args: str, **kwargs) -> str:
        """Like `run`, but fails unless the process succeeds, and returns what it printed."""
        result = self.run(*args, **kwargs)
        assert result.returncode == 0, f'{args} failed:\n{result.stdout}\n{result.stderr}'
        return result.stdout

    def install(self, *requirement: str) -> None:
        """Installs timm-cotnet from what is given (`'.'`, `'-e', '.'`, ...), without its dependencies."""
        # A package of the shared folders does not count as installed here.
        self.check_output(
            '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--no-build-isolation', '--ignore-installed',
            *requirement,
        )


@pytest.fixture(scope='session')
def new_environment(tmp_path_factory):
    """Makes an `Environment` without timm-cotnet."""
    return lambda: Environment(tmp_path_factory.mktemp('environment'))


@pytest.fixture(scope='session')
def installed_venv(new_environment) -> Environment:
    """An `Environment` with timm-cotnet installed as a user would; tests leave it as it is."""
    environment = new_environment()
    environment.install(str(ROOT))
    return environment


@pytest.fixture(scope='session')
def hub_server():
    """The server of `server`."""
    from hub_server import HubServer

    with HubServer() as server:
        yield server


@pytest.fixture
def server(hub_server):
    """A server of the Hub's protocol that holds nothing yet."""
    hub_server.reset()
    return hub_server


@pytest.fixture(scope='session')
def client(hub_server, installed_venv, tmp_path_factory):
    """A client of `server` for all tests that need no other; each test has a cache of its own."""
    from hub_client import Client

    client = Client(installed_venv, hub_server.env | dict(HF_HOME=str(tmp_path_factory.mktemp('home'))))
    yield client
    client.close()


@pytest.fixture
def start(server, installed_venv, tmp_path):
    """Starts clients of `server`; they end with the test."""
    from hub_client import Client

    clients = []

    def start(*args, env: dict = {}, **kwargs):
        env = server.env | dict(HF_HOME=str(tmp_path / 'home')) | env
        clients.append(Client(installed_venv, env, *args, **kwargs))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


@pytest.fixture
def repo(server) -> str:
    """A new repository with weights and config.json; its name does not say what model it has."""
    from hub_client import CONFIG, SAFE

    server.commit('faults/repo', {'config.json': CONFIG, 'model.safetensors': SAFE})
    return 'faults/repo'


@pytest.fixture
def exact_convolutions(monkeypatch):
    """Float32 is that on a GPU too, and each time the same."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
