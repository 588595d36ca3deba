"""Frameworks that take timm models by name, each with the real library; the extra "frameworks" has them all."""
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

import timm_cotnet  # noqa: F401
from timm_cotnet.convert import convert
from timm_cotnet.demo import save_folder
from timm_cotnet.published import PUBLISHED

pytestmark = pytest.mark.slow
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def needed(name):
    return pytest.importorskip(name, reason=f'{name} is of the extra "frameworks"')


@pytest.mark.parametrize('decoder', ['Unet', 'FPN', 'DeepLabV3Plus'])
def test_segmentation_models_pytorch(decoder):
    smp = needed('segmentation_models_pytorch')
    model = getattr(smp, decoder)('tu-test_cotnet', encoder_weights='imagenet', classes=2)
    pretrained = timm.create_model('test_cotnet', pretrained=True)
    assert torch.equal(model.encoder.model.layer2[0].conv1.weight, pretrained.layer2[0].conv1.weight)
    truth = torch.zeros(2, 64, 64, dtype=torch.long)
    truth[:, :, 32:] = 1
    images = IMAGES + truth[:, None]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(model(images), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in model.encoder.model.parameters())
    with torch.inference_mode():
        assert getattr(smp, decoder)('tu-cotnet50', encoder_weights=None).eval()(IMAGES[:1]).shape == (1, 1, 64, 64)


def wrapped(folder):
    """What transformers makes of a folder: a classifier and a model for features."""
    transformers = needed('transformers')
    return [getattr(transformers, name).from_pretrained(folder).eval()
            for name in ('AutoModelForImageClassification', 'AutoModel')]


@torch.inference_mode()
def test_transformers_reads_converted_weights(tmp_path):
    model = timm.create_model('cotnet50').eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'cotnet50.pth.tar')
    convert(tmp_path / 'cotnet50.pth.tar', tmp_path / 'converted', model='cotnet50')
    classifier, features = wrapped(tmp_path / 'converted')
    torch.testing.assert_close(classifier(pixel_values=IMAGES).logits, model(IMAGES))
    torch.testing.assert_close(features(pixel_values=IMAGES).last_hidden_state, model.forward_features(IMAGES))
    assert classifier.config.id2label[0].startswith('tench')


@torch.inference_mode()
def test_transformers_reads_what_the_demonstration_wrote(tmp_path):
    transformers = needed('transformers')
    model = timm.create_model('test_cotnet', pretrained=True).eval()
    save_folder(model, tmp_path, [str(digit) for digit in range(10)])
    classifier, features = wrapped(tmp_path)
    torch.testing.assert_close(classifier(pixel_values=IMAGES).logits, model(IMAGES))
    torch.testing.assert_close(features(pixel_values=IMAGES).last_hidden_state, model.forward_features(IMAGES))
    assert classifier.config.id2label == {i: str(i) for i in range(10)}
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert list(processor.data_config['input_size']) == [3, 64, 64]
    classifier.save_pretrained(tmp_path / 'again')
    again, _ = wrapped(tmp_path / 'again')
    assert torch.equal(again(pixel_values=IMAGES).logits, classifier(pixel_values=IMAGES).logits)


@pytest.mark.parametrize('name', PUBLISHED)
def test_transformers_reads_published_configurations(name):
    transformers = needed('transformers')
    config = transformers.AutoConfig.from_pretrained(ROOT / 'hub_cards' / name)
    assert config.model_type == 'timm_wrapper' and config.num_labels == 1000
    assert config.architecture == json.loads((ROOT / 'hub_cards' / name / 'config.json').read_text())['architecture']


def test_transformers_backbone():
    transformers = needed('transformers')
    config = transformers.TimmBackboneConfig(backbone='test_cotnet', out_indices=[1, 2, 3, 4])
    backbone = transformers.TimmBackbone(config).eval()
    expected = timm.create_model('test_cotnet', features_only=True, out_indices=(1, 2, 3, 4)).eval()
    expected.load_state_dict(backbone._backbone.state_dict())
    for found, feature in zip(backbone(IMAGES).feature_maps, expected(IMAGES)):
        torch.testing.assert_close(found, feature)
    assert backbone.channels == expected.feature_info.channels()


def test_detr():
    transformers = needed('transformers')
    needed('scipy')
    config = transformers.DetrConfig(
        backbone='test_cotnet', use_timm_backbone=True, use_pretrained_backbone=False, num_labels=3, d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5)
    model = transformers.DetrForObjectDetection(config)
    labels = [dict(class_labels=torch.tensor([i]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.3]])) for i in range(2)]
    output = model(pixel_values=IMAGES, labels=labels)
    assert output.logits.shape == (2, 5, 4) and output.pred_boxes.shape == (2, 5, 4)
    output.loss.backward()
    grads = [parameter.grad for name, parameter in model.named_parameters() if 'layer4.0.conv2' in name]
    assert grads and all(grad is not None and grad.isfinite().all() for grad in grads)


def test_lightning(tmp_path):
    lightning = needed('lightning')

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model('test_cotnet', num_classes=2)
            self.losses = []

        def training_step(self, batch, batch_idx):
            images, labels = batch
            loss = F.cross_entropy(self.model(images), labels)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    data = [(image, label) for label, image in enumerate(IMAGES)]
    trainer = lightning.Trainer(
        max_epochs=8, accelerator='cpu', devices=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    module = Classifier()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    assert len(module.losses) == 8 and module.losses[-1] < module.losses[0] / 2
    path, = tmp_path.rglob('*.ckpt')
    state = torch.load(path, weights_only=True)['state_dict']
    assert torch.equal(state['model.fc.weight'], module.model.fc.weight.detach())


def test_fastai(tmp_path):
    vision = needed('fastai.vision.all')
    needed('sklearn')
    from timm_cotnet.digits import write_digits

    data = vision.ImageDataLoaders.from_folder(
        write_digits(tmp_path), train='train', valid='val', item_tfms=vision.Resize(64), bs=64, num_workers=0,
        device='cpu')
    learner = vision.vision_learner(data, 'test_cotnet', metrics=vision.accuracy, path=tmp_path)
    cot = timm.create_model('test_cotnet', pretrained=True).layer2[0].conv2.key_embed[0].weight
    assert any(parameter.shape == cot.shape and torch.equal(parameter, cot) for parameter in learner.model.parameters())
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(1, 1e-2)
    assert float(learner.validate()[1]) > 0.8


def test_grad_cam():
    cam = needed('pytorch_grad_cam')
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = timm.create_model('test_cotnet', pretrained=True).eval()
    classes = model(IMAGES).argmax(1).tolist()
    targets = [ClassifierOutputTarget(label) for label in classes]
    with cam.GradCAM(model, [model.layer4[-1]]) as explain:
        found = explain(IMAGES, targets)
    assert found.shape == (2, 64, 64)

    features = model.forward_features(IMAGES)
    gradients, = torch.autograd.grad(model.forward_head(features)[[0, 1], classes].sum(), features)
    expected = (gradients.mean((2, 3), keepdim=True) * features).sum(1).relu().detach()
    expected = expected - expected.amin((1, 2), keepdim=True)
    expected = nn.functional.interpolate(
        (expected / (1e-7 + expected.amax((1, 2), keepdim=True)))[None], (64, 64), mode='bilinear')[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=0.02, rtol=0)
    assert expected.amax() > 0.5
