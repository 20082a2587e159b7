"""Models that are no plain CLIP, with random weights: sigmoid losses, pooled heads, ResNets, other text towers.

Every method that reads embeddings runs on them; those that read more of a model say so before they encode.
"""

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from test_encode import registry
from upclose import bank, crops, encode, evaluate, methods
from upclose.birdlets import dataset
from upclose.features import Plan
from upclose.methods import fair, tpt

__all__ = ["registry"]  # a fixture

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has random weights"),
    pytest.mark.filterwarnings("ignore:nothing tells the preprocessing"),
    pytest.mark.filterwarnings("ignore::upclose.prompts.PromptWarning"),
]

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2}
MODELS = {
    "sigmoid": {  # as SigLIP: a bias of the logits, a head that attends to all tokens, a text tower without a mask
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
    "convolutions": {
        "embed_dim": 48,
        "vision_cfg": {"image_size": 64, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
    "resnet": {  # as RN50: attention pooling of a grid
        "embed_dim": 48,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": TEXT,
    },
    "pooled": {"embed_dim": 48, "vision_cfg": {**VISION, "attentional_pool": True}, "text_cfg": TEXT},
    "mean": {"embed_dim": 48, "vision_cfg": {**VISION, "pool_type": "avg"}, "text_cfg": TEXT},
}
WITHOUT_CLS = ("sigmoid", "convolutions", "resnet")


@pytest.fixture
def models(registry):
    for name, config in MODELS.items():
        (registry / "configs" / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(registry / "configs")
    return registry


@pytest.fixture
def pictures():
    draw = torch.Generator().manual_seed(0)
    sizes = [(60, 80), (90, 50)]
    low = [F.interpolate(torch.rand(1, 3, 6, 7, generator=draw), size, mode="bilinear")[0] for size in sizes]
    return [(255 * picture).to(torch.uint8) for picture in low]


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_open_clips_and_a_file_brings_them_back(models, pictures, name):
    encoder = encode.load(name, device="cpu")
    x = torch.randn(2, 3, encoder.image_size, encoder.image_size)
    sentences = ["a photo of a bird.", "a red bird"]
    with torch.no_grad():
        image = encoder.model.encode_image(x, normalize=True)
        text = encoder.model.encode_text(open_clip.get_tokenizer(name)(sentences), normalize=True)
    torch.testing.assert_close(encoder.features(x), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode_text(sentences), text, atol=1e-5, rtol=0)
    assert encoder.dim == MODELS[name]["embed_dim"] == encoder.encode_images(pictures).shape[1]
    torch.save(encoder.model.state_dict(), models / "x.pt")
    assert encode.load(name, models / "x.pt", device="cpu").fingerprint == encoder.fingerprint


def test_a_bias_of_the_logits_may_be_a_row_and_is_left_out_where_the_model_has_none(models):
    sigmoid, plain = (encode.load(name, device="cpu") for name in ("sigmoid", "mean"))
    state = sigmoid.model.state_dict()
    assert state["logit_bias"] == -10
    row = {key: state[key].reshape(1) for key in ("logit_scale", "logit_bias")}
    torch.save({**state, **row}, models / "x.pt")
    assert encode.load("sigmoid", models / "x.pt", device="cpu").fingerprint == sigmoid.fingerprint
    torch.save({**plain.model.state_dict(), "logit_bias": torch.tensor(-10.0)}, models / "x.pt")
    assert encode.load("mean", models / "x.pt", device="cpu").fingerprint == plain.fingerprint
    torch.save({**state, "logit_bias": torch.zeros(3)}, models / "x.pt")
    with pytest.raises(ValueError, match=r"logit_bias is \(3,\) and not \(\)"):
        encode.load("sigmoid", models / "x.pt", device="cpu")


def test_pictures_get_the_means_and_the_resizing_of_the_weights(models, pictures, monkeypatch):
    facts = {"hf_hub": "nobody/siglip/", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "sigmoid", {"webli": facts})
    torch.save(encode.load("sigmoid", device="cpu").model.state_dict(), models / "x.pt")
    encoder = encode.load("sigmoid", models / "x.pt", device="cpu")
    squashed = [
        Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((160, 160), Image.Resampling.BICUBIC)
        for picture in pictures
    ]
    x = torch.stack(
        [2 * torch.tensor(list(image.getdata())).view(160, 160, 3).permute(2, 0, 1) / 255 - 1 for image in squashed]
    )
    with torch.no_grad():
        wanted = encoder.model.encode_image(x, normalize=True)
    assert (encoder.encode_images(pictures) * wanted).sum(1).min() > 1 - 1e-4
    box = [torch.tensor([[0, 0, picture.shape[2], picture.shape[1]]]) for picture in pictures]
    torch.testing.assert_close(
        encoder.encode_crops(pictures, box)[:, 0], encoder.encode_images(pictures), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", ["sigmoid", "resnet"])
def test_every_method_of_embeddings_runs(models, tmp_path, name):
    encoder, data = encode.load(name, device="cpu"), dataset("test", "photo", n=4)
    names = [method.name for method in methods.REGISTRY.values() if method.zero_shot]
    assert len(names) > 10
    rules = evaluate.rules(names, evaluate.texts(encoder, data))
    ladder = Plan("square", 2, (0.5, 0.9), 0, 1.25, 2)
    found = evaluate.collect(lambda scores, _: scores, rules, encoder, data, [ladder], root=tmp_path)
    for name, scores in found.items():
        assert scores.shape == (1, 4, 120), name
        assert scores.isfinite().all(), name
        assert scores.std(-1).min() > 0, name


@pytest.mark.parametrize("name", WITHOUT_CLS)
def test_what_compares_cls_tokens_says_so_before_it_encodes(models, tmp_path, monkeypatch, name):
    encoder, data = encode.load(name, device="cpu"), dataset("test", "photo", n=4)
    text = evaluate.text(encoder, data, "clip-d")
    monkeypatch.setattr(type(encoder.visual), "forward", lambda *_: pytest.fail("something was encoded"))
    message = rf"the image tower of '{name}' \({type(encoder.visual).__name__}\) has no \[CLS\] token: .* a ViT such as"
    for call in (
        encoder.check_cls,
        lambda: bank.build(data, encoder, Plan(cls=True), tmp_path),
        lambda: fair.adapt(encoder, data, text),
        lambda: encoder.encode_images([data.load(0)], cls=True),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert [*tmp_path.iterdir()] == [models / "configs"]


@pytest.mark.parametrize("name", ["pooled", "mean"])
def test_a_vit_that_pools_otherwise_has_its_token_still(models, name):
    encoder = encode.load(name, device="cpu")
    encoder.check_cls()
    feature, token = encoder.features(torch.randn(2, 3, 32, 32), cls=True)
    assert (feature.shape, token.shape) == ((2, 48), (2, 64))


def test_fair_without_cls_weights_adapts_a_model_of_another_make(models):
    encoder, data = encode.load("sigmoid", device="cpu"), dataset("test", "photo", n=2)
    text = evaluate.text(encoder, data, "clip-d")
    before = encoder.fingerprint
    adapted = fair.adapt(encoder, data, text, crop_weights="softmax", epochs=1, n=2, k=1, batch_size=2)
    assert adapted.encoder.fingerprint != before == encoder.fingerprint
    norms = [name for name, module in encoder.visual.named_modules() if isinstance(module, nn.LayerNorm)]
    assert norms


def test_prompt_tuning_needs_a_plain_text_tower_and_says_so_before_it_encodes(models, monkeypatch, pictures):
    encoder = encode.load("sigmoid", device="cpu")
    monkeypatch.setattr(type(encoder.visual), "forward", lambda *_: pytest.fail("something was encoded"))
    with pytest.raises(ValueError, match="the text tower of 'sigmoid' takes no embedded tokens: prompt tuning needs"):
        tpt.scores(encoder, pictures, ["gull", "tern"])


def test_a_text_tower_of_transformers(models, pictures):
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "bird", "red", ".", "cat"]
    folder = models / "bert"
    vocabulary = {word: place for place, word in enumerate(words)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertConfig(vocab_size=len(words), max_position_embeddings=77, **shape).save_pretrained(folder)
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_proj_type": "mlp"}
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": {**text, "hf_pooler_type": "mean_pooler"}}
    (models / "configs" / "of-transformers.json").write_text(json.dumps(config))
    open_clip.add_model_config(models / "configs")
    encoder = encode.load("of-transformers", device="cpu")
    red, again, cat = encoder.encode_text(["a red bird.", "A red bird .", "a cat"])
    torch.testing.assert_close(red, again)
    assert red @ cat < 0.999
    assert encoder.encode_images(pictures, cls=True)[1].shape == (2, 64)
    box = torch.stack([crops.sample_boxes(*picture.shape[1:], 3, seed=0, key="a") for picture in pictures])
    assert encoder.encode_crops(pictures, box).shape == (2, 3, 24)
    torch.save(encoder.model.state_dict(), models / "x.pt")
    assert encode.load("of-transformers", models / "x.pt", device="cpu").fingerprint == encoder.fingerprint
