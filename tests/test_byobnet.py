"""CoT layers as self-attention layers of timm's ByobNet."""
import timm
import torch
from helpers import difference, image, shaken
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.utils import reparameterize_model

from timm_cotnet import CotLayer, create_cot_layer
from timm_cotnet.layers import AvgPool2d


def test_hybrid_has_cot_layers_where_its_siblings_have_attention():
    torch.manual_seed(0)
    model, sibling = timm.create_model('cot_resnet26t'), timm.create_model('lambda_resnet26t')
    attention = {name for name, _ in sibling.named_modules() if name.endswith('self_attn')}
    layers = {name.removesuffix('.1') for name, m in model.named_modules() if type(m) is CotLayer}
    assert layers == attention and len(layers) == 3
    others = {key for key in sibling.state_dict() if '.self_attn.' not in key}
    assert others == {key for key in model.state_dict() if '.self_attn.' not in key}
    assert type(model.stages[3][0].self_attn[0]) is AvgPool2d
    assert timm.models.get_pretrained_cfg('cot_resnet26t').input_size == (3, 256, 256)

    shaken(model)
    model(image(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.double().eval()
    folded = reparameterize_model(model)
    assert sum(type(module).__name__ == 'FoldedCotLayer' for module in folded.modules()) == 3
    x = image(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert difference(folded(x), model(x)) < 1e-9
    features = timm.create_model('cot_resnet26t', features_only=True)
    assert [f.shape[1] for f in features(image(2, 3, 64, 64))] == features.feature_info.channels()


def test_network_of_ones_own():
    blocks = (ByoBlockCfg(type='self_attn', d=1, c=64, s=2, gs=0, br=0.5),
              ByoBlockCfg(type='self_attn', d=1, c=128, s=1, gs=0, br=0.5, self_attn_kwargs=dict(groups=2)))
    model = ByobNet(ByoModelCfg(blocks=blocks, stem_chs=32, self_attn_layer=create_cot_layer), num_classes=3)
    assert [type(m).__name__ for m in model.modules() if isinstance(m, CotLayer)] == ['CotLayer', 'CoxtLayer']
    assert model(image(2, 3, 32, 32)).shape == (2, 3)
