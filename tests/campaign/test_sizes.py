"""20,000 pictures, 5,000 classes, 50,000 descriptions: memory is stated and bounded, errors come before work."""

import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from bank_world import FakeEncoder
from test_bank_faults import one_thread  # noqa: F401
from upclose import bank, datasets, methods, prompts
from upclose.features import Ladder, Plan, Text, Views

PICTURES, CLASSES, DESCRIPTIONS = 20_000, 5_000, 50_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory by /proc"),
]


def resident(what):
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measured(name, most, work):
    """What `work` returns, once it has taken at most `most` MiB more than there were before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = resident("VmRSS"), time.perf_counter()
    found = work()
    taken = (resident("VmHWM") - before) / 2**20
    print(f"\n| {name} | {taken:.0f} MiB | {time.perf_counter() - start:.1f} s |")
    assert taken < most
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """PICTURES names of one picture in CLASSES folders."""
    root = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (8, 8), (90, 160, 30)).save(root / "one.png")
    for c in range(CLASSES):
        (root / "data" / f"kind_{c:04d}").mkdir(parents=True)
        for k in range(PICTURES // CLASSES):
            os.link(root / "one.png", root / "data" / f"kind_{c:04d}" / f"{k}.png")
    return root / "data"


def test_many_pictures(folder, tmp_path):
    data = measured("a folder of 20,000 pictures", 200, lambda: datasets.load(f"imagefolder:{folder}"))
    assert (len(data), len(data.class_names)) == (PICTURES, CLASSES)
    plan = Plan(n=1)
    held = measured("their bank", 400, lambda: bank.build(data, FakeEncoder(), plan, tmp_path, progress=False))
    rows = measured("read in blocks", 200, lambda: sum(len(label) for _, label, _ in held.batches(256)))
    assert rows == PICTURES
    (folder / "kind 0007").mkdir()
    os.link(folder / "kind_0007" / "0.png", folder / "kind 0007" / "0.png")
    with pytest.raises(ValueError, match="kind 0007"):
        datasets.load(f"imagefolder:{folder}")


def test_many_descriptions(tmp_path):
    names = [f"kind {c} of bird" for c in range(CLASSES)]
    each = DESCRIPTIONS // CLASSES
    rows = {f"Kind-{c}_of bird": [f"- a part {k} of {c}" for k in range(each)] for c in range(CLASSES)}
    file = tmp_path / "own.json"
    file.write_text(json.dumps(rows))
    found = measured("50,000 sentences, linted", 400, lambda: prompts.examine("cupl", "x", "test", names, file=file))
    assert sum(map(len, found.sentences.values())) == DESCRIPTIONS
    squeezed = {name.replace(" ", ""): sentences for name, sentences in rows.items()}
    measured("the same, all spelled together", 400, lambda: prompts.lint(squeezed, names))
    del rows["Kind-4999_of bird"]
    file.write_text(json.dumps(rows))
    start = time.perf_counter()
    with pytest.raises(ValueError, match="no sentences for 'kind 4999 of bird'"):
        prompts.examine("cupl", "x", "test", names, file=file)
    assert time.perf_counter() - start < 30  # seconds, on a busy machine


def unit(*shape, draw=torch.Generator().manual_seed(0)):  # noqa: B008
    return normalize(torch.randn(*shape, generator=draw), dim=-1)


@pytest.mark.parametrize("name", [m.name for m in methods.REGISTRY.values() if m.zero_shot and "stream" not in m.needs])
def test_many_classes(name):
    dim, images = 512, 8
    owner = torch.arange(CLASSES).repeat_interleave(DESCRIPTIONS // CLASSES)
    text = Text(unit(CLASSES, dim), unit(DESCRIPTIONS, dim), owner)
    method = methods.get(name)

    def scores(n):
        if "ladder" in method.needs:
            return method.function(Ladder(unit(n, dim), unit(n, 4, 16, dim)), text)
        return method.function(Views(unit(n, dim), unit(n, 16, dim)), text)

    with torch.no_grad():
        for n in (1, images):  # what is taken does not grow with the images
            assert measured(f"{name}, {n} images", 600, lambda n=n: scores(n)).shape == (n, CLASSES)
