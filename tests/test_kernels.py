"""The Triton kernels against PIL, run by Triton's interpreter on small pictures; and what only a GPU can show."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bank_world import PLAN, FakeDataset, contents
from test_crops import awkward_boxes, picture, pil, pil_crops, pil_resize
from test_encode import clip, encoder_of
from upclose import bank, crops, encode
from upclose.features import Plan

triton = pytest.importorskip("triton", reason="kernels are written in Triton, which comes with torch on Linux")
with pytest.MonkeyPatch.context() as patch:  # read once, when the kernels are defined
    if not torch.cuda.is_available():  # where there is a GPU they are compiled, for tests/test_gpu.py
        patch.setenv("TRITON_INTERPRET", "1")
    from triton.runtime.interpreter import InterpretedFunction

    from upclose import kernels

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture
def interpreted(monkeypatch):
    """Pictures on the CPU are cut by the kernels too, in tiles that suit the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here: tests/test_gpu.py runs them")
    monkeypatch.setattr(triton.language, "sum", InterpretedFunction(triton.language.sum.fn))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "ROWS", 64)
    return monkeypatch


def check(ours, expected):
    difference = (ours.int() - expected.int()).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() <= 1e-3


@pytest.mark.parametrize(
    ("height", "width", "size"), [(40, 55, 24), (90, 30, 24), (1, 90, 17), (90, 1, 16), (33, 47, 40), (60, 150, 16)]
)
def test_crops_are_pils(interpreted, height, width, size):
    image = picture(height, width)
    box = torch.cat([awkward_boxes(height, width), torch.tensor([[0.0, 0, max(1, width // 3), height]])])
    check(crops.extract(image, box, size, torch.uint8), pil_crops(image, box, size))


@pytest.mark.parametrize(("height", "width"), [(1, 1500), (1500, 1)])
def test_slivers(interpreted, height, width):
    interpreted.setattr(kernels, "ROWS", 1024 if height > width else 8)
    image = picture(height, width)
    box = torch.tensor([[0.0, 0, width, height], [width // 2, height // 2, width // 2 + 1, height // 2 + 1]])
    check(crops.extract(image, box, 64, torch.uint8), pil_crops(image, box, 64))
    ours = crops.whole(image, 16, torch.uint8)
    across = ours if width > height else ours.transpose(1, 2)
    assert torch.equal(across, across[:, :1].expand_as(across))
    interpreted.delenv("TRITON_INTERPRET")
    assert (ours.int() - crops.whole(image, 16, torch.uint8).int()).abs().max() <= 2


def test_whole_pictures_of_many_sizes_at_once(interpreted):
    images = [picture(h, w, h) for h, w in ((60, 90), (90, 60), (32, 32), (9, 40), (70, 20))]
    expected = []
    for image in images:
        tall, wide = crops._short_side(*image.shape[1:], 32)
        done = pil_resize(pil(image), wide, tall)
        left, top = round((wide - 32) / 2), round((tall - 32) / 2)
        expected.append(torch.from_numpy(np.array(done.crop((left, top, left + 32, top + 32)))).permute(2, 0, 1))
    check(crops.whole(images, 32, torch.uint8), torch.stack(expected))
    squashed = np.concatenate([crops.whole_view(*image.shape[1:], 32, squash=True) for image in images])
    facts = (torch.device("cpu"), 32, torch.uint8, crops.MEAN, crops.STD)
    ours = crops.cut(images, np.arange(5), squashed, *facts)
    expected = [pil_resize(pil(image), 32, 32) for image in images]
    check(ours, torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in expected]))


def test_pictures_of_any_sizes_in_any_type(interpreted):
    images = [picture(40, 60, 1), picture(70, 25, 2), picture(1, 1, 3)]
    box = torch.stack([crops.sample_boxes(*image.shape[1:], 2, key="a") for image in images])
    pixels = crops.extract(images, box, 16, torch.uint8)
    for i, image in enumerate(images):
        check(pixels[i], pil_crops(image, box[i], 16))
    expected = (pixels.float() / 255 - torch.tensor(crops.MEAN).view(3, 1, 1)) / torch.tensor(crops.STD).view(3, 1, 1)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ours = crops.extract(images, box[:, :1], 16, dtype)
        assert ours.shape == (3, 1, 3, 16, 16)
        torch.testing.assert_close(ours.float(), expected[:, :1], atol=2e-6, rtol=2 * torch.finfo(dtype).eps)


def test_blocks_share_a_buffer_and_change_nothing(interpreted):
    image = picture(50, 80)
    box = crops.sample_boxes(50, 80, 4)
    expected = crops.extract(image, box, 16, torch.uint8)
    interpreted.setattr(kernels, "BLOCK_BYTES", 1)
    assert torch.equal(crops.extract(image, box, 16, torch.uint8), expected)
    view = np.tile([0, 50, 80, 16, 16, 0, 0], (5, 1))
    boxes = np.array([[0, 0, 80, 50], [0, 0, 1, 1], [3, 3, 40, 30], [0, 0, 9, 9], [5, 5, 6, 50]])
    for bytes_ in (1, 4000, 10**9):
        interpreted.setattr(kernels, "BLOCK_BYTES", bytes_)
        layout = kernels.lay_out(view, boxes, 16)
        ends = [*layout.first[1:], 5]
        for a, b in zip(layout.first, ends):  # no two views of a block overlap, and none ends behind the buffer
            place = layout.table[a:b, 1]
            sides = (boxes[a:b, 2:] - boxes[a:b, :2]).max(axis=1)
            assert (np.diff(place) >= 3 * 16 * sides[:-1]).all()
            assert place[-1] + 3 * 16 * sides[-1] <= layout.room
            assert not (place % 16).any()


def test_a_box_outside_its_picture_reads_no_foreign_memory(interpreted):
    images = [torch.full((3, 20, 30), value, dtype=torch.uint8) for value in (10, 200, 90)]
    box = torch.tensor([[[-5.0, -9, 12, 8]], [[25, 15, 300, 400]], [[40, 50, 20, 10]]])
    with pytest.raises(ValueError, match=r"box \(-5, -9, 12, 8\) is empty or not inside"):
        crops.extract(images, box, 8)
    pixels, place = crops.pack(images, torch.device("cpu"))
    view = np.concatenate([place, np.tile([8, 8, 0, 0], (3, 1))], axis=1)
    for known in (box.numpy().reshape(3, 4).astype(np.int64), None):  # on the host, or on a device
        layout = kernels.lay_out(view, known, 8)
        table, rows = torch.from_numpy(layout.table), box.reshape(3, 4).int()
        ours = kernels.cut(pixels, table, rows, *layout[1:], 8, torch.uint8, [1.0] * 3, [0.0] * 3)
        for one, value in zip(ours, (10, 200, 90)):
            assert (one == value).all()


def test_nothing_in_nothing_out(interpreted):
    facts = (torch.device("cpu"), 8, torch.float32, crops.MEAN, crops.STD)
    none = crops.cut([picture(9, 9)], np.empty(0, np.int64), np.empty((0, 8), np.int64), *facts)
    assert none.shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match="there is no picture to cut"):
        crops.whole([], 8)


# the encoder's stream


@pytest.fixture
def scene():
    """An encoder, three small pictures and their boxes, two of which are one."""
    images = [picture(h, w, h) for h, w in ((20, 30), (28, 17), (16, 16))]
    box = torch.stack([crops.sample_boxes(*image.shape[1:], 3, key="a") for image in images])
    box[:, 2] = box[:, 0]
    return encoder_of(clip(), batch_size=4), images, box


def sizes_of(encoder):
    """A list to which the rows of each later batch are added."""
    sizes, real = [], encoder._features
    encoder._features = lambda x, *rest: sizes.append(len(x)) or real(x, *rest)
    return sizes


def test_batches_are_filled_across_pictures(interpreted, scene):
    encoder, images, box = scene
    with interpreted.context() as patch:
        patch.delenv("TRITON_INTERPRET")
        wanted = [*encoder.encode_images(images, cls=True), *encoder.encode_crops(images, box, cls=True)]
    sizes = sizes_of(encoder)
    found = [*encoder.encode_images(images, cls=True), *encoder.encode_crops(images, box, cls=True)]
    assert sizes == [3, 4, 2]  # three whole pictures; six distinct boxes
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=0)
    sizes.clear()
    image, crop, image_cls, crop_cls = encoder.encode_views(map(encoder.prepare, images, box), cls=True)
    assert sizes == [4, 4, 4]  # nine views; the last batch is filled up
    for ours, theirs in zip((image, image_cls, crop, crop_cls), wanted):
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=0)
    assert encoder.encode_images([]).shape == (0, 24)
    assert encoder.encode_crops([], torch.empty(0, 3, 4)).shape == (0, 3, 24)
    spent = encoder.spent
    assert spent["cutting"] > spent["encoding"] > 0


def test_a_result_does_not_depend_on_its_neighbours(interpreted, scene):
    encoder, images, box = scene
    ready = [encoder.prepare(*one) for one in zip(images, box)]
    image, crop, *none = encoder.encode_views(ready)
    assert none == [None, None]
    alone = [encoder.encode_views([one]) for one in ready]
    assert torch.equal(image, torch.cat([one[0] for one in alone]))
    assert torch.equal(crop, torch.cat([one[1] for one in alone]))


def test_ladders_keep_their_shape(interpreted, scene):
    encoder, images, box = scene
    ladder = [torch.stack([rows, rows]) for rows in box]
    crop = encoder.encode_views(map(encoder.prepare, images, ladder))[1]
    assert crop.shape == (3, 2, 3, 24)
    assert torch.equal(crop[:, 0], crop[:, 1])


def test_out_of_memory_halves_the_batch_of_a_stream(interpreted, scene):
    encoder, images, box = scene
    wanted = encoder.encode_views(map(encoder.prepare, images, box))[1]
    sizes = []

    def small_device(module, args):
        sizes.append(len(args[0]))
        if len(args[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    encoder.visual.register_forward_pre_hook(small_device)
    found = encoder.encode_views(map(encoder.prepare, images, box))[1]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert sizes == [4, 2, 2, 2, 2, 2]


def cut_on_the_cpu(images, owner, view, device, size, dtype, mean, std):
    """`crops.cut` without the kernels."""
    found = []
    for image, (x0, y0, x1, y1, tall, wide, *_) in zip([images[i] for i in owner], view.tolist()):
        if (tall, wide) == (size, size):
            box = torch.tensor([[x0, y0, x1, y1]], dtype=torch.float32)
            found.append(torch.empty(1, 3, size, size, dtype=dtype))
            crops._extract_cpu(image, box, size, mean, std, found[-1])
        else:
            found.append(crops._normalise(crops._whole(image, size), dtype, mean, std)[None])
    return torch.cat(found)


def test_a_streamed_bank_holds_what_the_encoder_gives(monkeypatch, tmp_path):
    """However it was cut into shards, stopped and resumed, and whatever could not be read."""
    monkeypatch.setattr(crops, "has_kernels", lambda device: True)
    monkeypatch.setattr(crops, "cut", cut_on_the_cpu)
    encoder, plan = encoder_of(clip(), size=8 * 4, batch_size=16), Plan(n=2, scale=(0.4, 0.8))
    dataset = FakeDataset(16, unreadable=[3])

    def build(name, **options):
        with pytest.warns(UserWarning, match="picture/3"):
            return bank.build(dataset, encoder, plan, tmp_path / name, on_error="skip", dtype="float32", **options)

    one, two = build("one", shard=16), build("two", shard=8)
    views, _, index = one.read()
    assert index.tolist() == [i for i in range(16) if i != 3]
    for ours, theirs in zip(views[:3], two.read()[0][:3]):
        assert torch.equal(ours, theirs)
    pictures = [dataset.load(i) for i in (0, 15)]
    rows = [0, 14]
    torch.testing.assert_close(views.image[rows], encoder.encode_images(pictures), atol=1e-5, rtol=0)
    torch.testing.assert_close(views.crop[rows], encoder.encode_crops(pictures, views.box[rows]), atol=1e-5, rtol=0)
    undisturbed = contents(Path(two.folder.path))
    for name in ("manifest.json", "00000008-00000016.safetensors"):
        (Path(two.folder.path) / name).unlink()
    assert contents(Path(build("two", shard=8).folder.path)) == undisturbed


def test_a_bank_says_that_its_encoder_ran_compiled(tmp_path):
    keys = {}
    for compile in (None, False, True):
        encoder = encoder_of(clip(), compile=compile)
        keys[compile] = bank.key(FakeDataset(), encoder, PLAN)
    assert keys[None] == keys[False] != keys[True]


def test_a_bank_of_a_gpu_has_another_key_wherever_it_is_asked_for():
    """A head without a GPU prepares an encoder for one."""
    here, there = (encode.load("birdlets-tiny", device="cpu", batch_size=64, runs_on=d) for d in ("cpu", "cuda"))
    assert bank.key(FakeDataset(), here, PLAN) != bank.key(FakeDataset(), there, PLAN)
    there._runs_on = torch.device("cpu")
    assert bank.key(FakeDataset(), here, PLAN) == bank.key(FakeDataset(), there, PLAN)


def test_bf16_weights_are_close_and_follow_the_weights():
    encoder, x = encoder_of(clip()), torch.randn(20, 3, 32, 32)
    half = encode.encoder._Half(encoder.visual)
    assert {w.dtype for m in half.refreshed().modules() for w in m.parameters(recurse=False)} == {
        torch.float32,  # LayerNorms
        torch.bfloat16,
    }

    @torch.no_grad()
    def both():
        feature, token = encode.encoder._tower(half.refreshed(), x.bfloat16(), True)
        assert feature.dtype == token.dtype == torch.bfloat16
        return torch.nn.functional.normalize(feature.float(), dim=-1), encoder.features(x)

    one, two = both()
    assert 1e-7 < (1 - (one * two).sum(-1)).max() < 1e-3
    with torch.no_grad():
        encoder.visual.proj.data.neg_()
        encoder.visual.ln_post.bias.add_(1)
    again = both()
    assert (again[0] * again[1]).sum(-1).min() > 0.999
    assert (again[0] * one).sum(-1).max() < 0.9
    assert half.of(encoder.visual)
    assert not half.of(clip().visual)


def test_layer_norm_is_torchs(interpreted):
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(48)
    with torch.no_grad():
        norm.weight.add_(torch.randn(48))
        norm.bias.add_(torch.randn(48))
    norm.__class__ = encode.encoder._Norm
    x = (3 + 5 * torch.randn(2, 3, 96))[..., ::2]
    for dtype in (torch.float32, torch.bfloat16):
        ours = norm(x.to(dtype))
        assert ours.dtype == dtype
        wanted = torch.nn.functional.layer_norm(x.to(dtype).float(), (48,), norm.weight, norm.bias)
        torch.testing.assert_close(ours.float(), wanted, atol=1e-5, rtol=torch.finfo(dtype).eps)


def test_compiling_is_for_many_crops_on_a_gpu():
    for compile, wanted in ((None, [False, False]), (True, [True, True]), (False, [False, False])):
        encoder = encoder_of(clip(), compile=compile)
        assert [encoder.compiles(count) for count in (10, 10**9)] == wanted
    encoder = encoder_of(clip(), runs_on=torch.device("cuda"))
    assert [encoder.compiles(count) for count in (10, 10**9)] == [False, True]


def test_the_batch_fits_the_memory(monkeypatch):
    size = encode.encoder._default_batch_size
    cuda, tower = torch.device("cuda"), clip().visual
    assert size(224, torch.device("cpu")) == 64
    assert [size(side, cuda) for side in (224, 336, 48)] == [1024, 512, 4096]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for memory, rows in ((80 * 2**30, 4096), (2**27, 512), (2**20, 32)):
        facts = type("Facts", (), {"total_memory": memory})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, facts=facts: facts)
        assert size(32, cuda, tower) == rows


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """Triton's compiler and NVIDIA's assembler need no GPU."""
    program = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from upclose import kernels

types = {"pixels": "*u8", "table": "*i64", "box": "*i32", "between": "*u8", "size": "i32", "out": "*bf16"}
types |= {name: "fp32" for name in ("g0", "g1", "g2", "b0", "b1", "b2")}
types |= {"x": "*bf16", "weight": "*fp32", "bias": "*fp32", "width": "i32", "epsilon": "fp32"}
tiles = {"ROWS": kernels.ROWS, "COLUMNS": kernels.COLUMNS}
for kernel, fixed in ((kernels._first, tiles), (kernels._second, tiles), (kernels._norm, {"COLUMNS": 1024})):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else types[name] for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()})
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert done.asm["cubin"]
print("compiled")
"""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "compiled", done.stderr


# the benchmark, as far as it goes without a GPU


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    return pytest.importorskip("bench_gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_says_that_there_is_no_gpu(bench):
    with pytest.raises(SystemExit, match="torch finds none here: nothing was measured"):
        bench.main()


@pytest.mark.slow
def test_every_measure_of_the_benchmark_runs(bench, monkeypatch, tmp_path, capsys):
    """On the CPU, with birdlets-tiny in place of the backbones and a handful of everything."""
    load = encode.load
    sizes = dict(DEVICE="cpu", SIDE=48, CROPS=2, SHARES={"ViT-B-32": (0.9, 0.9)}, FILES={"ViT-B-32": 64}, PHOTOGRAPHS=4)
    sizes |= dict(SHARD=32, ACCURACY=16, CLASSES=(5, 10), SCORED={5: 4, 10: 4}, SWEPT=64, ADAPTED=8, LAST_START=3600)
    for name, value in sizes.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(
        bench.encode, "load", lambda *_, precision="fp32", **__: load("birdlets-tiny", None, "cpu", precision)
    )
    monkeypatch.setattr(bench, "seconds", lambda function, **_: (function(), 1.0)[1])
    monkeypatch.setattr(bench.paths, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    bench.main()
    page = (tmp_path / "results" / "benchmarks-gpu.md").read_text()
    assert page.count("\n| ") == 20 + 2
    assert "Not measured" not in page
