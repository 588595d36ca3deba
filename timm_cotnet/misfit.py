"""How a checkpoint differs from the network that it should fit, in words."""
from typing import Any, Dict, Iterable, List, Mapping, Optional

import torch

__all__ = ['classes_instead', 'differences', 'first_few']


def differences(found: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> Dict[str, List[str]]:
    """Compares keys and shapes.

    Args:
        found: State dict of the checkpoint; an entry may be something else than a tensor.
        expected: State dict of the network, whose tensors may be on the meta device.

    Returns:
        Under each of 'missing', 'unexpected' and 'of another shape', the keys of which that is true; with the last,
        also the two shapes.
    """
    return {
        'missing': [key for key in expected if key not in found],
        'unexpected': [key for key in found if key not in expected],
        'of another shape': [
            f'{key}: {_shape(found[key])} instead of {_shape(value)}'
            for key, value in expected.items() if key in found and getattr(found[key], 'shape', None) != value.shape
        ],
    }


def classes_instead(
        found: Mapping[str, Any],
        expected: Mapping[str, torch.Tensor],
        classifier: str = 'fc',
) -> Optional[int]:
    """Number of classes of a checkpoint that would fit the network if only that had as many.

    Args:
        found: State dict of the checkpoint.
        expected: State dict of the network.
        classifier: Name of the classifier, a linear layer.

    Returns:
        The number, 0 for a checkpoint without a classifier; None if anything else differs, or nothing.
    """
    names = [f'{classifier}.weight', f'{classifier}.bias']
    bodies = [{key: value for key, value in state.items() if key not in names} for state in (found, expected)]
    if any(differences(*bodies).values()):
        return None
    shapes = [[tuple(getattr(state.get(name), 'shape', ())) for name in names] for state in (found, expected)]
    (weight, bias), (expected_weight, _) = shapes
    if shapes[0] == shapes[1] or weight and expected_weight and weight[1:] != expected_weight[1:]:
        return None
    if not any(name in found for name in names):
        return 0
    return weight[0] if len(weight) == 2 and bias == weight[:1] else None


def first_few(names: Iterable[str], count: int = 3) -> str:
    """Lists names, separated by commas.

    Args:
        names: Names.
        count: How many are listed; of the others there is the number.
    """
    names = list(names)
    more = len(names) - count
    return ', '.join(names[:count]) + (f' and {more} more' if more > 0 else '')


def _shape(value: Any) -> str:
    shape = getattr(value, 'shape', None)
    return 'no tensor' if shape is None else 'x'.join(map(str, shape)) or 'a scalar'
