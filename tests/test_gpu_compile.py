"""What Triton kernels of training and inference are compiled to for NVIDIA GPUs, also where there is none."""
import functools
import inspect
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from triton_helpers import INTERPRETED

from timm_cotnet import CotLayer
from timm_cotnet.ops import conditions
from timm_cotnet.ops.gpu import contexts
from timm_cotnet.ops.gpu.folding import order_filters
from timm_cotnet.ops.gpu.images import change_format
from timm_cotnet.ops.gpu.stand_ins import (
    infer_bottleneck, infer_cot_layer, pool, train_bottleneck, train_cot_layer)

triton = pytest.importorskip('triton', reason='Triton is not installed')
compiler = pytest.importorskip('triton.compiler', reason='this Triton has no compiler')
backends = pytest.importorskip('triton.backends.compiler', reason='this Triton has no compiler')
nvidia = pytest.importorskip('triton.backends.nvidia', reason='this Triton cannot compile for NVIDIA GPUs')
CUOBJDUMP = Path(next(iter(nvidia.__path__))) / 'bin' / 'cuobjdump'
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETED, reason='the interpreter compiles nothing'),
    pytest.mark.skipif(
        'constexprs' not in inspect.signature(compiler.ASTSource.__init__).parameters,
        reason='written for Triton 3.3 and later'),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason='this Triton came without cuobjdump, which tells registers'),
]

STAGES = [(64, 56), (128, 28), (256, 14), (512, 7)]  # channels of a CoT layer, and side of its images of 224 x 224
POINTERS = {
    torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16', torch.float64: '*fp64',
    torch.int64: '*i64'}
# those that walk through activations, and so have to load 16 bytes at once
WIDE = {
    'moments_kernel', 'norm_act_kernel', 'grad_sums_kernel', 'norm_backward_kernel', 'local_conv_kernel',
    'dynamic_context_kernel', 'value_grad_kernel', 'pool_kernel', 'mix_kernel', 'mix_sums_kernel',
    'mix_backward_kernel', 'avg_pool_kernel'}
SHARED = {'product_kernel': 16 * 1024}  # two tiles of 32 x 32 in two stages; of all others a quarter
SPILLED = {'local_conv_kernel': 8}  # bytes of a thread, by some versions of Triton; of all others none


class Variant(NamedTuple):
    """What is compiled once."""
    kernel: object
    types: tuple  # of all arguments, (name, type)
    constants: tuple  # (name, value)
    options: tuple

    @property
    def name(self):
        return self.kernel.__name__


class Compiled(NamedTuple):
    ptx: str
    registers: int
    stack: int
    local: int
    shared: int

    @property
    def loads(self):
        """How often loads of each width are there."""
        return Counter(re.findall(r'ld\.global[.\w:]*?\.((?:v\d\.)?[buf]\d+)\b', self.ptx))


def variant_of(kernel, args, kwargs):
    values = {**dict(zip(kernel.arg_names, args)), **{k: v for k, v in kwargs.items() if k in kernel.arg_names}}
    constants = tuple((p.name, values[p.name]) for p in kernel.params if p.is_constexpr)
    names = [p.name for p in kernel.params if not p.is_constexpr]
    types = {name: POINTERS[values[name].dtype] if isinstance(values[name], torch.Tensor) else 'i32' for name in names}
    return Variant(
        kernel, tuple(types.items()), constants,
        tuple((k, v) for k, v in kwargs.items() if k not in kernel.arg_names))


def recorded(function):
    """The variants that function() launches, without running them."""
    variants = []

    def run(kernel, *args, grid, warmup, **kwargs):
        variants.append(variant_of(kernel, args, kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.jit.JITFunction, 'run', run)
        patch.setattr(conditions, '_has_cudnn', lambda: False)
        with torch.autocast('cpu', torch.bfloat16):
            function()
    return variants


def of_channels_last(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=None)
def variants_of_layer(C, side, training):
    """Those of a `CotLayer` under autocast to bfloat16."""
    layer, x = CotLayer(C).train(training), of_channels_last(2, C, side, side)
    if training:
        return recorded(lambda: train_cot_layer(layer, x).sum().backward())
    with torch.no_grad():
        folded = layer.fuse().bfloat16()
        variants = recorded(lambda: infer_cot_layer(layer, x)) + recorded(lambda: order_filters(folded))
        x = of_channels_last(64, C, 2, 2)  # of so many images several share a program that mixes
        return variants + [v for v in recorded(lambda: infer_cot_layer(layer, x)) if v.name == 'attend_kernel']


@functools.lru_cache(maxsize=None)
def compiled(variant, capability):
    types = dict(variant.types)
    names = variant.kernel.arg_names
    source = compiler.ASTSource(
        variant.kernel, {name: types.get(name, 'constexpr') for name in names},
        {(names.index(name),): value for name, value in variant.constants},
        {(i,): [['tt.divisibility', 16]] for i, name in enumerate(names) if types.get(name, '').startswith('*')})
    made = compiler.compile(source, target=backends.GPUTarget('cuda', capability, 32), options=dict(variant.options))
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(made.asm['cubin'])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, '-res-usage', file.name], capture_output=True, text=True, check=True).stdout
    used = [int(re.search(rf'{word}:(\d+)', usage)[1]) for word in ('REG', 'STACK', 'LOCAL')]
    return Compiled(made.asm['ptx'], *used, made.metadata.shared)


@pytest.fixture(autouse=True, scope='module')
def compiled_anew(tmp_path_factory):
    """Nothing comes from kernels that were compiled before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TRITON_CACHE_DIR', str(tmp_path_factory.mktemp('triton')))
        yield


def assert_compiles_well(variant, capability):
    made = compiled(variant, capability)
    what = f'{variant.name} {dict(variant.constants)}: {made[1:]}, loads {dict(made.loads)}'
    assert made.stack <= SPILLED.get(variant.name, 0) and made.local == 0, what
    assert made.registers <= 200, what
    assert made.shared <= SHARED.get(variant.name, 4 * 1024), what
    assert not re.search(r'\b(atom|red)\.', made.ptx), what
    if variant.name in WIDE:
        narrow = sum(count for width, count in made.loads.items() if width.endswith('16'))
        assert made.loads['v4.b32'] > 0 and narrow <= (variant.name == 'moments_kernel'), what  # a row to be around


@pytest.mark.parametrize('training', [True, False], ids=['training', 'inference'])
@pytest.mark.parametrize('C, side', STAGES)
def test_layer(C, side, training):
    variants = variants_of_layer(C, side, training)
    names = {variant.name for variant in variants}
    expected = {'local_conv_kernel', 'filter_grad_kernel', 'value_grad_kernel', 'mix_kernel'} if training \
        else {'dynamic_context_kernel', 'attend_kernel', 'mix_kernel', 'fold_layer_kernel', 'order_filters_kernel'}
    is_small = not training and side ** 2 <= contexts._SMALL
    assert names >= expected | ({'filter_table_kernel'} if is_small else {'moments_kernel', 'filter_norm_kernel'})
    for variant in set(variants):
        assert_compiles_well(variant, 90)


@pytest.mark.parametrize('training', [True, False], ids=['training', 'inference'])
def test_layer_on_an_older_gpu(training):
    for variant in set(variants_of_layer(*STAGES[0], training)):
        assert_compiles_well(variant, 80)


@pytest.mark.parametrize('stage', ['layer1', 'layer3'])
def test_bottlenecks_in_evaluation(stage):
    for block in getattr(timm.create_model('cotnet50').eval(), stage)[:2]:
        block.conv2, x = torch.nn.Identity(), of_channels_last(2, block.conv1.in_channels, 4, 4)
        with torch.no_grad():
            variant, = recorded(lambda: infer_bottleneck(block, x))
        assert variant.name == 'fold_block_kernel'
        assert_compiles_well(variant, 90)


@pytest.mark.parametrize('back', [False, True])
@pytest.mark.parametrize('C, side', [*STAGES, (64, 20)])
def test_memory_formats(C, side, back):
    """Whole vectors on either side where the number of pixels allows it, on that of the channels always."""
    x = torch.zeros(2, C, side, side, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last) if back else x
    variant, = recorded(lambda: change_format(x, back))
    made = compiled(variant, 90)
    stores = Counter(re.findall(r'st\.global[.\w:]*?\.((?:v\d\.)?[buf]\d+)\b', made.ptx))
    narrow = {56: 'v4.b32', 28: 'v4.b32', 20: 'v4.b32', 14: 'v2.b32', 7: 'b16'}[side]
    (load,), (store,) = made.loads, stores
    assert (load, store) == (('v4.b32', narrow) if back else (narrow, 'v4.b32'))
    assert made.stack == made.local == 0 and made.registers <= 64 and made.shared <= 8 * 1024


def test_kernels_of_a_network_are_few():
    """Each is compiled when it is first called: all of CotNet-50 in training, whose blocks of a stage share theirs."""
    model, launches = timm.create_model('cotnet50'), []
    x = of_channels_last(2, 64, 56, 56)
    for stage, (C, side) in zip((model.layer1, model.layer2, model.layer3, model.layer4), STAGES):
        blocks = []
        for block in stage[:2]:
            x = x.detach().requires_grad_()
            block.conv2 = torch.nn.Identity()
            launches += recorded(lambda: blocks.append(train_bottleneck(block, x)))
            launches += recorded(blocks[-1].sum().backward)
            x = blocks[-1]
        launches += variants_of_layer(C, side, True)
    strided = [stage[0].avd_first for stage in (model.layer2, model.layer3, model.layer4)]
    for module, (C, side) in zip(strided, STAGES[1:]):
        x = of_channels_last(2, C, 2 * side, 2 * side).requires_grad_()
        launches += recorded(lambda: pool(module, x).sum().backward())
    variants = set(launches)
    for variant in variants:
        assert_compiles_well(variant, 90)
    assert {v.name for v in variants} >= WIDE - {'dynamic_context_kernel'}
    assert len(variants) <= 67, Counter(v.name for v in variants)
