"""Captured graphs: what exporters, tracers and compilers find in modules for which something may stand in."""
import copy

import pytest
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from helpers import MODULES, create, difference, image, needs_export_flag, plain_wing


def fold(module):
    return reparameterize_model(nn.Sequential(module))[0]


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


def captured(how, module, x):
    """The module as a graph, its text, and what runs it."""
    if how == 'script':
        graph = torch.jit.script(copy.deepcopy(module))
        return str(torch.jit.freeze(graph.eval()).graph), graph
    if how == 'trace':
        graph = torch.jit.trace(module, x, check_trace=False)  # a check runs the module once more
        return str(graph.inlined_graph), graph
    if how == 'fx':
        graph = torch.fx.symbolic_trace(module)
        return graph.code, graph
    if how == 'make_fx':
        graph = make_fx(module)(x)
        return graph.code, graph
    if how == 'export':
        program = torch.export.export(module, (x,))
        return str(program), program.module()
    return '', torch.compile(module, fullgraph=True, backend='aot_eager')


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('how', ['script', 'trace', 'fx', 'make_fx', 'export', 'compile'])
@pytest.mark.parametrize('folded', [False, True])
@pytest.mark.parametrize('name', MODULES)
def test_captured(name, folded, how):
    """Equal, also on another image, and of plain operators that need nothing of this package later."""
    torch._dynamo.reset()
    module = create(name).eval()
    expected_module = copy.deepcopy(module).double()
    if folded:
        module = fold(module)
    x, other = image(3, MODULES[name][1]), image(3, MODULES[name][1], memory_format=torch.channels_last, seed=5)
    with torch.no_grad():
        text, graph = captured(how, module, x)
        assert 'timm_cotnet::' not in text and 'ops.timm_cotnet' not in text
        assert bool(text) == (how != 'compile')
        for picture in (x,) if how == 'make_fx' else (x, other):  # which keeps the strides of x
            assert difference(graph(picture), expected_module(picture.double())) < 1e-5


@pytest.mark.parametrize('name', MODULES)
def test_compiled_training(name):
    torch._dynamo.reset()
    module = create(name).train()
    results = []
    for part, dtype in ((torch.compile(copy.deepcopy(module), fullgraph=True, backend='aot_eager'), torch.float32),
                        (copy.deepcopy(module).double(), torch.float64)):
        x = image(4, MODULES[name][1], memory_format=torch.channels_last, dtype=dtype).requires_grad_()
        out = part(x)
        out.square().sum().backward()
        results.append((out, x.grad, *(b for b in part.buffers())))
    assert all(difference(actual, expected) < 1e-4 for actual, expected in zip(*results))


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('how', ['trace', 'make_fx', 'export', 'script', 'fx'])
def test_captured_with_kernels_at_hand(how):
    """None of them is called while a graph is made."""
    x = channels_last(3, 32, 6, 7)
    for module in (create('CotLayer').train(), fold(create('CotLayer').eval())):
        training = module.training
        with plain_wing() as wing, torch.set_grad_enabled(training):
            captured(how, module, x)
        assert not wing.called


@needs_export_flag
@torch.no_grad()
@pytest.mark.parametrize('name', ['CotLayer', 'CoxtLayer', 'CotBottleneck', 'SplitAttnBottleneck'])
def test_compiled_with_kernels_at_hand(name):
    """Folded modules become one graph, which is made anew when a hook is set."""
    torch._dynamo.reset()
    module = create(name).eval()
    folded = fold(module)
    x = channels_last(3, MODULES[name][1], 6, 7)
    ask = name == 'SplitAttnBottleneck'  # nothing stands in for it: PyTorch itself has to look at hooks
    with plain_wing() as wing, torch._dynamo.config.patch(skip_nnmodule_hook_guards=not ask):
        compiled = torch.compile(folded, fullgraph=True, backend='aot_eager')
        assert difference(compiled(x), copy.deepcopy(module).double()(x.double())) < 1e-5
        assert wing.called or name == 'SplitAttnBottleneck'
        folded.get_submodule('act3' if 'Bottleneck' in name else 'key_embed').register_forward_hook(
            lambda module, args, out: 1.5 * out)
        assert difference(compiled(x), copy.deepcopy(folded).double()(x.double())) < 1e-5
