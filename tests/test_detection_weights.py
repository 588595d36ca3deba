"""Weights of whole detectors: from a folder and from the Hub, verified, fitting, or refused in words."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torchvision.ops import FrozenBatchNorm2d

from timm_cotnet.detection import cascade_rcnn_cotnet_fpn, fasterrcnn_cotnet_fpn, weights
from timm_cotnet.detection.cards import published_config
from timm_cotnet.detection.convert import check_detector
from timm_cotnet.detection.published import PUBLISHED_DETECTORS
from timm_cotnet.detection.state import save_detector
from timm_cotnet.pretrained import WeightsError
from timm_cotnet.published import PUBLISHED


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Weights and config of a detector with four classes."""
    folder = tmp_path_factory.mktemp('detector')
    torch.manual_seed(0)
    model = fasterrcnn_cotnet_fpn('test_cotnet', weights_backbone=None, num_classes=4, norm='batch')
    save_file(model.state_dict(), folder / 'model.safetensors')
    (folder / 'README.md').write_text('# A detector')
    (folder / 'config.json').write_text(json.dumps({
        'detector': 'fasterrcnn_cotnet_fpn', 'backbone': 'test_cotnet', 'num_classes': 4,
        'image_mean': [0.1, 0.2, 0.3], 'image_std': [0.4, 0.5, 0.6]}))
    return folder


def copy(folder: Path, to: Path, **changes) -> Path:
    to.mkdir()
    (to / 'model.safetensors').symlink_to(folder / 'model.safetensors')
    (to / 'config.json').write_text(json.dumps(json.loads((folder / 'config.json').read_text()) | changes))
    return to


def test_folder_gives_weights_and_pixel_statistics(folder):
    saved = load_file(folder / 'model.safetensors')
    model = fasterrcnn_cotnet_fpn('test_cotnet', weights=folder, num_classes=4)
    for key, value in model.state_dict().items():
        assert key.endswith('num_batches_tracked') or torch.equal(value, saved[key])
    assert (model.transform.image_mean, model.transform.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert not any(parameter.requires_grad for parameter in model.backbone.body.layer1.parameters())

    frozen = fasterrcnn_cotnet_fpn(
        'test_cotnet', weights=str(folder), num_classes=4, norm='frozen', image_mean=[0.] * 3)
    norms = {type(module) for module in frozen.modules() if 'BatchNorm' in type(module).__name__}
    assert norms == {FrozenBatchNorm2d} and frozen.transform.image_mean == [0.] * 3
    key = 'roi_heads.box_head.0.1.running_mean'
    assert torch.equal(frozen.state_dict()[key], saved[key])


def test_detector_made_with_frozen_norms_loads_again(tmp_path):
    """Its pyramid and heads have no norms, whatever norms are asked for."""
    made = fasterrcnn_cotnet_fpn('test_cotnet', weights_backbone=None, num_classes=4, norm='frozen')
    config = dict(detector='fasterrcnn_cotnet_fpn', backbone='test_cotnet', num_classes=4, image_mean=[0.1] * 3,
                  image_std=[0.2] * 3, made=dict(norm='frozen', model_kwargs={}))
    save_detector(tmp_path, made, config)
    expected = made.state_dict()
    assert 'roi_heads.box_head.0.0.bias' in expected and 'backbone.fpn.inner_blocks.0.0.bias' in expected
    for norm in ('frozen', 'batch', 'sync'):
        model = fasterrcnn_cotnet_fpn('test_cotnet', weights=tmp_path, num_classes=4, norm=norm)
        found = {key: value for key, value in model.state_dict().items() if not key.endswith('num_batches_tracked')}
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
        norms = {type(module) for module in model.modules() if 'BatchNorm' in type(module).__name__}
        assert (norms == {FrozenBatchNorm2d}) == (norm == 'frozen')
    assert check_detector(expected, config) == 'fasterrcnn_test_cotnet_fpn'


def test_other_number_of_classes_starts_predictors_at_random(folder):
    saved = load_file(folder / 'model.safetensors')
    model = fasterrcnn_cotnet_fpn('test_cotnet', weights=folder, num_classes=7)
    predictor = model.roi_heads.box_predictor
    assert predictor.cls_score.weight.shape == (7, 1024) and predictor.cls_score.weight.std() > 0
    assert torch.equal(model.roi_heads.box_head[5].weight, saved['roi_heads.box_head.5.weight'])


def test_what_does_not_fit_is_said(folder, tmp_path):
    def refusal(path, create=fasterrcnn_cotnet_fpn):
        with pytest.raises(WeightsError) as error:
            create('test_cotnet', weights=path, num_classes=4)
        return str(error.value)

    assert "fasterrcnn_cotnet_fpn('test_cotnet'), not of cascade_rcnn_cotnet_fpn" in refusal(
        folder, cascade_rcnn_cotnet_fpn)
    cascade = copy(folder, tmp_path / 'cascade', detector='cascade_rcnn_cotnet_fpn')
    assert 'tensors are missing (roi_heads.stages.0.box_head.0.0.weight' in refusal(cascade, cascade_rcnn_cotnet_fpn)
    assert 'no image_std' in refusal(_without(copy(folder, tmp_path / 'part'), 'image_std'))
    empty = tmp_path / 'empty'
    empty.mkdir()
    assert 'no config.json' in refusal(empty)
    shutil.copy(folder / 'config.json', empty)
    assert 'holds no model.safetensors' in refusal(empty)
    (empty / 'model.safetensors').write_bytes(b'\xff' * 100)
    assert 'not a readable safetensors file' in refusal(empty)


def _without(folder: Path, key: str) -> Path:
    config = json.loads((folder / 'config.json').read_text())
    del config[key]
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def test_coco_is_a_repository_of_the_hub(monkeypatch):
    asked = []

    def fetch(repo_id, filename, revision=None, cache_dir=None, sha256=None):
        asked.append((repo_id, filename, revision))
        raise RepositoryNotFoundError('404', response=type('Response', (), dict(
            headers={}, status_code=404, request=None))())

    monkeypatch.setattr(weights, 'fetch', fetch)
    with pytest.raises(WeightsError) as error:
        weights.find_weights('coco', 'maskrcnn_cotnet_fpn', 'cotnext50_2x48d')
    assert asked == [(f'{weights.HUB_NAMESPACE}/maskrcnn_cotnext50_2x48d_fpn.jd_coco', 'config.json', None)]
    for part in ('has not published them', 'timm_cotnet.detection.convert', 'drive.google.com', 'TIMM_COTNET_HUB'):
        assert part in str(error.value)
    with pytest.raises(WeightsError, match='there is no such repository'):
        weights.find_weights('hf-hub:me/mine@v2', 'maskrcnn_cotnet_fpn', 'cotnet50')
    assert asked[-1] == ('me/mine', 'config.json', 'v2')


@pytest.mark.slow
def test_published_weights_come_back_verified(folder, server, client):
    """A byte that changed on the way is noticed, and the file fetched once more."""
    from hub_client import digest_of
    from hub_server import TOKEN, flip

    weights_file = folder / 'model.safetensors'
    publish = 'from timm_cotnet.publish import publish\nresult = publish(folder, "me", token=token).repo_id'
    repo_id = client.run(publish, folder=str(folder), token=TOKEN)
    assert repo_id == 'me/fasterrcnn_test_cotnet_fpn'
    server.fault('GET', f'{repo_id}/resolve/.*/model.safetensors', 1, body=flip)
    code = '''
import hashlib
from timm_cotnet.detection import fasterrcnn_cotnet_fpn
model = fasterrcnn_cotnet_fpn(
    'test_cotnet', weights=f'hf-hub:{repo_id}', num_classes=4, norm='batch', trainable_backbone_layers=5)
digest = hashlib.sha256()
for name, value in sorted(model.state_dict().items()):
    digest.update(name.encode() + value.numpy().tobytes())
result = digest.hexdigest()
'''
    assert client.run(code, repo_id=repo_id) == digest_of(load_file(weights_file))


def test_published_detectors_are_those_of_the_backbones_table():
    assert len(PUBLISHED_DETECTORS) == 24
    mask = PUBLISHED_DETECTORS['cascade_mask_rcnn_se_cotnetd_101_fpn.jd_coco']
    assert (mask.box_ap, mask.mask_ap) == (49.24, 42.38) == PUBLISHED['se_cotnetd_101.jd_in1k'].coco.cascade_mask_rcnn
    boxes = PUBLISHED_DETECTORS['fasterrcnn_cotnet50_fpn.jd_coco']
    assert (boxes.box_ap, boxes.mask_ap) == (43.50, None)
    assert set(weights.CONFIG_KEYS) < set(published_config('fasterrcnn_cotnet50_fpn.jd_coco'))
