"""Loading of weights into models, from a server of the Hub's protocol and from files; what is said of misfits."""
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hub_client import CONFIG, JUNK_HEADER, OTHER, RIGHT, SAFE, WEIGHTS, Client, arguments, blob, check_error, config_of
from hub_client import digest_of, pickled
from hub_server import TOKEN, flip, sha256

from timm_cotnet import hub, pretrained
from timm_cotnet.published import PUBLISHED

# config.json, hf-hub:


@pytest.mark.parametrize('damage', [flip, lambda body: body[:50], lambda body: b'\xff' + body[1:]])
def test_config_heals(server, client, repo, tmp_path, damage):
    server.fault('GET', f'{repo}/resolve/.*/config.json', 1, body=lambda body: damage(body).ljust(len(body)))
    answer = client.create(f'hf-hub:{repo}', cache_dir=tmp_path)
    assert answer['weights'] == RIGHT and answer['cfg']['hf_hub_id'] == repo and answer['cfg']['source'] == 'hf-hub'
    assert 'file' not in answer['cfg']
    path = blob(tmp_path, repo, 'config.json')
    path.write_bytes(damage(path.read_bytes()))
    assert client.create(f'hf-hub:{repo}', cache_dir=tmp_path)['weights'] == RIGHT
    assert server.count('GET', f'{repo}/resolve/.*/config.json') == 3


def test_config_damaged_for_ever(server, client, repo, tmp_path):
    server.fault('GET', f'{repo}/resolve/.*/config.json', body=flip)
    answer = client.create(f'hf-hub:{repo}', cache_dir=tmp_path)
    assert answer['error'] == 'WeightsError' and 'config.json' in answer['message'] and 'damaged' in answer['message']


def test_revisions(server, client, repo, tmp_path):
    old = server.repos[repo].sha('main')
    server.commit(repo, {'model.safetensors': safetensors.torch.save(OTHER)}, branch='second')
    assert client.create(f'hf-hub:{repo}@second', cache_dir=tmp_path)['weights'] == digest_of(OTHER)
    assert client.create(f'hf-hub:{repo}@{old}', cache_dir=tmp_path)['weights'] == RIGHT
    answer = client.create(f'hf-hub:{repo}@third', cache_dir=tmp_path)
    assert answer['error'] == 'RevisionNotFoundError'  # whose model it would be, nobody knows
    answer = client.create(**arguments(f'{repo}@third', cache_dir=tmp_path))
    check_error(answer, repo)
    assert 'third' in answer['message'] and 'revision' in answer['message']


def test_models_of_others_are_left_alone(server, client, tmp_path):
    resnet = timm.create_model('test_resnet', num_classes=7)
    weights = safetensors.torch.save(resnet.state_dict())
    server.commit('them/resnet', {'config.json': config_of(resnet), 'model.safetensors': weights})
    assert client.create('hf-hub:them/resnet', cache_dir=tmp_path)['weights'] == digest_of(resnet.state_dict())
    answer = client.create('hf-hub:them/missing', cache_dir=tmp_path)
    assert answer['error'] == 'RepositoryNotFoundError'


# What a person has to act on


def test_missing_and_private(server, client, tmp_path):
    for model in (arguments('me/nothing'), dict(model_name='hf-hub:me/test_cotnet.nothing')):
        answer = client.create(**model, cache_dir=tmp_path)
        check_error(answer, 'nothing')
        assert 'private' in answer['message'] and 'HF_TOKEN' in answer['message']
        assert answer['causes'][0] == 'RepositoryNotFoundError'

    server.redirect = True
    files = {'config.json': CONFIG, 'model.safetensors': SAFE}
    server.commit('me/private', files, private=True)
    server.commit('me/gated', files, gated=True)
    check_error(client.create(**arguments('me/private', cache_dir=tmp_path)), 'me/private')
    answer = client.create(**arguments('me/gated', cache_dir=tmp_path))
    check_error(answer, 'me/gated')
    assert 'page' in answer['message'] and answer['causes'][0] == 'GatedRepoError'
    assert client.create(**arguments('me/absent', cache_dir=tmp_path))['error'] == 'WeightsError'

    asked = len(server.requests)
    client.run('import os; result = os.environ.update(HF_TOKEN=token)', token=TOKEN)
    try:
        assert client.create(**arguments('me/private', cache_dir=tmp_path))['weights'] == RIGHT
        assert client.create('hf-hub:me/private', cache_dir=tmp_path)['weights'] == RIGHT
    finally:
        client.run('import os; result = os.environ.pop("HF_TOKEN")')
    hosts = {
        (request.host.split(':')[0], request.token)
        for request in server.requests[asked:] if request.path.startswith(('/me/', '/cdn/'))
    }
    assert hosts == {('127.0.0.1', TOKEN), ('localhost', None)}


def test_no_file(server, client, tmp_path):
    server.commit('me/empty', {'config.json': CONFIG})
    answer = client.create(**arguments('me/empty', cache_dir=tmp_path))
    check_error(answer, 'me/empty')
    assert 'no such file' in answer['message'] and 'model.safetensors' in answer['message']


def test_not_safetensors(server, client, tmp_path):
    """A file that is what the Hub says, and still no weights."""
    server.commit('me/text', {'model.safetensors': b'version https://git-lfs.github.com/spec/v1'})
    answer = client.create(**arguments('me/text', cache_dir=tmp_path))
    check_error(answer, 'me/text')
    assert 'not a readable safetensors file' in answer['message']


# Pickles


class Evil:
    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_pickle_never_instead(server, client, repo, tmp_path):
    server.commit(repo, {'pytorch_model.bin': pickled(OTHER)})
    assert client.create(f'hf-hub:{repo}', cache_dir=tmp_path)['weights'] == RIGHT
    for fault in (dict(status=403), dict(status=404), dict(status=400), dict(body=flip), dict(cut=9, end='reset')):
        server.faults.clear()
        server.fault('HEAD' if 'status' in fault else 'GET', f'{repo}/resolve/.*safetensors', **fault)
        answer = client.create(f'hf-hub:{repo}', cache_dir=tmp_path / str(fault))
        check_error(answer, repo)
    assert server.count('GET', f'{repo}/resolve/.*bin') == server.count('HEAD', f'{repo}/resolve/.*bin') == 0


def test_pickle_never_instead_when_down(server, client, repo, tmp_path):
    server.commit(repo, {'pytorch_model.bin': pickled(OTHER)})
    server.fault('HEAD', f'{repo}/resolve/.*safetensors', status=503)
    check_error(client.create(f'hf-hub:{repo}', cache_dir=tmp_path), repo)
    assert server.count('HEAD', f'{repo}/resolve/.*bin') == 0


def test_only_a_pickle(server, client, tmp_path):
    """As in timm a repository without safetensors is read from its pickle, but verified, and with weights_only."""
    server.commit('me/pickle', {'config.json': CONFIG, 'pytorch_model.bin': pickled({'state_dict_ema': WEIGHTS})})
    server.fault('GET', 'me/pickle/resolve/.*bin', 1, body=flip)
    answer = client.create('hf-hub:me/pickle', cache_dir=tmp_path)
    assert answer['weights'] == RIGHT and 'state_dict' not in answer['cfg']
    evil = pickled({'state_dict': Evil(tmp_path / 'evil')})
    server.commit('me/evil', {'config.json': CONFIG, 'pytorch_model.bin': evil})
    check_error(client.create('hf-hub:me/evil', cache_dir=tmp_path), 'me/evil')
    assert not (tmp_path / 'evil').exists()


# Does it fit


def weights_of(name: str, seed: int = 0, **kwargs) -> dict:
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs).state_dict()


MISFITS = {
    'another architecture': (lambda: weights_of('test_resnet'), ['missing', 'unexpected']),
    'missing': (
        lambda: {key: value for key, value in WEIGHTS.items() if key != 'layer4.0.conv3.weight'},
        ['1 of', 'missing (layer4.0.conv3.weight)'],
    ),
    'unexpected': (lambda: WEIGHTS | {f'extra{i}': torch.ones(1) for i in range(9)}, ['9 of', 'extra0', 'and 6 more']),
    'shape': (
        lambda: WEIGHTS | {'conv1.3.weight': torch.ones(2, 3, 1, 1)},
        ['1 of', 'of another shape (conv1.3.weight: 2x3x1x1 instead of '],
    ),
    'classes': (
        lambda: weights_of('test_cotnet', num_classes=7),
        ['2 of', 'fc.weight: 7x256 instead of 10x256, fc.bias: 7 instead of 10'],
    ),
}
TARGETS = [{}, dict(num_classes=3), dict(features_only=True)]


@pytest.mark.parametrize('kwargs, name', [
    (kwargs, name) for kwargs in TARGETS for name in MISFITS if not kwargs or name != 'classes'
], ids=str)
def test_misfit(server, client, tmp_path, name, kwargs):
    """Also where timm loads what fits and leaves the rest at random: with another head, or none."""
    make, parts = MISFITS[name]
    repo_id = f'misfit/{name.replace(" ", "-")}'
    server.commit(repo_id, {'model.safetensors': safetensors.torch.save(make())})
    answer = client.create(**arguments(repo_id, cache_dir=tmp_path), **kwargs)
    assert answer['error'] == 'WeightsError'
    for part in (*parts, 'test_cotnet', repo_id):
        assert part in answer['message']
    assert len(answer['message']) < 1500


def test_misfit_of_a_file(tmp_path):
    path = tmp_path / 'resnet.safetensors'
    safetensors.torch.save_file(weights_of('test_resnet'), path)
    with pytest.raises(pretrained.WeightsError, match='of .* tensors are missing') as info:
        timm.create_model('test_cotnet', checkpoint_path=path)
    assert isinstance(info.value.__cause__, RuntimeError)
    with pytest.raises(pretrained.WeightsError, match='of .* tensors are missing') as info:
        timm.create_model('test_cotnet', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert str(path) in str(info.value)
    with pytest.raises(pretrained.WeightsError, match='no such file') as info:
        timm.create_model('test_cotnet', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'none')))
    assert str(tmp_path / 'none') in str(info.value)


def test_other_number_of_classes(tmp_path):
    """The number is said, and what is advised works."""
    weights, path = weights_of('test_cotnet', num_classes=7), tmp_path / 'x.safetensors'
    safetensors.torch.save_file(weights, path)
    with pytest.raises(pretrained.WeightsError) as info:
        timm.create_model('test_cotnet', num_classes=5, checkpoint_path=path)
    assert str(info.value) == (
        'No weights for test_cotnet from the checkpoint that was given: 2 of 201 tensors are of another shape '
        '(fc.weight: 7x256 instead of 5x256, fc.bias: 7 instead of 5).\n'
        'The checkpoint has 7 classes, the model 5: make the model with num_classes=7. After that, '
        'model.reset_classifier(5) makes a new classifier.')
    model = timm.create_model('test_cotnet', num_classes=7, checkpoint_path=path)
    assert digest_of(model.state_dict()) == digest_of(weights)
    model.reset_classifier(5)
    assert model.fc.weight.shape == (5, 256)

    overlay = dict(file=str(path))
    with pytest.raises(pretrained.WeightsError) as info:
        timm.create_model('test_cotnet', pretrained=True, pretrained_cfg_overlay=overlay)
    assert str(info.value).splitlines()[1] == (
        'The weights have 7 classes, where the pretrained config says 10: pass '
        'pretrained_cfg_overlay=dict(num_classes=7).')
    model = timm.create_model('test_cotnet', pretrained=True, pretrained_cfg_overlay=dict(overlay, num_classes=7))
    assert digest_of(model.state_dict()) == digest_of(weights)


@pytest.mark.parametrize('cfg', [
    dict(hf_hub_id='a/b'), dict(hf_hub_id='a/b', file='x'), dict(hf_hub_id='a/b', state_dict={'x': 1}), dict(file='x'),
    {},
    dict(source='hf-hub', hf_hub_id='a/b', file='x'), dict(source='local-dir', hf_hub_id='a/b', file='x'),
    dict(hf_hub_id='a/b', url='http://x'), dict(url='http://x'),
], ids=str)
def test_source_is_the_one_that_timm_finds(cfg):
    assert pretrained._is_on_hub(cfg) == (timm.models._builder._resolve_pretrained_source(cfg)[0] == 'hf-hub')


def adapted(**kwargs) -> dict:
    """What timm itself makes of the weights."""
    model = timm.models.build_model_with_cfg(
        timm.create_model('test_cotnet').__class__, 'test_cotnet', True,
        pretrained_cfg_overlay=dict(file=None, state_dict=WEIGHTS),
        layers=(1, 1, 1, 1), channels=(16, 32, 48, 64), stem_type='deep', stem_width=16, **kwargs)
    return model.state_dict()


@pytest.mark.parametrize('kwargs', [
    dict(num_classes=3), dict(num_classes=0), dict(in_chans=1), dict(in_chans=6), dict(features_only=True),
    dict(features_only=True, in_chans=1, out_indices=(1, 3)),
], ids=str)
def test_adapts_as_timm(server, client, repo, tmp_path, kwargs):
    answer = client.create(**arguments(repo, cache_dir=tmp_path), **kwargs)
    assert 'error' not in answer, answer
    # A new classifier is at random: compared without.
    expected = {key: value for key, value in adapted(**kwargs).items() if key.split('.')[0] != 'fc'}
    torch.manual_seed(0)
    path = blob(tmp_path, repo).with_suffix('.safetensors')
    path.write_bytes(SAFE)
    model = timm.create_model(
        'test_cotnet', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs)
    found = {key: value for key, value in model.state_dict().items() if key.split('.')[0] != 'fc'}
    assert digest_of(found) == digest_of(expected)
    if kwargs.get('num_classes') != 3:
        assert answer['weights'] == digest_of(model.state_dict())


def test_fine_tuned(tmp_path):
    """Checkpoints of timm's train.py: with EMA, prefixes, another number of classes."""
    tuned, ema = weights_of('test_cotnet', 2, num_classes=5), weights_of('test_cotnet', 3, num_classes=5)
    path = tmp_path / 'model_best.pth.tar'
    torch.save({'epoch': 1, 'arch': 'test_cotnet', 'state_dict': {f'module.{k}': v for k, v in tuned.items()}}, path)

    def load(**kwargs):
        return timm.create_model('test_cotnet', num_classes=5, **kwargs).state_dict()

    assert digest_of(load(checkpoint_path=path)) == digest_of(tuned)
    overlay = dict(file=str(path), num_classes=5)
    assert digest_of(load(pretrained=True, pretrained_cfg_overlay=overlay)) == digest_of(tuned)
    # --pretrained-path says num_classes=-1, which leaves the classifier at random.
    found = load(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=-1))
    assert {key for key in tuned if not torch.equal(found[key], tuned[key])} == {'fc.weight', 'fc.bias'}
    torch.save({'state_dict': tuned, 'state_dict_ema': ema}, path)
    assert digest_of(load(checkpoint_path=path)) == digest_of(ema)
    assert digest_of(load(pretrained=True, pretrained_cfg_overlay=overlay)) == digest_of(ema)


@pytest.mark.skipif(not hasattr(timm.models._hub, 'load_model_config_from_path'), reason='timm has it since 1.0.16')
def test_local_dir(tmp_path):
    (tmp_path / 'config.json').write_bytes(CONFIG)
    with pytest.raises(RuntimeError, match='No suitable checkpoints'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    (tmp_path / 'pytorch_model.bin').write_bytes(pickled(OTHER))
    (tmp_path / 'model.safetensors').write_bytes(SAFE)
    assert digest_of(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).state_dict()) == RIGHT
    (tmp_path / 'model.safetensors').write_bytes(JUNK_HEADER['body'](SAFE))
    with pytest.raises(pretrained.WeightsError, match='not a readable safetensors file') as info:
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert str(tmp_path) in str(info.value)


# The registered tags


@pytest.fixture(scope='module')
def mirror(hub_server, installed_venv, tmp_path_factory):
    """A client for which TIMM_COTNET_HUB names a mirror."""
    env = dict(HF_HOME=str(tmp_path_factory.mktemp('home')), TIMM_COTNET_HUB='mirror/', HF_HUB_DOWNLOAD_TIMEOUT='20')
    client = Client(installed_venv, hub_server.env | env)
    yield client
    client.close()


def test_tags_name_their_repositories(client, mirror):
    code = '''
cfgs = {name: timm.get_pretrained_cfg(name) for name in timm.list_models('*cotne*', include_tags=True)}
result = {name: (cfg.hf_hub_id, cfg.hf_hub_filename) for name, cfg in cfgs.items()}
'''
    for process, namespace in ((client, hub.DEFAULT_NAMESPACE), (mirror, 'mirror')):
        found = process.run('import timm' + code)
        assert len(found) >= 11
        for name, source in found.items():
            published = name in PUBLISHED
            assert source == ([f'{namespace}/{name}', 'model.safetensors'] if published else [None, None])


def test_published_tag(server, mirror, tmp_path):
    """A mirror serves the real size, and the connection breaks off in the middle of it."""
    weights = weights_of('cotnet50')
    content = safetensors.torch.save(weights)
    server.commit('mirror/cotnet50.jd_in1k', {'model.safetensors': content})
    server.fault('GET', 'mirror/.*safetensors', 1, cut=60_000_000)
    assert mirror.create('cotnet50.jd_in1k', cache_dir=tmp_path)['weights'] == digest_of(weights)
    assert mirror.create('cotnet50', cache_dir=tmp_path)['weights'] == digest_of(weights)
    assert server.count('GET', 'mirror/.*safetensors') == 2  # resumed
    answer = mirror.create('se_cotnetd_50', cache_dir=tmp_path)
    assert answer['error'] == 'WeightsError' and PUBLISHED['se_cotnetd_50.jd_in1k'].url in answer['message']
    assert 'mirror/se_cotnetd_50.jd_in1k' in answer['message'] and 'not published' not in answer['message']

    # What was recorded with the tag goes before what the Hub says.
    record = '''
import dataclasses
from timm_cotnet.published import PUBLISHED
result = PUBLISHED['cotnet50.jd_in1k'].sha256
PUBLISHED['cotnet50.jd_in1k'] = dataclasses.replace(PUBLISHED['cotnet50.jd_in1k'], sha256=digest)
'''
    before = mirror.run(record, digest=sha256(content))
    assert mirror.create('cotnet50', cache_dir=tmp_path)['weights'] == digest_of(weights)
    mirror.run(record, digest='1' * 64)
    wrong = mirror.create('cotnet50', cache_dir=tmp_path)['message']
    mirror.run(record, digest=before)
    assert sha256(content) in wrong and '1' * 64 in wrong and 'damaged' in wrong


@pytest.mark.parametrize('name', ['cotnet50', 'hf-hub:timm-cotnet/cotnet50.jd_in1k'])
def test_unpublished_tag(client, tmp_path, name):
    """What this project has not published is said first; to log in would not help."""
    message = client.create(name, cache_dir=tmp_path)['message']
    first, second, *ways = message.splitlines()
    assert first == 'No weights for cotnet50.jd_in1k: this project has not published them on the Hub yet.'
    assert second.startswith('Sought in timm-cotnet/cotnet50.jd_in1k (')
    assert second.endswith(': there is no such repository.') and 'log in' not in message
    parts = [PUBLISHED['cotnet50.jd_in1k'].url, 'timm_cotnet.convert', 'local-dir:', 'TIMM_COTNET_HUB']
    assert [sum(part in way for way in ways) for part in parts] == [1, 1, 1, 1]


def test_unpublished_tag_that_is_damaged_or_gated(server, client, tmp_path):
    """What another Hub serves under that name has faults of its own."""
    server.commit('timm-cotnet/cotnet50.jd_in1k', {'model.safetensors': SAFE})
    server.fault('GET', 'timm-cotnet', body=flip)
    message = client.create('cotnet50', cache_dir=tmp_path)['message']
    assert 'damaged' in message and 'not published' not in message
    server.repos['timm-cotnet/cotnet50.jd_in1k'].gated = True
    message = client.create('cotnet50', cache_dir=tmp_path)['message']
    assert 'access to the repository' in message and 'not published' not in message


@pytest.mark.slow
def test_transformers(server, installed_venv, repo, tmp_path):
    """Without an import of the plugin; there the download of `TimmBackbone` is timm's, and so verified."""
    pytest.importorskip('transformers', reason='transformers, of the extra "test", is not installed')
    script = '''
import json, sys, torch
from transformers import AutoModelForImageClassification, TimmBackbone
model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
logits = model(torch.ones(1, 3, 64, 64)).logits
backbone = TimmBackbone.from_pretrained(f'hf-hub:{sys.argv[1]}').eval()
maps = backbone(torch.ones(1, 3, 64, 64)).feature_maps
print(json.dumps([logits.tolist(), maps[-1].mean((2, 3)).tolist()]))
'''
    env = server.env | dict(HF_HOME=str(tmp_path))
    logits, pooled = json.loads(installed_venv.check_output('-c', script, repo, env=env).splitlines()[-1])
    model = timm.create_model('test_cotnet').eval()
    model.load_state_dict(WEIGHTS)
    with torch.no_grad():
        features = model.forward_features(torch.ones(1, 3, 64, 64))
        torch.testing.assert_close(torch.tensor(pooled), features.mean((2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(logits), model(torch.ones(1, 3, 64, 64)), rtol=1e-4, atol=1e-5)
