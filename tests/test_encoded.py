"""Features of one's own: every method that runs on them gives what it gives on the same tensors."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize, one_hot

from upclose import compare, datasets, encode, evaluate, metrics, params, paths, report, run
from upclose.features import Dataset, Ladder, Plan, Text, Views
from upclose.methods import REGISTRY, clip, lazsl, lgca, probe, tip_adapter

C, D = 3, 16
NAMES = ["a tern", "a gull", "a crow"]


def tensors(seed=0, n=30, crops=(6,)):
    """Embeddings that lie near their class's."""
    draw = torch.Generator().manual_seed(seed)
    centre = torch.randn(C, D, generator=torch.Generator().manual_seed(9))
    near = lambda label, *shape: normalize(  # noqa: E731
        centre[label].view(*label.shape, *[1] * len(shape), D) + torch.randn(*label.shape, *shape, D, generator=draw),
        dim=-1,
    )
    label, owner = torch.arange(n) % C, torch.tensor([0, 0, 1, 2, 2, 2])
    words = {"text.label": near(torch.arange(C)), "text.description": near(owner), "text.owner": owner}
    return {"image": near(label), "crop": near(label, *crops), "label": label} | words


def write(file, held, names=NAMES, **notes):
    if file.suffix == ".npz":
        np.savez(file, class_names=np.array(names), **{k: x.numpy() for k, x in held.items()}, **notes)
    else:
        save_file({k: x.contiguous() for k, x in held.items()}, file, {"class_names": json.dumps(names)} | notes)
    return f"features:{file}"


def text_of(held):
    return Text(held["text.label"], held["text.description"], held["text.owner"])


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_a_file_is_a_data_set_and_a_bank(tmp_path, ending):
    held = tensors()
    data = datasets.load(write(tmp_path / f"f.{ending}", held))
    assert isinstance(data, Dataset)
    assert (len(data), data.class_names, data.label.tolist()) == (30, NAMES, held["label"].tolist())
    views, label, index = evaluate.read(None, data, None, slice(4, 9))
    assert torch.equal(views.image, held["image"][4:9])
    assert torch.equal(views.crop, held["crop"][4:9])
    assert (label.tolist(), index.tolist()) == (held["label"][4:9].tolist(), [4, 5, 6, 7, 8])
    parts = list(evaluate.blocks(None, data, None))
    assert torch.equal(torch.cat([part[0].crop for part in parts]), held["crop"])
    assert all(map(torch.equal, evaluate.text(None, data, "clip-d"), text_of(held)))
    with pytest.raises(ValueError, match="features and no pictures"):
        data.load(0)


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_zero_shot_methods_give_what_they_give_on_the_tensors(tmp_path, ending):
    held = tensors()
    data, text = datasets.load(write(tmp_path / f"f.{ending}", held)), text_of(held)
    rules = evaluate.rules(["CLIP", "multi-crop", "LaZSL"], evaluate.texts(None, data))
    found = evaluate.collect(lambda scores, label: scores, rules, None, data, [Plan(n=6)])
    views = Views(held["image"], held["crop"])
    assert torch.equal(found["CLIP"][0], clip.scores(views, text))
    assert torch.equal(found["multi-crop"][0], clip.multi_crop_scores(views, text))
    assert torch.equal(found["LaZSL"][0], lazsl.scores(views, text))
    hits = evaluate.hits(rules, None, data, [None])
    assert (
        0.5
        < hits["multi-crop"].double().mean()
        == metrics.correct(found["multi-crop"][0], held["label"]).double().mean()
    )


def test_methods_of_shots_give_what_they_give_on_the_tensors(tmp_path):
    test, train = tensors(0), {k: x for k, x in tensors(1, 48).items() if k in ("image", "label", "crop")}
    name = write(tmp_path / "f.safetensors", test | {f"train.{k}": x for k, x in train.items()})
    (seen, seen_label, _), (views, label, _) = (
        evaluate.read(None, datasets.load(name, split), None) for split in ("train", "test")
    )
    votes = tip_adapter.scores(views.image, seen.image, seen_label, classes=C, beta=5.5)
    assert torch.equal(votes, tip_adapter.scores(test["image"], train["image"], train["label"], classes=C, beta=5.5))
    fitted = probe.fit(*probe.split(seen.image, seen_label), [0], epochs=5, batch_size=16)
    direct = probe.fit(*probe.split(train["image"], train["label"]), [0], epochs=5, batch_size=16)
    assert torch.equal(probe.scores(fitted, views.image), probe.scores(direct, test["image"]))
    assert (probe.predict(fitted, views.image)[0] == label).double().mean() > 0.6
    assert datasets.load(name, "train").fingerprint != datasets.load(name).fingerprint


SAID = {  # of a file with images, labels and class prompts alone
    "multi-crop": "reads sentences of every class",
    "D&D": "reads sentences of every class",
    "LGCA": "reads sentences of every class",
    "CLIP-E": "holds no words of 'clip-e'",
    "WaffleCLIP": "holds no words of 'waffle'",
    "CuPL": "holds no words of 'cupl'",
    "Tip-Adapter": "needs shots",
    "FAIR": "needs crops, descriptions, cls, encoder",
}


def run_all(data, plan=None):
    """{method: accuracy, or the sentence that says what it lacks}."""
    said = {}
    for name in REGISTRY:
        try:
            hits = evaluate.hits(evaluate.rules([name], evaluate.texts(None, data)), None, data, [plan])
            said[name] = float(hits[name].double().mean())
        except ValueError as error:
            said[name] = str(error)
    return said


def test_each_method_runs_or_says_in_a_sentence_what_the_file_lacks(tmp_path):
    held = tensors()
    least = {k: held[k] for k in ("image", "label", "text.label")}
    said = run_all(datasets.load(write(tmp_path / "least.npz", least)))
    assert {name for name, found in said.items() if isinstance(found, float)} == {"CLIP", "TDA", "TransCLIP-ZS"}
    for name, sentence in SAID.items():
        assert sentence in said[name]
    assert all("\n" not in found and len(found) < 300 for found in said.values() if isinstance(found, str))
    no_crops = {k: x for k, x in held.items() if k != "crop"}
    said = run_all(datasets.load(write(tmp_path / "no_crops.npz", no_crops)))
    assert isinstance(said["CLIP-D"], float)
    assert {name for name, found in said.items() if "holds no crop" in str(found)} >= {
        "multi-crop",
        "WCA",
        "LaZSL",
        "D&D",
    }
    ladder = {
        f"text.{source}.{k}": held[f"text.{k}"] for source in ("waffle", "cupl") for k in ("description", "owner")
    }
    said = run_all(datasets.load(write(tmp_path / "ladder.npz", held | tensors(crops=(2, 6)) | ladder)))
    assert all(isinstance(said[name], float) for name in ("LGCA", "LaZSL", "WaffleCLIP", "CuPL", "best-crop"))
    assert "holds no words of 'clip-e'" in said["CLIP-E"]


def test_the_crop_set_of_a_seed_is_its_own_share_of_the_crops(tmp_path):
    held = tensors(crops=(2, 6))
    data = datasets.load(write(tmp_path / "f.npz", held))
    ladder, _, _ = evaluate.read(None, data, Plan(n=2, seed=1, steps=2))
    assert torch.equal(ladder.crop, held["crop"][:, :, 2:4])
    views, _, _ = evaluate.read(None, data, Plan(n=3, seed=1))
    assert isinstance(ladder, Ladder)
    assert torch.equal(views.crop, held["crop"][:, 0, 3:6])
    found = evaluate.collect(
        lambda s, _: s, evaluate.rules(["LGCA"], evaluate.texts(None, data)), None, data, [Plan(n=6, steps=2)]
    )
    assert torch.equal(found["LGCA"][0], lgca.scores(Ladder(held["image"], held["crop"]), text_of(held)))
    with pytest.raises(ValueError, match=r"6 crops an image: 3 crops of seed 2 are those from 6 to 8"):
        evaluate.read(None, data, Plan(n=3, seed=2))
    with pytest.raises(ValueError, match="at 2 sizes, not 3"):
        evaluate.read(None, data, Plan(n=3, steps=3))


def test_a_limit_takes_images_from_the_whole_file_and_an_encoder_only_its_device(tmp_path):
    held = tensors()
    name = write(tmp_path / "f.npz", held)
    data = datasets.load(name, limit=10)
    views, label, _ = evaluate.read(encode.load("birdlets-tiny"), data, None)
    assert torch.equal(views.image, held["image"][::3])
    assert label.tolist() == held["label"][::3].tolist()
    assert data.fingerprint != datasets.load(name).fingerprint


def test_half_precision_is_read_with_unit_norm(tmp_path):
    held = tensors()
    data = datasets.load(
        write(tmp_path / "f.safetensors", {k: x.half() if x.is_floating_point() else x for k, x in held.items()})
    )
    views, _, _ = evaluate.read(None, data, None)
    assert torch.allclose(views.crop.norm(dim=-1), torch.ones(30, 6), atol=1e-6)
    assert torch.allclose(views.crop, held["crop"], atol=1e-3)


def cache(held, train):
    """What Tip-Adapter's released program keeps, in half precision."""
    return {
        "keys": train["image"].T.half(),
        "values": one_hot(train["label"], C).half(),
        "test_f": held["image"].half(),
        "test_l": held["label"],
        "val_f": held["image"][:6].half(),
        "val_l": held["label"][:6],
    }


def test_tip_adapters_caches_load_from_one_file_and_from_its_folder(tmp_path):
    held, train = tensors(), tensors(1, 48)
    kept = cache(held, train)
    torch.save(kept | {"clip_weights": held["text.label"].T.half()}, tmp_path / "cache.pt")
    (tmp_path / "caltech101").mkdir()
    for name, x in kept.items():
        torch.save(x, tmp_path / "caltech101" / f"{name}{'_16shots' if name in ('keys', 'values') else ''}.pt")
    want = tip_adapter.scores(
        *(normalize(x["image"].half().float(), dim=-1) for x in (held, train)), train["label"], classes=C, beta=5.5
    )
    for place in ("cache.pt", "caltech101"):
        data = {
            split: datasets.load(f"features:{tmp_path / place}", split) for split in ("train", "validation", "test")
        }
        (seen, label, _), (views, _, _) = (evaluate.read(None, data[split], None) for split in ("train", "test"))
        assert torch.equal(tip_adapter.scores(views.image, seen.image, label, classes=C, beta=5.5), want)
        assert len(data["validation"]) == 6
        assert data["test"].class_names == ["class 0", "class 1", "class 2"]
    hits = evaluate.hits(
        evaluate.rules(["CLIP"], evaluate.texts(None, datasets.load(f"features:{tmp_path / 'cache.pt'}"))),
        None,
        datasets.load(f"features:{tmp_path / 'cache.pt'}"),
        [None],
    )
    assert hits["CLIP"].shape == (1, 30)
    with pytest.raises(ValueError, match=r"no text\.label"):
        evaluate.text(None, data["test"], "clip-d")
    torch.save(kept["keys"], tmp_path / "caltech101" / "keys_8shots.pt")
    with pytest.raises(ValueError, match="several numbers of shots"):
        datasets.load(f"features:{tmp_path / 'caltech101'}")


class Bomb:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": torch.arange(29) % C}, "label .* does not fit image"),
        ({"crop": torch.zeros(30, 6, D + 1)}, "crop .* does not fit image"),
        ({"text.label": torch.zeros(C, D - 1)}, r"text\.label .* does not fit image"),
        ({"text.label": torch.eye(D)[:2]}, "do not fit together"),
        ({"label": torch.full((30,), 3)}, "do not fit together"),
        ({"label": torch.arange(30) % C - 1}, "label 0 is -1"),
        ({"image": torch.full((30, D), torch.nan)}, "has norm nan"),
        ({"crop": torch.ones(30, 6, D)}, "has norm 4, not 1"),
        ({"text.description": 3 * torch.eye(D)[:6]}, "norm 3"),
        ({"text.owner": torch.tensor([0, 0, 1])}, "6 sentences but 3 owners"),
        ({"text.owner": torch.tensor([0, 2, 1, 2, 2, 2])}, "non-decreasing"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, change, said):
    def used():
        data = datasets.load(write(tmp_path / "f.npz", tensors() | change))
        evaluate.text(None, data, "clip-d")
        evaluate.read(None, data, None)

    with pytest.raises(ValueError, match=said):
        used()


def test_a_file_that_is_damaged_or_no_features_is_named_and_no_pickle_is_run(tmp_path, capsys):
    torch.save({"keys": Bomb()}, tmp_path / "bomb.pt")
    np.savez(tmp_path / "bomb.npz", image=np.array([Bomb()]))
    write(tmp_path / "cut.safetensors", tensors())
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-5])
    (tmp_path / "page.npz").write_text("<html>")
    (tmp_path / "f.csv").write_text("1,2")
    torch.save({"state_dict": torch.eye(2)}, tmp_path / "weights.pt")
    for name in ("bomb.pt", "bomb.npz", "cut.safetensors", "page.npz", "f.csv", "weights.pt"):
        with pytest.raises(ValueError, match=re.escape(name)):
            datasets.load(f"features:{tmp_path / name}")
    with pytest.raises(FileNotFoundError, match="no file"):
        datasets.load(f"features:{tmp_path / 'none.npz'}")
    with pytest.raises(ValueError, match="no image and label of the split 'train'"):
        datasets.load(write(tmp_path / "f.npz", tensors()), "train")
    with pytest.raises(ValueError, match="two of the 3 classes have the same name"):
        datasets.load(write(tmp_path / "f.npz", tensors(), ["a", "b", "a"]))
    assert "run" not in capsys.readouterr().out


def test_a_name_in_the_file_joins_the_papers_tables(tmp_path):
    held = tensors()
    data = datasets.load(write(tmp_path / "f.safetensors", held, dataset="cub"))
    hits = evaluate.hits(evaluate.rules(["CLIP"], evaluate.texts(None, data)), None, data, [None])
    row = metrics.row(
        "CLIP",
        hits["CLIP"],
        dataset=data.name,
        paper="LaZSL",
        table="Table 1",
        backbone="ViT-B/32",
        setting="zero-shot",
    )
    table = compare.versus(pd.DataFrame([row], columns=metrics.COLUMNS).assign(run=""), "LaZSL")
    met = table[table.ours.notna() & (table.dataset != "average")]
    assert set(met.dataset) == {"cub"}
    assert set(met.method) == {"CLIP"}


def test_parameters_take_a_file_of_features(tmp_path):
    assert params._registered("features:mine.npz")
    with pytest.raises(ValueError, match="names no place: features:FILE"):
        params._registered("features:")


def test_the_documented_writer_writes_what_is_read(tmp_path, monkeypatch):
    page = (paths.NOTEBOOKS / "pages" / "own_features.md").read_text()
    program = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert len(program.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    held = tensors()
    given = dict(image=held["image"], crops=held["crop"], label=held["label"], names=NAMES)
    given |= dict(prompts=held["text.label"], sentences=held["text.description"], owner=held["text.owner"])
    exec(program, given)
    data = datasets.load("features:mine.safetensors")
    assert torch.equal(evaluate.read(None, data, None)[0].crop, held["crop"])
    assert data.class_names == NAMES


@pytest.mark.slow
def test_the_head_to_head_runs_on_a_file_of_features(tmp_path):
    methods = ["CLIP", "CLIP-D", "TDA", "multi-crop", "best-crop", "WCA", "LaZSL", "D&D"]
    values = {"dataset": write(tmp_path / "f.safetensors", tensors(crops=(2 * 7,))), "methods": methods}
    values |= {"tuning_split": "", "budgets": [1, 4, 8], "budget": 8, "crop_seeds": [0, 1]}
    jobs = params.jobs(paths.PARAMS / "birdlets" / "06_head_to_head.yaml", values)
    (outcome,) = run.execute(run.prepare(jobs), tmp_path / "results")
    assert (outcome.status, outcome.error) == ("done", "")
    assert len(report.matrix(tmp_path / "results")) == len(methods) * (len(methods) - 1) / 2
    assert not (outcome.folder / "figures" / "alone.png").exists()
