"""Registration without an import, in a real environment of its own (`installed_venv`), one process per case.

Cases that need the real timm pay seconds for importing torch. The others run against a stand-in for timm and for the
models: `timm.models.registered` is its registry, to which `timm_cotnet.cotnet` adds a name.
"""
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from zipfile import ZipFile

import pytest

from conftest import ROOT, Environment

STAND_IN = {
    'timm/__init__.py': 'from .models import registered',
    'timm/models/__init__.py': 'registered = []',
    'timm/models/resnet.py': '',
    'timm_cotnet/__init__.py': 'from . import cotnet',
    'timm_cotnet/cotnet.py': "from timm.models import registered\nregistered.append('cotnet50')",
}
ROOT_FILES = {'_timm_cotnet_autoload.py', 'timm_cotnet.pth', 'timm_cotnet.start'}
WARNING = 'RuntimeWarning: timm-cotnet could not register its models'


def write_files(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder


@pytest.fixture
def stand_in(installed_venv, tmp_path):
    """Runs code in the installed environment, with the stand-in in place of timm and of the models."""

    def run(code: str, *options: str, files: dict[str, str] | None = None, **variables: str):
        path = write_files(tmp_path, STAND_IN | (files or {}))
        return installed_venv.run(*options, '-c', textwrap.dedent(code), env={'PYTHONPATH': str(path)} | variables)

    return run


def assert_prints(result: subprocess.CompletedProcess, expected: str) -> None:
    """Asserts that a process succeeded and printed this, and nothing else."""
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, expected, '')


def real_models(environment: Environment, before: str = '', **kwargs) -> list[str]:
    """What the real timm lists as `cotnet*` in a new process, after some lines of code."""
    code = f"import json\n{before}\nimport timm\nprint(json.dumps(timm.list_models('cotnet*')))"
    return json.loads(environment.check_output('-c', code, **kwargs).splitlines()[-1])


# The real timm


def test_timm_knows_the_models(installed_venv):
    code = '''
        import importlib, importlib.resources, inspect, json, pickle, pkgutil, sys
        import timm
        listed = timm.list_models('cotnet*')
        model = timm.create_model('cotnet50')
        models = timm.models
        spec = models.__spec__
        normal = [
            type(models.__loader__).__name__,
            spec.loader is models.__loader__,
            'exec_module' in vars(spec.loader),
            'create_model' in inspect.getsource(models),
            importlib.resources.files(models).joinpath('resnet.py').is_file(),
            pickle.loads(pickle.dumps(spec)).origin == spec.origin,
            'resnet' in {module.name for module in pkgutil.iter_modules(models.__path__)},
            importlib.util.find_spec('timm.models') is spec,
        ]
        importlib.reload(models)
        print(json.dumps({
            'listed': listed,
            'parameters': sum(p.numel() for p in model.parameters()),
            'normal': normal,
            'after reload': timm.list_models('cotnet*'),
            'loader after reload': 'exec_module' in vars(models.__loader__),
            'file': sys.modules['timm_cotnet'].__file__,
        }))
    '''
    seen = json.loads(installed_venv.check_output('-c', textwrap.dedent(code)))
    assert seen['listed'] == ['cotnet50', 'cotnet101']
    assert seen['parameters'] == 22_222_416
    assert seen['normal'] == ['SourceFileLoader', True, False, True, True, True, True, True]
    assert seen['after reload'] == seen['listed']
    assert seen['loader after reload'] is False
    assert Path(seen['file']) == installed_venv.site_packages / 'timm_cotnet' / '__init__.py'


def test_package_imported_first(installed_venv):
    """Its models are not imported a second time, from within the import of timm that it started itself."""
    before = 'import warnings\nwarnings.simplefilter("error")\nfrom timm_cotnet.layers import CotLayer'
    assert real_models(installed_venv, before) == ['cotnet50', 'cotnet101']


@pytest.mark.slow
def test_script_with_spawned_loader_workers(installed_venv, tmp_path):
    script = '''
        import argparse
        import timm
        import torch

        class Names(torch.utils.data.Dataset):
            """Each worker says whether timm knows the model there."""
            def __init__(self, name):
                self.name = name
            def __len__(self):
                return 4
            def __getitem__(self, index):
                return timm.is_model(self.name) and torch.utils.data.get_worker_info() is not None

        if __name__ == '__main__':
            parser = argparse.ArgumentParser()
            parser.add_argument('--model')
            model = timm.create_model(parser.parse_args().model)
            loader = torch.utils.data.DataLoader(
                Names(model.default_cfg['architecture']), batch_size=2, num_workers=2, multiprocessing_context='spawn',
            )
            print([batch.tolist() for batch in loader])
    '''
    path = write_files(tmp_path, {'train.py': script}) / 'train.py'
    output = installed_venv.check_output(str(path), '--model', 'cotnet50', env={'OMP_NUM_THREADS': '1'})
    assert output.strip() == '[[True, True], [True, True]]'


@pytest.mark.slow
def test_torchrun_children(installed_venv, tmp_path):
    script = '''
        import sys
        import timm
        import torch
        import torch.distributed as dist

        dist.init_process_group('gloo')
        known = torch.tensor(float(timm.is_model(sys.argv[2])))
        dist.all_reduce(known)
        if dist.get_rank() == 0:
            print('known in', int(known), 'of', dist.get_world_size())
        dist.destroy_process_group()
    '''
    path = write_files(tmp_path, {'train.py': script}) / 'train.py'
    output = installed_venv.check_output(
        '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(path), '--model', 'cotnet50',
        env={'OMP_NUM_THREADS': '1'},
    )
    assert output.strip() == 'known in 2 of 2'


def test_broken_models_leave_real_timm_working(installed_venv, tmp_path):
    path = write_files(tmp_path, {'timm_cotnet/__init__.py': 'from . import absent'})
    code = "import timm; timm.create_model('resnet10t'); print(timm.list_models('*cotnet*'))"
    result = installed_venv.run('-W', 'error', '-c', code, env={'PYTHONPATH': str(path)})
    assert (result.returncode, result.stdout.strip()) == (0, '[]')
    # PyTorch 2.6 leaves a temporary folder to the collector, which warns of it
    assert result.stderr.count(WARNING) == len(re.findall('(?<!Resource)Warning: ', result.stderr)) == 1


# Installing and uninstalling


def test_start_up_loads_one_small_module(installed_venv, new_environment):
    code = 'import sys; print(*sys.modules)'
    with_package, without = (env.check_output('-c', code).split() for env in (installed_venv, new_environment()))
    assert set(with_package) - set(without) == {'_timm_cotnet_autoload'}


@pytest.mark.slow
def test_uninstall_leaves_nothing(new_environment):
    environment = new_environment()
    before = set(environment.path.rglob('*'))
    environment.install(str(ROOT))
    assert {path.name for path in environment.site_packages.iterdir()} >= ROOT_FILES
    environment.check_output('-m', 'pip', 'uninstall', '--quiet', '--yes', 'timm-cotnet')
    left = {path for path in set(environment.path.rglob('*')) - before if path.name != '__pycache__'}
    assert left == set()
    assert real_models(environment) == []


@pytest.mark.slow
def test_editable_install(new_environment):
    environment = new_environment()
    environment.install('--editable', str(ROOT))
    assert {path.name for path in environment.site_packages.iterdir()} >= ROOT_FILES
    code = "import timm; print(timm.is_model('cotnet50'), timm.model_entrypoint('cotnet50').__code__.co_filename)"
    assert environment.check_output('-c', code).split() == ['True', str(ROOT / 'timm_cotnet' / 'cotnet.py')]


def test_source_distribution_install(installed_venv, new_environment, tmp_path):
    def names(environment):
        folder = environment.site_packages
        return {str(path.relative_to(folder)) for path in folder.rglob('*timm_cotnet*/**/*') if path.suffix != '.pyc'}

    subprocess.run([sys.executable, '-m', 'hatchling', 'build', '-t', 'sdist', '-d', tmp_path], cwd=ROOT, check=True)
    environment = new_environment()
    environment.install(str(next(tmp_path.glob('*.tar.gz'))))
    assert names(environment) == names(installed_venv)
    assert 'timm_cotnet/cotnet.py' in names(environment)
    for name in ROOT_FILES:
        assert (environment.site_packages / name).read_bytes() == (ROOT / 'timm_cotnet/_startup' / name).read_bytes()


# The finder, with the stand-in


@pytest.mark.parametrize('first', [
    'import timm',
    'import timm.models',
    'import timm.models.resnet',
    'from timm import registered',
    'import timm_cotnet',
    'import timm_cotnet.cotnet',
    'import importlib.util; importlib.util.find_spec("timm.models.resnet")',
    'import timm; import timm_cotnet',
    'import timm, importlib; importlib.reload(timm.models); importlib.reload(timm.models)',
    'import timm; import site; site.main()',
    'import _timm_cotnet_autoload as a; a.arm(); a.arm(); import timm',
])
def test_registers_once(stand_in, first):
    result = stand_in(f'''
        {first}
        import sys
        finders = [finder for finder in sys.meta_path if finder.__module__ == '_timm_cotnet_autoload']
        loader = sys.modules['timm.models'].__loader__
        print(sys.modules['timm_cotnet.cotnet'].registered, len(finders), 'exec_module' in vars(loader))
    ''')
    assert_prints(result, "['cotnet50'] 1 False")


def test_package_whose_first_module_imports_timm(stand_in):
    files = {
        'timm_cotnet/__init__.py': 'from . import layers, cotnet',
        'timm_cotnet/layers.py': 'import timm\nCotLayer = object',
        'timm_cotnet/cotnet.py': 'from timm.models import registered\nfrom .layers import CotLayer\n'
                                 "registered.append('cotnet50')",
    }
    code = 'from timm_cotnet.layers import CotLayer; import timm; print(timm.registered)'
    assert_prints(stand_in(code, files=files), "['cotnet50']")


def test_isolated_mode(stand_in, tmp_path):
    code = f'import sys; sys.path.insert(0, {str(tmp_path)!r}); import timm; print(timm.registered)'
    assert_prints(stand_in(code, '-I'), "['cotnet50']")


def test_without_site_an_import_registers(stand_in):
    code = 'import timm; print(timm.registered); import timm_cotnet; print(timm.registered)'
    assert_prints(stand_in(code, '-S'), "[]\n['cotnet50']")


def test_armed_after_timm(stand_in, installed_venv):
    result = stand_in(f'''
        import timm
        print(timm.registered)
        import site
        site.addsitedir({str(installed_venv.site_packages)!r})
        print(timm.registered)
    ''', '-S')
    assert_prints(result, "[]\n['cotnet50']")


def test_start_file_arms(stand_in, installed_venv):
    """Python 3.15 reads the `.start` file instead of the `.pth`: each line an entry point, called without arguments."""
    result = stand_in(f'''
        import pkgutil, sys
        sys.path.append({str(installed_venv.site_packages)!r})
        for line in open({str(installed_venv.site_packages / 'timm_cotnet.start')!r}, encoding='utf-8'):
            pkgutil.resolve_name(line.strip())()
        import timm
        print(timm.registered)
    ''', '-S')
    assert_prints(result, "['cotnet50']")


@pytest.mark.parametrize('value, expected', [('0', "[] ['cotnet50']"), ('1', "['cotnet50'] ['cotnet50']")])
def test_opt_out(stand_in, value, expected):
    code = 'import timm; print(timm.registered, end=" "); import timm_cotnet; print(timm.registered)'
    assert_prints(stand_in(code, TIMM_COTNET_AUTOLOAD=value), expected)


@pytest.mark.parametrize('options', [(), ('-W', 'error')], ids=['default', 'warnings are errors'])
@pytest.mark.parametrize('broken', [
    'raise RuntimeError("no GPU today")',
    'this is no Python',
    'from timm.models import no_such_name',
    'from timm import registered',  # timm itself is still being imported
    'class Odd(Exception): pass\nraise Odd',
])
def test_broken_models(stand_in, broken, options):
    code = "import timm, sys; print(timm.registered, 'timm_cotnet.cotnet' in sys.modules)"
    result = stand_in(code, *options, files={'timm_cotnet/cotnet.py': broken})
    assert (result.returncode, result.stdout.strip()) == (0, '[] False')
    assert result.stderr.count(WARNING) == result.stderr.count('Warning: ') == 1
    for advice in ('python -c "import timm_cotnet"', 'reinstall timm-cotnet', 'TIMM_COTNET_AUTOLOAD=0'):
        assert advice in result.stderr


def test_warning_as_error_in_the_models(stand_in):
    files = {'timm_cotnet/cotnet.py': "import warnings\nwarnings.warn('old', DeprecationWarning)"}
    result = stand_in('import timm; print(timm.registered)', '-W', 'error', files=files)
    assert (result.returncode, result.stdout.strip()) == (0, '[]')
    assert result.stderr.count(WARNING) == 1
    assert 'DeprecationWarning: old' in result.stderr


def test_the_warning_can_be_filtered(stand_in):
    files = {'timm_cotnet/cotnet.py': 'raise RuntimeError'}
    assert_prints(stand_in('import timm; print(timm.registered)', '-W', 'ignore', files=files), '[]')


def test_interrupt_is_not_swallowed(stand_in):
    code = '''
        try:
            import timm
        except KeyboardInterrupt:
            print('interrupted')
    '''
    assert_prints(stand_in(code, files={'timm_cotnet/cotnet.py': 'raise KeyboardInterrupt'}), 'interrupted')


def test_circular_import_of_timm(stand_in):
    files = {'timm_cotnet/cotnet.py': '''
        import timm
        import timm.models.resnet
        from timm.models import registered, resnet
        registered.append(resnet.__name__)
    '''}
    assert_prints(stand_in('import timm; print(timm.registered)', files=files), "['timm.models.resnet']")


def test_timm_that_fails_can_be_imported_again(stand_in):
    code = '''
        import sys
        sys.flaw = True
        try:
            import timm
        except ImportError as error:
            print(error, 'timm_cotnet' in sys.modules, end=' ')
        del sys.flaw
        import timm
        print(timm.registered)
    '''
    failing = "import sys\nregistered = []\nif hasattr(sys, 'flaw'):\n    raise ImportError('flawed')"
    result = stand_in(code, files={'timm/models/__init__.py': failing})
    assert_prints(result, "flawed False ['cotnet50']")


def test_without_timm(stand_in, tmp_path):
    result = stand_in(f'''
        import sys
        sys.path[:] = [entry for entry in sys.path if not entry.endswith(('site-packages', {tmp_path.name!r}))]
        try:
            import timm.models
        except ModuleNotFoundError as error:
            print(error.name, sys.meta_path[0].__module__)
    ''')
    assert_prints(result, 'timm _timm_cotnet_autoload')


def test_threads(stand_in):
    """Whoever imports timm first, every thread sees the models as soon as its own import has returned."""
    slow = {
        'timm/models/__init__.py': 'import time\ntime.sleep(.1)\nregistered = []',
        'timm_cotnet/cotnet.py': "import time\ntime.sleep(.1)\nfrom timm.models import registered\n"
                                 "time.sleep(.1)\nregistered.append('cotnet50')",
    }
    result = stand_in('''
        import threading
        seen = []
        def use():
            import timm
            seen.append(tuple(timm.registered))
        threads = [threading.Thread(target=use) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(len(seen), set(seen))
    ''', files=slow)
    assert_prints(result, "16 {('cotnet50',)}")


@pytest.mark.parametrize('first, second', [('timm', 'timm_cotnet'), ('timm_cotnet', 'timm')])
@pytest.mark.parametrize('delay', [0, .05, .15, .25])
def test_threads_that_import_both(stand_in, first, second, delay):
    slow = {
        'timm/models/__init__.py': 'import time\ntime.sleep(.1)\nregistered = []',
        'timm_cotnet/__init__.py': 'import time\ntime.sleep(.1)\nfrom . import cotnet',
        'timm_cotnet/cotnet.py': "import time\nfrom timm.models import registered\n"
                                 "time.sleep(.1)\nregistered.append('cotnet50')",
    }
    result = stand_in(f'''
        import importlib, sys, threading, time
        thread = threading.Thread(target=importlib.import_module, args=['{first}'])
        thread.start()
        time.sleep({delay})
        importlib.import_module('{second}')
        thread.join()
        print(sys.modules['timm.models'].registered)
    ''', files=slow)
    assert_prints(result, "['cotnet50']")


@pytest.mark.parametrize('order', ['import _timm_other_autoload as b; b.arm(); import timm', '''
import _timm_cotnet_autoload as a, _timm_other_autoload as b, sys
sys.meta_path.remove(a.Finder); b.arm(); a.arm(); import timm'''])
def test_two_such_plugins(stand_in, order):
    source = (ROOT / 'timm_cotnet' / '_startup' / '_timm_cotnet_autoload.py').read_text()
    files = {
        '_timm_other_autoload.py': source.replace('timm_cotnet', 'timm_other'),
        'timm_other/__init__.py': 'from . import cotnet',
        'timm_other/cotnet.py': "from timm.models import registered\nregistered.append('other')",
    }
    code = f"{order}\nprint(sorted(timm.registered), 'exec_module' in vars(timm.models.__loader__))"
    assert_prints(stand_in(code, files=files), "['cotnet50', 'other'] False")


def test_zip_archive(stand_in, tmp_path):
    """`zipimport` gives the modules of a folder one loader: only `timm.models` may bring the models."""
    files = {
        'timm/__init__.py': """
            import sys
            import _timm_cotnet_autoload
            _timm_cotnet_autoload.Finder.find_spec('timm.models', __path__)
            from . import layers
            early = 'timm_cotnet' in sys.modules
            from .models import registered
        """,
        'timm/layers.py': '',
        'timm/models/__init__.py': 'registered = []',
    }
    with ZipFile(tmp_path / 'timm.zip', 'w') as archive:
        for name, text in files.items():
            archive.writestr(name, textwrap.dedent(text))
    result = stand_in(f'''
        import sys
        sys.path.insert(0, {str(tmp_path / 'timm.zip')!r})
        import timm
        loader = timm.models.__loader__
        print(type(loader).__name__, timm.early, timm.registered, 'exec_module' in vars(loader))
    ''')
    assert_prints(result, "zipimporter False ['cotnet50'] False")


LOADERS = '''
    import sys
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    class Loader:
        def create_module(self, spec):
            return None
        def exec_module(self, module):
            pass

    class SlotLoader:
        __slots__ = ()
        create_module = staticmethod(lambda spec: None)
        exec_module = staticmethod(lambda module: None)

    class OldLoader:
        def load_module(self, name):
            return sys.modules.setdefault(name, ModuleType(name))

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return ModuleSpec(name, loader, is_package=True) if name == 'timm.models' else None

    sys.meta_path.insert(1, Finder)
'''


@pytest.mark.parametrize('loader', [
    pytest.param('SlotLoader()', id='slots'),
    pytest.param('SlotLoader', id='class'),
    pytest.param('None', id='namespace package'),
    pytest.param('OldLoader()', id='load_module', marks=pytest.mark.skipif(
        sys.version_info >= (3, 15), reason='Python 3.15 takes no loader that has load_module alone',
    )),
])
def test_loader_that_cannot_be_wrapped(stand_in, loader):
    code = "import timm.models\nprint(timm.models.__name__, 'timm_cotnet' in sys.modules)"
    result = stand_in(f'{textwrap.dedent(LOADERS)}\nloader = {loader}\n{code}', files={'timm/__init__.py': ''})
    assert_prints(result, 'timm.models False')


def test_loader_is_restored(stand_in):
    """A method that another tool put on the loader runs, and is there again afterwards."""
    code = textwrap.dedent(LOADERS) + textwrap.dedent('''
        def exec_module(module):
            module.registered = [loader.exec_module is exec_module]

        loader = Loader()
        loader.exec_module = exec_module
        import timm.models
        print(timm.models.registered, loader.exec_module is exec_module)
    ''')
    assert_prints(stand_in(code, files={'timm/__init__.py': ''}), "[True, 'cotnet50'] True")


def test_finder_without_find_spec(stand_in):
    result = stand_in('''
        import sys
        class Old:
            def find_module(self, name, path=None):
                return None
        sys.meta_path.insert(1, Old())
        import timm
        print(timm.registered)
    ''')
    assert_prints(result, "['cotnet50']")


def test_finder_behind_a_proxy(stand_in):
    """A tool that wraps every finder hides this one: no models without an import, but timm works."""
    result = stand_in('''
        import sys
        class Proxy:
            def __init__(self, finder):
                self.find_spec = finder.find_spec
        sys.meta_path[:] = [Proxy(finder) for finder in sys.meta_path]
        import timm
        print(timm.registered)
    ''')
    assert_prints(result, '[]')
