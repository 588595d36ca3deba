"""Training recipes against the published facts, the parser of timm's train.py, and two steps of real training."""
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from golden import RECIPE_COMMON, VARIANTS
from train_script import load_train_script, run_train_script, with_scripts

from timm_cotnet.digits import write_digits
from timm_cotnet.recipes import RECIPES, main

OFFICIAL = {name: facts['recipe'] for name, facts in VARIANTS.items() if facts.get('recipe')}
OURS = ('finetune', 'modern')


def write(tmp_path, name, *options):
    path = tmp_path / f'{name}.yaml'
    assert main([name, *options, '--output', str(path)]) == 0
    return path


def official_args(name):
    """What the official configuration says, in the words of train.py."""
    recipe = dict(OFFICIAL[name])
    gpus, batch_size = recipe.pop('gpus'), recipe.pop('batch_size_per_gpu')
    return gpus, {**RECIPE_COMMON, **recipe, 'batch_size': batch_size, 'model': name}


def test_official_recipes_are_the_published_ones(tmp_path):
    assert len(OFFICIAL) == 7 and set(RECIPES) == {*OFFICIAL, *OURS}
    for name in OFFICIAL:
        gpus, args = official_args(name)
        assert RECIPES[name].gpus == gpus and RECIPES[name].args == args
        assert yaml.safe_load(write(tmp_path, name).read_text()) == args


@with_scripts
@pytest.mark.parametrize('name', RECIPES)
def test_train_script_reads_recipes(name, tmp_path, monkeypatch):
    """Each name is an option there, and each value has the type that the option gives it."""
    train = load_train_script()
    path = write(tmp_path, name)
    defaults = vars(train.parser.parse_args([]))
    monkeypatch.setattr(sys, 'argv', ['train.py', '--config', str(path)])
    args = vars(train._parse_args()[0])
    expected = official_args(name)[1] if name in OFFICIAL else RECIPES[name].args
    assert {key: args[key] for key in expected} == expected
    assert set(args) == set(defaults)
    assert {key for key in defaults if args[key] != defaults[key]} <= set(expected)
    for action in train.parser._actions:
        if action.dest in expected:
            value = expected[action.dest]
            values = value if action.nargs == '+' else [value]
            assert isinstance(values, list) and all(type(v) is (action.type or type(v)) for v in values), action.dest
            assert action.type is not None or type(value) in (bool, str)


@pytest.mark.parametrize('name, options, batch_size, lr', [
    ('cotnet50', ('--gpus', '4', '--batch-size', '64'), 64, 0.1),
    ('cotnet50', ('--gpus', '2', '--batch-size', '32', '--grad-accum-steps', '10'), 32, 0.25),
    ('cotnet101', ('--nodes', '2'), 56, 0.35),
    ('modern', ('--gpus', '1'), 256, 0.005 / 8 ** 0.5),
    ('modern', ('--gpus', '2'), 256, 0.0025),  # an adaptive optimizer: by the root of 4
    ('finetune', ('--batch-size', '16', '--num-classes', '7', '--model', 'se_cotnetd_50'), 16, 0.00025),
])
def test_learning_rate_is_scaled(name, options, batch_size, lr, tmp_path):
    args = yaml.safe_load(write(tmp_path, name, *options).read_text())
    assert (args['batch_size'], args['lr']) == (batch_size, pytest.approx(lr, rel=1e-5))
    assert ('aug_repeats' in args) == (name == 'modern' and options != ('--gpus', '1'))
    changed = {key for key in args if args[key] != RECIPES[name].args.get(key)} - {'batch_size', 'lr'}
    given = {'--grad-accum-steps': 'grad_accum_steps', '--num-classes': 'num_classes', '--model': 'model'}
    assert changed == {given[option] for option in options if option in given}
    if name == 'finetune':
        assert (args['model'], args['num_classes']) == ('se_cotnetd_50', 7)


def test_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == list(RECIPES)
    assert '8 x  80 images, sgd   0.25    350 epochs  as published' in lines[0]
    for options, command in (
            (['--gpus', '4', '--batch-size', '64'], 'torchrun --nproc-per-node 4 train.py'),
            (['--gpus', '1'], 'python train.py'),
            (['--nodes', '2'], 'torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 '
                               'train.py')):
        (tmp_path / 'cotnet50.yaml').unlink(missing_ok=True)
        assert main(['cotnet50', *options]) == 0
        assert f'  {command} --config cotnet50.yaml --data-dir DIR\n' in capsys.readouterr().out
    assert main(['modern', '--output', 'a b.yaml']) == 0
    assert "--config 'a b.yaml' --data-dir DIR" in capsys.readouterr().out
    assert (tmp_path / 'cotnet50.yaml').read_text().startswith(
        '# cotnet50 of timm_cotnet, as published. Images in a step: 1280, GPUs: 16\n')


@pytest.mark.parametrize('argv, message', [
    (['cotnet5'], "there is no recipe 'cotnet5'; there are cotnet50, "),
    (['cotnet50', '--gpus', '0'], '--gpus is 0, expected 1 or more'),
    (['finetune', '--num-classes', '0'], '--num-classes is 0, expected 1 or more'),
    (['modern', '--output', '/no/such/folder.yaml'], '--output is /no/such/folder.yaml, which cannot be written: '),
    (['cotnet50', '--batch-size', '-8'], '--batch-size is -8, expected 1 or more'),
    (['cotnet50', '--grad-accum-steps', '0'], '--grad-accum-steps is 0, expected 1 or more'),
    (['modern', '--model', 'cotnet5'], "timm knows no model 'cotnet5'"),
    (['modern', '--model', 'cotnet50.nonsense'], '--model is cotnet50.nonsense: Invalid pretrained tag'),
    (['modern', '--output', __file__], 'test_recipes.py exists; remove it or name another file by --output'),
])
def test_wrong_arguments_are_named(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture(scope='module')
def sixteen_digits(tmp_path_factory) -> Path:
    """Two steps of eight images."""
    full, few = write_digits(tmp_path_factory.mktemp('digits')), tmp_path_factory.mktemp('few')
    for digit in range(8):
        folder = few / 'train' / str(digit)
        folder.mkdir(parents=True)
        for path in sorted((full / 'train' / str(digit)).glob('*.png'))[:2]:
            shutil.copy(path, folder)
    return few


@pytest.mark.slow
@with_scripts
@pytest.mark.parametrize('name', RECIPES)
def test_two_steps(name, sixteen_digits, tmp_path, monkeypatch):
    """In networks of few blocks: each train.py run writes weights and their moving average."""
    model = 'test_cotnet' if name == 'finetune' else RECIPES[name].args['model']  # whose weights are in the package
    path = write(tmp_path, name, '--gpus', '1', '--batch-size', '8', '--num-classes', '10', '--model', model)
    options = [
        '--config', str(path), '--data-dir', str(sixteen_digits), '--val-split', '', '--epochs', '1',
        '--warmup-epochs', '0', '--img-size', '64']
    options += ['--train-img-sizes', '32', '64'] if name == 'finetune' else ['--model-kwargs', 'layers=(1,1,1,1)']
    rows = run_train_script(monkeypatch, tmp_path, *options)
    assert len(rows) == 1 and 0 < float(rows[0]['train_loss']) < 20
    used = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())
    changed = {'batch_size', 'lr', 'model', 'epochs', 'warmup_epochs', 'train_img_sizes', 'aug_repeats'}
    assert {key: used[key] for key in RECIPES[name].args if key not in changed} == {
        key: value for key, value in RECIPES[name].args.items() if key not in changed}
    checkpoint = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False)
    weights = checkpoint['state_dict']
    torch.manual_seed(0)
    fresh = timm.create_model(model, num_classes=10, pretrained=name == 'finetune', **(
        {} if name == 'finetune' else dict(layers=(1, 1, 1, 1))))
    assert list(weights) == list(fresh.state_dict())
    assert all(value.isfinite().all() for value in weights.values())
    assert weights['bn1.num_batches_tracked'] - fresh.bn1.num_batches_tracked == 2
    assert ('state_dict_ema' in checkpoint) == RECIPES[name].args.get('model_ema', False)
