"""Methods that programs replace, on an object or a whole class, and modes that see functions: none is passed by."""
import copy
import types

import pytest
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import nn
from torch.overrides import TorchFunctionMode

from timm_cotnet import CoTAttention, CotBottleneck, CotLayer

from helpers import MODULES, create, difference, image, plain_wing, run_python
from test_replaced import (
    CHILDREN, TOLERANCE, WAYS, assert_same, assert_training, expected_training, fast_paths, kind_around)


def half(self, *args):
    """What convolutions get is that of their class, what they give is half."""
    return 0.5 * F.conv2d(*args, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize('name, path', [
    (name, path) for name, path in CHILDREN if type(create(name).get_submodule(path)) is nn.Conv2d])
def test_convolution_with_a_method_of_its_own(name, path):
    """As is common to let convolutions see images that repeat themselves."""
    module = create(name).train()
    conv = module.get_submodule(path)
    conv._conv_forward = types.MethodType(half, conv)
    assert_same(module, name, path)
    assert kind_around(name, path) not in fast_paths(module, name)


@torch.no_grad()
@pytest.mark.parametrize('name', MODULES)
def test_folded_convolution_with_a_method_of_its_own(name):
    folded = reparameterize_model(nn.Sequential(create(name).eval()))
    x = image(3, MODULES[name][1], memory_format=torch.channels_last)
    for path, child in folded.named_modules():
        if type(child) is nn.Conv2d:
            changed = copy.deepcopy(folded)
            conv = changed.get_submodule(path)
            conv._conv_forward = types.MethodType(half, conv)
            expected = copy.deepcopy(changed).double()(x.double())
            for plain in (False, True):
                with plain_wing(plain):
                    assert difference(changed(x), expected) < TOLERANCE, path


@pytest.mark.parametrize('method', ['contexts', '_concatenate'])
def test_layer_with_a_method_of_its_own(method):
    def other(self, *args):
        out = getattr(type(self), method)(self, *args)
        return (1.5 * out[0], out[1]) if method == 'contexts' else 1.5 * out

    for name in ('CotLayer', 'CoxtLayer', 'CotBottleneck'):
        module = create(name).train()
        layer = module if isinstance(module, CotLayer) else module.conv2
        setattr(layer, method, types.MethodType(other, layer))
        assert_same(module, name, method)
        assert 'cot_layer' not in fast_paths(module, name)


@pytest.mark.parametrize('cls, method', [
    (nn.Module, '__call__'), (nn.Conv2d, 'forward'), (nn.Conv2d, '_conv_forward'), (nn.BatchNorm2d, 'forward'),
    (nn.GroupNorm, 'forward'), (nn.ReLU, 'forward'), (nn.SiLU, 'forward'), (nn.Sequential, 'forward'),
    (CotLayer, 'contexts'), (CotLayer, 'forward'), (CotBottleneck, 'forward'), (CoTAttention, 'forward')])
def test_method_of_a_class(cls, method, monkeypatch):
    """Replaced for all objects, as profilers and programs that change models do."""
    written, called = getattr(cls, method), []

    def other(self, *args):
        called.append(type(self))
        out = written(self, *args)
        if len(self._modules) == 1 or method == '__call__' and type(self) is not nn.Conv2d:
            return out  # the module around one that is folded
        return tuple(1.25 * t for t in out) if isinstance(out, tuple) else 1.25 * out
    for name in MODULES:
        module = create(name).train()
        with monkeypatch.context() as patch:
            patch.setattr(cls, method, other)
            called.clear()
            fast = fast_paths(module, name)
            if issubclass(cls, (CotLayer, CotBottleneck, CoTAttention)) and method == 'forward':
                assert called or not any(isinstance(m, cls) for m in module.modules())  # nobody is asked there
            else:
                assert not fast
            assert_same(module, name, method)


@pytest.mark.parametrize('name', ['conv2d', 'batch_norm', 'group_norm', 'relu', 'silu', 'avg_pool2d'])
def test_function_of_pytorch(name, monkeypatch):
    """Replaced in `torch.nn.functional`, as some profilers do to count what is computed."""
    written = getattr(F, name)
    for kind in MODULES:
        module = create(kind).train()
        with monkeypatch.context() as patch:
            patch.setattr(F, name, lambda *args, **kwargs: 1.25 * written(*args, **kwargs))
            assert not fast_paths(module, kind)
            assert_same(module, kind, name)


@torch.no_grad()
@pytest.mark.parametrize('name', ['conv2d', 'group_norm', 'relu', 'silu'])
def test_function_replaced_after_folding(name, monkeypatch):
    written = getattr(F, name)
    for kind in MODULES:
        folded = reparameterize_model(nn.Sequential(create(kind).eval()))
        x = image(3, MODULES[kind][1], memory_format=torch.channels_last)
        before = folded(x)
        with monkeypatch.context() as patch:
            patch.setattr(F, name, lambda *args, **kwargs: 1.25 * written(*args, **kwargs))
            expected = copy.deepcopy(folded).double()(x.double())
            assert difference(folded(x), expected) < TOLERANCE
        assert difference(folded(x), before) == 0


@pytest.mark.slow
def test_method_replaced_before_the_import():
    assert run_python('-c', """
import torch
torch.nn.ReLU.forward = lambda self, x: x
import timm_cotnet
layer = timm_cotnet.CotLayer(16)
timm_cotnet.explain(layer, torch.ones(2, 16, 4, 4).contiguous(memory_format=torch.channels_last))
""").startswith('CotLayer  its own modules\n')


class Smaller(TorchFunctionMode):
    """Convolutions give less, whoever calls them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 0.75 * out if func in (F.conv2d, torch.conv2d) else out


@pytest.mark.parametrize('name', MODULES)
def test_function_mode(name):
    module = create(name).train()
    folded = reparameterize_model(nn.Sequential(create(name).eval()))
    with Smaller():
        expected = expected_training(module, MODULES[name][1])
        for memory_format, plain in WAYS:
            x = image(5, MODULES[name][1], memory_format=memory_format)
            with plain_wing(plain) as wing:
                changed = copy.deepcopy(module).to(memory_format=memory_format)
                assert_training(changed, x.clone(memory_format=torch.preserve_format), expected, 'function mode')
                with torch.no_grad():
                    assert difference(folded(x), copy.deepcopy(folded).double()(x.double())) < TOLERANCE
                assert not (wing and wing.called)


@torch.no_grad()
def test_function_mode_around_a_compiled_module():
    torch._dynamo.reset()
    folded = reparameterize_model(nn.Sequential(create('CotBottleneck').eval()))
    compiled, x = torch.compile(folded, fullgraph=True, backend='aot_eager'), image(3, 16)
    expected = copy.deepcopy(folded).double()
    for _ in range(2):
        assert difference(compiled(x), expected(x.double())) < TOLERANCE
        with Smaller():
            assert difference(compiled(x), expected(x.double())) < TOLERANCE


def test_default_device_watches_nothing():
    with torch.device('cpu'):
        for name, kinds in (('CotLayer', {'cot_layer'}), ('CotBottleneck', {'bottleneck', 'cot_layer'})):
            assert fast_paths(create(name).train(), name) == kinds
