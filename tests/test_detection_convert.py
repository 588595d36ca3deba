"""Official detectors: every layout and configuration is read, and gives the numbers of detectron2's conventions."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2_conventions import Detectron2
from official_checkpoints import save
from official_detectors import CLASSES, KINDS, detectron2_extras, detector_state_dict, saved
from PIL import Image
from safetensors.torch import load_file
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from timm_cotnet import detection
from timm_cotnet.checkpoint import CheckpointError, find_state_dict, read_checkpoint
from timm_cotnet.detection.convert import COCO_IDS, DIFFERENCES, check_detector, convert_detector, main, rename_detector
from timm_cotnet.detection.published import COCO_CATEGORIES, PUBLISHED_DETECTORS
from timm_cotnet.publish import PublishError, publish

HUB_CARDS = Path(__file__).parent.parent / 'hub_cards'


def slow_unless(names, fast):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize('name', slow_unless(PUBLISHED_DETECTORS, ['cascade_mask_rcnn_cotnext50_2x48d_fpn.jd_coco']))
def test_every_configuration_is_found_by_its_keys_and_shapes(name):
    facts = PUBLISHED_DETECTORS[name]
    kind = facts.kind.removesuffix('_cotnet_fpn')
    weights, config, _ = rename_detector(detector_state_dict(kind, facts.backbone, expand=True))
    assert (config['detector'], config['backbone'], config['num_classes']) == (facts.kind, facts.backbone, 91)
    assert check_detector(weights, config) == name
    assert json.loads((HUB_CARDS / name / 'config.json').read_text()) == config


def test_classes_get_the_numbers_of_coco():
    assert len(COCO_IDS) == CLASSES and COCO_IDS[0] == 1 and COCO_IDS[-1] == 90
    assert [COCO_CATEGORIES[COCO_IDS[i]] for i in (0, 11, 79)] == ['person', 'stop sign', 'toothbrush']
    state_dict = detector_state_dict('maskrcnn', 'test_cotnet', expand=True)
    for name in ('box_predictor.cls_score.bias', 'box_predictor.bbox_pred.weight', 'mask_head.predictor.weight'):
        state_dict[f'roi_heads.{name}'] = torch.randn(state_dict[f'roi_heads.{name}'].shape)
    weights, _, _ = rename_detector(state_dict)
    scores, official = weights['roi_heads.box_predictor.cls_score.bias'], (
        state_dict['roi_heads.box_predictor.cls_score.bias'])
    assert scores[0] == official[80] and torch.equal(scores[COCO_IDS], official[:80])
    unused = sorted(set(range(1, 91)) - set(COCO_IDS))
    assert len(unused) == 10 and (scores.softmax(0)[unused] == 0).all()
    assert (scores.half().softmax(0)[unused] == 0).all()
    boxes = weights['roi_heads.box_predictor.bbox_pred.weight'].view(91, 4, 1024)
    assert torch.equal(boxes[COCO_IDS].flatten(0, 1), state_dict['roi_heads.box_predictor.bbox_pred.weight'])
    masks = weights['roi_heads.mask_predictor.mask_fcn_logits.weight']
    assert torch.equal(masks[90], state_dict['roi_heads.mask_head.predictor.weight'][79])


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
    """Folder of a converted detector with three classes, by kind, and its official weights."""
    made = {}

    def make(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            state_dict = detector_state_dict(kind, 'test_cotnet', classes=3, seed=KINDS.index(kind))
            for key, value in state_dict.items():
                # boxes of many sizes, no score near 0 or 1
                for name, factor in (
                        ('bbox_pred', 0.1), ('anchor_deltas', 0.3), ('cls_score', 0.05), ('objectness_logits', 0.05)):
                    if name in key:
                        value.mul_(factor)
            convert_detector(save(saved(state_dict), folder / 'model_final.pth'), folder / 'out')
            made[kind] = folder, state_dict
        return made[kind]
    return make


@pytest.mark.parametrize('kind', slow_unless(KINDS, ['cascade_mask_rcnn']))
def test_detections_are_those_of_detectron2s_conventions(converted, kind):
    """On an image whose sides are no multiples of 32, so that padding, the last level's stride and clipping count."""
    folder, state_dict = converted(kind)
    create = getattr(detection, f'{kind}_cotnet_fpn')
    model = create(
        'test_cotnet', weights=folder / 'out', num_classes=4, min_size=90, max_size=200, box_score_thresh=0.1,
        rpn_post_nms_top_n_test=40).eval()
    masks = []
    if 'mask' in kind:
        model.roi_heads.mask_predictor.register_forward_hook(lambda module, args, out: masks.append(out))
    image = torch.rand(3, 90, 150, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        padded = model.transform([image])[0].tensors
        assert padded.shape == (1, 3, 96, 160)
        features = model.backbone.body(padded)
        boxes, scores, labels, expected_masks = Detectron2(state_dict, (90, 150), 0.1, 40).detect(features)
        found = model([image])[0]
    assert len(boxes) > 10 and len(set(labels.tolist())) > 1
    assert torch.equal(found['labels'], labels + 1)
    torch.testing.assert_close(found['boxes'], boxes, rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(found['scores'], scores, rtol=1e-4, atol=1e-5)
    if 'mask' in kind:
        logits = masks[0][torch.arange(len(labels)), labels + 1]
        torch.testing.assert_close(logits.sigmoid(), expected_masks, rtol=1e-3, atol=1e-4)
        assert found['masks'].shape == (len(boxes), 1, 90, 150)


@pytest.mark.slow
def test_every_layout_gives_the_same_weights(tmp_path):
    state_dict = detector_state_dict('fasterrcnn', 'test_cotnet', classes=3)
    expected, config, _ = rename_detector(state_dict)
    extras = detectron2_extras()
    layouts = {
        'bare': state_dict,
        'trained': saved(state_dict | extras),
        'parallel': {'model': {f'module.{key}': value for key, value in state_dict.items()}},
        'counted': {'model': state_dict | {
            key.replace('running_var', 'num_batches_tracked'): torch.tensor(3)
            for key in state_dict if key.endswith('running_var')}},
    }
    for name, checkpoint in layouts.items():
        path = save(checkpoint, tmp_path / f'{name}.pth', legacy=name == 'parallel')
        found, found_config, _ = rename_detector(find_state_dict(read_checkpoint(path))[0])
        assert found_config == config
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_bgr_is_turned_into_rgb():
    state_dict = detector_state_dict('fasterrcnn', 'test_cotnet', classes=3)
    rgb, config, _ = rename_detector(state_dict | detectron2_extras())
    bgr, bgr_config, notes = rename_detector(state_dict | detectron2_extras(bgr=True))
    assert bgr_config == config and config['image_mean'] == [0.485, 0.456, 0.406] and 'BGR to RGB' in notes[1]
    first = 'backbone.body.conv1.0.weight'
    assert torch.equal(bgr[first], rgb[first].flip(1)) and not torch.equal(bgr[first], rgb[first])
    assert [key for key in rgb if not torch.equal(rgb[key], bgr[key])] == [first]
    caffe = state_dict | {'pixel_mean': torch.tensor([103.53, 116.28, 123.675]), 'pixel_std': torch.ones(3)}
    assert rename_detector(caffe)[1]['image_std'] == [round(1 / 255, 6)] * 3


def test_resized_images_differ_by_less_than_a_gray_level():
    """What `DIFFERENCES` says of images that are enlarged: on noise, of a size that needs no rounding."""
    pixels = np.random.default_rng(0).integers(0, 256, (120, 150, 3), dtype=np.uint8)
    resize = GeneralizedRCNNTransform(200, 400, [0.] * 3, [1.] * 3).eval()
    ours = resize([torch.from_numpy(pixels).permute(2, 0, 1) / 255])[0].tensors[0, :, :200, :250]
    theirs = np.asarray(Image.fromarray(pixels).resize((250, 200), Image.Resampling.BILINEAR))
    difference = np.abs(ours.permute(1, 2, 0).numpy() * 255 - theirs)
    assert 0.5 < difference.max() < 1


def test_what_does_not_fit_is_refused():
    state_dict = detector_state_dict('fasterrcnn', 'test_cotnet', classes=3, expand=True)

    def refusal(changed):
        with pytest.raises(CheckpointError) as error:
            check_detector(*rename_detector(changed)[:2])
        return str(error.value)

    assert 'no roi_heads' in refusal({key: value for key, value in state_dict.items() if 'roi_heads' not in key})
    assert 'proposal_generator.other' in refusal(state_dict | {'proposal_generator.other': torch.ones(1)})
    missing = {key: value for key, value in state_dict.items() if 'box_head.fc1.weight' not in key}
    assert 'missing: roi_heads.box_head.5.weight' in refusal(missing)
    fc1 = 'roi_heads.box_head.fc1.weight'
    assert '1024x7 instead of 1024x12544' in refusal(state_dict | {fc1: torch.ones(1024, 7)})
    assert 'finite' in refusal(state_dict | {fc1: torch.full((1024, 12544), float('nan'))})
    anchors = 'proposal_generator.anchor_generator.cell_anchors.0'
    assert anchors in refusal(state_dict | {anchors: detectron2_extras()[anchors].round()})
    body = {key: value for key, value in state_dict.items() if 'res4.0.conv3.weight' not in key}
    assert 'nearest is test_cotnet' in refusal(body)


def test_command(tmp_path, capsys, converted):
    folder, _ = converted('cascade_mask_rcnn')
    (tmp_path / 'no.pth').write_text('<html>')
    assert main([str(folder / 'model_final.pth'), str(tmp_path / 'no.pth'), '--output', str(tmp_path / 'out')]) == 1
    captured = capsys.readouterr()
    made = tmp_path / 'out' / 'cascade_mask_rcnn_test_cotnet_fpn'
    use = f"timm_cotnet.detection.cascade_mask_rcnn_cotnet_fpn('test_cotnet', weights={str(made)!r}, num_classes=4)"
    assert f'use     {use}' in captured.out
    assert 'web page' in captured.err
    assert all(what in captured.out and how_much in captured.out for what, how_much in DIFFERENCES)
    assert sorted(path.name for path in made.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert (made / 'model.safetensors').read_bytes() == (folder / 'out' / 'model.safetensors').read_bytes()
    written = load_file(made / 'model.safetensors')
    assert written['roi_heads.stages.2.box_predictor.bbox_pred.weight'].shape == (4, 1024)


def test_second_detector_of_a_name_is_refused(tmp_path, capsys, converted):
    folder, state_dict = converted('cascade_mask_rcnn')
    first, second = folder / 'model_final.pth', tmp_path / 'second.pth'
    second.symlink_to(first)
    assert main([str(first), str(second), '--output', str(tmp_path / 'out')]) == 1
    made = tmp_path / 'out' / 'cascade_mask_rcnn_test_cotnet_fpn'
    captured = capsys.readouterr()
    assert f'{second}: it is {made.name} like {first}, which {made} holds now' in captured.err
    assert captured.out.count('model   ') == 1


def test_publish_takes_whole_detectors_only(converted, tmp_path):
    folder, _ = converted('cascade_mask_rcnn')
    config = json.loads((folder / 'out' / 'config.json').read_text())
    broken = tmp_path / 'broken'
    broken.mkdir()
    for name in ('README.md', 'model.safetensors'):
        (broken / name).symlink_to(folder / 'out' / name)
    (broken / 'config.json').write_text(json.dumps(config | {'detector': 'maskrcnn_cotnet_fpn'}))
    with pytest.raises(PublishError, match='do not fit maskrcnn_cotnet_fpn'):
        publish(broken, 'me', dry_run=True)
