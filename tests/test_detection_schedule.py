"""The 1x schedule, and which parameters decay."""
import pytest
import torch
from torch import nn

from timm_cotnet.detection.schedule import Schedule, create_optimizer


def test_published_schedule():
    schedule = Schedule.scaled(16, 117266)
    assert schedule == Schedule(90000, 0.02, 1000, (60000, 80000))
    factors = [schedule.factor(i) for i in (0, 500, 1000, 59999, 60000, 79999, 80000, 89999)]
    assert factors == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_schedule_is_scaled_with_the_batch():
    schedule = Schedule.scaled(4, 117266)
    assert schedule == Schedule(360000, 0.005, 4000, (240000, 320000))
    assert Schedule.scaled(32, 117266, lr=0.1) == Schedule(45000, 0.1, 500, (30000, 40000))


def test_schedule_of_few_epochs():
    assert Schedule.scaled(8, 300, epochs=4.8) == Schedule(180, 0.01, 18, (120, 160))
    schedule = Schedule.scaled(16, 10, epochs=0.1)
    assert schedule.iterations == 1 and schedule.factor(0) == 1


def test_norms_and_frozen_parameters():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
    model[2].weight.requires_grad_(False)
    decayed, norms = create_optimizer(model, 0.1).param_groups
    assert [id(p) for p in decayed['params']] == [id(p) for p in (model[0].weight, model[0].bias, model[2].bias)]
    assert [id(p) for p in norms['params']] == [id(p) for m in (model[1], model[3]) for p in m.parameters()]
    assert (decayed['weight_decay'], norms['weight_decay'], decayed['momentum']) == (1e-4, 0, 0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(create_optimizer(model, 0.1), Schedule(10, 0.1, 2, (5, 8)).factor)
    assert scheduler.get_last_lr() == pytest.approx([1e-4] * 2)
