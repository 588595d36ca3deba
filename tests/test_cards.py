"""The cards are those that the registry and the published facts give, the Hub can read them, and their code runs."""
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
from huggingface_hub import ModelCard
from hub_server import TOKEN, HubServer
from official_checkpoints import official_state_dict, save
from PIL import Image

from timm_cotnet import cards
from timm_cotnet.cards import TIMM_RESULTS, card_files, main
from timm_cotnet.detection.published import PUBLISHED_DETECTORS
from timm_cotnet.hub import DEFAULT_NAMESPACE
from timm_cotnet.published import PUBLISHED

HUB_CARDS = Path(__file__).parent.parent / 'hub_cards'
OFFICIAL_NAMES = {'se_cotnetd_152.jd_in1k_320': 'se_cotnetd_152_L'}


def readme(name: str) -> str:
    return (HUB_CARDS / name / 'README.md').read_text()


def test_hub_cards_hold_what_the_command_writes(tmp_path):
    assert main([str(tmp_path)]) == 0
    expected = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    found = {path.relative_to(HUB_CARDS): path.read_bytes() for path in HUB_CARDS.rglob('*') if path.is_file()}
    assert len(expected) == 3 * len(PUBLISHED) + 2 * len(PUBLISHED_DETECTORS) == 24 + 48
    assert found.keys() == expected.keys()
    changed = [str(path) for path in expected if found[path] != expected[path]]
    assert not changed, f'run python -m timm_cotnet.cards and commit {changed}'


@pytest.mark.parametrize('name', PUBLISHED)
def test_metadata(name):
    facts = PUBLISHED[name]
    data = ModelCard.load(HUB_CARDS / name / 'README.md').data
    assert (data.license, data.library_name, data.pipeline_tag) == ('apache-2.0', 'timm', 'image-classification')
    assert data.datasets == ['imagenet-1k'] and {'timm', 'image-classification'} <= set(data.tags)
    assert data.model_name == name
    results = [(r.task_type, r.dataset_type, r.metric_name, r.metric_value, r.source_url) for r in data.eval_results]
    code, detection = 'https://github.com/JDAI-CV/CoTNet', (
        'https://github.com/JDAI-CV/CoTNet-ObjectDetection-InstanceSegmentation')
    expected = [
        ('image-classification', 'imagenet-1k', 'Top-1 accuracy (reported by the authors)', facts.top1, code),
        ('image-classification', 'imagenet-1k', 'Top-5 accuracy (reported by the authors)', facts.top5, code),
    ]
    if facts.coco is not None:
        coco, by = facts.coco, 'with this backbone (reported by the authors)'
        expected += [
            ('object-detection', 'coco', f'Box AP, Faster R-CNN {by}', coco.faster_rcnn, detection),
            ('object-detection', 'coco', f'Box AP, Cascade R-CNN {by}', coco.cascade_rcnn, detection),
            ('object-detection', 'coco', f'Box AP, Mask R-CNN {by}', coco.mask_rcnn[0], detection),
            ('object-detection', 'coco', f'Box AP, Cascade Mask R-CNN {by}', coco.cascade_mask_rcnn[0], detection),
            ('image-segmentation', 'coco', f'Mask AP, Mask R-CNN {by}', coco.mask_rcnn[1], detection),
            ('image-segmentation', 'coco', f'Mask AP, Cascade Mask R-CNN {by}', coco.cascade_mask_rcnn[1], detection),
        ]
    assert results == expected


@pytest.mark.parametrize('name', PUBLISHED)
def test_config_is_what_timm_reads(name):
    config = json.loads((HUB_CARDS / name / 'config.json').read_text())
    variant, tag = name.split('.')
    assert (config['architecture'], config['num_classes'], config['num_features']) == (variant, 1000, 2048)
    expected = timm.get_pretrained_cfg(name).to_dict()
    assert config['pretrained_cfg']['tag'] == tag
    for key in ('input_size', 'crop_pct', 'interpolation', 'mean', 'std', 'pool_size', 'first_conv', 'classifier'):
        value = config['pretrained_cfg'][key]
        assert (tuple(value) if isinstance(value, list) else value) == expected[key], key
    assert not config['pretrained_cfg'].keys() & {'hf_hub_id', 'hf_hub_filename', 'url', 'file', 'source'}


@pytest.mark.parametrize('name', PUBLISHED)
def test_card_says_what_is_known(name):
    text, facts = readme(name), PUBLISHED[name]
    size = timm.get_pretrained_cfg(name).input_size[-1]
    assert f'| Parameters | {facts.params / 1e6:.1f} M |' in text
    assert f'| GMACs | {facts.gmacs:.2f} at {size} x {size} |' in text
    assert f'| ImageNet-1k top-1, reported by the authors | {facts.top1} % |' in text
    assert f'| **{name}** | {size} | {facts.params / 1e6:.1f} | {facts.top1} | {facts.top5} | authors |' in text
    assert text.count('| timm |\n') >= 3
    assert '**The weights are not on the Hub yet** in the account `timm-cotnet`' in text and facts.url in text
    assert 'README of `timm-cotnet` has a table of measured times' in text and '$' not in text
    assert f'hf-hub:{DEFAULT_NAMESPACE}/{name}' in text
    assert '@article{cotnet,' in text and 'Intended use and limits' in text
    assert ('These are the operations of a 256 x 256\ninput' in text) == (name == 'se_cotnetd_152.jd_in1k')
    assert ('As a backbone on COCO' in text) == (facts.coco is not None)


def test_card_of_uploaded_weights_gives_their_digest(monkeypatch):
    name, digest = 'cotnet50.jd_in1k', 'ab' * 32
    monkeypatch.setattr(cards, 'PUBLISHED', {**PUBLISHED, name: replace(PUBLISHED[name], sha256=digest)})
    text = card_files(name)['README.md']
    assert f'has the sha256 `{digest}`' in text and 'not on the Hub' not in text
    assert PUBLISHED[name].url in text


def test_namespace_of_a_mirror_does_not_change_the_cards(monkeypatch):
    monkeypatch.setattr('timm_cotnet.hub.HUB_NAMESPACE', 'mirror')
    assert card_files('cotnet50.jd_in1k')['README.md'] == readme('cotnet50.jd_in1k')


def test_numbers_of_timm_are_of_models_of_timm():
    assert len({row[:2] for row in TIMM_RESULTS}) == len(TIMM_RESULTS) == 18
    for name, size, params, top1, top5 in TIMM_RESULTS:
        cfg = timm.get_pretrained_cfg(name)
        assert size in (cfg.input_size[-1], (cfg.test_input_size or cfg.input_size)[-1]), name
        assert 20 < params < 75 and 80 < top1 < 85 and 94 < top5 < 98


@pytest.mark.parametrize('name', PUBLISHED)
def test_figure(name):
    assert '](figure.svg)' in readme(name)
    root = ElementTree.parse(HUB_CARDS / name / 'figure.svg').getroot()
    svg = '{http://www.w3.org/2000/svg}'
    circles = list(root.iter(f'{svg}circle'))
    assert len(circles) == len(TIMM_RESULTS) + len(PUBLISHED)
    width, height = map(float, root.get('viewBox').split()[2:])
    assert all(0 < float(c.get('cx')) < width and 0 < float(c.get('cy')) < height for c in circles)
    bold = [text.text for text in root.iter(f'{svg}text') if text.get('font-weight') == 'bold']
    assert bold == [PUBLISHED[name].name]


BLOCKS = re.compile(r'```(\w+)\n(.*?)```', re.DOTALL)


@pytest.mark.parametrize('name', PUBLISHED)
def test_blocks_of_code(name):
    blocks = BLOCKS.findall(readme(name))
    assert [language for language, _ in blocks] == ['bash', 'python', 'bash'] + 5 * ['python'] + ['bibtex']
    for language, block in blocks:
        if language == 'python':
            compile(block, name, 'exec')
    assert len(re.findall(r'^# (\(.*\))$', blocks[5][1], re.MULTILINE)) == 5


def test_python_runs(tmp_path, monkeypatch, capsys):
    """One card's Python, with random weights in place of what it downloads or finds in a folder."""
    name = 'cotnet50.jd_in1k'
    made = []

    def create_model(source, pretrained, **kwargs):
        made.append((source, pretrained))
        return original(name, **kwargs)

    original = timm.create_model
    monkeypatch.setattr(timm, 'create_model', create_model)
    monkeypatch.chdir(tmp_path)
    make_photo(tmp_path)
    code = [block for language, block in BLOCKS.findall(readme(name)) if language == 'python']
    for block in code:
        exec(block, {'__name__': '__main__'})
    sources = [f'local-dir:{name}', name, f'hf-hub:{DEFAULT_NAMESPACE}/{name}', name, name, name]
    assert made == [(source, True) for source in sources]
    assert capsys.readouterr().out.splitlines() == re.findall(r'^# (\(.*\))$', code[3], re.MULTILINE)


def make_photo(folder: Path) -> None:
    pixels = np.random.RandomState(0).randint(0, 255, (300, 400, 3), np.uint8)
    Image.fromarray(pixels).save(folder / 'photo.jpg')


@pytest.mark.slow
@pytest.mark.parametrize('name', PUBLISHED)
def test_every_block_of_code_runs(name, tmp_path, installed_venv):
    """In the card's order: shell commands in processes of their own, Python in one until the next shell command."""
    blocks = BLOCKS.findall(readme(name))
    checkpoint = re.search(r'convert (\S+\.pth\.tar) ', blocks[0][1])[1]
    save(official_state_dict(OFFICIAL_NAMES.get(name, name.split('.')[0])), tmp_path / checkpoint)
    make_photo(tmp_path)

    bin_folder = tmp_path / 'bin'
    bin_folder.mkdir()
    (bin_folder / 'pip').write_text('#!/bin/sh\nexec python -m pip "$@"\n')
    (bin_folder / 'pip').chmod(0o755)
    runner = (
        'import os, subprocess, sys\n'
        f'os.chdir({str(tmp_path)!r})\n'
        'os.environ["PATH"] = os.pathsep.join(["bin", os.path.dirname(sys.executable), os.environ["PATH"]])\n')
    shell = runner + 'subprocess.run(sys.argv[1], shell=True, check=True)'
    python = runner + 'for block in sys.argv[1:]: exec(block, {"__name__": "__main__"})'

    with HubServer() as hub:
        env = {
            **hub.env, 'HF_TOKEN': TOKEN, 'HF_HOME': str(tmp_path / 'hf'), 'PIP_NO_INDEX': '1', 'OMP_NUM_THREADS': '1'}
        installed_venv.check_output('-c', shell, blocks[0][1], env=env, timeout=600)
        converted = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert sorted(converted) == ['README.md', 'config.json', 'figure.svg', 'model.safetensors']
        installed_venv.check_output('-c', shell, blocks[2][1], env=env, timeout=600)
        assert hub.repos.keys() == {f'NAME/{name}'}
        assert hub.repos[f'NAME/{name}'].files().items() >= converted.items()

        hub.commit(f'{DEFAULT_NAMESPACE}/{name}', converted)
        code = [block for language, block in blocks if language == 'python']
        output = installed_venv.check_output('-c', python, *code, env=env, timeout=600)
    expected = re.findall(r'^# (\(.*\))$', blocks[5][1], re.MULTILINE)
    assert output.splitlines() == expected and len(expected) == 5
