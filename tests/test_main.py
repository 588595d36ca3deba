"""The list of commands, and that each of them is one."""
import importlib

import pytest

from timm_cotnet.__main__ import COMMANDS, main


def test_list(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, what in COMMANDS.items():
        assert any(line.split(maxsplit=3)[2:] == [f'timm_cotnet.{name}', what] for line in lines)
    with pytest.raises(SystemExit) as error:
        main(['demo'])
    assert error.value.code == 2 and 'timm_cotnet.COMMAND' in capsys.readouterr().err


@pytest.mark.parametrize('name', COMMANDS)
def test_command_has_help(capsys, name):
    with pytest.raises(SystemExit) as error:
        importlib.import_module(f'timm_cotnet.{name}').main(['--help'])
    assert error.value.code == 0
    assert f'usage: python -m timm_cotnet.{name} ' in capsys.readouterr().out
