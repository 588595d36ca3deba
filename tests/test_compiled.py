"""What compiled graphs hold on the CPU: operators of this package where there are kernels, with equal results."""
import copy
import shutil
from pathlib import Path

import pytest
import timm
import torch
from golden import filled
from helpers import (
    MODULES, assert_parts_are_as_pytorch_wants_them, create, difference, image, needs_cpp_compiler,
    needs_export_flag, needs_kernels, needs_onednn, run_python)
from timm.utils import reparameterize_model
from torch._dynamo import compiled_autograd

import timm_cotnet
from timm_cotnet import CotLayer, local_conv
from timm_cotnet.ops import conditions, cot_layer
from timm_cotnet.ops.compiled import arguments_of
from timm_cotnet.ops.reference import local_conv_reference

pytestmark = [needs_export_flag, needs_kernels]
MAX_NODES = 20  # of a layer in training


@pytest.fixture(autouse=True)
def graphs_made_anew():
    torch._dynamo.reset()


def graphs_of(module, *args, **kwargs):
    """The graphs that are made while the module runs on each of the images."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.graph)
        return graph

    run = torch.compile(module, fullgraph=True, backend=backend, **kwargs)
    for x in args:
        run(x)
    return graphs


def calls(graph):
    """What is called in a graph, less what only looks something up."""
    targets = [str(node.target) for node in graph.nodes if node.op.startswith('call')]
    return [target for target in targets if 'getitem' not in target and 'getattr' not in target]


def operators(graph):
    return [name.rpartition('timm_cotnet.')[2] for name in calls(graph) if 'timm_cotnet' in name]


def trained(run, module, x):
    """Output, gradients and buffers after a step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = run(x)
    (out.sin() * torch.linspace(0, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {'out': out, 'x': x.grad, **{name: p.grad for name, p in module.named_parameters()},
            **dict(module.named_buffers())}


def assert_trains_like_plain(name, x, tolerance=1e-4, **kwargs):
    """As the layer's own modules in float64; the bias of `se` has no gradient but for rounding."""
    module = create(name).train()
    exact = copy.deepcopy(module).double()
    expected = trained(exact, exact, x.double())
    got = trained(torch.compile(module, fullgraph=True, **kwargs), module, x)
    assert got['out'].stride() == expected['out'].stride()
    for key, tensor in got.items():
        assert torch.is_tensor(tensor) and tensor.stride() == expected[key].stride(), key
        if key.endswith('num_batches_tracked'):
            assert tensor == 1
        elif key != 'se.0.bias':
            assert difference(tensor, expected[key]) < tolerance, key


@pytest.mark.parametrize('name, memory_format, backend', [
    pytest.param('CotLayer', torch.contiguous_format, 'aot_eager', marks=pytest.mark.slow),
    ('CoxtLayer', torch.channels_last, 'aot_eager'), ('CotLayer', torch.channels_last, 'eager')], ids=str)
def test_training(name, memory_format, backend):
    assert_trains_like_plain(name, image(4, 32, memory_format=memory_format), backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['CotLayer', 'CoxtLayer'])
def test_training_by_inductor(name):
    assert_trains_like_plain(name, image(4, 32, memory_format=torch.channels_last))


@pytest.mark.slow
@needs_cpp_compiler
def test_graphs_on_disk_are_of_this_version(tmp_path):
    """PyTorch's cache of compiled graphs outlives a version of this package that kept other tensors."""
    package = Path(timm_cotnet.__file__).parent
    other = shutil.copytree(package, tmp_path / 'other' / 'timm_cotnet', ignore=shutil.ignore_patterns('__pycache__'))
    path = other / 'ops' / 'cpu' / 'cot_layer.py'
    source = path.read_text()
    for before, after in (
            ('return out, static_in', 'return out, x.new_zeros(2), static_in'),
            ('    static_in, key_table', '    _, static_in, key_table'),
            ('        images(C), new(4, C)', '        new(2), images(C), new(4, C)')):
        assert before in source
        source = source.replace(before, after)
    path.write_text(source)
    code = '''
import torch
import timm_cotnet
layer, x = timm_cotnet.CotLayer(16), torch.randn(4, 16, 5, 6).contiguous(memory_format=torch.channels_last)
torch.compile(layer, fullgraph=True)(x).sum().backward()
print(timm_cotnet.__file__)
'''
    for folder in (other.parent, package.parent):
        env = {'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'graphs'), 'PYTHONPATH': str(folder)}
        assert Path(run_python('-c', code, env=env, cwd=tmp_path).split()[-1]).parents[1] == folder


def test_a_layer_is_one_operator():
    x, layer = image(4, 32), CotLayer(32)
    (graph,) = graphs_of(layer, x)
    assert operators(graph) == ['train_cot_layer_on_cpu.default']
    assert len(calls(graph)) <= MAX_NODES
    layer.se[2].register_forward_hook(lambda module, args, out: None)
    torch._dynamo.reset()
    (graph,) = graphs_of(layer, x)  # of its own modules
    assert operators(graph) == ['local_conv_on_cpu.default']


@needs_onednn
@pytest.mark.parametrize('backend', [
    'aot_eager', pytest.param('inductor', marks=[pytest.mark.slow, needs_cpp_compiler])])
@pytest.mark.parametrize('part, channels, in_place', [
    ('stage', 64, 6),  # the sum of query and keys in each of three layers, and that of each block
    ('block', 256, 1)])  # whose input is somebody else's
@torch.no_grad()
def test_folded_modules_add_in_place_where_nobody_else_looks(part, channels, in_place, backend):
    stage = reparameterize_model(filled(timm.create_model('cotnet50', layers=(3, 1, 1, 1))).eval()).layer1.float()
    module = stage if part == 'stage' else stage[1]
    x = image(2, channels, memory_format=torch.channels_last)
    before, expected = x.clone(), copy.deepcopy(module).double()(x.double())
    (graph,) = graphs_of(module, x)
    assert operators(graph).count('conv2d_act_') == in_place
    torch._dynamo.reset()
    out = torch.compile(module, fullgraph=True, backend=backend)(x)
    assert torch.equal(x, before) and difference(out, expected) < 1e-5


def test_dynamic_batch():
    layer, pictures = CotLayer(32), [image(B, 32, memory_format=torch.channels_last) for B in (3, 4, 6)]
    (graph,) = graphs_of(layer, *pictures, dynamic=True)
    assert operators(graph) == ['train_cot_layer_on_cpu.default'] and layer.bn.num_batches_tracked == 3


def test_running_statistics_under_no_grad_follow_the_modules():
    layer, x = create('CotLayer').train(), image(4, 32)
    reference = copy.deepcopy(layer).double()
    with torch.no_grad():
        torch.compile(layer, fullgraph=True, backend='aot_eager')(x)
        reference(x.double())
    for name, buffer in layer.named_buffers():
        assert difference(buffer, reference.get_buffer(name)) < 1e-5, name


def test_operator_is_as_pytorch_wants_it():
    x = image(3, 32, memory_format=torch.channels_last).requires_grad_()
    args, _ = arguments_of(create('CoxtLayer'), x)
    assert set(torch.library.opcheck(conditions.cpu.train_cot_layer.operator, args).values()) == {'SUCCESS'}


def test_forward_and_backward_are_as_pytorch_wants_them():
    x = image(3, 32, memory_format=torch.channels_last)
    assert_parts_are_as_pytorch_wants_them('train_cot_layer_on_cpu', create('CotLayer'), x)


def test_definition():
    """Of the operator: what the modules compute."""
    for name in ('CotLayer', 'CoxtLayer'):
        layer, x = create(name).double().train(), image(4, 32, dtype=torch.float64)
        out = cot_layer.cot_layer(x, *cot_layer.parameters_of(layer), s=cot_layer.settings_of(layer, x))
        assert difference(out, layer(x)) < 1e-12


# Local convolution


def inputs(dtype=torch.float32, channels_last=True):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, weight = image(2, 16, 5, 6, memory_format, dtype), image(2, 18, 5, 6, memory_format, dtype, seed=2)
    return x.requires_grad_(), weight.view(2, 2, 9, 5, 6).detach().requires_grad_()


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_local_conv(dtype, channels_last):
    x, weight = inputs(dtype, channels_last)
    out = torch.compile(local_conv, fullgraph=True, backend='aot_eager')(x, weight)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = local_conv_reference(*exact)
    assert out.stride() == x.stride() and difference(out, expected) < 4 * torch.finfo(dtype).eps
    grads = torch.autograd.grad(out, (x, weight), torch.ones_like(out))
    for grad, tensor, other in zip(grads, (x, weight), torch.autograd.grad(expected.sum(), exact)):
        assert grad.stride() == tensor.stride() and difference(grad, other) < 8 * torch.finfo(dtype).eps


def test_local_conv_is_as_pytorch_wants_it():
    (graph,) = graphs_of(lambda tensors: local_conv(*tensors), inputs())
    assert operators(graph) == ['local_conv_on_cpu.default']
    for channels_last in (False, True):
        results = torch.library.opcheck(
            torch.ops.timm_cotnet.local_conv_on_cpu, (*inputs(channels_last=channels_last), 3, 1))
        assert set(results.values()) == {'SUCCESS'}


def test_second_derivatives_of_local_conv():
    x, weight = inputs()
    run = torch.compile(local_conv, fullgraph=True, backend='eager')
    results = []
    for function, tensors in ((run, (x, weight)), (local_conv_reference, [t.detach().double() for t in (x, weight)])):
        tensors = [t.requires_grad_() for t in tensors]
        grad, = torch.autograd.grad(function(*tensors).square().sum(), tensors[0], create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), tensors))
    assert all(difference(actual, expected) < 1e-5 for actual, expected in zip(*results))


def test_under_vmap_taps_are_plain():
    x, weight = (t.detach().unsqueeze(0).repeat(2, *[1] * t.ndim) for t in inputs())
    out = torch.compile(torch.vmap(local_conv), fullgraph=True, backend='eager')(x, weight)
    assert difference(out[1], local_conv_reference(x[1], weight[1])) < 1e-6


def test_without_kernels_taps_are_plain():
    x, weight = (t.detach().double() for t in inputs())
    (graph,) = graphs_of(lambda x: local_conv(x, weight), x)
    assert operators(graph) == []


@pytest.mark.filterwarnings('ignore:Dynamo does not know how to trace')
@pytest.mark.parametrize('name', ['CotLayer', 'CoxtLayer', 'CotBottleneck'])
def test_compiled_autograd_of_an_eager_forward(name):
    module, x = create(name).train(), image(3, MODULES[name][1], memory_format=torch.channels_last).requires_grad_()
    other = copy.deepcopy(module)
    expected = torch.autograd.grad(other(x).square().sum(), (x, *other.parameters()))
    with compiled_autograd._enable(torch.compile(backend='eager')):
        grads = torch.autograd.grad(module(x).square().sum(), (x, *module.parameters()))
    assert all(torch.equal(g, e) for g, e in zip(grads, expected))


@torch.no_grad()
@pytest.mark.parametrize('strict', [False, True])
def test_exported_layers_are_plain(strict):
    layer, x = create('CotLayer').eval(), image(2, 32, memory_format=torch.channels_last)
    assert 'timm_cotnet' not in str(torch.export.export(layer, (x,), strict=strict).graph)
