"""The seam: what stands in for a module or an operator, and who decides it."""
import os
import shutil
from pathlib import Path

import pytest
import torch
from timm.utils import reparameterize_model
from torch import nn

import timm_cotnet
from timm_cotnet import CotLayer
from timm_cotnet.ops import conditions, dispatch
from timm_cotnet.ops.dispatch import Choice, StandIn, known_as, recorded, stand_in

from helpers import FORMATS, MODULES, create, image, implementations, needs_kernels, plain_wing, run_python

PACKAGE = Path(timm_cotnet.__file__).parent
OWN = 'its own modules'
TRAIN, NORMS = 'C kernels for training', 'C kernels of norms'
FOLDED, BLOCK = 'packed convolutions and a C kernel', 'packed convolutions'


def fold(module):
    return reparameterize_model(nn.Sequential(module))[0]


# The seam itself


def table(monkeypatch, **rows):
    monkeypatch.setattr(dispatch, '_ON_CPU', rows)


def test_known_as_is_for_exactly_one_class(monkeypatch):
    monkeypatch.setattr(dispatch, '_KINDS', dict(dispatch._KINDS))

    @known_as('thing')
    class Thing(nn.Module):
        pass

    class Other(Thing):
        pass
    assert dispatch._KINDS[Thing] == 'thing' and Other not in dispatch._KINDS and Thing.__name__ == 'Thing'
    table(monkeypatch, thing=(StandIn('a double', lambda module, x: None, lambda module, x, _: 2 * x),))
    x = torch.ones(2)
    assert torch.equal(stand_in(Thing(), x), 2 * x)
    assert stand_in(Other(), x) is None and stand_in(nn.ReLU(), x) is None
    assert stand_in(Thing(), 'no tensor') is None
    assert stand_in(Thing(), x.to('meta')) is None  # the table is that of the CPU


def test_stand_ins_are_asked_in_turn(monkeypatch):
    monkeypatch.setattr(dispatch, '_KINDS', {nn.Identity: 'thing'})
    asked = []

    def row(name, found):
        def look(module, x):
            asked.append(name)
            return found
        return StandIn(name, look, lambda module, x, found: (name, found))
    module, x = nn.Identity(), torch.ones(1)
    table(monkeypatch, thing=(row('first', 'is asleep'), row('second', None), row('third', None)))
    assert stand_in(module, x) == ('second', None) and asked == ['first', 'second']
    with recorded() as choices:
        stand_in(module, x)
    assert choices == [Choice(module, 'second', (('first', 'is asleep'),))]
    table(monkeypatch, thing=(row('first', 'is asleep'), row('second', 'is away')))
    with recorded() as choices:
        assert stand_in(module, x) is None
    assert choices == [Choice(module, OWN, (('first', 'is asleep'), ('second', 'is away')))]


def test_recorded_lasts_as_long_as_its_block():
    layer, x = CotLayer(16), image(2, 16)
    with recorded() as outer:
        layer(x)
        with recorded() as inner:
            layer(x)
            layer(x)
        layer(x)
        with pytest.raises(RuntimeError):
            with recorded():
                raise RuntimeError
    layer(x)
    assert [c.module for c in outer if c.module] == [layer] * 2 and [c.module for c in inner if c.module] == [layer] * 2
    assert all(c.implementation.startswith('local convolution by') for c in outer + inner if c.module is None)
    assert len(outer) == len(inner) == 4


def test_every_kind_in_the_table_is_known():
    assert {*dispatch._ON_CPU, *dispatch._ON_GPU, *dispatch._ANYWHERE} <= set(dispatch._KINDS.values())
    assert set(dispatch._KINDS.values()) == {
        'avg_pool', 'bottleneck', 'cot_layer', 'cot_attention', 'folded_cot_layer', 'folded_cot_attention',
        'folded_bottleneck', 'folded_stage', 'folded_stem'}


# What runs


@needs_kernels
def test_installed_kernels_are_taken():
    for name in ('CotLayer', 'CoxtLayer'):
        layer = create(name).train()
        x = image(4, 32, memory_format=torch.channels_last)
        assert implementations(layer, x.requires_grad_())[0] == [TRAIN]
        assert implementations(layer, x.detach())[0] == [TRAIN]  # for the gradients of its parameters
        assert implementations(layer, x.contiguous())[0] == [OWN]
        assert implementations(layer.eval(), x)[0] == [OWN]
        folded = fold(layer)
        for dtype in (torch.float32, torch.bfloat16):
            if dispatch.onednn.why_not_packed(dtype) is None and conditions.cpu.why_not(dtype) is None:
                with torch.no_grad():
                    assert implementations(folded.to(dtype), x.to(dtype))[0] == [FOLDED]
                assert implementations(folded, x.to(dtype))[0] == [OWN]
    for name in ('CotBottleneck', 'SplitAttnBottleneck'):
        block, x = create(name).train(), image(4, 16, memory_format=torch.channels_last)
        assert implementations(block, x)[0][0] == NORMS
        assert set(implementations(block, x.contiguous())[0]) == set(implementations(block.eval(), x)[0]) == {OWN}


@pytest.mark.parametrize('name', MODULES)
@pytest.mark.parametrize('plain', [False, True])
def test_float64_runs_in_its_own_modules(name, plain):
    for memory_format in FORMATS:
        x = image(3, MODULES[name][1], memory_format=memory_format, dtype=torch.float64)
        module = create(name).double()
        with plain_wing(plain) as wing, torch.no_grad():
            for part in (module, fold(module)):
                used, _ = implementations(part, x)
                assert set(used) <= {OWN, 'averaged filters'}
        assert not plain or not wing.called


# The package by itself


WITHOUT_FOLDER = '''
import torch
from golden import filled, golden_input, load
import timm_cotnet
from timm_cotnet import CoTAttention, CotLayer, CoxtLayer
from timm_cotnet.ops import conditions
from timm.utils import reparameterize_model
assert conditions.cpu is None and timm_cotnet.__file__.startswith({folder!r}), timm_cotnet.__file__
data = load('layers')
for tag, layer in (
        ('cot_dim64_k3', CotLayer(64)), ('coxt_dim96_k3', CoxtLayer(96)), ('seed_dim64_k3', CoTAttention(64))):
    x = golden_input(tuple(data[tag + '_eval'].shape), 'layer' + tag)
    layer = filled(layer).eval()
    folded = reparameterize_model(torch.nn.Sequential(layer))
    for part in (layer, folded):
        assert (part(x) - data[tag + '_eval']).abs().max() < 1e-9
        x32 = x.float().contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            assert (part.float()(x32) - data[tag + '_eval']).abs().max() < 1e-5
    layer = layer.train()
    x32.requires_grad_()
    out = layer(x32)
    assert (out - data[tag + '_train']).abs().max() < 1e-4
    out.square().mean().backward()
    assert (x32.grad - data[tag + '_input_grad']).abs().max() < 1e-4
print('good')
'''


@pytest.mark.slow
def test_package_without_its_folder_of_kernels(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / 'timm_cotnet', ignore=shutil.ignore_patterns('cpu', '__pycache__'))
    assert not (tmp_path / 'timm_cotnet' / 'ops' / 'cpu').exists()
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])
    code = WITHOUT_FOLDER.format(folder=str(tmp_path))
    assert run_python('-c', code, env={'PYTHONPATH': paths}, cwd=tmp_path) == 'good\n'


AGAIN = '''
import sys, warnings
import timm, torch
import timm_cotnet
first = timm_cotnet.CotLayer
for name in [name for name in sys.modules if name.partition('.')[0] == 'timm_cotnet']:
    del sys.modules[name]
import timm_cotnet
assert timm_cotnet.CotLayer is not first
model = timm.create_model('test_cotnet').eval()
assert type(model.layer1[0].conv2) is timm_cotnet.CotLayer
x = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
with torch.no_grad():
    folded = timm.utils.reparameterize_model(model)
    assert (folded(x) - model(x)).abs().max() < 1e-4
model.train()(x.repeat(2, 1, 1, 1)).sum().backward()
old = first(16)
assert old(torch.randn(2, 16, 4, 5)).shape == (2, 16, 4, 5)
print('good')
'''


@pytest.mark.slow
def test_imported_again():
    assert run_python('-c', AGAIN) == 'good\n'
