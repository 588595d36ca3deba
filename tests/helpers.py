"""What several test files use: modules and inputs, comparisons, and a wing of CPU kernels in plain PyTorch."""
import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import timm_cotnet
from timm_cotnet import CoTAttention, CotBottleneck, CotLayer, CoxtLayer, SplitAttnBottleneck
from timm_cotnet.ops import conditions, dispatch
from timm_cotnet.ops.compiled import arguments_of
from timm_cotnet.ops.onednn import why_not_packed
from timm_cotnet.ops.shifted import LocalConvShifted
from timm_cotnet.ops.watch import TELLS_EXPORTING

FORMATS = [torch.contiguous_format, torch.channels_last]
FORMAT_NAMES = {torch.contiguous_format: 'contiguous', torch.channels_last: 'channels_last'}
MODULES = {  # name: (what makes it, channels of its input)
    'CotLayer': (lambda: CotLayer(32), 32),
    'CoxtLayer': (lambda: CoxtLayer(32), 32),
    'CoTAttention': (lambda: CoTAttention(32), 32),
    'CotBottleneck': (lambda: CotBottleneck(16, 16, 2, strided_shortcut(16, 64)), 16),
    'SplitAttnBottleneck': (lambda: SplitAttnBottleneck(16, 16, 2, shortcut(16, 64)), 16),
}


def strided_shortcut(inplanes, outplanes):
    """As in the plain networks, which kernels for training know."""
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, 2, bias=False), nn.BatchNorm2d(outplanes))


def shortcut(inplanes, outplanes):
    """As in those of type D."""
    return nn.Sequential(
        nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(inplanes, outplanes, 1, bias=False), nn.BatchNorm2d(outplanes))


def create(name, seed=0):
    """A module of `MODULES` whose parameters and running statistics are all away from their initial values."""
    torch.manual_seed(seed)
    return shaken(MODULES[name][0]())


def shaken(module):
    """The module with other parameters and running statistics."""
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape))
        for name, tensor in module.named_buffers():
            if name.endswith('running_mean'):
                tensor.add_(0.1 * torch.randn(tensor.shape))
            elif name.endswith('running_var'):
                tensor.mul_(1 + 0.5 * torch.rand(tensor.shape))
    return module


def image(B, C, H=6, W=7, memory_format=torch.contiguous_format, dtype=torch.float32, seed=1):
    x = torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).contiguous(memory_format=memory_format)


def is_norm(module):
    return 'BatchNorm' in type(module).__name__


def norms(model):
    """Names of the batch norms of any kind."""
    return [name for name, module in model.named_modules() if is_norm(module)]


def difference(actual, expected):
    """Largest difference, relative to the largest number expected."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.
    assert actual.isfinite().all() and expected.isfinite().all()
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)).item()


def assert_parts_are_as_pytorch_wants_them(name, layer, x):
    """The operators of forward and backward of a `LayerOperator`, which have no gradients."""
    (x, parameters, averages, *numbers), _ = arguments_of(layer, x.detach())
    parameters = [p.detach() for p in parameters]
    forward, backward = (getattr(torch.ops.timm_cotnet, name + part) for part in ('_forward', '_backward'))
    args = (x, parameters, averages, *numbers)
    out, *kept = forward(*args)[:-len(averages)]
    needed = [i != 1 for i in range(1 + len(parameters))]
    of_backward = (torch.ones_like(out), x, parameters, kept, needed, *numbers)
    for operator, inputs in ((forward, args), (backward, of_backward)):
        assert set(torch.library.opcheck(operator, inputs).values()) == {'SUCCESS'}


def implementations(module, *args):
    """What computes each layer of module(*args), and its result."""
    with dispatch.recorded() as choices:
        out = module(*args)
    return [choice.implementation for choice in choices if choice.module is not None], out


def why_no_kernels():
    """None if the wing is there and can compile its kernels here."""
    return 'the package has no folder ops/cpu' if conditions.cpu is None else conditions.cpu.why_not(torch.float32)


def has_kernels():
    return why_no_kernels() is None


class Lora(nn.Module):
    """A convolution and a low-rank change of it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, base.padding, base.dilation)
        self.up = nn.Conv2d(2, base.out_channels, 1)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


needs_kernels = pytest.mark.skipif(not has_kernels(), reason=f'no native kernels: {why_no_kernels()}')
needs_onednn = pytest.mark.skipif(
    why_not_packed(torch.float32) is not None, reason='PyTorch is built without oneDNN, which packs filters')
needs_export_flag = pytest.mark.skipif(
    not TELLS_EXPORTING, reason='PyTorch before 2.8 cannot tell compiling from exporting, so both get plain operators')
needs_cpp_compiler = pytest.mark.skipif(not shutil.which('g++'), reason='Inductor needs the C++ compiler g++')


def maps_group_norm(backward):
    """Whether this PyTorch can map its own group norm of channels-last images, forward or backward (2.6 to 2.12
    cannot)."""
    x = image(2, 4, memory_format=torch.channels_last).requires_grad_()
    try:
        if backward:
            out = F.group_norm(x, 2)
            torch.vmap(lambda row: torch.autograd.grad(out, x, row, retain_graph=True)[0])(torch.ones(2, *out.shape))
        else:
            torch.func.vmap(lambda x: F.group_norm(x, 2))(torch.stack([x, x]).permute(0, 1, 3, 4, 2).contiguous()
                                                          .permute(0, 1, 4, 2, 3))
    except RuntimeError:
        return False
    return True


class PlainWing:
    """Stands for `timm_cotnet.ops.cpu`: as kernels do, it calls no child, and assumes what the seam has checked.

    So the conditions of the seam are tested where nothing can be compiled: what it lets through by mistake gives other
    numbers here. `called` lists the kinds of modules that it ran.
    """
    MAX_KERNEL_SIZE = 7
    local_conv = staticmethod(LocalConvShifted.apply)

    def __init__(self):
        self.called = []

    def why_not(self, dtype):
        return None if dtype in (torch.float32, torch.bfloat16) else f'there is no kernel for {dtype}'

    def train_cot_layer(self, layer, x):
        self.called.append('cot_layer')
        static = layer.key_embed(x)
        conv, norm, act, last, group_norm = layer.embed
        hidden = F.conv2d(layer._concatenate(x, static), conv.weight, None, groups=layer.groups)
        logits = F.conv2d(act(norm(hidden)), last.weight, last.bias, groups=layer.groups)
        filters = F.group_norm(logits, group_norm.num_groups, group_norm.weight, group_norm.bias, group_norm.eps)
        value = self._batch_norm(self._pointwise(layer.conv1x1[0], x, layer.groups), layer.conv1x1[1])
        dynamic = F.silu(self._batch_norm(self._local_conv(value, filters, layer), layer.bn))
        first, norm, _, second = layer.se
        hidden = F.relu(self._batch_norm(self._pointwise(first, self._pool(dynamic, static)), norm))
        return self._mix(dynamic, static, self._pointwise(second, hidden))

    def train_bottleneck(self, block, x, downsample):
        self.called.append('bottleneck')
        out = F.relu(self._batch_norm(self._pointwise(block.conv1, x), block.bn1))
        out = self._pointwise(block.conv3, block.avd_last(block.conv2(block.avd_first(out))))
        if downsample:
            shortcut = self._batch_norm(self._conv(downsample[0], x), downsample[1])
        else:
            shortcut = x if block.downsample is None else block.downsample(x)
        return F.relu(self._batch_norm(out, block.bn3) + shortcut)

    def folded_cot_layer(self, layer, x, parts):
        self.called.append('folded_cot_layer')
        static = F.relu(self._conv(layer.key_embed[0], x))
        query, key = (self._pointwise(*args, layer.groups) for args in ((layer.query, x), (layer.key, static)))
        logits, norm = self._pointwise(layer.embed[1], F.relu(query + key), layer.groups), layer.embed[2]
        filters = F.group_norm(logits, norm.num_groups, norm.weight, norm.bias, norm.eps)
        value = self._pointwise(layer.value, x, layer.groups)
        dynamic = F.silu(self._local_conv(value, filters, layer) + layer.shift.view(-1, 1, 1))
        hidden = F.relu(self._pointwise(layer.se[0], self._pool(dynamic, static)))
        return self._mix(dynamic, static, self._pointwise(layer.se[2], hidden))

    @staticmethod
    def _conv(conv, x):
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    def _pointwise(conv, x, groups=1):
        return F.conv2d(x, conv.weight, conv.bias, groups=groups)

    @staticmethod
    def _batch_norm(x, norm):
        norm.num_batches_tracked.add_(1)
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.eps)

    @staticmethod
    def _local_conv(value, filters, layer):
        B, N, H, W = filters.shape
        taps = layer.kernel_size ** 2
        parts = zip(value.chunk(layer.groups, 1), filters.view(B, N // taps, taps, H, W).chunk(layer.groups, 1))
        return torch.cat([LocalConvShifted.apply(v, f, layer.kernel_size, layer.dilation) for v, f in parts], 1)

    @staticmethod
    def _pool(dynamic, static):
        return (dynamic + static).mean((2, 3), keepdim=True)

    @staticmethod
    def _mix(dynamic, static, attn):
        if attn.shape[1] == dynamic.shape[1]:  # the difference of the logits
            attn = torch.stack([torch.zeros_like(attn), attn], 2).flatten(1, 2)
        weights = attn.view(attn.shape[0], -1, 2, 1, 1).softmax(2)
        return dynamic * weights[:, :, 0] + static * weights[:, :, 1]


def plain_wing(use=True):
    """A context in which `PlainWing` takes the place of the wing; without `use`, one that changes nothing."""
    if not use:
        return contextlib.nullcontext(None)
    return _wing(PlainWing())


class _wing:
    def __init__(self, wing):
        self.wing, self.patch = wing, pytest.MonkeyPatch()

    def __enter__(self):
        self.patch.setattr(conditions, 'cpu', self.wing)
        return self.wing

    def __exit__(self, *_):
        self.patch.undo()


@contextlib.contextmanager
def threads_set(threads):
    """PyTorch works with so many threads while it lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_python(*args, **kwargs):
    """What a process of Python prints, with this package on its path; it has to succeed."""
    env = {**os.environ, 'PYTHONPATH': str(Path(timm_cotnet.__file__).parents[1]), **kwargs.pop('env', {})}
    result = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=300, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout
