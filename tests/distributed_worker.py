"""What torchrun starts in each process: `distributed_worker.py TASK FOLDER [ARGUMENT...]`, for test_distributed.py."""
import copy
import itertools
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from unittest import mock

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import FORMATS, has_kernels, image
from timm.layers import freeze_batch_norm_2d
from torch import nn

from timm_cotnet import CotBottleneck, SplitAttnBottleneck
from timm_cotnet.detection.sync_batch_norm import convert_sync_batchnorm
from timm_cotnet.ops import conditions

BATCH = 4  # images in each process


def network():
    torch.manual_seed(0)
    return timm.create_model('test_cotnet', pretrained=True).double().train()


def batch(dtype, memory_format=torch.contiguous_format):
    x = image(BATCH * dist.get_world_size(), 3, 64, 64, memory_format, dtype)
    return x, torch.arange(len(x)) % 10


def gradients(model, x, target):
    model.zero_grad()
    F.cross_entropy(model(x), target).backward()
    return [p.grad.clone() for p in model.parameters()]


def mean_gradients(model, x, target):
    """Of the losses of the parts that the processes have, as norms do not look at other parts."""
    parts = [gradients(copy.deepcopy(model), *pair) for pair in zip(x.split(BATCH), target.split(BATCH))]
    return [torch.stack(grads).mean(0) for grads in zip(*parts)]


def check(name, actual, expected, limit):
    # some are zero but for rounding: those of biases before norms
    floor = 1e-3 * max(e.abs().max() for e in expected)
    assert all(a.isfinite().all() for a in actual)
    pairs = zip(actual, expected, strict=True)
    worst = max(((a - e).abs().max() / e.abs().max().clamp(min=floor)).item() for a, e in pairs)
    assert worst < limit, f'{name}: differ by {worst}'
    print(f'rank {dist.get_rank()}: {name}: {worst:.1e}', flush=True)


def ddp(folder):
    """timm's task of train.py: with norms that are frozen or synchronized, gradients are those of one process on the
    joined batch; with others, the mean of the gradients on each part."""
    from timm.task import ClassificationTask

    rank, wing = dist.get_rank(), conditions.cpu
    for norms, kernels, memory_format in itertools.product((None, 'frozen', 'synced'), (True, False), FORMATS):
        if kernels and not has_kernels():
            continue
        conditions.cpu = wing if kernels else None
        # synchronized norms round differently, by which a ReLU may switch in float32; nothing stands in for them
        dtype = torch.float64 if norms == 'synced' else torch.float32
        model = network().to(dtype, memory_format=memory_format)
        if norms == 'frozen':
            freeze_batch_norm_2d(model)
        x, target = batch(dtype, memory_format)
        task = ClassificationTask(copy.deepcopy(model), criterion=nn.CrossEntropyLoss(), verbose=False)
        task.prepare_distributed(broadcast_buffers=False)
        if norms == 'synced':
            convert_sync_batchnorm(task)  # after DistributedDataParallel, which refuses them on the CPU
        part = slice(rank * BATCH, (rank + 1) * BATCH)
        task(x[part], target[part])['loss'].backward()
        actual = [p.grad for p in task.parameters()]
        conditions.cpu = None
        expected = (mean_gradients if norms is None else gradients)(model, x, target)
        limit = 1e-9 if norms == 'synced' else 1e-3
        check(f'ddp, norms {norms}, kernels {kernels}, {memory_format}', actual, expected, limit)
        conditions.cpu = wing


def fsdp(folder):
    """FSDP2 by blocks: a step is that of one process, and its checkpoint loads into one process."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    rank, wing = dist.get_rank(), conditions.cpu
    mesh = dist.device_mesh.init_device_mesh('cpu', (dist.get_world_size(),))
    part = slice(rank * BATCH, (rank + 1) * BATCH)
    # with kernels or without, then in float64 for a checkpoint; FSDP refuses parameters in channels-last memory
    for memory_format, kernels in itertools.product(FORMATS, (True, False, None)):
        if kernels and not has_kernels():
            continue
        dtype, norms = (torch.float64, 'frozen') if kernels is None else (torch.float32, None)
        model = network().to(dtype)
        if norms == 'frozen':
            freeze_batch_norm_2d(model)
        x, target = batch(dtype, memory_format)
        sharded = copy.deepcopy(model)
        for module in sharded.modules():
            if isinstance(module, (CotBottleneck, SplitAttnBottleneck)):
                fully_shard(module, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        conditions.cpu = wing if kernels else None
        optimizer = torch.optim.SGD(sharded.parameters(), lr=1.)
        F.cross_entropy(sharded(x[part]), target[part]).backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        conditions.cpu = None
        grads = gradients(model, x, target) if norms == 'frozen' else mean_gradients(model, x, target)
        with torch.no_grad():
            for p, grad in zip(model.parameters(), grads):
                p.sub_(grad)
        steps = [p.full_tensor().detach() - old for p, old in zip(sharded.parameters(), before)]
        expected = [p.detach() - old for p, old in zip(model.parameters(), before)]
        check(f'fsdp, {dtype}, kernels {kernels}, {memory_format}', steps, expected, 1e-9 if norms else 2e-3)
        conditions.cpu = wing
    assert all(p.to_local().numel() < p.numel() for name, p in sharded.named_parameters() if p.shape[0] > 1)
    dcp.save({'model': get_model_state_dict(sharded)}, checkpoint_id=folder / 'checkpoint')
    if rank == 0:
        torch.save(model.state_dict(), folder / 'one_process.pt')


def train(folder, scripts, ways, name, *args):
    """timm's train.py in each of the ways, one after the other; in it, DistributedDataParallel gets no `device_ids`,
    which it refuses on the CPU. Where KILL_AFTER is set, the second process is killed after so many steps."""
    import runpy

    from timm.task import ClassificationTask
    from torch.optim.optimizer import register_optimizer_step_post_hook

    prepare, steps, wing = ClassificationTask.prepare_distributed, itertools.count(1), conditions.cpu
    ClassificationTask.prepare_distributed = lambda self, device_ids, **kwargs: prepare(self, **kwargs)

    def kill(*_):
        if next(steps) == int(os.environ.get('KILL_AFTER', 0)) and os.environ['RANK'] == '1':
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(kill)
    for way in ways.split(','):
        conditions.cpu = None if 'plain' in way else wing
        sys.argv = ['train.py', *args, '--output', str(folder / way), '--experiment', name]
        if 'channels_last' in way:
            sys.argv.append('--channels-last')
        if name == 'resumed':
            sys.argv += ['--resume', str(folder / way / 'killed' / 'last.pth.tar')]
        with mock.patch.multiple(dist, init_process_group=mock.DEFAULT, destroy_process_group=mock.DEFAULT):
            runpy.run_path(str(Path(scripts) / 'train.py'), run_name='__main__')


if __name__ == '__main__':
    task, folder, *rest = sys.argv[1:]
    dist.init_process_group('gloo', timeout=timedelta(seconds=60))
    {'ddp': ddp, 'fsdp': fsdp, 'train': train}[task](Path(folder), *rest)
    dist.destroy_process_group()
