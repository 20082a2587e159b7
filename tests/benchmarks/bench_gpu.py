"""The core on a GPU, each measure beside its limit from the same run; prints a table and writes it to results/.

The limit of encoding is the best rate of the encoder on ready tensors, compiled or not. Pictures are synthetic, of
500 x 375 pixels. It is made to end within four minutes: a measure whose turn comes too late is left out and named.
"""

import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_crops import plain_loop
from PIL import Image
from torch.nn.functional import normalize

from upclose import bank, birdlets, crops, encode, images, paths
from upclose.features import Plan, Text, Views
from upclose.methods import dnd, fair, lazsl, wca

DEVICE = "cuda"
LAST_START, END = 200, 238  # seconds after which no measure begins; at which the notebooks are stopped
CROPS, SIDE = 60, 224
SHARES = {"ViT-B-32": (0.95, 0.90), "ViT-B-16": (0.97, 0.95), "ViT-L-14": (0.98, 0.97)}  # of encode_crops, of a bank
FILES = {"ViT-B-32": 2048, "ViT-B-16": 1024, "ViT-L-14": 384}
PHOTOGRAPHS = 256  # in memory: 60 crops of each are fifteen batches of 1,024
SHARD = 128
HEIGHT, WIDTH = 375, 500
ACCURACY = 1000  # Birdlets
CLASSES = (200, 1000)
SCORED = {200: 512, 1000: 128}  # images of a scoring measure
SWEPT = 10_000
ADAPTED = 512


class Table:
    """Rows as they are measured: printed at once, written at the end."""

    head = ("measure", "measured", "limit", "share", "at least", "note")

    def __init__(self):
        self.start, self.rows, self.late = time.perf_counter(), [], []

    def add(self, measure, measured, limit="", share="", target="", note=""):
        self.rows.append((measure, *map(_text, (measured, limit, share, target)), note))
        print(f"{time.perf_counter() - self.start:4.0f} s | " + " | ".join(self.rows[-1]), flush=True)

    def begins(self, measure):
        """Whether there is time for a measure; it is named where there is not."""
        late = time.perf_counter() - self.start > LAST_START
        self.late += [measure] * late
        return not late

    def markdown(self):
        lines = ["| " + " | ".join(row) + " |" for row in (self.head, ["---"] * len(self.head), *self.rows)]
        return "\n".join([*lines, *(f"\nNot measured, for want of time: {name}." for name in self.late)])


def _text(value):
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function, least=3, budget=2.0):
    """The median of at least so many runs after one that warms up, the device waited for."""
    function()
    wait()
    times, begin = [], time.perf_counter()
    while len(times) < least or (time.perf_counter() - begin < budget and len(times) < 50):
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def photograph(seed):
    """(H, W, 3) uint8: smooth colour, texture and edges, as dense for a decoder as a photograph."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((WIDTH, HEIGHT), Image.BICUBIC)).astype(float)
    grain = Image.fromarray(rng.integers(0, 256, (HEIGHT // 2, WIDTH // 2), dtype=np.uint8)).resize((WIDTH, HEIGHT))
    edges = (np.add.outer(np.arange(HEIGHT) // 31, np.arange(WIDTH) // 43) % 2) * 40
    return (smooth + np.asarray(grain)[..., None] * 0.25 + edges[..., None] - 50).clip(0, 255).astype(np.uint8)


class Photographs:
    """JPEG files in a folder, as a data set."""

    name, split, class_names, domain, domain_names = "photographs", "test", ["a", "b"], None, []

    def __init__(self, folder, n):
        self.key = [f"{i}.jpg" for i in range(n)]
        self.label, self.folder, self.fingerprint = np.zeros(n, np.int64), Path(folder), f"photographs {n}"
        contents = []
        for seed in range(64):
            path = self.folder / "one.jpg"
            Image.fromarray(photograph(seed)).save(path, quality=90)
            contents.append(path.read_bytes())
        for i, key in enumerate(self.key):
            (self.folder / key).write_bytes(contents[i % 64])

    def first(self, n):
        few = object.__new__(Photographs)
        few.__dict__.update(self.__dict__, key=self.key[:n], label=self.label[:n], fingerprint=f"photographs {n}")
        return few

    def __len__(self):
        return len(self.key)

    def load(self, i):
        return images.load_image(self.folder / self.key[i])


def rates_of_the_card(table):
    """The card's own rates, by which others can be compared; gigabytes a second read and written."""
    side = 8192 if DEVICE == "cuda" else 256
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    table.add("matrix product in bf16, TFLOP/s", 2 * side**3 / seconds(lambda: a @ b) / 1e12)
    source = torch.randint(0, 255, (2**20 * side // 8,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copied = 2 * len(source) / seconds(lambda: target.copy_(source)) / 1e9
    table.add("copy on the card, GB/s", copied)
    host = source[: 2**28].cpu()
    host = host.pin_memory() if torch.cuda.is_available() else host
    rate = len(host) / seconds(lambda: target[: len(host)].copy_(host, non_blocking=True)) / 1e9
    table.add("copy to the card, GB/s", rate)
    return copied


def cutting(table, copied):
    """Crops a second from photographs on the card, and how far they are from PIL's."""
    pixels = [photograph(i) for i in range(32)]
    pictures = [torch.from_numpy(p).permute(2, 0, 1).contiguous().to(DEVICE) for p in pixels]
    box = torch.stack([crops.sample_boxes(HEIGHT, WIDTH, CROPS, key=str(i)) for i in range(32)])
    time_ = seconds(lambda: crops.extract(pictures, box, SIDE, torch.bfloat16))
    area = ((box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])).mean().item()
    limit = copied * 1e9 / (3 * area + 2 * 3 * SIDE**2)
    rate = 32 * CROPS / time_
    table.add(f"crops.extract, {SIDE} px, crops/s", rate, limit, rate / limit, 300_000, "limit: bytes in and out, once")
    ours = crops.extract(pictures, box, SIDE, torch.uint8)[:, ::6].cpu().int()
    theirs = [
        [np.array(Image.fromarray(p).crop(tuple(b)).resize((SIDE, SIDE), Image.BICUBIC)) for b in rows.tolist()]
        for p, rows in zip(pixels, box[:, ::6])
    ]
    difference = (ours - torch.from_numpy(np.array(theirs)).permute(0, 1, 4, 2, 3)).abs()
    table.add("worst difference from PIL, of 255", str(int(difference.max())), target="at most 2")
    table.add("values that differ from PIL's", f"{(difference > 0).float().mean():.1e}", target="at most 1e-3")


@torch.no_grad()
def encode_only(encoder):
    """Crops a second on ready tensors."""
    ready = torch.randn(encoder.batch_size, 3, SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16)
    return len(ready) / seconds(lambda: encoder.features(ready), budget=1)


def encoding(table, name, folder):
    """One backbone: its own rate, crops from memory, a bank from files, and the authors' way."""
    share, bank_share = SHARES[name]
    encoder = encode.load(name, device=DEVICE, precision="bf16", compile=True)
    eager = copy.copy(encoder)
    eager.compile = False
    compiled_rate, eager_rate = (encode_only(e) for e in (encoder, eager))
    limit = max(compiled_rate, eager_rate)
    best = encoder if limit == compiled_rate else eager
    table.add(f"{name}, encode only, eager, crops/s", eager_rate)
    table.add(f"{name}, encode only, compiled, crops/s", compiled_rate)

    pictures = [torch.from_numpy(photograph(i % 32)).permute(2, 0, 1).contiguous() for i in range(PHOTOGRAPHS)]
    box = torch.stack([crops.sample_boxes(HEIGHT, WIDTH, CROPS, key=str(i)) for i in range(PHOTOGRAPHS)])
    before = best.spent
    start = time.perf_counter()
    best.encode_crops(pictures[:64], box[:64])
    wait()
    few = time.perf_counter() - start
    taken = seconds(lambda: best.encode_crops(pictures, box), least=2, budget=min(2, few))
    rate = PHOTOGRAPHS * CROPS / taken
    table.add(f"{name}, encode_crops from memory", rate, limit, rate / limit, share, _profile(best, before))

    dataset = folder.first(FILES[name])
    with tempfile.TemporaryDirectory() as root:
        before, start = best.spent, time.time()
        held = bank.build(dataset, best, Plan(n=CROPS), root, shard=SHARD, progress=False)
        ended = time.time()
        first = min(path.stat().st_mtime for path in Path(held.folder.path).glob("*.safetensors"))
        rate = (len(dataset) - SHARD) * (1 + CROPS) / (ended - first)
        note = _profile(best, before)
    table.add(f"{name}, bank.build from files, after the first shard", rate, limit, rate / limit, bank_share, note)
    late = first - start - SHARD * (1 + CROPS) / limit
    table.add(f"{name}, bank.build, start, s", late, target="under 3", note="to the first shard, less its share")
    if name == "ViT-B-32":
        few = [Image.fromarray(photograph(i)) for i in range(2)]

        @torch.no_grad()
        def authors():
            for i, image in enumerate(few):
                x = plain_loop(image, box[i], SIDE).to(DEVICE)
                normalize(eager.features(x), dim=-1).cpu()

        theirs = len(few) * CROPS / seconds(authors, budget=1)
        note = f"which makes {theirs:,.0f} crops/s"
        table.add(f"{name}, bank.build over PIL in one process, same encoder", rate / theirs, target=60, note=note)


def _profile(encoder, before):
    """Seconds of the device for cutting and encoding since `before`, in shares of both."""
    spent = {name: value - before[name] for name, value in encoder.spent.items()}
    total = sum(spent.values()) or 1
    return "device: " + ", ".join(f"{name} {value / total:.0%}" for name, value in spent.items())


def accuracy(table):
    """bf16 against fp32, on pictures and weights that mean something."""
    dataset, plan = birdlets.dataset(n=ACCURACY), Plan(n=16)
    found = []
    for precision in ("fp32", "bf16"):
        encoder = encode.load("birdlets-tiny", device=DEVICE, precision=precision)
        with tempfile.TemporaryDirectory() as root:
            found.append(bank.build(dataset, encoder, plan, root, dtype="float32", progress=False).read()[0])
        if precision == "fp32":
            sentences = birdlets.sentences(dataset.species)
            label = [f"a photo of a {name}." for name in dataset.class_names]
            text = encode.embed_text(encoder, label, [sentences[name] for name in dataset.class_names])
            text = Text(*(part.cpu() for part in text))
    full, half = found
    error = (1 - (full.crop.double() * half.crop.double()).sum(-1)).max().item()
    equal = (wca.scores(full, text).argmax(1) == wca.scores(half, text).argmax(1)).float().mean().item()
    table.add("bf16 against fp32, 1 - cosine, worst crop of Birdlets", f"{error:.1e}", target="at most 1e-3")
    table.add("bf16 against fp32, equal predictions of WCA", f"{equal:.2%}", target="99 %")


def problem(n, classes, attributes, count, d=512):
    """Random embeddings with a common part, so that cosines lie close together as CLIP's do."""
    draw = torch.Generator(device=DEVICE).manual_seed(0)

    def unit(*shape):
        return normalize(torch.randn(*shape, d, device=DEVICE, generator=draw) + common, dim=-1)

    common = 1.5 * torch.randn(d, device=DEVICE, generator=draw)
    owner = torch.arange(classes, device=DEVICE).repeat_interleave(attributes)
    return Views(unit(count), unit(count, n)), Text(unit(classes), unit(classes * attributes), owner)


def scoring(table):
    """Milliseconds an image of the methods that solve a transport problem a class."""
    for classes, target in zip(CLASSES, (0.05, 0.25)):
        views, text = problem(9, classes, 9, SCORED[classes])
        each = 1000 * seconds(lambda v=views, t=text: dnd.scores(v, t), budget=1) / len(views.image)
        table.add(f"D&D, 9 x 9, {classes:,} classes, ms an image", each, target=target)
    views, text = problem(90, CLASSES[-1], 8, SCORED[CLASSES[-1]])
    each = 1000 * seconds(lambda: lazsl.scores(views, text), budget=1) / len(views.image)
    table.add(f"LaZSL, 90 crops, {CLASSES[-1]:,} classes, ms an image", each, target=0.15)


def sweep(table):
    views, text = problem(90, CLASSES[0], 8, SWEPT)
    settings = [dict(theta=theta, epsilon=e) for theta in (0.6, 0.7, 0.8, 0.9) for e in (0.05, 0.07, 0.1, 0.15, 0.2)]

    def run():
        for setting in settings:
            lazsl.scores(views, text, **setting)

    lazsl.scores(views.select(slice(0, 64)), text)
    wait()
    start = time.perf_counter()
    run()
    wait()
    taken = time.perf_counter() - start
    table.add(f"LaZSL, {len(settings)} settings over {SWEPT:,} images, s", taken, target="8", note="views on the card")


def adapting(table, folder):
    """Images a second of FAIR's second epoch over what the encoder alone would allow."""
    encoder = encode.load("ViT-B-32", device=DEVICE, precision="bf16")
    dataset, ended = folder.first(ADAPTED), []
    dataset.class_names = [f"class {i}" for i in range(20)]
    descriptions = [[f"{name}, {i}" for i in "abc"] for name in dataset.class_names]
    text, limit = encode.embed_text(encoder, dataset.class_names, descriptions), encode_only(encoder) / 20
    fair.adapt(encoder, dataset, text, epochs=2, on_epoch=lambda _: ended.append(time.perf_counter()))
    rate = len(dataset) / (ended[1] - ended[0])
    table.add("fair.adapt, ViT-B-32, images/s", rate, limit, rate / limit, 0.60, "limit: 20 crops an image, eager")


def notebooks(table):
    """The numbered notebooks at once, into empty folders, for as long as there is time."""
    sheets = sorted(map(str, (paths.ROOT / "params" / "birdlets").glob("0*.yaml")))
    left = END - (time.perf_counter() - table.start)
    with tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, "-m", "upclose.cli", "run", "--force", "--workers", str(len(sheets))]
        command += ["--results", f"{empty}/results", "-p", f"device={DEVICE}", *sheets]
        start = time.perf_counter()
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        running = subprocess.Popen(command, env=os.environ | {"UPCLOSE_BANK": f"{empty}/banks"}, **quiet)
        try:
            code = running.wait(left)
            note = "" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            running.terminate()  # ends its kernels too
            running.wait()
            note = "stopped before they were done"
    taken = time.perf_counter() - start
    table.add(f"{len(sheets)} numbered notebooks, cold, together, s", taken, target="120", note=note)


def main():
    if DEVICE == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_gpu measures on a CUDA GPU, and torch finds none here: nothing was measured")
    table = Table()
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor()
    facts = f"{card}, torch {torch.__version__}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}"
    print(facts)
    print(" | ".join(("   s", *table.head)))
    cutting(table, rates_of_the_card(table))
    with tempfile.TemporaryDirectory() as files:
        folder = Photographs(files, max(FILES.values()))
        measures = {
            **{name: lambda name=name: encoding(table, name, folder) for name in SHARES},
            "accuracy": lambda: accuracy(table),
            "scoring": lambda: scoring(table),
            "sweep": lambda: sweep(table),
            "fair.adapt": lambda: adapting(table, folder),
            "notebooks": lambda: notebooks(table),
        }
        for name, measure in measures.items():
            if table.begins(name):
                measure()
    taken = f"{time.perf_counter() - table.start:.0f} s in all."
    page = f"# Benchmarks on a GPU\n\n{facts}.\n\n{table.markdown()}\n\n{taken}\n"
    paths.write(paths.ROOT / "results" / "benchmarks-gpu.md", page.encode())
    print(taken)


if __name__ == "__main__":
    main()
