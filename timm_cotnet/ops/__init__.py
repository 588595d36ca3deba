"""Local convolution, the operator of CoT: `local_conv.py` is the front end, each other file one implementation."""
from .local_conv import local_conv

__all__ = ['local_conv']
