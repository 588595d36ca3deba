"""The benchmarks run: they name their rows, and a cheap row of each gives a table with numbers in it."""
import importlib
import re
from pathlib import Path

import pytest

CHEAP = {
    'speed': 'local_conv / unfold formula, 512 x 7 x 7, forward + backward',
    'ablation': 'inference, batch 1, float32: packed convolutions in bottlenecks',
}


@pytest.fixture(params=CHEAP)
def benchmark(request, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / 'benchmarks'))
    return importlib.import_module(request.param)


def test_help(benchmark, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(['--help'])
    assert ended.value.code == 0
    assert '--rows' in capsys.readouterr().out


def test_rows_have_names_of_their_own(benchmark, capsys):
    benchmark.main(['--list'])
    names = capsys.readouterr().out.splitlines()
    assert len(names) == len(set(names)) > 10
    assert CHEAP[benchmark.__name__] in names


@pytest.mark.slow
def test_cheap_row(benchmark, capsys, tmp_path):
    benchmark.main(['--rows', CHEAP[benchmark.__name__], '--seconds', '0.01', '--output', str(tmp_path)])
    written = (tmp_path / f'{benchmark.__name__}.md').read_text()
    assert written == capsys.readouterr().out
    lines = [line for line in written.splitlines() if line.startswith('|')]
    assert len(lines) == 3
    assert len({line.count('|') for line in lines}) == 1
    assert len(re.findall(r'\| [\d.]+ ms ', lines[2])) == 2, lines[2]
    assert re.search(r'\| \d+\.\d{3} \|', lines[2])
