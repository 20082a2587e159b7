"""Random damage to files: each is detected with the file's name, or changes nothing; none is silently wrong."""

import hashlib
import json
import random
import shutil
import warnings

import pytest
import torch

from bank_world import contents
from tally import Tally
from test_bank_faults import build, one_thread, open_bank  # noqa: F401
from upclose import bank, encode, metrics, paths, prompts, report, shipped

SHARDS, MANIFESTS, WEIGHTS, FACTS, METRICS, PARAMS, PROMPTS = 60, 30, 25, 30, 25, 10, 20  # 200 in all

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def damage(content, draw):
    """A few bits flipped, a part cut off, two parts swapped, or a part set to zero."""
    content, size = bytearray(content), len(content)
    start = draw.randrange(size)
    length = draw.randint(1, max(1, min(64, (size - start) // 2)))
    match draw.choice(["flip", "cut", "swap", "zero", "append"]):
        case "flip":
            for _ in range(draw.randint(1, 3)):
                content[draw.randrange(size)] ^= 1 << draw.randrange(8)
        case "cut":
            del content[start:]
        case "swap":
            other = draw.randrange(size - length + 1)
            part, there = content[start : start + length], content[other : other + length]
            content[other : other + length], content[start : start + len(there)] = part, there
        case "zero":
            content[start : start + length] = bytes(length)
        case "append":
            content += content[start : start + length]
    return bytes(content)


def campaign(name, count, files, read, same):
    """Damage one of `files` at a time and read.

    Args:
        files: those that are damaged
        read: what a user would do; gives what was read, and what was said of damage
        same: whether what was read is what an undamaged file gives
    """
    tally, draw = Tally(name), random.Random(name)
    for trial in range(count):
        file = draw.choice(files)
        whole = file.read_bytes()
        damaged = damage(whole, draw)
        file.write_bytes(damaged)
        try:
            found, said = read()
        except Exception as error:
            found, said = None, str(error)
        if file.name in said or (file.name == bank.bank.MANIFEST and "manifest" in said and file.parent.name in said):
            outcome = "detected"
        elif damaged == whole or (found is not None and same(found)):
            outcome = "harmless"
        else:
            outcome = f"silently wrong, or not named: {said[:300]!r}"
        tally.add((file.name, trial), outcome)
        file.write_bytes(whole)
    tally.close(count)


# ------------------------------------------------------------------------------------------------------------- banks


@pytest.fixture
def held(tmp_path):
    return build(tmp_path)


def views(tmp_path):
    return open_bank(tmp_path).read()[0]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other) if a is not None)


@pytest.mark.parametrize(("kind", "count"), [("*.safetensors", SHARDS), ("manifest.json", MANIFESTS)])
def test_banks(tmp_path, held, kind, count):
    undamaged = views(tmp_path)
    files = sorted((tmp_path / held.folder.name).glob(kind))

    def read():
        verified = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bank.bank, "_CHECKED", set())  # as a new process
            try:
                verified = bank.verify(tmp_path, held.folder.name)
                return views(tmp_path), "; ".join(row["shard"] for row in verified)
            except bank.BankError as error:
                assert verified or kind == "manifest.json"
                return None, str(error)

    campaign(f"damaged {kind} of banks", count, files, read, lambda found: equal(found, undamaged))
    assert contents(tmp_path / held.folder.name) == contents(tmp_path / build(tmp_path).folder.name)


# ----------------------------------------------------------------------------------------------------------- weights


def test_weights(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "weights").mkdir(parents=True)
    for name in ("birdlets-tiny.json", "birdlets-tiny.safetensors"):
        shutil.copy(paths.WEIGHTS / name, package / "weights" / name)
    monkeypatch.setattr(shipped, "PACKAGE", package)
    monkeypatch.setattr(paths, "WEIGHTS", package / "weights")
    monkeypatch.setattr("upclose.encode.tiny.WEIGHTS", package / "weights", raising=False)
    fingerprint = encode.load("birdlets-tiny").fingerprint

    def read():
        shipped.checked.cache_clear()
        return encode.load("birdlets-tiny").fingerprint, ""

    files = sorted((package / "weights").iterdir())
    try:
        campaign("damaged weights", WEIGHTS, files, read, lambda found: found == fingerprint)
    finally:
        shipped.checked.cache_clear()


# -------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def day(tmp_path):
    """A folder with one complete run, as `upclose run` leaves it."""
    folder = tmp_path / "2026-01-01" / "small-0123456789"
    folder.mkdir(parents=True)
    rows = [metrics.row("CLIP", torch.arange(9) > k, dataset="birdlets", backbone="none") for k in range(3)]
    frame = report.pd.DataFrame(rows).assign(run=folder.name)
    frame.to_csv(folder / "metrics.csv", index=False, float_format="%.4f")
    (folder / "params.yaml").write_text("dataset: birdlets\nimages: 20\n")
    facts = {"notebook": "01_lgca.ipynb", "hash": "0123456789", "commit": "0" * 40, "dirty": False, "seconds": 12.5}
    facts |= {"peak_memory_bytes": 2**29, "hashes": {"code": "1" * 64}, "files": paths.checksums(folder)}
    paths.write(folder / "run.json", paths.seal(facts))
    return folder.parent


@pytest.mark.parametrize(("name", "count"), [("run.json", FACTS), ("metrics.csv", METRICS), ("params.yaml", PARAMS)])
def test_runs(day, name, count):
    undamaged = report.collect(day.parent).to_csv()
    (file,) = day.glob(f"*/{name}")
    page = report.write(day).read_text()

    def read():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                table = report.collect(day.parent).to_csv()
            except FileNotFoundError:
                table = None
        said = "; ".join(str(row.message) for row in caught)
        shown = report.write(day).read_text()
        if said and "damaged" not in shown:
            return None, "the page shows it"
        return (table, shown), said

    campaign(f"damaged {name} of runs", count, [file], read, lambda found: found == (undamaged, page))


# ----------------------------------------------------------------------------------------------------------- prompts


def test_prompts(tmp_path, monkeypatch):
    monkeypatch.setenv("UPCLOSE_CACHE", str(tmp_path / "cache"))
    content = json.dumps({f"class {k}": [f"a part {j} of it" for j in range(5)] for k in range(9)}).encode()
    source = prompts.Source("clip-d", "", "x", "a/b", "0" * 40, "x.json", hashlib.sha256(content).hexdigest(), "", "")
    published = prompts.local(source)
    published.parent.mkdir(parents=True)
    published.write_bytes(content)
    package = tmp_path / "package"
    own = package / "birdlets" / "prompts" / "clip-d_test.json"
    own.parent.mkdir(parents=True)
    shutil.copy(paths.PACKAGE / "birdlets" / "prompts" / own.name, own)
    monkeypatch.setattr(shipped, "PACKAGE", package)

    def read():
        shipped.checked.cache_clear()
        return (prompts.read(prompts.fetch(source)), prompts.read(shipped.checked(own))), ""

    undamaged, _ = read()
    try:
        campaign("damaged prompt files", PROMPTS, [published, own], read, lambda found: found == undamaged)
    finally:
        shipped.checked.cache_clear()
