"""What only a GPU shows: its pixels, scores and banks beside a processor's, and that nothing waits for it."""

from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from bank_world import contents
from test_crops import awkward_boxes, picture, pil_crops
from upclose import bank, birdlets, crops, encode, methods, seeds, train, transport
from upclose.encode import tiny
from upclose.features import Ladder, Plan, Text, Views
from upclose.methods import fair, wca

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"
PLAN = Plan(n=5, scale=(0.4, 0.9))


@contextmanager
def no_wait():
    """Whatever waits for the card is an error in here."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def equal_predictions(one, two, text):
    return (wca.scores(one, text).argmax(1) == wca.scores(two, text).argmax(1)).float().mean().item()


@pytest.fixture(scope="module")
def world():
    """Birdlets, their text, and the features of a processor."""
    encoder, dataset = encode.load("birdlets-tiny", device="cpu"), birdlets.dataset(n=64)
    sentences = birdlets.sentences(dataset.species)
    names = dataset.class_names
    text = encode.embed_text(encoder, [f"a photo of a {name}." for name in names], [sentences[name] for name in names])
    pictures = [dataset.load(i) for i in range(len(dataset))]
    box = torch.stack([crops.plan_boxes(PLAN, *p.shape[1:], k) for p, k in zip(pictures, dataset.key)])
    views = Views(encoder.encode_images(pictures), encoder.encode_crops(pictures, box), box)
    return dataset, text, pictures, views


def test_pixels_are_pils():
    images = [picture(h, w, h) for h, w in ((300, 400), (500, 333), (1, 900), (900, 1), (1200, 700))]
    box = torch.stack([awkward_boxes(*image.shape[1:]) for image in images])
    there = [image.to(DEVICE) for image in images]
    with no_wait():
        ours = crops.extract(there, box, 224, torch.uint8)
        twice = crops.extract(there, box.to(DEVICE, non_blocking=True), 224, torch.uint8)
        whole = crops.whole(there, 224, torch.uint8)
    assert torch.equal(ours, twice)
    assert (whole.cpu().int() - crops.whole(images, 224, torch.uint8).int()).abs().max() <= 2
    difference = torch.stack([(a.cpu().int() - pil_crops(i, b, 224)).abs() for a, i, b in zip(ours, images, box)])
    assert difference.max() <= 2
    assert (difference > 0).float().mean() <= 1e-3


@pytest.mark.parametrize("method", [m for m in methods.REGISTRY.values() if m.zero_shot], ids=lambda m: m.name)
def test_every_method_gives_what_it_gives_on_a_processor(method):
    torch.manual_seed(0)
    text = Text.from_lists(unit(6, 32), [unit(m, 32) for m in (3, 1, 4, 2, 5, 3)])
    views = Views(unit(20, 32), unit(20, 8, 32))
    ladder = Ladder(views.image, unit(20, 3, 8, 32))
    given = ladder if "ladder" in method.needs else views
    here = method.function(given, text)
    given, text = given.to(DEVICE), text.to(DEVICE)
    method.function(given, text)
    # TransCLIP's sparse table of neighbours is put together once, which counts its entries.
    with nullcontext() if method.name == "TransCLIP-ZS" else no_wait():
        there = method.function(given, text)
    assert there.device.type == DEVICE
    torch.testing.assert_close(there.cpu(), here, atol=2e-4, rtol=1e-3)


def test_nothing_waits_for_the_card(world):
    _, _, pictures, views = world
    encoder = encode.load("birdlets-tiny", device=DEVICE, precision="bf16", batch_size=64)
    ready = [encoder.prepare(*one) for one in zip(pictures, views.box)]
    encoder.encode_views(ready)
    with no_wait():
        image, crop, *_ = encoder.encode_views(ready)
        encoder.encode_crops(pictures, views.box)
        encoder.encode_images(pictures)
    there = encoder.encode_crops([picture.to(DEVICE) for picture in pictures], views.box)
    assert torch.equal(there, crop)
    assert (1 - (crop.cpu() * views.crop).sum(-1)).max() < 1e-3
    assert (1 - (image.cpu() * views.image).sum(-1)).max() < 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bank_is_a_processors_and_twice_the_same(tmp_path, world, precision):
    dataset, text, _, views = world
    encoder = encode.load("birdlets-tiny", device=DEVICE, precision=precision, batch_size=64)
    one = bank.build(dataset, encoder, PLAN, tmp_path / "one", dtype="float32", shard=16)
    found = one.read()[0]
    assert (1 - (found.crop * views.crop).sum(-1)).max() < {"fp32": 1e-4, "bf16": 1e-3}[precision]
    assert equal_predictions(found, views, text) >= 0.98
    two = bank.build(dataset, encoder, PLAN, tmp_path / "two", dtype="float32", shard=16)
    undisturbed = contents(Path(one.folder.path))
    assert contents(Path(two.folder.path)) == undisturbed
    for name in ("manifest.json", "00000016-00000032.safetensors", "00000048-00000064.safetensors"):
        (Path(two.folder.path) / name).unlink()
    bank.build(dataset, encoder, PLAN, tmp_path / "two", dtype="float32", shard=16)
    assert contents(Path(two.folder.path)) == undisturbed


def test_out_of_memory_in_the_middle_of_a_build(tmp_path, world, monkeypatch):
    dataset, _, _, views = world
    encoder = encode.load("birdlets-tiny", device=DEVICE, batch_size=64)
    real, sizes = encoder._features, []

    def small(x, *rest):
        sizes.append(len(x))
        if len(sizes) > 3 and len(x) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(x, *rest)

    monkeypatch.setattr(encoder, "_features", small)
    found = bank.build(dataset, encoder, PLAN, tmp_path, dtype="float32", shard=16).read()[0]
    assert sizes[:4] == [64] * 4  # of shards of 96 views each, the second half filled up
    assert set(sizes[4:]) == {16}
    assert (1 - (found.crop * views.crop).sum(-1)).max() < 1e-4


def test_compiled_is_close(world):
    _, _, pictures, views = world
    encoder = encode.load("birdlets-tiny", device=DEVICE, precision="bf16", batch_size=64, compile=True)
    assert (1 - (encoder.encode_crops(pictures, views.box).cpu() * views.crop).sum(-1)).max() < 1e-3


def test_fair_is_resumed(world):
    dataset, text, *_ = world
    encoder = encode.load("birdlets-tiny", device=DEVICE)
    text, states = Text(*(part.to(DEVICE) for part in text)), []
    options = dict(n=4, k=2, epochs=2, batch_size=16)
    whole = fair.adapt(encoder, dataset, text, **options, on_epoch=states.append)
    resumed = fair.adapt(encoder, dataset, text, **options, state=states[0])
    torch.testing.assert_close(resumed.anchors, whole.anchors, atol=1e-4, rtol=0)
    torch.testing.assert_close(resumed.history.fairness, whole.history.fairness, atol=1e-4, rtol=0)


def test_an_epoch_of_fair_waits_for_nothing(world, monkeypatch):
    dataset, text, *_ = world
    encoder, text = encode.load("birdlets-tiny", device=DEVICE, precision="bf16"), text.to(DEVICE)
    options = dict(n=4, k=2, epochs=1, batch_size=16)
    fair.adapt(encoder, dataset, text, **options)
    begin, end = fair._batches, fair._extend

    def strict(*given):
        torch.cuda.set_sync_debug_mode("error")
        return begin(*given)

    def at_ease(*given):
        torch.cuda.set_sync_debug_mode("default")
        return end(*given)

    monkeypatch.setattr(fair, "_batches", strict)
    monkeypatch.setattr(fair, "_extend", at_ease)
    with no_wait():
        found = fair.adapt(encoder, dataset, text, **options)
    assert found.history.fairness.isfinite().all()


@pytest.mark.parametrize("epsilon", [0.3, 0.1, 0.01])
def test_transport_problems_of_all_widths_are_a_processors(epsilon):
    """Classes of 1 to 60 columns, some wider than a tile; at 0.01 costs lie too far apart for the plain kernel."""
    draw = torch.Generator().manual_seed(0)
    count = torch.randint(1, 60, (30,), generator=draw)
    owner = torch.arange(30).repeat_interleave(count)
    cost, row = torch.rand(len(owner), 8, 90, generator=draw), torch.rand(8, 90, generator=draw)
    row = row * (row > 0.3)
    row /= row.sum(1, keepdim=True)
    logit, columns = -cost / epsilon, transport.Ragged(owner, 30)
    there = logit.to(DEVICE), row.to(DEVICE), transport.Ragged(owner.to(DEVICE), 30)
    plan, _ = transport.sinkhorn_ragged(*there)
    moved = transport.moved_ragged(*there)
    expected, _ = transport.sinkhorn_ragged(logit.double(), row.double(), columns, 20_000)
    torch.testing.assert_close(plan.cpu().double(), expected, atol=1e-5 if epsilon > 0.01 else 1e-4, rtol=0)
    torch.testing.assert_close(moved, there[2].sum((plan * there[0]).sum(-1)), atol=1e-4 / epsilon, rtol=0)


def test_ray_builds_the_same_bank(tmp_path, world):
    ray = pytest.importorskip("ray", reason='needs Ray: pip install "upclose[cluster]"')
    dataset, *_ = world
    encoder = encode.load("birdlets-tiny", device="cpu", batch_size=64, runs_on=DEVICE)
    here = encode.load("birdlets-tiny", device=DEVICE, batch_size=64)
    local = bank.build(dataset, here, PLAN, tmp_path / "local", shard=16)
    ray.init(num_cpus=2, num_gpus=torch.cuda.device_count(), include_dashboard=False, log_to_driver=False)
    try:
        spread = bank.build(dataset, encoder, PLAN, tmp_path / "ray", "ray", shard=16, gpus=1)
    finally:
        ray.shutdown()
    assert contents(Path(spread.folder.path)) == contents(Path(local.folder.path))


def test_training_waits_for_nothing_and_repeats():
    recipe = train.Recipe(pictures=16, steps=6, batch_size=8, warmup=2)
    views = [birdlets.training_views(0, i, False) for i in range(recipe.pictures)]
    tokenize = tiny.tokenizer(birdlets.vocabulary())
    said = tokenize([sentence for _, captions in views for pair in captions for sentence in pair])
    pixels = np.concatenate([pixels for pixels, _ in views])
    pool = train.Pool(pixels, said.view(len(pixels), 2, -1).numpy().astype(np.uint16))

    def trained(device):
        model = tiny.build(tiny.CONFIG, birdlets.vocabulary(), 0).to(device)
        return model, train.fit(model, pool, recipe, 0)

    (one, curve), (two, _), (_, here) = trained(DEVICE), trained(DEVICE), trained("cpu")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert curve[-1]["loss"] == pytest.approx(here[-1]["loss"], rel=0.02)
    batch = train.batch(pixels[:8], pool.tokens[:8], 2, seeds.rng(0), torch.device(DEVICE))
    optimizers = train.optimizers(one, recipe)
    with no_wait():
        train.step_loss(one, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
