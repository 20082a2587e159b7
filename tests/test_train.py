import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from upclose import birdlets, train
from upclose.encode import tiny

SMALL = train.Recipe(pictures=12, steps=5, batch_size=8, warmup=2, measure=10)


@pytest.fixture(scope="module")
def pool():
    tokenize = tiny.tokenizer(birdlets.vocabulary())
    drawn = [birdlets.training_views(0, i, False) for i in range(SMALL.pictures)]
    pixels = np.concatenate([views for views, _ in drawn])
    captions = [sentence for _, views in drawn for pair in views for sentence in pair]
    return train.Pool(pixels, tokenize(captions).view(len(pixels), 2, -1).numpy().astype(np.uint16))


def fresh():
    return tiny.build(tiny.CONFIG, birdlets.vocabulary(), 0)


def test_the_loss_is_a_loop_over_pairs():
    g = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(6, 4, generator=g, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(3, 4, generator=g, dtype=torch.float64), dim=-1)
    caption, scale = torch.tensor([0, 2, 1, 0, 0, 2]), torch.tensor(7.0, dtype=torch.float64)
    total = 0.0
    for i in range(6):
        own = (scale * image[i] @ text[caption[i]]).exp()
        total -= (own / sum((scale * image[i] @ text[u]).exp() for u in range(3))).log() / 12
    for u in range(3):  # a caption's target is spread evenly over the views that share it
        sharing = [i for i in range(6) if caption[i] == u]
        everything = sum((scale * image[j] @ text[u]).exp() for j in range(6))
        for i in sharing:
            total -= len(sharing) / 12 * ((scale * image[i] @ text[u]).exp() / everything).log() / len(sharing)
    torch.testing.assert_close(train.contrastive_loss(image, text, caption, scale), total)


def test_the_loss_of_a_batch_ignores_order_and_counts_a_caption_once(pool):
    model = fresh()
    rows = np.array([0, 3, 6, 9, 12])
    pixels, tokens = pool.pixels[rows], pool.tokens[rows].copy()
    tokens[1] = tokens[0]
    order = np.array([3, 1, 4, 0, 2])
    one, other = train.step_loss(model, pixels, tokens), train.step_loss(model, pixels[order], tokens[order])
    torch.testing.assert_close(one, other)
    image = F.normalize(model.encode_image(train.normalise(pixels)), dim=-1)
    text = F.normalize(model.encode_text(torch.from_numpy(tokens.astype(np.int64)).flatten(0, 1)), dim=-1)
    caption, scale = torch.tensor([0, 0, 1, 2, 3]), model.logit_scale.exp()
    first, second = text.view(5, 2, -1)[[0, 2, 3, 4]].unbind(1)
    assert len({row.tobytes() for row in tokens[:, 0]}) == len({row.tobytes() for row in tokens[:, 1]}) == 4
    expected = sum(train.contrastive_loss(image, side, caption, scale) for side in (first, second)) / 2
    torch.testing.assert_close(one, expected)


def test_every_pass_sees_every_view_once():
    pictures, views, batch = 10, 3, 4  # 2 steps a pass, 2 pictures left out
    rounds = [[train.batch_rows(pictures, views, batch, 0, 2 * r + k) for k in range(2)] for r in range(6)]
    for one, two in rounds:
        assert len(set(one // views) | set(two // views)) == 2 * batch  # no picture twice in a pass
    assert (rounds[0][0] != rounds[1][0]).any()
    shown = np.concatenate([np.concatenate(r) for r in rounds[:3]])
    assert len(set(shown)) == len(shown)  # `views` passes show no view of a picture twice


def test_jitter_moves_and_mirrors_whole_pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3, 12, 12), dtype=np.uint8)
    moved = train.jitter(pixels, 2, np.random.default_rng(1))
    assert moved.dtype == np.uint8
    padded = np.pad(pixels, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    found = 0
    for i in range(40):
        options = [padded[i, :, y : y + 12, x : x + 12] for y in range(5) for x in range(5)]
        found += any((moved[i] == view).all() or (moved[i] == view[:, :, ::-1]).all() for view in options)
    assert found == 40
    still = train.jitter(pixels, 0, np.random.default_rng(1))
    assert 5 < sum((still[i] == pixels[i]).all() for i in range(40)) < 35


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    rates = [train.learning_rate(SMALL._replace(steps=100, warmup=10), step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == pytest.approx(1e-3)
    assert np.argmax(rates) in (9, 10)
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[-1] < 1e-6


def test_only_matrices_decay():
    model = fresh()
    muon, adam = train.optimizers(model, SMALL)
    decayed, free = adam.param_groups
    assert decayed["weight_decay"] == muon.param_groups[0]["weight_decay"] == SMALL.weight_decay
    assert free["weight_decay"] == 0
    hidden = muon.param_groups[0]["params"]
    assert {weight.ndim for weight in hidden} == {2}
    assert len(hidden) == 4 * (4 + 3)  # qkv, output and two of the MLP, in four and three blocks
    assert {weight.ndim for weight in decayed["params"]} == {2, 4}
    assert len(hidden) + len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_one_seed_one_model_also_when_interrupted(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "KEEP", 2)

    def stop_at(step):
        def measure(model):
            stop_at.count += 1
            if stop_at.count == step:
                raise KeyboardInterrupt
            return {}

        stop_at.count = 0
        return measure

    plain, again, resumed = fresh(), fresh(), fresh()
    curve = train.fit(plain, pool, SMALL, 0)
    train.fit(again, pool, SMALL, 0)
    with pytest.raises(KeyboardInterrupt):
        train.fit(fresh(), pool, SMALL, 0, tmp_path / "state", stop_at(2))
    resumed_curve = train.fit(resumed, pool, SMALL, 0, tmp_path / "state")
    assert [row["step"] for row in curve] == [row["step"] for row in resumed_curve] == [2, 4, 5]
    assert [row["loss"] for row in curve] == [row["loss"] for row in resumed_curve]
    for a, b, c in zip(*(model.state_dict().values() for model in (plain, again, resumed))):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    other = fresh()
    train.fit(other, pool, SMALL, 1)
    assert not torch.equal(other.visual.proj, plain.visual.proj)


def test_accuracies_are_open_clips_own(pool):
    model, data = fresh().eval(), birdlets.dataset("validation", "photo", n=12, seed=5)
    pixels = train.pictures_of(data)
    assert pixels.shape == (12, 3, birdlets.TRAIN_SIZE, birdlets.TRAIN_SIZE)
    tokenize = tiny.tokenizer(birdlets.vocabulary())
    image = model.encode_image(train.normalise(pixels))
    name = model.encode_text(tokenize([f"a photo of a {name}." for name in data.class_names]), normalize=True)
    described = birdlets.descriptors(data.species)
    columns = []
    for n in data.class_names:
        said = tokenize([f"a photo of a {n}, which has {words}." for words in described[n]])
        columns.append((image @ model.encode_text(said, normalize=True).T).mean(1))
    score = torch.stack(columns, 1)
    by_name, with_descriptions = train.accuracies(model, pixels, data)
    assert (by_name == ((image @ name.T).argmax(1).numpy() == data.label)).all()
    assert (with_descriptions == (score.argmax(1).numpy() == data.label)).all()


def test_a_whole_training_writes_weights_and_card(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UPCLOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(train.RECIPES, "mini", SMALL)
    assert train.main(["birdlets-tiny-whole", "--recipe", "mini", "--out", str(tmp_path / "out")]) == 0
    assert "photo: " in capsys.readouterr().out
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == [f"birdlets-tiny-whole.{end}" for end in ("json", "md", "safetensors")]
    card = (tmp_path / "out" / "birdlets-tiny-whole.md").read_text()
    assert "whole pictures with whole captions only" in card
    assert all(f"| {domain} | " in card for domain in birdlets.DOMAINS)
    assert re.search(r"\| minutes of drawing, 2 processes \| \d+\.\d \|", card)
    assert tiny.load(tmp_path / "out" / "birdlets-tiny-whole.safetensors").image_size == birdlets.TRAIN_SIZE
    assert [file.name[:5] for file in (tmp_path / "cache" / "train").iterdir()] == ["pool-"]


def test_another_optimizer_does_not_go_on_from_an_old_checkpoint_but_keeps_the_pictures(tmp_path, monkeypatch):
    """Stops after the pictures are drawn, then looks for the names with the programs as they are and changed."""
    monkeypatch.setenv("UPCLOSE_CACHE", str(tmp_path / "cache"))
    asked = []

    def fit(model, pool, recipe, seed, checkpoint, measure):
        asked.append(checkpoint)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", fit)
    for name in ("train.py", "tiny.py"):
        (tmp_path / name).write_text(name)
    for module, file in ((train, train.__file__), (train, tmp_path / "train.py"), (tiny, tmp_path / "tiny.py")):
        monkeypatch.setattr(module, "__file__", str(file))
        with pytest.raises(KeyboardInterrupt):
            train.train("birdlets-tiny", SMALL, 0, tmp_path / "out")
    assert len(set(asked)) == 3
    assert len(list((tmp_path / "cache" / "train").glob("pool-*"))) == 1


def test_bad_arguments_end_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["birdlets-huge"], "birdlets-tiny-whole"),
        (["birdlets-tiny", "--recipe", "long"], "full"),
        (["birdlets-tiny", "--out", str(tmp_path / "file")], "cannot write to"),
    ):
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def start(tmp_path):
    options = ["birdlets-tiny", "--recipe", "mini", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "upclose.train", *options]
    environment = {**os.environ, "UPCLOSE_CACHE": str(tmp_path / "cache")}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_the_mini_recipe_learns(tmp_path):
    with start(tmp_path) as process:
        out, error = process.communicate()
    assert process.returncode == 0, error
    photo = next(line for line in out.splitlines() if line.startswith("photo: "))
    assert float(photo.split()[1].rstrip("%")) > 5 * 100 / 120  # by chance less than once in ten thousand


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_half_written(tmp_path):
    with start(tmp_path) as process:
        time.sleep(15)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in error
    assert not list((tmp_path / "out").iterdir())
