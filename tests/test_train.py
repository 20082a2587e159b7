import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from upclose import birdlets, card, train
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


def loss_of(model, pixels, tokens, shift=0):
    return train.step_loss(model, train.batch(pixels, tokens, shift, Still(), torch.device("cpu")))


class Still:
    """A generator that neither moves nor mirrors."""

    def integers(self, low, high, shape):
        return np.zeros(shape, dtype=np.int64)

    def random(self, shape):
        return np.ones(shape)


@pytest.fixture
def exact(monkeypatch):
    """Everything in fp32."""
    monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())


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


def test_the_loss_of_a_batch_ignores_order_and_counts_a_caption_once(pool, exact):
    model = fresh()
    rows = np.array([0, 3, 6, 9, 12])
    pixels, tokens = pool.pixels[rows], pool.tokens[rows].copy()
    tokens[1] = tokens[0]
    order = np.array([3, 1, 4, 0, 2])
    one, other = loss_of(model, pixels, tokens), loss_of(model, pixels[order], tokens[order])
    torch.testing.assert_close(one, other)
    image = F.normalize(model.encode_image(tiny.normalise(torch.from_numpy(pixels))), dim=-1)
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


def moved(pixels, shift, seed):
    tokens = np.zeros((len(pixels), 2, tiny.CONTEXT), np.uint16)
    batch = train.batch(pixels, tokens, shift, np.random.default_rng(seed), torch.device("cpu"))
    return train.jitter(batch.pixels, batch.rows, batch.columns).numpy()


def test_jitter_moves_and_mirrors_whole_pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3, 12, 12), dtype=np.uint8)
    found = moved(pixels, 2, 1)
    assert found.dtype == np.uint8
    padded = np.pad(pixels, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    for i in range(40):
        options = [padded[i, :, y : y + 12, x : x + 12] for y in range(5) for x in range(5)]
        assert any((found[i] == view).all() or (found[i] == view[:, :, ::-1]).all() for view in options)
    still = moved(pixels, 0, 1)
    assert 5 < sum((still[i] == pixels[i]).all() for i in range(40)) < 35


def test_a_batch_keeps_every_caption(pool):
    """Sorted, trimmed and told apart on the host: put together again they are the captions that went in."""
    tokens = pool.tokens[:30]
    found = train.batch(pool.pixels[:30], tokens, 2, np.random.default_rng(0), torch.device("cpu"))
    texts = torch.cat([F.pad(part, (0, tiny.CONTEXT - part.shape[1])) for part in found.texts]).numpy()
    assert len(np.unique(texts, axis=0)) == len(texts)
    assert (np.diff([part.shape[1] for part in found.texts]) >= 0).all()
    for column in range(2):
        assert (texts[found.used[column]][found.caption[column]] == tokens[:, column]).all()


def test_attention_is_pytorchs():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8, generator=g) for _ in range(3))
    mask = torch.full((6, 6), -torch.inf).triu(1)
    for said in (None, mask):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=said)
        torch.testing.assert_close(train.attend(q, k, v, attn_mask=said), expected)


def test_half_precision_finds_the_same_loss(pool):
    rows = np.arange(0, 36, 3)
    half = loss_of(fresh(), pool.pixels[rows], pool.tokens[rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_: nullcontext())
        full = loss_of(fresh(), pool.pixels[rows], pool.tokens[rows])
    assert half.dtype == torch.float32
    assert half.item() != full.item()
    assert half.item() == pytest.approx(full.item(), rel=0.01)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_no_step_waits_for_the_device():
    """Fake tensors have no values, so that a look at one raises."""
    with FakeTensorMode(), torch.device("cuda"):
        model = fresh()
        device = model.text_projection.device
        ints = {"dtype": torch.int64}
        found = train.Batch(
            torch.empty(8, 3, 48, 48, dtype=torch.uint8),
            *(torch.empty(8, 48, **ints) for _ in range(2)),
            [torch.empty(6, 9, **ints), torch.empty(4, 14, **ints)],
            [torch.empty(7, **ints), torch.empty(5, **ints)],
            [torch.empty(8, **ints) for _ in range(2)],
        )
        loss = train.step_loss(model, found)
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight)
        for optimizer in train.optimizers(model, SMALL):
            optimizer.step()
    assert (device.type, loss.device.type) == ("cuda", "cuda")


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
    pixels = card.pictures_of(data)
    assert pixels.shape == (12, 3, birdlets.TRAIN_SIZE, birdlets.TRAIN_SIZE)
    tokenize = tiny.tokenizer(birdlets.vocabulary())
    image = model.encode_image(tiny.normalise(torch.from_numpy(pixels)))
    name = model.encode_text(tokenize([f"a photo of a {name}." for name in data.class_names]), normalize=True)
    described = birdlets.descriptors(data.species)
    columns = []
    for n in data.class_names:
        said = tokenize([f"a photo of a {n}, which has {words}." for words in described[n]])
        columns.append((image @ model.encode_text(said, normalize=True).T).mean(1))
    score = torch.stack(columns, 1)
    by_name, with_descriptions = card.accuracies(model, pixels, data)
    assert (by_name == ((image @ name.T).argmax(1).numpy() == data.label)).all()
    assert (with_descriptions == (score.argmax(1).numpy() == data.label)).all()


class Here:
    """Workers that are this process, and remember which blocks they drew."""

    drew: ClassVar[list] = []

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, *columns):
        self.drew.extend(row[2:4] for row in zip(*columns))
        return map(function, *columns)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two small recipes, one a quarter of the other; probes that learn from few birds."""
    monkeypatch.setenv("UPCLOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "FIRST", 2)
    monkeypatch.setattr(card, "BIRDS", 40)
    long = SMALL._replace(steps=8, measure=40)
    monkeypatch.setattr(train, "RECIPES", {"long": long, "quarter": long._replace(steps=2)})
    return tmp_path


@pytest.fixture
def quick(world, monkeypatch):
    """Drawn in this process, and nothing measured."""
    monkeypatch.setattr(train, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(card, "pictures_of", lambda dataset: np.zeros((len(dataset), 0)))
    monkeypatch.setattr(card, "accuracies", lambda model, pixels, dataset: (np.zeros(len(pixels)),) * 2)
    monkeypatch.setattr(card, "readable", lambda model, photos: {})
    return world


def run(world, *more):
    return train.main(["birdlets-tiny-whole", "--out", str(world / "out"), *more])


def test_a_whole_training_writes_weights_and_card(world, capsys):
    assert run(world, "--recipe", "quarter") == 0
    assert run(world) == 0
    assert "photo: " in capsys.readouterr().out
    files = sorted(file.name for file in (world / "out").iterdir())
    assert files == [f"birdlets-tiny-whole.{end}" for end in ("json", "md", "safetensors")]
    page = (world / "out" / "birdlets-tiny-whole.md").read_text()
    assert "whole pictures with whole captions only" in page
    assert all(f"| {domain} | " in page for domain in birdlets.DOMAINS)
    assert re.search(r"\| minutes of drawing, one processor \| \d+\.\d \|", page)
    assert "| views seen | long: by name | with descriptions | quarter: by name | with descriptions |" in page
    cell = r"\| \d+\.\d% "
    assert re.search(rf"\| 16 ({cell}){{4}}\|\n", page)
    assert re.search(rf"\| 64 ({cell}){{2}}\| \| \|\n", page)
    assert re.search(rf"\| eye ring ({cell}){{3}}\| \d+ \|\n", page)
    assert tiny.load(world / "out" / "birdlets-tiny-whole.safetensors").image_size == birdlets.TRAIN_SIZE
    before = (world / "out" / "birdlets-tiny-whole.safetensors").read_bytes()
    assert run(world) == 0  # nothing is left to train
    assert "going on from step 8" in capsys.readouterr().out
    assert (world / "out" / "birdlets-tiny-whole.safetensors").read_bytes() == before


def test_a_number_in_the_name_is_the_seed(quick, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "train", lambda name, recipe, seed, out, device: asked.append((name, seed)) or {})
    for name in tiny.NAMES:
        train.main([name, "--out", str(quick / "out")])
    train.main(["birdlets-tiny-1", "--seed", "7", "--out", str(quick / "out")])
    expected = [("birdlets-tiny", 0), ("birdlets-tiny-1", 1), ("birdlets-tiny-2", 2), ("birdlets-tiny-whole", 0)]
    assert asked == [*expected, ("birdlets-tiny-1", 7)]


def test_another_optimizer_does_not_go_on_from_an_old_checkpoint_but_all_share_the_pictures(quick, monkeypatch):
    """Stops after the pictures are drawn, then looks for the names with the programs as they are and changed."""
    asked = []

    def fit(model, pool, recipe, seed, checkpoint, measure):
        asked.append(checkpoint)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", fit)
    for name in ("train.py", "tiny.py"):
        (quick / name).write_text(name)
    for seed in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            train.train("birdlets-tiny", "long", seed, quick / "out")
    for module, file in ((train, quick / "train.py"), (tiny, quick / "tiny.py")):
        monkeypatch.setattr(module, "__file__", str(file))
        with pytest.raises(KeyboardInterrupt):
            train.train("birdlets-tiny", "long", 0, quick / "out")
    assert len(set(asked)) == 4
    assert len([path for path in (quick / "cache" / "train").glob("pool-*") if path.is_dir()]) == 1


def test_an_interrupted_drawing_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "BLOCK", 3)
    monkeypatch.setattr(train, "ProcessPoolExecutor", Here)
    whole = train.draw_pool(tmp_path / "whole", 7, 0, False)
    assert whole.minutes > 0
    partial = tmp_path / "again.partial"
    train._reserve(partial, len(whole.pixels))
    train._draw_block(partial, 0, 3, 6, False)
    drew = []
    monkeypatch.setattr(Here, "drew", drew)
    again = train.draw_pool(tmp_path / "again", 7, 0, False)
    assert drew == [(0, 3), (6, 7)]
    assert (again.pixels == whole.pixels).all()
    assert (again.tokens == whole.tokens).all()


def refused(world, capsys, *more):
    with pytest.raises(SystemExit) as stop:
        run(world, *more)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Traceback" not in error
    return error


def test_what_is_damaged_is_said_and_the_next_call_goes_on(quick, capsys):
    assert run(quick) == 0
    folder = quick / "cache" / "train"
    weights = (quick / "out" / "birdlets-tiny-whole.safetensors").read_bytes()
    (pixels,) = folder.glob("pool-*/pixels.npy")
    os.truncate(pixels, pixels.stat().st_size - 1)
    assert "were cut short" in refused(quick, capsys)
    assert run(quick) == 0
    (kept,) = folder.glob("*long*.safetensors")
    state = kept.read_bytes()
    kept.write_bytes(state[: len(state) // 2])
    assert "cannot be used" in refused(quick, capsys)
    assert kept.with_suffix(".aside").read_bytes() == state[: len(state) // 2]
    assert run(quick) == 0
    assert (quick / "out" / "birdlets-tiny-whole.safetensors").read_bytes() == weights


def test_a_damaged_checkpoint_of_the_shorter_recipe_costs_its_column_and_not_the_card(quick, capsys):
    assert run(quick, "--recipe", "quarter") == 0
    (kept,) = (quick / "cache" / "train").glob("*quarter*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert run(quick) == 0
    page = (quick / "out" / "birdlets-tiny-whole.md").read_text()
    assert "| views seen | long: by name | with descriptions |\n" in page


def test_a_killed_drawer_is_said_and_the_next_call_goes_on(quick, capsys, monkeypatch):
    def killed(*_):
        raise BrokenProcessPool("a process was terminated abruptly")

    with monkeypatch.context() as patch:
        patch.setattr(Here, "map", killed)
        assert "terminated abruptly" in refused(quick, capsys)
    assert run(quick) == 0


@pytest.mark.parametrize("other", [{"steps": 6}, {"seed": 1}, {"device": "cuda"}])
def test_a_checkpoint_of_another_training_is_set_aside(pool, tmp_path, other):
    file = tmp_path / "state.safetensors"
    train.fit(fresh(), pool, SMALL, 0, file)
    with safe_open(file, "pt") as kept:
        training = json.loads(kept.metadata()["training"])
    save_file(load_file(file), file, {"curve": "[]", "training": json.dumps(training | other)})
    state = file.read_bytes()
    for place in (".aside", ".aside1"):  # and the one before stays
        file.write_bytes(state)
        with pytest.raises(ValueError, match="is of another training"):
            train.fit(fresh(), pool, SMALL, 0, file)
        assert file.with_suffix(place).read_bytes() == state
        assert not file.exists()


def test_a_model_is_trained_once_at_a_time(quick, capsys):
    assert run(quick) == 0
    (kept,) = (quick / "cache" / "train").glob("*long*.safetensors")
    with FileLock(kept.with_suffix(".lock")):
        assert "is being trained already" in refused(quick, capsys)
    assert run(quick) == 0


def test_a_full_disk_is_said_before_anything_is_drawn(quick, capsys, monkeypatch):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1e5}))
    assert "the drawing of the views needs" in refused(quick, capsys)
    assert not list((quick / "cache" / "train").glob("pool-*.partial"))


def test_bad_arguments_end_before_any_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("UPCLOSE_CACHE", str(tmp_path / "file"))
    for arguments, message in (
        (["birdlets-huge"], "birdlets-tiny-whole"),
        (["birdlets-tiny", "--recipe", "long"], "p60k-s2000-b256-cosine"),
        (["birdlets-tiny", "--out", str(tmp_path / "file")], "cannot write to"),
        (["birdlets-tiny", "--out", str(tmp_path / "out"), "--device", "cuda"], "--device cpu"),
        (["birdlets-tiny", "--out", str(tmp_path / "out")], "Not a directory"),
    ):
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def start(tmp_path):
    options = ["birdlets-tiny", "--recipe", "p4k-s160-b128-cosine", "--out", str(tmp_path / "out")]
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
