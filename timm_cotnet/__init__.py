"""Contextual Transformer networks (CoTNet, arXiv:2107.12292) for timm. Importing this registers them with timm."""
import timm  # noqa: F401  first: waits for a thread that is importing timm

from .cotnet import CotBottleneck, CotNet, SeCotNetD, SplitAttnBottleneck
from .explanation import explain
from .layers import CoTAttention, CotLayer, CoxtLayer
from .ops import local_conv

__version__ = '0.1.0'
__all__ = [
    'CoTAttention', 'CotBottleneck', 'CotLayer', 'CotNet', 'CoxtLayer', 'SeCotNetD', 'SplitAttnBottleneck',
    'explain', 'local_conv',
]
