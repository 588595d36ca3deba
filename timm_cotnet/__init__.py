"""Contextual Transformer networks (CoTNet, arXiv:2107.12292) for timm. Importing this registers them with timm."""
import timm  # noqa: F401  first: waits for a thread that is importing timm

from . import byobnet  # noqa: F401  registers its models
from .cotnet import CotBottleneck, CotNet, SeCotNetD, SplitAttnBottleneck
from .explanation import explain
from .layers import CoTAttention, CotLayer, CoxtLayer, create_cot_layer
from .ops import local_conv
from .replace import replace_conv3x3

__version__ = '0.1.0'
__all__ = [
    'CoTAttention', 'CotBottleneck', 'CotLayer', 'CotNet', 'CoxtLayer', 'SeCotNetD', 'SplitAttnBottleneck',
    'create_cot_layer', 'explain', 'local_conv', 'replace_conv3x3',
]
