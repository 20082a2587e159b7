"""Malformed parameter files and command lines: one sentence, no traceback, nothing written."""

import random
import re
import signal

import pytest

from tally import Tally, tree
from upclose import cli, params, paths, run

FILES, VALUES, LINES = 70, 70, 125  # broken files, values that no parameter takes, command lines
SECONDS = 20  # that a refusal may take
MARK = "touched"

BROKEN = [
    b"",
    b"\n\n# nothing\n",
    b"~",
    b"42",
    b"text",
    b"- a\n- b\n",
    b"notebook",
    b"notebook: 01_lgca\nnotebook: 02_lazsl\n",
    b"notebook: [01_lgca]\n",
    b"notebook: {a: 1}\n",
    b"notebook:\n",
    b"notebook: 1\n",
    b"notebook: ''\n",
    b"notebook: 01_lgca.py\n",
    b"notebook: 01_lgcaa\n",
    b"notebook: ../notebooks/../secret\n",
    b"notebook: ../../etc/passwd\n",
    b"notebook: /etc/passwd\n",
    b'notebook: "01_lgca\\0"\n',
    b'notebook: "01_lgca\\n"\n',
    b'notebook: "\\e[2J01_lgca"\n',
    b"notebook: 01_lgca\nparameter: {images: 3}\n",
    b"notebook: 01_lgca\nparameters: 3\n",
    b"notebook: 01_lgca\nparameters: [images, 3]\n",
    b"notebook: 01_lgca\nparameters: {images: 3, images: 4}\n",
    b"notebook: 01_lgca\nparameters: {imges: 3}\n",
    b"notebook: 01_lgca\nparameters: {'': 3}\n",
    b"notebook: 01_lgca\nparameters: {1: 3}\n",
    b"notebook: 01_lgca\nparameters: {null: 3}\n",
    b"notebook: 01_lgca\nparameters: {[a]: 3}\n",
    b"notebook: 01_lgca\nparameters: {{a: 1}: 3}\n",
    b"notebook: 01_lgca\nparameters: {images: 3\n",
    b"notebook: 01_lgca\nparameters: {images: &a 3, crops: *a}\n",
    b"a: &a [x]\nb: [*a, *a]\nnotebook: 01_lgca\n",
    b"notebook: 01_lgca\n<<: {parameters: {images: 3}}\nx: 1\n",
    b"notebook: 01_lgca\ngrid: {images: 3}\n",
    b"notebook: 01_lgca\ngrid: {images: []}\n",
    b"notebook: 01_lgca\ngrid: {images: null}\n",
    b"notebook: 01_lgca\ngrid: [images]\n",
    b"notebook: 01_lgca\ngrid: {imges: [3]}\n",
    b"notebook: 01_lgca\ngrid: {crop_seeds: [[0, 0]]}\n",
    b"notebook: 01_lgca\ngrid: {images: [3, x]}\n",
    b"notebook: 01_lgca\nexceptions: 3\n",
    b"notebook: 01_lgca\nexceptions: [3]\n",
    b"notebook: 01_lgca\nexceptions: [{when: {}, set: {images: 3}}]\n",
    b"notebook: 01_lgca\nexceptions: [{when: {images: 3}, set: {images: 4}}]\n",
    b"notebook: 01_lgca\ngrid: {images: [3]}\nexceptions: [{when: {images: 3}, set: {imges: 4}}]\n",
    b"notebook: 01_lgca\ngrid: {images: [3]}\nexceptions: [{when: {images: 3}, st: {images: 4}}]\n",
    b"notebook: 01_lgca\nreproduces: [1]\nparameters: {images: 0}\n",
    b"notebook: 01_lgca\n\tparameters: {images: 3}\n",
    b"notebook: 01_lgca\n parameters: {images: 3}\n",
    b"notebook: 01_lgca\n--- \nnotebook: 02_lazsl\n",
    b"notebook: !!python/name:os.system 01_lgca\n",
    b"notebook: !!python/object/apply:os.system ['touch " + MARK.encode() + b"']\n",
    b"notebook: !other 01_lgca\n",
    b"%YAML 9.9\n---\nnotebook: 01_lgca\n",
    b"notebook: \xff\xfe\n",
    b"\xff\xfen\0o\0t\0e",
    b"notebook: 01_lgca\0\n",
    b"notebook: 01_lgca\x07\n",
    b"{" * 5000,
    b"[" * 100_000,
    b"notebook: 01_lgca\nparameters: " + b"{a: " * 2000 + b"1" + b"}" * 2000 + b"\n",
    b"notebook: 01_lgca\ngrid: {seed: [" + b"0," * 20_000 + b"]}\n",
    b"notebook: 01_lgca\ngrid: {images: [" + b",".join(b"%d" % k for k in range(1, 20_000)) + b"]}\n",
    b"notebook: 01_lgca\nparameters: {images: " + b"9" * 5000 + b"}\n",
    b"notebook: 01_lgca\nparameters: {images: 1e999}\n",
    b"notebook: 01_lgca\nparameters: {alpha: 0.9, beta: 0.5}\n",
    b"notebook: 01_lgca\nparameters: {alpha: -.inf}\n",
    b"\x89PNG\r\n\x1a\n",
]
JUNK = ["", "{a: 1}", "[[]]", "2024-01-01", ".nan", ".inf", "-1", "!!binary aGk=", "!!set {a, b}", "[null]", "1e400"]

GOOD = "params/birdlets/01_lgca.yaml"
COMMANDS = [
    [],
    ["rn"],
    ["--verison"],
    ["run"],
    ["run", ""],
    ["run", "."],
    ["run", "/"],
    ["run", "nowhere.yaml"],
    ["run", "nowhere/*.yaml"],
    ["run", "/dev/null"],
    ["run", "/dev/zero"],
    ["run", "/proc/self/mem"],
    ["run", "README.md"],
    ["run", "notebooks/01_lgca.ipynb"],
    ["run", "x" * 5000],
    ["run", "\x1b[2Jx.yaml"],
    ["run", "two\nlines.yaml"],
    ["run", "\udcff.yaml"],
    ["run", GOOD, "-p"],
    ["run", GOOD, "-p", ""],
    ["run", GOOD, "-p", "="],
    ["run", GOOD, "-p", "=3"],
    ["run", GOOD, "-p", "images"],
    ["run", GOOD, "-p", "images="],
    ["run", GOOD, "-p", "images=3", "-p", "images=4"],
    ["run", GOOD, "-p", "images=3", "-p", " images =4"],
    ["run", GOOD, "-p", "images=[3"],
    ["run", GOOD, "-p", "images={3: 4"],
    ["run", GOOD, "-p", "images='3"],
    ["run", GOOD, "-p", "images=*a"],
    ["run", GOOD, "-p", "images=&a 3 *a"],
    ["run", GOOD, "-p", "images=" + "[" * 100_000],
    ["run", GOOD, "-p", "images=\x00"],
    ["run", GOOD, "-p", "images=\x1b[31m"],
    ["run", GOOD, "-p", "images=\udcff"],
    ["run", GOOD, "-p", "backbone=\udcff"],
    ["run", GOOD, "-p", "backbone=\x1b[31mx"],
    ["run", GOOD, "-p", "backbone="],
    ["run", GOOD, "-p", 'backbone="a\\nb"'],
    ["run", GOOD, "-p", 'backbone="a\\0b.pt"'],
    ["run", GOOD, "-p", "backbone=../../x"],
    ["run", GOOD, "-p", "backbone=" + "x" * 5000],
    ["run", GOOD, "-p", 'pretrained="a\\0b.pt"'],
    ["run", GOOD, "-p", "pretrained=" + "x" * 5000 + ".safetensors"],
    ["run", GOOD, "-p", "pretrained=/dev/zero"],
    ["run", GOOD, "-p", "pretrained=/etc/passwd"],
    ["run", GOOD, "-p", "dataset=imagefolder:" + "x" * 5000],
    ["run", GOOD, "-p", 'dataset="imagefolder:a\\0b"'],
    ["run", GOOD, "-p", 'dataset="imagefolder:a\\nb"'],
    ["run", GOOD, "-p", "dataset=imagefolder:params"],
    ["run", GOOD, "-p", "dataset=imagefolder:/dev/null"],
    ["run", GOOD, "-p", "dataset=imagefolder:~nobody-of-this-name/x"],
    ["run", GOOD, "-p", "dataset=nothing"],
    ["run", GOOD, "-p", "dataset=birdlets", "-p", "split=tset"],
    ["run", GOOD, "-p", "device=cuda:" + "9" * 30],
    ["run", GOOD, "-p", "device=cpu:1"],
    ["run", GOOD, "-p", "domain=photo+"],
    ["run", GOOD, "-p", "crop_seeds=[1, 1]"],
    ["run", GOOD, "-p", "crop_seeds=[-1]"],
    ["run", GOOD, "-p", "crop_seeds=[9223372036854775808]"],
    ["run", GOOD, "-p", "crops=10001"],
    ["run", GOOD, "--workers", "0"],
    ["run", GOOD, "--workers", "-3"],
    ["run", GOOD, "--workers", "1.5"],
    ["run", GOOD, "--workers", "1e3"],
    ["run", GOOD, "--workers", "9" * 5000],
    ["run", GOOD, "--results", ""],
    ["run", GOOD, "--results"],
    ["run", GOOD, "--results", "/dev/null/x"],
    ["run", GOOD, "--results", "/proc/x"],
    ["run", GOOD, "--results", "x" * 5000],
    ["run", GOOD, "--results", "a\0b"],
    ["run", GOOD, "--dryrun"],
    ["compare", "--results", ""],
    ["compare", "--results", "/dev/null"],
    ["compare", "--results", "nowhere"],
    ["compare", "--out", ""],
    ["compare", "x"],
    ["doctor", "--tabels"],
    ["bank"],
    ["bank", "sl"],
    ["bank", "ls", "--root", ""],
    ["bank", "verify"],
    ["bank", "verify", "x"],
    ["bank", "verify", "../x"],
    ["bank", "verify", "a\0b"],
    ["bank", "rm", ""],
    ["bank", "rm", "."],
    ["bank", "rm", "../../x-" + "0" * 20],
    ["bank", "rm", "x", "--root", "nofs://x"],
    ["bank", "build"],
    ["bank", "build", ""],
    ["bank", "build", "birdlet"],
    ["bank", "build", "imagefolder:"],
    ["bank", "build", "birdlets", "--crops", "0"],
    ["bank", "build", "birdlets", "--crops", "-5"],
    ["bank", "build", "birdlets", "--crops", "1e9"],
    ["bank", "build", "birdlets", "--crops", "1000000000"],
    ["bank", "build", "birdlets", "--crops", "9" * 5000],
    ["bank", "build", "birdlets", "--alpha", "nan"],
    ["bank", "build", "birdlets", "--alpha", "0"],
    ["bank", "build", "birdlets", "--alpha", "0.9", "--beta", "0.5"],
    ["bank", "build", "birdlets", "--beta", "inf"],
    ["bank", "build", "birdlets", "--factor", "nan"],
    ["bank", "build", "birdlets", "--factor", "0.5"],
    ["bank", "build", "birdlets", "--steps", "0"],
    ["bank", "build", "birdlets", "--steps", "100000000"],
    ["bank", "build", "birdlets", "--seed", "x"],
    ["bank", "build", "birdlets", "--seed", "-1"],
    ["bank", "build", "birdlets", "--seed", "9" * 400],
    ["bank", "build", "birdlets", "--cls", "--steps", "2"],
    ["bank", "build", "birdlets", "--gpus", "1"],
    ["bank", "build", "birdlets", "--gpus", "nan"],
    ["bank", "build", "birdlets", "--precision", "fp64"],
    ["bank", "build", "birdlets", "--precision", "fp16"],
    ["bank", "build", "birdlets", "--device", "cuda:99"],
    ["bank", "build", "birdlets", "--device", "banana"],
    ["bank", "build", "birdlets", "--backbone", "ViT-B-32", "--pretrained", "nope"],
    ["bank", "build", "birdlets", "--backbone", "hf-hub:"],
    ["bank", "build", "birdlets", "--root", ""],
    ["bank", "build", "birdlets", "--root", "/dev/null/x"],
    ["bank", "build", "birdlets", "--root", "nofs://x"],
    ["bank", "build", "birdlets", "--root", "a\0b"],
    ["bank", "build", "birdlets", "--dtype", "bfloat16"],
    ["bank", "build", "birdlets", "--split", "x"],
]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function that says what became of a command line: "detected", or what went wrong."""
    for name in ("RESULTS", "BANK", "CACHE", "DATA"):
        monkeypatch.setenv(f"UPCLOSE_{name}", str(tmp_path / name.lower()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("params", "notebooks", "README.md"):
        (tmp_path / name).symlink_to(paths.ROOT / name)
    monkeypatch.chdir(tmp_path)

    def started(*_, **__):
        raise Unrefused("work was begun")

    def late(*_):
        raise Unrefused(f"no answer in {SECONDS} s")

    monkeypatch.setattr(run, "_locally", started)
    monkeypatch.setattr("upclose.bank.bank._fill", started)
    before = signal.signal(signal.SIGALRM, late)

    def call(arguments):
        before = tree(tmp_path)
        signal.alarm(SECONDS)
        try:
            code = cli.main(arguments)
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            return f"{type(error).__name__}: {error}"[:300]
        finally:
            signal.alarm(0)
            said = capsys.readouterr().err
        lines = said.removesuffix("\n").split("\n")
        said_by_grammar = said.startswith("usage: ") and re.match(r"upclose[ \w]*: error: ", lines[-1])
        if code != 2:
            return f"exit code {code}: {said[:300]}"
        if not (said_by_grammar or (len(lines) == 1 and lines[0].startswith(f"upclose {arguments[0]}: "))):
            return f"not one sentence: {said[:500]!r}"
        if not said.replace("\n", "").isprintable() or len(lines[-1]) > 1000:
            return f"not for a terminal: {said[:300]!r}... ({len(said)})"
        if (after := tree(tmp_path)) != before:
            return f"written: {set(after) ^ set(before)}"
        return "detected"

    yield call
    signal.signal(signal.SIGALRM, before)


class Unrefused(BaseException):
    """Malformed input was not refused, or not in time."""


@pytest.mark.slow
def test_broken_parameter_files(refused, tmp_path):
    tally = Tally("broken parameter files")
    for k, content in enumerate(BROKEN[:FILES]):
        file = tmp_path / f"sheet{k}.yaml"
        file.write_bytes(content)
        tally.add(content[:80], refused(["run", str(file)]))
    assert not (tmp_path / MARK).exists()
    tally.close(FILES)


@pytest.mark.slow
def test_values_that_no_parameter_takes(refused, tmp_path):
    tally = Tally("values that no parameter takes")
    books = [
        book
        for book in paths.NOTEBOOKS.rglob("*.ipynb")
        if (paths.PARAMS / "birdlets" / book.relative_to(paths.NOTEBOOKS)).with_suffix(".yaml").exists()
    ]
    every = [(book, name, junk) for book in sorted(books) for name in params.defaults(book) for junk in JUNK]
    for k, (book, name, junk) in enumerate(random.Random(0).sample(every, VALUES)):
        file = tmp_path / f"sheet{k}.yaml"
        name_of_book = book.relative_to(paths.NOTEBOOKS).with_suffix("").as_posix()
        where = f"grid:\n  {name}: [{junk or 'null'}]\n" if k % 2 else f"parameters:\n  {name}: {junk}\n"
        file.write_text(f"notebook: {name_of_book}\n{where}")
        tally.add(f"{name_of_book} {where}", refused(["run", str(file)]))
    tally.close(VALUES)


@pytest.mark.slow
def test_malformed_command_lines(refused):
    tally = Tally("malformed command lines")
    for arguments in COMMANDS[:LINES]:
        tally.add([text[:60] for text in arguments], refused(arguments))
    tally.close(LINES)
