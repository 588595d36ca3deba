"""Operators of folded models: numbers, packed filters, and which graphs hold them."""
import gc

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import nn

from timm_cotnet import CotLayer, CoxtLayer
from timm_cotnet.ops import folded, native
from timm_cotnet.ops.folded import can_run_packed, conv2d_act

from golden import filled, golden_input

needs_packed = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason='this PyTorch is built without oneDNN')
needs_native = pytest.mark.skipif(
    isinstance(native.load(torch.float32), str), reason='no C compiler: there are no kernels to call')
needs_exporting = pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_exporting'), reason='PyTorch 2.6 cannot tell compiling from exporting')


def convolution(in_channels=16, out_channels=24, kernel_size=1, groups=1, bias=True, act='relu', addend=True):
    """Arguments of `conv2d_act`."""
    x = golden_input((2, in_channels, 5, 7), 'x').float()
    weight = golden_input((out_channels, in_channels // groups, kernel_size, kernel_size), 'w').float()
    return [
        x, weight, golden_input((out_channels,), 'b').float() if bias else None,
        golden_input((2, out_channels, 5, 7), 'a').float() if addend else None,
        [1, 1], [kernel_size // 2] * 2, [1, 1], groups, act]


CONVOLUTIONS = [
    {}, dict(addend=False), dict(kernel_size=3, groups=4), dict(bias=False, act='swish', addend=False),
    dict(kernel_size=5, groups=2, addend=False, act='none'), dict(groups=2, bias=False)]


def expected(x, weight, bias, addend, stride, padding, dilation, groups, act):
    args = (t if t is None else t.double() for t in (x, weight, bias))
    out = F.conv2d(*args, stride, padding, dilation, groups)
    out = out if addend is None else out + addend.double()
    return {'none': lambda x: x, 'relu': F.relu, 'swish': F.silu}[act](out)


@needs_packed
@torch.no_grad()
@pytest.mark.parametrize('kwargs', CONVOLUTIONS)
def test_conv2d_act(kwargs):
    args = convolution(**kwargs)
    assert can_run_packed(args[0])
    for function in (conv2d_act, torch.ops.timm_cotnet.conv2d_act):
        kept = None if args[3] is None else args[3].clone()
        out = function(*args)
        assert out.is_contiguous(memory_format=torch.channels_last)
        wanted = expected(*args)
        assert (out - wanted).abs().max() < 1e-6 * wanted.abs().max()
        assert kept is None or torch.equal(args[3], kept)
    if args[3] is not None:
        args[3] = args[3].contiguous(memory_format=torch.channels_last)
        wanted = expected(*args)
        out = conv2d_act(*args, overwrite=True)
        assert out.data_ptr() == args[3].data_ptr() and (out - wanted).abs().max() < 1e-6 * wanted.abs().max()


@needs_packed
@torch.no_grad()
def test_filters_are_packed_once_for_each_input_and_again_when_they_change():
    x, weight, *rest = convolution(addend=False)
    conv2d_act(x, weight, *rest)
    kept = folded._PACKED[id(weight)]
    conv2d_act(x[:1], weight, *rest)
    first, second = kept.made.values()
    conv2d_act(x, weight, *rest)
    assert [id(p) for p in kept.made.values()] == [id(first), id(second)]
    for rows in (1, 2, 3):
        conv2d_act(x[:, :, :rows], weight, *rest)
        assert len(kept.made) == 2
    weight.add_(1)
    assert (conv2d_act(x, weight, *rest) - expected(x, weight, *rest)).abs().max() < 1e-5
    for _ in range(6):
        weight.data = weight + 1  # other memory, soon used before, and the same version
        assert (conv2d_act(x, weight, *rest) - expected(x, weight, *rest)).abs().max() < 1e-5
    key = id(weight)
    del weight, kept
    gc.collect()
    assert key not in folded._PACKED


@torch.no_grad()
def test_what_does_not_fit_runs_plain():
    x, weight, *rest = convolution(addend=False)
    with torch.inference_mode():
        inference = weight.clone()
    assert (conv2d_act(x, inference, *rest) - expected(x, weight, *rest)).abs().max() < 1e-5
    with pytest.raises(RuntimeError, match='dtype|type'):
        conv2d_act(x, weight.double(), *rest)
    with pytest.raises(RuntimeError, match='channels'):
        conv2d_act(x[:, :8], weight, *rest)
    assert not can_run_packed(x.double()) and not can_run_packed(x[0]) and not can_run_packed(x[:0])
    with torch.enable_grad():
        assert not can_run_packed(x)
    with torch.autocast('cpu', torch.bfloat16):
        assert not can_run_packed(x)
    # the operator takes whatever reaches it
    double = [t.double() if isinstance(t, torch.Tensor) else t for t in (x, weight, *rest)]
    assert torch.equal(torch.ops.timm_cotnet.conv2d_act(*double), expected(x, weight, *rest))


@needs_packed
@torch.no_grad()
@pytest.mark.parametrize('kwargs', CONVOLUTIONS)
def test_conv2d_act_operator(kwargs):
    torch.library.opcheck(torch.ops.timm_cotnet.conv2d_act.default, convolution(**kwargs))


@needs_packed
@torch.no_grad()
def test_operator_that_overwrites():
    args = convolution()
    wanted = expected(*args)
    torch.library.opcheck(torch.ops.timm_cotnet.conv2d_add_act_.default, args)
    for dtype in (torch.float32, torch.float64):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            given = [t.to(dtype) if isinstance(t, torch.Tensor) else t for t in args]
            given[3] = given[3].clone(memory_format=memory_format)
            assert torch.ops.timm_cotnet.conv2d_add_act_(*given) is None
            assert (given[3] - wanted).abs().max() < 1e-6 * wanted.abs().max()


@needs_native
@torch.no_grad()
@pytest.mark.parametrize('layer_cls', [CotLayer, CoxtLayer])
def test_cot_layer_operator(layer_cls):
    layer = filled(layer_cls(32)).eval()
    x = golden_input((2, 32, 5, 7), 'x')
    expected = layer(x)
    fused = layer.fuse().float()
    x = x.float()
    parameters, settings = fused._parameters_and_settings()
    assert folded.why_not_cot_layer(x, parameters, settings) is None
    args = (x, list(parameters), *settings)
    assert (torch.ops.timm_cotnet.cot_layer(*args) - expected).abs().max() < 2e-5
    torch.library.opcheck(torch.ops.timm_cotnet.cot_layer.default, args)


@needs_native
@needs_exporting
@torch.no_grad()
@pytest.mark.parametrize('layer_cls', [CotLayer, CoxtLayer])
def test_parameters_made_in_inference_mode(layer_cls):
    """They have no version and are never packed; whatever the memory format of x, the kernels get channels-last."""
    layer = filled(layer_cls(32)).eval()
    x = golden_input((2, 32, 6, 5), 'x')
    expected = layer(x)
    fused = layer.fuse().float()
    for module in fused.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            with torch.inference_mode():
                setattr(module, name, nn.Parameter(parameter.clone(), False))
    assert all(p.is_inference() for p in fused.parameters())
    torch._dynamo.reset()
    for function in (fused, torch.compile(fused, backend='aot_eager')):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            assert (function(x.float().contiguous(memory_format=memory_format)) - expected).abs().max() < 2e-5


@needs_native
@torch.no_grad()
def test_hooks_see_the_parts_run():
    fused = filled(CotLayer(32)).eval().fuse().float()
    x, seen = golden_input((1, 32, 6, 5), 'x').float(), []
    wanted = fused(x)
    fused.query.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert (fused(x) - wanted).abs().max() < 1e-5 and seen == [(1, 16, 6, 5)]


@needs_exporting
@torch.no_grad()
def test_forward_derivatives_are_compiled_plain():
    fused = filled(CotLayer(32)).eval().fuse().float()
    x, tangent = golden_input((1, 32, 6, 5), 'x').float(), golden_input((1, 32, 6, 5), 't').float()

    def derive(x, tangent):
        return torch.func.jvp(fused, (x,), (tangent,))[1]
    wanted = derive(x, tangent)
    torch._dynamo.reset()
    actual = torch.compile(derive, backend='aot_eager')(x, tangent)
    assert wanted.abs().max() > 0.1 and (actual - wanted).abs().max() < 1e-4 * wanted.abs().max()


@needs_native
@torch.no_grad()
def test_why_not_cot_layer():
    fused = filled(CotLayer(32)).eval().fuse().float()
    x = torch.zeros(1, 32, 5, 5)
    parameters, settings = fused._parameters_and_settings()
    assert 'kernel_size' in folded.why_not_cot_layer(x, parameters, settings._replace(kernel_size=9))
    wrong = parameters._replace(shift=parameters.shift.double())
    assert 'dtype' in folded.why_not_cot_layer(x, wrong, settings)
    wrong = parameters._replace(se_expand=parameters.se_expand.transpose(0, 1))
    assert 'contiguous' in folded.why_not_cot_layer(x, wrong, settings)


def operators(model, x):
    """Names of this package's operators in the graph that torch.compile makes of the model, and what it returns."""
    names = []

    def backend(graph, _):
        names.extend(
            name for name in ('conv2d_act', 'conv2d_add_act_', 'cot_layer') for node in graph.graph.nodes
            if node.op == 'call_function' and str(node.target).startswith(f'timm_cotnet.{name}'))
        return graph
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True)(x), names


@needs_packed
@needs_native
@needs_exporting
def test_only_graphs_compiled_for_evaluation_hold_operators():
    model = reparameterize_model(filled(timm.create_model('test_cotnet')).eval()).float()
    x = golden_input((2, 3, 64, 64), 'fold').float()
    with torch.no_grad():
        wanted = model(x)
        kept = x.clone()
        out, names = operators(model, x)
        assert names.count('cot_layer') == names.count('conv2d_add_act_') == 4 and names.count('conv2d_act') >= 8
        assert torch.equal(x, kept)
        assert (out - wanted).abs().max() < 1e-5 * wanted.abs().max()
        for export in (lambda: torch.export.export(model, (x,)), lambda: torch.export.export(model, (x,), strict=True)):
            assert not [n for n in export().graph.nodes if 'timm_cotnet' in str(n.target)]
        with torch.autocast('cpu', torch.bfloat16):
            assert not operators(model, x)[1]
        assert not operators(model.double(), x.double())[1]
        model.float()
        seen = []
        handle = model.layer1[0].conv2.value.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        assert operators(model, x)[1].count('cot_layer') == 3 and len(seen) == 1
        handle.remove()
    assert not operators(model, x)[1]  # gradients are wanted


@needs_packed
@needs_native
@needs_exporting
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('dtype, bound', [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_inductor(dtype, bound):
    """Compiled once for any batch and size; equal to the eager model."""
    model = reparameterize_model(filled(timm.create_model('cotnext50_2x48d', layers=(2, 1, 1, 1))).eval()).to(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 64, 64), (3, 3, 64, 96), (5, 3, 32, 64)):
        x = golden_input(shape, 'fold').to(dtype)
        wanted = model(x)
        assert (compiled(x) - wanted).abs().max() < bound * wanted.abs().max()




@needs_native
@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(2, 16, 8, 6), (1, 3, 7, 9), (3, 64, 1, 5), (1, 24, 2, 1)])
def test_max_pool(dtype, shape):
    x = golden_input(shape, 'x').to(dtype).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = float('nan')
    x[-1, -1] = float('-inf')
    pool = nn.MaxPool2d(3, 2, 1)
    out = folded.max_pool(x, pool)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out.nan_to_num(7), pool(x).nan_to_num(7)) and out[0, 0, 0, 0].isnan()
    for other in (nn.MaxPool2d(3, 2), nn.MaxPool2d(2, 2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Identity()):
        if min(shape[2:]) > 2 or isinstance(other, nn.Identity):
            assert folded.max_pool(x, other).shape == other(x).shape
