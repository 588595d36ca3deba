"""Local convolution, the operator of CoT: `local_conv.py` is the front end, each other file one implementation."""
from .local_conv import grouped_local_conv, is_traced, local_conv

__all__ = ['grouped_local_conv', 'is_traced', 'local_conv']
