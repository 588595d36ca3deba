"""Every child of every module, one at a time: replaced, subclassed, parametrized, watched, frozen or adapted.

Whatever may stand in for a module has to notice. Each changed module is compared with itself in float64, in which
nothing stands in, and with itself before folding.
"""
import copy

import pytest
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrize

from timm_cotnet import CotBottleneck

from helpers import FORMATS, MODULES, Lora, create, difference, has_kernels, image, implementations, plain_wing

CHILDREN = [  # those of CotBottleneck's layer are CotLayer's
    (name, path) for name in MODULES for path, _ in MODULES[name][0]().named_modules()
    if path and not (name == 'CotBottleneck' and path.startswith('conv2.'))]
TOLERANCE = 1e-4
FAST = {'cot_layer': 'C kernels for training', 'bottleneck': 'C kernels of norms'}
# memory format, and whether kernels are those in plain PyTorch; other kernels only where there are some
WAYS = [(torch.contiguous_format, False), (torch.channels_last, True)]
if has_kernels():
    WAYS += [(torch.channels_last, False)]


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Wrapped(nn.Module):
    """Calls a module, and changes what it gives."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 0.75 * self.base(x)


def swap(module, path, child):
    parent, _, name = path.rpartition('.')
    module.get_submodule(parent).add_module(name, child)


def other(child):
    """A module of another type that takes and gives the same shapes."""
    if isinstance(child, (nn.ReLU, nn.SiLU)):
        return nn.Mish()
    if isinstance(child, nn.BatchNorm2d):
        return nn.GroupNorm(4, child.num_features)
    if isinstance(child, nn.GroupNorm):
        return nn.BatchNorm2d(child.num_channels)
    if isinstance(child, nn.Conv2d):
        return nn.Sequential(nn.Conv2d(
            child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding, child.dilation))
    if isinstance(child, nn.Identity):
        return nn.Hardtanh()
    return Wrapped(child)


def other_convolutions(child):
    """Convolutions of the same type that take and give the same shapes, and are not what the layer made."""
    sizes = child.in_channels, child.out_channels
    stride, groups = child.stride, child.groups
    return [
        nn.Conv2d(*sizes, 3, stride, 1, groups=groups, bias=False),
        nn.Conv2d(*sizes, 1, stride, groups=groups),
        nn.Conv2d(*sizes, 1, stride, groups=groups, bias=False),
        nn.Conv2d(*sizes, 5, stride, 'same' if stride == (1, 1) else 2, groups=groups),
        nn.Conv2d(*sizes, 3, stride, 1, groups=groups, padding_mode='circular'),
        nn.Conv2d(*sizes, 1, stride, groups=2 if groups == 1 else 1),
        numbers(copy.deepcopy(child)),
    ]


def numbers(conv):
    """The convolution with numbers for its sizes, which PyTorch takes as well as tuples."""
    for name in ('kernel_size', 'stride', 'padding', 'dilation'):
        setattr(conv, name, getattr(conv, name)[0])
    return conv


def other_norms(child):
    """Norms of the same type in another configuration."""
    if isinstance(child, nn.GroupNorm):
        n = child.num_channels
        made = [nn.GroupNorm(1, n), nn.GroupNorm(n, n), nn.GroupNorm(child.num_groups, n, affine=False)]
    else:
        n = child.num_features
        made = [
            nn.BatchNorm2d(n, affine=False), nn.BatchNorm2d(n, track_running_stats=False),
            nn.BatchNorm2d(n, momentum=None), nn.BatchNorm2d(n, eps=0.3), nn.BatchNorm2d(n, momentum=0.9),
            nn.BatchNorm2d(n)]
        made[-1].num_batches_tracked = None  # as modules of old files have it
    for norm in made:
        if norm.affine:
            nn.init.normal_(norm.weight, 1, 0.2)
            nn.init.normal_(norm.bias)
    return made


def subclassed(child):
    """The child as an instance of a subclass of its type, whose forward scales."""
    cls = type(child)
    child.__class__ = type(f'Scaled{cls.__name__}', (cls,), {'forward': lambda self, x: 1.5 * cls.forward(self, x)})


def parametrized(child):
    parametrize.register_parametrization(child, 'weight', Twice())


def frozen(child):
    child.requires_grad_(False)
    for part in child.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()


def trained(module, x):
    """Output, gradients and buffers by name, after a step's forward and backward."""
    x = x.requires_grad_()
    out = module(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
    return {'output': out.detach(), **dict(module.named_buffers())}, {
        'x': x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def expected_training(module, channels):
    """The same in float64 and contiguous memory, where nothing stands in."""
    module = copy.deepcopy(module).double()
    for p in module.parameters():
        p.data = p.data.contiguous()
    return trained(module, image(5, channels, dtype=torch.float64))


def assert_training(module, x, expected, what):
    values, grads = trained(module, x)
    assert values.keys() == expected[0].keys() and grads.keys() == expected[1].keys()
    for name, wanted in expected[0].items():
        assert difference(values[name], wanted) < TOLERANCE, f'{what}: {name}'
    largest = max(grad.abs().max().item() for grad in expected[1].values() if grad is not None)
    for name, wanted in expected[1].items():
        actual = grads[name]
        assert (actual is None) == (wanted is None), f'{what}: gradient of {name}'
        if wanted is not None:
            size = wanted.abs().max().item()
            # what the next norm takes out again is zero but for rounding, whose size is that of other gradients
            scale = largest if size < 1e-9 * largest else max(size, 0.01 * largest)
            error = (actual.double() - wanted).abs().max().item()
            assert error < TOLERANCE * scale, f'{what}: gradient of {name}: {error:.1e}, expected {size:.1e}'


@torch.no_grad()
def assert_folded(module, channels, what):
    """Folded in float64, and in float32 where something may stand in, against the module in evaluation."""
    module = copy.deepcopy(module).double().eval()
    folded = reparameterize_model(nn.Sequential(module))
    x = image(3, channels, dtype=torch.float64)
    expected = module(x)
    assert difference(folded(x), expected) < 1e-9, f'{what}, folded'
    folded.float()
    for memory_format, plain in WAYS:
        with plain_wing(plain):
            out = folded(x.float().contiguous(memory_format=memory_format))
        assert difference(out, expected) < TOLERANCE, f'{what}, folded, {memory_format}'


def assert_same(module, name, what):
    channels = MODULES[name][1]
    expected = expected_training(module, channels)
    for memory_format, plain in WAYS:
        with plain_wing(plain):
            changed = copy.deepcopy(module).to(memory_format=memory_format)
            assert_training(
                changed, image(5, channels, memory_format=memory_format), expected,
                f'{what}, {memory_format}, {"kernels in plain PyTorch" if plain else "as installed"}')
    assert_folded(module, channels, what)


def fast_paths(module, name):
    """Kinds of those that kernels for training stand in for: the module, or its CoT layer."""
    with plain_wing() as wing:
        used, _ = implementations(
            copy.deepcopy(module), image(5, MODULES[name][1], memory_format=torch.channels_last).requires_grad_())
    assert {kind for kind, row in FAST.items() if row in used} == set(wing.called)
    return set(wing.called)


def kind_around(name, path):
    """The kind of what kernels for training may stand in for so that they have to notice what is at path, or None."""
    if name in ('CotLayer', 'CoxtLayer') or name == 'CotBottleneck' and path.startswith('conv2.'):
        return 'cot_layer'
    called = path.partition('.')[0] in ('avd_first', 'conv2', 'avd_last', 'downsample')
    return 'bottleneck' if name.endswith('Bottleneck') and not called else None


KINDS = {
    'CotLayer': {'cot_layer'}, 'CoxtLayer': {'cot_layer'}, 'CoTAttention': set(),
    'CotBottleneck': {'bottleneck', 'cot_layer'}, 'SplitAttnBottleneck': {'bottleneck'}}


@pytest.mark.parametrize('name', MODULES)
def test_unchanged(name):
    """The fast path is taken where nothing was changed, and agrees."""
    module = create(name).train()
    assert_same(module, name, 'unchanged')
    assert fast_paths(module, name) == KINDS[name]
    if has_kernels():
        x = image(5, MODULES[name][1], memory_format=torch.channels_last).requires_grad_()
        used, _ = implementations(module, x)
        assert {kind for kind, row in FAST.items() if row in used} == KINDS[name]


@pytest.mark.parametrize('name', MODULES)
def test_parameters_of_any_strides(name):
    """Parameters that are not dense, as parts of a larger buffer, and filters whose strides are in another order."""
    module = create(name).train()
    expected = expected_training(module, MODULES[name][1])
    for what, change in (
            # PyTorch's own batch norm gets its gradients wrong where its weight is not dense
            ('not dense', lambda p: torch.stack([p, p], -1)[..., 0] if p.ndim == 4 else p),
            ('reversed', lambda p: p.permute(*reversed(range(p.ndim))).contiguous().permute(*reversed(range(p.ndim)))),
            ('channels-last', lambda p: p.contiguous(memory_format=FORMATS[1]) if p.ndim == 4 else p)):
        for memory_format, plain in WAYS:
            changed = copy.deepcopy(module)
            folded = reparameterize_model(nn.Sequential(changed))
            for p in [*changed.parameters(), *folded.parameters()]:
                p.data = change(p.data)
            x = image(5, MODULES[name][1], memory_format=memory_format)
            with plain_wing(plain):
                assert_training(changed, x, expected, f'{what}, {memory_format}')
                with torch.no_grad():
                    wanted = copy.deepcopy(module).double().eval()(x.double())
                    assert difference(folded.eval()(x), wanted) < TOLERANCE, f'{what}, {memory_format}'


@pytest.mark.parametrize('name', ['CotLayer', 'CoxtLayer'])
def test_norm_used_twice(name):
    module = create(name).train()
    module.bn = module.conv1x1[1]
    assert_same(module, name, 'norm used twice')
    assert not fast_paths(module, name)


@pytest.mark.parametrize('name', ['CotBottleneck', 'SplitAttnBottleneck'])
def test_norm_of_the_shortcut_used_twice(name):
    """The block runs it behind its own norms, and so do averages of statistics follow each other."""
    module = create(name).train()
    module.downsample[-1] = module.bn3
    assert_same(module, name, 'norm used twice')
    assert 'bottleneck' not in fast_paths(module, name)


@pytest.mark.parametrize('name, path, other_path', [
    ('CotLayer', 'bn', 'conv1x1.1'), ('CoxtLayer', 'bn', 'conv1x1.1'), ('CotBottleneck', 'bn3', 'downsample.1')])
def test_norms_that_share_statistics(name, path, other_path):
    module = create(name).train()
    assert fast_paths(module, name) or not has_kernels()
    norm, like = module.get_submodule(path), module.get_submodule(other_path)
    norm.running_mean, norm.running_var = like.running_mean, like.running_var
    assert kind_around(name, path) not in fast_paths(module, name)


@pytest.mark.parametrize('children', [(), (nn.Identity(),)], ids=['nothing', 'identity'])
def test_shortcut_that_does_nothing(children):
    torch.manual_seed(0)
    module = CotBottleneck(64, 16, downsample=nn.Sequential(*children)).train()
    for memory_format, plain in WAYS:
        with plain_wing(plain):
            x = image(5, 64, memory_format=memory_format)
            assert_training(copy.deepcopy(module), x, expected_training(module, 64), 'shortcut')
            folded = reparameterize_model(nn.Sequential(copy.deepcopy(module).eval()))
            with torch.no_grad():
                assert difference(folded(x), copy.deepcopy(module).double().eval()(x.double())) < TOLERANCE


@pytest.mark.parametrize('name, path', CHILDREN)
def test_another_type(name, path):
    module = create(name).train()
    swap(module, path, other(module.get_submodule(path)))
    assert_same(module, name, path)
    assert kind_around(name, path) not in fast_paths(module, name)


CONFIGURED = (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.ReLU, nn.SiLU, nn.Sequential)


@pytest.mark.parametrize('name, path', [
    (name, path) for name, path in CHILDREN if type(create(name).get_submodule(path)) in CONFIGURED])
def test_same_type_in_another_configuration(name, path):
    child = create(name).get_submodule(path)
    if type(child) is nn.Conv2d:
        variants = other_convolutions(child)
    elif type(child) in (nn.BatchNorm2d, nn.GroupNorm):
        variants = other_norms(child)
    elif type(child) in (nn.ReLU, nn.SiLU):
        variants = [type(child)(inplace=False)]
    else:
        variants = [nn.Sequential(*child, nn.Softplus()), nn.Sequential(nn.Sequential(*child))]
    for i, variant in enumerate(variants):
        module = create(name).train()
        swap(module, path, variant)
        assert_same(module, name, f'{path}, variant {i}')  # PyTorch cannot print convolutions with numbers


@pytest.mark.parametrize('name, path', CHILDREN)
def test_subclass(name, path):
    module = create(name).train()
    subclassed(module.get_submodule(path))
    assert_same(module, name, path)
    assert kind_around(name, path) not in fast_paths(module, name)


@pytest.mark.parametrize('name, path', [
    (name, path) for name, path in CHILDREN
    if isinstance(getattr(create(name).get_submodule(path), 'weight', None), nn.Parameter)])
def test_parametrized(name, path):
    module = create(name).train()
    parametrized(module.get_submodule(path))
    assert_same(module, name, path)
    assert kind_around(name, path) not in fast_paths(module, name)


@pytest.mark.parametrize('name, path', [
    (name, path) for name, path in CHILDREN if list(create(name).get_submodule(path).parameters())])
def test_frozen(name, path):
    module = create(name).train()
    frozen(module.get_submodule(path))
    assert_same(module, name, path)


@pytest.mark.parametrize('name, path', [
    (name, path) for name, path in CHILDREN if type(create(name).get_submodule(path)) is nn.Conv2d])
def test_adapted(name, path):
    module = create(name).train()
    swap(module, path, Lora(module.get_submodule(path)).train())
    module.get_submodule(path).base.requires_grad_(False)
    assert_same(module, name, path)
    assert kind_around(name, path) not in fast_paths(module, name)


def watch(module, path, seen):
    """Hooks of all three kinds on a child."""
    def shapes(tensors):
        tensors = tensors if isinstance(tensors, tuple) else (tensors,)
        return tuple(tuple(t.shape) for t in tensors if t is not None)
    child = module.get_submodule(path)
    return [
        child.register_forward_pre_hook(lambda m, args: seen.append(('pre', shapes(args)))),
        child.register_forward_hook(lambda m, args, out: seen.append(('forward', shapes(args), shapes(out)))),
        child.register_full_backward_hook(
            lambda m, grad_in, grad_out: seen.append(('backward', shapes(grad_in), shapes(grad_out)))),
    ]


@pytest.mark.parametrize('name, path', CHILDREN)
def test_watched(name, path):
    """Hooks fire as often, and see the same shapes, as where nothing stands in."""
    module = create(name).train()
    for child in module.modules():
        if hasattr(child, 'inplace'):
            child.inplace = False  # nothing may write over the output of a module with backward hooks
    bottleneck = name.endswith('Bottleneck') and path in ('bn3', 'drop_block')  # x += shortcut, as in timm's blocks
    seen = {}
    for key, memory_format, plain in [('double', FORMATS[0], False), *(
            (f'{memory_format}, {plain}', memory_format, plain)
            for memory_format, plain in WAYS)]:
        changed, rows = copy.deepcopy(module), []
        hooks = watch(changed, path, rows)
        if bottleneck:
            hooks.pop().remove()
        dtype = torch.float64 if key == 'double' else torch.float32
        x = image(5, MODULES[name][1], memory_format=memory_format, dtype=dtype).requires_grad_()
        with plain_wing(plain):
            changed.to(dtype)(x).square().sum().backward()
        seen[key] = rows
    expected = seen['double']
    calls = 2 if path == 'drop_block' else 1
    assert [row[0] for row in expected].count('forward') == [row[0] for row in expected].count('pre') == calls
    assert [row[0] for row in expected].count('backward') == (0 if bottleneck else calls)
    assert all(rows == expected for rows in seen.values()), path

    hooks = watch(module, path, [])
    if bottleneck:
        hooks.pop().remove()
    assert_same(module, name, path)
    assert kind_around(name, path) not in fast_paths(module, name)


FOLDED_CHILDREN = [
    (name, path) for name in MODULES
    for path, _ in reparameterize_model(nn.Sequential(create(name).eval()))[0].named_modules() if path]


@pytest.mark.parametrize('name, path', FOLDED_CHILDREN)
def test_watched_after_folding(name, path):
    """Hooks set after folding see a child run, whatever could stand in."""
    folded = reparameterize_model(nn.Sequential(create(name).eval()))[0]
    child = folded.get_submodule(path)
    for memory_format, plain in WAYS:
        seen = []
        hook = child.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        x = image(3, MODULES[name][1], memory_format=memory_format)
        with torch.no_grad(), plain_wing(plain):
            out = folded(x)
        hook.remove()
        assert len(seen) == 1
        with torch.no_grad():
            assert difference(out, copy.deepcopy(folded).double()(x.double())) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize('name, path', FOLDED_CHILDREN)
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, TOLERANCE), (torch.bfloat16, 0.05)])
def test_changed_after_folding(name, path, dtype, tolerance):
    """Every child of folded modules, which packed convolutions and kernels could stand in for."""
    x = image(3, MODULES[name][1]).to(dtype)
    original = reparameterize_model(nn.Sequential(create(name).eval()))[0].to(dtype)
    child = original.get_submodule(path)
    changes = {
        'subclass': subclassed,
        'another type': lambda child: swap(folded, path, other(child)),
        'hook': lambda child: child.register_forward_hook(lambda module, args, out: 1.5 * out),
        'pre hook': lambda child: child.register_forward_pre_hook(lambda module, args: (1.5 * args[0],)),
        'forward': lambda child: setattr(child, 'forward', lambda x, f=child.forward: 1.5 * f(x)),
    }
    if isinstance(getattr(child, 'weight', None), nn.Parameter):
        changes['parametrized'] = parametrized
        changes['without bias'] = lambda child: setattr(child, 'bias', None)
        changes['double weight'] = lambda child: child.weight.data.mul_(2)
    if type(child) is nn.Conv2d:
        changes['numbers'] = numbers
    for what, change in changes.items():
        folded = copy.deepcopy(original)
        change(folded.get_submodule(path))
        folded.to(dtype).eval()
        expected = copied_to_double(folded, what)(x.double())
        for memory_format, plain in WAYS:
            with plain_wing(plain):
                out = folded(x.contiguous(memory_format=memory_format))
            assert difference(out, expected) < tolerance, f'{path}: {what}, {memory_format}, {plain}'


def copied_to_double(module, what):
    if what == 'forward':  # a function of the object, which a copy shares with it: change the object for a moment
        return lambda x: in_double(module, x)
    return copy.deepcopy(module).double()


def in_double(module, x):
    dtype = next(module.parameters()).dtype
    out = module.double()(x)
    module.to(dtype)
    return out
