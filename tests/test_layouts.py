"""Checkpoints as people have them: every layout gives the embeddings of the model that was written, or a sentence."""

import json
import os
import pickle

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from test_encode import CONFIG, TEXT, VISION, clip, registry
from upclose import encode
from upclose.encode import layouts

__all__ = ["registry"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:nothing tells the preprocessing")


def pictures():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tokens():
    draw = torch.randint(1, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    draw[range(4), [15, 3, 8, 11]] = 99  # the end, which has the largest number
    return draw


@torch.no_grad()
def assert_same(encoder, source, atol=1e-6):
    """Both towers embed as those of a model in open_clip's form."""
    image = source.encode_image(pictures(), normalize=True)
    text = source.encode_text(tokens(), normalize=True)
    torch.testing.assert_close(encoder.features(pictures()), image, atol=atol, rtol=0)
    torch.testing.assert_close(encoder.model.encode_text(tokens(), normalize=True), text, atol=atol, rtol=0)


def as_transformers(model):
    """A CLIP's tensors by the names of transformers' CLIPModel, written tower by tower from the modules."""
    found = {"logit_scale": model.logit_scale}

    def put(name, module):
        for kind, value in module.named_parameters(recurse=False):
            found[f"{name}.{kind}"] = value

    for tower, blocks in (("vision", model.visual.transformer), ("text", model.transformer)):
        for i, block in enumerate(blocks.resblocks):
            layer = f"{tower}_model.encoder.layers.{i}"
            width = block.attn.embed_dim
            for k, part in enumerate(("q_proj", "k_proj", "v_proj")):
                rows = slice(k * width, (k + 1) * width)
                found[f"{layer}.self_attn.{part}.weight"] = block.attn.in_proj_weight[rows]
                found[f"{layer}.self_attn.{part}.bias"] = block.attn.in_proj_bias[rows]
            put(f"{layer}.self_attn.out_proj", block.attn.out_proj)
            put(f"{layer}.layer_norm1", block.ln_1)
            put(f"{layer}.layer_norm2", block.ln_2)
            put(f"{layer}.mlp.fc1", block.mlp.c_fc)
            put(f"{layer}.mlp.fc2", block.mlp.c_proj)
    found["vision_model.embeddings.class_embedding"] = model.visual.class_embedding
    found["vision_model.embeddings.position_embedding.weight"] = model.visual.positional_embedding
    found["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # as older versions saved them
    put("vision_model.embeddings.patch_embedding", model.visual.conv1)
    put("vision_model.pre_layrnorm", model.visual.ln_pre)
    put("vision_model.post_layernorm", model.visual.ln_post)
    put("text_model.embeddings.token_embedding", model.token_embedding)
    found["text_model.embeddings.position_embedding.weight"] = model.positional_embedding
    put("text_model.final_layer_norm", model.ln_final)
    found["visual_projection.weight"] = model.visual.proj.T
    found["text_projection.weight"] = model.text_projection.T
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def test_a_clip_model_of_transformers_embeds_as_in_open_clip(registry):
    source = clip(3)
    save_file(as_transformers(source), registry / "model.safetensors", {"format": "pt"})
    assert_same(encode.load("small", registry / "model.safetensors", device="cpu"), source)
    torch.save(as_transformers(source), registry / "pytorch_model.bin")
    assert_same(encode.load("small", registry / "pytorch_model.bin", device="cpu"), source)


@pytest.mark.parametrize(("act", "other"), [("quick_gelu", "small"), ("gelu", "small-quickgelu")])
def test_transformers_own_clip_model_is_read(registry, act, other):
    transformers = pytest.importorskip("transformers")
    shared = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "hidden_act": act}
    text = {"vocab_size": 100, "num_hidden_layers": 2, "max_position_embeddings": 16, "eos_token_id": 99}
    vision = {"num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**shared, **text, "bos_token_id": 0}, vision_config={**shared, **vision}, projection_dim=24
        )
    ).eval()
    for parameter in model.parameters():  # LayerNorms and biases too
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(registry / "whole")
    model.save_pretrained(registry / "parts", max_shard_size="300KB")
    name = {"small": "small-quickgelu", "small-quickgelu": "small"}[other]
    with torch.no_grad():
        found = model(input_ids=tokens(), pixel_values=pictures())
    for file in ("whole/model.safetensors", "parts/model.safetensors.index.json"):
        encoder = encode.load(name, registry / file, device="cpu")
        with torch.no_grad():
            sentence = encoder.model.encode_text(tokens(), normalize=True)
        torch.testing.assert_close(
            encoder.features(pictures()), F.normalize(found.image_embeds, dim=-1), atol=1e-6, rtol=0
        )
        torch.testing.assert_close(sentence, F.normalize(found.text_embeds, dim=-1), atol=1e-6, rtol=0)
        assert encoder.logit_scale == pytest.approx(model.logit_scale.exp().item())
        with pytest.raises(ValueError, match=rf"trained with .*{other!r} .*load\({name!r}, pretrained="):
            encode.load(other, registry / file, device="cpu")
    shards = sorted((registry / "parts").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"{shards[1].name} of its {len(shards)} files is not beside it"):
        encode.load(name, registry / "parts" / "model.safetensors.index.json", device="cpu")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"epoch": 3, "model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        lambda state: {"model_state_dict": state},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {key.replace("visual.", "visual._orig_mod."): value for key, value in state.items()},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
    ],
    ids=["model", "model_state_dict", "DDP", "compiled", "DDP of compiled", "compiled DDP", "tower", "Lightning"],
)
def test_what_training_programs_put_around_a_state_dict(registry, wrap):
    torch.save(wrap(clip(4).state_dict()), registry / "x.pt")
    assert encode.load("small", registry / "x.pt", device="cpu").fingerprint == loaded(registry, clip(4))


def loaded(folder, model):
    save_file(model.state_dict(), folder / "plain.safetensors")
    return encode.load("small", folder / "plain.safetensors", device="cpu").fingerprint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_the_rounded_numbers(registry, dtype):
    rounded = clip(5)
    rounded.load_state_dict({key: value.to(dtype) for key, value in rounded.state_dict().items()})
    half = {key: value.to(dtype) for key, value in rounded.state_dict().items()}
    save_file(half, registry / "x.safetensors", {"format": "pt", "note": "rounded"})
    torch.save(half, registry / "x.pt")
    for file in ("x.safetensors", "x.pt"):
        encoder = encode.load("small", registry / file, device="cpu")
        assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}
        assert_same(encoder, rounded)


# what is no checkpoint, or of another model: before a model is built


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("a model was built"))


PAGE = b"\n<!DOCTYPE html><html><title>Access to model openai/x is restricted</title></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:e6d1\nsize 605143284\n"


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.safetensors", "x.safetensors.index.json"])
@pytest.mark.parametrize(("content", "message"), [(PAGE, "is a web page and no weights"), (POINTER, "`git lfs pull`")])
def test_a_page_and_a_pointer_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        encode.load("ViT-B-32", tmp_path / name, device="cpu")
    assert "\n" not in str(error.value)


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.usefixtures("no_work")
def test_a_pickle_that_would_execute_something_is_not_read(tmp_path):
    mark, message = tmp_path / "was-here", r"x.pt .*asks for \w+.mkdir to be executed, and nothing of it was"
    torch.save({"state_dict": {"visual.proj": torch.zeros(2), "x": Evil(str(mark))}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        encode.load("ViT-B-32", tmp_path / "x.pt", device="cpu")
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Evil(str(mark)), protocol=2))
    with pytest.raises(ValueError, match=message):
        encode.load("ViT-B-32", tmp_path / "x.pt", device="cpu")
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"asks for torch.nn.modules.linear.Linear to be executed"):
        encode.load("ViT-B-32", tmp_path / "x.pt", device="cpu")
    assert not mark.exists()


@pytest.mark.usefixtures("no_work")
def test_other_models_of_transformers_are_told_apart(tmp_path):
    save_file({"vision_model.head.probe": torch.zeros(1, 1, 8)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"of transformers and no CLIPModel \(SigLIP, say\)"):
        encode.load("ViT-B-16-SigLIP", tmp_path / "x.safetensors", device="cpu")
    (tmp_path / "config.json").write_text("[]")
    save_file(as_transformers(clip()), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"config.json is no configuration of transformers"):
        encode.load("ViT-B-32", tmp_path / "x.safetensors", device="cpu")


def test_the_first_tensor_that_differs_is_named_with_both_shapes(registry):
    wide = clip(vision_cfg={**VISION, "width": 128})
    for name, state in (("ours.safetensors", wide.state_dict()), ("theirs.safetensors", as_transformers(wide))):
        save_file(state, registry / name)
        with pytest.raises(ValueError, match=r"not fit 'small' \(visual.\w+ is .*128.* and not .*64.* more\)") as e:
            encode.load("small", registry / name, device="cpu")
        assert "\n" not in str(e.value)
    short = as_transformers(clip(text_cfg={**TEXT, "layers": 1}))
    save_file(short, registry / "x.safetensors")
    with pytest.raises(ValueError, match=r"transformer.resblocks.1.ln_1.weight is missing; .* more\): it is not whole"):
        encode.load("small", registry / "x.safetensors", device="cpu")
    cut = {key: value for key, value in as_transformers(clip()).items() if ".0.self_attn.k_proj" not in key}
    save_file(cut, registry / "x.safetensors")
    with pytest.raises(ValueError, match=r"resblocks.0.attn.in_proj_weight is missing"):
        encode.load("small", registry / "x.safetensors", device="cpu")


def test_the_layout_is_told(tmp_path):
    save_file(as_transformers(clip()), tmp_path / "x.safetensors")
    assert layouts.read(tmp_path / "x.safetensors")[1:] == (False, None)
    for act, quick in (("quick_gelu", True), ("gelu", False)):
        (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"hidden_act": act}}))
        assert layouts.read(tmp_path / "x.safetensors").quick_gelu == quick
    assert layouts.read(tmp_path / "x.safetensors").state.keys() == clip().state_dict().keys() - {"attn_mask"}
    assert CONFIG["embed_dim"] == layouts.read(tmp_path / "x.safetensors").state["visual.proj"].shape[1]
