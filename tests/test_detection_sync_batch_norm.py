"""Two processes that synchronize their norms over gloo compute what one process computes on the joined batch."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from timm_cotnet.detection.sync_batch_norm import SyncBatchNorm, convert_sync_batchnorm

TESTS = Path(__file__).parent
WORKER = '''
import sys

import torch
import torch.distributed as dist
from test_detection_sync_batch_norm import run_rank

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
torch.save(run_rank(rank), f'{folder}/{rank}.pt')
dist.destroy_process_group()
'''


def networks():
    """A norm alone, and a backbone with CoT layers, whose norms behind a pooling see one value for each image."""
    from timm_cotnet.detection import cotnet_fpn_backbone

    torch.manual_seed(0)
    norm = SyncBatchNorm(3)
    nn.init.normal_(norm.weight)
    return norm, cotnet_fpn_backbone('test_cotnet', trainable_layers=3, norm='sync')


def batches(sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 5, 4, generator=generator) * 3 + 10 for size in sizes]


def step(module, x, weight):
    """Output, gradients and statistics of one training step, whose loss weighs each value of the output."""
    x = x.clone().requires_grad_()
    out = module(x)
    out = out if torch.is_tensor(out) else out['0']
    (out * weight).sum().backward()
    state = {key: value.clone() for key, value in module.state_dict().items() if 'running' in key}
    gradients = {key: parameter.grad for key, parameter in module.named_parameters() if parameter.grad is not None}
    return dict(out=out.detach(), x=x.grad, state=state, gradients=gradients)


def cases():
    """(network, parts of the batch, weights of the output's parts), the second case with a process that has nothing."""
    norm, _ = networks()
    yield norm, batches((2, 3)), [torch.sin(b) for b in batches((2, 3))]
    norm, backbone = networks()
    yield norm, batches((4, 0)), [torch.sin(b) for b in batches((4, 0))]
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(2, 256, 16, 16, generator=torch.Generator().manual_seed(3))
    yield backbone, list(images.split(1)), list(weight.split(1))


def run_rank(rank):
    return [step(network, parts[rank], weights[rank]) for network, parts, weights in cases()]


@pytest.mark.slow
def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(TESTS.parent), str(TESTS)]), 'OMP_NUM_THREADS': '1'}
    processes = [
        subprocess.Popen([sys.executable, '-c', WORKER, str(rank), str(tmp_path)], env=env) for rank in range(2)]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    for (network, parts, weights), one, other in zip(cases(), *ranks):
        joined = step(network, torch.cat(parts), torch.cat(weights))
        close = dict(rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.cat([one['out'], other['out']]), joined['out'], **close)
        torch.testing.assert_close(torch.cat([one['x'], other['x']]), joined['x'], **close)
        for key, value in joined['state'].items():
            torch.testing.assert_close(one['state'][key], value, **close)
            assert torch.equal(one['state'][key], other['state'][key])
        assert joined['gradients'].keys() == one['gradients'].keys() and joined['gradients']
        for key, value in joined['gradients'].items():
            scale = value.abs().max().clamp(min=1e-3)
            summed = one['gradients'][key] + other['gradients'][key]
            torch.testing.assert_close(summed / scale, value / scale, rtol=1e-3, atol=2e-3)


def test_one_process_is_an_ordinary_batch_norm(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    plain, sync = nn.BatchNorm2d(3), SyncBatchNorm(3)
    expected = [plain(x), plain.eval()(x)]
    assert all(torch.equal(one, other) for one, other in zip(expected, [sync(x), sync.eval()(x)]))

    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match='GPU'):
            nn.SyncBatchNorm(3)(x)  # why this class exists
        assert torch.equal(SyncBatchNorm(3)(x), expected[0])
    finally:
        dist.destroy_process_group()


def test_converts_what_is_there():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    module[1].running_mean.fill_(2)
    converted = convert_sync_batchnorm(module)
    assert type(converted[1]) is type(converted[2][0]) is SyncBatchNorm and converted[1].running_mean[0] == 2
    assert type(convert_sync_batchnorm(nn.BatchNorm2d(2))) is SyncBatchNorm
