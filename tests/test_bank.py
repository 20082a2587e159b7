"""The bank: what is read is what was encoded, under a key that names everything it depends on."""

import json
import os
import re
import warnings

import numpy as np
import pytest
import torch

from bank_world import PLAN, SHARD, FakeDataset, FakeEncoder, contents
from upclose import bank, birdlets, crops, encode, paths
from upclose.bank import BankError, cluster, shards, store
from upclose.features import Ladder, Plan, Views
from upclose.methods import wca

LADDER = Plan(n=3, scale=(0.4, 0.8), seed=5, factor=1.3, steps=4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UPCLOSE_CACHE", str(tmp_path / "cache"))


def build(root, dataset=None, encoder=None, plan=PLAN, **options):
    dataset = FakeDataset() if dataset is None else dataset
    return bank.build(dataset, encoder or FakeEncoder(), plan, root, shard=SHARD, **options)


def naive(dataset, encoder, plan, positions):
    """One picture and one box at a time."""
    image, crop, box = [], [], []
    for i in positions:
        pixels = dataset.load(i)
        boxes = crops.plan_boxes(plan, *pixels.shape[-2:], dataset.key[i])
        image.append(encoder.encode_images([pixels])[0])
        rows = torch.stack([encoder.encode_crops([pixels], b.reshape(1, 1, 4))[0, 0] for b in boxes.reshape(-1, 4)])
        crop.append(rows.reshape(*boxes.shape[:-1], -1))
        box.append(boxes)
    return torch.stack(image), torch.stack(crop), torch.stack(box)


@pytest.mark.parametrize("plan", [PLAN, PLAN._replace(sampler="area"), LADDER])
def test_read_equals_a_naive_loop(tmp_path, plan):
    dataset, encoder = FakeDataset(), FakeEncoder()
    views, label, index = build(tmp_path, dataset, encoder, plan, dtype="float32").read(slice(5, 21))
    image, crop, box = naive(dataset, encoder, plan, range(5, 21))
    assert type(views) is (Ladder if plan.steps > 1 else Views)
    torch.testing.assert_close(views.image, image, atol=1e-6, rtol=0)
    torch.testing.assert_close(views.crop, crop, atol=1e-6, rtol=0)
    assert torch.equal(views.box, box)
    assert label.tolist() == [i % 3 for i in range(5, 21)]
    assert index.tolist() == list(range(5, 21))
    assert index.dtype == label.dtype == torch.int64


def test_half_precision_comes_back_as_float32_of_unit_norm(tmp_path):
    half, full = build(tmp_path).read()[0], build(tmp_path, dtype="float32").read()[0]
    for name in ("image", "crop"):
        a, b = getattr(half, name), getattr(full, name)
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.norm(dim=-1), torch.ones(a.shape[:-1]), atol=1e-6, rtol=0)
        error = 1 - (a.double() * b.double()).sum(-1)
        assert error.max() < 1e-3
        assert not torch.equal(a, b)


def test_cls_tokens_are_kept_as_they_are(tmp_path):
    dataset, encoder, plan = FakeDataset(9), FakeEncoder(), PLAN._replace(cls=True)
    views = build(tmp_path, dataset, encoder, plan, dtype="float32").read()[0]
    expected = [encoder.encode_images([dataset.load(i)], cls=True)[1][0] for i in range(9)]
    torch.testing.assert_close(views.image_cls, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert views.crop_cls.shape == (9, 3, 5)
    assert views.crop_cls.norm(dim=-1).std() > 0.01
    half = build(tmp_path, dataset, encoder, plan).read()[0]
    torch.testing.assert_close(half.crop_cls, views.crop_cls, atol=1e-2, rtol=1e-3)


def test_every_range_is_that_part_of_the_whole(tmp_path):
    held = build(tmp_path)
    whole = held.read()[0]
    for start in (0, 7, 8, 9, 39, 40, -3):
        for stop in (0, 8, 17, 40, 99, -1):
            views, label, index = held.read(slice(start, stop))
            assert torch.equal(views.crop, whole.crop[start:stop])
            assert torch.equal(views.image, whole.image[start:stop])
            assert index.tolist() == list(range(40))[start:stop]
            assert len(label) == len(index)
    assert torch.equal(torch.cat([views.crop for views, *_ in held.batches(7)]), whole.crop)
    with pytest.raises(ValueError, match="step"):
        held.read(slice(0, 10, 2))


def test_a_read_opens_only_the_shards_that_it_needs(tmp_path, monkeypatch):
    held, opened, real = build(tmp_path), [], bank.bank._content
    monkeypatch.setattr(bank.bank, "_content", lambda f, shard: opened.append(shard["name"]) or real(f, shard))
    held.read(slice(9, 14))
    assert opened == ["00000008-00000016.safetensors"]


def test_features_do_not_depend_on_their_neighbours_or_the_shard(tmp_path):
    small = build(tmp_path / "a", FakeDataset(24)).read()[0]
    large = bank.build(FakeDataset(40), FakeEncoder(), PLAN, tmp_path / "b", shard=16).read(slice(0, 24))[0]
    torch.testing.assert_close(small.crop, large.crop, atol=1e-6, rtol=0)
    assert torch.equal(small.box, large.box)


def test_a_finished_bank_is_not_encoded_again(tmp_path):
    encoder = FakeEncoder()
    build(tmp_path, encoder=encoder)
    assert encoder.encoded == 40
    build(tmp_path, encoder=encoder)
    bank.open(tmp_path, FakeDataset(), encoder, PLAN)
    assert encoder.encoded == 40


class Changed(FakeEncoder):
    def __init__(self, **changes):
        super().__init__()
        self.__dict__.update(changes)


@pytest.mark.parametrize(
    ("dataset", "encoder", "plan", "dtype"),
    [
        (FakeDataset(41), FakeEncoder(), PLAN, "float16"),
        (FakeDataset(), FakeEncoder(1), PLAN, "float16"),
        (FakeDataset(), Changed(precision="bf16"), PLAN, "float16"),
        (FakeDataset(), Changed(image_size=5), PLAN, "float16"),
        (FakeDataset(), Changed(mean=(0.5, 0.5, 0.4)), PLAN, "float16"),
        (FakeDataset(), Changed(std=(0.5, 0.5, 0.4)), PLAN, "float16"),
        (FakeDataset(), Changed(batch_size=65), PLAN, "float16"),
        (FakeDataset(), Changed(squash=True), PLAN, "float16"),
        (FakeDataset(), FakeEncoder(), PLAN, "float32"),
        *[
            (FakeDataset(), FakeEncoder(), PLAN._replace(**change), "float16")
            for change in (
                {"sampler": "area"},
                {"n": 4},
                {"scale": (0.4, 0.81)},
                {"seed": 6},
                {"factor": 1.1},
                {"steps": 2},
                {"cls": True},
            )
        ],
    ],
)
def test_another_anything_has_another_key_and_reads_nothing_of_this_bank(tmp_path, dataset, encoder, plan, dtype):
    first = build(tmp_path)
    assert bank.key(dataset, encoder, plan, dtype) != bank.key(FakeDataset(), FakeEncoder(), PLAN)
    with pytest.raises(BankError, match=r"does not exist.*bank build"):
        bank.open(tmp_path, dataset, encoder, plan, dtype)
    assert len(first) == 40


def test_the_key_is_the_same_for_equal_numbers_of_another_type(tmp_path):
    plain = bank.key(FakeDataset(), FakeEncoder(), Plan(scale=(1.0, 1.0), factor=1.0))
    assert bank.key(FakeDataset(), FakeEncoder(), Plan(scale=(1, np.float64(1)), factor=1)) == plain


def test_a_name_cannot_leave_the_root(tmp_path):
    dataset = FakeDataset(8)
    dataset.name = "../../etc/<b>"
    assert build(tmp_path, dataset).folder.path.rsplit("/", 1)[0] == str(tmp_path)


def test_unreadable_pictures_drop_out_loudly(tmp_path):
    bad = FakeDataset(40, unreadable=(3, *range(8, 16), 39))
    with pytest.warns(UserWarning, match="10 pictures cannot be read.*picture/3: damaged"):
        held = build(tmp_path, bad, on_error="skip")
    readable = [i for i in range(40) if i not in bad.unreadable]
    views, label, index = held.read()
    assert index.tolist() == readable
    assert label.tolist() == [i % 3 for i in readable]
    torch.testing.assert_close(
        views.crop, naive(bad, FakeEncoder(), PLAN, readable)[1], atol=2e-3, rtol=0
    )  # float16 on disk
    assert held.errors[0] == {"index": 3, "key": "picture/3", "error": "damaged"}
    assert [row["index"] for row in held.errors] == sorted(bad.unreadable)
    assert held.read(slice(8, 16))[0].crop.shape == (0, 3, 16)
    assert held.read(slice(2, 5))[2].tolist() == [2, 4]
    with pytest.warns(UserWarning, match="left out of every result"):
        bank.open(tmp_path, bad, FakeEncoder(), PLAN)
    assert "/somewhere" not in (tmp_path / held.folder.path / "manifest.json").read_text()


def test_an_unreadable_picture_stops_the_build_by_default(tmp_path):
    bad = FakeDataset(40, unreadable=(11,))
    with pytest.raises(ValueError, match=r"picture 11 \('picture/11'\).*on_error='skip'"):
        build(tmp_path, bad)
    with pytest.warns(UserWarning, match="picture/11"):
        build(tmp_path, bad, on_error="skip")
    with pytest.raises(ValueError, match=r"picture/11.*mend them and build again"):  # a hole in a finished bank
        build(tmp_path, bad)


@pytest.mark.parametrize("finished", [True, False])
def test_a_mended_picture_is_encoded_by_the_next_build(tmp_path, finished):
    bad = FakeDataset(40, unreadable=(11, 30))
    with pytest.warns(UserWarning, match="next build encodes them"):
        held = build(tmp_path / "mended", bad, on_error="skip")
    if not finished:
        (tmp_path / "mended" / held.folder.path / "manifest.json").unlink()
    whole = FakeDataset(40)
    whole.fingerprint = bad.fingerprint  # as when the file's size, or what the fingerprint looks at, did not change
    encoder, undisturbed = FakeEncoder(), build(tmp_path / "whole", whole)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built = build(tmp_path / "mended", whole, encoder)
    assert any("encoded now: picture/11, picture/30" in str(w.message) for w in caught) == finished
    assert encoder.encoded == 2 * SHARD
    assert built.errors == []
    assert contents(tmp_path / "mended" / built.folder.path) == contents(tmp_path / "whole" / undisturbed.folder.path)


def test_nothing_readable_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="none of the 9 pictures"):
        build(tmp_path, FakeDataset(9, unreadable=range(9)), on_error="skip")


def test_a_defect_of_the_data_set_names_the_picture(tmp_path):
    dataset = FakeDataset(9)
    real = dataset.load
    dataset.load = lambda i: real(i) if i != 4 else 1 / 0
    with pytest.raises(ZeroDivisionError) as caught:
        build(tmp_path, dataset, on_error="skip")
    assert caught.value.__notes__ == ["while loading picture 4 ('picture/4') of noise (test)"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"executor": "slurm"}, "executor is 'slurm'"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"dataset": FakeDataset(0)}, "no images"),
        ({"plan": LADDER._replace(cls=True)}, "ladder of 4 steps"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        build(tmp_path / "root", **options)
    assert not (tmp_path / "root").exists()


def test_shards_are_whole_batches(tmp_path):
    with pytest.raises(ValueError, match="multiple of 8"):
        bank.build(FakeDataset(), FakeEncoder(), PLAN, tmp_path, shard=12)


def test_features_that_are_not_finite_are_never_written(tmp_path):
    encoder = FakeEncoder()
    encoder.token *= 1e6  # too large for float16
    with pytest.raises(ValueError, match="not finite in float16"):
        build(tmp_path, encoder=encoder, plan=PLAN._replace(cls=True))
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_the_manifest_names_no_time_host_or_path(tmp_path):
    held = build(tmp_path / "here")
    manifest = json.loads((tmp_path / "here" / held.folder.path / "manifest.json").read_text())
    assert set(manifest) == {"identity", "images", "errors", "shards", "sha256"}
    assert set(manifest["shards"][0]) == {"name", "start", "stop", "count", "bytes", "sha256"}
    again = build(tmp_path / "there")
    assert contents(tmp_path / "there" / again.folder.path) == contents(tmp_path / "here" / held.folder.path)


def test_ls_verify_rm(tmp_path):
    first, second = build(tmp_path), build(tmp_path, plan=LADDER)
    keys = [held.folder.path.rsplit("/", 1)[-1] for held in (first, second)]
    unfinished = f"noise-test-{0:020}"
    (tmp_path / unfinished).mkdir()
    rows = {row["key"]: row for row in bank.ls(tmp_path)}
    assert set(rows) == {*keys, unfinished}
    assert rows[keys[0]]["complete"]
    assert not rows[unfinished]["complete"]
    assert rows[keys[0]]["images"] == 40
    assert rows[keys[0]]["bytes"] == sum(map(len, contents(tmp_path / keys[0]).values()))
    assert bank.verify(tmp_path, keys[0]) == []
    assert bank.rm(tmp_path, keys[0]) == rows[keys[0]]["bytes"]
    assert {row["key"] for row in bank.ls(tmp_path)} == {keys[1], unfinished}
    with pytest.raises(BankError, match=rf"no bank.*{keys[1]}"):
        bank.rm(tmp_path, "../else")
    with pytest.raises(BankError, match=r"unfinished|does not exist"):
        bank.verify(tmp_path, unfinished)
    assert bank.ls(tmp_path / "nowhere") == []


def test_the_default_root_is_the_bank_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("UPCLOSE_BANK", str(tmp_path / "mine"))
    assert build(None).folder.path.startswith(str(tmp_path / "mine"))
    assert paths.bank() == str(tmp_path / "mine")


def test_the_default_root_may_be_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UPCLOSE_BANK", f"memory://{tmp_path}/default")
    held = build(None)
    assert store.locate(None).files.protocol == "memory"
    assert [row["key"] for row in bank.ls(f"memory://{tmp_path}/default")] == [held.folder.path.rsplit("/", 1)[-1]]
    assert [path.name for path in tmp_path.iterdir()] in ([], ["cache"])  # no folder named "memory:"
    monkeypatch.setenv("UPCLOSE_BANK", "nosuch://bucket/bank")
    with pytest.raises(ValueError, match="nosuch"):
        build(None)


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_root_behind_a_url(tmp_path, scheme):
    root = f"{scheme}://{tmp_path}/bank"
    plain = build(tmp_path / "plain")
    held = build(root)
    assert torch.equal(held.read(slice(5, 30))[0].crop, plain.read(slice(5, 30))[0].crop)
    folder = store.locate(root)
    (row,) = bank.ls(root)
    far = folder.join(row["key"])
    assert {n: store.read(far, n) for n in store.sizes(far)} == contents(tmp_path / "plain" / plain.folder.path)
    # cut one shard, and flip a byte in another
    names = sorted(store.sizes(far))
    cut, flipped = (store.read(far, name) for name in names[:2])
    far.files.pipe_file(far.join(names[0]).path, cut[:-1])
    far.files.pipe_file(far.join(names[1]).path, flipped[:-1] + bytes([flipped[-1] ^ 1]))
    assert [damage["shard"] for damage in bank.verify(root, row["key"], mend=True)] == names[:2]
    build(root)
    assert {n: store.read(far, n) for n in store.sizes(far)} == contents(tmp_path / "plain" / plain.folder.path)
    bank.rm(root, row["key"])
    assert bank.ls(root) == []


def test_a_remote_shard_is_checked_when_it_is_fetched(tmp_path):
    held = build(f"memory://{tmp_path}/bank")
    name = held.manifest["shards"][0]["name"]
    content = store.read(held.folder, name)
    held.folder.files.pipe_file(held.folder.join(name).path, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BankError, match=rf"{name}.*checksum.*--mend"):
        held.read(slice(0, 3))


@pytest.mark.parametrize("error", [MemoryError(), OSError(24, "Too many open files"), PermissionError(13, "denied")])
def test_what_says_nothing_about_the_shard_is_not_called_damage(tmp_path, monkeypatch, error):
    held = build(tmp_path)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(bank.bank, "_content", fail)
    with pytest.raises(type(error)) as caught:
        held.read()
    assert caught.value is error


def test_rm_clears_this_machines_copies_of_a_remote_bank(tmp_path):
    root = f"memory://{tmp_path}/far"
    held, other = build(root), build(root, plan=LADDER)
    for one in (held, other):
        one.read()
    cached = paths.cache() / "shards"
    assert len(list(cached.iterdir())) == 10
    bank.rm(root, held.folder.path.rsplit("/", 1)[-1])
    assert {path.stem for path in cached.iterdir()} == {shard["sha256"] for shard in other.manifest["shards"]}


def test_the_bar_counts_crops(tmp_path, capfd):
    build(tmp_path, progress=True)
    shown = capfd.readouterr().err
    assert "120/120" in shown
    assert "crop/s" in shown
    account = re.search(r"crops/s; of the time (.*): the bottleneck was (\w+)$", shown, re.MULTILINE)
    names = re.findall(r"(\w+) \d+%", account[1])
    assert names[0] == account[2]
    assert set(names) == {
        "decoding",
        "encoding",
        "writing",
    }  # of cutting this encoder says nothing
    build(tmp_path / "quiet")
    assert "120" not in capfd.readouterr().err  # no terminal, no bar


def job_of(dataset):
    return shards.Work(dataset, FakeEncoder(), PLAN, "float16", "skip", None)


def test_pictures_are_decoded_at_most_two_batches_ahead():
    loaded = []
    dataset = FakeDataset(200)
    real = dataset.load
    dataset.load = lambda i: loaded.append(i) or real(i)
    pictures = shards.decode(job_of(dataset), range(200))
    for taken in range(1, 50):
        next(pictures)
        assert len(loaded) <= taken + 2 * shards.BATCH
    pictures.close()
    assert len(loaded) < 100


def test_large_pictures_are_decoded_less_far_ahead(monkeypatch):
    """Bytes are counted, not pictures; at least two are under way."""
    monkeypatch.setattr(shards, "AHEAD", 5 * 3 * 14 * 14)  # of the largest pictures of the data set
    loaded = []
    dataset = FakeDataset(60)
    real = dataset.load
    dataset.load = lambda i: loaded.append(i) or real(i)
    pictures = shards.decode(job_of(dataset), range(60))
    for taken in range(1, 61):
        assert next(pictures).pixels is not None
        if taken > 2 * shards.BATCH:
            assert len(loaded) <= taken + 5
    assert sorted(loaded) == list(range(60))
    assert next(pictures, None) is None


def test_no_warning_where_nothing_is_wrong(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(tmp_path)
        bank.open(tmp_path, FakeDataset(), FakeEncoder(), PLAN)


def test_a_real_encoders_bank_is_mended_byte_for_byte(tmp_path):
    dataset, encoder = birdlets.dataset(n=16), encode.load("birdlets-tiny", device="cpu")
    folder = tmp_path / build(tmp_path, dataset, encoder).folder.path
    undisturbed = contents(folder)
    assert len(undisturbed) == 3
    for name in ("manifest.json", "00000008-00000016.safetensors"):
        (folder / name).unlink()
    build(tmp_path, dataset, encoder)
    assert contents(folder) == undisturbed


@pytest.mark.slow
def test_wca_predicts_in_bf16_what_it_predicts_in_fp32(tmp_path):
    dataset = birdlets.dataset(n=160)
    encoders = [encode.load("birdlets-tiny", device="cpu", precision=p) for p in ("fp32", "bf16")]
    full, half = (build(tmp_path, dataset, e, Plan(n=16), dtype="float32").read()[0] for e in encoders)
    assert not torch.equal(full.crop, half.crop)
    descriptions = birdlets.sentences(dataset.species)
    label = [f"a photo of a {name}." for name in dataset.class_names]
    text = encode.embed_text(encoders[0], label, [descriptions[name] for name in dataset.class_names])
    equal = wca.scores(full, text).argmax(1) == wca.scores(half, text).argmax(1)
    assert equal.float().mean() > 0.97  # of 160 images; the benchmark measures the share itself on more


@pytest.mark.parametrize(("module", "name"), [(bank.bank, "LAYOUT"), (shards, "PREPROCESSING"), (shards, "BATCH")])
def test_the_key_names_the_versions(monkeypatch, module, name):
    before = bank.key(FakeDataset(), FakeEncoder(), PLAN)
    monkeypatch.setattr(module, name, getattr(module, name) + 1)
    assert bank.key(FakeDataset(), FakeEncoder(), PLAN) != before


def test_a_folder_that_is_no_bank_is_neither_listed_nor_removed(tmp_path):
    (tmp_path / "Documents").mkdir()
    kept = tmp_path / "Documents" / "thesis.txt"
    kept.write_text("years of work")
    assert bank.ls(tmp_path) == []
    with pytest.raises(BankError, match="there is no bank 'Documents'"):
        bank.rm(tmp_path, "Documents")
    assert kept.exists()


@pytest.mark.parametrize(("umask", "expected"), [(0, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_a_lock_follows_the_umask_and_is_never_everybodys_to_write(tmp_path, umask, expected):
    before = os.umask(umask)
    try:
        with store.lock(store.locate(tmp_path), "key"):
            assert (tmp_path / "key.lock").stat().st_mode & 0o777 == expected
    finally:
        os.umask(before)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "nobody.invalid:6379"])
def test_a_cluster_that_is_not_there_is_said_at_once(address):
    pytest.importorskip("ray")
    with pytest.raises(ConnectionError, match=f"there is no Ray cluster at '{address}'"):
        cluster.connect(address)


def test_an_address_that_is_none_is_refused():
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match="'nowhere' is no address of a Ray cluster"):
        cluster.connect("nowhere")
