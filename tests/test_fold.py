"""Models after timm's `reparameterize_model`: equal results, no batch norms, and whatever is done with a model."""
import copy
import io
import pickle

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from timm_cotnet import CoTAttention, CotLayer, CoxtLayer
from timm_cotnet.fused import FusedBottleneck, FusedConv2d, FusedCotLayer, FusedStage
from timm_cotnet.ops import native
from timm_cotnet.ops.folded import can_run_packed, why_not_cot_layer

from golden import filled, golden_input, load

MODELS = {
    'test_cotnet': {},
    'cotnext50_2x48d': dict(layers=(1, 2, 1, 1)),
    'se_cotnetd_50': dict(layers=(1, 1, 2, 1)),
    'se_cotnetd_152': dict(layers=(1, 1, 2, 1)),
}
FORMATS = [torch.contiguous_format, torch.channels_last]


def create(name, **kwargs):
    return filled(timm.create_model(name, **MODELS.get(name, {}), **kwargs)).eval()


def norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def difference(a, b, x):
    with torch.no_grad():
        return (a(x) - b(x)).abs().max().item()


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('training', [False, True])
def test_equal_without_batch_norms(name, training):
    model = create(name).train(training)
    folded = reparameterize_model(model)
    assert norms(model) and not norms(folded)
    assert folded.training == training
    model.eval(), folded.eval()
    for memory_format in FORMATS:
        x = golden_input((2, 3, 64, 96), 'fold').contiguous(memory_format=memory_format)
        assert difference(folded, model, x) < 1e-8


@pytest.mark.parametrize('name', MODELS)
def test_fast_path_is_close_in_float32(name):
    """The kernels take float32, so they show in float32 only."""
    model = create(name)
    folded = reparameterize_model(model).float()
    x = golden_input((3, 3, 64, 96), 'fold')
    with torch.no_grad():
        expected = model(x)
        for memory_format in FORMATS:
            actual = folded(x.float().contiguous(memory_format=memory_format))
            assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
            again = folded(x[:1].float().contiguous(memory_format=memory_format))  # packed for another shape
            assert (again - expected[:1]).abs().max() < 1e-4 * expected.abs().max()


def test_golden_in_float32_and_bfloat16():
    data = load('cotnet50')
    x, expected = golden_input((2, 3, 96, 96), 'input96x96'), data['eval_logits_96x96']
    folded = reparameterize_model(create('cotnet50'))
    with torch.no_grad():
        assert (folded(x) - expected).abs().max() < 1e-9
        folded.float()
        assert (folded(x.float()) - expected).abs().max() < 1e-5
        assert (folded.bfloat16()(x.bfloat16()) - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize('layer_cls, dim, kernel_size, dilation', [
    (CotLayer, 16, 3, 1), (CotLayer, 64, 5, 2), (CotLayer, 136, 3, 1), (CoxtLayer, 96, 3, 2), (CoxtLayer, 32, 7, 1)])
@pytest.mark.parametrize('batch', [1, 3])
def test_native_layer(layer_cls, dim, kernel_size, dilation, batch):
    layer = filled(layer_cls(dim, kernel_size, dilation)).eval()
    fused = layer.fuse()
    x = golden_input((batch, dim, 9, 7), 'native')
    with torch.no_grad():
        expected = layer(x)
        assert (fused(x) - expected).abs().max() < 1e-10
        fused.float()
        static = x.float().contiguous(memory_format=torch.channels_last)
        if native.why_not_native(static) is None:
            assert why_not_cot_layer(static, *fused._parameters_and_settings()) is None
        for threads in (1, 2, 4):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                assert (fused(static) - expected).abs().max() < 2e-5
            finally:
                torch.set_num_threads(before)


@pytest.mark.parametrize('dim', [8, 24, 64, 136])
@pytest.mark.parametrize('batch', [1, 3])
def test_native_layer_in_bfloat16(dim, batch):
    """Also the channels that fill no vector; a NaN stays where filters reach it until it is pooled."""
    fused = filled(CotLayer(dim)).eval().fuse()
    x = golden_input((batch, dim, 6, 7), 'native')
    with torch.no_grad():
        expected = fused(x)
        fused.bfloat16()
        x = x.bfloat16().contiguous(memory_format=torch.channels_last)
        actual = fused(x)
        assert (actual - expected).abs().max() < 0.02 * expected.abs().max()
        x[0, :, 1, 1] = float('nan')
        broken = fused(x)
        assert broken[0].isnan().all() and torch.equal(broken[1:], actual[1:])


def test_silu_of_large_numbers():
    layer = filled(CotLayer(64)).eval().fuse().float()
    x = golden_input((2, 64, 5, 3), 'native').float()
    with torch.no_grad():
        for shift in (-1e30, -100, -40, 40, 100, 1e30):
            layer.shift.fill_(shift)
            expected = copy.deepcopy(layer).double()(x.double())
            assert (layer(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_modules_after_folding():
    folded = reparameterize_model(create('se_cotnetd_50'))
    assert all(isinstance(stage, FusedStage) for stage in (folded.layer1, folded.layer2, folded.layer3, folded.layer4))
    assert all(isinstance(block, FusedBottleneck) for block in folded.layer3)
    assert isinstance(folded.layer3[0].conv2, FusedCotLayer)
    assert isinstance(folded.layer3[1].conv2.conv, FusedConv2d)


def test_fused_layer_follows_changed_weights():
    """Packed filters are made anew when the parameters they come from change."""
    folded = reparameterize_model(create('test_cotnet')).float()
    x = golden_input((1, 3, 64, 64), 'fold').float()
    other = reparameterize_model(timm.create_model('test_cotnet').eval())
    with torch.no_grad():
        folded(x)
        folded.load_state_dict(other.state_dict())
        assert (folded(x) - other(x)).abs().max() < 1e-5
        folded.double()
        assert (folded(x.double()) - other(x)).abs().max() < 1e-4


def test_fused_layer_follows_replaced_parameters():
    """No filters that were freed are mistaken for new ones at their address, and biases are read at each call."""
    folded = reparameterize_model(timm.create_model('test_cotnet').eval())
    x = golden_input((1, 3, 64, 64), 'fold').float()
    with torch.no_grad():
        for seed in range(4):
            other = {
                name: p + 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
                for name, p in folded.named_parameters()
            }
            fresh = copy.deepcopy(folded)
            fresh.load_state_dict(other, strict=False)
            actual = torch.func.functional_call(folded, other, x)
            assert (actual - fresh(x)).abs().max() < 1e-4 * actual.abs().max()
        conv = folded.layer2[0].conv3
        conv.bias = nn.Parameter(conv.bias + 1)
        assert (folded(x) - copy.deepcopy(folded)(x)).abs().max() < 1e-5
        for module in folded.modules():
            if isinstance(module, FusedCotLayer):
                module.se_reduce.double()  # not what the kernels expect
        with pytest.raises(RuntimeError, match='dtype|type'):
            folded(x)


def test_intermediate_results_are_not_overwritten():
    folded = reparameterize_model(timm.create_model('cotnet50', layers=(3, 2, 1, 1)).eval())
    x = golden_input((1, 3, 64, 64), 'fold').float()
    kept = []
    with torch.no_grad():
        folded(x)  # once without hooks: blocks write over their inputs
        for block in folded.layer1:
            block.register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))
        stages = folded.forward_intermediates(x, intermediates_only=True)
        copies = [stage.clone() for stage in stages]
        folded.forward_head(folded.layer4(folded.layer3(folded.layer2(stages[1]))))
        folded.layer1[1].conv3.register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))
        folded(x)
    assert len(kept) == 3 + 4
    assert all(torch.equal(out, copied) for out, copied in kept)

    part = reparameterize_model(timm.create_model('cotnet50', layers=(3, 1, 1, 1)).eval()).layer1
    part[1].conv1.register_forward_pre_hook(lambda module, args: kept.append((args[0], args[0].clone())))
    with torch.no_grad():
        part(golden_input((1, 64, 8, 8), 'fold').float())
    assert len(kept) == 8 and torch.equal(*kept[-1])
    assert all(torch.equal(stage, copied) for stage, copied in zip(stages, copies))


@pytest.mark.parametrize('name', ['test_cotnet', 'se_cotnetd_50'])
def test_few_images_at_a_time(name, monkeypatch):
    """The first stages take the images in parts, unless someone watches them."""
    model = reparameterize_model(create(name)).float()
    x = golden_input((5, 3, 64, 96), 'fold').float()
    sizes = []
    early = type(model)._forward_early
    monkeypatch.setattr(
        type(model), '_forward_early', lambda self, part: sizes.append(len(part)) or early(self, part))
    with torch.no_grad():
        expected = model(x)
        assert sizes == [5]
        monkeypatch.setattr(type(model), 'MAX_BYTES', 2 * 16 * 64 * 96 * 4)
        assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert sizes == [5] + [2, 2, 1]
        monkeypatch.setattr(type(model), 'MAX_BYTES', 1)
        assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert sizes == [5] + [2, 2, 1] + [1] * 5
        seen = []
        model.layer1.register_forward_hook(lambda module, args, out: seen.append(len(out)))
        assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert seen == [5] and len(sizes) == 9


def test_stem_is_one_convolution():
    for name in ('cotnet50', 'se_cotnetd_50'):
        folded = reparameterize_model(create(name))
        conv = folded.conv1 if name == 'cotnet50' else folded.conv1[-1]
        assert isinstance(conv, FusedConv2d) and isinstance(conv.act, nn.ReLU)
        assert isinstance(folded.bn1, nn.Identity) and isinstance(folded.act1, nn.Identity)


def test_gradients_of_the_folded_model():
    model = create('test_cotnet')
    folded = reparameterize_model(model)
    grads = []
    for net in (model, folded):
        x = golden_input((1, 3, 64, 64), 'fold').requires_grad_()
        net(x).square().sum().backward()
        grads.append(x.grad)
    assert (grads[0] - grads[1]).abs().max() < 1e-10 * grads[0].abs().max().clamp(min=1)
    assert all(p.grad is not None for p in folded.parameters())


def test_features_only():
    model = create('test_cotnet', features_only=True, out_indices=(0, 2, 4))
    folded = reparameterize_model(model)
    x = golden_input((1, 3, 64, 64), 'fold')
    with torch.no_grad():
        for actual, expected in zip(folded(x), model(x)):
            assert (actual - expected).abs().max() < 1e-8
    assert not [name for name in norms(folded) if name.startswith('layer')]


def test_replaced_first_convolution():
    model = create('cotnet50')
    model.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False).double()
    folded = reparameterize_model(model)
    assert difference(folded, model, golden_input((1, 3, 64, 64), 'fold')) < 1e-8


@pytest.mark.parametrize('kwargs', [
    dict(drop_path_rate=0.1), dict(drop_block_rate=0.1), dict(act_layer='gelu'), dict(act_layer='silu'),
    dict(norm_layer='groupnorm1'),
    dict(block_args=dict(attn_layer='se'))])
def test_blocks_that_cannot_be_fused_whole(kwargs):
    model = timm.create_model('test_cotnet', **kwargs).double().eval()
    folded = reparameterize_model(model)
    assert any(not isinstance(block, FusedBottleneck) for stage in (folded.layer3, folded.layer4) for block in stage)
    x = golden_input((1, 3, 64, 64), 'fold')
    assert difference(folded, model, x) < 1e-8
    assert difference(folded.float(), model.float(), x.float()) < 1e-4


def test_empty_batch():
    for name in ('test_cotnet', 'cotnext50_2x48d'):
        with torch.no_grad():
            assert reparameterize_model(create(name)).float()(torch.zeros(0, 3, 64, 64)).shape[0] == 0


def test_article_module():
    layer = filled(CoTAttention(64)).eval()
    x = golden_input((2, 64, 9, 7), 'fold')
    with torch.no_grad():
        expected = layer(x)
        folded = reparameterize_model(nn.Sequential(layer))
        assert not norms(folded) and (folded(x) - expected).abs().max() < 1e-10


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('how', [
    'deepcopy', 'pickle', 'save', 'script', 'trace', 'fx', 'export', pytest.param('compile', marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', ['test_cotnet', 'se_cotnetd_50'])
def test_handed_on(name, how):
    model = reparameterize_model(create(name)).float()
    x = golden_input((2, 3, 64, 64), 'fold').float()
    with torch.no_grad():
        expected = model(x)
        other = _handed_on(model, how, x)
        assert (other(x) - expected).abs().max() < 1e-4 * expected.abs().max()


def _handed_on(model, how, x):
    if how == 'deepcopy':
        return copy.deepcopy(model)
    if how == 'pickle':
        return pickle.loads(pickle.dumps(model))
    if how == 'save':
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = copy.deepcopy(model)
        other.load_state_dict(torch.load(file, weights_only=True))
        return other
    if how == 'script':
        return torch.jit.script(model)
    if how == 'trace':
        return torch.jit.trace(model, x)
    if how == 'fx':
        return torch.fx.symbolic_trace(model)
    if how == 'export':
        return torch.export.export(model, (x,)).module()
    return torch.compile(model, fullgraph=True)


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_without_onednn():
    folded = reparameterize_model(create('test_cotnet')).float()
    x = golden_input((2, 3, 64, 64), 'fold').float()
    with torch.no_grad():
        expected = folded(x)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not can_run_packed(x)
            assert (folded(x) - expected).abs().max() < 1e-5 * expected.abs().max()
