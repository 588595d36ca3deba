"""What tests of folding share: modules, networks, and how a folded one is compared."""
import copy

import timm
import torch
from golden import filled, golden_input
from timm.utils import reparameterize_model
from torch import nn

from timm_cotnet.deploy import FoldedBottleneck, FoldedCotAttention, FoldedCotLayer

from helpers import FORMATS, create, difference, shaken

FOLDED = {
    'CotLayer': FoldedCotLayer, 'CoxtLayer': FoldedCotLayer, 'CoTAttention': FoldedCotAttention,
    'CotBottleneck': FoldedBottleneck, 'SplitAttnBottleneck': FoldedBottleneck,
}
MODELS = {
    'test_cotnet': {},
    'cotnext50_2x48d': dict(layers=(1, 2, 1, 1)),
    'se_cotnetd_50': dict(layers=(1, 1, 2, 1)),
    'se_cotnetd_152': dict(layers=(1, 1, 2, 1)),
}


def made(name, seed=0):
    """A module of `MODULES` in float64 and evaluation."""
    return create(name, seed).double().eval()


def network(name, **kwargs):
    """A network in float64 and evaluation, none of whose parameters is special."""
    return shaken(timm.create_model(name, **MODELS.get(name, {}), **kwargs)).double().eval()


def fold(module):
    """A folded copy; timm folds the children of what it gets."""
    return reparameterize_model(nn.Sequential(module))[0]


def model_of(name, **kwargs):
    return filled(timm.create_model(name, **MODELS.get(name, {}), **kwargs)).eval()


def pictures(*shape):
    return golden_input(shape or (2, 3, 64, 64), 'fold')


@torch.no_grad()
def check(module, folded, x, tolerance=1e-10):
    """Both agree in float64 and evaluation, and nearly in float32, in which kernels may run."""
    module, folded = copy.deepcopy(module).double().eval(), copy.deepcopy(folded).double().eval()
    expected = module(x.double())
    assert difference(folded(x.double()), expected) < tolerance
    folded.float()
    for memory_format in FORMATS:
        assert difference(folded(x.float().contiguous(memory_format=memory_format)), expected) < 1e-4
