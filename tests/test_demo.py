"""The demonstration, from an installed package, in short; the weights that come with the package; the digits."""
import json
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from timm.data import resolve_data_config

import timm_cotnet
from timm_cotnet.demo import create_datasets, create_loaders, evaluate, fine_tune, loss_floor, main
from timm_cotnet.digits import write_digits
from timm_cotnet.progress import StopRequest
from timm_cotnet.visualize import load_model

pytest.importorskip('sklearn', reason='the digits come with scikit-learn, of the extra "demo"')
pytest.importorskip('matplotlib', reason='the demonstration draws with matplotlib, of the extra "demo"')

WEIGHTS = Path(timm_cotnet.__file__).parent / 'weights' / 'test_cotnet.digits.safetensors'


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp('digits'))


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*.png'))}


def test_digits_are_a_fixed_stratified_image_folder(digits, tmp_path):
    files = files_below(digits)
    assert files == files_below(write_digits(tmp_path))
    counts = {split: [len(list((digits / split / str(d)).iterdir())) for d in range(10)] for split in ('train', 'val')}
    assert counts == {
        'train': [142, 145, 141, 146, 144, 145, 144, 143, 139, 144],
        'val': [36, 37, 36, 37, 37, 37, 37, 36, 35, 36],
    }
    names = [Path(name).name for name in files]
    assert len(set(names)) == 1797  # each image once: no held-out image among the training images
    with Image.open(digits / 'val' / '0' / '0000.png') as image:
        assert image.mode == 'RGB' and image.size == (32, 32)
        low, high = image.convert('L').getextrema()
        assert low == 0 and high > 240


def test_embedded_weights_read_held_out_digits(digits):
    model = timm.create_model('test_cotnet', pretrained=True)
    assert sum(p.numel() for p in model.parameters()) <= 700_000
    assert model.num_classes == 10
    _, loader = create_loaders(create_datasets(digits), resolve_data_config({}, model=model), batch_size=64)
    accuracy, logits, targets = evaluate(model, loader, torch.device('cpu'))
    assert logits.shape == (364, 10) and len(targets) == 364
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item(), abs=1e-4)
    assert accuracy >= 97


def test_embedded_weights_are_small_finite_float32_and_fit_the_model():
    assert WEIGHTS.stat().st_size <= 2 * 2 ** 20
    state_dict = timm.create_model('test_cotnet').state_dict()
    with safe_open(WEIGHTS, 'pt') as file:
        assert {key: file.get_slice(key).get_shape() for key in file.keys()} == {
            key: list(value.shape) for key, value in state_dict.items()}
        for key in file.keys():
            tensor = file.get_tensor(key)
            assert tensor.dtype == state_dict[key].dtype
            assert tensor.isfinite().all(), key


@torch.inference_mode()
def test_embedded_weights_adapt_as_other_weights_of_timm_do():
    model = timm.create_model('test_cotnet', pretrained=True).eval()
    grey = torch.randn(2, 1, 64, 64)
    images = grey.expand(-1, 3, -1, -1)
    features = model.forward_features(images)

    one_channel = timm.create_model('test_cotnet', pretrained=True, in_chans=1).eval()
    torch.testing.assert_close(one_channel.forward_features(grey), features, rtol=1e-4, atol=1e-4)
    three_classes = timm.create_model('test_cotnet', pretrained=True, num_classes=3).eval()
    assert three_classes(images).shape == (2, 3)
    torch.testing.assert_close(three_classes.forward_features(images), features)
    pyramid = timm.create_model('test_cotnet', pretrained=True, features_only=True, out_indices=(1, 4)).eval()
    maps = pyramid(images)
    assert [level.shape[1] for level in maps] == pyramid.feature_info.channels()
    torch.testing.assert_close(maps[1], features)


@pytest.fixture(scope='module')
def short_run(installed_venv, tmp_path_factory):
    """Folder and printed lines of one epoch of the demonstration."""
    folder = tmp_path_factory.mktemp('demo')
    printed = installed_venv.check_output('-m', 'timm_cotnet.demo', '--epochs', '1', '--output', str(folder))
    return folder, printed


@pytest.mark.slow
def test_demo_fine_tunes_and_says_so(short_run):
    folder, printed = short_run
    numbers = re.search(r'as it comes gets ([\d.]+) % of the held-out digits', printed)
    assert float(numbers[1]) >= 97
    numbers = re.search(r'epoch 1/1: loss ([\d.]+), held-out accuracy ([\d.]+) %', printed)
    assert 0 < float(numbers[1]) < 2
    assert float(numbers[2]) >= 90
    assert re.search(r'logits differ by 0 at most', printed)
    numbers = re.search(r'Accuracy: ([\d.]+) % of the held-out digits', printed)
    assert 90 <= float(numbers[1]) <= 100


@pytest.mark.slow
def test_demo_writes_a_model_that_timm_reads(short_run, digits):
    folder, printed = short_run
    config = json.loads((folder / 'model' / 'config.json').read_text())
    assert config['architecture'] == 'test_cotnet'
    assert config['label_names'] == [str(digit) for digit in range(10)]
    assert 'file' not in config['pretrained_cfg']
    model, _ = load_model(str(folder / 'model'))
    _, loader = create_loaders(create_datasets(digits), resolve_data_config({}, model=model), batch_size=64)
    accuracy, *_ = evaluate(model, loader, torch.device('cpu'))
    printed_accuracy = re.search(r'Accuracy: ([\d.]+) %', printed)[1]
    assert accuracy == pytest.approx(float(printed_accuracy), abs=0.06 + 100 / 364)  # other batches, other rounding
    embedded = timm.create_model('test_cotnet', pretrained=True)
    assert not torch.equal(model.layer1[0].conv1.weight, embedded.layer1[0].conv1.weight)


@pytest.mark.slow
def test_demo_draws_pictures(short_run):
    folder, _ = short_run
    for name, least in (('predictions', 1500), ('training', 800)):
        with Image.open(folder / f'{name}.png') as picture:
            assert picture.width >= least and picture.height >= 350
            assert len(picture.convert('RGB').getcolors(maxcolors=2 ** 24)) > 100


@pytest.mark.slow
def test_demo_prints_commands_that_work(short_run, installed_venv):
    folder, printed = short_run
    command = re.search(r'^  python (-m timm_cotnet.visualize .*)$', printed, flags=re.M)[1]
    assert 'Written: ' in installed_venv.check_output(*shlex.split(command))
    with Image.open(next((folder / 'views').glob('*-filters.png'))) as picture:
        assert picture.width >= 600
    assert '  python -m timm_cotnet.demo --data DIR' in printed.splitlines()


def test_floor_of_the_loss_is_reached_by_the_smoothed_label_only():
    target = torch.tensor([0])
    for num_classes in (2, 10, 1000):
        label = torch.full((1, num_classes), 0.1 / num_classes)
        label[0, 0] += 0.9
        assert F.cross_entropy(label.log(), target, label_smoothing=0.1).item() == pytest.approx(
            loss_floor(num_classes), abs=1e-5)
        for _ in range(5):
            other = label.log() + 0.1 * torch.randn(1, num_classes)
            assert F.cross_entropy(other, target, label_smoothing=0.1) > loss_floor(num_classes)
    assert loss_floor(10) == pytest.approx(0.500, abs=1e-3)  # as the README's demonstration prints it


def own_images(folder, counts):
    """Plain images of one colour, as many as are given for each folder."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new('RGB', (40, 30), (250 if 'red' in name else 20, 8 * index, 90)).save(
                folder / name / f'{index}.png')
    return folder


def test_own_images_with_and_without_a_split(tmp_path):
    split = own_images(tmp_path / 'split', {'train/red': 3, 'train/blue': 4, 'train/green': 2, 'val/red': 2})
    train, val = create_datasets(split)
    assert train.reader.class_to_idx == {'blue': 0, 'green': 1, 'red': 2}
    assert len(train) == 9 and [label for _, label in val.reader.samples] == [2, 2]  # also where val lacks classes

    whole = own_images(tmp_path / 'whole', {'red': 11, 'blue': 4})
    train, val = create_datasets(whole)
    assert [(Path(path).name, label) for path, label in val.reader.samples] == [('4.png', 1), ('9.png', 1)]
    assert len(train) == 13 and not set(train.reader.samples) & set(val.reader.samples)


@pytest.mark.parametrize('counts, message', [
    ({}, 'which is no folder'),
    ({'train/red': 2, 'train/blue': 2, 'val/green': 1}, "val has the class 'green', of which there is no image"),
    ({'train/red': 2}, 'has images of one class only'),
    ({'val/red': 2}, 'val has no folder named train beside it'),
    ({'red': 2, 'blue': 3}, 'has less than 5 images of each class'),
    ({'red': 0}, 'Found 0 images'),
])
def test_own_images_are_refused(counts, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(['--data', str(own_images(tmp_path / 'data', counts)), '--output', str(tmp_path / 'out')])


def test_files_that_are_no_images_are_left_out(tmp_path, capsys):
    data = own_images(tmp_path / 'data', {'red': 11, 'blue': 10})
    (data / 'red' / 'broken.png').write_text('no image')
    train, val = create_datasets(data)
    assert len(train) == 17 and len(val) == 4
    assert '1 of 22 files are no images and left out: ' in capsys.readouterr().err
    for path in data.glob('*/*.png'):
        path.write_bytes(b'')
    with pytest.raises(ValueError, match='data has no image that can be read; .*png is none'):
        create_datasets(data)


def test_classes_of_which_no_image_can_be_read(tmp_path):
    for i, split in enumerate(('', 'train/')):
        held_out = {'val/red': 2} if split else {}
        data = own_images(tmp_path / str(i), {f'{split}red': 11, f'{split}blue': 10, **held_out})
        for path in (data / split / 'blue').iterdir():
            path.write_text('no image')
        with pytest.raises(ValueError, match="has no image of the class 'blue' that can be read"):
            create_datasets(data)


def test_output_would_become_a_class(tmp_path):
    data = own_images(tmp_path / 'data', {'red': 11, 'blue': 10})
    for output in (data, data / 'cotnet-demo'):
        with pytest.raises(SystemExit, match='inside of .*data, whose folders are classes'):
            main(['--data', str(data), '--output', str(output)])
    split = own_images(tmp_path / 'split', {'train/red': 3, 'train/blue': 4, 'val/red': 2})
    create_datasets(split, split / 'out')
    for inside in ('train', 'val'):
        with pytest.raises(ValueError, match=f'inside of .*{inside}, whose'):
            create_datasets(split, split / inside / 'out')


def test_diverged_training_is_told(tmp_path):
    data = own_images(tmp_path / 'data', {'red': 5, 'blue': 5})
    options = ['--data', str(data), '--device', 'cpu', '--img-size', '32', '--epochs', '1', '--lr', '1e30']
    with pytest.raises(SystemExit, match='The training diverged: .* --lr is 1e\\+30, a smaller one may help'):
        main([*options, '--output', str(tmp_path / 'out')])
    assert not (tmp_path / 'out' / 'model').exists()


@pytest.mark.slow
def test_demo_on_own_images(tmp_path, capsys):
    data = own_images(tmp_path / 'data', {'red': 25, 'blue': 25})
    options = ['--data', str(data), '--device', 'cpu', '--epochs', '8', '--output', str(tmp_path / 'out')]
    main(options)
    printed = capsys.readouterr().out
    assert 'Images: 40 to train on, 10 held out' in printed and 'Classes: 2 (blue, red)' in printed
    assert 'Accuracy: 100.0 % of the held-out images' in printed
    assert json.loads((tmp_path / 'out' / 'model' / 'config.json').read_text())['label_names'] == ['blue', 'red']
    assert f'python -m timm_cotnet.demo {shlex.join(options)} --model cotnet50' in printed
    assert not (tmp_path / 'out' / 'digits').exists()


def test_training_stops_when_it_is_asked_to():
    model = timm.create_model('test_cotnet', num_classes=2)
    before = model.fc.weight.detach().clone()
    stop = StopRequest()

    class Loader(list):
        def __iter__(self):
            for index, batch in enumerate(super().__iter__()):
                stop.asked = index == 3  # while the fourth batch is read
                yield batch

    loader = Loader([(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]))] * 9)
    trained = fine_tune(model, loader, loader, 5, 1e-3, torch.device('cpu'), stop)
    assert trained.stopped and len(trained.losses) == 3 and trained.accuracies == []
    assert not torch.equal(trained.model.fc.weight, before)


@pytest.mark.slow
def test_ctrl_c_ends_with_what_there_is(installed_venv, tmp_path):
    process = subprocess.Popen(
        [installed_venv.path / 'bin' / 'python', '-m', 'timm_cotnet.demo', '--epochs', '500', '--output', tmp_path],
        cwd=installed_venv.path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        while not any(line.startswith('  step ') for line in lines):  # piped, there is one after ten seconds
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and 'Traceback' not in errors
    assert 'Stopping after this step' in errors
    assert re.search(r'Accuracy: [\d.]+ % of the held-out digits so far', printed)
    for name in ('model/model.safetensors', 'predictions.png', 'training.png'):
        assert (tmp_path / name).stat().st_size > 10_000
    assert load_model(str(tmp_path / 'model'))[0].num_classes == 10


@pytest.mark.slow
def test_demo_fails_below_the_accuracy_asked_for(tmp_path):
    with pytest.raises(SystemExit, match=r'should be 90.0 % or more'):
        main(['--epochs', '1', '--lr', '0', '--device', 'cpu', '--output', str(tmp_path)])
    assert (tmp_path / 'predictions.png').exists()  # what went wrong can be looked at


@pytest.mark.parametrize('options, message', [
    (['--model', 'no_such_cotnet'], 'no_such_cotnet'),
    (['--model', 'se_cotnetd_200', '--pretrained'], 'No pretrained weights exist for se_cotnetd_200'),
    (['--model', 'resnet18'], 'resnet18 has no CoT layer'),
    (['--batch-size', '1434'], '--batch-size is 1434, expected at most the 1433 training images'),
])
def test_demo_refuses(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main([*options, '--device', 'cpu', '--output', str(tmp_path)])


@pytest.mark.parametrize('device', ['cuda:99', 'no_such_device'])
def test_demo_refuses_a_device_that_is_not_there(device, tmp_path):
    with pytest.raises(SystemExit, match=f'--device is {device}, which cannot be used: '):
        main(['--device', device, '--output', str(tmp_path)])


def test_demo_refuses_a_file_as_output(tmp_path):
    path = tmp_path / 'file'
    path.write_text('mine')
    with pytest.raises(SystemExit, match='--output is .*file, where nothing can be written: '):
        main(['--device', 'cpu', '--output', str(path)])
    assert path.read_text() == 'mine'


def test_demo_refuses_numbers_that_are_too_small_or_large(capsys):
    for option, least in (('epochs', 1), ('batch-size', 2), ('seed', 0)):
        with pytest.raises(SystemExit) as error:
            main([f'--{option}', str(least - 1)])
        assert error.value.code == 2
        assert f'--{option} is {least - 1}, expected {least} or more' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(['--seed', str(2 ** 32)])
    assert 'expected less than 2 ** 32' in capsys.readouterr().err


def test_help_says_what_own_images_are(capsys):
    with pytest.raises(SystemExit):
        main(['--help'])
    assert 'DIR/train/cat/1.jpg' in capsys.readouterr().out


@pytest.mark.slow
def test_failure_is_the_exit_status(installed_venv, tmp_path):
    result = installed_venv.run('-m', 'timm_cotnet.demo', '--model', 'resnet18', '--output', str(tmp_path))
    assert result.returncode == 1
    assert 'resnet18 has no CoT layer' in result.stderr
    assert 'Traceback' not in result.stderr


def test_demo_names_the_missing_extra(monkeypatch, tmp_path):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(SystemExit, match=r'sklearn is not installed; get it by: pip install "timm-cotnet\[demo\]"'):
        main(['--output', str(tmp_path)])
