"""Ways of training in timm's train.py: a classifier that starts at zero learns the digits in one epoch."""
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import FORMATS, image, needs_cpp_compiler
from timm.utils import NativeScaler
from train_script import run_train_script, with_scripts

from timm_cotnet.digits import write_digits

WAYS = {
    'bfloat16': ('--amp', '--amp-dtype', 'bfloat16', '--channels-last'),
    'checkpointing': ('--grad-checkpointing', '--channels-last'),
    'accumulation': ('--batch-size', '32', '--grad-accum-steps', '2'),
    'ema': ('--model-ema', '--model-ema-decay', '0.9', '--model-ema-warmup'),
    'layer decay': ('--layer-decay', '0.8'),
    'drop path and drop block': ('--drop-path', '0.1', '--drop-block', '0.1', '--channels-last'),
}
FIRST_LOSS = math.log(10)  # of a classifier that is zero, in the first step


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp('digits'))


def learn(digits, tmp_path, monkeypatch, *options, **kwargs):
    """Trains for one epoch; the losses of training and of held-out images, and the accuracy in percent."""
    rows = run_train_script(
        monkeypatch, tmp_path, '--data-dir', str(digits), '--model', 'test_cotnet', '--pretrained',
        '--num-classes', '10', '--head-init-scale', '0', '--epochs', '1', '--warmup-epochs', '0', '--no-aug',
        '--opt', 'adamw', '--lr', '2e-3', '--sched-on-updates', '--batch-size', '64', '--smoothing', '0', *options,
        **kwargs)
    return [float(rows[0][column]) for column in ('train_loss', 'eval_loss', 'eval_top1')]


@pytest.mark.slow
@with_scripts
@pytest.mark.parametrize('way', WAYS)
def test_learns(way, digits, tmp_path, monkeypatch):
    train_loss, eval_loss, top1 = learn(digits, tmp_path, monkeypatch, *WAYS[way])
    assert eval_loss < train_loss < FIRST_LOSS and top1 >= 95


@pytest.mark.slow
@with_scripts
@needs_cpp_compiler
def test_learns_compiled(digits, tmp_path, monkeypatch):
    train_loss, eval_loss, top1 = learn(
        digits, tmp_path, monkeypatch, '--torchcompile', 'inductor', '--batch-size', '52')  # divides 364: one shape
    assert eval_loss < train_loss < FIRST_LOSS and top1 >= 95


@pytest.mark.slow
@with_scripts
def test_learns_in_float16_with_a_scaler(digits, tmp_path, monkeypatch):
    """Without oneDNN, whose gradients of weights are its reference code in float16: six times as long."""
    scaler = NativeScaler('cpu')
    with torch.backends.mkldnn.flags(enabled=False):
        train_loss, eval_loss, top1 = learn(
            digits, tmp_path, monkeypatch, '--amp', '--amp-dtype', 'float16', scaler=scaler)
    assert eval_loss < train_loss < FIRST_LOSS and top1 >= 95
    state = scaler.state_dict()
    assert state['scale'] == 2. ** 16 and state['_growth_tracker'] == 1433 // 64  # no step was left out


def test_scaled_gradients_in_float16_are_those_in_float32():
    torch.manual_seed(0)
    model = timm.create_model('test_cotnet', pretrained=True).train()
    x, target = image(8, 3, 32, 32), torch.arange(8)
    F.cross_entropy(model(x), target).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.), torch.amp.GradScaler('cpu', init_scale=2. ** 10)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    with torch.autocast('cpu', torch.float16):
        loss = F.cross_entropy(model(x), target)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    steps = torch.cat([(old - p.detach()).flatten() for p, old in zip(model.parameters(), before)])
    expected = torch.cat([grad.flatten() for grad in expected])
    assert scaler.get_scale() == 2. ** 10 and F.cosine_similarity(steps, expected, 0) > 0.99


def saved_bytes(model, x):
    """Memory that a forward keeps for the backward."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


@pytest.mark.parametrize('memory_format', FORMATS)
def test_checkpointing_saves_memory_and_changes_no_gradient(memory_format):
    torch.manual_seed(0)
    model = timm.create_model('cotnet50', layers=(2, 2, 2, 2)).train().to(memory_format=memory_format)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.  # a second forward updates running statistics again
    x = image(2, 3, 64, 64, memory_format)
    sizes, grads = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        sizes.append(saved_bytes(model, x))
        model.zero_grad()
        model(x).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert sizes[1] < 0.35 * sizes[0]
    for actual, expected in zip(*grads):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
