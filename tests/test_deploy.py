"""What `reparameterize_model` makes of layers, blocks and networks: equal results, whatever was done to them before."""
import copy
import io
import pickle

import pytest
import timm
import torch
from golden import filled, golden_input, load
from timm.layers import BatchNormAct2d, BlurPool2d, FrozenBatchNormAct2d
from timm.utils import reparameterize_model
from torch import nn

from timm_cotnet import CoTAttention, CotBottleneck, CotLayer, CoxtLayer
from timm_cotnet.deploy import FoldedBottleneck, FoldedCotAttention, FoldedCotLayer, FoldedStage, FoldedStem
from timm_cotnet.ops import dispatch

from deploy_helpers import FOLDED, MODELS, check, fold, made, model_of, network, pictures
from helpers import FORMATS, MODULES, create, difference, has_kernels, image, implementations, norms, plain_wing, shaken


# Layers and blocks


@pytest.mark.parametrize('layer_cls, dim, kernel_size, dilation', [
    (CotLayer, 8, 1, 1), (CotLayer, 16, 3, 1), (CotLayer, 64, 5, 2), (CotLayer, 136, 3, 1), (CoxtLayer, 96, 3, 2),
    (CoxtLayer, 32, 5, 1), (CoxtLayer, 16, 7, 3)])
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('plain', [False, True])
def test_cot_layers(layer_cls, dim, kernel_size, dilation, batch, plain):
    layer = filled(layer_cls(dim, kernel_size, dilation)).eval()
    folded = fold(layer)
    assert type(folded) is FoldedCotLayer and not norms(folded)
    with plain_wing(plain):
        check(layer, folded, image(batch, dim, 9, 7))


@pytest.mark.parametrize('dim, kernel_size', [(16, 1), (64, 3), (24, 5)])
def test_article_module(dim, kernel_size):
    module = filled(CoTAttention(dim, kernel_size)).eval()
    folded = fold(module)
    assert type(folded) is FoldedCotAttention and not norms(folded)
    assert folded.attention_embed[-1].out_channels == dim  # the logits of the taps are averaged before they are made
    check(module, folded, image(2, dim, 9, 7))


@pytest.mark.parametrize('name', MODULES)
def test_standalone_modules_of_a_sequence(name):
    module = made(name)
    for training in (False, True):
        folded = fold(module.train(training))
        assert type(folded) is FOLDED[name] and not norms(folded)
        assert all(part.training == training for part in folded.modules())
        check(module, folded, image(3, MODULES[name][1]))


@pytest.mark.parametrize('name', ['CotLayer', 'CoxtLayer', 'CotBottleneck', 'SplitAttnBottleneck'])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize('memory_format', FORMATS)
def test_fast_path_is_taken_without_gradients(name, dtype, tolerance, memory_format):
    """Installed kernels where they can run, and else the seam's conditions with kernels in plain PyTorch."""
    module = create(name).eval().to(dtype).double()
    folded = fold(module).to(dtype)
    x = image(3, MODULES[name][1], memory_format=memory_format, dtype=dtype)
    fast = {'CotBottleneck': ['packed convolutions', 'packed convolutions and a C kernel'],
            'SplitAttnBottleneck': ['packed convolutions']}.get(name, ['packed convolutions and a C kernel'])
    with torch.no_grad():
        expected = module(x.double())
        if has_kernels() and dispatch.onednn.why_not_packed(dtype) is None:
            used, out = implementations(folded, x)
            assert used == fast and out.dtype == dtype and difference(out, expected) < tolerance
        with plain_wing():
            used, out = implementations(folded, x)
            assert used == fast and out.dtype == dtype and difference(out, expected) < tolerance
    with plain_wing() as wing:  # gradients may be wanted
        used, out = implementations(folded, x)
        assert not wing.called and set(used) == {'its own modules'} and difference(out, expected) < tolerance


@torch.no_grad()
@pytest.mark.parametrize('name', MODULES)
def test_inputs_of_any_strides(name):
    """Parts of larger images, every other channel, expanded, transposed, few pixels; and x stays as it is."""
    module = made(name)
    folded = fold(module).float()
    C = MODULES[name][1]
    for what, x in {
            'part': image(3, C, 9, 9, memory_format=FORMATS[1])[..., 1:7, 2:8],
            'channels': image(3, 2 * C, memory_format=FORMATS[1])[:, ::2],
            'expanded': image(1, C, memory_format=FORMATS[1]).expand(3, -1, -1, -1),
            'one color': image(3, 1).expand(-1, C, -1, -1),
            'transposed': image(3, C, memory_format=FORMATS[1]).transpose(2, 3),
            'flipped batch': image(3, C, memory_format=FORMATS[1])[1:],
            'one pixel': image(3, C, 1, 1),
            'one row': image(2, C, 1, 5, memory_format=FORMATS[1]),
            'one column': image(2, C, 5, 1),
    }.items():
        kept = x.clone()
        expected = module(x.double())
        for plain in (False, True):
            with plain_wing(plain):
                assert difference(folded(x), expected) < 1e-4, what
                assert torch.equal(x, kept), what


@pytest.mark.parametrize('name', MODULES)
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_inference_mode_first(name, dtype, tolerance):
    """Whatever is packed in inference mode serves, or is made anew, outside of it."""
    module = made(name)
    folded = fold(module).to(dtype)
    x = image(3, MODULES[name][1], memory_format=FORMATS[1], dtype=dtype)
    expected = module(x.double())
    with torch.inference_mode():
        assert difference(folded(x), expected) < tolerance
    with torch.no_grad():
        assert difference(folded(x), expected) < tolerance
    out = folded(x.requires_grad_())
    out.float().square().sum().backward()
    assert difference(out, expected) < tolerance and all(p.grad is not None for p in folded.parameters())


@torch.no_grad()
@pytest.mark.parametrize('name', MODULES)
def test_autocast(name):
    module = made(name)
    folded = fold(module).float()
    x = image(3, MODULES[name][1], memory_format=FORMATS[1])
    for plain in (False, True):
        with plain_wing(plain), torch.autocast('cpu', torch.bfloat16):
            assert difference(folded(x), module(x.double())) < 0.05


@pytest.mark.parametrize('change, logits', [
    (lambda layer: None, 1), (lambda layer: layer.se[3].register_forward_hook(lambda *_: None), 2),
    (lambda layer: layer.se.__setitem__(3, nn.Conv2d(32, 64, 1, groups=2)), 2),
    (lambda layer: layer.se.__setitem__(3, nn.Conv2d(32, 64, 1, bias=False)), 1)])
def test_logits_of_the_mix(change, logits):
    """Their difference is all that is made of them; where the convolution that makes them is known."""
    layer = create('CotLayer').eval()
    change(layer)
    layer.double()
    folded = fold(layer)
    assert folded.se[2].out_channels == logits * layer.dim and folded.paired == (logits == 2)
    x = image(2, 32, dtype=torch.float64)
    assert difference(folded(x), layer(x)) < 1e-12


def test_gradients_of_folded_modules():
    for name in MODULES:
        module = create(name).double().eval()
        grads = []
        for part in (module, fold(module)):
            x = image(2, MODULES[name][1], dtype=torch.float64).requires_grad_()
            part(x).square().sum().backward()
            grads.append(x.grad)
            assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
        assert difference(*grads) < 1e-10, name


def test_nothing_is_shared_with_the_module_before():
    """Folding copies, so that training on the one changes nothing in the other."""
    module = create('CotBottleneck').eval()
    folded = fold(module)
    storages = {p.data_ptr() for p in module.parameters()}
    assert not storages & {p.data_ptr() for p in folded.parameters()}


# Networks


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('training', [False, True])
def test_networks(name, training):
    model = model_of(name).train(training)
    folded = reparameterize_model(model)
    assert norms(model) and not norms(folded)
    assert all(part.training == training for part in folded.modules())
    check(model, folded, pictures(2, 3, 64, 96), tolerance=1e-9)
    blocks = [block for stage in (folded.layer1, folded.layer2, folded.layer3, folded.layer4) for block in stage]
    assert all(type(block) is FoldedBottleneck for block in blocks)


def test_golden():
    data = load('cotnet50')
    x, expected = golden_input((2, 3, 96, 96), 'input96x96'), data['eval_logits_96x96']
    folded = reparameterize_model(filled(timm.create_model('cotnet50')).eval())
    with torch.no_grad():
        assert (folded(x) - expected).abs().max() < 1e-9
        folded.float()
        for memory_format in FORMATS:
            assert (folded(x.float().contiguous(memory_format=memory_format)) - expected).abs().max() < 1e-5
        folded.bfloat16()
        for memory_format in FORMATS:
            x = x.bfloat16().contiguous(memory_format=memory_format)
            assert difference(folded(x), expected) < 0.05


def test_golden_layers():
    data = load('layers')
    for tag, layer in (
            ('cot_dim64_k3', CotLayer(64)), ('coxt_dim96_k3', CoxtLayer(96)), ('seed_dim64_k3', CoTAttention(64))):
        x = golden_input(tuple(data[f'{tag}_eval'].shape), 'layer' + tag)
        assert (fold(filled(layer).eval())(x) - data[f'{tag}_eval']).abs().max() < 1e-9


def test_stem_is_folded():
    plain, deep = (reparameterize_model(model_of(name)) for name in ('cotnext50_2x48d', 'se_cotnetd_50'))
    for model, convs in ((plain, 1), (deep, 3)):
        assert [type(m) for m in model.conv1] == [nn.Conv2d, nn.ReLU] * convs
        assert all(conv.bias is not None for conv in model.conv1[::2])
        assert type(model.conv1) is FoldedStem and type(model.bn1) is type(model.act1) is nn.Identity


@torch.no_grad()
@pytest.mark.parametrize('name', ['test_cotnet', 'se_cotnetd_50'])
def test_stem_that_somebody_changed(name):
    """ReLU goes into the stem only where it is one and nobody watches; afterwards what is changed is called."""
    x = image(2, 3, 64, 64, memory_format=torch.channels_last)
    for change in (
            lambda model: setattr(model, 'act1', nn.GELU()),
            lambda model: model.act1.register_forward_hook(lambda module, args, out: 2 * out)):
        model = model_of(name).float()
        change(model)
        folded = reparameterize_model(model)
        assert type(folded.act1) is type(model.act1) and type(folded.conv1) is not FoldedStem
        assert difference(folded(x), copy.deepcopy(model).double()(x.double())) < 1e-4
    model = model_of(name).float()
    for change in (
            lambda stem: stem.__setitem__(1, nn.GELU()),
            lambda stem: stem[0].register_forward_hook(lambda module, args, out: 2 * out),
            lambda stem: stem.append(nn.Sigmoid()),
            lambda stem: stem[0].weight.data.mul_(2)):
        folded = reparameterize_model(model)
        folded(x)
        change(folded.conv1)
        assert difference(folded(x), copy.deepcopy(folded).double()(x.double())) < 1e-4


def test_stem_of_a_copy_of_a_copy():
    model = model_of('test_cotnet')
    for made in (copy.deepcopy(copy.deepcopy(model)), pickle.loads(pickle.dumps(copy.deepcopy(model))),
                 torch.load(saved(model), weights_only=False)):
        before = copy.deepcopy(model.state_dict())
        assert not norms(reparameterize_model(made, inplace=True))
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
        check(model, made, pictures())


def saved(something):
    file = io.BytesIO()
    torch.save(something, file)
    file.seek(0)
    return file


def test_networks_are_freed():
    import gc
    import weakref
    model = model_of('test_cotnet')
    ref = weakref.ref(model)
    stage = model.layer1
    del model
    gc.collect()
    assert ref() is None
    assert type(stage.fuse()) is FoldedStage  # without a network there is no stem


@torch.no_grad()
def test_stage_writes_over_nothing_that_others_have():
    stage = reparameterize_model(filled(timm.create_model('cotnet50', layers=(3, 1, 1, 1))).eval()).layer1.float()
    x = image(2, 64, memory_format=torch.channels_last)
    before, expected = x.clone(), copy.deepcopy(stage).double()(x.double())
    used, out = implementations(stage, x)
    assert used[0] == 'packed convolutions, in place' or dispatch.onednn.why_not_packed(torch.float32) is not None
    assert torch.equal(x, before) and difference(out, expected) < 1e-5
    seen = []
    hook = stage[1].register_forward_hook(lambda module, args, out: seen.append((args[0], args[0].clone(), out)))
    used, again = implementations(stage, x)  # what a hook sees stays as it is
    assert 'packed convolutions, in place' not in used and difference(again, expected) < 1e-5
    assert torch.equal(seen[0][0], seen[0][1]) and torch.equal(seen[0][2], stage[1](seen[0][0]))
    hook.remove()
    stage[2].act3 = nn.GELU()
    used, out = implementations(stage, x)
    assert 'packed convolutions, in place' not in used
    assert difference(out, copy.deepcopy(stage).double()(x.double())) < 1e-5


def test_replaced_first_convolution():
    model = timm.create_model('cotnet50', layers=(1, 1, 1, 1)).double().eval()
    model.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False).double()
    folded = reparameterize_model(model)
    check(model, folded, pictures())
    assert type(folded.bn1) is nn.Identity and folded.conv1[0].kernel_size == (3, 3)
    model.conv1 = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.GELU()).double()  # what is behind it is not linear
    folded = reparameterize_model(model)
    check(model, folded, pictures())
    assert type(folded.bn1) is nn.BatchNorm2d


@pytest.mark.parametrize('name', ['test_cotnet', 'se_cotnetd_50'])
def test_features_only(name):
    model = model_of(name, features_only=True, out_indices=(0, 2, 4))
    folded = reparameterize_model(model)
    with torch.no_grad():
        for actual, expected in zip(folded(pictures()), model(pictures())):
            assert difference(actual, expected) < 1e-10
    assert not [name for name in norms(folded) if name.startswith('layer')]


@pytest.mark.parametrize('kwargs', [
    dict(drop_path_rate=0.1), dict(drop_block_rate=0.1), dict(act_layer='gelu'), dict(act_layer='silu'),
    dict(norm_layer='groupnorm1'), dict(norm_layer='batchnorm2d'), dict(norm_layer=BatchNormAct2d),
    dict(norm_layer=FrozenBatchNormAct2d), dict(block_args=dict(attn_layer='se')), dict(aa_layer=BlurPool2d)],
    ids=lambda kwargs: '-'.join(f'{key}={getattr(value, "__name__", value)}' for key, value in kwargs.items()))
@pytest.mark.parametrize('name', ['test_cotnet', 'se_cotnetd_50'])
def test_arguments_of_networks(name, kwargs):
    if name != 'test_cotnet' and 'block_args' in kwargs:
        kwargs = dict(block_args=dict(attn_layer='eca'))
    model = network(name, **kwargs)
    folded = reparameterize_model(model)
    check(model, folded, pictures())
    assert not norms(folded)


def test_blocks_with_something_between_stay():
    for kwargs in (dict(drop_path_rate=0.1), dict(drop_block_rate=0.1), dict(block_args=dict(attn_layer='se'))):
        model = timm.create_model('test_cotnet', **kwargs)
        folded = reparameterize_model(model)
        assert type(folded.layer4[0]) is CotBottleneck and type(folded.layer4[0].conv2) is FoldedCotLayer
        assert type(folded.layer4[0].bn1) is nn.Identity


def test_blocks_with_drop_path_train_after_folding():
    folded = reparameterize_model(network('test_cotnet', drop_path_rate=0.5)).float().train()
    torch.manual_seed(0)
    outs = [folded(pictures(4, 3, 64, 64).float()) for _ in range(8)]
    assert any(difference(out, outs[0]) > 1e-3 for out in outs)  # it still drops


def test_empty_batch():
    for name in ('test_cotnet', 'cotnext50_2x48d'):  # timm's split attention takes none
        folded = reparameterize_model(model_of(name)).float()
        with torch.no_grad():
            assert folded(torch.zeros(0, 3, 64, 64)).shape[0] == 0


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('how', [
    'deepcopy', 'pickle', 'save', 'state dict', 'script', 'trace', 'fx', 'export', 'compile'])
@pytest.mark.parametrize('name', ['test_cotnet', 'se_cotnetd_50'])
def test_handed_on(name, how):
    model = reparameterize_model(model_of(name)).float()
    x = pictures().float()
    with torch.no_grad():
        expected = model(x)
        other = _handed_on(model, how, x)
        for memory_format in FORMATS:
            assert difference(other(x.contiguous(memory_format=memory_format)), expected) < 1e-4


def _handed_on(model, how, x):
    if how == 'deepcopy':
        return copy.deepcopy(model)
    if how == 'pickle':
        return pickle.loads(pickle.dumps(model))
    if how == 'save':
        return torch.load(saved(model), weights_only=False)
    if how == 'state dict':
        other = shaken(copy.deepcopy(model))
        other.load_state_dict(torch.load(saved(model.state_dict()), weights_only=True))
        return other
    if how == 'script':
        return torch.jit.script(model)
    if how == 'trace':
        return torch.jit.trace(model, x)
    if how == 'fx':
        return torch.fx.symbolic_trace(model)
    if how == 'export':
        return torch.export.export(model, (x,)).module()
    return torch.compile(model, fullgraph=True, backend='aot_eager')


def test_weights_changed_after_folding_are_used():
    """Whatever a fast path has packed."""
    module, other = create('CotBottleneck', seed=0).eval(), create('CotBottleneck', seed=1).eval()
    folded, target = fold(module), fold(other)
    x = image(2, 16, memory_format=torch.channels_last)
    with torch.no_grad():
        expected = other.double()(x.double())
        folded(x)
        folded.load_state_dict(target.state_dict())
        assert difference(folded(x), expected) < 1e-5
        replaced = torch.func.functional_call(fold(module), dict(target.named_parameters()), x)
        assert difference(replaced, expected) < 1e-5
        for double, halve in (
                (lambda p: p.mul_(2), lambda p: p.div_(2)),
                (lambda p: setattr(p, 'data', 2 * p.data), lambda p: setattr(p, 'data', p.data / 2)),
                (lambda p: p.data.mul_(2), lambda p: p.data.div_(2))):  # which counts as no change of p
            for p in folded.parameters():
                double(p)
            assert difference(folded(x), expected) > 0.1
            for p in folded.parameters():
                halve(p)
            assert difference(folded(x), expected) < 1e-5


@pytest.mark.parametrize('swap', [False, True])
def test_dtype_conversion_of_folded_models(swap):
    folded = reparameterize_model(model_of('test_cotnet')).float()
    x = pictures()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        with torch.no_grad():
            expected = folded(x.float())
            for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float64, 0.05)):
                assert difference(folded.to(dtype)(x.to(dtype)), expected) < tolerance
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_intermediate_results_are_not_overwritten():
    model = reparameterize_model(model_of('cotnext50_2x48d')).float().eval()
    x = pictures().float()
    kept = []
    with torch.no_grad():
        model(x)  # once without hooks
        hooks = [module.register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))
                 for module in model.modules() if type(module) in (FoldedBottleneck, FoldedCotLayer)]
        stages = model.forward_intermediates(x, intermediates_only=True)
        copies = [stage.clone() for stage in stages]
        for hook in hooks:
            hook.remove()
        model.forward_head(model.layer4(model.layer3(model.layer2(stages[1]))))
    assert len(kept) == 2 * 5
    assert all(torch.equal(out, copied) for out, copied in kept)
    assert all(torch.equal(stage, copied) for stage, copied in zip(stages, copies))
