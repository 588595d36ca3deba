"""Exported files in the real runtimes, each of which is skipped where it is not installed (`.[test,runtimes]`)."""
import collections
import importlib.util

import pytest
import timm
import torch
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.utils import reparameterize_model

from timm_cotnet import export
from timm_cotnet.digits import write_digits

from helpers import difference, needs_export_flag, shaken

onnx = pytest.importorskip('onnx', reason='onnx, of the extra "runtimes", is not installed')
pytest.importorskip('onnxscript', reason='onnxscript, of the extra "runtimes", is not installed')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning', 'ignore::UserWarning',
                               'ignore::torch.jit.TracerWarning'),
]
ENGINES = [
    pytest.param(name, marks=pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f'{name}, of the extra "runtimes", is not installed'))
    for name in ('onnxruntime', 'openvino')
]
FAMILIES = {
    'test_cotnet': {}, 'cotnext50_2x48d': dict(layers=(1, 1, 1, 1)), 'se_cotnetd_50': dict(layers=(1, 1, 2, 1))}
# of a folded network: what all runtimes have and run well
KINDS = {
    'Add', 'AveragePool', 'Conv', 'Gemm', 'InstanceNormalization', 'MaxPool', 'Mul', 'Pad', 'ReduceMean', 'Relu',
    'Reshape', 'Sigmoid', 'Slice', 'Split', 'Sub'}


def network(name, **kwargs):
    torch.manual_seed(0)
    return reparameterize_model(shaken(timm.create_model(name, **FAMILIES.get(name, {}), **kwargs)).eval())


def outputs(engine, path, x):
    """All outputs of an ONNX file."""
    if engine == 'onnxruntime':
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        return [torch.from_numpy(out) for out in session.run(None, {session.get_inputs()[0].name: x.numpy()})]
    import openvino
    compiled = openvino.Core().compile_model(str(path), 'CPU', dict(INFERENCE_PRECISION_HINT='f32'))
    found = compiled([x.numpy()])
    return [torch.from_numpy(found[i].copy()) for i in range(len(compiled.outputs))]


@torch.no_grad()
def assert_equal(engine, path, model, shapes):
    for shape in shapes:
        x = torch.randn(shape)
        expected = model(x)
        expected = [expected] if isinstance(expected, torch.Tensor) else expected
        actual = outputs(engine, path, x)
        assert len(actual) == len(expected)
        assert all(difference(a, e) < 1e-4 for a, e in zip(actual, expected)), shape


@pytest.fixture(scope='module', params=FAMILIES)
def dynamic(request, tmp_path_factory):
    """A network, and its file by the newer exporter."""
    model = network(request.param)
    path = tmp_path_factory.mktemp('dynamic') / 'model.onnx'
    export.export(model, path, 'onnx', torch.randn(2, 3, 64, 96))
    return model, path


@pytest.mark.parametrize('engine', ENGINES)
def test_sizes_that_were_not_exported(dynamic, engine):
    assert_equal(engine, dynamic[1], dynamic[0], [(1, 3, 32, 32), (3, 3, 96, 64), (1, 3, 50, 70)])


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('what', ['features_only', 'output_stride'])
def test_backbones(engine, what, tmp_path):
    model = network('test_cotnet', **(
        dict(features_only=True, out_indices=(1, 4)) if what == 'features_only' else dict(output_stride=8)))
    path = tmp_path / 'model.onnx'
    torch.onnx.export(model, (torch.randn(2, 3, 64, 96),), str(path), dynamo=False, input_names=['images'],
                      dynamic_axes={'images': {0: 'batch', 2: 'height', 3: 'width'}})
    assert_equal(engine, path, model, [(1, 3, 32, 32), (2, 3, 50, 70)])


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('name', ['cotnet50', 'se_cotnetd_50'])
def test_fresh_networks_by_the_older_exporter(engine, name, tmp_path):
    """Whose equal constants it merges."""
    model = reparameterize_model(timm.create_model(name).eval())
    path = tmp_path / 'model.onnx'
    torch.onnx.export(model, (torch.randn(1, 3, 64, 64),), str(path), dynamo=False)
    assert_equal(engine, path, model, [(1, 3, 64, 64)])


@needs_export_flag
def test_kinds_and_number_of_operators(tmp_path):
    model = network('test_cotnet')
    path = tmp_path / 'model.onnx'
    export.export(model, path, 'onnx', torch.randn(1, 3, 64, 64), dynamic=False)
    nodes = onnx.load(str(path)).graph.node
    counts = collections.Counter(node.op_type for node in nodes)
    assert set(counts) <= KINDS, set(counts) - KINDS
    blocks = 4
    assert counts['Pad'] == 4 * blocks and counts['Slice'] == 3 * blocks and counts['InstanceNormalization'] == blocks
    assert counts['ReduceMean'] == blocks + 1  # one pool in a layer, and the network's
    assert len(nodes) <= 59 * blocks + 30, counts


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp('digits'))


def right(logits, targets):
    """Percent."""
    return 100 * (logits.argmax(1) == targets).float().mean().item()


def held_out(digits, model):
    config = resolve_data_config({}, model=model)
    dataset = create_dataset('', root=str(digits), split='val', transform=create_transform(**config))
    return [torch.stack([torch.as_tensor(pair[i]) for pair in dataset]) for i in (0, 1)]


@torch.no_grad()
def test_eight_bits(digits, tmp_path):
    """Right on the digits nearly as often."""
    pytest.importorskip('onnxruntime', reason='onnxruntime, of the extra "runtimes", is not installed')
    model = reparameterize_model(timm.create_model('test_cotnet', pretrained=True).eval())
    source, path = tmp_path / 'float.onnx', tmp_path / 'int8.onnx'
    export.export(model, source, 'onnx', torch.randn(2, 3, 64, 96))
    export.quantize_onnx(source, path, export.calibration_batches(digits / 'train', model, (64, 64), 64))
    images, targets = held_out(digits, model)
    before, after = right(model(images), targets), right(export.load(path, 'onnx')(images), targets)
    assert before >= 97 and after >= before - 1


@torch.no_grad()
def test_eight_bits_by_torchao(digits):
    pytest.importorskip('torchao', reason='torchao, of the extra "runtimes", is not installed')
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model = reparameterize_model(timm.create_model('test_cotnet', pretrained=True).eval())
    images, targets = held_out(digits, model)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=shapes).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program, quantizer)
    for batch in export.calibration_batches(digits / 'train', model, (64, 64), 64):
        prepared(batch)
    quantized = convert_pt2e(prepared)
    assert str(quantized.graph).count('dequantize_per_channel') >= 40  # the filters of the convolutions
    assert right(quantized(images), targets) >= right(model(images), targets) - 1


def test_files_of_eight_bits_are_small(tmp_path):
    pytest.importorskip('onnxruntime', reason='onnxruntime, of the extra "runtimes", is not installed')
    source, path = tmp_path / 'float.onnx', tmp_path / 'int8.onnx'
    export.export(network('cotnet50', layers=(1, 1, 1, 1)), source, 'onnx', torch.randn(1, 3, 64, 64), dynamic=False)
    export.quantize_onnx(source, path, iter([torch.randn(1, 3, 64, 64)]))
    assert path.stat().st_size < 0.3 * source.stat().st_size


@pytest.mark.parametrize('how', ['half', 'int8', 'openvino'])
def test_command(how, digits, tmp_path, capsys):
    pytest.importorskip(
        'openvino' if how == 'openvino' else 'onnxruntime',
        reason=f'the runtime for {how}, of the extra "runtimes", is not installed')
    path = tmp_path / ('model.xml' if how == 'openvino' else 'model.onnx')
    options = {'half': ['--half'], 'openvino': ['--dynamic'],
               'int8': ['--int8', str(digits / 'train'), '--calibration', '16', '--batch-size', '3']}[how]
    assert export.main(['test_cotnet', '--output', str(path), '--pretrained', '--check', *options]) == 0
    assert 'of the largest logit' in capsys.readouterr().out
    if how == 'int8':
        kinds = [node.op_type for node in onnx.load(str(path)).graph.node]
        assert kinds.count('DequantizeLinear') >= 2 * kinds.count('Conv') >= 80


def test_core_ml_converts(tmp_path):
    """It runs on Apple devices only: what is written is read again, and its operators are looked at."""
    coremltools = pytest.importorskip('coremltools', reason='coremltools, of the extra "runtimes", is not installed')
    path, model = tmp_path / 'model.mlpackage', network('test_cotnet').half()
    export.export(model, path, 'coreml', torch.randn(1, 3, 64, 64).half())
    assert {p.dtype for p in model.parameters()} == {torch.float16}  # though it is converted in float32
    spec = coremltools.utils.load_spec(str(path))
    block = next(iter(spec.mlProgram.functions['main'].block_specializations.values()))
    counts = collections.Counter(operation.type for operation in block.operations)
    assert counts['conv'] == 43 and counts['mul'] >= 36
