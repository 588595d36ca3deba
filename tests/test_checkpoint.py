"""Reading checkpoints safely, and finding out which model they hold."""
import argparse
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from official_checkpoints import CfgNode, GOLDEN, detection_checkpoint, detection_key, official_state_dict
from official_checkpoints import random_state_dict, save, training_checkpoint

from timm_cotnet.checkpoint import CheckpointError, find_state_dict, find_tag, find_variant, is_detection
from timm_cotnet.checkpoint import read_checkpoint, rename_detection, resolve_model

SMALL = {'conv1.weight': (4, 3, 3, 3), 'bn1.running_var': (4,), 'bn1.num_batches_tracked': (), 'fc.bias': (5,)}
WEIGHTS, EMA = random_state_dict(SMALL, 1), random_state_dict(SMALL, 2)
LAYOUTS = {
    'bare': (lambda: WEIGHTS, WEIGHTS, 'bare state dict'),
    'bare with prefix': (
        lambda: OrderedDict((f'module.{k}', v) for k, v in WEIGHTS.items()), WEIGHTS, 'bare state dict'),
    'state_dict only': (lambda: {'state_dict': WEIGHTS}, WEIGHTS, 'state_dict of a training checkpoint'),
    'training': (lambda: training_checkpoint(WEIGHTS, 'cotnet50'), WEIGHTS, 'state_dict of a training checkpoint'),
    'training with prefix': (
        lambda: training_checkpoint(WEIGHTS, 'cotnet50', prefix='module.'), WEIGHTS,
        'state_dict of a training checkpoint'),
    'training with EMA': (
        lambda: training_checkpoint(WEIGHTS, 'cotnet50', EMA), EMA, 'state_dict_ema of a training checkpoint'),
    'timm training': (
        lambda: {'state_dict': WEIGHTS, 'args': argparse.Namespace(lr=0.1, amp=None), 'metric': np.float32(3)}, WEIGHTS,
        'state_dict of a training checkpoint'),
    'model with EMA': (
        lambda: {'model': WEIGHTS, 'model_ema': EMA}, EMA, 'model_ema of a training checkpoint'),
    'detectron2': (lambda: {'model': WEIGHTS, 'iteration': 9}, WEIGHTS, 'model of a training checkpoint'),
}


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys() and len(found) > 0
    assert all(found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts_are_read_exactly(tmp_path, layout, legacy):
    make, expected, taken = LAYOUTS[layout]
    found, found_in = find_state_dict(read_checkpoint(save(make(), tmp_path / 'x.pth.tar', legacy)))
    assert_equal(found, expected)
    assert found_in == taken


def test_moving_average_is_left_on_demand(tmp_path):
    path = save(training_checkpoint(WEIGHTS, 'cotnet50', EMA), tmp_path / 'x.pth.tar')
    found, taken = find_state_dict(read_checkpoint(path), use_ema=False)
    assert_equal(found, WEIGHTS)
    assert taken == 'state_dict of a training checkpoint'


def test_recorded_settings_become_plain_dicts(tmp_path):
    settings = read_checkpoint(save(training_checkpoint(WEIGHTS, 'cotnet50'), tmp_path / 'x.pth.tar'))['args']
    assert type(settings) is OrderedDict
    assert settings == {'seed': 1.0, 'model': {'name': 'cotnet50', 'drop_path': 0.1}, 'steps': (1, [2.0, None])}


def test_scalars_of_numpy_are_not_made(tmp_path):
    metric = read_checkpoint(save({'metric': np.float64(81.3)}, tmp_path / 'x.pth.tar'))['metric']
    assert not isinstance(metric, (float, np.generic))


class Attack:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


ATTACKS = {
    'os.system': lambda marker: Attack(os.system, f'touch {marker}'),
    'eval': lambda marker: Attack(eval, f"open({str(marker)!r}, 'w')"),
    'exec': lambda marker: Attack(exec, f"open({str(marker)!r}, 'w')"),
    'open': lambda marker: Attack(open, str(marker), 'w'),
    'getattr': lambda marker: Attack(getattr, Attack(__import__, 'os'), 'system'),
    'hub.load': lambda marker: Attack(torch.hub.load, str(marker), 'x'),
    'in the settings': lambda marker: {'args': CfgNode({'a': CfgNode({'b': Attack(os.system, f'touch {marker}')})})},
    'beside weights': lambda marker: {'state_dict': {**WEIGHTS, 'x': Attack(os.system, f'touch {marker}')}},
    'twice pickled': lambda marker: Attack(pickle.loads, pickle.dumps(Attack(os.system, f'touch {marker}'))),
}


@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle', 'stored in a zip'])
@pytest.mark.parametrize('attack', ATTACKS)
def test_pickles_that_call_are_refused(tmp_path, attack, form):
    marker, path = tmp_path / 'marker', tmp_path / 'x.pth.tar'
    payload = ATTACKS[attack](marker)
    if form == 'pickle':
        payload = Attack(os.system, f'touch {marker}') if attack == 'in the settings' else payload
        path.write_bytes(pickle.dumps(payload, protocol=2))
    elif form == 'stored in a zip':
        inner = save(payload, tmp_path / 'inner')
        with zipfile.ZipFile(path, 'w') as archive:
            archive.write(inner, 'archive/data.pkl')
            archive.writestr('archive/version', '3')
    else:
        save(payload, path, form == 'legacy')
    with pytest.raises(CheckpointError, match='refused|not a PyTorch checkpoint') as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert form not in ('zip', 'legacy') or 'refused: it asks for ' in str(error.value)
    assert not marker.exists()


def test_refusal_names_what_was_asked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r'it asks for (posix|nt)\.system'):
        read_checkpoint(save(Attack(os.system, 'true'), tmp_path / 'x.pth.tar'))


def make_tar(path: Path) -> None:
    with tarfile.open(path, 'w') as archive:
        archive.add(__file__, 'pickle')


def make_script(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
@pytest.mark.parametrize('make, message', [
    (lambda path: path.write_bytes(b''), 'is empty; download it again'),
    (lambda path: path.write_bytes(b'\n <!DOCTYPE html><html>Sign in</html>'), 'is a web page'),
    (lambda path: path.write_bytes(b'abc' * 1000), 'download it again'),
    (lambda path: path.write_bytes(os.urandom(5000)), 'download it again'),
    (lambda path: path.write_bytes(path.with_name('whole').read_bytes()[:-300]), 'cannot be read .* download it again'),
    (lambda path: path.write_bytes(path.with_name('old').read_bytes()[:-100]), 'cannot be read .* download it again'),
    (make_tar, 'cannot be read'),
    (make_script, 'cannot be read'),
], ids=['empty', 'html', 'text', 'noise', 'truncated', 'truncated legacy', 'tar', 'torchscript'])
def test_what_is_no_checkpoint(tmp_path, make, message):
    save({'state_dict': WEIGHTS}, tmp_path / 'whole')
    save({'state_dict': WEIGHTS}, tmp_path / 'old', legacy=True)
    make(tmp_path / 'x.pth.tar')
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / 'x.pth.tar')


@pytest.mark.parametrize('checkpoint, message', [
    (torch.ones(3), 'holds one Tensor'),
    ([1, 2], 'holds one list'),
    ({}, 'no weights: nothing'),
    ({'epoch': 3, 'arch': 'x'}, 'no weights: epoch, arch'),
    ({'state_dict': {**WEIGHTS, 'extra': 'text'}}, 'no weights: extra'),
    ({'a': 1, 'b': 1, 'c': 1, 'd': 1, 'e': 1}, 'a, b, c and 2 more'),
])
def test_what_holds_no_weights(checkpoint, message):
    with pytest.raises(CheckpointError, match=message):
        find_state_dict(checkpoint)


class Disguise:
    """Pickles as an ordered dict with attributes that hide its methods."""

    def __init__(self, content: dict, **attributes):
        self.parts = OrderedDict, (), attributes, None, iter(content.items())

    def __reduce__(self):
        return self.parts


def test_attributes_that_hide_methods_do_no_harm(tmp_path):
    hidden = dict(get=1, items=2, keys=3, values=4)
    settings = Disguise({'model': None}, **hidden)
    checkpoint = Disguise({'state_dict': Disguise(WEIGHTS, **hidden), 'args': settings}, **hidden)
    found = read_checkpoint(save(checkpoint, tmp_path / 'x.pth.tar'))
    assert found.get == 1
    assert_equal(find_state_dict(found)[0], WEIGHTS)
    assert find_tag('se_cotnetd_152', found, Path('320.pth'))[0] == 'jd_in1k_320'


def meta(shapes: dict) -> dict:
    return {key: torch.empty(shape, device='meta') for key, shape in shapes.items()}


@pytest.mark.parametrize('name', GOLDEN)
def test_variant_is_found_by_keys_and_shapes(name):
    weights = meta(GOLDEN[name]['state_dict'])
    assert find_variant(weights, 1000) == name.removesuffix('_L')
    weights['fc.weight'], weights['fc.bias'] = torch.empty(7, 2048, device='meta'), torch.empty(7, device='meta')
    assert find_variant(weights, 7) == name.removesuffix('_L')


def test_what_fits_nothing_is_told_the_nearest():
    weights = meta(GOLDEN['cotnet101']['state_dict'])
    del weights['layer3.22.conv1.weight'], weights['layer3.22.bn1.bias']
    weights['head.extra'] = torch.empty(3, device='meta')
    weights['layer1.0.conv1.weight'] = torch.empty(64, 32, 1, 1, device='meta')
    with pytest.raises(CheckpointError) as error:
        find_variant(weights, 1000)
    assert str(error.value) == (
        'the weights fit no variant; nearest is cotnet101, with 4 differences to its 1616 entries:\n'
        '  missing: layer3.22.conv1.weight, layer3.22.bn1.bias\n'
        '  unexpected: head.extra\n'
        '  of another shape: layer1.0.conv1.weight: 64x32x1x1 instead of 64x64x1x1')


def test_another_number_of_classes_is_said():
    weights = meta(GOLDEN['cotnet50']['state_dict'])
    with pytest.raises(CheckpointError) as error:
        find_variant(weights, 7, 'cotnet50')
    assert str(error.value).splitlines()[1:] == [
        '  of another shape: fc.weight: 1000x2048 instead of 7x2048, fc.bias: 1000 instead of 7',
        'only the classifier differs: it has 1000 classes instead of 7']
    del weights['fc.weight'], weights['fc.bias']
    with pytest.raises(CheckpointError, match='it has 0 classes instead of 1000'):
        find_variant(weights, 1000)


def test_resnet_is_not_taken_for_a_cotnet():
    with pytest.raises(CheckpointError, match=r'fit no variant; nearest is \w+, with.*\n  missing: .* more\n'):
        with torch.device('meta'):
            find_variant(timm.create_model('resnet50').state_dict(), 1000)


def test_wrong_model_is_told_the_right_one():
    weights = meta(GOLDEN['cotnet50']['state_dict'])
    assert find_variant(weights, 1000, 'cotnet50') == 'cotnet50'
    with pytest.raises(CheckpointError, match='not those of cotnet101, but fit cotnet50: pass --model cotnet50'):
        find_variant(weights, 1000, 'cotnet101')
    del weights['bn1.bias']
    for said in ('cotnet50', 'cotnet101'):
        with pytest.raises(CheckpointError, match=(
                f'fit neither {said} nor another variant; nearest is cotnet50, with 1 differences to its 800 entries:\n'
                '  missing: bn1.bias')):
            find_variant(weights, 1000, said)


@pytest.mark.parametrize('name, expected', [
    ('cotnet50', ('cotnet50', 'jd_in1k')),
    ('se_cotnetd_152', ('se_cotnetd_152', 'jd_in1k')),
    ('se_cotnetd_152_L', ('se_cotnetd_152', 'jd_in1k_320')),
    ('se_cotnetd_152.jd_in1k_320', ('se_cotnetd_152', 'jd_in1k_320')),
])
def test_model_names(name, expected):
    assert resolve_model(name) == expected


@pytest.mark.parametrize('name', ['cotnet5', 'resnet50', 'cotnet50.jd_in22k', ''])
def test_unknown_model_names(name):
    with pytest.raises(CheckpointError, match='it may be cotnet50, .* se_cotnetd_152.jd_in1k_320'):
        resolve_model(name)


@pytest.mark.parametrize('checkpoint, file, tag', [
    ({'args': {'model': {'name': 'se_cotnetd_152'}}}, 'x_320.pth', 'jd_in1k'),
    ({'args': {'model': {'name': 'se_cotnetd_152_L'}}}, 'x.pth', 'jd_in1k_320'),
    ({}, 'SE-CoTNetD-152_320.pth.tar', 'jd_in1k_320'),
    ({}, 'se_cotnetd_152_L.pth.tar', 'jd_in1k_320'),
    ({'args': None}, 'se_cotnetd_152L.pth.tar', 'jd_in1k_320'),
])
def test_tags_of_equal_shape_are_told_apart(checkpoint, file, tag):
    assert find_tag('se_cotnetd_152', checkpoint, Path(file))[0] == tag


def test_tags_of_equal_shape_are_not_guessed():
    assert find_tag('cotnet50', {}, Path('x.pth')) == ('jd_in1k', 'keys and shapes')
    with pytest.raises(CheckpointError, match='--model se_cotnetd_152.jd_in1k or --model se_cotnetd_152.jd_in1k_320'):
        find_tag('se_cotnetd_152', {'args': {'model': {'name': 'other'}}}, Path('x.pth'))


@pytest.mark.parametrize('detection, classification', [
    ('stem.conv1.weight', 'conv1.weight'),
    ('stem.conv1.norm.running_mean', 'bn1.running_mean'),
    ('stem.conv1.6.weight', 'conv1.6.weight'),
    ('stem.conv1.4.bias', 'conv1.4.bias'),
    ('stem.conv1.7.weight', 'bn1.weight'),
    ('linear.bias', 'fc.bias'),
    ('res2.0.conv1.weight', 'layer1.0.conv1.weight'),
    ('res2.0.conv1.norm.weight', 'layer1.0.bn1.weight'),
    ('res5.2.conv3.norm.bias', 'layer4.2.bn3.bias'),
    ('res3.0.shortcut.weight', 'layer2.0.downsample.0.weight'),
    ('res3.0.shortcut.norm.weight', 'layer2.0.downsample.1.weight'),
    ('res3.0.shortcut.1.weight', 'layer2.0.downsample.1.weight'),
    ('res3.0.shortcut.1.norm.weight', 'layer2.0.downsample.2.weight'),
    ('res4.10.conv2.key_embed.0.weight', 'layer3.10.conv2.key_embed.0.weight'),
    ('res4.10.conv2.key_embed.0.norm.weight', 'layer3.10.conv2.key_embed.1.weight'),
    ('res4.1.conv2.embed.0.norm.weight', 'layer3.1.conv2.embed.1.weight'),
    ('res4.1.conv2.embed.2.bias', 'layer3.1.conv2.embed.3.bias'),
    ('res4.1.conv2.embed.3.bias', 'layer3.1.conv2.embed.4.bias'),
    ('res4.1.conv2.se.0.bias', 'layer3.1.conv2.se.0.bias'),
    ('res4.1.conv2.se.0.norm.bias', 'layer3.1.conv2.se.1.bias'),
    ('res4.1.conv2.se.2.weight', 'layer3.1.conv2.se.3.weight'),
    ('res4.1.conv2.conv1x1.1.weight', 'layer3.1.conv2.conv1x1.1.weight'),
    ('res4.1.conv2.bn.weight', 'layer3.1.conv2.bn.weight'),
    ('res4.1.conv2.bn0.weight', 'layer3.1.conv2.bn0.weight'),
    ('res4.1.conv2.fc1.weight', 'layer3.1.conv2.fc1.weight'),
])
def test_names_of_detectors(detection, classification):
    value = torch.ones(1)
    assert rename_detection({f'backbone.bottom_up.{detection}': value, 'roi_heads.x': value}) == {classification: value}
    assert rename_detection({detection: value}) == {classification: value}


@pytest.mark.parametrize('name', [
    'cotnet50', 'cotnet101', 'cotnext50_2x48d', 'cotnext101_2x48d', 'se_cotnetd_50', 'se_cotnetd_101'])
def test_backbones_of_detectors_get_their_official_names(name):
    weights = meta(GOLDEN[name]['state_dict'])
    hybrid = name.startswith('se')
    detection = {detection_key(key, hybrid): value for key, value in weights.items() if not key.startswith('fc.')}
    assert len(detection) == len(weights) - 2
    renamed = rename_detection(detection)
    assert renamed == {key: value for key, value in weights.items() if not key.startswith('fc.')}
    assert find_variant(renamed, 0) == name


def test_frozen_norms_get_their_counters(tmp_path):
    weights = official_state_dict('se_cotnetd_50')
    found, taken = find_state_dict(read_checkpoint(save(detection_checkpoint(weights), tmp_path / 'model_final.pth')))
    assert is_detection(found) and not is_detection(weights)
    renamed = rename_detection(found)
    assert renamed.keys() == weights.keys() - {'fc.weight', 'fc.bias'}
    assert renamed['bn1.num_batches_tracked'] == 0 and renamed['layer4.0.bn1.num_batches_tracked'] == 7
    assert all(torch.equal(renamed[key], weights[key]) for key in renamed if not key.endswith('num_batches_tracked'))
