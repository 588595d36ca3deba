"""Triton kernels as operators of compiled graphs against plain PyTorch in float64; see `triton_helpers.py`."""
import copy
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_parts_are_as_pytorch_wants_them, needs_export_flag
from triton_helpers import (
    DEVICE, INTERPRETED, TOLERANCE, assert_all_close, assert_trains_like_plain, create, error, exact,
    gradients_of_gradients, kernels, of_zero_gradient, outside, passed_in_the_interpreter, plain)

from timm_cotnet import CotBottleneck, CotLayer, local_conv
from timm_cotnet.ops import conditions, dispatch
from timm_cotnet.ops.compiled import arguments_of
from timm_cotnet.ops.gpu import cot_layer

pytestmark = [pytest.mark.usefixtures('exact_convolutions'), needs_export_flag]


@pytest.mark.slow
@outside
def test_kernels_in_the_interpreter():
    passed, skipped = passed_in_the_interpreter(__file__)
    assert passed >= 12 and skipped <= 2  # this test, and what needs a GPU


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """The table of a GPU also for the tensors of the interpreter, and graphs made anew."""
    torch._dynamo.reset()
    if INTERPRETED:
        monkeypatch.setattr(dispatch, '_stand_ins', lambda kind, device_type: dispatch._ON_GPU.get(kind, ()))
        monkeypatch.setattr(conditions, '_has_cudnn', torch.compiler.assume_constant_result(lambda: True))
        for name in ('torch.cudnn_convolution_relu', 'torch.cudnn_convolution_add_relu'):
            monkeypatch.setattr(name, _stand_in_for_cudnn)


def _stand_in_for_cudnn(x, weight, *args):
    addend, _, *args = args if len(args) == 7 else (0., 1., *args)
    return F.relu(F.conv2d(x, weight, *args) + addend)


def compiled(module, **kwargs):
    return torch.compile(module, fullgraph=True, backend='aot_eager', **kwargs)


def operators(module, x):
    """Names of the operators of this package in the graph of module(x), sorted; and how many calls it computes with."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.graph)
        return graph

    torch._dynamo.reset()
    torch.compile(module, fullgraph=True, backend=backend)(x)
    (graph,) = graphs
    names = [str(node.target) for node in graph.nodes if node.op.startswith('call')]
    names = [name for name in names if 'getitem' not in name and 'getattr' not in name]
    found = [re.search(r'timm_cotnet\.(\w+)', name) for name in names]
    return sorted(match[1] for match in found if match), len(names)


def run_compiled(module, x):
    return compiled(module)(x)


# Training


@kernels
@pytest.mark.parametrize('tag, memory_format', [
    ('small_cot', torch.channels_last), ('small_coxt', torch.contiguous_format)], ids=str)
def test_training(tag, memory_format):
    layer, x = create(tag, memory_format=memory_format)
    got = assert_trains_like_plain(run_compiled, layer, x, zero=of_zero_gradient(layer))
    assert got['out'].is_contiguous(memory_format=memory_format)


@kernels
def test_training_under_autocast():
    layer, x = create('cot', torch.float32)

    def run(layer, x):
        with torch.autocast(DEVICE, torch.bfloat16):
            return compiled(layer)(x)

    got = assert_trains_like_plain(run, layer, x, TOLERANCE[torch.bfloat16], of_zero_gradient(layer))
    assert got.pop('out').dtype == torch.bfloat16
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}


@kernels
def test_a_layer_is_one_operator():
    layer, x = create('small_cot')
    names, nodes = operators(layer, x)
    assert names == ['train_cot_layer'] and nodes <= 20
    layer.embed[1].register_forward_hook(lambda module, args, out: None)
    assert operators(layer, x)[0] == ([] if INTERPRETED else ['local_conv'])  # its own modules


@kernels
def test_dynamic_batch():
    layer, x = create('small_cot')
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    run = torch.compile(copy.deepcopy(layer), fullgraph=True, backend=backend, dynamic=True)
    for batch in (4, 5, 6):  # other than the image's sides, which would share its symbol
        picture = torch.cat([x, 2 * x])[:batch].contiguous(memory_format=torch.channels_last)
        assert error(run(picture), plain(*exact(layer, picture))) < 1e-9
    assert len(graphs) == 1


@kernels
def test_frozen():
    layer, x = create('small_coxt')
    layer.key_embed[0].weight.requires_grad_(False)
    layer.conv1x1[0].weight.requires_grad_(False)
    assert_trains_like_plain(run_compiled, layer, x, zero=of_zero_gradient(layer))


@kernels
def test_second_derivatives():
    """AOTAutograd has none; without it there are."""
    layer, x = create('small_cot')
    expected = gradients_of_gradients(plain, *exact(layer, x))

    def run(layer, x):
        return torch.compile(layer, fullgraph=True, backend='eager')(x)

    assert_all_close(gradients_of_gradients(run, layer, x), expected, 1e-7, of_zero_gradient(layer))


@kernels
def test_operator_is_as_pytorch_wants_it():
    layer, x = create('small_cot')
    args, _ = arguments_of(layer, x.requires_grad_())
    assert set(torch.library.opcheck(cot_layer.train_cot_layer.operator, args).values()) == {'SUCCESS'}


@kernels
def test_forward_and_backward_are_as_pytorch_wants_them():
    layer, x = create('small_coxt')
    assert_parts_are_as_pytorch_wants_them('train_cot_layer', layer, x)


@kernels
def test_local_conv_is_as_pytorch_wants_it():
    x = torch.randn(2, 8, 3, 2, device=DEVICE, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 9, 3, 2, device=DEVICE, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.timm_cotnet.local_conv, (x, weight, 3, 1))
    if not INTERPRETED:
        torch.testing.assert_close(compiled(local_conv)(x, weight), local_conv(x, weight))


# Inference


@kernels
@torch.no_grad()
@pytest.mark.parametrize('folded', [False, True], ids=['norms', 'folded'])
@pytest.mark.parametrize('tag', ['small_cot', 'coxt'])
def test_inference(tag, folded):
    dtype = torch.float32  # cuDNN's are not for float64
    layer, x = create(tag, dtype)
    expected = plain(*exact(layer.eval(), x))
    layer = layer.fuse() if folded else layer
    names, _ = operators(layer, x)
    assert names == (['conv2d_act'] * 2 if folded else []) + ['infer_contexts']
    for memory_format in (torch.channels_last, torch.contiguous_format):
        out = compiled(layer)(x.contiguous(memory_format=memory_format))
        assert error(out, expected) < 1e-5 and out.is_contiguous(memory_format=memory_format)


@kernels
@torch.no_grad()
@pytest.mark.parametrize('normed', [False, True])
def test_inference_operator_is_as_pytorch_wants_it(normed):
    value, static = (torch.randn(2, 8, 3, 2, device=DEVICE) for _ in range(2))
    of_filters = [torch.randn(18, device=DEVICE) for _ in range(3)]
    table, of_mixing = torch.randn(2, 8, device=DEVICE), torch.randn(2, 4, device=DEVICE)
    args = (
        value, torch.randn(2, 18, 3, 2, device=DEVICE), static, of_filters, table if normed else None,
        table if normed else table[0], torch.randn(4, 8, 1, 1, device=DEVICE), of_mixing[0],
        of_mixing if normed else None, torch.randn(16, 4, 1, 1, device=DEVICE), torch.randn(16, device=DEVICE),
        3, 1, 1, 2, 1e-5)
    results = torch.library.opcheck(torch.ops.timm_cotnet.infer_contexts, args)
    assert set(results.values()) == {'SUCCESS'}


@kernels
@torch.no_grad()
def test_folded_bottleneck():
    torch.manual_seed(0)
    block = CotBottleneck(32, 8).to(DEVICE).eval()
    x = torch.randn(2, 32, 3, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    expected = plain(*exact(block, x))
    block = block.fuse()
    names, _ = operators(block, x)
    assert names == ['conv2d_act'] * 4 + ['infer_contexts']
    assert error(compiled(block)(x), expected) < 1e-5


@kernels
@torch.no_grad()
def test_exported_layers_are_plain():
    layer, x = create('small_cot', torch.float32)
    for module in (layer.eval(), layer.fuse()):
        assert 'timm_cotnet' not in str(torch.export.export(module, (x,)).graph)


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason='CUDA graphs need a GPU')
@pytest.mark.slow
def test_cuda_graphs():
    layer = CotLayer(64).cuda()
    x = torch.randn(8, 64, 14, 14, device='cuda').contiguous(memory_format=torch.channels_last)
    reference, run = copy.deepcopy(layer), torch.compile(layer, fullgraph=True, mode='reduce-overhead')
    for _ in range(4):
        out, expected = run(x.requires_grad_()), reference(x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(o.square().mean(), x)[0] for o in (out, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bn.running_var, reference.bn.running_var)
