"""Local convolution, the operator of CoT: `local_conv.py` is the front end, each other file one implementation.

`contexts.py` and `batch_norm.py` are its neighbours in a CoT block, for training on the CPU.
"""
from .local_conv import grouped_local_conv, local_conv

__all__ = ['grouped_local_conv', 'local_conv']
