"""Models under what people use with them: hooks, transforms of functions, quantization, adapters, counters."""
import copy
import itertools

import pytest
import torch
from timm.utils import reparameterize_model
from torch import nn

from helpers import FORMATS, MODULES, create, difference, image, maps_group_norm, plain_wing
from test_replaced import TOLERANCE, assert_same

# Whole models under tools


@pytest.fixture(scope='module')
def model():
    import timm
    torch.manual_seed(0)
    return timm.create_model('test_cotnet').eval()


def test_each_leaf_fires_once(model):
    seen = []
    hooks = [m.register_forward_hook(lambda m, args, out: seen.append(m)) for m in model.modules()
             if not list(m.children())]
    x = image(2, 3, 64, 64, memory_format=torch.channels_last)
    for training in (False, True):
        seen.clear()
        model.train(training)(x)
        twice = [block.drop_block for stage in (model.layer1, model.layer2, model.layer3, model.layer4)
                 for block in stage]
        assert len(seen) == len(hooks) + len(twice)
        assert {m for m in seen} == {m for m in model.modules() if not list(m.children())}
    model.eval()
    for hook in hooks:
        hook.remove()


def test_global_hooks(model):
    x = image(2, 3, 64, 64, memory_format=torch.channels_last)
    folded = reparameterize_model(model)
    with torch.no_grad():
        expected = model(x), folded(x)
    for module, wanted in zip((model, folded), expected):
        for plain in (False, True):
            seen = []
            hook = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m))
            try:
                with torch.no_grad(), plain_wing(plain):
                    assert difference(module(x), wanted) < 1e-5
            finally:
                hook.remove()
            assert {m for m in module.modules() if type(m) is not nn.Dropout} <= set(seen)


@pytest.mark.slow
def test_counting_by_exact_types():
    """As tools such as thop do: each convolution is exactly `nn.Conv2d` and is called."""
    import timm
    model = timm.create_model('cotnet50').eval()
    macs, counted = [0], []

    def count(module, args, out):
        counted.append(module)
        macs[0] += out.numel() * module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert type(module) is nn.Conv2d
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(counted) == len(convolutions) == 1 + 16 * 2 + 4 + 16 * 6
    assert macs[0] == pytest.approx(3.23e9, rel=0.01)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(22.2e6, rel=0.01)


# Transforms of functions


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('name', MODULES)
def test_batched_jacobian(name, memory_format):
    """`torch.vmap` over `torch.autograd.grad`."""
    if not maps_group_norm(backward=True):
        pytest.skip('this PyTorch cannot map the backward of its own group norm of channels-last images')
    module = create(name).train()
    for plain in (False, True):
        x = image(3, MODULES[name][1], 4, 3, memory_format=memory_format).requires_grad_()
        with plain_wing(plain):
            out = copy.deepcopy(module)(x)
            rows = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(3))
            batched = torch.vmap(lambda row: torch.autograd.grad(out, x, row, retain_graph=True)[0])(rows)
            for row, actual in zip(rows, batched):
                expected, = torch.autograd.grad(out, x, row, retain_graph=True)
                assert difference(actual, expected) < TOLERANCE


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('name', MODULES)
def test_functional_transforms(name, memory_format):
    if not maps_group_norm(backward=False):
        pytest.skip('this PyTorch cannot map its own group norm of channels-last images')
    module = create(name).eval()
    folded = reparameterize_model(nn.Sequential(module))
    expected_module = copy.deepcopy(module).double()
    x = image(2, MODULES[name][1], 2, 3, memory_format=memory_format)
    tangent = image(2, MODULES[name][1], 2, 3, memory_format=memory_format, seed=4)
    _, expected = torch.func.jvp(expected_module, (x.double(),), (tangent.double(),))

    def total(module):
        return lambda x: module(x).sum((0, 2, 3))
    jacobian = torch.func.jacrev(total(expected_module))(x.double())
    for part, plain in itertools.product((module, folded), (False, True)):
        with plain_wing(plain):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    assert difference(torch.func.jvp(part, (x,), (tangent,))[1], expected) < TOLERANCE
                    many = torch.func.vmap(part)(torch.stack([x, tangent]))
                    assert difference(many[1], expected_module(tangent.double())) < TOLERANCE
            assert difference(torch.func.jacrev(total(part))(x), jacobian) < TOLERANCE


def test_second_derivative():
    for name in ('CotLayer', 'CoxtLayer'):
        module = create(name).train()
        results = []
        for dtype in (torch.float32, torch.float64):
            layer = copy.deepcopy(module).to(dtype)
            x = image(4, 32, 4, 5, memory_format=torch.channels_last, dtype=dtype).requires_grad_()
            grad, = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
            results.append((grad, *torch.autograd.grad(grad.square().sum(), [x, layer.conv1x1[0].weight])))
        for actual, expected in zip(*results):
            assert difference(actual, expected) < 1e-3


# Quantization


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning', 'ignore::FutureWarning')
@pytest.mark.parametrize('aware', [False, True])
def test_quantization_of_graphs(aware):
    """`prepare_fx` or `prepare_qat_fx`, and `convert_fx`, treat a CoT bottleneck as timm's bottleneck."""
    from timm.models.resnet import Bottleneck
    from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
    from timm_cotnet import CotBottleneck
    mapping = (get_default_qat_qconfig_mapping if aware else get_default_qconfig_mapping)('fbgemm')
    x = image(4, 64)
    errors = {}
    for block_cls in (Bottleneck, CotBottleneck):
        torch.manual_seed(0)
        block = block_cls(64, 16).train(aware)
        before = block.train(aware)
        prepared = (prepare_qat_fx if aware else prepare_fx)(copy.deepcopy(before), mapping, (x,))
        with torch.no_grad():
            for _ in range(3):
                prepared(x)
            expected = copy.deepcopy(prepared).eval()(x) if aware else before.eval()(x)
            quantized = convert_fx(prepared.eval())
            errors[block_cls] = difference(quantized(x), expected)
        convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
        assert sum('quantized' in type(m).__module__ for m in quantized.modules()) >= len(convolutions)
        assert not [m for m in quantized.modules() if type(m) is nn.Conv2d]
    assert errors[CotBottleneck] < max(0.1, 3 * errors[Bottleneck]), errors


# Tools of others


@pytest.mark.slow
def test_offloading():
    accelerate = pytest.importorskip('accelerate', reason='offloads weights: pip install accelerate')
    module = create('CotBottleneck').eval()
    folded = reparameterize_model(nn.Sequential(module))[0]
    x = image(2, 16, memory_format=torch.channels_last)
    for part in (module, folded):
        with torch.no_grad():
            expected = copy.deepcopy(part).double()(x.double())
            offloaded = accelerate.cpu_offload(part, execution_device=torch.device('cpu'))
            assert all(p.is_meta for p in offloaded.parameters())
            for plain in (False, True):
                with plain_wing(plain):
                    assert difference(offloaded(x), expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:LoRA adapter added to ConvNd')
def test_peft():
    peft = pytest.importorskip('peft', reason='adapts convolutions: pip install peft')
    module = create('CotBottleneck').train()
    config = peft.LoraConfig(
        target_modules=r'conv2\.(key_embed\.0|embed\.[03]|conv1x1\.0|se\.[03])', r=4, init_lora_weights=False)
    adapted = peft.get_peft_model(module, config)
    assert sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in adapted.modules()) == 6
    assert_same(adapted.base_model.model, 'CotBottleneck', 'peft')


@pytest.mark.slow
@pytest.mark.parametrize('tool', ['thop', 'ptflops'])
def test_counting_tools(tool):
    import timm
    counter = pytest.importorskip(tool, reason=f'counts operations: pip install {tool}')
    model = timm.create_model('cotnet50').eval()
    if tool == 'thop':
        macs, parameters = counter.profile(model, inputs=(torch.zeros(1, 3, 224, 224),), verbose=False)
    else:
        macs, parameters = counter.get_model_complexity_info(
            model, (3, 224, 224), as_strings=False, print_per_layer_stat=False, backend='pytorch', verbose=False)
    assert macs == pytest.approx(3.3e9, rel=0.05)
    assert parameters == pytest.approx(22.2e6, rel=0.01)
