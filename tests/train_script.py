"""timm's train.py as a module, for tests of what it does with models and recipes."""
import csv
import importlib.util
import os
import sys
from pathlib import Path

import pytest

SCRIPTS = os.environ.get('TIMM_SCRIPTS')
with_scripts = pytest.mark.skipif(
    not SCRIPTS, reason='TIMM_SCRIPTS does not name a folder with timm\'s train.py, validate.py, ...')


def load_train_script():
    """The module, with a parser that no config has touched."""
    spec = importlib.util.spec_from_file_location('timm_train_script', Path(SCRIPTS) / 'train.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_train_script(monkeypatch, output, *options, scaler=None):
    """Trains in this process on the CPU, with a scaler of losses, which the script has on GPUs only; the rows of
    summary.csv."""
    options += ('--device', 'cpu', '--workers', '1', '--output', str(output), '--experiment', 'run')
    monkeypatch.setattr(sys, 'argv', ['train.py', *options])
    script = load_train_script()
    if scaler is not None:
        train_one_epoch = script.train_one_epoch
        script.train_one_epoch = lambda *args, **kwargs: train_one_epoch(*args, **{**kwargs, 'loss_scaler': scaler})
    script.main()
    with (output / 'run' / 'summary.csv').open() as file:
        return list(csv.DictReader(file))
