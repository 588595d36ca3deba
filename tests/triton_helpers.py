"""What tests of the Triton kernels share: they run on a GPU where there is one, and everywhere in Triton's interpreter.

The interpreter has to be chosen before Triton is first imported, so `passed_in_the_interpreter` runs a test file again
in a process of its own; the tests marked `kernels` run there and on a GPU.
"""
import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Tuple

import pytest
import torch
from helpers import image, shaken

from timm_cotnet import CotLayer, CoxtLayer

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETED else 'cuda'
kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason='needs a GPU; runs without one inside test_kernels_in_the_interpreter',
)
outside = pytest.mark.skipif(INTERPRETED, reason='starts the interpreter, in which it runs already')


def has_old_triton() -> bool:
    import triton

    return tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3)


def passed_in_the_interpreter(file: str, loops: bool = True) -> Tuple[int, int]:
    """Numbers of tests of a file that pass in the interpreter and that are skipped there; fails if one fails.

    Args:
        file: The test file.
        loops: Whether its kernels loop between numbers that they compute.
    """
    pytest.importorskip('triton', reason='Triton is not installed')
    if loops and has_old_triton():
        pytest.skip('the interpreter of Triton before 3.3 cannot loop between numbers that a kernel computes')
    env = dict(os.environ, TRITON_INTERPRET='1', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '-rs', file]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return tuple(int(re.search(rf'(\d+) {word}', run.stdout)[1]) for word in ('passed', 'skipped'))


# Whole layers and blocks

# For gradients of a layer, of the norm of all differences; outputs are 16 times closer. In a half type tensors between
# its parts are rounded too, values near zero fall on the other side of a ReLU, and the norm over few pooled images
# makes much of it: plain PyTorch is as far off. The interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.12}
LAYERS = {
    'cot': (CotLayer, dict(dim=16), (4, 4, 3)),
    'cot24': (CotLayer, dict(dim=24), (3, 3, 7)),
    'k5': (CotLayer, dict(dim=16, kernel_size=5), (3, 4, 7)),
    'dilation2': (CotLayer, dict(dim=8, dilation=2), (4, 5, 3)),
    'k1': (CotLayer, dict(dim=8, kernel_size=1), (4, 3, 1)),
    'coxt': (CoxtLayer, dict(dim=32), (3, 4, 3)),
    'coxt_k5_dilation2': (CoxtLayer, dict(dim=16, kernel_size=5, dilation=2), (3, 5, 6)),
}
LAYERS_AND_FORMATS = [
    *((tag, torch.channels_last) for tag in LAYERS), *((tag, torch.contiguous_format) for tag in ('k1', 'coxt'))]
SMALL = {'small_cot': (CotLayer, dict(dim=8), (3, 2, 3)), 'small_coxt': (CoxtLayer, dict(dim=16), (3, 2, 3))}


def create(tag='cot', dtype=torch.float64, memory_format=torch.channels_last, seed=0):
    """A layer, and an x for it."""
    cls, kwargs, (B, H, W) = (LAYERS | SMALL)[tag]
    torch.manual_seed(seed)
    return shaken(cls(**kwargs)).to(DEVICE, dtype), image(B, kwargs['dim'], H, W, memory_format, dtype).to(DEVICE)


def plain(module, x):
    """What the module's own forward gives, whatever could stand in for it."""
    return type(module).forward.__wrapped__(module, x)


def exact(module, x):
    """Both in float64 on the CPU."""
    return copy.deepcopy(module).cpu().double(), x.detach().cpu().double()


def gradient_for(out, seed=2):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors_of(module, x):
    """By name what a gradient is wanted of."""
    tensors = {'x': x.requires_grad_(), **dict(module.named_parameters())}
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


def value_and_grads(run, module, x):
    """Output and gradients, by name, for a gradient that is the same each time."""
    tensors, out = tensors_of(module, x), run(module, x)
    grad = torch.empty_like(out).copy_(gradient_for(out))
    return {'out': out, **dict(zip(tensors, torch.autograd.grad(out, list(tensors.values()), grad)))}


def error(actual, expected):
    """Norm of the difference, relative to that of what is expected."""
    assert actual.shape == expected.shape
    assert expected.norm() > 0
    return ((actual.detach().cpu().double() - expected.detach()).norm() / expected.norm()).item()


def assert_all_close(actual, expected, tolerance, zero=()):
    """Tensors by name; those named zero are that but for rounding."""
    assert list(actual) == list(expected)
    largest = max(tensor.norm() for tensor in expected.values())
    for name in actual:
        if name in zero or expected[name].norm() == 0:
            assert actual[name].norm() <= tolerance * largest, name
        else:
            found = error(actual[name], expected[name])
            assert found <= (tolerance / 16 if name == 'out' else tolerance), f'{name}: relative error {found:.1e}'


def of_zero_gradient(layer):
    """Biases that a norm takes out again."""
    return ('se.0.bias', 'embed.3.bias') if layer.kernel_size == 1 else ('se.0.bias',)


def assert_trains_like_plain(run, module, x, tolerance=None, zero=()):
    """Outputs, gradients and running statistics."""
    tolerance = tolerance or TOLERANCE[x.dtype]
    reference, exact_x = exact(module, x)
    got = value_and_grads(run, module, x)
    assert_all_close(got, value_and_grads(plain, reference, exact_x), tolerance, zero)
    for (name, buffer), expected in zip(module.named_buffers(), reference.buffers()):
        if name.endswith('num_batches_tracked'):
            assert buffer == expected == 1, name
        else:
            assert error(buffer, expected) <= tolerance, name
    return got


def gradients_of_gradients(run, module, x):
    """By name, of x, the parameters and the gradient of the output."""
    tensors, out = tensors_of(module, x), run(module, x)
    grad = torch.empty_like(out).copy_(gradient_for(out)).requires_grad_()
    grads = torch.autograd.grad(out, list(tensors.values()), grad, create_graph=True)
    total = sum((g * gradient_for(g, 3 + i).to(g)).sum() for i, g in enumerate(grads))
    found = torch.autograd.grad(total, [*tensors.values(), grad], allow_unused=True)
    tensors['grad'] = grad
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(tensors.items(), found)}
