"""The demonstration, from an installed package, in short; the weights that come with the package; the digits."""
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from timm.data import resolve_data_config

import timm_cotnet
from timm_cotnet.demo import create_loaders, evaluate, first_contexts, load_folder, main
from timm_cotnet.digits import write_digits

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
    _, loader = create_loaders(digits, resolve_data_config({}, model=model), batch_size=64)
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
    model = load_folder(folder / 'model')
    _, loader = create_loaders(digits, resolve_data_config({}, model=model), batch_size=64)
    accuracy, *_ = evaluate(model, loader, torch.device('cpu'))
    printed_accuracy = re.search(r'Accuracy: ([\d.]+) %', printed)[1]
    assert accuracy == pytest.approx(float(printed_accuracy), abs=0.06 + 100 / 364)  # other batches, other rounding
    embedded = timm.create_model('test_cotnet', pretrained=True)
    assert not torch.equal(model.layer1[0].conv1.weight, embedded.layer1[0].conv1.weight)


@pytest.mark.slow
def test_demo_draws_a_picture(short_run):
    folder, _ = short_run
    with Image.open(folder / 'predictions.png') as picture:
        assert picture.width >= 1000 and picture.height >= 400
        assert len(picture.convert('RGB').getcolors(maxcolors=2 ** 24)) > 100


def test_contexts_of_the_picture_are_those_of_the_first_cot_layer():
    model = timm.create_model('test_cotnet', pretrained=True).eval()
    images = torch.rand(3, 3, 64, 64)
    layer = model.layer1[0].conv2
    outputs = []
    handle = layer.key_embed.register_forward_hook(lambda module, args, output: outputs.append(output))
    static, dynamic = first_contexts(model, images)
    handle.remove()
    assert static.shape == dynamic.shape == (3, 16, 16)
    torch.testing.assert_close(static, outputs[0].norm(dim=1))
    assert dynamic.std() > 0
    assert not layer._forward_pre_hooks


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


def test_demo_refuses_less_than_one_epoch(capsys):
    with pytest.raises(SystemExit) as error:
        main(['--epochs', '0'])
    assert error.value.code == 2
    assert '--epochs is 0, expected 1 or more' in capsys.readouterr().err


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
