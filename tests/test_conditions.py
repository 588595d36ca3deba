"""The reasons why something faster cannot stand in for a module or an operator."""
import copy
import re
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from timm_cotnet import CotLayer, local_conv
from timm_cotnet.cotnet import CotBottleneck
from timm_cotnet.deploy import FoldedStem, Stage
from timm_cotnet.layers import AvgPool2d
from timm_cotnet.ops import conditions
from timm_cotnet.ops.dispatch import Choice, choose_local_conv, recorded, stand_in
from timm_cotnet.ops.gpu.stand_ins import padded_pool

from helpers import Lora, create, difference, image, plain_wing, shaken

OWN = 'its own modules'
TRAIN, NORMS = 'C kernels for training', 'C kernels of norms'
FOLDED, BLOCK = 'packed convolutions and a C kernel', 'packed convolutions'


def fold(module):
    return reparameterize_model(nn.Sequential(module))[0]


def reason(module, x, name):
    """Why the row `name` of the table was not taken by module(x); None if it was."""
    with recorded() as choices:
        stand_in(module, x)
    choice, = (choice for choice in choices if choice.module is module)
    return None if choice.implementation == name else dict(choice.why_not)[name]


def assert_refused(module, x, name, change, expected):
    """The row `name` takes the module until it is changed, and then not, for a reason that holds what is expected."""
    with plain_wing():
        assert reason(module, x, name) is None
        change(module)
        found = reason(module, x, name)
    assert re.search(expected, found), found


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


NOW = {  # of tensors and surroundings: (arguments, change) -> part of the reason
    'dtype': (lambda a: a.update(x=a['x'].double()), r'x is torch\.float64, not torch\.float32'),
    'dimensions': (lambda a: a.update(x=a['x'][0]), r'x of shape \(\d+, 6, 7\) is empty or has not 4 dimensions'),
    'empty': (lambda a: a.update(x=a['x'][:0]), r'x of shape \(0, \d+, 6, 7\) is empty'),
    'layout': (lambda a: a.update(x=a['x'].to_mkldnn()), 'x is not a dense tensor'),
    'negative': (lambda a: a.update(x=torch._neg_view(a['x'])), 'x is not a dense tensor'),
    'gradients': (lambda a: torch.set_grad_enabled(not a['training']), 'gradient'),
    'autocast': (lambda a: torch.autocast('cpu', torch.bfloat16), 'autocast chooses the dtypes'),
    'forward mode': (lambda a: torch.autograd.forward_ad.dual_level(), 'no forward-mode derivative'),
    'dispatch mode': (lambda a: FlopCounterMode(display=False), 'dispatch mode watches operators'),
    'subclass': (lambda a: a.update(x=a['x'].as_subclass(Marked)), 'x is a tensor subclass'),
}


class Marked(torch.Tensor):
    pass


def enter(change, arguments):
    """What change gives, as a context, however it acts."""
    result = change(arguments)
    return result if hasattr(result, '__enter__') else nullcontext()


def folded_modules():
    layer, block = create('CotLayer').eval(), create('CotBottleneck').eval()
    return {FOLDED: fold(layer), BLOCK: fold(block)}


@pytest.mark.parametrize('row', [TRAIN, NORMS, FOLDED, BLOCK])
@pytest.mark.parametrize('what', NOW)
def test_reasons_of_surroundings(what, row):
    change, expected = NOW[what]
    training = row in (TRAIN, NORMS)
    module = create('CotLayer' if row == TRAIN else 'CotBottleneck').train() if training else folded_modules()[row]
    a = {'x': channels_last(3, 16 if row in (NORMS, BLOCK) else 32, 6, 7), 'training': training}
    with plain_wing(), torch.set_grad_enabled(training):
        assert reason(module, a['x'], row) is None
        with enter(change, a):
            found = reason(module, a['x'], row)
    assert re.search(expected, found), found


def test_reasons_of_memory_format():
    x = torch.randn(3, 32, 6, 7)
    with plain_wing():
        assert reason(create('CotLayer').train(), x, TRAIN) == 'x is not channels-last'
        with torch.no_grad():
            assert reason(folded_modules()[FOLDED], x, FOLDED) is None


def replaced(path, child):
    def change(layer):
        parent, _, name = path.rpartition('.')
        layer.get_submodule(parent).add_module(name, child)
    return change


def set_on(path, name, value):
    return lambda layer: setattr(layer.get_submodule(path), name, value)


TRAINING = {  # of a CotLayer(32) in training: change, part of the reason
    'sequence': (lambda m: m.embed.append(nn.Identity()), '^embed is '),
    'type': (replaced('key_embed.2', nn.GELU()), r'key_embed\.2 is a GELU, not a ReLU'),
    'subclass': (replaced('act', type('Swish', (nn.SiLU,), {})()), 'act is a Swish, not a SiLU'),
    'norm': (replaced('bn', nn.GroupNorm(1, 32)), 'bn is a GroupNorm, not a BatchNorm2d'),
    'nothing': (set_on('', 'act', None), 'act is a NoneType, not a SiLU'),
    'hook': (lambda m: m.se[1].register_forward_hook(lambda *_: None), r'hooks watch se\.1'),
    'pre hook': (lambda m: m.se.register_forward_pre_hook(lambda *_: None), 'hooks watch se'),
    'backward hook': (lambda m: m.bn.register_full_backward_hook(lambda *_: None), 'hooks watch bn'),
    'backward pre hook': (lambda m: m.bn.register_full_backward_pre_hook(lambda *_: None), 'hooks watch bn'),
    'forward': (lambda m: setattr(m.act, 'forward', m.act.forward), 'hooks watch act, or its forward is another one'),
    'padding mode': (set_on('conv1x1.0', 'padding_mode', 'circular'), r'conv1x1\.0 does not pad by a number of zeros'),
    'padding': (set_on('conv1x1.0', 'padding', 'same'), r'conv1x1\.0 does not pad by a number of zeros'),
    'padding as a number': (set_on('key_embed.0', 'padding', 1), r'key_embed\.0 .* or its sizes are no tuples'),
    'dilation as a number': (set_on('key_embed.0', 'dilation', 1), 'or its sizes are no tuples'),
    'stride as a list': (set_on('embed.3', 'stride', [1, 1]), 'or its sizes are no tuples'),
    'dtype': (lambda m: m.se.double(), r'se\.0 has a parameter that is not a plain torch\.float32 tensor'),
    'device': (lambda m: m.bn.to('meta'), r'bn has a parameter that is not a plain'),
    'pruned': (lambda m: prune.random_unstructured(m.se[3], 'weight', 0.5), r'hooks watch se\.3'),
    'computed': (lambda m: computed(m.conv1x1[0]), r'conv1x1\.0 has a weight that is computed whenever it is read'),
    'kernel size': (replaced('embed.3', nn.Conv2d(16, 36, 3, padding=1)), r'is not a 1x1 convolution with the groups'),
    'groups': (replaced('conv1x1.0', nn.Conv2d(32, 32, 1, groups=2, bias=False)), 'is not a 1x1 convolution with'),
    'stride': (replaced('conv1x1.0', nn.Conv2d(32, 32, 1, 2, bias=False)), 'is not a 1x1 convolution with'),
    'bias': (replaced('embed.0', nn.Conv2d(64, 16, 1)), r'embed\.0 has a bias'),
    'frozen norm of keys': (lambda m: m.key_embed[1].eval(), 'does not use and average the statistics of the batch'),
    'frozen norm': (lambda m: m.bn.eval(), 'does not use and average the statistics of the batch'),
    'evaluation': (lambda m: m.eval(), 'does not use and average the statistics of the batch'),
    'affine': (replaced('bn', nn.BatchNorm2d(32, affine=False)), 'or has no weight'),
    'no statistics': (replaced('bn', nn.BatchNorm2d(32, track_running_stats=False)), 'does not use and average'),
    'momentum': (replaced('se.1', nn.BatchNorm2d(32, momentum=None)), 'does not use and average'),
    'no counter': (lambda m: m.bn._buffers.update(num_batches_tracked=None), 'does not use and average'),
    'statistic': (lambda m: m.bn._buffers.update(running_mean=m.bn.running_mean.double()), 'a weight or running stat'),
    'strides': (lambda m: m.bn._buffers.update(running_var=torch.ones(64)[::2]), 'is not a plain contiguous tensor'),
    'filters': (replaced('embed.4', nn.GroupNorm(2, 36)), 'filters or their norm have other sizes'),
    'mixing': (replaced('se.0', nn.Conv2d(32, 32, 1, groups=2)), 'se is not made of two 1x1 convolutions'),
    'keys of other pixels': (replaced('key_embed.0', nn.Conv2d(32, 32, 3, groups=4, bias=False)), 'has other sizes'),
    'filters of other sizes': (
        lambda m: m.conv1x1[0]._parameters.update(weight=nn.Parameter(torch.ones(16, 32, 1, 1))),
        r'conv1x1\.0 has filters or a bias of other sizes than it says'),
    'norm of other sizes': (replaced('se.1', nn.BatchNorm2d(8)), r'se\.1 has 8 channels, what it norms has 32'),
    'hidden of other sizes': (replaced('se.3', nn.Conv2d(16, 64, 1)), 'se is not made of two 1x1 convolutions'),
    'mixing bias': (replaced('se.3', nn.Conv2d(32, 64, 1, bias=False)), 'se is not made of two 1x1 convolutions'),
}


def computed(conv):
    """A convolution whose weight is an attribute, as some adapters leave it."""
    weight = conv._parameters.pop('weight')
    conv.weight = weight.detach()


@pytest.mark.parametrize('what', TRAINING)
def test_reasons_in_training(what):
    change, expected = TRAINING[what]
    assert_refused(create('CotLayer').train(), channels_last(3, 32, 6, 7), TRAIN, change, expected)


@pytest.mark.parametrize('what', [what for what in TRAINING if what not in ('dtype', 'statistic')])  # taken there
def test_reasons_on_a_gpu(what, monkeypatch):
    """The conditions of a GPU's kernels, asked with tensors of the CPU."""
    monkeypatch.setattr(conditions, 'why_not_triton', lambda x: None)
    change, expected = TRAINING[what]
    layer, x = create('CotLayer').train(), channels_last(3, 32, 6, 7)
    assert conditions.why_not_train_on_gpu(layer, x) is None
    change(layer)
    found = conditions.why_not_train_on_gpu(layer, x)
    assert re.search(expected, found), found
    with torch.no_grad():
        if what not in ('frozen norm of keys', 'frozen norm', 'evaluation', 'momentum', 'no counter'):
            assert conditions.why_not_infer_on_gpu(layer.eval(), x) is not None
        assert conditions.why_not_infer_on_gpu(create('CotLayer').eval(), x) is None


TRAINING_BLOCK = {  # of a CotBottleneck or SplitAttnBottleneck in training: change, part of the reason
    'activation': (replaced('act1', nn.GELU()), 'act1 is a GELU, not a ReLU'),
    'norm': (replaced('bn3', nn.GroupNorm(1, 64)), 'bn3 is a GroupNorm, not a BatchNorm2d'),
    'subclass': (replaced('bn1', type('Norm', (nn.BatchNorm2d,), {})(16)), 'bn1 is a Norm, not a BatchNorm2d'),
    'drop block': (replaced('drop_block', nn.Dropout()), 'drop_block is a Dropout, not a Identity'),
    'hook': (lambda m: m.act3.register_forward_hook(lambda *_: None), 'hooks watch act3'),
    'backward hook': (lambda m: m.bn1.register_full_backward_hook(lambda *_: None), 'hooks watch bn1'),
    'forward': (lambda m: setattr(m.bn3, 'forward', m.bn3.forward), 'hooks watch bn3, or its forward is another one'),
    'dtype': (lambda m: m.bn1.double(), r'bn1 has a parameter that is not a plain torch\.float32 tensor'),
    'computed': (lambda m: computed(m.bn3), 'bn3 has a weight that is computed whenever it is read'),
    'frozen norm': (lambda m: m.bn1.eval(), 'does not use and average the statistics of the batch'),
    'affine': (replaced('bn3', nn.BatchNorm2d(64, affine=False)), 'or has no weight'),
    'no statistics': (replaced('bn3', nn.BatchNorm2d(64, track_running_stats=False)), 'does not use and average'),
    'momentum': (replaced('bn1', nn.BatchNorm2d(16, momentum=None)), 'does not use and average'),
    'sizes': (lambda m: setattr(m.bn1, 'num_features', 8), 'a weight or running statistic of a batch norm is not'),
    'attention': (set_on('', 'se', nn.Identity()), 'an attention module behind its norm, or stochastic depth'),
    'kernel size': (replaced('conv3', nn.Conv2d(16, 64, 3, padding=1, bias=False)), 'is not a 1x1 convolution of one'),
    'stride': (replaced('conv1', nn.Conv2d(16, 16, 1, 2, bias=False)), 'conv1 or conv3 is not a 1x1 convolution of'),
    'groups': (replaced('conv1', nn.Conv2d(16, 16, 1, groups=2, bias=False)), 'is not a 1x1 convolution of one group'),
    'adapter': (replaced('conv3', Lora(nn.Conv2d(16, 64, 1, bias=False))), 'conv3 is a Lora, not a Conv2d'),
    'stochastic depth': (set_on('', 'drop_path', nn.Identity()), 'an attention module behind its norm, or stochastic'),
}


@pytest.mark.parametrize('name', ['CotBottleneck', 'SplitAttnBottleneck'])
@pytest.mark.parametrize('what', TRAINING_BLOCK)
def test_reasons_of_blocks_in_training(what, name):
    change, expected = TRAINING_BLOCK[what]
    block = create(name).train()
    x = channels_last(3, 16, 6, 7)
    with plain_wing() as wing:
        assert reason(block, x, NORMS) is None
        for path in ('avd_first', 'conv2', 'avd_last', 'downsample'):  # are called
            block.get_submodule(path).register_forward_hook(lambda *_: None)
        assert reason(block, x, NORMS) is None
        change(block)
        found = reason(block, x, NORMS)
        wing.why_not = lambda dtype: 'no compiler'
        assert reason(create(name).train(), x, NORMS) == 'no compiler'
    assert re.search(expected, found), found


def test_reasons_of_sizes_in_training(monkeypatch):
    with plain_wing() as wing:
        layer = CotLayer(32).train()
        assert reason(layer, channels_last(1, 32, 1, 1), TRAIN) == 'one value has no variance'
        assert reason(CotLayer(32, 9).train(), channels_last(3, 32, 6, 7), TRAIN) == 'kernel_size is 9, more than 7'
        wing.why_not = lambda dtype: 'no compiler'
        assert reason(layer, channels_last(3, 32, 6, 7), TRAIN) == 'no compiler'
    with plain_wing():
        monkeypatch.setattr(torch, 'get_num_threads', lambda: 13)
        assert reason(layer, channels_last(3, 32, 6, 7), TRAIN) == '13 threads share 3 images'
        assert reason(layer, channels_last(4, 32, 6, 7), TRAIN) is None


FOLDED_LAYER = {
    'activation': (replaced('embed.0', nn.GELU()), r'embed\.0 is a GELU, not a ReLU'),
    'subclass': (replaced('key', type('Linear', (nn.Conv2d,), {})(32, 16, 1)), 'key is a Linear, not a Conv2d'),
    'hook': (lambda m: m.value.register_forward_hook(lambda *_: None), 'hooks watch value,'),
    'dtype': (lambda m: m.se.double(), r'se\.0 has a parameter that is not a plain torch\.float32 tensor'),
    'query': (replaced('query', nn.Conv2d(32, 16, 3, padding=1)), 'query, key, embed.1 or value is not a 1x1'),
    'mixing': (replaced('se.0', nn.Conv2d(32, 32, 1, bias=False)), 'se is not made of two 1x1 convolutions'),
    'logits': (replaced('se.2', nn.Conv2d(32, 64, 1)), 'to as many logits as there are'),
    'group norm': (replaced('embed.2', nn.GroupNorm(2, 36)), 'filters or their norm have other sizes'),
    'scale': (lambda m: setattr(m, 'scale', nn.Parameter(torch.ones(32))), 'more than a shift is left of the norm'),
    'shift': (lambda m: setattr(m, 'shift', nn.Parameter(torch.zeros(32).double())), 'more than a shift is left'),
}


@torch.no_grad()
@pytest.mark.parametrize('what', FOLDED_LAYER)
def test_reasons_of_folded_layers(what):
    change, expected = FOLDED_LAYER[what]
    x = channels_last(3, 32, 6, 7)
    assert_refused(folded_modules()[FOLDED], x, FOLDED, change, expected)
    with plain_wing() as wing:
        layer = folded_modules()[FOLDED]
        wing.why_not = lambda dtype: 'no compiler'
        assert reason(layer, x, FOLDED) == 'no compiler'
        with torch.backends.mkldnn.flags(enabled=False):
            assert 'oneDNN' in reason(layer, x, FOLDED)
            assert 'oneDNN' in reason(folded_modules()[BLOCK], channels_last(3, 16, 6, 7), BLOCK)
    with plain_wing():
        folded = fold(CotLayer(32, 9).eval())
        assert reason(folded, x, FOLDED) == 'kernel_size is 9, more than 7'


WATCHED = {  # in a block of a folded stage: change
    'layer': lambda block, hook: block.conv2.register_forward_hook(hook),
    'part of the layer': lambda block, hook: block.conv2.query.register_forward_hook(hook),
    'pool': lambda block, hook: block.avd_first.register_forward_hook(hook),
    'behind the layer': lambda block, hook: block.avd_last.register_forward_hook(hook),
    'block': lambda block, hook: block.register_forward_hook(hook),
    'convolution': lambda block, hook: block.conv3.register_forward_hook(hook),
}


@torch.no_grad()
@pytest.mark.parametrize('what', [None, *WATCHED])
def test_folded_stage_looks_ahead(what):
    """Layers of a stage are looked at before the first of its blocks runs, and called where something watches them."""
    torch.manual_seed(0)
    stage = shaken(Stage(CotBottleneck(64, 16), CotBottleneck(64, 16))).eval().fuse()
    x, seen = channels_last(2, 64, 6, 7), []
    expected = copy.deepcopy(stage).double()(x.double())
    if what is not None:
        WATCHED[what](stage[1], lambda *_: seen.append(what))
    with plain_wing() as wing, recorded() as choices:
        out = stage(x)
    assert difference(out, expected) < 1e-5 and len(seen) == (what is not None)
    assert wing.called == ['folded_cot_layer'] * (1 if what == 'part of the layer' else 2)
    runs = [c.implementation for c in choices if c.module in (stage[0].conv2, stage[1].conv2)]
    assert runs == [FOLDED, OWN if what == 'part of the layer' else FOLDED]


@torch.no_grad()
def test_reasons_of_folded_stems_on_a_gpu(monkeypatch):
    """The conditions of a GPU's kernels, asked with tensors of the CPU."""
    monkeypatch.setattr(conditions, 'why_not_triton', lambda x: None)
    monkeypatch.setattr(conditions, '_has_cudnn', lambda: True)
    stem, x = FoldedStem(nn.Conv2d(3, 16, 3), nn.ReLU()), channels_last(2, 3, 6, 7)
    look = conditions.look_at_folded_stem_on_gpu
    assert look(stem, x) == {'0': stem[0], '1': stem[1]}
    assert 'has not 4 dimensions' in look(stem, x[0])  # an image alone, which convolutions take
    assert look(stem, x.contiguous()) == {'0': stem[0], '1': stem[1]}  # converted, and back
    last = stem.to(memory_format=torch.channels_last)
    assert 'not channels-last, but filters are' in look(last, x.contiguous()) and isinstance(look(last, x), dict)
    stem = FoldedStem(nn.Conv2d(1, 16, 3), nn.ReLU())
    assert isinstance(look(stem, torch.zeros(2, 1, 6, 7)), dict)
    stem = FoldedStem(nn.Conv2d(3, 16, 3), nn.ReLU())
    assert look(stem.append(nn.ReLU()), x) == 'it is not one convolution with a ReLU, or three'


@torch.no_grad()
@pytest.mark.parametrize('folded', [False, True])
def test_memory_formats_of_blocks_in_evaluation_on_a_gpu(folded, monkeypatch):
    """One that is not channels-last is converted unless the filters are, from whose convolution on all is."""
    monkeypatch.setattr(conditions, 'why_not_triton', lambda x: None)
    monkeypatch.setattr(conditions, '_has_cudnn', lambda: True)
    block, x = CotBottleneck(64, 16).eval(), channels_last(2, 64, 6, 7)
    block = block.fuse() if folded else block
    why_not = conditions.why_not_folded_bottleneck_on_gpu if folded else conditions.why_not_infer_bottleneck_on_gpu
    assert why_not(block, x) is why_not(block, x.contiguous()) is None
    block.to(memory_format=torch.channels_last)
    assert why_not(block, x) is None and 'not channels-last, but filters are' in why_not(block, x.contiguous())


def test_pools_on_a_gpu(monkeypatch):
    """A replaced function is called, by the stand-in whose gradient is right."""
    monkeypatch.setattr(conditions, 'why_not_triton', lambda x: None)
    pool, x, written = AvgPool2d(3, 2, 1), channels_last(2, 8, 6, 7), F.avg_pool2d
    assert conditions.why_not_pool(pool, x) is conditions.why_not_padded_pool(pool, x) is None
    monkeypatch.setattr(F, 'avg_pool2d', lambda *args: 2 * written(*args))
    assert 'were replaced' in conditions.why_not_pool(pool, x) and conditions.why_not_padded_pool(pool, x) is None
    assert torch.equal(padded_pool(pool, x), 2 * written(x, 3, 2, 1))


@torch.no_grad()
def test_reasons_of_folded_blocks():
    x = channels_last(3, 16, 6, 7)
    for change, expected in (
            (replaced('act3', nn.GELU()), 'act3 is a GELU, not a ReLU'),
            (replaced('act1', nn.Sequential()), 'act1 is '),
            (lambda m: m.conv1.register_forward_hook(lambda *_: None), 'hooks watch conv1'),
            (set_on('conv3', 'stride', 1), 'or its sizes are no tuples'),
            (set_on('conv3', 'padding_mode', 'reflect'), 'conv3 does not pad by a number of zeros')):
        block = folded_modules()[BLOCK]
        with plain_wing():
            assert reason(block, x, BLOCK) is None
            change(block)
            assert expected in reason(block, x, BLOCK)


def test_reasons_of_article_modules():
    name, x = 'averaged filters', image(2, 32)
    module = create('CoTAttention')
    assert reason(module, x, name) is None
    for change, expected in (
            (replaced('attention_embed.2', nn.GELU()), 'attention_embed.2 is a GELU, not a ReLU'),
            (lambda m: m.attention_embed[3].register_forward_hook(lambda *_: None), 'hooks watch attention_embed.3'),
            (replaced('value_embed', nn.Identity()), 'value_embed is a Identity, not a Sequential'),
            (replaced('attention_embed.0', nn.Conv2d(64, 16, 3, padding=1)), 'of attention_embed is not 1x1'),
            (lambda m: computed(m.attention_embed[3]), 'attention_embed.3 has a weight that is computed')):
        changed = copy.deepcopy(module)
        change(changed)
        assert expected in reason(changed, x, name)


def test_reason_without_the_folder(monkeypatch):
    monkeypatch.setattr(conditions, 'cpu', None)
    x = channels_last(3, 32, 6, 7)
    assert reason(CotLayer(32), x, TRAIN) == 'the package has no folder ops/cpu'
    assert reason(create('CotBottleneck'), channels_last(3, 16, 6, 7), NORMS) == 'the package has no folder ops/cpu'
    with torch.no_grad():
        assert reason(folded_modules()[FOLDED], x, FOLDED) == 'the package has no folder ops/cpu'
    with recorded() as choices:
        local_conv(x, channels_last(3, 9, 6, 7).view(3, 1, 9, 6, 7))
    assert choices == [
        Choice(None, 'local convolution by shifted slices', (('C kernel', 'the package has no folder ops/cpu'),))]


def test_reasons_of_local_convolution():
    def choice(x, weight, kernel_size=3):
        with recorded() as choices:
            choose_local_conv(x, weight, kernel_size)
        return choices[0].implementation.removeprefix('local convolution by '), dict(choices[0].why_not)
    x, weight = channels_last(2, 8, 4, 5), channels_last(2, 9, 4, 5).view(2, 1, 9, 4, 5)
    wide = channels_last(2, 81, 4, 5).view(2, 1, 81, 4, 5)
    with plain_wing():
        assert choice(x, weight) == ('C kernel', {})
        for args, expected in (
                ((x, wide, 9), 'kernel_size is 9, more than 7'),
                ((x.contiguous(), weight), 'x or its filters are not channels-last'),
                ((x, weight.contiguous()), 'x or its filters are not channels-last'),
                ((x.double(), weight.double()), 'there is no kernel for torch.float64')):
            assert choice(*args) == ('shifted slices', {'C kernel': expected})
        with torch.autograd.forward_ad.dual_level():
            assert choice(x, weight) == ('shifted slices', {'C kernel': 'the kernels have no forward-mode derivative'})
        with FlopCounterMode(display=False):
            assert choice(x, weight) == ('plain PyTorch', {})
        name, reasons = choice(x.to('meta'), weight.to('meta'))
        assert name == 'plain PyTorch' and 'Triton' in reasons['Triton kernel']
