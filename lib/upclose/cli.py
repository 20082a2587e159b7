"""The command line: `upclose run`, `reproduce`, `compare`, `data`, `weights`, `bank`, `explain`, `doctor`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from upclose import paths

EPILOG = """examples
  upclose run params/birdlets/00_start_here.yaml            one notebook on the embedded world
  upclose run params/birdlets/*.yaml --workers 2            several, two at a time
  upclose run params/papers/lare-table1.yaml --dry-run      what a published table would take here
  upclose run params/papers/lare-table1.yaml -p dataset=cub-painting -p device=cuda
  upclose reproduce lgca-table1 --dry-run                   the same, with prices; without --dry-run fetch, run, compare
  upclose compare                                           the papers' tables with what the runs measured
  upclose data get dtd cub                                  data sets, from their servers or --from a folder
  upclose weights ls                                        the papers' backbones: which are here; get fetches them
  upclose bank ls                                           encoded features on this machine
  upclose explain bird.jpg --classes mine.json --out page   what the methods match in a picture of yours
  upclose doctor                                            what this machine can run, and what is missing

A run is written to results/<date>/<run>/: notebook.ipynb, params.yaml, metrics.csv, figures/, run.json (last).
A run that is complete at any date is not run again; Ctrl-C loses only the notebooks that were running.
"""


def _overrides(given: Sequence[str]) -> dict[str, Any]:
    from upclose import params

    pairs = [params.override(text) for text in given]
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise params.ParameterError(f"-p {twice} is given twice; a value can only be one")
    return dict(pairs)


def _run(options: argparse.Namespace) -> int:
    from upclose import params, run

    overrides = _overrides(options.parameter)
    jobs = [job for file in options.file for job in params.jobs(file, overrides)]
    root = options.results or paths.results()
    items = run.prepare(jobs, root, options.force, here=not options.ray)
    if options.dry_run:
        for item in items:
            state = (
                f"complete: {item.complete}"
                if item.complete
                else f"missing: {item.missing}"
                if item.missing
                else "would run"
            )
            print(f"{item.job.name}-{item.hash}  {state}")
        print(f"{len(items)} runs")
        return int(any(item.missing and not item.complete for item in items))
    outcomes = run.execute(items, root, options.workers, options.ray)
    print(run.summary(outcomes).to_string(index=False))
    for outcome in outcomes:
        if outcome.status == "failed":
            print(paths.sentence(f"{outcome.job.name}: {outcome.error}"), file=sys.stderr)
    pages = {outcome.folder.parent / "index.html" for outcome in outcomes if outcome.status == "done"}
    for page in sorted(pages):
        print(f"page: {page}")
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _reproduce(options: argparse.Namespace) -> int:
    from upclose import reproduce

    only = [name for name in options.only.split(",") if name]
    values = _overrides(options.parameter)
    return reproduce.main(
        options.table, only, options.device, values, options.yes, options.dry_run, options.ray, options.results
    )


def _compare(options: argparse.Namespace) -> int:
    from upclose import compare, report

    root = options.results or paths.results()
    measured = report.collect(root)
    out = options.out or root / "compare"
    for file in [*report.tables(measured, out), *report.matrices(report.matrix(root), out), *report.pareto(root)]:
        print(file)
    tables = pd.concat([compare.versus(measured, paper) for paper in compare.papers()])
    print(tables.groupby(["paper", "table", compare.kinds(tables.status)]).size().unstack(fill_value=0).to_string())
    return 0


def _data(options: argparse.Namespace) -> int:
    from upclose import datasets
    from upclose.datasets import archives, registry

    root = paths.data()
    if options.action == "ls":
        print("\n".join(archives.line(entry, root) for entry in registry.entries().values()))
        return 0
    wanted, wrong = _wanted(options), 0
    for entry in wanted:
        name = f"{entry.dataset} ({entry.protocol})"
        if options.action == "where":
            print("\n".join(archives.described(entry, root)))
        elif options.action == "get":
            try:
                print(f"{name}: {datasets.download(entry.dataset, root, entry.protocol, options.source)}")
            except (OSError, ValueError, RuntimeError) as error:  # the others are fetched all the same
                print(paths.sentence(error), file=sys.stderr)
                wrong += 1
        else:
            found = [*datasets.verify(entry.dataset, entry.protocol, root, options.split)]
            print("\n".join(map(paths.sentence, found)) or f"{name}: sound")
            wrong += len(found)
    return int(wrong > 0)


def _wanted(options: argparse.Namespace) -> list[Any]:
    """The registry's entries that a command names, or that a table reads."""
    from upclose import doctor, reproduce
    from upclose.datasets import registry

    table = getattr(options, "table", None)
    if bool(table) == bool(options.name):
        raise ValueError("name data sets or a --table, one of both; `upclose data ls` has their names")
    if own := [name for name in options.name if name == "birdlets" or registry.is_own(name)]:
        raise ValueError(f"there is nothing to get or to check of {own[0]}: it is drawn by the program, or your own")
    if table:
        cells = reproduce.cells(reproduce.tables(Path(table).name))
        return list({entry[:2]: entry for cell in cells for entry in doctor.entries(cell.values)}.values())
    return [registry.entry(name, options.protocol) for name in options.name]


def _bank(options: argparse.Namespace) -> int:
    from upclose import bank

    if options.action == "build":
        return _build(options)
    if options.action == "ls":
        rows = bank.ls(options.root)
        columns = ["key", "complete", "images", "unreadable", "bytes"]
        print(pd.DataFrame(rows, columns=columns).to_string(index=False) if rows else "no banks here")
        return 0
    if options.action == "verify":
        damage = bank.verify(options.root, options.key, options.mend)
        for row in damage:
            print(f"{row['shard']}: {row['reason']}")
        print(
            "sound"
            if not damage
            else "mended: the next build encodes these shards again"
            if options.mend
            else "damaged; --mend removes these shards"
        )
        return int(bool(damage) and not options.mend)
    print(f"removed {bank.rm(options.root, options.key) / 2**20:.1f} MiB")
    return 0


def _build(options: argparse.Namespace) -> int:
    from upclose import bank, datasets, encode
    from upclose.features import Plan

    if options.gpus and not options.ray:
        raise ValueError("--gpus is a Ray actor's share: give --ray ADDRESS too, or choose the GPU with --device cuda")
    data = datasets.load(options.dataset, options.split)
    device, target = ("cpu", "cuda") if options.gpus else (options.device, None)  # the head need not have a GPU
    encoder = encode.load(options.backbone, options.pretrained, device, options.precision, runs_on=target)
    plan = Plan(
        options.sampler,
        options.crops,
        (options.alpha, options.beta),
        options.seed,
        options.factor,
        options.steps,
        options.cls,
    )
    executor, address = ("ray", options.ray) if options.ray else ("local", "auto")
    built = bank.build(
        data,
        encoder,
        plan,
        options.root,
        executor,
        options.on_error,
        options.dtype,
        progress=True,
        address=address,
        gpus=options.gpus,
    )
    print(f"{bank.key(data, encoder, plan, options.dtype)}: {len(built)} images, {len(built.errors)} unreadable")
    return 0


def _weights(options: argparse.Namespace) -> int:
    from upclose import shipped
    from upclose.encode import published, sources

    if options.action == "ls":
        print(pd.DataFrame(published.rows()).to_string(index=False))
        return 0
    wanted = [published.parse(text) for text in options.name]
    if options.file and len(wanted) > 1:
        raise ValueError("--from gives one file: name one of the weights")
    for name, tag in wanted:
        file, found = sources.get(name, tag, options.file)
        digest = shipped.sha256(file)
        known = digest in published.official(name, tag)
        kind = "the published file" if known else "taken at your word" if options.file else "not pinned"
        print(f"{name}:{tag}  {file}\n  sha256 {digest} ({kind})\n  fingerprint {found}")
    return 0


def _explain(options: argparse.Namespace) -> int:
    from upclose import encode, explorer, images, prompts

    classes, pixels = prompts.read(options.classes), images.load_image(options.picture)
    encoder = encode.load(options.backbone, options.pretrained, options.device)
    chosen = {"method": options.method} if options.method else {}
    case = explorer.explain(encoder, pixels, options.picture.name, classes, **chosen)
    print(case.facts["why"])
    print(f"page: {explorer.write(options.out, [case])}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from upclose import doctor

    return doctor.main(tables=options.tables, as_json=options.json)


def _folder(text: str) -> Path:
    return Path(_place(text))


def _place(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty, as an unset variable is; name a folder")
    return text


def _whole(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not from {least:,} to {most:,}")
        return value

    return number


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(paths.sentence(message))


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    formatter = argparse.RawDescriptionHelpFormatter
    top = _Parser(
        prog="upclose",
        description="CLIP, up close: five papers as notebooks, run in batch.",
        epilog=EPILOG,
        formatter_class=formatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="run the notebooks of parameter files", epilog=EPILOG, formatter_class=formatter
    )
    run.add_argument("file", nargs="+", type=Path, help="parameter files (YAML)")
    run.add_argument(
        "-p",
        dest="parameter",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a parameter; the value is YAML",
    )
    run.add_argument("--dry-run", action="store_true", help="only say what would be run")
    run.add_argument("--force", action="store_true", help="run again what is complete")
    run.add_argument("--workers", type=_whole(1, 1_000), default=1, metavar="N", help="notebooks at a time (default 1)")
    run.add_argument("--ray", metavar="ADDRESS", help="an existing Ray cluster: auto, HOST:PORT, or local to start one")
    run.add_argument("--results", type=_folder, help="results folder (default: UPCLOSE_RESULTS, else results/)")
    run.set_defaults(function=_run)

    reproduce = commands.add_parser("reproduce", help="a published table in one call: fetch, encode, run, compare")
    reproduce.add_argument("table", help="a sheet of params/papers, as lgca-table1, or a paper for all of its sheets")
    reproduce.add_argument("--only", default="", metavar="NAMES", help="data sets, joined by commas")
    reproduce.add_argument("--device", help="cpu, cuda (all GPUs of this machine), cuda:1 (that one)")
    reproduce.add_argument(
        "-p", dest="parameter", action="append", default=[], metavar="NAME=VALUE", help="not as in the sheet"
    )
    reproduce.add_argument("--dry-run", action="store_true", help="only say what is needed, hours and disk")
    reproduce.add_argument("--yes", action="store_true", help="fetch what is missing without asking")
    reproduce.add_argument("--ray", metavar="ADDRESS", help="an existing Ray cluster: auto, HOST:PORT, or local")
    reproduce.add_argument("--results", type=_folder, help="results folder (default: UPCLOSE_RESULTS, else results/)")
    reproduce.set_defaults(function=_reproduce)

    compare = commands.add_parser(
        "compare", help="write what complete runs measured: beside the papers' tables, and method against method"
    )
    compare.add_argument("--results", type=_folder, help="results folder (default: UPCLOSE_RESULTS, else results/)")
    compare.add_argument("--out", type=_folder, help="folder of the tables (default: compare/ in the results folder)")
    compare.set_defaults(function=_compare)

    data = commands.add_parser("data", help="the papers' data sets: list, get, check")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("ls", help="each with what is here, its size and its licence")
    get = actions.add_parser("get", help="download and unpack what is missing; say what must be got by hand")
    get.add_argument("--table", metavar="SHEET", help="of params/papers: all its data sets")
    get.add_argument("--from", dest="source", type=_folder, metavar="FOLDER", help="in which archives lie already")
    verify = actions.add_parser("verify", help="read every picture, compare numbers")
    verify.add_argument("--split", action="append", default=[], choices=("train", "validation", "test"))
    where = actions.add_parser("where", help="folder, archives, sizes, checksums, home page")
    for action in (get, verify, where):
        action.add_argument("name", nargs="*", help="of a data set")
        action.add_argument("--protocol", help="whose split: official, coop, vissl (default: the first in ls)")
    data.set_defaults(function=_data)

    bank = commands.add_parser("bank", help="encode data sets, list, check and remove what is encoded")
    actions = bank.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="encode a data set's images and crops")
    build.add_argument("dataset")
    build.add_argument("--split", default="test")
    build.add_argument("--backbone", default="birdlets-tiny")
    build.add_argument("--pretrained")
    build.add_argument("--device")
    build.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    build.add_argument("--sampler", default="square", choices=("square", "area"))
    build.add_argument("--crops", type=_whole(1, 10_000), default=30)
    build.add_argument("--alpha", type=float, default=0.5, help="smallest crop side as a share of the short side")
    build.add_argument("--beta", type=float, default=0.9, help="largest")
    build.add_argument("--seed", type=_whole(0, 2**63 - 1), default=0)
    build.add_argument("--factor", type=float, default=1.0, help="of one expansion of a ladder")
    build.add_argument("--steps", type=_whole(1, 1_000), default=1, help="levels of the ladder")
    build.add_argument("--cls", action="store_true", help="keep the [CLS] tokens before projection")
    build.add_argument("--dtype", default="float16", choices=("float16", "float32"))
    build.add_argument(
        "--on-error", default="raise", choices=("raise", "skip"), help="what to do with unreadable pictures"
    )
    build.add_argument("--ray", metavar="ADDRESS", help="spread the shards over a Ray cluster")
    build.add_argument("--gpus", type=float, default=0.0, help="share of a GPU that each Ray actor asks for")
    ls = actions.add_parser("ls", help="what is encoded")
    verify = actions.add_parser("verify", help="compare every byte with the checksums")
    verify.add_argument("key")
    verify.add_argument(
        "--mend", action="store_true", help="remove damaged shards, so that a build makes only them again"
    )
    rm = actions.add_parser("rm", help="remove a bank")
    rm.add_argument("key")
    for action in (build, ls, verify, rm):
        action.add_argument("--root", type=_place, help="folder or fsspec URL (default: UPCLOSE_BANK, else the cache)")
    bank.set_defaults(function=_bank)

    weights = commands.add_parser("weights", help="the backbones of the papers' tables: which are here, and get them")
    actions = weights.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("ls", help="where they are, size, revision and licence")
    get = actions.add_parser("get", help="fetch them, or take a file as one of them once it has loaded")
    get.add_argument("name", nargs="+", metavar="NAME[:TAG]", help="as `ls` writes it")
    get.add_argument("--from", dest="file", type=Path, metavar="FILE", help="a checkpoint, in any layout")
    weights.set_defaults(function=_weights)

    explain = commands.add_parser("explain", help="a page that shows what the methods match in a picture of yours")
    explain.add_argument("picture", type=Path)
    explain.add_argument("--classes", type=Path, required=True, help="JSON, {class: [sentences]}")
    explain.add_argument("--method", help="that chooses the two classes shown")
    explain.add_argument("--backbone", default="birdlets-tiny")
    explain.add_argument("--pretrained")
    explain.add_argument("--device")
    explain.add_argument("--out", type=_folder, required=True, help="folder of the page")
    explain.set_defaults(function=_explain)

    doctor = commands.add_parser("doctor", help="what this machine has, and which published tables it could run")
    doctor.add_argument("--tables", action="store_true", help="each published table: what it needs and what is missing")
    doctor.add_argument("--json", action="store_true", help="for scripts")
    doctor.set_defaults(function=_doctor)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; an error that the user can mend is one sentence and exit code 2."""
    options = parser().parse_args(arguments)
    try:
        with _signals_stop():
            status = options.function(options)
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # who read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    except _expected() as error:
        print(f"upclose {options.command}: {paths.sentence(error)}", file=sys.stderr)
        return 2


@contextmanager
def _signals_stop() -> Iterator[None]:
    """SIGTERM and SIGHUP, as a batch system sends them, stop a command as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {}
    with suppress(ValueError):  # only the main thread may
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _expected() -> tuple[type[Exception], ...]:
    ray = sys.modules.get("ray")
    return (ValueError, OSError, RuntimeError, ImportError, *((ray.exceptions.RayError,) if ray else ()))


if __name__ == "__main__":
    sys.exit(main())
