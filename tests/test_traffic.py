"""What is moved on a GPU, counted on the meta device: the counter knows all kernels, and nothing grows back."""
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from timm_cotnet import CotLayer
from timm_cotnet.ops import dispatch

pytest.importorskip('triton', reason='counts launches of Triton kernels, and Triton is not installed')

SHAPE = (256, 64, 56, 56)  # of the CoT layers in CoTNet-50's first stage, at batch 256
UNIT = 2 * torch.Size(SHAPE).numel()  # bytes of one activation in bfloat16


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / 'benchmarks'))


@pytest.fixture
def counter():
    return importlib.import_module('traffic_counter')


@pytest.fixture
def traffic():
    return importlib.import_module('traffic')


def image(**kwargs):
    x = torch.empty(SHAPE, dtype=torch.bfloat16, device='meta').contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(**kwargs)


def launches(events):
    return sum(event.launches for event in events)


def units(events):
    return sum(event.bytes for event in events) / UNIT


@pytest.fixture
def within(monkeypatch):
    """Gives a list of the events that functions of a module add to another one."""
    def watch(events, module, *names):
        found = []

        def watched(function):
            def call(*args, **kwargs):
                first = len(events)
                out = function(*args, **kwargs)
                found.extend(events[first:])
                return out
            return call

        module = importlib.import_module(f'timm_cotnet.ops.gpu.{module}')
        for name in names:
            monkeypatch.setattr(module, name, watched(getattr(module, name)))
        return found
    return watch


def test_table_names_all_kernels_and_their_pointers(counter):
    kernels = {}
    for module in ('rows', 'contexts_kernels', 'folding_kernels', 'images_kernels', 'matrices_kernels', 'mixing_kernels',
                   'products_kernels', 'statistics_kernels'):
        module = importlib.import_module(f'timm_cotnet.ops.gpu.{module}')
        kernels.update((name, value) for name, value in vars(module).items() if name.endswith('_kernel'))
    assert set(counter.KERNELS) == set(kernels)
    for name, kernel in kernels.items():
        read, written = map(counter.names_of, counter.KERNELS[name])
        assert set(read + written) == set(counter.pointers(kernel)), name
        assert len(set(read)) == len(read) and len(set(written)) == len(written), name
        flags = [word.replace('!', ':').partition(':')[2] for text in counter.KERNELS[name] for word in text.split()]
        assert set(filter(None, flags)) <= set(kernel.arg_names), name


def test_training_of_a_layer(counter, within):
    layer, x = CotLayer(SHAPE[1]).to('meta'), image()
    with counter.counting(autocast=True) as events, counter.keeping() as kept:
        forward = within(events, 'cot_layer', 'train_forward')
        backward = within(events, 'cot_layer', 'train_backward')
        out = layer(x)
        kept = sum(storage.nbytes() for storage in kept.values())
        out.backward(torch.empty_like(out))
    assert x.grad.shape == SHAPE and all(p.grad.shape == p.shape for p in layer.parameters())
    assert (launches(forward), launches(backward), launches(events)) == (10, 15, 56)
    assert units(forward) == pytest.approx(10.30, abs=0.01)
    assert units(backward) == pytest.approx(22.97, abs=0.01)
    assert units(events) == pytest.approx(77.70, abs=0.01)
    # x, what norms and local convolution read (keys, half as many hidden channels, values, filters) and its result
    assert kept / UNIT == pytest.approx(5.63, abs=0.02)


@pytest.mark.parametrize('folded, all_launches, all_units', [(False, 11, 17.40), (True, 12, 17.40)])
def test_inference_of_a_layer(counter, within, folded, all_launches, all_units):
    layer = CotLayer(SHAPE[1]).eval()
    layer, x = (layer.fuse() if folded else layer).bfloat16().to('meta'), image(requires_grad=False)
    with torch.no_grad(), counter.counting() as events:
        contexts = within(events, 'stand_ins', 'infer_contexts')
        assert layer(x).shape == SHAPE
    assert (launches(contexts), launches(events)) == (5, all_launches)
    assert units(contexts) == pytest.approx(8.27, abs=0.01)
    assert units(events) == pytest.approx(all_units, abs=0.01)


def test_plain(counter):
    layer = CotLayer(SHAPE[1]).to('meta')
    with counter.counting(plain=True, autocast=True) as events:
        layer(image()).sum().backward()
    names = [event.name for event in events]
    assert not any(name in counter.KERNELS for name in names)
    for name in ('local_conv', 'local_conv_input_grad', 'local_conv_weight_grad'):
        assert names.count(f'{name} (operator)') == 1


def test_counting_leaves_nothing_behind(counter):
    before = dispatch._stand_ins, dispatch.is_traced, torch.autocast, torch.is_autocast_enabled
    with pytest.raises(ZeroDivisionError), counter.counting():
        assert dispatch._stand_ins is not before[0]
        1 / 0
    assert (dispatch._stand_ins, dispatch.is_traced, torch.autocast, torch.is_autocast_enabled) == before


def test_operators(counter):
    """Bytes of PyTorch's operators are those of their inputs, for each pass, and outputs."""
    x, norm = image(requires_grad=False), nn.BatchNorm2d(SHAPE[1], device='meta')
    conv = nn.Conv2d(SHAPE[1], SHAPE[1], 3, padding=1, dtype=torch.bfloat16, device='meta')
    with torch.no_grad(), counter.counting() as events:
        y = conv(x)
        norm(y)
        norm.eval()(y)
        x.relu_()
        x.view(-1, *SHAPE[1:]).permute(0, 2, 3, 1)
        x[:1, :1, :1, :1].expand(SHAPE) + x
    assert y.is_contiguous(memory_format=torch.channels_last)
    found = {event.name: round(event.bytes / UNIT, 1) for event in events if event.bytes > UNIT / 10}
    assert found == {
        'convolution': 2, 'bias of a convolution': 2, 'native_batch_norm': 3, 'batch norm in evaluation': 2,
        'relu_': 2, 'add': 2}
    taps = next(event.flops for event in events if event.name == 'convolution') / torch.Size(SHAPE).numel()
    assert taps == 2 * 9 * SHAPE[1]


def test_predictions(traffic):
    """What is measured and was fitted comes out, within a quarter; and little is kept for the backward."""
    kept = {}
    for name, plain in (('cotnet50', True), ('cotnet50', False), ('resnet50', True)):
        events, kept[name, plain] = traffic.count(name, traffic.TRAINING, traffic.BATCH, traffic.SIZE, plain)
        measured, _ = traffic.MEASURED[name, traffic.TRAINING, plain]
        assert traffic.total(events).milliseconds == pytest.approx(measured, rel=0.25)
    assert kept['resnet50', True] == pytest.approx(11.25e9, rel=0.01)
    assert kept['cotnet50', False] / kept['resnet50', True] == pytest.approx(1.206, abs=0.005)
    assert kept['cotnet50', True] > 1.75 * kept['resnet50', True]


def test_tables(traffic, capsys):
    traffic.main(['--networks', 'test_cotnet', 'resnet18', '--batch', '2', '--size', '64', '--operators'])
    printed = capsys.readouterr().out
    assert printed.count('### ') == 7 and 'fitted' in printed and '- `norm_act_kernel`' in printed
    for table in printed.split('### ')[1:]:
        lines = [line for line in table.splitlines() if line.startswith('|')]
        assert len(lines) > 3 and len({line.count('|') for line in lines}) == 1
