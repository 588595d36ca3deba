"""Who looks at what operators and modules do: only where nobody does may something else take the place of a module."""
from typing import List

import torch
from torch import nn

_TENSORS = (torch.Tensor, nn.Parameter)


def is_traced(x: torch.Tensor) -> bool:
    """Whether operators are watched: jit.trace, make_fx, functorch, a dispatch mode, a proxy or tensor subclass."""
    return (
        type(x) not in _TENSORS
        or torch._C._is_tracing()  # torch.jit.is_tracing, less what surrounds it
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def needs_plain_graph(*tensors: torch.Tensor) -> bool:
    """Whether a graph is being made that needs plain operators: for export, functorch transforms, tensor subclasses.

    PyTorch 2.6 cannot tell exporting from compiling.
    """
    return torch.compiler.is_compiling() and (
        not hasattr(torch.compiler, 'is_exporting') or torch.compiler.is_exporting()
        or _is_functorch_active() or any(type(t) not in _TENSORS for t in tensors))


@torch.compiler.assume_constant_result  # of the graph that is being made
def _is_functorch_active() -> bool:
    return torch._C._are_functorch_transforms_active()


def are_watched(modules: List[nn.Module], children: bool = True) -> bool:
    """Whether hooks, or other forward methods, see what modules and their children get and return."""
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks or everywhere._global_backward_hooks \
            or everywhere._global_backward_pre_hooks:
        return True
    modules = list(modules)
    for module in modules:  # grows; by hand, as `modules()` would take longer than a block does
        if module is not None:
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks \
                    or module._backward_pre_hooks or 'forward' in module.__dict__:
                return True
            if children:
                modules += module._modules.values()
    return False


def wants_plain(*grads: torch.Tensor) -> bool:
    """Whether a backward has to be differentiable plain PyTorch: for a second derivative or many gradients at once."""
    return torch.is_grad_enabled() or any(
        torch._C._functorch.is_legacy_batchedtensor(grad) or torch._C._functorch.is_functorch_wrapped_tensor(grad)
        for grad in grads if grad is not None)
