"""The training command, small: its output, what it refuses, resuming, several processes."""
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

from timm_cotnet.detection import maskrcnn_cotnet_fpn, train
from timm_cotnet.detection.shapes import write_shapes
from timm_cotnet.detection.state import StateError, load_state, save_detector, save_state
from timm_cotnet.detection.train import SETTINGS, differing_names, main, parse_args

pytest.importorskip('faster_coco_eval', reason='faster-coco-eval is of the extra "detection"')

SMALL = ('min_size=64', 'max_size=96', 'box_batch_size_per_image=4', 'rpn_post_nms_top_n_train=20',
         'rpn_post_nms_top_n_test=4')


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp('shapes'), train=8, val=2)


def arguments(data, output, *more, model='maskrcnn_cotnet_fpn'):
    return [
        '--data', str(data), '--output', str(output), '--model', model, '--backbone', 'test_cotnet', '--device', 'cpu',
        '--workers', '0', '--batch-size', '4', '--log-interval', '1', '--save-interval', '1', *more, '--model-kwargs',
        *SMALL]


def run(*args, processes=1):
    """A process of its own that does the command; its output as text."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), '-m', 'timm_cotnet.detection.train', *args]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def finished(process):
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def losses(printed):
    return {int(i): float(loss) for i, loss in re.findall(r'^iteration (\d+)/\d+: loss ([\d.]+)', printed, flags=re.M)}


@pytest.mark.slow
def test_run_and_evaluation_of_what_it_wrote(shapes, tmp_path, capsys):
    main(arguments(shapes, tmp_path, '--epochs', '1', '--amp'))
    printed = capsys.readouterr().out
    assert list(losses(printed)) == [1, 2]
    metrics = json.loads(printed.splitlines()[-1])
    assert list(metrics) == [f'{kind}_{name}' for kind in ('box', 'mask') for name in ('AP', 'AP50', 'AP75')]
    assert all(0 <= value <= 1 for value in metrics.values())
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['categories'] == {'1': 'circle', '2': 'square', '3': 'triangle'} and config['num_classes'] == 4
    assert {path.name for path in tmp_path.iterdir()} == {
        'config.json', 'model.safetensors', 'predictions.png', 'state.pth'}
    with Image.open(tmp_path / 'predictions.png') as file:
        assert file.width > 700  # two images
    trained = load_file(tmp_path / 'model.safetensors')
    assert all(value.isfinite().all() for value in trained.values())

    main(['--data', str(shapes), '--output', str(tmp_path), '--eval', '--device', 'cpu', '--workers', '0'])
    again = capsys.readouterr().out
    assert not losses(again) and json.loads(again.splitlines()[-1]) == metrics
    model = maskrcnn_cotnet_fpn('test_cotnet', weights=tmp_path, num_classes=4)  # as a user loads it
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items() if 'num_batch' not in key)
    with pytest.raises(SystemExit, match=r'which holds state\.pth of a run: go on with it by --resume'):
        main(arguments(shapes, tmp_path, '--epochs', '1'))
    with pytest.raises(SystemExit, match="another run: .*model was 'maskrcnn_cotnet_fpn' and is 'fasterrcnn"):
        main(arguments(shapes, tmp_path, '--epochs', '1', '--resume', '--amp', model='fasterrcnn_cotnet_fpn'))
    with pytest.raises(SystemExit, match='holds weights of maskrcnn_cotnet_fpn'):
        main(arguments(shapes, tmp_path, '--eval', model='cascade_mask_rcnn_cotnet_fpn'))


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_result(shapes, tmp_path):
    whole = finished(run(*arguments(shapes, tmp_path / 'whole', '--epochs', '3')))
    args = arguments(shapes, tmp_path / 'killed', '--epochs', '3')
    process = run(*args)
    for line in process.stdout:
        if line.startswith('iteration 3/'):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = finished(run(*args, '--resume'))
    assert re.search(r'Resumed after iteration [23]$', resumed, flags=re.M)
    expected, found = (load_file(tmp_path / name / 'model.safetensors') for name in ('whole', 'killed'))
    assert all(torch.equal(expected[key], found[key]) for key in expected) and len(expected) == len(found)
    assert losses(resumed).items() <= losses(whole).items()
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_share_the_work(shapes, tmp_path):
    args = ('--epochs', '1', '--lr', '1e-9')  # a batch is padded to its largest image: here all are of one size
    alone, together = (
        finished(run(*arguments(shapes, tmp_path / str(processes), *args), 'fixed_size=(64,64)', processes=processes))
        for processes in (1, 2))
    assert list(losses(together)) == [1, 2] and 'in 2 processes' in together
    first, second = (load_file(tmp_path / name / 'model.safetensors') for name in '12')
    names = [name for name in first if name.startswith('backbone') and 'running' in name]  # over the images of both
    assert len(names) > 20
    for name in names:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4, msg=name)
    assert set(json.loads(together.splitlines()[-1])) == set(json.loads(alone.splitlines()[-1]))


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """Folder of a detector as a run writes it."""
    folder = tmp_path_factory.mktemp('detector')
    kwargs = dict(min_size=64, max_size=96, rpn_post_nms_top_n_test=4)
    model = maskrcnn_cotnet_fpn('test_cotnet', weights_backbone=None, num_classes=4, norm='frozen', **kwargs)
    save_detector(folder, model, dict(
        detector='maskrcnn_cotnet_fpn', backbone='test_cotnet', num_classes=4,
        categories={1: 'circle', 2: 'square', 3: 'triangle'}, image_mean=[0.5] * 3, image_std=[0.2] * 3,
        made=dict(norm='frozen', model_kwargs=kwargs)))
    return folder


def not_evaluated(model, *_):
    model.eval()
    return dict(box_AP=0.5)


def evaluation(data, detector, output):
    return ['--data', str(data), '--eval', '--weights', str(detector), '--output', str(output), '--device', 'cpu',
            '--workers', '0']


def test_evaluation_looks_first_whether_it_can_write(shapes, detector, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(train, 'evaluate', lambda *args: pytest.fail('evaluated'))
    with pytest.raises(SystemExit, match='--output is .*file, where nothing can be written: '):
        main(evaluation(shapes, detector, tmp_path / 'file'))


def test_numbers_are_printed_before_the_picture_is_drawn(shapes, detector, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, 'evaluate', not_evaluated)
    main(evaluation(shapes, detector, tmp_path))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == dict(box_AP=0.5)
    (tmp_path / 'predictions.png').unlink()
    (tmp_path / 'predictions.png').mkdir()
    with pytest.raises(SystemExit, match=r'predictions\.png cannot be written: '):
        main(evaluation(shapes, detector, tmp_path))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == dict(box_AP=0.5)


def test_other_names_of_classes_are_noticed(detector, tmp_path, monkeypatch, capsys):
    data = write_shapes(tmp_path / 'shapes', train=4, val=1)
    for path in (data / 'annotations').iterdir():
        content = json.loads(path.read_text())
        content['categories'][1]['name'], content['categories'][2]['name'] = 'triangle', 'square'
        path.write_text(json.dumps(content))
    message = "2 is 'square' in the weights and 'triangle' in the data, 3 is 'triangle' in the weights"
    with pytest.raises(SystemExit, match=message):
        main(evaluation(data, detector, tmp_path / 'output'))
    monkeypatch.setattr(train, 'fit', lambda *args: None)
    monkeypatch.setattr(train, 'evaluate', not_evaluated)
    main([option for option in evaluation(data, detector, tmp_path / 'output') if option != '--eval'])
    assert f'other classes than {data}/annotations/instances_val.json: {message}' in capsys.readouterr().err


@pytest.mark.parametrize('stored, names, differing', [
    (None, {1: 'a'}, []),
    ({'1': 'a', '2': 'b'}, {2: 'b'}, []),
    ({'1': 'a'}, {1: '7'}, []),  # the data have no names
    ({'1': '7'}, {1: '8'}, [(1, '7', '8')]),
    ({'1': 'a', '2': 'b', '4': 'd'}, {1: 'a', 3: 'c', 4: 'd'}, [(3, None, 'c')]),
    (['__background__', 'a', 'N/A', 'c'], {1: 'a', 3: 'b'}, [(3, 'c', 'b')]),
])
def test_differing_names(stored, names, differing):
    assert differing_names(stored, names) == differing


def test_arguments_of_the_detector_are_added_to_those_it_was_made_with(shapes, detector, tmp_path):
    args = evaluation(shapes, detector, tmp_path)
    stored = dict(min_size=64, max_size=96, rpn_post_nms_top_n_test=4)
    assert parse_args(args).model_kwargs == stored
    added = parse_args([*args, '--model-kwargs', 'max_size=80', 'box_score_thresh=0.1']).model_kwargs
    assert added == stored | dict(max_size=80, box_score_thresh=0.1)


@pytest.mark.parametrize('options, message', [
    (['--device', 'no_such_device'], '--device is no_such_device, which cannot be used: '),
    (['--backbone', 'no_such_backbone'], 'maskrcnn_cotnet_fpn on no_such_backbone cannot be made: '),
    (['--resume'], r'state\.pth does not exist, so there is no run to resume'),
    (['--eval'], "weights is '.*output'; it may be .* no folder"),
    (['--weights', 'none'], "weights is 'none'; it may be .* no folder"),
])
def test_refuses_before_it_writes(shapes, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        main([*arguments(shapes, tmp_path / 'output'), *options])
    assert not (tmp_path / 'output').exists() or not list((tmp_path / 'output').iterdir())


@pytest.mark.parametrize('options, message', [
    (['--batch-size', '0'], '--batch-size is 0, expected more than 0'),
    (['--epochs', '-1'], '--epochs is -1.0, expected more than 0'),
    (['--epochs', 'inf'], '--epochs is inf, expected more than 0'),
    (['--lr', 'inf'], '--lr is inf, expected more than 0'),
    (['--workers', '-1'], '--workers is -1, expected 0 or more'),
    (['--seed', str(2 ** 32)], '--seed is 4294967296, expected 0 or more, and less than 2 ** 32'),
    (['--model', 'maskrcnn'], 'invalid choice'),
])
def test_refuses_options(shapes, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        main([*arguments(shapes, tmp_path), *options])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_bad_data_ends_in_its_name_and_nothing_is_written(tmp_path):
    data = write_shapes(tmp_path / 'shapes', train=4, val=1)
    path = data / 'annotations' / 'instances_train.json'
    content = json.loads(path.read_text())
    content['annotations'][2]['category_id'] = 9
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r'instances_train\.json: annotations\[2\] is .*one of its categories'):
        main(arguments(data, tmp_path / 'output'))
    content['annotations'][2]['category_id'] = 4
    content['categories'].append(dict(id=4, name='star'))
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match='different categories: .*star'):
        main(arguments(data, tmp_path / 'output'))
    assert not (tmp_path / 'output').exists()


@pytest.mark.slow
def test_damaged_image_is_named_by_a_worker_and_the_state_stays(tmp_path):
    data = write_shapes(tmp_path / 'shapes', train=4, val=1)
    path = data / 'train' / '000003.png'
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SystemExit, match=r'DataError: .*000003\.png cannot be read as an image'):
        main([*arguments(data, tmp_path / 'output', '--epochs', '2'), '--workers', '1'])
    assert not list((tmp_path / 'output').iterdir())


def test_missing_extra_is_named(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(SystemExit, match=r'get it by: pip install "timm-cotnet\[detection\]"'):
        main(arguments(shapes, tmp_path))


def test_resuming_needs_the_same_start_of_the_backbone(shapes, tmp_path):
    args = arguments(shapes, tmp_path, '--epochs', '1', '--no-pretrained-backbone', '--resume')
    settings = {name: getattr(parse_args(args), name) for name in SETTINGS}
    save_state(tmp_path, 1, settings | dict(pretrained_backbone=True))
    with pytest.raises(SystemExit, match='another run: .*pretrained_backbone was True and is False'):
        main(args)


def test_state_is_whole_or_refused(tmp_path):
    model = torch.nn.Linear(2, 2)
    save_state(tmp_path, 7, dict(seed=1), model=model)
    other = torch.nn.Linear(2, 2)
    assert load_state(tmp_path, dict(seed=1), model=other) == 7
    assert torch.equal(model.weight, other.weight)
    with pytest.raises(StateError, match='belongs to another run: seed was 1 and is 2'):
        load_state(tmp_path, dict(seed=2), model=other)
    path = tmp_path / 'state.pth'
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StateError, match=r'state\.pth is no state of a run'):
        load_state(tmp_path, dict(seed=1), model=other)
