"""Makes timm know the models of timm-cotnet without an import.

timm has no entry points for plugins. When Python starts, `timm_cotnet.pth` (from Python 3.15 on `timm_cotnet.start`,
PEP 829) calls `arm`; whatever imports `timm.models` later gets the models registered right after it.
`TIMM_COTNET_AUTOLOAD=0` in the environment turns this off. Every start of Python runs this file, so it imports nothing
that is not loaded by then.
"""
import os
import sys


class Finder:
    """Meta path finder that finds nothing itself: it adds one step to the import of ``timm.models``.

    It stays on ``sys.meta_path`` for good, since a removal could make another thread's import skip a finder, and asks
    only the finders after itself, so that two of its kind do not call each other for ever.
    """

    @classmethod
    def find_spec(cls, name: str, path=None, target=None):
        if name != 'timm.models':
            return None
        finders = list(sys.meta_path)
        later = finders[finders.index(cls) + 1:] if cls in finders else []
        for finder in later:
            spec = finder.find_spec(name, path, target) if hasattr(finder, 'find_spec') else None
            if spec is not None:
                _register_after(spec.loader)
                return spec
        return None


def _register_after(loader) -> None:
    """Makes the loader register the models after it has run ``timm.models``, and be what it was before from then on."""
    exec_module = getattr(loader, 'exec_module', None)
    state = getattr(loader, '__dict__', None)
    if exec_module is None or not isinstance(state, dict):
        return  # cannot be wrapped: timm comes first, and `import timm_cotnet` still works
    wrapped_before = 'exec_module' in state  # by another plugin or tool

    def exec_and_register(module):
        if module.__name__ != 'timm.models':  # zipimport shares one loader among the modules of a folder
            return exec_module(module)
        if wrapped_before:
            state['exec_module'] = exec_module
        else:
            state.pop('exec_module', None)
        exec_module(module)
        _register()

    state['exec_module'] = exec_and_register


def _register() -> None:
    """Imports the models, which registers them. Whatever goes wrong there, timm works and one warning says so."""
    # Whoever is importing timm_cotnet at this moment registers the models, and may still lack what they need.
    if os.environ.get('TIMM_COTNET_AUTOLOAD') == '0' or 'timm_cotnet' in sys.modules:
        return
    try:
        import timm_cotnet.cotnet
    except Exception as error:
        import warnings

        message = (
            f'timm-cotnet could not register its models ({type(error).__name__}: {error}). timm works without them. '
            'To see where it fails: python -c "import timm_cotnet". To repair it: reinstall timm-cotnet. '
            'To go without it: set TIMM_COTNET_AUTOLOAD=0 or uninstall timm-cotnet.'
        )
        try:
            warnings.warn(message, RuntimeWarning)
        except RuntimeWarning:  # warnings are errors here, but timm still has to work
            print(f'RuntimeWarning: {message}', file=sys.stderr)


def arm() -> None:
    """Registers the models as soon as ``timm.models`` has been imported. Harmless when called again."""
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)
    if 'timm.models' in sys.modules:
        _register()
