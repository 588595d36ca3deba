"""Who looks at what operators and modules do: only where nobody does may one kernel take the place of several."""
from typing import List, Optional

import torch
from torch import nn


def is_traced(x: torch.Tensor) -> bool:
    """Whether operators are watched: torch.compile, export, jit.trace, make_fx, functorch, a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(x) not in (torch.Tensor, nn.Parameter)
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def are_watched(modules: List[Optional[nn.Module]]) -> bool:
    """Whether hooks, or other forward methods, see what modules and their parts get and return: they must be called."""
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks or everywhere._global_backward_hooks \
            or everywhere._global_backward_pre_hooks:
        return True
    for module in modules:  # grows; by hand, as `modules()` would take longer than a block does
        if module is not None:
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks \
                    or module._backward_pre_hooks or 'forward' in module.__dict__:
                return True
            modules += module._modules.values()
    return False
