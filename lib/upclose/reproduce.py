"""A published table, or all of a paper's, in one call: what it needs and costs, its runs, and a page with ours beside.

    upclose reproduce lgca-table1 --dry-run          what it needs, which banks its runs share, hours and disk
    upclose reproduce lgca-table1 --only cub,pets    fetch, encode, run, compare

What is complete is not done again, so that the same call goes on after whatever stopped it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from upclose import compare, costs, devices, doctor, params, paths, report, run
from upclose.doctor import Need
from upclose.fetch import amount, existing, total
from upclose.params import ParameterError

SECONDS = 10  # that measuring the rates may take


class Cell(NamedTuple):
    """A run of a table: its sheet by name, what the grid sweeps, what the sheet says, the job, what it encodes."""

    sheet: str
    swept: dict[str, Any]
    values: dict[str, Any]
    job: params.Job
    work: costs.Work

    @property
    def notebook(self) -> str:
        """As sheets call it."""
        return self.job.notebook.relative_to(paths.NOTEBOOKS).with_suffix("").as_posix()


# ------------------------------------------------------------------------------------------------------------ the cells


def tables(name: str) -> list[str]:
    """The sheets of a published table or of a paper, by name in any case.

    Raises:
        ParameterError: there is none; lists them
    """
    known, wanted = [*doctor.published()], name.casefold().removesuffix(".yaml")
    paper = {label.casefold(): file for label, file in compare.papers().items()}.get(wanted, wanted)
    if found := [s for s in known if s == wanted] or [s for s in known if s.partition("-")[0] == paper]:
        return found
    papers = ", ".join(compare.papers())
    raise ParameterError(f"no published table {name!r}; there are {', '.join(known)}, and the papers {papers}")


def cells(sheets: Iterable[str], only: Sequence[str] = (), fixed: Mapping[str, Any] | None = None) -> list[Cell]:
    """The runs of some sheets; who builds a bank goes before who reads it, so that few wait for another.

    Args:
        sheets: from `tables`
        only: data sets, each by a part of its name that no other has; none for all
        fixed: parameters that hold for every run

    Raises:
        ParameterError: as `params.jobs`, or a data set that is not among the sheets' or may be several
    """
    found, fixed = [], dict(fixed or {})
    if "dataset" in fixed:
        raise ParameterError(f"-p dataset={fixed['dataset']}: a table has its data sets; --only chooses among them")
    for name in sheets:
        file = paths.PARAMS / "papers" / f"{name}.yaml"
        sheet = params.read(file)
        for (swept, values), job in zip(params.cells(sheet, fixed), params.jobs(file, fixed), strict=True):
            found.append(Cell(name, swept, values, job, costs.work(params.about(sheet.notebook), values)))
    chosen = _chosen(only, list(dict.fromkeys(cell.values["dataset"] for cell in found)))
    found = [cell for cell in found if cell.values["dataset"] in chosen]
    return [found[k] for k in costs.order([cell.work for cell in found])]


def _chosen(only: Sequence[str], known: list[str]) -> set[str]:
    chosen = set()
    for word in only:
        like = [name for name in known if name == word.casefold()] or [n for n in known if word.casefold() in n]
        if len(like) != 1:
            which = f"it may be {' or '.join(like)}" if like else f"there are {', '.join(known)}"
            raise ParameterError(f"--only {word!r} is no data set of what is to be reproduced; {which}")
        chosen |= {*like}
    return chosen or {*known}


# ------------------------------------------------------------------------------------------------------------- the plan


def needs(cells: Iterable[Cell]) -> list[Need]:
    """What the runs need, each thing once, kind by kind."""
    each = {need[:2]: need for cell in cells for need in doctor.needs(cell.notebook, [cell.values])}
    return sorted(each.values(), key=lambda need: doctor.KINDS.index(need.kind))


def plan(cells: Sequence[Cell], wanted: Iterable[Need]) -> Iterator[str]:
    """In lines: what is here, what is missing, and the banks with the runs that read them."""
    readers = costs.readers(cell.work for cell in cells)
    encodings = costs.encodings(readers, [cell.work for cell in cells]).total()
    yield f"{', '.join(dict.fromkeys(c.sheet for c in cells))}: {len(cells)} runs, {encodings:,} encodings"
    for kind, group in groupby(wanted, key=lambda need: need.kind):
        lines = [*group]
        if here := [need.name for need in lines if not need.get]:
            yield f"{kind:8} here: {', '.join(here)}"
        for need in (need for need in lines if need.get):
            how = "to be fetched" if need.fetch else "by hand"
            yield f"{kind:8} {how}: {need.name}, {amount(need.bytes)}: {need.get}"
    yield f"banks    {len(readers)}, each built once, by the first run that reads it"
    for _, group in groupby(readers, key=lambda bank: bank._replace(seed=None)):
        sets = [*group]
        names = list(dict.fromkeys(cells[k].job.name for bank in sets for k in readers[bank]))
        bank, more = sets[0], f" and {len(names) - 3} more" if len(names) > 3 else ""
        seeds = "" if bank.seed is None else f", seeds {' '.join(str(each.seed) for each in sets)}"
        yield (
            f"  {bank.dataset} {bank.split}, {bank.backbone.label}, {bank.crops}{seeds}: {bank.images:,} pictures, "
            f"{len(sets) * bank.encodings:,} encodings, {amount(len(sets) * bank.bytes)}; read by "
            f"{', '.join(names[:3])}{more}"
        )
    if passing := sum(cell.work.passing for cell in cells):
        yield f"training {passing:,} encodings, which no bank keeps"


def _priced(cells: Sequence[Cell], wanted: Iterable[Need], device: str, places: int) -> Iterator[str]:
    """The price in lines, by rates that are measured here."""
    banks = sum(bank.bytes for bank in costs.readers(cell.work for cell in cells))
    free = {os.stat(p).st_dev: p for p in map(existing, (paths.data(), paths.cache(), *_bank_folder()))}
    said = "; ".join(f"{amount(shutil.disk_usage(p).free)} are free at {p}" for p in free.values())
    yield f"disk     {amount(banks)} of banks, {_sum(wanted)} to fetch; {said}"
    if device.startswith("cuda") and not torch.cuda.is_available():
        yield "price    not known: this machine has no GPU to measure a rate on"
        return
    precision = {cell.work.backbone: cell.job.values["precision"] for cell in cells}
    rate = {each: costs.rate(each, device, precision[each], SECONDS / len(precision)) for each in precision}
    whole, last = costs.hours([cell.work for cell in cells], rate, places)
    said = ", ".join(f"{each.label} {crops:,.1f}" for each, crops in rate.items())
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    yield f"rate     crops a second on {name}: {said} (measured, random weights)"
    together = f", {last:,.1f} h on {places} of them" if places > 1 else ""
    yield f"price    {whole:,.1f} h of encoding{together}; nothing else is counted"


def _bank_folder() -> list[Path]:
    """Where banks lie, unless behind a URL."""
    return [] if "://" in paths.bank() else [Path(paths.bank())]


def _sum(wanted: Iterable[Need]) -> str:
    """The size of all that can be fetched."""
    return total(need.bytes for need in wanted if need.fetch)


# -------------------------------------------------------------------------------------------------------------- the run


def fetch(wanted: Iterable[Need], yes: bool) -> None:
    """Fetch what may be downloaded, after one question; what fails is said, and the rest fetched.

    Raises:
        ParameterError: the answer was no, or nobody could be asked
    """
    todo = [need for need in wanted if need.fetch]
    if todo and not _agreed(f"fetch {len(todo)} thing{'s' * (len(todo) > 1)} ({_sum(todo)})", yes):
        raise ParameterError("nothing was fetched; --dry-run says what is missing")
    for need in todo:
        try:
            need.fetch()
        except (OSError, ValueError, RuntimeError) as error:
            print(paths.sentence(f"{need.kind} {need.name}: {error}"), file=sys.stderr)


def _agreed(what: str, yes: bool) -> bool:
    if not yes and not sys.stdin.isatty():
        raise ParameterError(f"nobody can be asked whether to {what}: add --yes")
    try:
        return yes or input(f"{what}? [y/N] ").strip().casefold() in ("y", "yes")
    except EOFError:  # Ctrl-D
        return False


def lacking(cells: Iterable[Cell], items: Iterable[run.Item]) -> dict[str, str]:
    """Of some runs those that cannot be done now, by the names of their jobs -> what is missing."""
    found = {item.job.name: item.missing for item in items if item.missing and not item.complete}
    for cell in cells:
        for need in needs([cell]):
            if need.get:
                found.setdefault(cell.job.name, f"{need.kind} {need.name}: {need.get}")
    return found


def main(
    name: str,
    only: Sequence[str] = (),
    device: str | None = None,
    fixed: Mapping[str, Any] | None = None,
    yes: bool = False,
    dry_run: bool = False,
    ray: str | None = None,
    root: Path | None = None,
) -> int:
    """Reproduce a table or a paper; what it prints ends with the table and the page's path.

    Args:
        name: see `tables`
        only: see `cells`
        device: "cuda" is every GPU of this machine, "cuda:1" that one; None: a GPU where there is one
        fixed: parameters that are not as in the sheets; on a CPU the precision is fp32 unless it is given
        yes: fetch, and leave out runs that lack something, without asking
        dry_run: measure and print the plan and its price, and do nothing
        ray: the address of a Ray cluster, which has a run on each of its GPUs
        root: of the results

    Returns:
        0, or 1 where a run failed or something is missing

    Raises:
        ParameterError: a name or a value that there is not, or all runs lack something
    """
    device = device or ("cuda" if ray or torch.cuda.is_available() else "cpu")
    changed = ({"precision": "fp32"} if device == "cpu" else {}) | dict(fixed or {})
    root, sheets = root or paths.results(), tables(name)
    todo = cells(sheets, only, changed | {"device": device})
    gpus = devices.gpus() if device == "cuda" and not ray else []
    items = run.prepare([cell.job for cell in todo], root, here=not ray)
    left = [cell for cell, item in zip(todo, items, strict=True) if not item.complete]
    wanted = needs(left)
    print("\n".join(plan(todo, wanted)))
    if dry_run:
        print("\n".join(_priced(left, wanted, device, max(1, len(gpus)))) if left else "all runs are complete")
        return int(bool(lacking(left, items)))
    fetch(wanted, yes)
    items = run.prepare([cell.job for cell in todo], root, here=not ray)
    short = lacking(left, items)
    for job, why in short.items():
        print(paths.sentence(f"{job}: {why}"), file=sys.stderr)
    if short and (len(short) == len(todo) or not _agreed(f"run the {len(todo) - len(short)} that lack nothing", yes)):
        raise ParameterError(f"{len(short)} of {len(todo)} runs lack something: see above; nothing was run")
    todo, items = [c for c in todo if c.job.name not in short], [i for i in items if i.job.name not in short]
    outcomes = {outcome.job.name: outcome for outcome in run.execute(items, root, ray=ray, gpus=gpus)}
    failed = [outcome for outcome in outcomes.values() if outcome.status == "failed"]
    for outcome in failed:
        print(paths.sentence(f"{outcome.job.name}: {outcome.error}"), file=sys.stderr)
    known, groups = doctor.sheets(), {sheet: [cell for cell in todo if cell.sheet == sheet] for sheet in sheets}
    parts = {known[sheet].reproduces: compared(group, outcomes) for sheet, group in groups.items() if group}
    whole = pd.concat(parts)
    print(report.shown(whole[whole.ours.notna() | whole.verdict.str.startswith("incomplete")]).to_string(index=False))
    title = sheets[0] if len(sheets) == 1 else sheets[0].partition("-")[0]
    notes = [f"Not as in the sheets: {name} = {value}." for name, value in changed.items()]
    runs = {outcome.folder: f"{outcome.status} {outcome.error}" for outcome in outcomes.values()}
    print(f"page: {report.reproduced(root / 'reproduce', title, parts, runs, notes)}")
    return int(bool(failed or short))


# ------------------------------------------------------------------------------------------------------------- the page


def compared(cells: Sequence[Cell], outcomes: Mapping[str, run.Outcome]) -> pd.DataFrame:
    """Paper versus ours of one sheet: of the data sets that were run, with what its complete runs measured.

    Args:
        cells: of the sheet
        outcomes: of the runs, by the names of their jobs

    Returns:
        `compare.variants`, with "published" and "verdict" for value and status
    """
    rows, free = [pd.DataFrame(columns=[*compare.KEYS, "value", "std", "n"])], set()
    for cell in (cell for cell in cells if outcomes[cell.job.name].status != "failed"):
        swept = {name: str(value) for name, value in cell.swept.items() if name not in compare.KEYS}
        rows.append(report.read(outcomes[cell.job.name].folder / "metrics.csv").assign(**swept))
        free |= {*swept}
    paper, table = params.about(cells[0].notebook).paper, cells[0].values["table"]
    frame = compare.variants(pd.concat(rows, ignore_index=True), sorted(free), paper, table)
    frame = frame[frame.dataset.isin({cell.values["dataset"] for cell in cells} | {"average"})]
    return frame.rename(columns={"value": "published", "status": "verdict"})
