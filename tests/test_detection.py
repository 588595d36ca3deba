"""Detectors: what is frozen and normed, what a cascade computes, and torchvision's conventions in every corner."""
import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import FrozenBatchNorm2d, box_iou

from timm_cotnet import detection
from timm_cotnet.detection import cotnet_fpn_backbone
from timm_cotnet.detection.backbone import _stages
from timm_cotnet.detection.cascade import CascadeRoIHeads, CascadeStage
from timm_cotnet.detection.heads import AlignedRoIAlign, BoxPredictor, RPNHead
from timm_cotnet.detection.models import DETECTORS
from timm_cotnet.detection.sync_batch_norm import SyncBatchNorm
from timm_cotnet.pretrained import WeightsError

SMALL = dict(
    num_classes=3, min_size=64, max_size=128, box_batch_size_per_image=8, rpn_post_nms_top_n_train=16,
    rpn_post_nms_top_n_test=8)


def images_and_targets():
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 64, 80, generator=generator), torch.rand(3, 64, 64, generator=generator)]
    masks = torch.zeros(1, 64, 80, dtype=torch.uint8)
    masks[:, 10:40, 12:52] = 1
    return images, [
        dict(boxes=torch.tensor([[12., 10, 52, 40]]), labels=torch.tensor([2]), masks=masks),
        dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64),
             masks=torch.zeros(0, 64, 64, dtype=torch.uint8)),
    ]


# Backbone


def test_pyramid_has_the_strides_and_the_pool():
    backbone = cotnet_fpn_backbone('test_cotnet', norm='batch').eval()
    levels = backbone(torch.zeros(1, 3, 64, 96))
    assert {name: tuple(level.shape) for name, level in levels.items()} == {
        '0': (1, 256, 16, 24), '1': (1, 256, 8, 12), '2': (1, 256, 4, 6), '3': (1, 256, 2, 3), 'pool': (1, 256, 1, 2)}
    assert torch.equal(levels['pool'], levels['3'][:, :, ::2, ::2])
    last = cotnet_fpn_backbone('test_cotnet', norm='batch', returned_layers=[3, 4]).eval()(torch.zeros(1, 3, 64, 96))
    assert [tuple(level.shape[2:]) for level in last.values()] == [(4, 6), (2, 3), (1, 2)]


def test_backbone_with_channels_last():
    """As MambaOut gives its features, and many transformers do."""
    backbone = cotnet_fpn_backbone('mambaout_femto', norm='batch').eval()
    levels = backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(level.shape[1:]) for level in levels.values()] == [
        (256, 16, 24), (256, 8, 12), (256, 4, 6), (256, 2, 3), (256, 1, 2)]


@pytest.mark.parametrize('name', ['fasterrcnn_cotnet_fpn', 'cascade_mask_rcnn_cotnet_fpn'])
def test_misspelled_arguments(name):
    """torchvision takes them without a word."""
    other = {'fasterrcnn_cotnet_fpn': 'cascade_ious', 'cascade_mask_rcnn_cotnet_fpn': 'box_tresh'}[name]
    with pytest.raises(ValueError, match=f'{name} has no argument {other}, min_sizes; torchvision lists'):
        DETECTORS[name]('test_cotnet', weights_backbone=None, min_sizes=3, **{other: 1})


@pytest.mark.parametrize('trainable', [0, 3, 5])
def test_what_is_frozen(trainable):
    backbone = cotnet_fpn_backbone('test_cotnet', trainable_layers=trainable)
    stages = ['conv1', 'layer1', 'layer2', 'layer3', 'layer4']
    for number, stage in enumerate(stages):
        trained = number >= 5 - trainable
        module = backbone.body[stage]
        assert all(parameter.requires_grad == trained for parameter in module.parameters())
        norms = [child for child in module.modules() if 'BatchNorm' in type(child).__name__]
        assert norms and {type(norm) for norm in norms} == {SyncBatchNorm if trained else FrozenBatchNorm2d}
    assert isinstance(backbone.body.bn1, SyncBatchNorm if trainable == 5 else FrozenBatchNorm2d)
    assert all(parameter.requires_grad for parameter in backbone.fpn.parameters())
    assert not any(name.endswith('bias') and '.0.bias' in name for name, _ in backbone.fpn.named_parameters())


def test_stages_of_models_whose_blocks_lie_between():
    ends = ['blocks.1', 'blocks.2', 'blocks.4', 'blocks.6']
    keys = ['conv_stem.weight', 'bn1.weight', *(f'blocks.{i}.0.weight' for i in range(7))]
    assert list(_stages(keys, ends).values()) == [0, 0, 0, 1, 2, 3, 3, 4, 4]
    backbone = cotnet_fpn_backbone('convnext_atto', trainable_layers=3)
    assert [tuple(level.shape[2:]) for level in backbone(torch.zeros(1, 3, 64, 64)).values()] == [
        (16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    frozen = {name.split('.')[0] for name, p in backbone.body.named_parameters() if not p.requires_grad}
    assert frozen == {'stem_0', 'stem_1', 'stages_0'}


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="norm is 'group'; it may be 'sync', 'batch', 'frozen'"):
        cotnet_fpn_backbone('test_cotnet', norm='group')
    with pytest.raises(ValueError, match='trainable_layers is 6'):
        cotnet_fpn_backbone('test_cotnet', trainable_layers=6)
    with pytest.raises(ValueError, match=r'returned_layers is \[0, 4\]'):
        cotnet_fpn_backbone('test_cotnet', returned_layers=[0, 4])
    with pytest.raises(ValueError, match=r'test_vit has features at strides \[16\]'):
        cotnet_fpn_backbone('test_vit')
    create = detection.cascade_rcnn_cotnet_fpn
    with pytest.raises(ValueError, match='pass cascade_ious'):
        create('test_cotnet', weights_backbone=None, box_fg_iou_thresh=0.6)
    with pytest.raises(ValueError, match='bbox_reg_weights .* each of the 3 stages'):
        create('test_cotnet', weights_backbone=None, bbox_reg_weights=(10., 10., 5., 5.))
    with pytest.raises(ValueError, match="weights is 'nowhere'"):
        create('test_cotnet', weights='nowhere')
    with pytest.raises(WeightsError, match="No weights 'coco' for test_cotnet: there are some for cotnet101"):
        create('test_cotnet', weights='coco')


# Detectors


@pytest.mark.parametrize('name', [
    'fasterrcnn_cotnet_fpn', 'cascade_mask_rcnn_cotnet_fpn',
    *(pytest.param(name, marks=pytest.mark.slow) for name in ('cascade_rcnn_cotnet_fpn', 'maskrcnn_cotnet_fpn'))])
def test_trains_and_detects(name):
    torch.manual_seed(0)
    model = DETECTORS[name]('test_cotnet', **SMALL)
    assert isinstance(model, MaskRCNN if 'mask' in name else FasterRCNN)
    images, targets = images_and_targets()
    losses = model(images, targets)
    boxes = {f'loss_{what}_stage{i}' for what in ('classifier', 'box_reg') for i in range(3)} if (
        'cascade' in name) else {'loss_classifier', 'loss_box_reg'}
    assert losses.keys() == {'loss_objectness', 'loss_rpn_box_reg', *boxes, *(['loss_mask'] if 'mask' in name else [])}
    sum(losses.values()).backward()
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for key, parameter in model.named_parameters() if key in trained)
    assert not any(key.startswith(('backbone.body.conv1', 'backbone.body.layer1')) for key in trained)

    with torch.no_grad():
        found = model.eval()(images)
    for detections, image in zip(found, images):
        count = len(detections['boxes'])
        assert count > 0 and detections['labels'].shape == detections['scores'].shape == (count,)
        assert set(detections['labels'].tolist()) <= {1, 2}
        if 'mask' in name:
            assert detections['masks'].shape == (count, 1, *image.shape[1:])
    model.roi_heads.score_thresh = 1.0
    with torch.no_grad():
        empty = model(images)
    assert [len(detections['boxes']) for detections in empty] == [0, 0]


def test_targets_that_torchvision_refuses():
    model = detection.cascade_mask_rcnn_cotnet_fpn('test_cotnet', norm='batch', **SMALL)
    images, targets = images_and_targets()
    with pytest.raises(AssertionError, match='targets should not be none'):
        model(images)
    thin = [dict(targets[0], boxes=torch.tensor([[12., 10, 12, 40]])), targets[1]]
    with pytest.raises(AssertionError, match='positive height and width'):
        model(images, thin)
    without = [{key: value for key, value in target.items() if key != 'masks'} for target in targets]
    with pytest.raises(ValueError, match='masks key'):
        model(images, without)


def test_images_without_any_box_train():
    torch.manual_seed(0)
    model = detection.cascade_mask_rcnn_cotnet_fpn('test_cotnet', **SMALL)
    images, targets = images_and_targets()
    losses = model([images[1]] * 2, [targets[1]] * 2)
    assert losses['loss_mask'] == 0 and all(losses[f'loss_box_reg_stage{i}'] == 0 for i in range(3))
    sum(losses.values()).backward()
    norms = [module for module in model.roi_heads.mask_head.modules() if isinstance(module, SyncBatchNorm)]
    assert all(norm.running_var.isfinite().all() for norm in norms)


@pytest.mark.parametrize('norm', ['frozen', 'batch'])
def test_norms(norm):
    model = detection.fasterrcnn_cotnet_fpn('test_cotnet', norm=norm, **SMALL)
    norms = {type(module) for module in model.modules() if 'BatchNorm' in type(module).__name__}
    assert norms == ({FrozenBatchNorm2d} if norm == 'frozen' else {FrozenBatchNorm2d, nn.BatchNorm2d})
    assert (model.roi_heads.box_head[0][0].bias is None) == (norm == 'batch')
    if norm == 'frozen':  # a single image is enough
        images, targets = images_and_targets()
        assert all(loss.isfinite() for loss in model(images[:1], targets[:1]).values())


def test_boxes_are_in_full_precision_under_autocast():
    x = [torch.rand(1, 256, 2, 2)]
    with torch.autocast('cpu', torch.bfloat16):
        results = [*RPNHead(256, 3)(x), BoxPredictor(8, 3)(torch.rand(2, 8))]
    assert all(value.dtype == torch.float32 for values in results for value in values)
    assert BoxPredictor(8, 3).double()(torch.rand(2, 8, dtype=torch.float64))[1].dtype == torch.float64


@pytest.mark.slow
def test_scripts_as_torchvisions_do():
    model = detection.cascade_mask_rcnn_cotnet_fpn('test_cotnet', norm='batch', **SMALL).eval()
    with torch.no_grad():
        for stage in model.roi_heads.stages:  # scores far from each other
            stage.box_predictor.cls_score.weight.mul_(50)
            stage.box_predictor.bbox_pred.weight.mul_(100)
    images, _ = images_and_targets()
    with torch.no_grad():
        expected, (_, found) = model(images), torch.jit.script(model)(images)
    for one, other in zip(expected, found):
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(other[key], one[key], rtol=1e-4, atol=1e-3)


# Cascade


class Flat(nn.Module):
    """A box head that hands its features on."""

    def forward(self, x):
        return x.flatten(1)


def cascade(seed=0):
    """A cascade on regions of 2 x 2 bins and 3 channels, with predictors away from their initial values."""
    torch.manual_seed(seed)
    pool, stages = AlignedRoIAlign(2), []
    for iou, weight in zip((0.5, 0.6, 0.7), (10., 20., 30.)):
        predictor = BoxPredictor(12, 3, class_agnostic=True)
        nn.init.normal_(predictor.cls_score.weight, std=0.5)
        nn.init.normal_(predictor.bbox_pred.weight, std=0.5)
        stages.append(CascadeStage(
            pool, Flat(), predictor, iou, iou, 16, 0.5, (weight, weight, weight / 2, weight / 2), 0.1, 0.5, 10))
    return CascadeRoIHeads(stages)


def cascade_input():
    features = {
        str(i): torch.randn(1, 3, 64 // 2 ** i, 64 // 2 ** i, generator=torch.Generator().manual_seed(i))
        for i in range(4)}
    proposals = [torch.tensor([[20., 30, 90, 110], [10, 10, 60, 60], [130, 100, 250, 200], [30, 45, 110, 130]])]
    targets = [dict(boxes=torch.tensor([[22., 33, 95, 118], [90, 95, 240, 210]]), labels=torch.tensor([2, 1]))]
    return features, proposals, [(256, 256)], targets


def decode(offsets, boxes, weight):
    size = boxes[:, 2:] - boxes[:, :2]
    center = boxes[:, :2] + size / 2 + offsets[:, :2] / weight * size
    size = size * (offsets[:, 2:] / (weight / 2)).exp()
    return torch.cat([center - size / 2, center + size / 2], 1).clamp(0, 256)


def test_each_stage_detects_on_the_boxes_of_the_one_before():
    heads = cascade().eval()
    features, proposals, shapes, _ = cascade_input()
    boxes, scores = proposals[0], []
    for stage, weight in zip(heads.stages, (10., 20., 30.)):
        pooled = heads.box_roi_pool(features, [boxes], shapes).flatten(1)
        scores.append(stage.box_predictor.cls_score(pooled).softmax(1))
        boxes = decode(stage.box_predictor.bbox_pred(pooled), boxes, weight)
    mean = (scores[0] + scores[1] + scores[2]) / 3
    with torch.no_grad():
        found = heads(features, proposals, shapes)[0][0]
    assert len(found['boxes']) > 1
    for box, label, score in zip(found['boxes'], found['labels'], found['scores']):
        row = (boxes - box).abs().sum(1).argmin()
        torch.testing.assert_close(box, boxes[row], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(score, mean[row, label], rtol=1e-5, atol=1e-6)


def test_each_stage_trains_at_its_iou_and_gradients_are_scaled():
    heads = cascade()
    features, proposals, shapes, targets = cascade_input()
    features = {name: feature.requires_grad_() for name, feature in features.items()}
    _, losses = heads(features, proposals, shapes, targets)
    gt, labels = targets[0]['boxes'], targets[0]['labels']
    boxes, total = torch.cat([proposals[0], gt]), 0.
    positives = []
    for number, (stage, iou, weight) in enumerate(zip(heads.stages, (0.5, 0.6, 0.7), (10., 20., 30.))):
        overlaps, nearest = box_iou(gt, boxes).max(0)
        wanted = torch.where(overlaps >= iou, labels[nearest], 0)
        positives.append((wanted > 0).sum().item())
        pooled = heads.box_roi_pool(features, [boxes], shapes).flatten(1)
        logits, offsets = stage.box_predictor(pooled)
        encoded = stage.box_coder.encode_single(gt[nearest], boxes)
        classifier, box_reg = fastrcnn_loss(logits, offsets, [wanted], [encoded])
        torch.testing.assert_close(losses[f'loss_classifier_stage{number}'], classifier)
        torch.testing.assert_close(losses[f'loss_box_reg_stage{number}'], box_reg)
        total = total + classifier + box_reg
        boxes = decode(offsets[:, :4].detach(), boxes, weight)
    assert len(set(positives)) > 1  # the IoUs differ in what they take
    ours, whole = (torch.autograd.grad(loss, features['1'], retain_graph=True)[0] for loss in (
        sum(losses.values()), total))
    torch.testing.assert_close(ours, whole / 3)


def test_box_that_comes_out_empty_stays_in_training():
    stage = cascade().stages[0]
    offsets = torch.zeros(2, 12)
    offsets[0, [0, 4, 8]] = 1e4  # far to the right of the image
    before = [torch.tensor([[20., 30, 90, 110], [10, 10, 60, 60]])]
    assert torch.equal(stage.refine(offsets, before, [(256, 256)])[0], before[0])
    refined = stage.eval().refine(offsets, before, [(256, 256)])[0]
    assert refined[0, 0] == refined[0, 2] == 256 and torch.equal(refined[1], before[0][1])
