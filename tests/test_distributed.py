"""Two processes on the CPU, started by torchrun: data parallel, fully sharded, killed and resumed."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from helpers import FORMAT_NAMES, has_kernels
from train_script import SCRIPTS, with_scripts

from timm_cotnet.digits import write_digits

WORKER = Path(__file__).with_name('distributed_worker.py')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason='this torch has no gloo'),
]


def torchrun(task, folder, *args, env={}):
    """Runs a task of the worker in two processes; the finished process, its output as text."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(WORKER)]
    path = os.pathsep.join(filter(None, [str(WORKER.parent.parent), *sys.path]))
    result = subprocess.run(
        [*command, task, str(folder), *args], env={**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1', **env},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    print(result.stdout)
    return result


def test_gradients_of_data_parallel_training(tmp_path):
    pytest.importorskip('timm.task', reason='this timm has no task classes')
    assert torchrun('ddp', tmp_path).returncode == 0


def test_fully_sharded_training_and_its_checkpoint(tmp_path):
    import torch.distributed.checkpoint as dcp

    assert torchrun('fsdp', tmp_path).returncode == 0
    model = timm.create_model('test_cotnet').double()
    state = {'model': {key: torch.full_like(value, 7) for key, value in model.state_dict().items()}}
    expected = torch.load(tmp_path / 'one_process.pt', weights_only=True)
    state['model'] = {key: value for key, value in state['model'].items() if key in expected}
    dcp.load(state, checkpoint_id=tmp_path / 'checkpoint')
    assert set(state['model']) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(state['model'][key], value, rtol=1e-9, atol=1e-12)


@with_scripts
def test_killed_process_ends_the_run_and_resumed_it_is_as_undisturbed(tmp_path):
    pytest.importorskip('timm.task', reason='this timm has no task classes')
    digits = write_digits(tmp_path / 'digits')
    for path in digits.glob('train/*/*.png'):
        if int(path.stem) % 8:
            path.unlink()
    kernels = ('kernels', 'plain') if has_kernels() else ('plain',)
    ways = [f'{kind}-{memory_format}' for kind in kernels for memory_format in FORMAT_NAMES.values()]

    def train(name, ways, **env):
        return torchrun(
            'train', tmp_path, SCRIPTS, ','.join(ways), name, '--data-dir', str(digits), '--val-split', '', '--model',
            'test_cotnet', '--num-classes', '10', '--device', 'cpu', '--workers', '1', '--batch-size', '16', '--no-aug',
            '--img-size', '32', '--lr', '0.01', '--epochs', '2', '--warmup-epochs', '0', '--model-ema', env=env)

    def load(way, name):
        return torch.load(tmp_path / way / name / 'last.pth.tar', weights_only=False)

    assert train('undisturbed', ways).returncode == 0
    for way in ways:
        start = time.monotonic()
        killed = train('killed', [way], KILL_AFTER='8')  # of 5 or 6 steps in an epoch
        assert killed.returncode != 0 and 'Signal 9 (SIGKILL)' in killed.stdout
        assert time.monotonic() - start < 120
        assert load(way, 'killed')['epoch'] == 0
    assert train('resumed', ways).returncode == 0
    for way in ways:
        expected, actual, before = (load(way, name) for name in ('undisturbed', 'resumed', 'killed'))
        assert actual['epoch'] == expected['epoch'] == 1
        for kind in ('state_dict', 'state_dict_ema'):
            assert set(actual[kind]) == set(expected[kind])
            assert all(torch.equal(value, expected[kind][key]) for key, value in actual[kind].items())
        for key in ('conv1.0.weight', 'fc.weight'):
            assert not torch.equal(before['state_dict'][key], actual['state_dict'][key])
