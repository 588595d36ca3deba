"""What is taken from CoT layers and drawn: numbers, files, and the page in a real browser."""
import json
import os
import re
import select
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
import timm
import torch
from helpers import shaken
from PIL import Image
from timm.utils import reparameterize_model
from torch import nn

from timm_cotnet import CotLayer, CoxtLayer, local_conv
from timm_cotnet.ops import grouped_local_conv
from timm_cotnet.visualize import LayerMaps, cot_layers, grad_cam, layer_maps, load_model, main, visualize

KINDS = ['filters', 'contexts', 'mixing', 'grad-cam']
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.fixture(scope='module')
def model():
    return timm.create_model('test_cotnet', pretrained=True).eval()


def photo(path, size=(70, 50)):
    """An image with a bright disk on a slope."""
    y, x = torch.meshgrid(torch.arange(size[1]), torch.arange(size[0]), indexing='ij')
    pixels = torch.stack([x * 2, y * 2, 255 * ((x - 30) ** 2 + (y - 20) ** 2 < 150)], 2).clamp(0, 255)
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return path


def assert_nothing_is_cut_off(path):
    with Image.open(path) as picture:
        width, height = picture.size
        for box in ((0, 0, width, 2), (0, height - 2, width, height), (0, 0, 2, height), (width - 2, 0, width, height)):
            assert picture.convert('L').crop(box).getextrema() == (255, 255), (path, box)


class Sandwich(nn.Module):
    """A network of no one's registry, with one layer, and one class score more than CoT layers."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.dim, 3)

    def forward(self, x):
        return self.head(self.layer(x.repeat(1, self.layer.dim // x.shape[1], 1, 1)).mean((2, 3)))


@pytest.mark.parametrize('cls', [CotLayer, CoxtLayer])
def test_maps_make_the_output_of_the_layer(cls):
    network = shaken(Sandwich(cls(32))).eval()
    x = torch.randn(1, 4, 5, 6)
    inputs = x.repeat(1, 8, 1, 1)
    maps, = layer_maps(network, x)
    assert maps.name == 'layer' and maps.filters.shape == (4, 9, 5, 6)
    static, dynamic = network.layer.contexts(inputs)
    torch.testing.assert_close(maps.static, static[0])
    torch.testing.assert_close(maps.dynamic, dynamic[0])
    weight_dynamic, weight_static = maps.mixing[..., None, None]
    torch.testing.assert_close(weight_dynamic * dynamic[0] + weight_static * static[0], network.layer(inputs)[0])
    gathered = grouped_local_conv(
        network.layer.conv1x1(inputs), maps.filters.flatten(0, 1)[None], 3, 1, network.layer.groups)
    torch.testing.assert_close(network.layer.act(network.layer.bn(gathered))[0], maps.dynamic)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize('taps, degrees', [((3, 5), 0), ((2, 6), 45), ((1, 7), 90), ((0, 8), 135)])
def test_direction_is_the_line_on_which_the_energy_lies(taps, degrees):
    """Taps of a 3x3 filter row by row: 3 and 5 lie beside the centre, 2 and 6 on the line to the upper right."""
    filters = torch.zeros(2, 9, 1, 1)
    filters[0, taps[0]], filters[1, taps[1]] = 2., -1.
    filters[:, 4] = 7.  # the centre has no direction
    maps = LayerMaps('', filters, *[torch.ones(1, 1, 1)] * 2, torch.tensor([[0.25], [0.75]]))
    angle, coherence = maps.direction()
    assert min(abs(angle.rad2deg().item() - degrees), abs(angle.rad2deg().item() - 180 - degrees)) < 1e-3
    assert coherence.item() == pytest.approx(1)
    assert maps.energy().item() == pytest.approx(((4 + 49 + 1 + 49) / 2) ** 0.5)
    assert maps.dynamic_share().item() == pytest.approx(0.25)


def test_direction_along_stripes_of_a_gathered_image():
    """What gathers along columns leaves an image of columns as it is; the direction says so."""
    filters = torch.zeros(1, 1, 9, 4, 4)
    filters[:, :, (1, 4, 7)] = 1 / 3
    columns = torch.arange(4.).expand(1, 1, 4, 4)
    torch.testing.assert_close(local_conv(columns, filters)[..., 1:3, :], columns[..., 1:3, :])
    angle, coherence = LayerMaps('', filters[0], None, None, None).direction()
    torch.testing.assert_close(angle, torch.full((4, 4), torch.pi / 2))
    assert coherence.min() == pytest.approx(1)


def test_no_direction_is_none():
    for filters in (torch.ones(1, 9, 2, 2), torch.zeros(1, 9, 2, 2), torch.ones(1, 1, 2, 2)):
        assert LayerMaps('', filters, None, None, None).direction()[1].max() < 1e-6


def test_grad_cam_agrees_with_its_formula(model):
    """Where the last stage is only averaged before the classifier, gradients are the classifier's weights."""
    x = torch.rand(1, 3, 64, 96)
    cam = grad_cam(model, x, top=2)
    features = model.forward_features(x)[0].detach()
    probabilities = model(x)[0].softmax(0)
    assert cam.classes == probabilities.topk(2).indices.tolist()
    assert cam.probabilities == pytest.approx(probabilities.topk(2).values.tolist(), rel=1e-4)
    expected = torch.einsum('kc,chw->khw', model.fc.weight[cam.classes], features).relu() / features[0].numel()
    torch.testing.assert_close(cam.maps, expected.detach(), rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(grad_cam(model, x, top=2).maps, cam.maps)


def test_layers_are_the_last_of_each_width():
    with torch.device('meta'):
        hybrid, wide = timm.create_model('se_cotnetd_50'), timm.create_model('cotnext50_2x48d')
    assert list(cot_layers(hybrid)) == ['layer3.4.conv2', 'layer4.2.conv2']
    assert list(cot_layers(wide)) == ['layer1.2.conv2', 'layer2.3.conv2', 'layer3.5.conv2', 'layer4.2.conv2']
    assert list(cot_layers(hybrid, ['layer3.0.conv2'])) == ['layer3.0.conv2']
    with pytest.raises(ValueError, match="'layer1.0.conv2' is no CoT layer of the model; it has layer3.0.conv2, "):
        cot_layers(hybrid, ['layer1.0.conv2'])


def test_model_stays_as_it_is(model):
    changed = timm.create_model('test_cotnet').train()
    changed.layer1.eval()
    modes = [module.training for module in changed.modules()]
    before = {key: value.clone() for key, value in changed.state_dict().items()}
    layer_maps(changed, torch.rand(1, 3, 64, 64))
    grad_cam(changed, torch.rand(1, 3, 64, 64))
    assert [module.training for module in changed.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in changed.state_dict().items())


def test_refusals(model, tmp_path):
    with pytest.raises(ValueError, match='test_resnet has no CoT layer'):
        layer_maps(timm.create_model('test_resnet'), torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match='has folded CoT layers, .* before reparameterize_model'):
        layer_maps(reparameterize_model(model), torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r'x has shape \(2, 3, 32, 32\), expected \(1, C, H, W\)'):
        layer_maps(model, torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match='missing.png cannot be read as an image'):
        visualize(model, [tmp_path / 'missing.png'], tmp_path)
    with pytest.raises(ValueError, match='gives no class scores'):
        grad_cam(timm.create_model('test_cotnet', num_classes=0), torch.rand(1, 3, 32, 32))


class Page(HTMLParser):
    """Images and links of a page."""

    def __init__(self, path):
        super().__init__()
        self.images, self.links = [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        if tag == 'img':
            self.images.append(dict(attrs))
        elif tag in ('a', 'link', 'script'):
            self.links.append(dict(attrs).get('href', ''))


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """Page and output of the command, for an image with an awkward name and another of its name in another folder."""
    folder = tmp_path_factory.mktemp('views')
    (folder / 'b').mkdir()
    images = [photo(folder / 'a "b" & c#1.png'), photo(folder / 'b' / 'a "b" & c#1.png', (40, 90))]
    options = ['--model', 'test_cotnet', '--layers', 'layer1.0.conv2', '--output', str(folder / 'out')]
    assert main([*map(str, images), *options]) == 0
    return folder / 'out' / 'index.html'


def test_page_has_all_pictures_and_says_what_they_show(written):
    page = Page(written)
    assert len(page.images) == 2 * len(KINDS)
    files = {path.name for path in written.parent.glob('*.png')}
    assert {unquote(image['src']) for image in page.images} == files  # beside the page: no folder, no network
    assert all(len(image['alt']) > 20 and 'a "b" & c#1.png' in image['alt'] for image in page.images)
    assert all(re.fullmatch(r'#image-\d', link) or unquote(link) in files for link in page.links)
    assert not re.search('https?:', written.read_text())
    assert 'RANDOM' not in written.read_text()
    for path in written.parent.glob('*.png'):
        with Image.open(path) as picture:
            assert 600 <= picture.width <= 2000 and 300 <= picture.height <= 1500 and path.stat().st_size < 2 ** 20
            assert len(picture.convert('RGB').getcolors(2 ** 24)) > 500
        assert_nothing_is_cut_off(path)


def test_command_says_that_weights_are_random(tmp_path, capsys):
    image = photo(tmp_path / 'photo.png')
    options = ['--model', 'test_cotnet', '--no-pretrained', '--num-classes', '2', '--img-size', '32', '64']
    output = tmp_path / 'out'
    assert main([str(image), *options, '--layers', 'layer2.0.conv2', '--output', str(output)]) == 0
    assert 'RANDOM WEIGHTS' in capsys.readouterr().err
    text = (output / 'index.html').read_text()
    assert '<p class="note">RANDOM WEIGHTS' in text and 'layer2.0.conv2' in text and 'layer1' not in text
    assert re.search('class [01], [0-9.]+%; class [01], ', text)
    assert sorted(path.name for path in output.iterdir()) == sorted(
        ['index.html', *(f'photo-{kind}.png' for kind in KINDS)])
    for path in output.glob('*.png'):
        assert_nothing_is_cut_off(path)


def test_command_refuses(tmp_path, capsys):
    image = str(photo(tmp_path / 'photo.png'))
    for options, message in (
            (['--model', 'resnet18'], 'resnet18 has no CoT layer'),
            (['--model', 'no_such_cotnet'], 'no_such_cotnet'),
            (['--model', 'cotnet50', '--checkpoint', 'missing.pth'], 'missing.pth'),
            (['--model', str(tmp_path)], 'is a folder without config.json'),
            ([__file__, '--model', 'test_cotnet'], 'test_visualize.py cannot be read as an image'),
            (['--model', 'test_cotnet', '--output', image], 'photo.png, where nothing can be written')):
        assert main(['--output', str(tmp_path / 'out'), image, *options]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / 'out').exists()
    for options, message in (
            (['--img-size', '4'], '--img-size is 4, expected one or two numbers from 32 on'),
            (['--model', 'test_cotnet', '--device', 'cuda:99'], '--device is cuda:99, which cannot be used: ')):
        with pytest.raises(SystemExit):
            main([image, *options])
        assert message in capsys.readouterr().err


def test_classes_that_were_not_learned_are_said_to_be_random(tmp_path, capsys):
    image, output = str(photo(tmp_path / 'photo.png')), tmp_path / 'out'
    options = ['--model', 'test_cotnet', '--layers', 'layer4.0.conv2', '--output', str(output)]
    assert main([image, *options, '--num-classes', '10']) == 0
    assert 'RANDOM' not in capsys.readouterr().err and 'RANDOM' not in (output / 'index.html').read_text()
    assert main([image, *options, '--num-classes', '12']) == 0
    assert 'RANDOM CLASSIFIER' in capsys.readouterr().err
    assert '<p class="note">RANDOM CLASSIFIER' in (output / 'index.html').read_text()


def test_interrupted_command_says_so(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr('timm_cotnet.visualize.grad_cam', interrupt)
    image = str(photo(tmp_path / 'photo.png'))
    assert main([image, '--model', 'test_cotnet', '--output', str(tmp_path / 'out')]) == 130
    assert 'Stopped. Pictures that were drawn before are in' in capsys.readouterr().err


def test_networks_without_classes_and_with_one_channel(tmp_path):
    network = timm.create_model('test_cotnet', num_classes=0, in_chans=1)
    page = visualize(network, [photo(tmp_path / 'photo.png')], tmp_path / 'out', (64, 64), ['layer4.0.conv2'])
    assert 'No Grad-CAM: the model gives no class scores.' in page.read_text()
    assert len(Page(page).images) == len(KINDS) - 1
    with pytest.raises(ValueError, match='test_cotnet takes 4 channels; images have 1 or 3'):
        visualize(timm.create_model('test_cotnet', in_chans=4), [tmp_path / 'photo.png'], tmp_path)


def test_folder_of_a_model_is_loaded_with_its_classes(tmp_path):
    from timm_cotnet.demo import save_folder

    saved = shaken(timm.create_model('test_cotnet', num_classes=2)).eval()
    save_folder(saved, tmp_path / 'model', ['cat', 'dog'])
    for name in (str(tmp_path / 'model'), f'local-dir:{tmp_path / "model"}'):
        loaded, why_random = load_model(name)
        assert why_random == '' and loaded.pretrained_cfg['label_names'] == ['cat', 'dog']
        assert all(torch.equal(value, saved.state_dict()[key]) for key, value in loaded.state_dict().items())
    page = visualize(loaded, [photo(tmp_path / 'photo.png')], tmp_path / 'out', layers=['layer2.0.conv2'])
    assert re.search('(cat|dog), [0-9.]+%; (cat|dog), ', page.read_text())
    checkpointed, why_random = load_model('test_cotnet', tmp_path / 'model' / 'model.safetensors', 2)
    assert why_random == '' and torch.equal(checkpointed.fc.weight, saved.fc.weight)


def test_folder_of_a_model_with_arguments(tmp_path):
    from timm_cotnet.demo import save_folder

    saved = shaken(timm.create_model('test_cotnet', output_stride=8)).eval()
    save_folder(saved, tmp_path, [str(i) for i in range(10)])
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, 'model_args': {'output_stride': 8}}))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path))[0](x), saved(x))


@pytest.mark.parametrize('config, message', [
    ('{', 'config.json is damaged'), ('[]', 'names no architecture'),
    ('{"architecture": "test_cotnet"}', 'names no architecture'),
    ('{"architecture": "test_cotnet", "pretrained_cfg": null}', 'names no architecture'),
    ('{"architecture": "test_cotnet", "pretrained_cfg": {}}', 'has no model.safetensors; give weights')])
def test_folders_that_hold_no_model(config, message, tmp_path, capsys):
    (tmp_path / 'config.json').write_text(config)
    assert main([str(photo(tmp_path / 'photo.png')), '--model', str(tmp_path), '--output', str(tmp_path / 'out')]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('name', ['weights.safetensors', 'weights.pth', 'empty.pth'])
def test_damaged_weights(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(b'' if 'empty' in name else b'no weights')
    options = ['--checkpoint', str(tmp_path / name), '--output', str(tmp_path / 'out')]
    assert main([str(photo(tmp_path / 'photo.png')), '--model', 'test_cotnet', *options]) == 1
    assert len(capsys.readouterr().err) > len('error: \n') + 3


def test_what_would_be_drawn_of_nothing(model, tmp_path):
    image = photo(tmp_path / 'photo.png')
    broken = timm.create_model('test_cotnet')
    broken.layer1[0].bn1.running_mean[0] = float('nan')
    with pytest.raises(ValueError, match='has weights that are not finite'):
        visualize(broken, [image], tmp_path / 'out')
    with pytest.raises(ValueError, match='where photo.png lies and may be written over'):
        visualize(model, [image], image.parent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['photo.png']


def test_gradient_checkpointing_goes_past_grad_cam():
    checkpointed = timm.create_model('test_cotnet', pretrained=True).eval()
    checkpointed.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match='turn that off'):
        grad_cam(checkpointed, torch.rand(1, 3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['cotnet50', 'cotnext50_2x48d', 'se_cotnetd_50'])
def test_every_family(name, tmp_path):
    """Random numbers, another size, 1000 classes with names."""
    options = ['--model', name, '--no-pretrained', '--img-size', '96', '128', '--output', str(tmp_path / 'out')]
    assert main([str(photo(tmp_path / 'photo.png')), *options]) == 0
    assert {path.name for path in (tmp_path / 'out').glob('*.png')} == {f'photo-{kind}.png' for kind in KINDS}
    assert 'class 0' not in (tmp_path / 'out' / 'index.html').read_text()


class Chromium:
    """A page in a headless browser, asked over the DevTools protocol through pipes.

    Args:
        profile: Folder for the browser's files.
    """

    def __init__(self, profile):
        to_read, self.write = os.pipe()
        self.read, to_write = os.pipe()
        command = [
            BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run',
            '--disable-background-networking', f'--user-data-dir={profile}', '--remote-debugging-pipe',
            'about:blank']

        def take_pipes():  # the browser reads from 3 and writes to 4
            for at, pipe in ((30, to_read), (31, to_write)):
                os.dup2(pipe, at)
            for at, pipe in ((3, 30), (4, 31)):
                os.dup2(pipe, at)

        self.process = subprocess.Popen(
            command, preexec_fn=take_pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read), os.close(to_write)
        self.count, self.rest, self.events = 0, b'', []
        targets = self.ask('Target.getTargets')['targetInfos']
        page = next(target['targetId'] for target in targets if target['type'] == 'page')
        self.session = self.ask('Target.attachToTarget', targetId=page, flatten=True)['sessionId']

    def ask(self, method, **params):
        self.count += 1
        message = dict(id=self.count, method=method, params=params)
        if hasattr(self, 'session'):
            message['sessionId'] = self.session
        os.write(self.write, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._next()
            if answer.get('id') == self.count:
                assert 'error' not in answer, answer
                return answer['result']
            self.events.append(answer)

    def _next(self):
        while b'\0' not in self.rest:
            assert select.select([self.read], [], [], 60)[0], 'the browser does not answer'
            part = os.read(self.read, 2 ** 16)
            assert part, 'the browser has ended'
            self.rest += part
        message, _, self.rest = self.rest.partition(b'\0')
        return json.loads(message)

    def open(self, url, width):
        """Opens a page in a window of this width, and returns the addresses that were asked for."""
        self.events = []
        self.ask('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.ask('Page.enable')
        self.ask('Network.enable')
        self.ask('Page.navigate', url=url)
        while not any(event['method'] == 'Page.loadEventFired' for event in self.events):
            self.events.append(self._next())
        return [event['params']['request']['url'] for event in self.events
                if event['method'] == 'Network.requestWillBeSent']

    def evaluate(self, script):
        return self.ask('Runtime.evaluate', expression=script, returnByValue=True)['result']['value']

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.write), os.close(self.read)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason='there is no browser to look at the page: no chromium, no google-chrome')
def test_page_in_a_browser(written, tmp_path):
    browser = Chromium(tmp_path)
    try:
        for width in (400, 1400):  # a telephone, a screen
            requests = browser.open(written.as_uri(), width)
            assert len(set(requests)) == 1 + 2 * len(KINDS) and all(url.startswith('file:') for url in requests)
            sizes = browser.evaluate(
                '[...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().right])')
            assert len(sizes) == 2 * len(KINDS)
            assert all(complete and natural >= 600 and right <= width for complete, natural, right in sizes)
            assert browser.evaluate('document.documentElement.scrollWidth') <= width  # nothing hangs over
        assert browser.evaluate('document.title') == 'What the CoT layers of test_cotnet see'
        assert browser.evaluate('document.querySelectorAll("h2").length') == 2
    finally:
        browser.close()
