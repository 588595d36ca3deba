"""Conversion of synthetic official checkpoints: exact, deterministic, resumable and never half-written."""
import contextlib
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import timm
import torch
from official_checkpoints import GOLDEN, detection_checkpoint, official_state_dict, random_state_dict, save
from official_checkpoints import training_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file

from timm_cotnet.checkpoint import CheckpointError
from timm_cotnet.convert import convert, convert_folder, main, plain_tensor
from timm_cotnet.digest import sha256

HUB_CARDS = Path(__file__).parent.parent / 'hub_cards'
TAGS = {  # where it is not jd_in1k
    'se_cotnetd_152_L': 'se_cotnetd_152.jd_in1k_320',
    'se_cotnetd_200': 'se_cotnetd_200',
    'se_cotnetd_270': 'se_cotnetd_270',
}
FAST = ('cotnet50', 'se_cotnetd_50')
FILES = ['README.md', 'config.json', 'figure.svg', 'model.safetensors']


def slow_unless(names, fast):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def tiny(seed: int = 0):
    """Weights of the smallest registered model."""
    with torch.device('meta'):
        shapes = {key: value.shape for key, value in timm.create_model('test_cotnet').state_dict().items()}
    return random_state_dict(shapes, seed)


def assert_holds(folder: Path, expected: dict) -> None:
    found = load_file(folder / 'model.safetensors')
    assert found.keys() == expected.keys() and len(found) > 200
    assert all(found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in expected.items())


def load(folder: Path, **kwargs) -> torch.nn.Module:
    """The model in a converted folder, by timm; an older one knows files, but no `local-dir:`."""
    if hasattr(timm.models._hub, 'load_model_config_from_path'):
        return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs)
    config = json.loads((folder / 'config.json').read_text())
    overlay = dict(config['pretrained_cfg'], num_classes=config['num_classes'], file=folder / 'model.safetensors')
    return timm.create_model(
        config['architecture'], pretrained=True, pretrained_cfg_overlay=overlay, num_classes=overlay['num_classes'],
        **kwargs)


@pytest.mark.parametrize('name', slow_unless(GOLDEN, FAST))
def test_every_variant_converts_and_loads_exactly(tmp_path, name):
    weights, ema = official_state_dict(name), official_state_dict(name, seed=1)
    path = save(training_checkpoint(weights, name, ema, 'module.'), tmp_path / 'x.pth.tar')
    conversion = convert(path, tmp_path / 'out')
    assert conversion.name == TAGS.get(name, f'{name}.jd_in1k')
    assert_holds(tmp_path / 'out', ema)
    model = load(tmp_path / 'out')
    assert model.pretrained_cfg['architecture'] == name.removesuffix('_L')
    assert list(model.pretrained_cfg['input_size']) == GOLDEN[name]['eval_config']['input_size']
    assert all(torch.equal(value, ema[key]) for key, value in model.state_dict().items())
    assert {file: sha256(tmp_path / 'out' / file) for file in os.listdir(tmp_path / 'out')} == conversion.digests
    if conversion.name in TAGS.values() and '.' not in conversion.name:
        assert sorted(conversion.digests) == ['README.md', 'config.json', 'model.safetensors']
    else:
        assert sorted(conversion.digests) == FILES
        for file in FILES[:3]:
            assert (tmp_path / 'out' / file).read_bytes() == (HUB_CARDS / conversion.name / file).read_bytes()


def test_bytes_depend_on_the_weights_alone(tmp_path):
    weights = tiny()
    half = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    checkpoints = {
        'bare': weights,
        'reordered': dict(sorted(weights.items(), reverse=True)),
        'training': training_checkpoint(weights, 'test_cotnet'),
        'channels last': {
            key: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value
            for key, value in weights.items()},
        'half': half,
        'upcast': {key: value.float() if value.is_floating_point() else value for key, value in half.items()},
    }
    digests = {}
    for name, checkpoint in checkpoints.items():
        path = save(checkpoint, tmp_path / name, legacy=name == 'reordered')
        digests[name] = convert(path, tmp_path / 'out').digests['model.safetensors']
    assert digests['bare'] == digests['reordered'] == digests['training'] == digests['channels last']
    assert digests['half'] == digests['upcast'] != digests['bare']
    with safe_open(tmp_path / 'out' / 'model.safetensors', 'pt') as file:
        assert file.metadata() == {'format': 'pt'}


def test_model_with_other_classes_has_no_claims(tmp_path):
    weights = official_state_dict('cotnet50')
    weights['fc.weight'], weights['fc.bias'] = weights['fc.weight'][:7].clone(), weights['fc.bias'][:7].clone()
    conversion = convert(save(weights, tmp_path / 'x.pth'), tmp_path / 'out')
    assert (conversion.name, conversion.num_classes) == ('cotnet50', 7)
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert (config['architecture'], config['num_classes']) == ('cotnet50', 7)
    assert 'tag' not in config['pretrained_cfg']
    assert '81.3' not in (tmp_path / 'out' / 'README.md').read_text()
    model = load(tmp_path / 'out')
    assert torch.equal(model.fc.weight, weights['fc.weight'])


@pytest.mark.parametrize('name', slow_unless(
    ['cotnet50', 'cotnet101', 'cotnext50_2x48d', 'cotnext101_2x48d', 'se_cotnetd_50', 'se_cotnetd_101'], FAST))
def test_backbones_of_detectors_convert(tmp_path, name):
    weights = official_state_dict(name)
    conversion = convert(save(detection_checkpoint(weights), tmp_path / 'model_final.pth'), tmp_path / 'out')
    assert (conversion.name, conversion.num_classes) == (f'{name}.jd_coco', 0)
    assert conversion.taken == 'model of a training checkpoint, backbone of a detector, no classifier'
    model = load(tmp_path / 'out')
    assert model.num_classes == 0
    found = model.state_dict()
    assert found.keys() == weights.keys() - {'fc.weight', 'fc.bias'}
    for key, value in found.items():
        frozen = key.endswith('num_batches_tracked') and not key.startswith(('layer2', 'layer3', 'layer4'))
        assert torch.equal(value, torch.tensor(0) if frozen else weights[key]), key
    features = load(tmp_path / 'out', features_only=True)
    assert torch.equal(features.layer4[0].conv1.weight, weights['layer4.0.conv1.weight'])


def test_network_of_two_checkpoints_needs_a_name(tmp_path):
    weights = {key: torch.zeros(()).expand(shape) for key, shape in GOLDEN['se_cotnetd_152']['state_dict'].items()}
    path = save(weights, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match='say which one it is, with --model se_cotnetd_152.jd_in1k or'):
        convert(path, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('change, message', [
    (lambda weights: weights['bn1.weight'].fill_(float('nan')), 'bn1.weight does not hold finite numbers'),
    (lambda weights: weights['fc.bias'].fill_(float('inf')), 'fc.bias does not hold finite numbers'),
    (lambda weights: weights.update({'fc.bias': weights['fc.bias'].to_sparse()}), 'fc.bias does not hold finite'),
    (lambda weights: weights.pop('bn1.weight'), r'1 differences to its 236 entries:\n  missing: bn1.weight'),
    (lambda weights: weights.update(extra=torch.ones(1)), r'1 differences to its 236 entries:\n  unexpected: extra'),
    (lambda weights: (weights.pop('fc.weight'), weights.pop('fc.bias')), 'fc.weight'),
    (lambda weights: weights.update({'fc.weight': torch.ones(())}), 'fc.weight: a scalar instead of'),
])
def test_weights_that_are_not_whole_are_refused(tmp_path, change, message):
    weights = tiny()
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        convert(save(weights, tmp_path / 'x.pth'), tmp_path / 'out', 'test_cotnet')
    assert not (tmp_path / 'out').exists()


def test_earlier_conversion_is_replaced_and_other_files_stay(tmp_path):
    out = tmp_path / 'out'
    convert(save(tiny(1), tmp_path / 'x.pth'), out)
    (out / 'notes.txt').write_text('mine')
    (out / '.partial-left').mkdir()
    convert(save(tiny(2), tmp_path / 'x.pth'), out)
    assert_holds(out, tiny(2))
    assert sorted(os.listdir(out)) == ['README.md', 'config.json', 'model.safetensors', 'notes.txt']


def exit_code_of_fork(target, *args) -> int:
    """Calls the function in a fork of this process, which ends with this function at the latest."""
    process = multiprocessing.get_context('fork').Process(target=run_in_fork, args=(target, *args), daemon=True)
    process.start()
    try:
        process.join(60)
        assert process.exitcode is not None, 'the fork hangs'
        return process.exitcode
    finally:
        process.kill()
        process.join()


def run_in_fork(target, *args) -> None:
    torch.set_num_threads(1)  # the threads of this process are not forked: an operator that waits for them hangs
    target(*args)


def convert_and_die(path: Path, out: Path, event_index: int) -> None:
    """Converts, and kills this process at an event of the file system inside `out`."""
    count = 0

    def hook(event, args):
        nonlocal count
        if event in ('open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.chmod') and str(out) in str(args[0]):
            if count == event_index:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(hook)
    convert(path, out)


@pytest.mark.slow
def test_killed_at_any_time_nothing_half_written_is_taken_for_whole(tmp_path):
    path, out = save(tiny(2), tmp_path / 'new.pth'), tmp_path / 'out'
    convert(save(training_checkpoint(tiny(1), 'x'), tmp_path / 'old.pth'), out)  # its card differs too
    convert(path, tmp_path / 'expected')
    whole = {tuple(sorted((tmp_path / 'expected' / file).read_bytes() for file in os.listdir(tmp_path / 'expected')))}
    whole.add(tuple(sorted((out / file).read_bytes() for file in os.listdir(out))))
    kills = seen_without = 0
    while True:
        exit_code = exit_code_of_fork(convert_and_die, path, out, kills)
        if exit_code == 0:
            break
        assert exit_code == -signal.SIGKILL
        kills += 1
        if (out / 'model.safetensors').exists():
            names = [name for name in os.listdir(out) if not name.startswith('.partial-')]
            assert tuple(sorted((out / name).read_bytes() for name in names)) in whole
        else:
            seen_without += 1
    assert kills > 10 and seen_without > 0
    assert_holds(out, tiny(2))
    assert sorted(os.listdir(out)) == ['README.md', 'config.json', 'model.safetensors']


def convert_on_a_full_disk(path: Path, out: Path, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.exit(main([str(path), '--output', str(out)]))


@pytest.mark.parametrize('limit', [100, 5000, 100000])
def test_full_disk_leaves_nothing_half_written(tmp_path, capfd, limit):
    path, out = save(tiny(), tmp_path / 'x.pth'), tmp_path / 'out'
    assert exit_code_of_fork(convert_on_a_full_disk, path, out, limit) == 1
    assert 'error: ' in capfd.readouterr().err
    assert os.listdir(out) == []


@pytest.fixture(scope='module')
def downloads(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('downloads')
    save(tiny(3), folder / 'tiny.pth.tar')
    (folder / 'coco').mkdir()
    save(detection_checkpoint(official_state_dict('se_cotnetd_50')), folder / 'coco' / 'model_final.pth')
    (folder / 'page.pth.tar').write_text('<html>Google Drive</html>')
    (folder / 'readme.txt').write_text('no checkpoint')
    return folder


def statuses(rows) -> dict:
    return {row.file: row.status for row in rows}


def test_folder_is_converted_and_resumed(tmp_path, downloads, capsys):
    rows = convert_folder(downloads, tmp_path)
    assert statuses(rows) == {
        'coco/model_final.pth': 'converted', 'page.pth.tar': 'failed', 'tiny.pth.tar': 'converted'}
    assert 'is a web page' in rows[1].reason
    screen = capsys.readouterr().out.splitlines()
    assert len(screen) == 3
    assert screen[0].startswith('[1/3] coco/model_final.pth (') and 'converted: se_cotnetd_50.jd_coco' in screen[0]
    assert sorted(os.listdir(tmp_path)) == ['conversions.json', 'se_cotnetd_50.jd_coco', 'test_cotnet']
    weights = tmp_path / 'test_cotnet' / 'model.safetensors'
    before = weights.stat()

    assert statuses(convert_folder(downloads, tmp_path)) == {
        'coco/model_final.pth': 'done before', 'page.pth.tar': 'failed', 'tiny.pth.tar': 'done before'}
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (tmp_path / 'se_cotnetd_50.jd_coco' / 'model.safetensors').unlink()
    assert statuses(convert_folder(downloads, tmp_path)) == {
        'coco/model_final.pth': 'converted', 'page.pth.tar': 'failed', 'tiny.pth.tar': 'converted'}
    assert_holds(tmp_path / 'test_cotnet', tiny(3))


@pytest.mark.parametrize('value', [
    torch.tensor([1e39], dtype=torch.float64), torch.tensor([1 + 2j]), torch.tensor([float('nan')]),
    torch.zeros(2, 2).to_sparse(), torch.tensor([float('nan')]).to(torch.float8_e4m3fn)])
def test_weights_that_are_no_finite_numbers(value):
    with pytest.raises(CheckpointError, match='fc.bias does not hold finite numbers of single precision'):
        plain_tensor('fc.bias', value)


def test_weights_of_other_dtypes():
    for dtype in (torch.float64, torch.bfloat16, torch.float8_e4m3fn):
        plain = plain_tensor('fc.bias', torch.tensor([1.5, -2.]).to(dtype))
        assert plain.dtype == torch.float32 and plain.tolist() == [1.5, -2.]
    assert plain_tensor('bn1.num_batches_tracked', torch.tensor(3)).dtype == torch.int64


def test_odd_weights_are_a_row(tmp_path):
    downloads = tmp_path / 'in'
    downloads.mkdir()
    save(tiny(3), downloads / 'b.pth')
    save({key: value.to(torch.int8) for key, value in tiny(3).items()}, downloads / 'a.pth')
    assert statuses(convert_folder(downloads, tmp_path / 'out')) == {'a.pth': 'failed', 'b.pth': 'converted'}


@pytest.mark.parametrize('record', ['{"x.pth": ', '[]', '{"x.pth": {}}', '{"x.pth": 3}', '{"x.pth": {"source": {}}}'])
def test_folder_with_a_damaged_record_is_converted_again(record, tmp_path):
    downloads = tmp_path / 'in'
    downloads.mkdir()
    save(tiny(3), downloads / 'x.pth')
    convert_folder(downloads, tmp_path / 'out')
    (tmp_path / 'out' / 'conversions.json').write_text(record)
    assert statuses(convert_folder(downloads, tmp_path / 'out')) == {'x.pth': 'converted'}
    assert statuses(convert_folder(downloads, tmp_path / 'out')) == {'x.pth': 'done before'}


@pytest.fixture
def two_checkpoints(tmp_path) -> Path:
    """A folder with a checkpoint of a network of which two are published."""
    (tmp_path / 'in').mkdir()
    shapes = GOLDEN['se_cotnetd_152']['state_dict']
    save({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}, tmp_path / 'in' / 'x.pth')
    return tmp_path / 'in'


def test_folder_with_a_network_of_two_checkpoints(tmp_path, two_checkpoints):
    row, = convert_folder(two_checkpoints, tmp_path / 'out')
    assert row.status == 'failed' and row.reason.endswith(
        'say which one it is, with --model x.pth=se_cotnetd_152.jd_in1k or --model x.pth=se_cotnetd_152.jd_in1k_320')


@pytest.mark.slow
def test_folder_with_a_network_that_was_named_once(tmp_path, two_checkpoints):
    row, = convert_folder(two_checkpoints, tmp_path / 'out', {'x.pth': 'se_cotnetd_152_L'})
    assert (row.status, row.conversion.name) == ('converted', 'se_cotnetd_152.jd_in1k_320')
    row, = convert_folder(two_checkpoints, tmp_path / 'out')
    assert (row.status, row.conversion.name) == ('done before', 'se_cotnetd_152.jd_in1k_320')
    row, = convert_folder(two_checkpoints, tmp_path / 'out', {'x.pth': 'se_cotnetd_152'})
    assert (row.status, row.conversion.name) == ('converted', 'se_cotnetd_152.jd_in1k')


class Screen(io.StringIO):
    """Kills the process that writes what begins with a text."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def write(self, text: str) -> int:
        if text.startswith(self.text):
            os.kill(os.getpid(), signal.SIGKILL)
        return len(text)


def convert_folder_and_die(folder: Path, out: Path) -> None:
    with contextlib.redirect_stdout(Screen('[2/3]')):
        convert_folder(folder, out)


def test_folder_goes_on_after_a_kill(tmp_path, downloads):
    assert exit_code_of_fork(convert_folder_and_die, downloads, tmp_path / 'out') == -signal.SIGKILL
    assert os.path.exists(tmp_path / 'out' / 'conversions.json')
    rows = convert_folder(downloads, tmp_path / 'out')
    assert [row.status for row in rows] == ['done before', 'failed', 'converted']
    for row in (rows[0], rows[2]):
        folder = tmp_path / 'out' / row.conversion.name
        assert {file: sha256(folder / file) for file in os.listdir(folder)} == row.conversion.digests
    assert_holds(tmp_path / 'out' / 'test_cotnet', tiny(3))


def test_folder_notices_another_file_of_the_same_name(tmp_path):
    downloads = tmp_path / 'in'
    downloads.mkdir()
    save(tiny(3), downloads / 'x.pth')
    assert statuses(convert_folder(downloads, tmp_path / 'out')) == {'x.pth': 'converted'}
    save(tiny(4), downloads / 'x.pth')
    assert statuses(convert_folder(downloads, tmp_path / 'out')) == {'x.pth': 'converted'}
    assert_holds(tmp_path / 'out' / 'test_cotnet', tiny(4))


def test_folder_with_the_same_model_twice(tmp_path):
    downloads = tmp_path / 'in'
    downloads.mkdir()
    save(tiny(3), downloads / 'a.pth')
    save(tiny(4), downloads / 'b.pth')
    rows = convert_folder(downloads, tmp_path / 'out')
    assert statuses(rows) == {'a.pth': 'converted', 'b.pth': 'failed'}
    assert rows[1].reason == 'it is test_cotnet, as is a.pth: remove one, or pass --model b.pth=NAME'
    assert_holds(tmp_path / 'out' / 'test_cotnet', tiny(3))


def test_command_for_a_file(tmp_path, capsys):
    path = save(training_checkpoint(tiny(1), 'x', tiny(2)), tmp_path / 'x.pth.tar')
    assert main([str(path), '--output', str(tmp_path / 'out'), '--no-ema']) == 0
    assert_holds(tmp_path / 'out', tiny(1))
    screen = capsys.readouterr().out
    assert 'model   test_cotnet, found by keys and shapes\n' in screen
    assert 'taken   state_dict of a training checkpoint\n' in screen
    assert f'sha256  {sha256(tmp_path / "out" / "model.safetensors")}  {tmp_path}/out/model.safetensors (' in screen


def test_command_for_a_folder(tmp_path, downloads, capsys):
    arguments = [str(downloads), '--output', str(tmp_path), '--model', 'tiny.pth.tar=test_cotnet']
    assert main(arguments) == 1
    table = capsys.readouterr().out.split('\n\n')[1].splitlines()
    assert [line.split()[:2] for line in table[1:4]] == [
        ['coco/model_final.pth', 'converted'], ['page.pth.tar', 'failed'], ['tiny.pth.tar', 'converted']]
    assert sha256(tmp_path / 'test_cotnet' / 'model.safetensors') in table[3]
    assert sum(line.startswith('not among them: ') and 'https://drive.google.com/' in line for line in table) == 8


@pytest.mark.parametrize('arguments, message', [
    (['missing.pth', '--output', 'out'], "No such file or directory: 'missing.pth'"),
    (['x.pth', '--output', 'out', '--model', 'cotnet50'], 'not those of cotnet50, but fit test_cotnet'),
    (['x.pth', '--output', 'out', '--model', 'resnet50'], 'resnet50 is no model of this package'),
    (['x.pth', '--output', 'out', '--model', 'cotnet50', '--model', 'cotnet101'], '--model is given 2 times'),
    (['x.pth', '--output', 'x.pth'], "File exists: 'x.pth'"),
    (['.', '--output', 'out', '--model', 'cotnet50'], '--model for a folder is FILE=NAME'),
    (['.', '--output', 'out', '--model', 'y=cotnet50'], '--model names y, not among the checkpoints in .: x.pth'),
])
def test_command_says_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    save(tiny(), tmp_path / 'x.pth')
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ['x.pth']


@pytest.mark.parametrize('arguments', [
    [], ['x.pth'], ['--verify', 'x'], ['x.pth', '--verify', 'x', '--data', 'y'],
    ['x.pth', '--output', 'x', '--data', 'y']])
def test_command_says_what_is_missing(capsys, arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert 'error: ' in capsys.readouterr().err
