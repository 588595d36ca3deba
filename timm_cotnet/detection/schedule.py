"""The paper's 1x schedule for COCO, and the optimizer that follows it."""
from bisect import bisect_right
from typing import NamedTuple, Optional, Tuple

import torch
from torch import nn

__all__ = ['Schedule', 'create_optimizer']

BATCH_SIZE = 16  # images of an iteration for which the rest was published
LR = 0.02
ITERATIONS = 90000
STEPS = (60000, 80000)  # iterations after which the learning rate is a tenth of what it was
WARMUP = 1000  # iterations in which the learning rate grows to its full height
WARMUP_START = 0.001  # part of it with which it begins
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4


class Schedule(NamedTuple):
    """Learning rate by iteration: linear warm-up, then steps.

    Attributes:
        iterations: Number of iterations in all.
        lr: Learning rate at its full height.
        warmup: Iterations of the warm-up.
        steps: Iterations after which the learning rate is divided by ten.
    """
    iterations: int
    lr: float
    warmup: int
    steps: Tuple[int, ...]

    @classmethod
    def scaled(
            cls,
            batch_size: int,
            num_images: int,
            epochs: Optional[float] = None,
            lr: Optional[float] = None,
    ) -> 'Schedule':
        """The published schedule for another batch: as many images in all, a learning rate in proportion.

        Args:
            batch_size: Images of an iteration.
            num_images: Images of the data set.
            epochs: Passes over the data set, if it should not be as many images as published; the steps move in
                proportion, and the warm-up takes a tenth of the iterations at most.
            lr: Learning rate, if it should not be in proportion to the batch.
        """
        factor = BATCH_SIZE / batch_size
        iterations = ITERATIONS * factor if epochs is None else epochs * num_images / batch_size
        iterations = max(round(iterations), 1)
        return cls(
            iterations=iterations,
            lr=LR / factor if lr is None else lr,
            warmup=round(min(WARMUP * factor, iterations / 10)),
            steps=tuple(round(step / ITERATIONS * iterations) for step in STEPS),
        )

    def factor(self, iteration: int) -> float:
        """Part of the full learning rate with which an iteration, counted from 0, is done."""
        warm = WARMUP_START + (1 - WARMUP_START) * iteration / self.warmup if iteration < self.warmup else 1.
        return warm * 0.1 ** bisect_right(self.steps, iteration)


def create_optimizer(model: nn.Module, lr: float) -> torch.optim.SGD:
    """SGD as published, with a weight decay for all but the norms.

    Args:
        model: What is trained; frozen parameters are left out.
        lr: Learning rate.
    """
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    of_norms = {p for module in model.modules() if isinstance(module, norms) for p in module.parameters(recurse=False)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in trained if p not in of_norms], weight_decay=WEIGHT_DECAY),
        dict(params=[p for p in trained if p in of_norms], weight_decay=0.),
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM)
