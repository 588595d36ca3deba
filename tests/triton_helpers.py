"""What tests of the Triton kernels share: they run on a GPU where there is one, and everywhere in Triton's interpreter.

The interpreter has to be chosen before Triton is first imported, so `passed_in_the_interpreter` runs a test file again
in a process of its own; the tests marked `kernels` run there and on a GPU.
"""
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Tuple

import pytest
import torch

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETED else 'cuda'
kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason='needs a GPU; runs without one inside test_kernels_in_the_interpreter',
)


def passed_in_the_interpreter(file: str) -> Tuple[int, int]:
    """Numbers of tests of a file that pass in the interpreter and that are skipped there; fails if one fails."""
    pytest.importorskip('triton', reason='Triton is not installed')
    env = dict(os.environ, TRITON_INTERPRET='1', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '-rs', file]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return tuple(int(re.search(rf'(\d+) {word}', run.stdout)[1]) for word in ('passed', 'skipped'))
