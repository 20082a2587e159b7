"""Pictures in tars: what webdataset reads, in any order and from anywhere, and what is said of bad shards."""

import io
import re
import tarfile
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Flowers102

from bank_world import PLAN, FakeEncoder, contents
from upclose import bank, datasets, encode, evaluate, identity, params, paths
from upclose.bank import cluster, shards
from upclose.datasets import registry, tars
from upclose.features import Dataset
from upclose.images import load_image

wds = pytest.importorskip("webdataset", reason='needs the extra: pip install "upclose[webdataset]"')
NAMES = ["beaver", "dolphin", "otter", "seal"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UPCLOSE_CACHE", str(tmp_path / "cache"))


def picture(i, kind="webp"):
    pixels = np.random.default_rng(i).integers(0, 255, (6 + i % 3, 8, 3), dtype=np.uint8)
    options = {"webp": {"format": "webp", "lossless": True}, "png": {"format": "png"}, "jpg": {"format": "jpeg"}}
    Image.fromarray(pixels).save(packed := io.BytesIO(), **options[kind])
    return packed.getvalue()


def collection(folder, split="test", n=23, each=5, names=NAMES, kinds=("webp",)):
    """A split as CLIP_benchmark's `clip_benchmark_export_wds` writes it."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(str(folder / split / "%d.tar"), maxcount=each, verbose=0) as sink:
        for i in range(n):
            sink.write(
                {
                    "__key__": f"s{i:07d}",
                    kinds[i % len(kinds)]: picture(i, kinds[i % len(kinds)]),
                    "cls": i % len(names),
                }
            )
    (folder / split / "nshards.txt").write_text(f"{-(-n // each)}\n")
    (folder / "classnames.txt").write_text("\n".join(names) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    return folder


def packed(file, *members):
    """A tar of (name, content) pairs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            (info := tarfile.TarInfo(name)).size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (file.parent / "classnames.txt").write_text("\n".join(NAMES))
    return f"webdataset:{file}"


class Server(BaseHTTPRequestHandler):
    """Files below `root`, by ranges, with an ETag; `pages` are given as HTML; counts bytes."""

    protocol_version = "HTTP/1.1"
    root, pages, ranges, sent = None, (), True, []

    def do_GET(self):
        path = self.root / self.path.lstrip("/")
        if not path.is_file() and self.path not in self.pages:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        whole = b"<!DOCTYPE html><p>Sign in" if self.path in self.pages else path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.ranges else None
        start, stop = (int(asked[1]), int(asked[2] or len(whole) - 1) + 1) if asked else (0, len(whole))
        body = whole[start:stop]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(whole)}")
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hash(whole)}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.sent.append(len(body))
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp")
    handler = type("Handler", (Server,), {"root": tmp_path, "sent": [], "pages": set()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", handler
        http.shutdown()
        thread.join()


def test_a_collection_is_what_webdataset_reads(tmp_path):
    folder = collection(tmp_path / "wds_toy", kinds=("webp", "png", "jpg"))
    data = datasets.load(f"webdataset:{folder}")
    read = list(wds.WebDataset(f"{folder}/test/{{0..4}}.tar", shardshuffle=False))
    assert isinstance(data, Dataset)
    assert len(data) == len(read) == 23
    assert data.class_names == NAMES
    for i, sample in enumerate(read):
        kind = next(name for name in ("webp", "png", "jpg") if name in sample)
        assert data.content(i) == sample[kind]
        assert data.label[i] == int(sample["cls"])
        assert data.key[i] == f"{i // 5}/{sample['__key__']}"
        (tmp_path / f"p.{kind}").write_bytes(sample[kind])
        assert torch.equal(data.load(i), load_image(tmp_path / f"p.{kind}"))
    assert data.tar_starts == [0, 5, 10, 15, 20]


def test_the_order_in_which_shards_are_named_and_where_they_lie_change_nothing(tmp_path, server):
    url, _ = server
    folder = collection(tmp_path / "wds_toy", n=23, each=2)  # 12 shards: 10.tar comes after 9.tar
    data = datasets.load(f"webdataset:{folder}/test/{{0..11}}.tar")
    assert [key.split("/")[0] for key in data.key[::2]] == [str(k) for k in range(12)]
    assert data.key[22] == "11/s0000022"
    other = datasets.load(f"webdataset:{folder}/test/{{11,3,0,1,2,10,4,5,6,7,8,9}}.tar")
    remote = datasets.load(f"webdataset:{url}/wds_toy/test/{{0..11}}.tar")
    encoder = FakeEncoder()
    assert bank.key(data, encoder, PLAN) == bank.key(other, encoder, PLAN) == bank.key(remote, encoder, PLAN)
    assert data.content(7) == other.content(7) == remote.content(7)
    banks = [bank.build(d, encoder, PLAN, tmp_path / f"bank{k}", shard=8) for k, d in enumerate((data, remote))]
    assert contents(Path(banks[0].folder.path)) == contents(Path(banks[1].folder.path))
    renamed = collection(tmp_path / "wds_toy2", n=23, each=2, names=["x", *NAMES[1:]])
    assert bank.key(datasets.load(f"webdataset:{renamed}/test/{{0..11}}.tar"), encoder, PLAN) != bank.key(
        data, encoder, PLAN
    )


def test_headers_are_read_once_and_again_when_a_shard_has_changed(tmp_path, monkeypatch):
    folder = collection(tmp_path / "wds_toy")
    read = []
    whole = tars.read_headers
    monkeypatch.setattr(tars, "read_headers", lambda url, size: read.append(url) or whole(url, size))
    first = datasets.load(f"webdataset:{folder}")
    assert len(read) == 5
    assert datasets.load(f"webdataset:{folder}").fingerprint == first.fingerprint
    assert len(read) == 5
    kept = sorted((tmp_path / "cache" / "tars").iterdir())
    kept[0].write_bytes(kept[0].read_bytes()[:40])  # damaged, and so made anew
    assert datasets.load(f"webdataset:{folder}").fingerprint == first.fingerprint
    assert len(read) == 6
    packed(folder / "test" / "3.tar", ("s0000015.png", picture(3, "png")), ("s0000015.cls", b"1"))
    assert datasets.load(f"webdataset:{folder}").fingerprint != first.fingerprint
    assert len(read) == 7


def test_pictures_behind_a_url_are_ranges_of_bytes(tmp_path, server):
    url, handler = server
    big = [
        (f"s{i}.{kind}", content)
        for i in range(8)
        for kind, content in (("bin", bytes(2**20)), ("png", picture(i, "png")), ("cls", b"2"))
    ]
    packed(tmp_path / "big.tar", *big)
    data = datasets.load(f"webdataset:{url}/big.tar")
    before = len(handler.sent)
    assert data.content(5) == picture(5, "png")
    assert sum(handler.sent[before:]) == len(picture(5, "png"))
    handler.sent.clear()
    assert datasets.load(f"webdataset:{url}/big.tar").fingerprint == data.fingerprint
    assert sum(handler.sent) < 2**10  # the list of classes; the index came from the cache
    handler.ranges = False
    fsspec.filesystem("http").invalidate_cache()
    with pytest.raises(datasets.ShardError, match="range"):
        data.content(5)


@pytest.mark.parametrize("name", ["wds_vtab-cifar100", "wds_vtab-cifar100_test"])
def test_a_published_collection_is_the_registrys_data_set(tmp_path, name):
    classes = [f"kind {c:03d}" for c in range(100)]
    collection(tmp_path / name, n=100, each=40, names=classes)
    with pytest.warns(datasets.CollectionWarning, match="100 pictures, not 10,000"):
        data = datasets.load(f"webdataset:{name}", root=tmp_path)
    assert (data.name, data.split, data.class_names) == ("cifar100", "test", classes)
    with pytest.raises(ValueError, match="'vissl'"):
        datasets.load(f"webdataset:{name}", root=tmp_path, protocol="vissl")
    (tmp_path / name / "classnames.txt").write_text("\n".join([*classes[:7], classes[8], classes[7], *classes[9:]]))
    with pytest.raises(ValueError, match=r"'kind 008' stands before 'kind 007'.*class order is wrong"):
        datasets.load(f"webdataset:{name}", root=tmp_path)
    (tmp_path / name / "classnames.txt").write_text("\n".join([*classes, "one more"]))
    with pytest.raises(ValueError, match="101 class names, but cifar100 has 100"):
        datasets.load(f"webdataset:{name}", root=tmp_path)


def test_a_collection_brings_its_templates_unless_it_is_the_registrys(tmp_path):
    folder = collection(tmp_path / "wds_toy")
    said = folder / "zeroshot_classification_templates.txt"
    said.write_text("a photo of a {c}.\n\n  {c}, drawn\n")
    data = datasets.load(f"webdataset:{folder}", limit=6)
    assert data.templates == ("a photo of a {c}.", "{c}, drawn")
    assert datasets.load(f"webdataset:{folder}/test/{{0..4}}.tar").templates == data.templates
    encoder = encode.load("birdlets-tiny")
    found = evaluate.text(encoder, data, "clip-e")
    sentences = [[f"a photo of a {name}.", f"{name}, drawn"] for name in NAMES]
    expected = encode.embed_text(encoder, sentences, sentences, NAMES)
    assert torch.equal(found.label, expected.label)
    assert torch.equal(found.description, expected.description)
    before = datasets.load(f"webdataset:{folder}").fingerprint
    said.write_text("a drawing of a {c}.\n")
    assert datasets.load(f"webdataset:{folder}").fingerprint != before
    for wrong in ("a photo", "{} here", "{c} and {c}", "{c} {0}"):
        said.write_text(f"a photo of a {{c}}.\n{wrong}\n")
        with pytest.raises(ValueError, match=f"{re.escape(repr(wrong))} has not one {{c}}"):
            datasets.load(f"webdataset:{folder}")
    said.write_text("<!doctype html>")
    with pytest.raises(ValueError, match=r"templates\.txt is a page"):
        datasets.load(f"webdataset:{folder}")
    cifar = collection(tmp_path / "wds_vtab-cifar100", n=100, each=40, names=[f"kind {c:03d}" for c in range(100)])
    with pytest.warns(datasets.CollectionWarning):
        assert datasets.load(f"webdataset:{cifar}").templates == ()  # CLIP's, as published tables have


def test_aircraft_are_in_the_order_of_their_official_list(tmp_path):
    names = [f"{k}-200" for k in range(700, 770)] + ["ATR-72", "An-12", "BAE 146-200", "BAE-125", "F-16A/B", "F/A-18"]
    names += [f"Z{k}" for k in range(100, 124)]
    folder = collection(tmp_path / "wds_fgvc_aircraft", n=100, each=50, names=names)
    with pytest.warns(datasets.CollectionWarning, match="100 pictures, not 3,333"):
        assert datasets.load(f"webdataset:{folder}").class_names[70:72] == ["ATR-72", "An-12"]
    names[70:72] = names[71:69:-1]
    (folder / "classnames.txt").write_text("\n".join(names))
    with pytest.raises(ValueError, match=r"'An-12' stands before 'ATR-72'.*class order is wrong"):
        datasets.load(f"webdataset:{folder}")


def test_imagenet_is_read_with_the_registrys_names(tmp_path):
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES as theirs

    collection(tmp_path / "wds_imagenet1k", n=3, names=list(theirs))
    with pytest.warns(datasets.CollectionWarning, match="not 50,000"):
        data = datasets.load("webdataset:wds_imagenet1k", root=tmp_path)
    assert (data.name, data.class_names) == ("imagenet", list(registry.imagenet_classes().values()))


def test_what_flowers_and_caltech_are_not_is_said(tmp_path):
    flowers = collection(tmp_path / "wds_vtab-flowers", n=4, names=list(Flowers102.classes))
    with (
        pytest.warns(datasets.CollectionWarning, match="flowers102 of official, not of 'coop'"),
        pytest.warns(datasets.CollectionWarning, match="4 pictures, not 6,149"),
    ):
        assert datasets.load(f"webdataset:{flowers}").name == "flowers102"
    with pytest.raises(ValueError, match=r"is flowers102 of official.*asked for as 'coop'"):
        datasets.load(f"webdataset:{flowers}", protocol="coop")
    caltech = collection(tmp_path / "wds_vtab-caltech101")
    with pytest.warns(datasets.CollectionWarning, match="is no caltech101 of the registry"):
        assert datasets.load(f"webdataset:{caltech}").name == "wds_vtab-caltech101"


def test_the_table_of_collections_names_splits_that_the_registry_has():
    for line in tars.collections().values():
        for protocol in line.protocol.split("+") if line.part else ():
            assert getattr(registry.entry(line.dataset, protocol), line.part)
        assert line.part or line.note
    same = {(line.dataset, line.part) for line in tars.collections().values() if line.part}
    for dataset, part in same:  # protocols that share a split have as many pictures
        line = next(x for x in tars.collections().values() if (x.dataset, x.part) == (dataset, part))
        assert len({getattr(registry.entry(dataset, p), part) for p in line.protocol.split("+")}) == 1


def test_shards_that_are_not_right_are_named_before_work(tmp_path, server):
    url, handler = server
    folder = collection(tmp_path / "wds_toy")
    (folder / "test" / "2.tar").rename(tmp_path / "aside")
    for place in (folder, f"{folder}/test/{{0..4}}.tar", f"{url}/wds_toy"):
        with pytest.raises(datasets.ShardError, match=r"1 of 5 shards are not there, the first is .*test/2\.tar"):
            datasets.load(f"webdataset:{place}")
    handler.pages = {"/wds_toy/test/2.tar"}
    with pytest.raises(datasets.ShardError, match="is a page and no tar"):
        datasets.load(f"webdataset:{url}/wds_toy")
    whole = (tmp_path / "aside").read_bytes()
    for content, said in (
        (whole[:700], "cut short"),
        (whole[:1536], "cut short"),
        (b"", "cut short"),
        (b"\x1f\x8b" + whole, "compressed"),
        (b"text " * 500, "no tar"),
    ):
        (folder / "test" / "2.tar").write_bytes(content)
        with pytest.raises(datasets.ShardError, match=rf"2\.tar.*{said}"):
            datasets.load(f"webdataset:{folder}")
    handler.pages = {"/wds_toy/classnames.txt", "/wds_toy/test/nshards.txt"}
    with pytest.raises(datasets.ShardError, match=r"nshards\.txt says '<!DOCTYPE"):
        datasets.load(f"webdataset:{url}/wds_toy")
    (folder / "test" / "nshards.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"nshards\.txt"):
        datasets.load(f"webdataset:{folder}")


def test_a_tar_without_its_end_is_cut_short(tmp_path):
    place = packed(tmp_path / "a.tar", ("a.png", picture(0, "png")), ("a.cls", b"1"))
    file = tmp_path / "a.tar"
    with tarfile.open(file) as tar:
        last = tar.getmembers()[-1]
    file.write_bytes(file.read_bytes()[: last.offset_data + 512])  # all members, and no end
    with pytest.raises(datasets.ShardError, match="cut short"):
        datasets.load(place)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.png", b"x"), ("b.png", b"x"), ("b.cls", b"1")], "the sample 'a' has no label"),
        ([("a.cls", b"1")], "the sample 'a' has 0 pictures"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"1")], "the sample 'a' has 2 pictures"),
        ([("a.png", b"x"), ("a.cls", b"tern")], "no class number"),
        ([("a.png", b"x"), ("a.cls", b"4")], "label 4, outside the 4 classes"),
        ([("a.png", b"x"), ("a.cls", b"-1")], "label -1, outside"),
    ],
)
def test_samples_that_are_not_right_are_named_before_work(tmp_path, members, said):
    with pytest.raises(ValueError, match=said):
        datasets.load(packed(tmp_path / "a.tar", *members))


def test_names_and_links_in_a_tar_lead_nowhere(tmp_path):
    file = tmp_path / "a.tar"
    packed(
        file, ("../../x.png", picture(0, "png")), ("../../x.cls", b"1"), ("__meta__/y.png", b"no"), (".hidden", b"no")
    )
    with tarfile.open(file, "a") as tar:
        link = tarfile.TarInfo("z.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    data = datasets.load(f"webdataset:{file}")
    assert data.key[0] == "a/../../x"
    assert torch.equal(data.load(0), load_image("x", picture(0, "png")))
    assert len(data) == 1
    assert {path.name for path in set(tmp_path.rglob("*")) - set(before)} <= {"cache", "tars"} | {
        path.name for path in (tmp_path / "cache" / "tars").iterdir()
    }


def test_a_picture_that_cannot_be_read_is_listed_by_the_bank(tmp_path):
    place = packed(
        tmp_path / "a.tar", ("a.png", b"no picture"), ("a.cls", b"1"), ("b.png", picture(1, "png")), ("b.cls", b"1")
    )
    data = datasets.load(place)
    with pytest.warns(UserWarning, match="a/a: no image format"):
        built = bank.build(data, FakeEncoder(), PLAN, tmp_path / "bank", on_error="skip")
    assert [row["key"] for row in built.errors] == ["a/a"]


def test_the_shards_of_a_bank_end_where_a_tar_ends_and_a_killed_build_goes_on(tmp_path):
    data = datasets.load(f"webdataset:{collection(tmp_path / 'wds_toy', n=60, each=20)}")
    encoder = FakeEncoder()
    whole = bank.build(data, encoder, PLAN, tmp_path / "whole", shard=8)
    ranges = [(s["start"], s["stop"]) for s in whole.manifest["shards"]]
    assert ranges == [(a + k, min(a + k + 8, a + 20)) for a in (0, 20, 40) for k in (0, 8, 16)]
    again = bank.build(data, encoder, PLAN, tmp_path / "again", shard=8)
    for name in ("00000016-00000020.safetensors", "00000020-00000028.safetensors", "manifest.json"):
        (Path(again.folder.path) / name).unlink()
    (Path(again.folder.path) / "00000048-00000056.safetensors").write_bytes(b"half")
    encoder.encoded = 0
    bank.build(data, encoder, PLAN, tmp_path / "again", shard=8)
    assert encoder.encoded == 20
    assert contents(Path(again.folder.path)) == contents(Path(whole.folder.path))


def test_a_worker_goes_through_one_tar_after_the_other_and_a_lost_one_loses_nothing():
    data = type("Data", (), {"tar_starts": [0, 20, 40]})
    todo = shards.cut(data, 0, 60, 8)
    runs = shards.runs(data, todo)
    assert [[a // 20 for a, _ in run] for run in runs] == [[0] * 3, [1] * 3, [2] * 3]
    assert shards.runs(object(), todo) == [[shard] for shard in todo]
    queue, done = cluster.Queue(runs), []
    assert [queue.take("a"), queue.take("b"), queue.take("a")] == [(0, 8), (20, 28), (8, 16)]
    queue.put_back("a", (8, 16))
    assert queue.take("c") == (8, 16)  # the run of the worker that was lost goes on
    assert [queue.take("b"), queue.take("b"), queue.take("b")] == [(28, 36), (36, 40), (40, 48)]
    assert queue.take("c") == (16, 20)
    assert queue.take("c") == (48, 56)  # none is left: it helps with what another holds
    queue.put_back("c", (48, 56))
    while queue:
        done.append(queue.take("b"))
    assert done == [(48, 56), (56, 60)]


def test_a_limit_takes_every_nth_picture(tmp_path):
    data = datasets.load(f"webdataset:{collection(tmp_path / 'wds_toy')}", limit=6)
    assert [key.split("/")[1] for key in data.key] == [f"s{i * 23 // 6:07d}" for i in range(6)]
    assert data.tar_starts == [0, 2, 3, 4]  # of the tars 0, 0, 1, 2, 3, 3


def test_the_index_takes_a_few_bytes_a_picture(tmp_path):
    n = 200_000
    index = tars.Index(np.array([f"s{i:07d}" for i in range(n)], dtype=bytes), *np.zeros((3, n), dtype=np.int64))
    data = tars.Tars("x", "test", ["a"], ["a/0.tar", "a/1.tar"], index, np.arange(n, dtype=np.int32) // (n // 2))
    held = sum(array.nbytes for array in index) + data._shard.nbytes
    assert held / n < 40
    assert data.key[n - 1] == "1/s0199999"
    assert data.tar_starts == [0, n // 2]


def test_the_hub_address_of_a_collection_is_read_by_its_files(monkeypatch):
    asked = []
    monkeypatch.setattr(tars, "_text", lambda url: asked.append(url) or ("2" if url.endswith("nshards.txt") else None))
    urls, _, name = tars._shards("https://huggingface.co/datasets/clip-benchmark/wds_vtab-pets/tree/main", "test", "")
    base = "https://huggingface.co/datasets/clip-benchmark/wds_vtab-pets/resolve/main/test"
    assert urls == [f"{base}/0.tar", f"{base}/1.tar"]
    assert asked == [f"{base}/nshards.txt"]
    assert name == "wds_vtab-pets"


def test_parameters_take_shards():
    assert params._registered("webdataset:s3://bucket/{000..127}.tar")
    with pytest.raises(ValueError, match="names no place: webdataset:PLACE"):
        params._registered("webdataset:")


def test_a_run_on_a_collection_has_the_sentences_of_its_data_set(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(identity.prompts, "identity", lambda dataset: asked.append(dataset) or "")
    flowers = collection(tmp_path / "wds_vtab-flowers", n=4, names=list(Flowers102.classes))
    job = params.Job("x", paths.NOTEBOOKS / "02_lazsl.ipynb", {"dataset": f"webdataset:{flowers}", "split": "test"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", datasets.CollectionWarning)
        hashes, _ = identity.ingredients(job)
        assert hashes["data"] == datasets.load(f"webdataset:{flowers}").fingerprint
    assert asked == ["flowers102"]
