"""Exported models: the form of local convolution in them, files of PyTorch's own formats, and the command."""
import collections
import copy
import math
import os
import subprocess
import sys
import zipfile

import pytest
import timm
import torch
from PIL import Image
from timm.utils import reparameterize_model
from torch.fx.experimental.proxy_tensor import make_fx

from timm_cotnet import export
from timm_cotnet.ops import grouped_local_conv
from timm_cotnet.ops.exported import local_conv_exported
from timm_cotnet.ops.reference import local_conv_reference

from helpers import create, difference, image, needs_cpp_compiler, needs_export_flag, shaken



def folded(name='test_cotnet', **kwargs):
    torch.manual_seed(0)
    return reparameterize_model(shaken(timm.create_model(name, **kwargs)).eval())


# The form of local convolution


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('crops', [False, True])
@pytest.mark.parametrize('B, C, G, H, W', [(2, 16, 2, 5, 6), (1, 8, 8, 3, 2), (3, 8, 1, 1, 1), (1, 8, 4, 1, 7)])
@pytest.mark.parametrize('kernel_size, dilation', [(1, 1), (3, 1), (3, 2), (3, 4), (5, 1), (7, 3)])
@pytest.mark.parametrize('known', [True, False])
def test_equals_the_definition(known, kernel_size, dilation, B, C, G, H, W, crops):
    """Where taps lie outside of the image, too, whether sizes are known or may be any."""
    x = image(B, C, H, W, dtype=torch.float64)
    weight = image(B, G * kernel_size ** 2, H, W, dtype=torch.float64, seed=2).view(B, G, -1, H, W)
    def function(x, weight):
        return local_conv_exported(x, weight, kernel_size, dilation, crops)

    if not known:  # in a trace, sizes are tensors
        function = torch.jit.trace(function, (x, weight), check_trace=False)
    out = function(x, weight)
    assert difference(out, local_conv_reference(x, weight, kernel_size, dilation)) < 1e-14


def test_half_types_are_accumulated_in_float32():
    for dtype in (torch.float16, torch.bfloat16):
        x, weight = image(2, 16, dtype=dtype), image(2, 18, dtype=dtype, seed=2).view(2, 2, 9, 6, 7)
        out = local_conv_exported(x, weight)
        assert out.dtype == dtype and difference(out, local_conv_reference(x, weight)) < 1e-2


@pytest.mark.parametrize('known', [True, False])
def test_few_operators_of_low_rank(known):
    """Nine products and eight sums, four shifts; of filters three pieces, where sizes may be any permuted before."""
    x, weight = image(2, 16), image(2, 18, seed=2).view(2, 2, 9, 6, 7)
    graph = make_fx(
        lambda *a: local_conv_exported(*a, crops=True), tracing_mode='real' if known else 'symbolic')(x, weight).graph
    nodes = [node for node in graph.nodes
             if node.op == 'call_function' and hasattr(node.target, 'overloadpacket') and 'val' in node.meta]
    counts = collections.Counter(node.target.overloadpacket._qualified_op_name.split('::')[1] for node in nodes)
    assert counts['mul'] == 9 and counts['add'] == 8 and counts['constant_pad_nd'] == (4 if known else 6)
    assert counts['transpose'] == (0 if known else 1) and counts['slice'] <= 12  # three that change something
    assert not {'select', 'index', 'lerp', 'cat'} & set(counts)
    assert max(node.meta['val'].ndim for node in nodes if hasattr(node.meta['val'], 'ndim')) <= 5


@needs_export_flag
@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('groups', [1, 2])
def test_chosen_where_graphs_are_made(groups):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.groups = groups

        def forward(self, x, attn):
            return grouped_local_conv(x, attn, 3, 1, self.groups)

    x, attn = image(2, 32), image(2, 36, seed=2)
    expected = Module()(x, attn)
    program = torch.export.export(Module(), (x, attn))
    traced = torch.jit.trace(Module(), (x, attn))
    scripted = torch.jit.script(Module())
    for graph in (program.module(), traced, scripted):
        assert difference(graph(x, attn), expected) < 1e-6
    assert 'aten.split.Tensor' in str(program.graph) and 'aten.cat' not in str(program.graph)
    assert 'aten::split' in str(traced.inlined_graph) and 'aten::cat' not in str(traced.inlined_graph)


@pytest.mark.parametrize('name', ['CotLayer', 'CoxtLayer'])
def test_eager_layers_never_use_it(name, monkeypatch):
    from timm_cotnet.ops import dispatch
    monkeypatch.setattr(dispatch, 'local_conv_exported', None)  # a call would fail
    assert create(name).eval()(image(2, 32)).shape == (2, 32, 6, 7)


# Files of PyTorch's own formats


def exports_pools_of_any_size():
    """Whether a pool that was exported of an even size takes an odd one (in PyTorch 2.9 to 2.12 it does not)."""
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, 2, 1), torch.nn.AvgPool2d(2))
    axis = torch.export.Dim.DYNAMIC
    program = torch.export.export(module, (torch.zeros(2, 1, 8, 12),), dynamic_shapes=({2: axis, 3: axis},))
    try:
        program.module()(torch.zeros(2, 1, 10, 12))
    except AssertionError:
        return False
    return True


@needs_export_flag
@pytest.mark.slow
def test_pt2_of_other_sizes(tmp_path):
    """Above 32 pixels: `torch.export` keeps to more than one pixel in the last stage, as its example has."""
    if not exports_pools_of_any_size():
        pytest.skip('`torch.export` of this PyTorch takes only even sizes behind even ones')
    model = folded()
    path = tmp_path / 'model.pt2'
    export.export(model, path, 'pt2', torch.randn(2, 3, 64, 96))
    run = export.load(path, 'pt2')
    for shape in ((1, 3, 40, 64), (3, 3, 70, 50)):
        x = torch.randn(shape)
        assert difference(run(x), model(x)) < 1e-5


ALONE = '''
import sys
sys.meta_path.insert(0, type('Refuse', (), {'find_spec': staticmethod(lambda name, *_: 1 / (
    name.partition('.')[0] not in ('timm', 'timm_cotnet', '_timm_cotnet_autoload')) and None)}))
import torch
kind, path, images, logits = sys.argv[1:]
x, expected = torch.load(images), torch.load(logits)
if kind == 'aoti':
    from torch._inductor import aoti_load_package
    run = aoti_load_package(path)
else:
    run = torch.jit.load(path)
with torch.no_grad():
    out = run(x)
assert not {'timm', 'timm_cotnet'} & set(sys.modules)
assert (out - expected).abs().max() < 1e-4 * expected.abs().max()
print('good')
'''


@pytest.mark.slow
@needs_cpp_compiler
@needs_export_flag
def test_exported_programs_compile():
    """What `torch.export` gave is compiled by Inductor, which once read images cut out across taps wrong."""
    model, x = folded(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        compiled = torch.compile(torch.export.export(model, (x,)).module())
        assert difference(compiled(x), copy.deepcopy(model).double()(x.double())) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('kind', [
    pytest.param('aoti', marks=[needs_cpp_compiler, needs_export_flag]), 'script', 'trace'])
def test_files_run_without_this_package(kind, tmp_path):
    model, x = folded(), torch.randn(2, 3, 64, 96)
    path = tmp_path / ('model.pt2' if kind == 'aoti' else 'model.pt')
    with torch.no_grad():
        if kind == 'aoti':
            export.export(model, path, 'aoti', x, dynamic=False)
            assert zipfile.is_zipfile(path)
        else:
            (torch.jit.script(model) if kind == 'script' else torch.jit.trace(model, x)).save(path)
        torch.save(x, tmp_path / 'x')
        torch.save(model(x), tmp_path / 'logits')
    result = subprocess.run(
        [sys.executable, '-S', '-c', ALONE, kind, path, tmp_path / 'x', tmp_path / 'logits'], capture_output=True,
        text=True, timeout=300, env={**os.environ, 'PYTHONPATH': os.pathsep.join(
            entry for entry in sys.path if entry.endswith('-packages'))}, cwd=tmp_path)
    assert result.stdout == 'good\n', result.stderr


# The command


@pytest.mark.parametrize('args, message', [
    (['resnet1000', '--output', 'a.onnx'], "timm knows no model 'resnet1000'"),
    (['test_cotnet', '--output', 'a.tflite'], 'whose suffix stands for no format'),
    (['test_cotnet', '--output', 'a.onnx', '--format', 'openvino'], 'expected a name that ends in .xml'),
    (['test_cotnet', '--output', 'a.mlpackage', '--dynamic'], 'whose files have one size'),
    (['test_cotnet', '--output', 'a.pt2', '--int8', 'images'], '--int8 is for ONNX in float32'),
    (['test_cotnet', '--output', 'a.pt2', '--checkpoint', 'nowhere'], '--checkpoint is nowhere, expected a file'),
    (['test_cotnet', '--output', 'a.onnx', '--int8', 'nowhere'], '--int8 is nowhere, expected a folder of images'),
    (['test_cotnet', '--output', 'tests', '--format', 'pt2'], 'expected a name that ends in .pt2'),
    (['test_cotnet', '--output', 'a.onnx', '--img-size', '0'], '--img-size is 0, expected 1 or more'),
])
def test_wrong_arguments(args, message, capsys):
    with pytest.raises(SystemExit) as ended:
        export.main(args)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_damaged_checkpoint(suffix, tmp_path):
    path = tmp_path / f'weights{suffix}'
    path.write_bytes(b'no weights')
    with pytest.raises(SystemExit, match=f'{path} cannot be loaded'):
        export.main(['test_cotnet', '--output', str(tmp_path / 'model.pt2'), '--checkpoint', str(path)])


def test_where_nothing_can_be_written(tmp_path, capsys):
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit, match='model.pt2, which cannot be written'):
        export.main(['test_cotnet', '--output', str(tmp_path / 'file' / 'model.pt2')])
    (tmp_path / 'model.pt2').mkdir()
    with pytest.raises(SystemExit):
        export.main(['test_cotnet', '--output', str(tmp_path / 'model.pt2')])
    assert 'model.pt2, a folder, expected a file to write' in capsys.readouterr().err


@pytest.mark.parametrize('format', ['pt2', 'aoti'])
def test_small_examples_of_any_size(format, tmp_path):
    """Files would refuse other sizes, or give them wrong logits."""
    with pytest.raises(ValueError, match='expected more than 32 pixels'):
        export.export(folded(), tmp_path / 'model.pt2', format, torch.randn(2, 3, 64, 32))
    with pytest.raises(SystemExit, match='--img-size is 32: x is .* expected more than 32 pixels'):
        export.main(['test_cotnet', '--output', str(tmp_path / 'model.pt2'), '--format', format, '--dynamic',
                     '--img-size', '32'])


@pytest.mark.parametrize('path, library, extra', [
    ('a.onnx', 'onnxscript', 'onnx'), ('a.xml', 'openvino', 'openvino'), ('a.mlpackage', 'coremltools', 'coreml')])
def test_missing_library_is_named(path, library, extra, monkeypatch):
    monkeypatch.setattr(export, 'importlib', Importer(library))
    with pytest.raises(SystemExit, match=f'{library} is not installed; .*timm-cotnet\\[{extra}\\]'):
        export.main(['test_cotnet', '--output', path])


class Importer:
    def __init__(self, missing):
        self.missing = missing

    def import_module(self, name):
        if name == self.missing:
            raise ImportError(name)


@needs_export_flag
@pytest.mark.slow
def test_command_checks_what_it_wrote(tmp_path, capsys):
    path = tmp_path / 'folder' / 'model.pt2'
    args = ['test_cotnet', '--output', str(path), '--pretrained', '--dynamic', '--check']
    assert export.main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and f'{path}: ' in lines[0] and all('of the largest logit' in line for line in lines[1:])


@needs_export_flag
def test_check_sees_all_of_a_fresh_network(tmp_path, monkeypatch, capsys):
    """Whose blocks would give what they are given, as the scale of their last norm is zero."""
    args = ['test_cotnet', '--output', str(tmp_path / 'model.pt2'), '--img-size', '64', '--check']
    assert export.main(args) == 0
    monkeypatch.setattr('timm_cotnet.ops.dispatch.local_conv_exported', lambda x, *_, **__: x)
    assert export.main(args) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if 'differs by' in line]
    right, wrong = (float(line.split('differs by ')[1].split()[0]) for line in lines)
    assert right < 1e-5 and wrong > 0.01


@pytest.mark.parametrize('options', [[], ['--int8', '.']])
def test_what_is_not_finite(options, tmp_path, monkeypatch):
    """Wherever it is among what is compared."""
    x, model = torch.randn(1, 3, 32, 32), folded()
    answers = [torch.full((1, 10), float('nan')), model(x).detach()]
    for order in (0, 1), (1, 0):
        found = iter([answer for i in order for answer in [answers[i]] * 6])  # once, and five times to be timed
        assert math.isnan(export.check(model, lambda x: next(found), [x, x]))
    monkeypatch.setattr(export, 'FORMATS', {'onnx': ('.onnx', (), '')})
    for name in ('export', 'quantize_onnx'):
        monkeypatch.setattr(export, name, lambda *args: (tmp_path / 'model.onnx').touch())
    monkeypatch.setattr(export, 'calibration_batches', lambda *args: iter(()))
    monkeypatch.setattr(export, 'load', lambda *args: lambda x: x.new_full((1, 10), float('nan')))
    args = ['test_cotnet', '--output', str(tmp_path / 'model.onnx'), '--img-size', '32', *options]
    assert export.main(args) == 0 and export.main([*args, '--check']) == 1


@pytest.mark.parametrize('number, batch_size, shapes', [
    (3, 1, [1, 1, 1]), (4, 1, [1] * 4), (5, 2, [2, 2, 2]), (99, 1, [1] * 5), (1, 4, [4])])
def test_calibration_batches(number, batch_size, shapes, tmp_path):
    (tmp_path / 'class').mkdir()
    for i in range(5):
        Image.new('RGB', (40, 40), (50 * i, 0, 0)).save(tmp_path / 'class' / f'{i}.png')
    batches = list(export.calibration_batches(tmp_path, folded(), (32, 32), number, batch_size))
    assert [tuple(batch.shape) for batch in batches] == [(n, 3, 32, 32) for n in shapes]
    reds = torch.cat(batches)[:, 0, 16, 16].tolist()
    assert reds == sorted(reds) and len(set(reds)) == min(number, 5)


def test_check_tells_a_difference(capsys):
    model = folded()
    assert export.check(model, lambda x: 1.1 * model(x), [torch.randn(1, 3, 32, 32)]) == pytest.approx(0.1, rel=1e-3)
    assert '1x3x32x32: differs by 1.0e-01 of the largest logit' in capsys.readouterr().out
