"""timm's own model tests, run on every model of the plugin.

The source distribution of the installed timm is fetched from the package index, and its `tests/test_models.py` run on
our models, with our module added to its list of modules that have `forward_intermediates`. Left out: what downloads
from the Hub (`test_model_inference` and the tests of pretrained weights).
"""
import os
import re
import subprocess
import sys
import tarfile

import pytest
import timm

WEIGHTS_FROM_THE_HUB = ('test_model_inference', 'test_model_load_pretrained', 'test_model_features_pretrained')


@pytest.fixture(scope='module')
def suite(tmp_path_factory):
    """Folder with timm's test file."""
    folder = tmp_path_factory.mktemp('timm')
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm', '--dest', '.']
    download = subprocess.run([*command, f'timm=={timm.__version__}'], cwd=folder, capture_output=True, text=True)
    if download.returncode and 'CI' not in os.environ:
        pytest.skip(f'the package index could not be reached: {download.stderr.strip()[-300:]}')
    assert download.returncode == 0, download.stderr
    with tarfile.open(next(folder.glob('timm-*.tar.gz'))) as archive:
        member = next(name for name in archive.getnames() if name.endswith('/tests/test_models.py'))
        text = archive.extractfile(member).read().decode()
    text, replaced = re.subn(r'^FEAT_INTER_FILTERS = \[', "FEAT_INTER_FILTERS = ['cotnet', ", text, flags=re.M)
    assert replaced == 1
    (folder / 'test_models.py').write_text(text)
    return folder


def run_suite(folder, *selections: str) -> int:
    """Runs the tests of each selection of models, all at the same time; returns how many passed."""
    excluded = ' and '.join(f'not {name}' for name in WEIGHTS_FROM_THE_HUB)
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path)), 'OMP_NUM_THREADS': '1'}
    # loading the package as a plugin of pytest registers the models where it is not installed
    command = [sys.executable, '-m', 'pytest', '-p', 'timm_cotnet', '-p', 'no:cacheprovider', '-q', '-W', 'ignore']
    processes = [
        subprocess.Popen(
            [*command, 'test_models.py', '-k', f'({models}) and {excluded}'],
            cwd=folder, env=env, stdout=subprocess.PIPE, text=True) for models in selections
    ]
    passed = 0
    for process in processes:
        output = process.communicate()[0]
        assert process.returncode == 0, output[-5000:]
        summary = output.strip().splitlines()[-1]
        assert 'skipped' not in summary, summary
        passed += int(re.search(r'(\d+) passed', summary)[1])
    return passed


@pytest.mark.slow
def test_tiny_model(suite):
    assert run_suite(suite, 'test_cotnet') >= 10


@pytest.mark.slow
def test_all_models(suite):
    half = 'se_cotnetd_270 or se_cotnetd_101 or cotnext101 or cotnet50'
    assert run_suite(suite, half, f'(cotnet or cotnext) and not (test_cotnet or {half})') >= 90
