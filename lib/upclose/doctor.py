"""What this machine has, which published tables it could run now, what is missing and where to get it."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from upclose import compare, costs, datasets, encode, params, paths, prompts
from upclose.datasets import archives, registry
from upclose.fetch import existing

KINDS = ("weights", "data", "prompts", "notebook")
PACKAGES = ("torch", "torchvision", "open_clip_torch", "pot", "numpy", "pandas", "papermill", "upclose")


def sheets() -> dict[str, params.Sheet]:
    """The parameter files for real data, by name."""
    return {file.stem: params.read(file) for file in sorted((paths.PARAMS / "papers").glob("*.yaml"))}


def published() -> dict[str, params.Sheet]:
    """Those of a paper's table, which 06_head_to_head is not."""
    return {name: sheet for name, sheet in sheets().items() if params.about(sheet.notebook).paper}


def covered() -> pd.DataFrame:
    """The rows of published tables that the parameter files fill: paper, table, method, dataset, backbone."""
    rows = [
        (params.about(sheet.notebook).paper, v["table"], method, v["dataset"], _label(v))
        for sheet in published().values()
        for _, v in params.cells(sheet)
        for method in v["methods"]
    ]
    return pd.DataFrame(rows, columns=compare.KEYS[:5]).drop_duplicates(ignore_index=True)


def _label(values: dict[str, Any]) -> str:
    return compare.backbone_label(values["backbone"], values.get("pretrained", ""))


# ------------------------------------------------------------------------------------------------------ what is missing


class Need(NamedTuple):
    """Something that runs need.

    Attributes:
        kind: weights, data, prompts or notebook
        name: within its kind
        get: where to get it, "" when it is here
        fetch: downloads it; None when it is here or somebody has to
        bytes: of the download, 0 where that is not known
    """

    kind: str
    name: str
    get: str = ""
    fetch: Callable[[], object] | None = None
    bytes: int = 0


def missing_weights(name: str, pretrained: str) -> str:
    """Where to get a backbone that cannot be loaded without a network, "" if it is here. Nothing is downloaded."""
    if name.startswith("birdlets") or Path(pretrained or name).is_file():
        return ""
    if not encode.published.is_published(name, pretrained):
        return "not published, give a checkpoint file"
    if encode.published.cached(name, pretrained):
        return ""
    return f"{encode.published.pin(name, pretrained).place} (fetched at the first run)"


def missing_data(name: str, protocol: str | None = None) -> str:
    """Where a data set belongs and how to get it, "" if it is there."""
    if name == "birdlets" or registry.is_own(name):
        return ""
    entry, root = registry.entry(name, protocol), paths.data()
    here = archives.state(entry, root) == "here"
    return "" if here else f"{root / entry.folder}: {archives.how(entry, root)}"


def _prompts(sources: Iterable[str], dataset: str) -> Iterator[Need]:
    """The files of sentences that prompt sources read."""
    for source in sorted({prompts.FILES[source] for source in sources if source in prompts.FILES}):
        name = f"{source} of {dataset}"
        try:
            file = prompts.find(source, dataset)
        except ValueError:
            yield Need("prompts", name, "not published: give a file of your own, {class: [sentences]}")
        else:
            here = prompts.local(file).is_file()
            get = "" if here else f"https://github.com/{file.repository} (fetched at the first run)"
            yield Need("prompts", name, get, None if here else partial(prompts.fetch, file), int(file.bytes or 0))


def _sources(about: params.About, values: dict[str, Any]) -> set[str]:
    """The prompt sources that a cell reads: a method's own, else the parameter's, else the notebook's."""
    return {
        method.source or values.get("source") or about.source
        for method in costs.methods_of(values)
        if "descriptions" in method.needs
    }


def entries(values: dict[str, Any]) -> list[registry.Entry]:
    """The data sets that a cell reads."""
    sets = [(values["dataset"], values.get("protocol"))]
    sets += [(values["train_dataset"], None)] if values.get("train_dataset") else []
    return [registry.entry(name, protocol) for name, protocol in sets]


def needs(notebook: str, cells: Iterable[dict[str, Any]]) -> list[Need]:
    """What cells of a notebook's parameter file need, each thing once.

    Args:
        notebook: its name
        cells: their values, see `params.cells`
    """
    about, found = params.about(notebook), []
    for values in cells:
        backbone = costs.Backbone(values["backbone"], values["pretrained"])
        get = missing_weights(*backbone)
        load = partial(encode.load, *backbone, "cpu") if get.startswith("https://") else None
        size = encode.published.pin(*backbone).bytes if load else 0
        found.append(Need("weights", backbone.label, get, load, size))
        for entry in entries(values):
            lacking = archives.missing(entry, paths.data())
            urls = [archive for archive in lacking if archive.url]
            load = partial(datasets.download, entry.dataset, None, entry.protocol) if urls else None
            known = sum(archive.bytes for archive in urls)
            get = missing_data(entry.dataset, entry.protocol)
            found.append(Need("data", f"{entry.dataset} ({entry.protocol})", get, load, known))
        found += _prompts(_sources(about, values), values["dataset"])
    run = (paths.NOTEBOOKS / f"{notebook}.ipynb").is_file()
    found.append(Need("notebook", notebook, "" if run else "not among the notebooks"))
    return list({need[:2]: need for need in found}.values())


# ------------------------------------------------------------------------------------------------------------ estimates


def throughput() -> float:
    """GFLOP/s of this machine's image encoding, measured with a ViT-B/32 of random weights."""
    backbone = costs.Backbone("ViT-B-32-quickgelu", "openai")
    return costs.gflops(backbone) * costs.rate(backbone)


def paper_tables(rate: float) -> list[dict[str, Any]]:
    """A line a parameter file: its runs, what they need, what is missing, disk, hours and the command.

    Args:
        rate: GFLOP/s of encoding, see `throughput`
    """
    out = []
    for name, sheet in sheets().items():
        cells = [values for _, values in params.cells(sheet)]
        works = [costs.work(params.about(sheet.notebook), values) for values in cells]
        banks = costs.readers(works)
        encodings = costs.encodings(banks, works)
        wanted: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
        for need in needs(sheet.notebook, cells):
            wanted[need.kind][need.name] = need.get
        missing = [f"{kind} {what}: {get}" for kind, table in wanted.items() for what, get in table.items() if get]
        out.append(
            {
                "file": name,
                "reproduces": sheet.reproduces,
                "runs": len(cells),
                "encodings": encodings.total(),
                "hours": round(sum(n * costs.gflops(b) for b, n in encodings.items()) / rate / 3600, 1),
                "disk_gib": round(sum(bank.bytes for bank in banks) / 2**30, 2),
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
        "free_gib": round(shutil.disk_usage(existing(paths.cache())).free / 2**30, 1),
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
