"""What this machine has, which published tables it could run now, what is missing and where to get it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from huggingface_hub import try_to_load_from_cache

from upclose import compare, datasets, encode, params, paths, prompts
from upclose.datasets import adapters, registry

PACKAGES = ("torch", "torchvision", "open_clip_torch", "pot", "numpy", "pandas", "papermill", "upclose")
PAPER_OF = {
    "01_lgca": "LGCA",
    "02_lazsl": "LaZSL",
    "03_dnd": "D&D",
    "04_fair": "FAIR",
    "05_lare": "LARE",
    "ablations/lare": "LARE",
}
_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
_NO_SENTENCES = (
    "CLIP",
    "CLIP-E",
    "WaffleCLIP",
    "zero-shot",
    "linear probe",
    "LADS",
    "LARE",
    "Tip-Adapter",
    "Tip-Adapter-F",
)
_LADDER = 6  # steps of LGCA with 100 crops
_BACKWARD = 3  # encodings that a training step costs beside its crops


def sheets() -> dict[str, params.Sheet]:
    """The parameter files of the published tables, by name."""
    return {file.stem: params.read(file) for file in sorted((paths.PARAMS / "papers").glob("*.yaml"))}


def covered() -> pd.DataFrame:
    """The rows of published tables that the parameter files fill: paper, table, method, dataset, backbone."""
    rows = [
        (PAPER_OF[sheet.notebook], v["table"], method, v["dataset"], _label(v))
        for sheet in sheets().values()
        for _, v in params.cells(sheet)
        for method in v["methods"]
    ]
    return pd.DataFrame(rows, columns=compare.KEYS[:5]).drop_duplicates(ignore_index=True)


def _label(values: dict[str, Any]) -> str:
    return compare.backbone_label(values["backbone"], values.get("pretrained", ""))


# ------------------------------------------------------------------------------------------------------ what is missing


def missing_weights(name: str, pretrained: str) -> str:
    """Where to get a backbone that cannot be loaded without a network, "" if it is here. Nothing is downloaded."""
    if name.startswith("birdlets") or Path(pretrained or name).is_file():
        return ""
    known = [line for line in compare.backbones().itertuples() if (line.name, line.pretrained) == (name, pretrained)]
    if not known:
        return "not a backbone of the papers, give a checkpoint file"
    if any(isinstance(try_to_load_from_cache(known[0].hub, file), str) for file in _FILES):
        return ""
    return f"https://huggingface.co/{known[0].hub} (fetched at the first run)"


def missing_data(name: str, protocol: str | None = None) -> str:
    """Where a data set belongs and how to get it, "" if it is there."""
    if name == "birdlets" or name.startswith("imagefolder:"):
        return ""
    entry = registry.entry(name, protocol)
    folder = paths.data() / entry.folder
    there = folder.is_dir() and adapters.split_file(folder, entry).exists()
    return "" if there else f"{adapters.split_file(folder, entry)}: {datasets.get(entry)}"


def missing_prompts(methods: list[str], dataset: str) -> dict[str, str]:
    """The sentences that the methods need -> where to get them, "" for those that are here."""
    out = {}
    if any(method not in _NO_SENTENCES for method in methods):
        by_clip_d = any(re.match(r"CLIP-D|CLIP\+D|LaZSL|Baseline|D&D|Tip\+D&D", method) for method in methods)
        by_cupl = any(re.match(r"CuPL|WCA|LGCA|FAIR", method) for method in methods)
        for source in ["clip-d"] * by_clip_d + ["cupl"] * by_cupl:
            name = f"{source} of {dataset}"
            try:
                file = prompts.find(source, dataset)
            except ValueError:
                out[name] = "not published: give a file of your own, {class: [sentences]}"
            else:
                url = f"https://github.com/{file.repository} (fetched at the first run)"
                out[name] = "" if prompts.local(file).is_file() else url
    return out


def needs(sheet: params.Sheet) -> dict[str, dict[str, str]]:
    """What a parameter file needs: kind -> name -> where to get it, "" for what is here.

    Kinds are weights, data, prompts and notebook.
    """
    out: dict[str, dict[str, str]] = {"weights": {}, "data": {}, "prompts": {}}
    for _, values in params.cells(sheet):
        sets = [(values["dataset"], values.get("protocol"))]
        sets += [(values["train_dataset"], None)] if values.get("train_dataset") else []
        out["weights"][_label(values)] = missing_weights(values["backbone"], values["pretrained"])
        for name, protocol in sets:
            out["data"][f"{name} ({registry.entry(name, protocol).protocol})"] = missing_data(name, protocol)
        out["prompts"] |= missing_prompts(values["methods"], values["dataset"])
    run = (paths.NOTEBOOKS / f"{sheet.notebook}.ipynb").is_file()
    return out | {"notebook": {sheet.notebook: "" if run else "not among the notebooks"}}


# ------------------------------------------------------------------------------------------------------------ estimates


def throughput(device: str | None = None, pictures: int = 8, rounds: int = 2) -> float:
    """GFLOP/s of this machine's image encoding, measured with a ViT-B/32 of random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = encode.load("ViT-B-32", device=device)
    batch = [torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8) for _ in range(pictures)]
    encoder.encode_images(batch)
    start = time.perf_counter()
    for _ in range(rounds):
        encoder.encode_images(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    flops = float(compare.backbones().set_index("backbone").gflops["ViT-B/32"])
    return flops * pictures * rounds / (time.perf_counter() - start)


def encodings(notebook: str, values: dict[str, Any]) -> tuple[int, tuple]:
    """How many pictures and crops a cell encodes, and what tells its bank from others'."""
    entry = registry.entry(values["dataset"], values.get("protocol"))
    tests = sum(test for _, test in entry.domains.values()) or entry.test
    crops = values.get("crops", 0)
    bank = tuple(
        str(values.get(n)) for n in ("dataset", "protocol", "backbone", "pretrained", "crops", "alpha", "beta")
    )
    if notebook == "04_fair":
        trained = sum(not re.match(r"CLIP|CuPL|WCA \(", method) for method in values["methods"])
        run = entry.train * values["epochs"] * (crops + 1 + _BACKWARD) * len(values["seeds"]) * trained
        return run + tests, (*bank, values["table"], str(values.get("setting")), str(values.get("top_k")))
    if PAPER_OF[notebook] == "LARE":
        source = registry.entry(values["train_dataset"]) if values.get("train_dataset") else entry
        return source.train + source.validation + tests + (source.test if source != entry else 0), bank[:4]
    seeds, steps = len(values["crop_seeds"]), _LADDER if notebook == "01_lgca" else 1
    shots = max(values["shots"]) * entry.classes if isinstance(values.get("shots"), list) else 0
    return (tests + shots) * (crops * steps * seeds + 1), (*bank, str(values.get("tau")))


def paper_tables(rate: float) -> list[dict[str, Any]]:
    """A line a parameter file: its runs, what they need, what is missing, disk, hours and the command.

    Args:
        rate: GFLOP/s of encoding, see `throughput`
    """
    facts = compare.backbones().set_index(["name", "pretrained"])
    out = []
    for name, sheet in sheets().items():
        banks: dict[tuple, tuple[int, Any]] = {}
        todo = [values for _, values in params.cells(sheet)]
        for values in todo:
            count, bank = encodings(sheet.notebook, values)
            backbone = facts.loc[(values["backbone"], values["pretrained"])]
            banks[bank] = max(banks.get(bank, (0, None))[0], count), backbone
        kept = 0 if sheet.notebook == "04_fair" else 1  # FAIR draws new crops in every epoch
        wanted = needs(sheet)
        missing = [f"{kind} {what}: {get}" for kind, table in wanted.items() for what, get in table.items() if get]
        out.append(
            {
                "file": name,
                "reproduces": sheet.reproduces,
                "runs": len(todo),
                "encodings": sum(n for n, _ in banks.values()),
                "hours": round(sum(n * float(b.gflops) for n, b in banks.values()) / rate / 3600, 1),
                "disk_gib": round(kept * sum(n * (2 * int(b.dim) + 16) for n, b in banks.values()) / 2**30, 2),
                "ready": not missing,
                "needs": wanted,
                "missing": missing,
                "command": f"upclose run params/papers/{name}.yaml -p device=cuda",  # as the file says
            }
        )
    return out


def machine() -> dict[str, Any]:
    """Versions, device, space, weights, data sets and prompts of this machine."""
    cuda, files = torch.cuda.is_available(), prompts.published()
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {os.cpu_count()} cores, {platform.machine()}",
        "cache": str(paths.cache()),
        "free_gib": round(shutil.disk_usage(_existing(paths.cache())).free / 2**30, 1),
        "weights": {
            **{file.stem: "shipped" for file in sorted(paths.WEIGHTS.glob("*.safetensors"))},
            **{b.backbone: missing_weights(b.name, b.pretrained) or "here" for b in compare.backbones().itertuples()},
        },
        "data": {
            "birdlets": "drawn by the program",
            **{f"{n} ({p})": missing_data(n, p) or "here" for n, p in registry.entries()},
        },
        "prompts": f"{sum(prompts.local(f).is_file() for f in files)} of {len(files)} files here",
        "results": str(paths.results()),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)


def main(tables: bool = False, as_json: bool = False) -> int:
    """Print what is here and, with `tables`, what of the published tables could run; 1 if a package is missing."""
    facts = machine()
    if tables:
        facts["gflops_per_second"] = round(throughput(), 1)
        facts["tables"] = paper_tables(facts["gflops_per_second"])
        facts["published_values"] = compare.account(covered()).account.value_counts().to_dict()
    if as_json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        print("\n".join(_page(facts)))
    return int("missing" in facts["packages"].values())


def _page(facts: dict[str, Any]) -> Iterator[str]:
    yield f"python {facts['python']}, " + ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    yield f"device   {facts['device']}"
    yield f"cache    {facts['cache']} ({facts['free_gib']} GiB free)"
    yield f"prompts  {facts['prompts']}"
    for kind in ("weights", "data"):
        for name, state in facts[kind].items():
            yield f"{kind:8} {name:28} {state}"
    for line in facts.get("tables", []):
        yield f"\n{line['reproduces']}: {'ready' if line['ready'] else 'not ready'}"
        yield f"  {line['command']}"
        yield (
            f"  {line['runs']} runs, {line['encodings']:,} encodings, about {line['hours']:,.1f} h here at "
            f"{facts['gflops_per_second']:,.0f} GFLOP/s, {line['disk_gib']:,.1f} GiB of features"
        )
        for kind, table in line["needs"].items():
            for state, names in (
                ("here", [what for what, get in table.items() if not get]),
                ("missing", [what for what, get in table.items() if get and not get.startswith("not published")]),
                ("not published", [what for what, get in table.items() if get.startswith("not published")]),
            ):
                if names:
                    yield f"  {kind:8} {state}: {', '.join(names)}"
    if "tables" in facts:
        yield "\nWhere to get what is missing stands above; prompts are fetched at the first run, or put by hand into"
        yield f"{facts['cache']}/prompts (prompts.local says where)."
    if "published_values" in facts:
        yield "\npublished values: " + ", ".join(f"{n} {what}" for what, n in facts["published_values"].items())
