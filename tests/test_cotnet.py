"""Networks: every variant against the official numbers, and everything that timm's ResNet does."""
import copy

import pytest
import timm
import torch
from golden import VARIANTS, filled, golden_input, load
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import timm_cotnet
from timm_cotnet import CotLayer

GOLDEN = ['cotnet50', 'cotnext50_2x48d', 'se_cotnetd_50']
TINY = dict(layers=(1, 1, 2, 2))  # each kind of block of an architecture at least once


def tiny(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, **dict(TINY, **kwargs))


@pytest.mark.filterwarnings('ignore:Mapping deprecated model name')
@pytest.mark.parametrize('name', VARIANTS)
def test_variant_facts(name):
    facts = VARIANTS[name]
    with torch.device('meta'):
        model = timm.create_model(name, pretrained=False)
    state_dict = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert state_dict == facts['state_dict']
    assert list(state_dict) == list(facts['state_dict'])
    assert sum(p.numel() for p in model.parameters()) == facts['num_params']
    for key, value in facts['eval_config'].items():
        cfg_value = model.pretrained_cfg[key]
        assert (list(cfg_value) if isinstance(value, list) else cfg_value) == value


def test_tags_and_alias():
    expected = {
        'cotnet50.jd_in1k', 'cotnet101.jd_in1k', 'cotnext50_2x48d.jd_in1k', 'cotnext101_2x48d.jd_in1k',
        'se_cotnetd_50.jd_in1k', 'se_cotnetd_101.jd_in1k', 'se_cotnetd_152.jd_in1k', 'se_cotnetd_152.jd_in1k_320',
        'se_cotnetd_200.untrained', 'se_cotnetd_270.untrained', 'test_cotnet.digits',
    }
    assert set(timm.list_models(module='cotnet', include_tags=True)) == expected
    for name in expected:
        cfg = get_pretrained_cfg(name)
        assert cfg.license == 'apache-2.0' and cfg.paper_ids == 'arXiv:2107.12292'
        assert cfg.origin_url.startswith('https')
    with pytest.warns(UserWarning, match='se_cotnetd_152.jd_in1k_320'), torch.device('meta'):
        model = timm.create_model('se_cotnetd_152_L')
    assert model.pretrained_cfg['tag'] == 'jd_in1k_320'


@pytest.mark.parametrize('name', GOLDEN)
def test_golden_eval(name):
    data, model = load(name), filled(timm.create_model(name)).eval()
    for size, shape in (('96x96', (2, 3, 96, 96)), ('128x160', (1, 3, 128, 160))):
        x = golden_input(shape, 'input' + size)
        with torch.no_grad():
            features, stages = model.forward_intermediates(x)
            logits = model.forward_head(features)
        torch.testing.assert_close(logits, data[f'eval_logits_{size}'], rtol=0, atol=1e-9)
        mean_std = torch.stack([torch.stack([stage.mean(), stage.std()]) for stage in stages])
        torch.testing.assert_close(mean_std, data[f'eval_feature_mean_std_{size}'], rtol=0, atol=1e-9)
    with torch.no_grad():
        logits = model.float()(golden_input((2, 3, 96, 96), 'input96x96', torch.float32))
    torch.testing.assert_close(logits.double(), data['eval_logits_96x96'], rtol=0, atol=1e-5)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('name', GOLDEN)
def test_golden_train(name, memory_format):
    data, model = load(name), filled(timm.create_model(name)).train().to(memory_format=memory_format)
    x = golden_input((4, 3, 64, 96), 'inputtrain').contiguous(memory_format=memory_format).requires_grad_()
    logits = model(x)
    torch.testing.assert_close(logits, data['train_logits_64x96'], rtol=0, atol=1e-9)
    (logits * golden_input((4, 1000), 'target')).mean().backward()
    assert abs(x.grad.norm().item() - data['train_input_grad_norm'].item()) < 1e-9
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    norms = torch.stack([parameters[key].grad.norm() for key in data['train_grad_names']])
    torch.testing.assert_close(norms, data['train_grad_norms'], rtol=0, atol=1e-9)
    assert set(data['train_grad_names']) == set(parameters)
    sums = torch.stack([buffers[key].sum() for key in data['train_running_names']])
    torch.testing.assert_close(sums, data['train_running_sums'], rtol=0, atol=1e-9)


@pytest.mark.parametrize('name', ['cotnet50', 'cotnext50_2x48d', 'se_cotnetd_50', 'se_cotnetd_152'])
def test_output_stride_keeps_receptive_fields(name):
    x = torch.randn(1, 3, 64, 96)
    for output_stride in (8, 16, 32):
        model = tiny(name, output_stride=output_stride).eval()
        assert model.forward_features(x).shape[2:] == (64 // output_stride, 96 // output_stride)
        assert model.feature_info[-1]['reduction'] == output_stride
        last = [m for m in model.layer4.modules() if isinstance(m, CotLayer)][-1]
        assert last.dilation == last.key_embed[0].dilation[0] == 32 // output_stride
        features = tiny(name, features_only=True, output_stride=output_stride, out_indices=(0, 2, 4)).eval()
        assert [x.shape[2] // t.shape[2] for t in features(x)] == features.feature_info.reduction()


@pytest.mark.parametrize('name', ['cotnet50', 'cotnext50_2x48d', 'se_cotnetd_50', 'se_cotnetd_152'])
def test_arguments_of_resnet(name):
    x = torch.randn(2, 1, 96, 96)
    model = tiny(name, in_chans=1, num_classes=7, drop_rate=0.1, drop_path_rate=0.2, drop_block_rate=0.1).train()
    assert model(x).shape == (2, 7)
    blocks = [module for module in nn.ModuleList(model.children()).modules() if getattr(module, 'drop_path', None)]
    rates = [block.drop_path.drop_prob for block in blocks]
    assert rates == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])
    assert sum(type(m).__name__ == 'DropBlock2d' for m in model.modules()) >= 3
    for global_pool, width in (('avg', 2048), ('max', 2048), ('catavgmax', 4096)):
        assert tiny(name, in_chans=1, num_classes=0, global_pool=global_pool).eval()(x).shape == (2, width)
    assert tiny(name, in_chans=1, num_classes=0, global_pool='').eval()(x).shape == (2, 2048, 3, 3)
    model.eval()
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 2048)
    model.reset_classifier(3, 'max')
    assert model(x).shape == (2, 3)
    assert model.get_classifier() is model.fc
    with pytest.raises(TypeError, match='no_such_argument'):
        tiny(name, no_such_argument=1)


def test_resnet_arguments_that_cot_layers_do_not_have():
    with pytest.raises(ValueError, match='cardinality is 4'):
        tiny('cotnet50', cardinality=4)
    with pytest.raises(ValueError, match='block_reduce_first is 2'):
        tiny('cotnet50', block_reduce_first=2)


@pytest.mark.parametrize('name', ['cotnet50', 'se_cotnetd_152'])
def test_anti_aliasing_attention_and_norm_layers(name):
    x = torch.randn(2, 3, 64, 64)
    kwargs = {} if name.startswith('se') else dict(aa_layer=timm.layers.BlurPool2d, block_args=dict(attn_layer='se'))
    model = tiny(name, norm_layer='groupnorm1' if name.startswith('se') else 'batchnorm2d', **kwargs)
    assert any(isinstance(m, timm.layers.BlurPool2d) for m in model.layer2.modules())
    if name.startswith('se'):
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert model(x).shape == (2, 1000)


@pytest.mark.parametrize('name', ['cotnet50', 'cotnext50_2x48d', 'se_cotnetd_50', 'se_cotnetd_152'])
def test_features_agree_with_intermediates(name):
    x = torch.randn(1, 3, 65, 97)  # odd sizes
    model = tiny(name).eval()
    features = tiny(name, features_only=True, out_indices=(1, 4)).eval()
    features.load_state_dict(model.state_dict(), strict=False)
    final, intermediates = model.forward_intermediates(x, indices=[1, 4])
    for feature, intermediate, channels in zip(features(x), intermediates, features.feature_info.channels()):
        torch.testing.assert_close(feature, intermediate)
        assert feature.shape[1] == channels
    torch.testing.assert_close(final, model.forward_features(x))
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers(2) == [3, 4] and isinstance(pruned.fc, nn.Identity)
    torch.testing.assert_close(pruned(x), final)


@pytest.mark.parametrize('name', ['cotnet50', 'se_cotnetd_50'])
def test_grad_checkpointing_gives_the_same_gradients(name):
    x = torch.randn(2, 3, 64, 64)
    model = tiny(name, num_classes=3).double().train()
    grads = []
    for enable in (False, True):
        variant = copy.deepcopy(model)
        variant.set_grad_checkpointing(enable)
        variant(x.double()).square().sum().backward()
        grads.append([p.grad for p in variant.parameters()])
    for plain, checkpointed in zip(*grads):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize('name', ['cotnet50', 'se_cotnetd_50'])
def test_layer_decay_groups(name):
    model = tiny(name)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    assert sum(p.numel() for group in groups for p in group['params']) == sum(p.numel() for p in model.parameters())
    scales = {name: group['lr_scale'] for group in groups for name, p in model.named_parameters()
              if any(p is q for q in group['params'])}
    assert scales['fc.weight'] == 1 and scales['layer4.1.conv3.weight'] == 0.5
    first = 'conv1.weight' if name == 'cotnet50' else 'conv1.0.weight'
    assert scales[first] == scales['bn1.weight'] == 0.5 ** 7
    assert len(create_optimizer_v2(model, 'adamw', lr=1e-3, layer_decay=0.5).param_groups) == len(groups)


@pytest.mark.parametrize('how', [
    lambda model, x: torch.jit.script(copy.deepcopy(model)),
    lambda model, x: torch.fx.symbolic_trace(model),
    lambda model, x: torch.export.export(model, (x,)).module(),
    lambda model, x: torch.compile(model, fullgraph=True, backend='aot_eager'),
], ids=['script', 'fx', 'export', 'compile'])
@pytest.mark.parametrize('name', ['cotnext50_2x48d', 'se_cotnetd_152'])
def test_script_fx_export_compile(name, how):
    model = timm.create_model(name, layers=(1, 1, 1, 1), num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(how(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


def test_device_and_dtype():
    if 'dtype' not in timm.models.resnet.ResNet.__init__.__code__.co_varnames:
        pytest.skip('this timm has no device and dtype arguments')
    for name in ('cotnet50', 'se_cotnetd_152'):
        model = tiny(name, device='meta', dtype=torch.bfloat16)
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())


def test_public_names():
    for name in ('CotLayer', 'CoxtLayer', 'CoTAttention', 'local_conv', 'CotNet', 'SeCotNetD'):
        assert name in timm_cotnet.__all__ and getattr(timm_cotnet, name).__doc__
