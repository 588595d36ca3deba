"""The README: its numbers, its Python, and the files that it names."""
import re

import pytest
import timm
import torch
from conftest import ROOT

import timm_cotnet  # noqa: F401
from timm_cotnet.published import PUBLISHED

TEXT = (ROOT / 'README.md').read_text()


def test_table_of_models_is_true():
    rows = [[cell.strip(' `') for cell in line.split('|')[1:-1]] for line in TEXT.splitlines()
            if re.match(r'\| `\w*cotnet\w*(\.\w+)?`|\| `\w*cotnext\w*\.', line)]
    assert {row[0] for row in rows} >= set(timm.list_models(module='cotnet', pretrained=True)) | set(PUBLISHED)
    for name, params, size, gmacs, top1, top5 in rows:
        with torch.device('meta'):
            model = timm.create_model(name)
        assert f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M' == params
        assert int(size) == model.pretrained_cfg['input_size'][1]
        if name in PUBLISHED:
            facts = PUBLISHED[name]
            assert (float(gmacs), float(top1), float(top5)) == (facts.gmacs, facts.top1, facts.top5)
        else:
            assert not top1 and not top5


def test_python_runs():
    """Each block alone, as a reader pastes it."""
    found = {}
    for block in re.findall(r'```python\n(.*?)```', TEXT, flags=re.S):
        names = {}
        exec(block, names)
        found.update(names)
    assert found['probabilities'].shape == (1, 10)
    assert [tuple(f.shape) for f in found['features']] == [(2, 512, 28, 28), (2, 1024, 14, 14), (2, 2048, 7, 7)]
    assert found['upsampled'].shape == (2, 48, 32, 32)
    with pytest.raises(ValueError, match='CoTAttention: dim is 50, expected a multiple of 4'):
        found['upsample'](96, 50)
    assert list(found['report'].replaced) == ['layer3.1.conv2', 'layer4.1.conv2']
    assert found['static'].shape == found['dynamic'].shape == found['out'].shape == (2, 64, 56, 56)


def test_files_exist():
    table = TEXT.split('## Where is what')[1].split('##')[0]
    for cell in re.findall(r'^\| (`.*?) \|', table, flags=re.M):
        names = re.findall(r'`([^`]+)`', cell)
        folder = names[0].rpartition('/')[0] if len(names) > 1 else ''
        for i, name in enumerate(names):
            assert (ROOT / (name if i == 0 else f'{folder}/{name}')).exists(), name
