"""How a checkpoint differs from a network, in words."""
import pytest
import torch

from timm_cotnet.misfit import classes_instead, differences, first_few

BODY = {'conv.weight': torch.ones(4, 3, 1, 1), 'bn.num_batches_tracked': torch.tensor(1)}


def with_classes(classes: int, features: int = 8) -> dict:
    return BODY | {'fc.weight': torch.ones(classes, features), 'fc.bias': torch.ones(classes)}


def test_differences():
    found = {'conv.weight': torch.ones(4, 1, 1, 1), 'bn.num_batches_tracked': 'text', 'extra': torch.ones(())}
    assert differences(found, with_classes(5)) == {
        'missing': ['fc.weight', 'fc.bias'],
        'unexpected': ['extra'],
        'of another shape': [
            'conv.weight: 4x1x1x1 instead of 4x3x1x1', 'bn.num_batches_tracked: no tensor instead of a scalar'],
    }
    assert not any(differences(BODY, {key: value.to('meta') for key, value in BODY.items()}).values())


@pytest.mark.parametrize('found, expected, classes', [
    (with_classes(7), with_classes(5), 7),
    (with_classes(7), BODY, 7),
    (BODY, with_classes(5), 0),
    (with_classes(5), with_classes(5), None),
    (BODY, BODY, None),
    (with_classes(7, features=9), with_classes(5), None),
    (with_classes(7) | {'extra': torch.ones(1)}, with_classes(5), None),
    (with_classes(7) | {'fc.bias': torch.ones(6)}, with_classes(5), None),
    (with_classes(7) | {'fc.weight': torch.ones(())}, with_classes(5), None),
    (with_classes(7) | {'fc.weight': 'text'}, with_classes(5), None),
])
def test_classes_instead(found, expected, classes):
    assert classes_instead(found, expected) == classes


def test_classes_of_a_classifier_with_another_name():
    found, expected = ({'head.weight': torch.ones(n, 2), 'head.bias': torch.ones(n)} for n in (3, 4))
    assert classes_instead(found, expected, 'head') == 3
    assert classes_instead(found, expected) is None


@pytest.mark.parametrize('count, expected', [(0, ''), (1, '0'), (3, '0, 1, 2'), (5, '0, 1, 2 and 2 more')])
def test_first_few(count, expected):
    assert first_few(map(str, range(count))) == expected
