import hashlib
import json
import shutil

import open_clip
import pytest
import torch

from upclose import birdlets
from upclose.encode import tiny

WORDS = ["a", "photo", "of", "orange", "billed", "tern", "has", "which", "beak"]


@pytest.fixture(scope="module")
def model():
    return tiny.build(tiny.CONFIG, WORDS, seed=3).eval()


def test_a_word_is_a_run_of_letters():
    assert tiny.words_of("A photo of an Orange-billed TERN, 2 eyes.") == [
        "a",
        "photo",
        "of",
        "an",
        "orange",
        "billed",
        "tern",
        "eyes",
    ]


def test_tokens():
    begin = 1 + len(WORDS) + tiny.BUCKETS
    rows = tiny.tokenizer(WORDS)(["a photo.", ""])
    assert rows.shape == (2, tiny.CONTEXT)
    assert rows[0].tolist() == [begin, 1, 2, begin + 1] + [0] * (tiny.CONTEXT - 4)
    assert rows[1, :3].tolist() == [begin, begin + 1, 0]


def test_unknown_words_are_spread_over_buckets():
    rows = tiny.tokenizer(WORDS)([f"a {chr(97 + i)}{chr(97 + j)}zq" for i in range(10) for j in range(10)])[:, 2]
    assert rows.min() > len(WORDS)
    assert rows.max() <= len(WORDS) + tiny.BUCKETS
    assert rows.unique().numel() > tiny.BUCKETS / 2


def test_long_text_keeps_its_end():
    rows = tiny.tokenizer(WORDS)(["tern " * 40, "tern " * 30])
    assert (rows[0] == rows[1]).all()
    assert rows[0].argmax() == tiny.CONTEXT - 1


def test_the_vocabulary_knows_what_is_said_of_birds():
    known = set(birdlets.vocabulary())
    for bird in birdlets.held_out()["validation"]:
        assert set(tiny.words_of(bird.name)) <= known
    for said in birdlets.descriptors(birdlets.held_out()["validation"]).values():
        assert {word for words in said for word in tiny.words_of(words)} <= known


def test_one_seed_one_model(model):
    other = tiny.build(tiny.CONFIG, WORDS, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert not torch.equal(model.visual.proj, tiny.build(tiny.CONFIG, WORDS, seed=4).visual.proj)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_short_way_through_the_image_tower(layers):
    config = {**tiny.CONFIG, "vision_cfg": {**tiny.CONFIG["vision_cfg"], "layers": layers}}
    model = tiny.build(config, WORDS)
    x = torch.randn(5, 3, 48, 48)
    embedding, cls = tiny.image_features(model.visual, x)
    torch.testing.assert_close(embedding, model.visual(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(cls @ model.visual.proj, embedding)

    def gradients(feature):
        model.zero_grad()
        feature.square().sum().backward()
        return {name: weight.grad.clone() for name, weight in model.visual.named_parameters()}

    for (name, a), b in zip(gradients(embedding).items(), gradients(model.visual(x)).values()):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4, msg=name)


def test_the_short_way_through_the_text_tower(model):
    words = [*WORDS, "unseen"]
    sentences = [" ".join(words[i % 10] for i in range(n)) for n in (3, 0, 40, 7, 7, 12, 1, 30, 2)]
    tokens = tiny.tokenizer(WORDS)(sentences)
    expected = model.encode_text(tokens)
    for chunk in (1, 4, 100):
        torch.testing.assert_close(tiny.text_features(model, tokens, chunk), expected, atol=1e-5, rtol=0)


def test_saved_and_loaded(model, tmp_path):
    sha256 = tiny.save(tmp_path, "small", model, tiny.CONFIG, WORDS)
    loaded = tiny.load(tmp_path / "small.safetensors")
    assert hashlib.sha256((tmp_path / "small.safetensors").read_bytes()).hexdigest() == sha256
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small.json", "small.safetensors"]
    assert (loaded.image_size, loaded.mean, loaded.std) == (48, tiny.MEAN, tiny.STD)
    assert not loaded.model.training
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key].half().float()), key
    assert loaded.tokenize(["a tern"]).tolist() == tiny.tokenizer(WORDS)(["a tern"]).tolist()


def test_open_clip_reads_the_files_itself(model, tmp_path):
    tiny.save(tmp_path, "small", model, tiny.CONFIG, WORDS)
    shutil.move(tmp_path / "small.json", tmp_path / "open_clip_config.json")
    shutil.move(tmp_path / "small.safetensors", tmp_path / "open_clip_model.safetensors")
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(theirs.encode_image(x), model.encode_image(x), atol=1e-2, rtol=1e-2)


def damage_cut(folder):
    path = folder / "small.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def damage_other(folder):
    tiny.save(folder, "other", tiny.build(tiny.CONFIG, WORDS, seed=9), tiny.CONFIG, WORDS)
    shutil.move(folder / "other.safetensors", folder / "small.safetensors")


def damage_json(folder):
    (folder / "small.json").write_text(json.dumps({"words": []}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_cut, "cut short or belongs to another model"),
        (damage_other, "cut short or belongs to another model"),
        (damage_json, "is not a model's JSON"),
        (lambda folder: (folder / "small.json").unlink(), "small.json is missing"),
        (lambda folder: (folder / "small.safetensors").unlink(), "small.safetensors is missing"),
    ],
)
def test_damaged_models_are_refused_in_one_sentence(model, tmp_path, damage, message):
    tiny.save(tmp_path, "small", model, tiny.CONFIG, WORDS)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        tiny.load(tmp_path / "small.safetensors")
    assert "\n" not in str(error.value)


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(ValueError, match="birdlets-tiny, birdlets-tiny-1, birdlets-tiny-2, birdlets-tiny-whole"):
        tiny.load("birdlets-huge")
