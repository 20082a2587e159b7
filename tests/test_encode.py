"""The encoder against open_clip's own forward, PIL's pixels and a naive loop; every way in, every error."""

import hashlib
import json
import os
import pickle
import warnings
import zipfile

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip.model import CLIP
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from test_crops import outside
from upclose import crops, encode
from upclose.encode import fingerprint, layouts, sources, tiny

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3}
TEXT = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 1, "layers": 2}
CONFIG = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
WORDS = ("a", "photo", "of", "bird", "red", "white")


def clip(seed=0, **changes):
    torch.manual_seed(seed)
    model = CLIP(**{**CONFIG, **changes}).eval()
    with torch.no_grad():  # LayerNorms at their initial values would hide a forgotten one
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(0.3 * torch.randn_like(module.weight))
                module.bias.add_(0.3 * torch.randn_like(module.bias))
    return model


def encoder_of(model, size=32, squash=False, **options):
    tokenize = tiny.tokenizer(WORDS, 16)
    return encode.Encoder(
        sources.Parts(model, tokenize, size, (0.5, 0.4, 0.3), (0.3, 0.2, 0.1), squash), "it", **options
    )


@pytest.fixture
def encoder():
    return encoder_of(clip())


@pytest.fixture
def pictures():
    torch.manual_seed(1)
    low = [torch.rand(1, 3, 6, 7) for _ in range(4)]
    sizes = [(60, 80), (90, 50), (64, 64), (45, 100)]
    return [(255 * F.interpolate(x, s, mode="bilinear")[0]).to(torch.uint8) for x, s in zip(low, sizes)]


@pytest.fixture
def boxes(pictures):
    return torch.stack([crops.sample_boxes(*x.shape[1:], 5, seed=0, key=str(i)) for i, x in enumerate(pictures)])


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Two small models in open_clip's registry, "small" and "small-quickgelu", with the tags "gelu" and "quick"."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})
    tags = {
        "quick": {"hf_hub": "nobody/quick/", "quick_gelu": True},
        "gelu": {"hf_hub": "nobody/gelu/", "mean": (0, 0, 0)},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small", tags)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small-quickgelu", {"quick": tags["quick"]})
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "small.json").write_text(json.dumps(CONFIG))
    (folder / "small-quickgelu.json").write_text(json.dumps({**CONFIG, "quick_gelu": True}))
    open_clip.add_model_config(folder)
    return tmp_path


def openai_layout(model):
    facts = {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(16),
        "vocab_size": torch.tensor(100),
    }
    return {**{key: value.clone() for key, value in model.state_dict().items()}, **facts}


# the mathematics


def test_crops_are_what_a_naive_loop_over_pil_and_open_clip_gives(encoder, pictures, boxes):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (encoder.mean, encoder.std))
    for picture, rows, found in zip(pictures, boxes, encoder.encode_crops(pictures, boxes)):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        for box, feature in zip(rows.tolist(), found):
            pixels = image.crop(tuple(map(int, box))).resize((32, 32), Image.Resampling.BICUBIC)
            x = (torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255 - mean) / std
            with torch.no_grad():
                wanted = encoder.model.encode_image(x[None], normalize=True)[0]
            assert wanted @ feature > 1 - 1e-4


def test_the_short_ways_equal_open_clip(encoder):
    x = torch.randn(7, 3, 32, 32)
    feature, token = encoder.features(x, cls=True)
    torch.testing.assert_close(feature, encoder.model.encode_image(x, normalize=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(F.normalize(token @ encoder.visual.proj, dim=-1), feature, atol=1e-5, rtol=0)
    sentences = ["a photo of a red bird.", "bird", "a very long sentence " * 9]
    with torch.no_grad():
        wanted = encoder.model.encode_text(encoder.tokenize(sentences), normalize=True)
    torch.testing.assert_close(encoder.encode_text(sentences), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"ls_init_value": 0.1},
        {"pool_type": "avg"},
        {"final_ln_after_pool": True},
        {"attentional_pool": True},
        {"qk_norm": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_towers_take_open_clips_way(change):
    encoder = encoder_of(clip(vision_cfg={**VISION, **change}, quick_gelu=True))
    x = torch.randn(3, 3, 32, 32)
    feature, token = encoder.features(x, cls=True)
    torch.testing.assert_close(feature, encoder.model.encode_image(x, normalize=True), atol=1e-5, rtol=0)
    assert token.shape == (3, 64)
    if not change.keys() & {"pool_type", "attentional_pool"}:
        torch.testing.assert_close(F.normalize(token @ encoder.visual.proj, dim=-1), feature, atol=1e-5, rtol=0)


def test_shapes_norms_and_types(encoder, pictures, boxes):
    feature, token = encoder.encode_crops(pictures, boxes, cls=True)
    assert feature.shape == (4, 5, 24)
    assert token.shape == (4, 5, 64)
    assert feature.dtype == token.dtype == torch.float32
    torch.testing.assert_close(feature.norm(dim=-1), torch.ones(4, 5))
    assert (token.norm(dim=-1) - 1).abs().min() > 0.1
    assert not feature.requires_grad
    one, ladder = encoder.encode_crops(pictures[0], boxes[0]), boxes[0].expand(3, 5, 4)
    torch.testing.assert_close(one, feature[0], atol=1e-5, rtol=0)
    assert encoder.encode_crops(pictures[0], ladder).shape == (3, 5, 24)
    assert encoder.encode_crops(pictures, boxes[:, None].expand(4, 3, 5, 4)).shape == (4, 3, 5, 24)
    assert encoder.encode_images(pictures).shape == (4, 24) == encoder.encode_text(["a"] * 4).shape
    assert encoder.encode_images(pictures, cls=True)[1].shape == (4, 64)
    assert encoder.dim == 24
    assert encoder.logit_scale == pytest.approx(1 / 0.07)


def test_nothing_in_nothing_out(encoder, pictures):
    assert encoder.encode_crops(pictures[0], torch.empty(0, 4)).shape == (0, 24)
    assert encoder.encode_crops(pictures[0], torch.empty(0, 4), cls=True)[1].shape == (0, 64)
    assert encoder.encode_crops([], torch.empty(0, 3, 4)).shape == (0, 3, 24)
    assert encoder.encode_images([]).shape == encoder.encode_text([]).shape == (0, 24)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_a_result_does_not_depend_on_its_batch(pictures, boxes, batch_size):
    whole = encoder_of(clip(), batch_size=100).encode_crops(pictures, boxes)
    encoder = encoder_of(clip(), batch_size=batch_size)
    sizes = rows_of(encoder)
    torch.testing.assert_close(encoder.encode_crops(pictures, boxes), whole, atol=1e-5, rtol=0)
    assert sizes == [batch_size] * (20 // batch_size) + [20 % batch_size] * (20 % batch_size > 0)
    order = [2, 0, 3, 1]
    shuffled = encoder.encode_crops([pictures[i] for i in order], boxes[order])
    torch.testing.assert_close(shuffled, whole[order], atol=1e-5, rtol=0)


def rows_of(encoder):
    """A list to which the batch size of each later pass through the image tower is added."""
    sizes = []
    encoder.visual.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


def test_equal_boxes_are_encoded_once(encoder, pictures):
    sizes = rows_of(encoder)
    box = torch.tensor([[0, 0, 40, 40], [5, 5, 30, 30], [0.2, -0.3, 40.4, 39.8], [5, 5, 30, 30.0]])
    found = encoder.encode_crops(pictures[0], box)
    assert sizes == [2]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])
    encoder.encode_crops(pictures[:2], box.expand(2, 4, 4))
    assert sizes == [2, 4]


def test_whole_images_are_cropped_or_squashed(encoder, pictures):
    facts = {"mean": encoder.mean, "std": encoder.std}
    with torch.no_grad():
        centre = encoder.features(torch.stack([crops.whole(x, 32, **facts) for x in pictures]))
        box = [torch.tensor([[0, 0, x.shape[2], x.shape[1]]]) for x in pictures]
        squashed = encoder.features(torch.cat([crops.extract(x, b, 32, **facts) for x, b in zip(pictures, box)]))
    torch.testing.assert_close(encoder.encode_images(pictures), centre, atol=1e-5, rtol=0)
    found = encoder_of(clip(), squash=True).encode_images(pictures)
    torch.testing.assert_close(found, squashed, atol=1e-5, rtol=0)
    assert (centre - squashed).abs().max() > 1e-3


def test_gradients_reach_the_layer_norms_and_the_pixels(encoder):
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    feature, token = encoder.features(x, cls=True)
    target = torch.randn_like(feature)
    (feature * target).sum().backward()
    found = {name: p.grad.clone() for name, p in encoder.visual.named_parameters()}
    pixels = x.grad.clone()
    encoder.visual.zero_grad()
    x.grad = None
    (encoder.model.encode_image(x, normalize=True) * target).sum().backward()
    torch.testing.assert_close(pixels, x.grad, atol=1e-5, rtol=1e-4)
    for name, p in encoder.visual.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-4, rtol=1e-3)
    assert token.requires_grad


# weights in use


def test_the_fingerprint_follows_the_weights(encoder):
    first = encoder.fingerprint
    assert first == encoder.fingerprint == encoder_of(clip()).fingerprint != encoder_of(clip(1)).fingerprint
    assert first != encoder_of(clip(quick_gelu=True)).fingerprint
    norm = encoder.visual.transformer.resblocks[1].ln_1.weight
    optimizer = torch.optim.SGD([norm], lr=0.1)
    encoder.features(torch.randn(2, 3, 32, 32))[:, 0].sum().backward()
    optimizer.step()
    adapted = encoder.fingerprint
    assert adapted != first
    seen = {first, adapted}
    matrix = encoder.visual.transformer.resblocks[0].mlp[0].weight
    with torch.no_grad():
        matrix[0, :2] = matrix[1, :2].clone()
    seen.add(encoder.fingerprint)
    for change in (
        lambda: norm.data.mul_(-1),
        lambda: norm.data.copy_(norm.data.flip(0)),  # the same numbers in another order
        lambda: matrix.data.copy_(matrix.data.flip(0)),
        lambda: matrix.data.copy_(torch.stack([matrix.data[1], matrix.data[0], *matrix.data[2:]])),
    ):
        change()
        assert encoder.fingerprint not in seen
        seen.add(encoder.fingerprint)
    encoder.model.load_state_dict(clip().state_dict())
    assert encoder.fingerprint == first


@pytest.mark.parametrize("count", [1, 3, 1001, 3 * fingerprint.BLOCK // 2 + 4])
def test_a_checksum_sees_every_bit_and_every_order(count):
    draw = torch.Generator().manual_seed(count)
    weight = torch.randn(count, generator=draw)
    assert fingerprint.checksum(weight) == fingerprint.checksum(weight.clone().view(1, -1))
    for i in {0, count // 2, count - 1}:
        other = weight.clone()
        other.view(torch.uint8)[4 * i] ^= 1
        assert fingerprint.checksum(other) != fingerprint.checksum(weight)
        swapped = weight.clone()
        swapped[[i, (i + 2) % count]] = weight[[(i + 2) % count, i]]
        assert (fingerprint.checksum(swapped) == fingerprint.checksum(weight)) == torch.equal(swapped, weight)
    inside = torch.cat([weight[:1], weight])[1:]  # begins in the middle of a word
    changed = torch.cat([weight[:1], weight.flip(0)])[1:]
    assert (fingerprint.checksum(inside) == fingerprint.checksum(changed)) == (count == 1)


def test_the_hash_is_the_one_that_recorded_runs_name():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).view(2, 3))
        layer.bias.zero_()
    assert fingerprint.of(layer) == "902b07dcb790a140f7e82a4bd55c9a89"


def test_text_is_encoded_once_for_its_weights(encoder):
    asked = []
    tokenize = encoder.tokenize
    encoder.tokenize = lambda sentences: asked.extend(sentences) or tokenize(sentences)
    first = encoder.encode_text(["a bird", "a nest", "a bird"])
    assert torch.equal(first[0], first[2])
    assert torch.equal(encoder.encode_text(["a nest", "an egg"])[0], first[1])
    assert asked == ["a bird", "a nest", "an egg"]
    with torch.no_grad():
        encoder.visual.ln_post.weight.mul_(2)
    encoder.encode_text(["a bird"])
    assert len(asked) == 3
    with torch.no_grad():
        encoder.model.ln_final.weight[0] += 1
    assert not torch.allclose(encoder.encode_text(["a bird"]), first[:1])
    assert asked[3:] == ["a bird"]


def test_embed_text_is_the_mean_of_templates_and_the_rows_of_descriptions(encoder):
    label = [["a photo of a gull.", "a sketch of a gull."], "a tern."]
    description = [["white", "a long bill", "grey"], ["black cap"]]
    text = encode.embed_text(encoder, label, description)
    rows = encoder.encode_text(label[0])
    torch.testing.assert_close(text.label[0], F.normalize(rows[0] + rows[1], dim=0))
    torch.testing.assert_close(text.label[1], encoder.encode_text(["a tern."])[0])
    torch.testing.assert_close(text.description, encoder.encode_text(description[0] + description[1]))
    assert text.owner.tolist() == [0, 0, 0, 1]


def test_embed_text_names_the_class_before_it_encodes(encoder):
    encoder.tokenize = None
    with pytest.raises(ValueError, match=r"'tern' \(class 1\) has no description"):
        encode.embed_text(encoder, ["a", "b"], [["x"], []], ["gull", "tern"])
    with pytest.raises(ValueError, match="class 'gull' has no prompt"):
        encode.embed_text(encoder, [[], "b"], [["x"], ["y"]], ["gull", "tern"])
    with pytest.raises(ValueError, match="class 1 has the text 'yellow'"):
        encode.embed_text(encoder, ["a", "b"], [["x"], "yellow"])
    with pytest.raises(ValueError, match="2 class prompts but descriptions for 1"):
        encode.embed_text(encoder, ["a", "b"], [["x"]])


# devices


def test_out_of_memory_halves_the_batch_and_goes_on(encoder, pictures, boxes):
    wanted = encoder.encode_crops(pictures, boxes)
    sizes = []

    def small_device(module, args):
        sizes.append(len(args[0]))
        if len(args[0]) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")

    encoder.visual.register_forward_pre_hook(small_device)
    torch.testing.assert_close(encoder.encode_crops(pictures, boxes), wanted, atol=1e-5, rtol=0)
    assert sizes == [20, 10, 5, 5, 5, 5]
    encoder.encode_crops(pictures, boxes)
    assert sizes[6:] == [5, 5, 5, 5]
    assert encoder.batch_size == 64


def test_what_does_not_fit_may_also_be_the_extraction(encoder, pictures, boxes, monkeypatch):
    wanted, whole = encoder.encode_crops(pictures, boxes), encoder.encode_images(pictures)
    asked, real = [], encoder._crops

    def small_device(some, rows):
        asked.append(sum(map(len, rows)))
        if asked[-1] > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(some, rows)

    monkeypatch.setattr(encoder, "_crops", small_device)
    torch.testing.assert_close(encoder.encode_crops(pictures, boxes), wanted, atol=1e-5, rtol=0)
    assert asked == [20, 10, 5, 5, 5, 5]
    moved, encoder._fits = [], None

    def once(picture):
        moved.append(picture)
        if len(moved) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return picture

    monkeypatch.setattr(encoder, "_move", once)
    torch.testing.assert_close(encoder.encode_images(pictures), whole, atol=1e-5, rtol=0)
    assert encoder._fits == 2


def test_a_device_too_small_for_one_picture_says_so(encoder, pictures):
    def full(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    encoder.visual.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError, match="'it' does not fit cpu with one picture in fp32: take a smaller"):
        encoder.encode_images(pictures)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_tensor_is_left_on_another_device(monkeypatch, precision):
    monkeypatch.setattr(torch.Tensor, "numpy", outside(torch.Tensor.numpy))
    monkeypatch.setattr(torch.Tensor, "cpu", outside(torch.Tensor.cpu))
    box = [crops.sample_boxes(30, 30, 5, key=key) for key in "ab"]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = CLIP(**CONFIG)
        monkeypatch.setattr(model, "to", lambda device: model)  # fake parameters are there already and cannot be moved
        encoder = encoder_of(model, device="cuda", precision=precision)
        feature, token = encoder.features(torch.empty(5, 3, 32, 32, device="cuda"), cls=True)
        assert feature.device.type == token.device.type == "cuda"
        assert feature.dtype == token.dtype == torch.float32
        assert feature.shape == (5, 24)
        # a fake tensor has no values: what looks at them, on the host before anything is moved, is left out
        monkeypatch.setattr(fingerprint, "state", lambda _: ())
        monkeypatch.setattr(encode.encoder, "_plain_text", lambda _: False)
        encoder.tokenize = lambda text: torch.zeros(len(text), 16, dtype=torch.int64, device="cpu")
        for squash in (False, True):
            encoder.squash = squash
            for device in ("cpu", "cuda"):
                some = [torch.empty(3, h, w, dtype=torch.uint8, device=device) for h, w in ((40, 50), (60, 30))]
                found = [*encoder.encode_crops(some, box, cls=True), *encoder.encode_images(some, cls=True)]
                found += [encoder.encode_crops(some[0], box[0]), encoder.encode_images(some)]
                found.append(encoder.encode_text(["a bird", "a nest", "a bird"]))
                assert {(x.device.type, x.dtype) for x in found} == {("cuda", torch.float32)}
                shapes = [(2, 5, 24), (2, 5, 64), (2, 24), (2, 64), (5, 24), (2, 24), (3, 24)]
                assert [tuple(x.shape) for x in found] == shapes
            ready = (encoder.prepare(picture, rows) for picture, rows in zip(some, box))
            found = encoder.encode_views(ready, cls=True)
            assert [tuple(x.shape) for x in found] == [(2, 24), (2, 5, 24), (2, 64), (2, 5, 64)]
            assert {(x.device.type, x.dtype) for x in found} == {("cuda", torch.float32)}


def test_on_a_gpu_many_pictures_are_cut_at_once(pictures, boxes, monkeypatch):
    encoder = encoder_of(clip(), batch_size=7)
    wanted = encoder._crops(pictures, list(boxes))
    monkeypatch.setattr(encoder, "device", torch.device("meta"))  # anything but the CPU
    monkeypatch.setattr(encoder, "_move", lambda picture: picture)
    asked = []

    def extract(some, box, size, **facts):
        asked.append(len(some))
        return crops._extract_banded(some, box, size, torch.float32, **facts)

    monkeypatch.setattr(encode.encoder.crops, "extract", extract)
    ours = encoder._crops(pictures, list(boxes))
    one_by_one = torch.cat([encoder._crops([x], [rows]) for x, rows in zip(pictures, boxes)])
    assert asked == [4, 1, 1, 1, 1]
    assert (ours - one_by_one).abs().max() < 1.01 / 255 / min(encoder.std)
    assert (ours - wanted).abs().max() < 2.01 / 255 / min(encoder.std)
    uneven = encoder._crops(pictures[:3], [boxes[0][:1], boxes[1], boxes[2][:3]])
    torch.testing.assert_close(uneven, torch.cat([ours[:1], ours[5:13]]), atol=1.01 / 255 / 0.1, rtol=0)


def test_groups_of_pictures_fit_the_block(monkeypatch):
    sliver = [(1, 4000), (4000, 1), (4000, 1), (1, 4000)]
    assert list(encode.encoder._groups([(400, 500)] * 5)) == [[0, 1, 2, 3, 4]]
    monkeypatch.setattr(crops, "BLOCK_BYTES", 15 * 8000)
    assert list(encode.encoder._groups(sliver)) == [[0], [1, 2], [3]]
    assert list(encode.encoder._groups([(300, 300), (1, 1)])) == [[0], [1]]  # one picture is a group, however large
    assert list(encode.encoder._groups([])) == []


def test_bf16_is_close_and_says_when_it_is_slow(registry, pictures):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        half = encode.load("small", precision="bf16", device="cpu")
    assert any("no bf16 instructions" in str(w.message) for w in caught) == (not encode.bf16_on_cpu())
    with pytest.warns(UserWarning, match="random weights"):
        full = encode.load("small", device="cpu")
    assert (half.encode_images(pictures) * full.encode_images(pictures)).sum(-1).min() > 0.999
    assert half.encode_images(pictures).dtype == torch.float32
    assert half.fingerprint == full.fingerprint
    assert half.precision != full.precision


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16", "device": "cpu"}, "'fp16' is for GPUs"),
        ({"precision": "fp64"}, "unknown precision 'fp64'"),
        ({"device": "abacus"}, "'abacus' cannot be used"),
        ({"device": "cuda:99"}, "'cuda:99' cannot be used"),
    ],
)
def test_wrong_precision_or_device(options, message):
    with pytest.raises(ValueError, match=message):
        encode.load("birdlets-tiny", **options)


def test_to_is_a_copy_with_the_same_weights_and_batch_size(encoder, pictures):
    first = encoder_of(clip(), batch_size=7, precision="bf16")
    other = first.to("cpu")
    assert (other.batch_size, other.precision) == (7, "bf16")
    assert other.fingerprint == first.fingerprint == encoder.fingerprint
    with torch.no_grad():
        other.visual.proj.zero_()
    assert first.fingerprint == encoder.fingerprint != other.fingerprint
    far = first.to("meta")
    assert {p.device.type for p in far.model.parameters()} == {"meta"}
    assert {p.device.type for p in first.model.parameters()} == {"cpu"} == {first.device.type}


def test_an_encoder_may_be_prepared_for_a_device_that_is_elsewhere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = encode.load("birdlets-tiny", device="cpu", precision="fp16", runs_on="cuda")
    assert (encoder.device.type, encoder.precision) == ("cpu", "fp16")
    assert encoder.batch_size == encode.encoder._default_batch_size(48, torch.device("cuda")) != 64
    assert encoder.to("meta").batch_size == encoder.batch_size


def test_it_travels_to_another_process(encoder, pictures):
    cloudpickle = pytest.importorskip("cloudpickle")
    other = cloudpickle.loads(cloudpickle.dumps(encoder))
    assert other.fingerprint == encoder.fingerprint
    assert torch.equal(other.encode_images(pictures), encoder.encode_images(pictures))


@pytest.mark.slow
def test_compiled_gives_the_same(pictures, boxes):
    wanted = encoder_of(clip()).encode_crops(pictures, boxes)
    found = encoder_of(clip(), compile=True, batch_size=8).encode_crops(pictures, boxes)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


# ways in


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("layout", ["pt", "module", "wrapped", "script", "openai safetensors", "safetensors"])
def test_checkpoints_load_into_the_right_architecture_and_activation(registry, pictures, layout):
    source = clip(quick_gelu=True)
    path = registry / ("x.safetensors" if layout.endswith("safetensors") else "x.pt")
    if layout == "safetensors":
        save_file(source.state_dict(), path)
    elif layout == "openai safetensors":
        save_file(openai_layout(source), path)
    elif layout == "script":
        for name, value in openai_layout(source).items():
            if name in ("input_resolution", "context_length", "vocab_size"):
                if hasattr(source, name):
                    delattr(source, name)
                source.register_buffer(name, value)
        mask = source.attn_mask
        del source.attn_mask
        source.attn_mask = mask  # a constant of the archive, as in the published ones
        image, text = torch.zeros(1, 3, 32, 32), torch.zeros(1, 16, dtype=torch.long)
        torch.jit.trace_module(source, {"encode_image": image, "encode_text": text}, check_trace=False).save(path)
    else:
        state = openai_layout(source)
        if layout == "module":
            state = {f"module.{key}": value for key, value in state.items()}
        torch.save({"epoch": 3, "state_dict": state} if layout == "wrapped" else state, path)
    encoder = encode.load("small-quickgelu", pretrained=path, device="cpu")
    assert any(isinstance(module, QuickGELU) for module in encoder.model.modules())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder.features(x), source.encode_image(x, normalize=True), atol=1e-5, rtol=0)
    if layout == "safetensors":
        return
    with pytest.raises(ValueError, match=r"with QuickGELU, which 'small' does without: load\('small-quickgelu', pret"):
        encode.load("small", pretrained=path, device="cpu")
    alone = encode.load(str(path), device="cpu")
    assert alone.fingerprint == encoder.fingerprint
    assert alone.image_size == 32


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_openais_layout_of_vit_b_32_is_known_by_its_shapes(tmp_path, suffix):
    name = "ViT-B-32-quickgelu"
    source = open_clip.create_model(name, pretrained_text=False).eval()
    state = {key: value.half() for key, value in source.state_dict().items()}  # as it was published
    state |= {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77)}
    state |= {"vocab_size": torch.tensor(49408)}
    path = tmp_path / f"ViT-B-32{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with pytest.raises(ValueError, match=r"with QuickGELU.*load\('ViT-B-32-quickgelu', pretrained="):
        encode.load("ViT-B-32", pretrained=path, device="cpu")
    named, alone = encode.load(name, pretrained=path, device="cpu"), encode.load(str(path), device="cpu")
    assert named.fingerprint == alone.fingerprint
    x = torch.randn(1, 3, 224, 224)
    for encoder in (named, alone):
        tower = encoder.visual.transformer
        assert (tower.width, tower.layers, encoder.dim, encoder.image_size) == (768, 12, 512, 224)
        assert tower.resblocks[0].attn.num_heads == 12
        assert encoder.visual.conv1.weight.shape == (768, 3, 32, 32)
        activations = [type(m) for m in encoder.model.modules() if isinstance(m, (QuickGELU, nn.GELU))]
        assert activations == [QuickGELU] * 24  # 12 layers of either tower
        assert (encoder.features(x) @ source.encode_image(x, normalize=True).T).item() > 0.999


def test_openais_layout_of_another_shape(registry):
    wide = openai_layout(clip(quick_gelu=True, vision_cfg={**VISION, "width": 128}))
    torch.save(wide, registry / "x.pt")
    with pytest.raises(ValueError, match=r"does not fit 'small-quickgelu' \(visual.*\(128,\) and not \(64,\)"):
        encode.load("small-quickgelu", registry / "x.pt", device="cpu")
    wide["visual.ln_post.weight"] = wide["visual.ln_post.weight"][:64].clone()
    save_file(wide, registry / "x.safetensors")
    with pytest.raises(ValueError, match=r"begins like OpenAI's layout but is not whole \(.*ln_post"):
        encode.load(str(registry / "x.safetensors"), device="cpu")


def test_a_gelu_checkpoint_loads_with_gelu(registry):
    save_file(clip().state_dict(), registry / "x.safetensors")
    with pytest.warns(
        UserWarning, match=r"preprocessing that .*x\.safetensors .*'small' \(its tags differ in it\)"
    ) as w:
        encoder = encode.load("small", pretrained=registry / "x.safetensors", device="cpu")
    assert w[0].filename == __file__
    assert not any(isinstance(module, QuickGELU) for module in encoder.model.modules())
    assert encoder.fingerprint == encoder_of(clip()).fingerprint
    assert encoder.mean == open_clip.OPENAI_DATASET_MEAN


@pytest.mark.filterwarnings("error")
def test_a_file_of_a_model_whose_tags_agree_gets_their_preprocessing(registry, monkeypatch):
    half = (0.5, 0.5, 0.5)
    facts = {"mean": half, "std": half, "resize_mode": "squash"}
    tags = {"one": {"hf_hub": "nobody/one/", **facts}, "two": {"hf_hub": "nobody/two/", **facts}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small", tags)
    save_file(clip().state_dict(), registry / "x.safetensors")
    encoder = encode.load("small", registry / "x.safetensors", device="cpu")
    assert encoder.mean == encoder.std == half
    assert encoder.squash
    siglip = sources._published("ViT-B-16-SigLIP", "mine.pt", ["webli"])
    assert siglip == facts
    tags["two"]["std"] = (0.4, 0.5, 0.5)
    with pytest.warns(UserWarning, match="its tags differ"):
        assert encode.load("small", registry / "x.safetensors", device="cpu").std == open_clip.OPENAI_DATASET_STD
    tags.clear()
    with pytest.warns(UserWarning, match="it has no tags"):
        encode.load("small", registry / "x.safetensors", device="cpu")


def test_a_downloaded_file_that_is_damaged_is_named(registry, monkeypatch):
    path = registry / "x.safetensors"
    monkeypatch.setattr(open_clip, "download_pretrained", lambda facts: str(path))
    save_file(clip().state_dict(), path)
    content = path.read_bytes()
    for wrong in (b"", content[: len(content) // 2], b"not found"):
        path.write_bytes(wrong)
        with pytest.raises(
            ValueError, match=rf"{path}, downloaded as 'gelu' of 'small', cannot be loaded .*remove"
        ) as e:
            encode.load("small", "gelu", device="cpu")
        assert "\n" not in str(e.value)
    save_file(clip(vision_cfg={**VISION, "width": 128}).state_dict(), path)
    with pytest.raises(ValueError, match="belongs to another model") as error:
        encode.load("small", "gelu", device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:nothing tells the preprocessing")
def test_half_precision_checkpoints_become_float32(registry):
    path = registry / "x.pt"
    torch.save({key: value.half() for key, value in clip().state_dict().items()}, path)
    encoder = encode.load("small", pretrained=path, device="cpu")
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}


def test_a_tag_brings_its_preprocessing_and_weights(registry, monkeypatch):
    save_file(clip(3).state_dict(), registry / "x.safetensors")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda facts: str(registry / "x.safetensors"))
    encoder = encode.load("small", "gelu", device="cpu")
    assert encoder.mean == (0, 0, 0)
    assert encoder.fingerprint == encoder_of(clip(3)).fingerprint


def test_birdlets_checkpoints(tmp_path, pictures):
    config = {"embed_dim": 16, "vision_cfg": {**VISION, "head_width": 32}, "text_cfg": {**TEXT, "heads": 2}}
    model = tiny.build(config, WORDS, seed=5)
    tiny.save(tmp_path, "mine", model, config, WORDS)
    encoder = encode.load(str(tmp_path / "mine.safetensors"), device="cpu")
    again = encode.load("birdlets-tiny", pretrained=tmp_path / "mine.safetensors", device="cpu")
    assert encoder.fingerprint == again.fingerprint
    assert encoder.dim == 16
    assert encoder.image_size == 32
    with torch.no_grad():
        wanted = encoder.model.encode_text(encoder.tokenize(["a red bird"]), normalize=True)
    torch.testing.assert_close(encoder.encode_text(["a red bird"]), wanted, atol=1e-5, rtol=0)


def test_random_weights_are_announced_and_the_same_everywhere(registry):
    with pytest.warns(UserWarning, match="'small' without pretrained has random weights; tags: quick, gelu"):
        first = encode.load("small", device="cpu")
    before = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match="random weights"):
        assert encode.load("small", device="cpu").fingerprint == first.fingerprint
    assert torch.equal(before, torch.random.get_rng_state())


def test_resnets_and_coca(pictures):
    resnet = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    encoder = encoder_of(clip(vision_cfg=resnet), size=64)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder.features(x), encoder.model.encode_image(x, normalize=True), atol=1e-5, rtol=0)
    for call in (lambda: encoder.features(x, cls=True), lambda: encoder.encode_images(pictures, cls=True)):
        with pytest.raises(ValueError, match=r"the image tower of 'it' \(ModifiedResNet\) has no \[CLS\] token"):
            call()
    torch.manual_seed(0)
    coca = CoCa(
        embed_dim=64,
        multimodal_cfg={
            "context_length": 16,
            "vocab_size": 100,
            "width": 64,
            "heads": 1,
            "layers": 1,
            "dim_head": 64,
        },
        text_cfg={**TEXT, "embed_cls": True, "output_tokens": True, "context_length": 16},
        vision_cfg={**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    )
    encoder = encoder_of(coca)
    x = torch.randn(2, 3, 32, 32)
    feature, token = encoder.features(x, cls=True)
    torch.testing.assert_close(feature, coca.encode_image(x), atol=1e-5, rtol=0)
    assert token.shape == (2, 64)
    assert encoder.encode_text(["a bird"]).shape == (1, 64)


# errors, each before work


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: pytest.fail("a model was built"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-33", None, "unknown model 'ViT-B-33': nearest: ViT-B-32"),
        ("birdlet-tiny", None, "unknown model 'birdlet-tiny': nearest: birdlets-tiny"),
        ("vit-b-32", "openai", "unknown model 'vit-b-32': nearest: ViT-B-32"),
        ("ViT-B-32-quickgelu", "openia", "no weights 'openia': nearest: openai"),
        (
            "ViT-B-32",
            "openai",
            r"'openai' was trained with QuickGELU.*load\('ViT-B-32-quickgelu', pretrained='openai'\)",
        ),
        ("ViT-B/32", "openai", r"load\('ViT-B-32-quickgelu', pretrained='openai'\)"),
        ("ViT-B-32", "metaclip_400m", r"load\('ViT-B-32-quickgelu', pretrained='metaclip_400m'\)"),
        ("RN50", "openai", r"load\('RN50-quickgelu', pretrained='openai'\)"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", r"but 'ViT-B-32' has: load\('ViT-B-32', "),
        ("ViT-e-14", "openai", "no published weights"),
        ("hf-hub:someone/model", "openai", "has its own weights: leave pretrained='openai' out"),
    ],
)
def test_wrong_names_and_tags(name, pretrained, message):
    with pytest.raises(ValueError, match=message) as error:
        encode.load(name, pretrained, device="cpu")
    assert "\n" not in str(error.value)


def test_the_model_to_use_instead_always_exists():
    for name, tag in open_clip.list_pretrained():
        facts = open_clip.get_pretrained_cfg(name, tag)
        try:
            sources._check_activation(name, tag, facts)
        except ValueError as error:
            other = str(error).split("load('")[1].split("'")[0]
            assert tag in open_clip.list_pretrained_tags_by_model(other), (name, tag, other)
            sources._check_activation(other, tag, facts)


@pytest.mark.usefixtures("no_work")
def test_a_download_that_is_not_possible(monkeypatch):
    def offline(*_):
        raise OSError("Name or service not known\nmore")

    monkeypatch.setattr(sources, "download_pretrained_from_hf", offline)
    monkeypatch.setattr(sources, "_away", lambda _: "")
    with pytest.raises(
        ConnectionError, match=r"'openai' of 'ViT-B-32-quickgelu' .* \(Name or service not known\): fetch"
    ):
        encode.load("ViT-B-32-quickgelu", "openai", device="cpu")


@pytest.mark.usefixtures("no_work")
def test_files_that_are_not_there(tmp_path):
    (tmp_path / "vit_b_32.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"vit_b_23.pt: correct the path \(nearest: vit_b_32.pt\)"):
        encode.load("ViT-B-32", tmp_path / "vit_b_23.pt", device="cpu")
    with pytest.raises(FileNotFoundError, match="nor a folder"):
        encode.load("ViT-B-32", tmp_path / "none" / "x.pt", device="cpu")
    with pytest.raises(FileNotFoundError, match="is a folder: give the checkpoint file in it"):
        encode.load("ViT-B-32", str(tmp_path), device="cpu")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        encode.load(str(tmp_path / "x.safetensors"), device="cpu")


class Arbitrary:
    pass


@pytest.mark.usefixtures("no_work")
def test_files_that_are_no_checkpoints(tmp_path):
    whole = clip().state_dict()
    torch.save(whole, tmp_path / "x.pt")
    save_file(whole, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        content = (tmp_path / name).read_bytes()
        for size in (0, 5, len(content) // 2, len(content) - 9):
            (tmp_path / name).write_bytes(content[:size])
            with pytest.raises(ValueError, match=rf"{name} \({size:,} bytes\) cannot be read as weights .*cut short"):
                encode.load("ViT-B-32", tmp_path / name, device="cpu")
    torch.save({"model": Arbitrary()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"asks for test_encode.Arbitrary to be executed, and nothing of it was; save"):
        encode.load("ViT-B-32", tmp_path / "x.pt", device="cpu")
    torch.save({"input_resolution": torch.tensor(32), "text_projection": torch.zeros(4, 4)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="begins like OpenAI's layout but is not whole"):
        encode.load(str(tmp_path / "x.pt"), device="cpu")
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        encode.load("ViT-B-32", tmp_path / "x.pt", device="cpu")


@pytest.mark.filterwarnings("ignore:nothing tells the preprocessing")
def test_a_checkpoint_of_another_shape_names_the_model_that_has_it(registry):
    wide = clip(vision_cfg={**VISION, "width": 128})
    save_file(wide.state_dict(), registry / "x.safetensors")
    with pytest.raises(
        ValueError, match=r"does not fit 'small' \(visual.*\(128,\) and not \(64,\).* and \d+ more\): name"
    ):
        encode.load("small", registry / "x.safetensors", device="cpu")
    save_file(clip().state_dict(), registry / "x.safetensors")
    (registry / "configs" / "wide.json").write_text(json.dumps({**CONFIG, "vision_cfg": {**VISION, "width": 128}}))
    open_clip.add_model_config(registry / "configs" / "wide.json")
    with pytest.raises(ValueError, match="its shapes are those of small, small-quickgelu"):
        encode.load("wide", registry / "x.safetensors", device="cpu")
    with pytest.raises(ValueError, match=r"does not tell its architecture .*load\('small', pretrained="):
        encode.load(str(registry / "x.safetensors"), device="cpu")


def test_pictures_and_boxes_that_do_not_fit(encoder, pictures, boxes):
    sizes = rows_of(encoder)
    with pytest.raises(ValueError, match="4 pictures but boxes for 3"):
        encoder.encode_crops(pictures, boxes[:3])
    with pytest.raises(ValueError, match=r"torch.float32 \(3, 60, 80\): it must be uint8"):
        encoder.encode_crops(pictures[0].float(), boxes[0])
    with pytest.raises(ValueError, match=r"uint8 \(1, 60, 80\): it must be uint8 \(3, H, W\)"):
        encoder.encode_images([pictures[0], pictures[0][:1]])
    with pytest.raises(ValueError, match=r"boxes have shape \(4,\)"):
        encoder.encode_crops(pictures[0], boxes[0, 0])
    with pytest.raises(
        ValueError, match=r"box \(.*99.0.*\) is empty or not inside the picture of width 80 and height 60"
    ):
        encoder.encode_crops(pictures[0], torch.tensor([[0, 0, 9, 9], [0, 0, 99, 9.0]]))
    with pytest.raises(ValueError, match=r"shapes \[\(4,\), \(5,\)\]: give each picture as many boxes"):
        encoder.encode_crops(pictures, [*boxes[:3], boxes[3][:4]])
    with pytest.raises(TypeError, match=r"list of sentences: give \['a bird'\]"):
        encoder.encode_text("a bird")
    assert not sizes


def test_identity_downloads_nothing_and_is_the_fingerprint_of_what_is_here(monkeypatch):
    monkeypatch.setattr(encode.sources, "find", lambda *_: pytest.fail("published weights were looked for"))
    assert encode.identity("ViT-B-32-quickgelu", "openai") == "ViT-B-32-quickgelu:openai"
    monkeypatch.undo()
    assert encode.identity("birdlets-tiny") == encode.load("birdlets-tiny", device="cpu").fingerprint
    with pytest.raises(ValueError, match="no-such-model"):
        encode.identity("no-such-model", "openai")


class Writes(torch.nn.Module):
    """A module whose archive writes a file when it is loaded as a program."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.layer = torch.nn.Linear(3, 2)
        self.register_buffer("count", torch.arange(4))

    @torch.jit.export
    def __getstate__(self):
        return (self.path, self.layer.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]) -> None:
        self.path = state[0]
        self.training = state[2]
        torch.save(state[1], state[0])

    def forward(self, x):
        return self.layer(x)


def test_the_program_in_an_archive_is_not_executed(tmp_path):
    plain = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.jit.script(plain).save(tmp_path / "plain.pt")
    found = layouts.script_state(tmp_path / "plain.pt")
    assert found.keys() == plain.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in plain.state_dict().items())

    mark = tmp_path / "was-here"
    try:
        torch.jit.script(Writes(str(mark))).save(tmp_path / "bad.pt")
    except Exception as error:  # a release that cannot write such an archive
        pytest.skip(f"torch cannot make the archive: {type(error).__name__}")
    mark.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"bad\.pt"):
        encode.load("ViT-B-32", tmp_path / "bad.pt", device="cpu")
    assert not mark.exists()


def test_an_archive_that_asks_for_other_functions_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-here"),)

    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Evil()))
        archive.writestr("x/constants.pkl", b"")
    with pytest.raises(ValueError, match=r"mkdir"):
        encode.load("ViT-B-32", tmp_path / "x.pt", device="cpu")
    assert not (tmp_path / "was-here").exists()


@pytest.fixture
def hub(monkeypatch):
    """The hub, which cannot be reached; counts how often it is tried."""

    class Hub:
        tried = 0

        def head(self, *_, timeout):
            self.tried += 1
            assert not sources.hub.HF_HUB_OFFLINE, "the hub's client refuses every request then"
            raise OSError("Name or service not known")

    there = Hub()
    sources._away.cache_clear()
    monkeypatch.setattr(sources, "get_session", lambda: there)
    monkeypatch.setattr(sources.hub, "HF_HUB_OFFLINE", False)
    yield there
    sources._away.cache_clear()


def nothing():
    raise FileNotFoundError("not in the cache")


def test_a_hub_that_cannot_be_reached_is_tried_once_a_process(hub):
    for _ in range(3):
        with pytest.raises(ConnectionError, match=r"cannot be reached: Name or .*HF_HUB_OFFLINE=1.*not in the cache"):
            sources._fetch(nothing)
    assert hub.tried == 1
    assert sources.hub.HF_HUB_OFFLINE is False


def test_what_is_in_the_cache_needs_no_hub(hub):
    assert sources._fetch(lambda: sources.hub.HF_HUB_OFFLINE) is True
    assert hub.tried == 0


def test_the_hub_is_asked_when_it_answers(hub, monkeypatch):
    monkeypatch.setattr(hub, "head", lambda *_, **__: None)
    assert sources._fetch(lambda: nothing() if sources.hub.HF_HUB_OFFLINE else "fetched") == "fetched"


def test_hf_hub_offline_is_respected(hub, monkeypatch):
    monkeypatch.setattr(sources.hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set; with the cache alone: not in the cache"):
        sources._fetch(nothing)
    assert hub.tried == 0


def test_weights_of_the_hubs_cache_are_believed_with_their_checksum_only(registry, monkeypatch):
    save_file(clip(3).state_dict(), registry / "x")
    blob = registry / hashlib.sha256((registry / "x").read_bytes()).hexdigest()
    (registry / "x").rename(blob)
    (registry / "x.safetensors").symlink_to(blob)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda facts: str(registry / "x.safetensors"))
    assert encode.load("small", "gelu", device="cpu").fingerprint == encoder_of(clip(3)).fingerprint
    save_file(clip(4).state_dict(), blob)
    with pytest.raises(ValueError, match=r"is not what was downloaded: its sha256 is not .*; remove it"):
        encode.load("small", "gelu", device="cpu")
