"""What `explain` tells: which implementation runs, and why no faster one."""
import io
import re

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from timm_cotnet import CoTAttention, CotLayer, explain
from timm_cotnet.ops import conditions

from helpers import plain_wing, run_python

OWN = 'its own modules'
TRAIN = 'C kernels for training'
FOLDED = 'packed convolutions and a C kernel'


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


def test_explain_names_layers_and_reasons():
    model = timm.create_model('test_cotnet').eval()
    out = io.StringIO()
    with plain_wing(), torch.no_grad():
        assert explain(reparameterize_model(model), channels_last(2, 3, 64, 64), file=out) is None
    lines = out.getvalue().splitlines()
    width = len('layer1.0.conv2')
    for stage in range(1, 5):
        assert f'{f"layer{stage}":{width}}  packed convolutions, in place' in lines
        assert f'layer{stage}.0.conv2  {FOLDED}' in lines
    assert not [line for line in lines if ' not ' in line]

    out = io.StringIO()
    with plain_wing(), torch.no_grad():
        explain(model, channels_last(2, 3, 64, 64), file=out)
    lines = out.getvalue().splitlines()
    assert len([line for line in lines if line.endswith(f'conv2  {OWN}')]) == 4
    assert f'{"":{width}}    not {TRAIN}: no gradient is wanted (torch.no_grad)' in lines
    assert f'{"":{width}}  local convolution by C kernel' in lines


def test_explain_without_the_folder(monkeypatch, capsys):
    monkeypatch.setattr(conditions, 'cpu', None)
    explain(CotLayer(16), channels_last(2, 16, 4, 5))
    assert capsys.readouterr().out.splitlines() == [
        f'CotLayer  {OWN}',
        f'{"":8}    not {TRAIN}: the package has no folder ops/cpu',
        f'{"":8}  local convolution by shifted slices',
        f'{"":8}    not C kernel: the package has no folder ops/cpu',
    ]
    explain(nn.ReLU(), torch.ones(1))
    assert capsys.readouterr().out == 'no layer of timm_cotnet was called\n'
    explain(CoTAttention(16), torch.ones(2, 16, 4, 5))
    assert capsys.readouterr().out == 'CoTAttention  averaged filters\n'


@pytest.mark.parametrize('options, message', [
    (['resnet1000'], "timm knows no model 'resnet1000'"),
    (['test_cotnet.nonsense'], 'Invalid pretrained tag (nonsense)'),
    (['test_cotnet', '--reparam', '--train'], '--reparam is for evaluation'),
    (['test_cotnet', '--batch-size', '-1'], '--batch-size is -1, expected 1 or more'),
    (['test_cotnet', '--img-size', '0'], '--img-size is 0, expected 1 or more'),
    (['test_cotnet', '--device', 'nonsense'], '--device is nonsense, which cannot be used: ')])
def test_explain_command_refuses(options, message, capsys):
    from timm_cotnet.explain import main
    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err


def test_explain_command_with_one_image_in_training():
    from timm_cotnet.explain import main
    with pytest.raises(SystemExit, match=r'test_cotnet does not run on \(1, 3, 64, 64\): Expected more than 1 value'):
        main(['test_cotnet', '--train', '--batch-size', '1', '--img-size', '64'])


@pytest.mark.slow
def test_explain_command(capsys):
    lines = run_python('-m', 'timm_cotnet.explain', 'test_cotnet', '--reparam', '--img-size', '64').splitlines()
    assert len([line for line in lines if re.match(r'layer\d\.0\.conv2  ', line)]) == 4
    assert len([line for line in lines if re.match(r'layer\d +\S', line)]) == 4
    from timm_cotnet.explain import main
    for args in (['test_cotnet', '--train'], ['test_cotnet', '--dtype', 'bfloat16', '--contiguous'],
                 ['test_cotnet', '--reparam', '--amp']):
        assert main(args) == 0
        assert len(re.findall(r'^layer\d\.0\.conv2  ', capsys.readouterr().out, re.MULTILINE)) == 4
