import json

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from upclose import birdlets, encode, seeds
from upclose.features import Views
from upclose.methods import tpt

NAMES = ["red-billed tern", "blue owl", "white-capped finch"]
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def tiny():
    return encode.load("birdlets-tiny", device="cpu")


@pytest.fixture
def byte_pair(tmp_path, monkeypatch):
    """A small random model with open_clip's own tokenizer."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})
    (tmp_path / "little.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="random weights"):
        return encode.load("little", device="cpu")


def views(dim, count=3, crops=11):
    draw = seeds.generator(0, "tpt", dim)
    image = normalize(torch.randn(count, dim, generator=draw), dim=-1)
    return Views(image, normalize(image[:, None] + 0.8 * torch.randn(count, crops, dim, generator=draw), dim=-1))


def prompts(encoder, tokens, context):
    """The prompts' embeddings by open_clip's own modules, the context in place of four tokens."""
    model, table = encoder.model, encoder.model.token_embedding.weight
    x = table[tokens].detach().clone()
    x = torch.cat([x[:, :1], context.expand(len(tokens), -1, -1), x[:, 5:]], 1) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    return normalize(x[torch.arange(len(tokens)), tokens.argmax(1)] @ model.text_projection, dim=-1)


def naive(encoder, one, names, learning_rate=5e-3, keep=0.1):
    """One image after the other, through the whole text tower."""
    tokens, out = encoder.tokenize([f"a photo of a {name}." for name in names]), []
    for image, crop in zip(one.image, one.crop):
        context = encoder.model.token_embedding.weight[tokens[0, 1:5]].detach().clone().requires_grad_()
        optimizer = torch.optim.AdamW([context], lr=learning_rate)
        every = torch.cat([image[None], crop])
        p = (encoder.logit_scale * every @ prompts(encoder, tokens, context).T).softmax(1)
        h = -(p * p.log()).sum(1)
        mean = p[h.argsort()[: max(1, int(keep * len(every)))]].mean(0)
        (-(mean * mean.log()).sum()).backward()
        optimizer.step()
        out.append(image @ prompts(encoder, tokens, context).T)
    return torch.stack(out).detach()


@pytest.mark.parametrize("which", ["tiny", "byte_pair"])
def test_scores_equal_a_loop_over_images(which, request):
    encoder = request.getfixturevalue(which)
    one = views(encoder.dim)
    expected = naive(encoder, one, NAMES, keep=0.3)
    assert torch.allclose(tpt.scores(encoder, one, NAMES, keep=0.3), expected, atol=1e-5)


@pytest.mark.parametrize("which", ["tiny", "byte_pair"])
def test_without_a_step_it_is_clip(which, request):
    encoder = request.getfixturevalue(which)
    one = views(encoder.dim)
    label = encoder.encode_text([f"a photo of a {name}." for name in NAMES])
    assert torch.allclose(tpt.scores(encoder, one, NAMES, steps=0), one.image @ label.T, atol=1e-6)


def test_the_batch_changes_nothing_and_a_step_lowers_the_loss(tiny):
    one = views(tiny.dim)
    together, alone = (tpt.scores(tiny, one, NAMES, keep=0.5, batch_size=b) for b in (3, 1))
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together, tpt.scores(tiny, one, NAMES, steps=0), atol=1e-4)


def test_the_gradient_is_the_finite_difference(tiny):
    encoder = tiny.to("cpu")
    encoder.model.double()
    tokens, context = encoder.embed_prompts([f"{tpt.CONTEXT} {name}." for name in NAMES], tpt.CONTEXT)
    crop = views(tiny.dim, count=1).crop.double()

    def value(context):
        label = normalize(encoder.encode_embedded(tokens, context[None]), dim=-1)
        return tpt.loss(5 * crop @ label.mT).sum()

    assert torch.autograd.gradcheck(value, context.requires_grad_(), fast_mode=True)


def test_confident_views_have_the_least_entropy():
    logits = torch.tensor([[[0.0, 0.0], [9.0, 0.0], [1.0, 0.0], [5.0, 0.0]]])
    assert tpt.confident(logits, 0.5).tolist() == [[1, 3]]
    assert tpt.confident(logits, 0.01).tolist() == [[1]]


def test_the_loss_is_the_entropy_of_the_mean():
    logits = torch.randn(2, 3, 5, generator=seeds.generator(0, "loss"))
    mean = logits.softmax(-1).mean(1)
    assert torch.allclose(tpt.loss(logits), -(mean * mean.log()).sum(-1), atol=1e-6)


def test_pictures_are_cut_into_views(tiny):
    data = birdlets.dataset(n=2)
    pictures = [data.load(i) for i in range(2)]
    found = tpt.scores(tiny, pictures, data.class_names[:3], views=4)
    assert found.shape == (2, 3)
    assert torch.equal(found, tpt.scores(tiny, pictures, data.class_names[:3], views=4))


def test_what_is_refused(tiny):
    one = views(tiny.dim)
    with pytest.raises(ValueError, match="0 classes"):
        tpt.scores(tiny, one, [])
    with pytest.raises(ValueError, match="keep 0"):
        tpt.scores(tiny, one, NAMES, keep=0)
    with pytest.raises(ValueError, match="norm nan"):
        tpt.scores(tiny, Views(one.image * torch.nan, one.crop), NAMES)
    with pytest.raises(ValueError, match="does not begin with"):
        tiny.embed_prompts(["the finch."], "a photo of a")
