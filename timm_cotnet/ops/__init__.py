"""The two operators of CoT: local convolution, and the contexts behind the convolutions of a layer.

`local_conv.py` and `contexts.py` say what they compute. `dispatch.py` decides what may stand in for a module or an
operator on an input: `plain.py` and `shifted.py` are in plain PyTorch, `cpu/` and `gpu/` are kernels.
"""
from .contexts import ContextsParameters, ContextsSettings, contexts, mix_contexts, pool_contexts
from .local_conv import grouped_local_conv, local_conv

__all__ = [
    'ContextsParameters', 'ContextsSettings', 'contexts', 'grouped_local_conv', 'local_conv', 'mix_contexts',
    'pool_contexts',
]
