"""timm's own scripts, unchanged, with models that only the installed package makes known to them."""
import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from helpers import needs_cpp_compiler
from safetensors.torch import load_file
from train_script import SCRIPTS, with_scripts

from timm_cotnet.digits import write_digits

pytestmark = [pytest.mark.slow, with_scripts]
MODEL = ('--model', 'test_cotnet', '--num-classes', '10')
CPU = ('--device', 'cpu')


@pytest.fixture(scope='module')
def script(installed_venv, tmp_path_factory):
    """Runs a script outside the checkout and returns all that it printed."""
    folder = tmp_path_factory.mktemp('scripts')
    for path in Path(SCRIPTS).glob('*.py'):  # a copy, as a folder `timm` beside them would hide the installed timm
        shutil.copy(path, folder)

    def run(name: str, *args: str, launcher: tuple[str, ...] = ()) -> str:
        result = installed_venv.run(*launcher, str(folder / name), *args, env={'OMP_NUM_THREADS': '1'}, timeout=600)
        printed = result.stderr + result.stdout  # what a script reports as JSON comes last
        print(printed)
        assert result.returncode == 0, f'{name} {" ".join(args)} failed'
        return printed

    return run


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp('digits'))


def train_args(digits: Path, output: Path, epochs: int) -> tuple[str, ...]:
    return (
        '--data-dir', str(digits), *MODEL, *CPU, '--workers', '1', '--batch-size', '64', '--no-aug', '--opt', 'adamw',
        '--lr', '1e-3', '--warmup-epochs', '0', '--cooldown-epochs', '0', '--epochs', str(epochs),
        '--model-ema', '--model-ema-decay', '0.9', '--output', str(output), '--experiment', 'run',
    )


def read_summary(run: Path) -> list[dict[str, str]]:
    with (run / 'summary.csv').open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def trained(script, digits, tmp_path_factory) -> Path:
    """Output folder of train.py: two epochs from random weights, with EMA."""
    output = tmp_path_factory.mktemp('train')
    script('train.py', *train_args(digits, output, epochs=2))
    return output / 'run'


def top1(printed: str) -> float:
    """The accuracy in the JSON that ends what validate.py prints."""
    return json.loads(printed.split('--result')[1])['top1']


def test_train_learns_and_keeps_checkpoints(trained):
    rows = read_summary(trained)
    assert [row['epoch'] for row in rows] == ['0', '1']
    losses = [float(row['train_loss']) for row in rows]
    assert losses[1] < losses[0] < 3
    assert float(rows[1]['eval_top1']) > 40
    for name in ('last.pth.tar', 'model_best.pth.tar', 'checkpoint-0.pth.tar', 'checkpoint-1.pth.tar'):
        assert (trained / name).stat().st_size > 1e6, name


def test_train_resumes(script, digits, trained, tmp_path):
    args = train_args(digits, tmp_path, epochs=3)
    printed = script('train.py', *args, '--resume', str(trained / 'last.pth.tar'))
    rows = read_summary(tmp_path / 'run')
    assert [row['epoch'] for row in rows] == ['2']
    assert float(rows[0]['train_loss']) < float(read_summary(trained)[1]['train_loss'])
    assert 'Loaded checkpoint' in printed


def test_train_fine_tunes_embedded_weights_in_mixed_precision(script, digits, tmp_path):
    script('train.py', *train_args(digits, tmp_path, epochs=1), '--pretrained', '--amp', '--amp-dtype', 'bfloat16')
    assert float(read_summary(tmp_path / 'run')[0]['eval_top1']) >= 95


def test_torchrun_children_know_the_models(script, digits):
    # Not train.py: it gives DistributedDataParallel a `device_ids` that torch refuses for every model on the CPU.
    printed = script(
        'validate.py', '--data-dir', str(digits), *MODEL, *CPU, '--pretrained', '--workers', '1', '--batch-size', '91',
        launcher=('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2'))
    assert [float(accuracy) >= 97 for accuracy in re.findall(r'"top1": ([\d.]+)', printed)] == [True, True]


@pytest.mark.parametrize('options', [
    (),
    ('--reparam',),
    ('--torchscript',),
    ('--reparam', '--torchscript'),
    ('--channels-last',),
    ('--amp', '--amp-dtype', 'bfloat16'),
    ('--model-dtype', 'bfloat16'),
    pytest.param(('--torchcompile',), marks=needs_cpp_compiler),
], ids=' '.join)
def test_validate(script, digits, options):
    printed = script(
        'validate.py', '--data-dir', str(digits), *MODEL, *CPU, '--pretrained', '--workers', '1', '--batch-size', '91',
        *options)
    assert top1(printed) >= 97


def test_validate_reads_checkpoints(script, digits, trained):
    args = ('--data-dir', str(digits), *MODEL, *CPU, '--workers', '1', '--batch-size', '91')
    printed = script('validate.py', *args, '--checkpoint', str(trained / 'last.pth.tar'), '--use-ema')
    assert top1(printed) == pytest.approx(float(read_summary(trained)[1]['eval_top1']), abs=0.3)


def test_inference(script, digits, tmp_path):
    pytest.importorskip('pandas', reason='inference.py needs pandas')
    script(
        'inference.py', '--data-dir', str(digits / 'val'), *MODEL, *CPU, '--pretrained', '--workers', '1',
        '--batch-size', '91', '--results-dir', str(tmp_path), '--results-file', 'digits', '--label-type', 'none',
        '--include-index')
    with (tmp_path / 'digits.csv').open() as file:
        rows = list(csv.DictReader(file))
    digit_of = {path.name: path.parent.name for path in (digits / 'val').glob('*/*.png')}
    assert {row['filename'] for row in rows} == set(digit_of)
    assert sum(row['index'] == digit_of[row['filename']] for row in rows) >= 0.97 * 364
    assert all(0.1 <= float(row['prob']) <= 1 for row in rows)


def test_benchmark(script, tmp_path):
    printed = script(
        'benchmark.py', *MODEL, *CPU, '--batch-size', '4', '--num-warm-iter', '1', '--num-bench-iter', '5',
        '--bench', 'both')
    result = json.loads(printed.split('--result')[1])
    assert result['param_count'] == pytest.approx(0.2, abs=0.01)
    assert result['infer_samples_per_sec'] > 0 and result['train_samples_per_sec'] > 0


def test_average_and_clean_checkpoints(script, digits, trained, tmp_path):
    average, clean = tmp_path / 'average.safetensors', tmp_path / 'clean.safetensors'
    script(
        'avg_checkpoints.py', '--input', str(trained), '--filter', 'checkpoint-*.pth.tar', '--output', str(average),
        '-n', '2', '--safetensors')
    script(
        'clean_checkpoint.py', '--checkpoint', str(trained / 'last.pth.tar'), '--output', str(clean), '--no-hash',
        '--safetensors')
    first, last = (
        torch.load(trained / f'checkpoint-{epoch}.pth.tar', weights_only=False)['state_dict_ema'] for epoch in (0, 1))
    averaged, cleaned = load_file(average), load_file(clean)
    assert set(averaged) == set(cleaned) == set(last)
    torch.testing.assert_close(averaged['fc.weight'], (first['fc.weight'] + last['fc.weight']) / 2)
    for key, value in last.items():
        torch.testing.assert_close(cleaned[key], value)
    model = timm.create_model('test_cotnet', checkpoint_path=clean)
    assert torch.equal(model.fc.bias, last['fc.bias'])
    printed = script(
        'validate.py', '--data-dir', str(digits), *MODEL, *CPU, '--workers', '1', '--batch-size', '91', '--checkpoint',
        str(clean))
    assert top1(printed) == pytest.approx(float(read_summary(trained)[1]['eval_top1']), abs=0.3)


@pytest.mark.parametrize('options', [(), ('--reparam',), ('--dynamo',)], ids=' '.join)
def test_onnx_export(script, tmp_path, options):
    for name in ('onnx', 'onnxruntime', 'onnxscript'):
        pytest.importorskip(name, reason=f'onnx_export.py needs {name}')
    path = tmp_path / 'test_cotnet.onnx'
    script('onnx_export.py', str(path), '--model', 'test_cotnet', '--check-forward', *options)
    assert path.stat().st_size > 1e5
