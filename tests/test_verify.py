"""Evaluation beside published accuracy, on small image folders."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from official_checkpoints import save
from PIL import Image

from timm_cotnet import verify as verify_module
from timm_cotnet.checkpoint import CheckpointError
from timm_cotnet.convert import convert
from timm_cotnet.convert import main as convert_main
from timm_cotnet.verify import Verification, main, verify

NAME = 'cotnet50.jd_in1k'
WNIDS = ['n01440764', 'n01443537', 'n03888257', 'n15075141']  # classes 0, 1, 701 and 999


@pytest.fixture(scope='module')
def converted(tmp_path_factory) -> Path:
    """A model that takes every image for class 701, then for 0, 500, 499 or 501."""
    weights = timm.create_model('cotnet50').state_dict()
    weights['fc.weight'] = torch.zeros(1000, 2048)
    weights['fc.bias'] = -(torch.arange(1000) - 500.).abs()
    weights['fc.bias'][[0, 701]] = torch.tensor([100., 200.])
    folder = tmp_path_factory.mktemp('converted')
    convert(save(weights, folder / 'x.pth'), folder / NAME)
    return folder / NAME


def make_images(folder: Path, names, size: int = 40, count: int = 2) -> Path:
    random = np.random.RandomState(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(random.randint(0, 255, (size, size, 3), np.uint8)).save(folder / name / f'{index}.png')
    return folder


def publish(monkeypatch, top1: float, top5: float) -> None:
    facts = {NAME: replace(verify_module.PUBLISHED[NAME], top1=top1, top5=top5)}
    monkeypatch.setattr(verify_module, 'PUBLISHED', facts)


def test_classes_are_found_by_their_names(tmp_path, monkeypatch, converted):
    publish(monkeypatch, 25.0, 50.0)
    result = verify(converted, make_images(tmp_path / 'val', WNIDS).parent, batch_size=3, workers=0)
    assert (result.name, result.images) == (NAME, 8)
    # one of the four classes is first, two are among the first five
    assert result.measured == pytest.approx((25.0, 50.0), abs=1e-4)
    assert result.agrees
    # 0.2 points, and three standard errors of 8 images
    assert result.tolerance == pytest.approx((0.2 + 3 * 15.3093, 0.2 + 3 * 17.6777), abs=1e-3)


@pytest.mark.parametrize('difference, agrees', [
    (0.0, True), (0.19, True), (-0.19, True), (0.21, False), (-0.21, False)])
@pytest.mark.parametrize('which', [0, 1])
def test_agreement(difference, agrees, which):
    measured = [81.3, 95.6]
    measured[which] += difference
    assert Verification(NAME, 50000, tuple(measured), (81.3, 95.6), (0.2, 0.2)).agrees is agrees


def test_model_sees_what_its_config_says(tmp_path, monkeypatch, converted):
    seen = []

    def create_loader(dataset, input_size, batch_size, **kwargs):
        seen.append((tuple(input_size), kwargs['crop_pct'], kwargs['interpolation'], tuple(kwargs['mean'])))
        return original(dataset, input_size, batch_size, **kwargs)

    original = verify_module.create_loader
    monkeypatch.setattr(verify_module, 'create_loader', create_loader)
    result = verify(converted, make_images(tmp_path, WNIDS[:1], count=1), workers=0)
    assert seen == [((3, 224, 224), 0.875, 'bicubic', (0.485, 0.456, 0.406))]
    assert result.measured == (0.0, 100.0)


@pytest.mark.slow
def test_order_of_the_folders_names_the_classes(tmp_path, converted):
    config = json.loads((converted / 'config.json').read_text())
    config['pretrained_cfg']['input_size'] = [3, 32, 32]
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'model.safetensors').symlink_to(converted / 'model.safetensors')
    images = make_images(tmp_path / 'images', [f'{index:03}' for index in range(1000)], size=8, count=1)
    result = verify(tmp_path, images, workers=0)
    assert (result.images, result.measured) == (1000, pytest.approx((0.1, 0.5)))
    assert not result.agrees


def test_other_folders_are_refused(tmp_path, converted):
    with pytest.raises(CheckpointError, match='has 2 class folders; expected 1000, or folders with the names of'):
        verify(converted, make_images(tmp_path, ['cat', 'dog']), workers=0)


def test_nothing_is_claimed_without_published_numbers(tmp_path, converted):
    config = json.loads((converted / 'config.json').read_text())
    config['pretrained_cfg']['tag'] = 'other'
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match='cotnet50.other, for which no ImageNet accuracy was published'):
        verify(tmp_path, tmp_path)


def test_one_of_several_models_stops_no_other(tmp_path, monkeypatch, capsys, converted):
    """Evaluations that took hours are not lost."""
    images, models = make_images(tmp_path / 'images', WNIDS, count=1), tmp_path / 'models'
    publish(monkeypatch, 25.0, 50.0)
    for name, tag, weights in (('a', 'jd_in1k', b'damaged'), ('b', 'jd_in1k', None), ('c', 'mine', None)):
        (models / name).mkdir(parents=True)
        config = json.loads((converted / 'config.json').read_text())
        config['pretrained_cfg']['tag'] = tag
        (models / name / 'config.json').write_text(json.dumps(config))
        content = (converted / 'model.safetensors').read_bytes() if weights is None else weights
        (models / name / 'model.safetensors').write_bytes(content)
    assert main([str(models), '--data', str(images), '--workers', '0']) == 1
    printed = capsys.readouterr()
    assert f'{NAME}: agrees on 4 images' in printed.out
    assert 'left out: ' in printed.err and 'cotnet50.mine, for which no' in printed.err
    assert f'{models / "a"}: ' in printed.err
    assert main([str(converted), '--data', str(images), '--batch-size', '0']) == 1
    assert 'error: batch_size' in capsys.readouterr().err
    (models / 'a' / 'config.json').write_text('[]')
    assert main([str(models / 'a'), '--data', str(images)]) == 1
    assert 'names no architecture' in capsys.readouterr().err


def test_command(tmp_path, monkeypatch, capsys, converted):
    images = make_images(tmp_path, WNIDS, count=1)
    publish(monkeypatch, 25.0, 99.9)
    arguments = ['--data', str(images), '--workers', '0']
    assert main([str(converted.parent), *arguments]) == 1
    lines = [
        f'{NAME}: top-1 25.000 %, published 25.0 %, difference +0.000, tolerance 65.15 points',
        f'{NAME}: top-5 50.000 %, published 99.9 %, difference -49.900, tolerance 4.94 points',
        f'{NAME}: DOES NOT AGREE on 4 images',
    ]
    assert capsys.readouterr().out.splitlines() == lines
    assert convert_main(['--verify', str(converted), *arguments]) == 1
    assert capsys.readouterr().out.splitlines() == lines
    publish(monkeypatch, 25.0, 50.0)
    assert main([str(converted), *arguments]) == 0
    assert f'{NAME}: agrees on 4 images' in capsys.readouterr().out
    assert main([str(images), '--data', str(images)]) == 1
    assert 'holds no converted model; make one with' in capsys.readouterr().err


def test_command_without_images(tmp_path, capsys, converted):
    assert main([str(converted), '--data', str(tmp_path / 'missing')]) == 1
    assert capsys.readouterr().err == (
        f'error: {tmp_path}/missing is no folder; give one with a folder of images per class\n')
    assert main([str(converted), '--data', str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith('error: Found 0 images')
