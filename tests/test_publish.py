"""Uploads by the installed package's command to a server of the Hub's protocol, with and without faults."""
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer, flip, sha256
from official_checkpoints import official_state_dict, save
from test_convert import tiny

from timm_cotnet.convert import convert
from timm_cotnet.publish import PublishError, main, publish

WEIGHTS = 'model.safetensors'


@pytest.fixture(scope='module')
def converted(tmp_path_factory) -> Path:
    """A folder that holds a converted model, a tiny one."""
    folder = tmp_path_factory.mktemp('converted')
    convert(save(tiny(), folder / 'x.pth'), folder / 'all' / 'test_cotnet')
    return folder / 'all'


@pytest.fixture
def hub(server):
    return server


@pytest.fixture
def command(client, hub):
    """Runs the command, several times if need be, and returns the exit statuses and what was printed."""
    code = '''
import contextlib, io, os
from timm_cotnet.publish import main
os.environ['HF_TOKEN'] = token
out, err = io.StringIO(), io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    result = [main(arguments) for _ in range(times)]
del os.environ['HF_TOKEN']
result = result, out.getvalue().splitlines(), err.getvalue()
'''

    def run(folder: Path, *options: str, token: str = TOKEN, times: int = 1):
        arguments = [str(folder), '--namespace', 'me', *options]
        return client.run(code, arguments=arguments, token=token, times=times)
    return run


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_published(hub: HubServer, folder: Path, repo_id: str, revision: str = 'main') -> None:
    files = hub.repos[repo_id].files(revision)
    assert {name: files[name] for name in contents(folder)} == contents(folder)
    assert files.keys() == contents(folder).keys() | {'.gitattributes'}


def writes(hub: HubServer) -> int:
    return hub.count('POST', '/api/repos|/commit/|/lfs|preupload') + hub.count('PUT', '')


def test_upload_is_complete_and_repeating_it_changes_nothing(command, hub, converted, tmp_path):
    folder = shutil.copytree(converted / 'test_cotnet', tmp_path / 'copy')
    statuses, lines, _ = command(folder, '--dry-run')
    assert (statuses, lines) == ([0], [f'me/test_cotnet: would upload README.md, config.json, {WEIGHTS}'])
    assert writes(hub) == 0 and hub.repos == {}

    statuses, lines, _ = command(folder, times=2)
    digest = sha256((folder / WEIGHTS).read_bytes())
    commit = hub.repos['me/test_cotnet'].sha('main')
    for_record = f'me/test_cotnet: sha256 of {WEIGHTS} {digest}, for PUBLISHED in timm_cotnet/published.py'
    assert statuses == [0, 0]
    assert lines == [
        f'me/test_cotnet: uploaded README.md, config.json, {WEIGHTS}',
        f'me/test_cotnet: downloaded again from {commit}, all digests agree; see {hub.url}/me/test_cotnet',
        for_record,
        'me/test_cotnet: uploaded nothing, all files are there',
        f'me/test_cotnet: downloaded again from main, all digests agree; see {hub.url}/me/test_cotnet',
        for_record,
    ]
    assert_published(hub, folder, 'me/test_cotnet')
    assert len(hub.repos['me/test_cotnet'].commits) == 2  # the repository's own first one, and one for all files
    assert (hub.count('POST', '/commit/'), hub.count('POST', '/api/repos/create')) == (1, 1)

    (folder / 'README.md').write_text('---\nlicense: apache-2.0\n---\n# Changed\n')
    assert command(folder)[1][0] == 'me/test_cotnet: uploaded README.md'
    assert_published(hub, folder, 'me/test_cotnet')
    assert hub.count('PUT', '') == 1  # the weights travelled once


def test_damage_on_the_way_back_is_found(command, hub, converted):
    hub.fault('GET', f'resolve/.*/{WEIGHTS}', times=1, body=flip)  # heals with the second download
    statuses, lines, errors = command(converted / 'test_cotnet')
    assert (statuses, errors) == ([0], '') and 'all digests agree' in lines[1]
    assert hub.count('GET', f'resolve/.*/{WEIGHTS}') == 2

    hub.fault('GET', f'resolve/.*/{WEIGHTS}', body=flip)
    statuses, lines, errors = command(converted / 'test_cotnet')
    assert (statuses, lines) == ([1], [])
    weights = (converted / 'test_cotnet' / WEIGHTS).read_bytes()
    assert f'comes back with the sha256 {sha256(flip(weights))}, where {sha256(weights)} was uploaded' in errors


def test_without_a_token_nothing_is_written(command, hub, converted):
    statuses, lines, errors = command(converted / 'test_cotnet', token='')
    assert (statuses, lines) == ([1], [])
    assert 'HF_TOKEN' in errors and '401' in errors
    assert hub.repos == {}


@pytest.mark.slow
def test_folder_of_all_goes_on_after_a_failure(command, hub, converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / 'all')
    convert(save(official_state_dict('cotnet50'), tmp_path / 'x.pth'), folder / 'cotnet50.jd_in1k')
    (folder / 'another').mkdir()
    shutil.copy(folder / 'test_cotnet' / 'config.json', folder / 'another')
    statuses, _, errors = command(folder, '--private')
    assert statuses == [1]
    assert errors == f'error: {folder}/another has no README.md; make it with python -m timm_cotnet.convert\n'
    assert hub.repos.keys() == {'me/cotnet50.jd_in1k', 'me/test_cotnet'}
    assert all(repo.private for repo in hub.repos.values())
    assert_published(hub, folder / 'cotnet50.jd_in1k', 'me/cotnet50.jd_in1k')
    assert_published(hub, folder / 'test_cotnet', 'me/test_cotnet')


def test_pull_request_leaves_main_alone(command, hub, converted):
    statuses, lines, _ = command(converted / 'test_cotnet', '--create-pr')
    assert statuses == [0]
    assert lines[1] == (
        'me/test_cotnet: downloaded again from refs/pr/1, all digests agree; '
        f'see {hub.url}/me/test_cotnet/discussions/1')
    assert_published(hub, converted / 'test_cotnet', 'me/test_cotnet', 'refs/pr/1')
    assert hub.repos['me/test_cotnet'].files('main').keys() == {'.gitattributes'}


@pytest.mark.parametrize('method, path, change', [
    ('POST', '/commit/main', dict(status=403)),  # made, but the answer is an error
    ('POST', '/commit/main', dict(cut=0, end='reset')),
    ('POST', '/info/lfs/objects/batch', dict(status=400)),
    ('POST', '/preupload/', dict(body=b'{')),
    ('PUT', '/lfs/', dict(status=403)),
    ('GET', 'resolve/.*/config.json', dict(status=403)),
], ids=['commit', 'reset', 'batch', 'preupload', 'put', 'get'])
def test_push_that_broke_off_can_be_repeated(command, hub, converted, method, path, change):
    hub.fault(method, path, times=1, **change)
    statuses, lines, errors = command(converted / 'test_cotnet', times=2)
    assert statuses == [1, 0]
    assert f'could not be published as me/test_cotnet at {hub.url}: ' in errors
    assert 'token that may write to me' in errors and 'Traceback' not in errors
    assert 'all digests agree' in lines[1]
    assert_published(hub, converted / 'test_cotnet', 'me/test_cotnet')


@pytest.mark.slow
def test_killed_push_can_be_repeated(command, installed_venv, hub, converted, tmp_path):
    hub.fault('PUT', '/lfs/', times=1, delay=60)
    python, folder = installed_venv.path / 'bin' / 'python', converted / 'test_cotnet'
    process = subprocess.Popen(
        [python, '-m', 'timm_cotnet.publish', folder, '--namespace', 'me'], cwd=tmp_path,
        env={**os.environ, **hub.env, 'HF_TOKEN': TOKEN, 'HF_HOME': str(tmp_path / 'hf')})
    deadline = time.monotonic() + 120
    while not hub.count('PUT', '/lfs/') and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert hub.repos['me/test_cotnet'].files('main').keys() == {'.gitattributes'}
    assert command(folder)[0] == [0]
    assert_published(hub, folder, 'me/test_cotnet')


def test_names_of_unknown_kind_are_compared_by_content(command, hub, converted):
    hub.fault('HEAD', 'resolve/main/', headers={'ETag': '"opaque"', 'X-Linked-Etag': None})
    statuses, lines, _ = command(converted / 'test_cotnet', times=2)
    assert statuses == [0, 0] and lines[3] == 'me/test_cotnet: uploaded nothing, all files are there'
    assert hub.count('POST', '/commit/') == 1


def rename(folder: Path, variant: str) -> None:
    config = (folder / 'config.json').read_text()
    (folder / 'config.json').write_text(config.replace('test_cotnet', variant))


@pytest.mark.parametrize('change, message', [
    (lambda folder: (folder / 'pytorch_model.bin').write_bytes(b'x'), 'holds pytorch_model.bin; only safetensors are'),
    (lambda folder: (folder / 'x.pth.tar').write_bytes(b'x'), 'holds x.pth.tar; only safetensors'),
    (lambda folder: (folder / WEIGHTS).unlink(), f'has no {WEIGHTS}; make it with'),
    (lambda folder: (folder / 'config.json').write_text('{'), 'config.json is damaged'),
    (lambda folder: (folder / 'config.json').write_text('{}'), "config.json is damaged .KeyError.'architecture'"),
    (lambda folder: rename(folder, 'resnet50'), 'names resnet50, which is no model'),
    (lambda folder: rename(folder, 'cotnet50'), 'not those of cotnet50, but fit test_cotnet'),
    (lambda folder: os.truncate(folder / WEIGHTS, 10000), f'{WEIGHTS} is not published'),
])
def test_what_is_no_whole_model_is_not_published(tmp_path, converted, change, message):
    folder = shutil.copytree(converted / 'test_cotnet', tmp_path / 'copy')
    change(folder)
    with pytest.raises(PublishError, match=message):
        publish(folder, 'me', dry_run=True)


def test_folder_without_models(tmp_path, capsys):
    assert main([str(tmp_path), '--namespace', 'me']) == 1
    assert capsys.readouterr().err == (
        f'error: {tmp_path} holds no converted model; make one with python -m timm_cotnet.convert\n')
