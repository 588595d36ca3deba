"""The benchmarks run: they name their rows, and a cheap row of each gives a table with numbers in it."""
import importlib
import json
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


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / 'benchmarks'))
    return importlib.import_module('gpu')


def test_gpu_names(gpu, capsys):
    gpu.main(['--list', '--profile', '--device', 'cpu'])
    names = capsys.readouterr().out.splitlines()
    assert len(names) == len(set(names)) > 60
    gpu.main(['--list', '--device', 'cpu', '--only', 'check', '--only', 'batch 1,', '--skip', 'golden'])
    chosen = capsys.readouterr().out.splitlines()
    assert 10 < len(chosen) < len(names) and not any('golden' in name for name in chosen)


@pytest.mark.slow
def test_gpu_rows_on_the_cpu(gpu, capsys, tmp_path):
    batch_1, layer = 'batch 1, eager, both folded', '512 x 7 x 7, backward'
    texts = ('golden numbers, CotLayer', batch_1, layer, 'peak memory', 'batch 1, CUDA graphs, ours folded')
    options = [option for text in texts for option in ('--only', text)]
    gpu.main(['--device', 'cpu', '--batch', '2', '--size', '32', '--seconds', '0.01', '--output', str(tmp_path)]
             + options)
    written = (tmp_path / 'gpu.md').read_text()
    assert written == capsys.readouterr().out
    assert '- ok check: golden numbers, CotLayer' in written
    lines = [line for line in written.splitlines() if line.startswith('|')][2:]
    assert len(lines) == 5
    for line in lines:
        if batch_1 in line or layer in line:
            assert len(re.findall(r'\| [\d.]+ ms ', line)) == 2, line
            assert re.search(r'\| \d+\.\d{3} \| at most 1\.\d \| (yes|NO) \|$', line), line
        else:
            assert 'not run: needs CUDA' in line
    data = json.loads((tmp_path / 'gpu.json').read_text())
    assert len(data['rows']) == 6 and not data['unfinished']


def test_gpu_keeps_its_time(gpu, capsys, tmp_path):
    gpu.main(['--device', 'cpu', '--minutes', '0', '--only', 'batch 1, eager', '--output', str(tmp_path)])
    assert capsys.readouterr().out.count('- cotnet50 / resnet50, batch 1, eager') == 3


@pytest.mark.slow
def test_detection(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / 'benchmarks'))
    detection = importlib.import_module('detection')
    monkeypatch.setattr(detection, 'BACKBONES', ('test_cotnet', 'resnet18'))
    detection.main(['--sizes', '64', '--regions', '4', '--seconds', '0'])
    rows = re.findall(r'^\| batch 2, 64 x 64, [\w-]+ \| (\d+) ms \| (\d+) ms \| ([\d.]+) \| at most 1.25 \|$',
                      capsys.readouterr().out, flags=re.M)
    assert len(rows) == 2
    for ours, other, ratio in rows:
        assert int(ours) / int(other) == pytest.approx(float(ratio), abs=0.02)


def test_runtimes_names(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / 'benchmarks'))
    runtimes = importlib.import_module('runtimes')
    runtimes.main(['--list', '--rows', 'batch 8'])
    names = capsys.readouterr().out.splitlines()
    assert len(names) == len(set(names)) == 4 and all(name.endswith(', batch 8') for name in names)


def test_runtimes_table(monkeypatch, capsys, tmp_path):
    """Its numbers and ratios are those of the turns, and what did not run says why."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / 'benchmarks'))
    runtimes = importlib.import_module('runtimes')
    times = {'cotnet50': 30., 'se_cotnetd_50': 'no onnx', 'resnet50': 20., 'resnest50d': 60.}
    monkeypatch.setattr(runtimes, 'take_turns', lambda script, specs, seconds: [
        runtimes.Result(times[spec['name']], 0.) if spec['name'] != 'se_cotnetd_50' else 'no onnx' for spec in specs])
    runtimes.main(['--rows', 'onnxruntime, batch 1', '--output', str(tmp_path)])
    assert (tmp_path / 'runtimes.md').read_text() == capsys.readouterr().out
    assert '| onnxruntime, batch 1 | 30 ms | not run: no onnx | 20 ms | 60 ms | 1.50 | 0.50 |' \
        in (tmp_path / 'runtimes.md').read_text().splitlines()
