"""Local convolution, the operator of CoT: `local_conv.py` is the front end, each other file one implementation.

The rest is what stands beside it in a network on the CPU: `key_conv.py`, `contexts.py` and `batch_norm.py` for
training, `folded.py` and `pointwise.py` for inference.
"""
from .local_conv import grouped_local_conv, local_conv

__all__ = ['grouped_local_conv', 'local_conv']
