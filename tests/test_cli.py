"""`upclose bank` on the command line: exit codes, what is printed, what is left on disk."""

import os
import sys

import pytest

from bank_world import contents
from upclose import bank, cli, datasets

N = 10
SIZE = ["--crops", "2", "--alpha", "0.4", "--beta", "0.8"]


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("UPCLOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UPCLOSE_BANK", str(tmp_path / "bank"))
    real = datasets.load
    monkeypatch.setattr(datasets, "load", lambda name, split: real(name, split, limit=N))


def run(capsys, *arguments):
    """Exit code, standard output and standard error."""
    code = cli.main(["bank", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def folder(tmp_path):
    (found,) = (path for path in (tmp_path / "bank").iterdir() if path.is_dir())
    return found


def test_build_ls_verify_mend_rm(tmp_path, capsys):
    assert run(capsys, "ls") == (0, "no banks here\n", "")
    code, out, err = run(capsys, "build", "birdlets", *SIZE)
    here = folder(tmp_path)
    assert (code, out) == (0, f"{here.name}: {N} images, 0 unreadable\n")
    assert f"{2 * N}/{2 * N}" in err  # the bar counts crops
    undisturbed = contents(here)
    assert run(capsys, "build", "birdlets", *SIZE)[:2] == (0, out)
    code, out, _ = run(capsys, "ls")
    assert code == 0
    assert out.splitlines()[0].split() == ["key", "complete", "images", "unreadable", "bytes"]
    assert out.splitlines()[1].split() == [here.name, "True", "10", "0", str(sum(map(len, undisturbed.values())))]
    assert run(capsys, "verify", here.name) == (0, "sound\n", "")

    (shard,) = here.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, out, _ = run(capsys, "verify", here.name)
    assert code == 1
    assert out.splitlines() == [
        f"{shard.name}: its bytes are not those that were written (checksum)",
        "damaged; --mend removes these shards",
    ]
    assert shard.exists()
    code, out, _ = run(capsys, "verify", here.name, "--mend")
    assert code == 0
    assert out.splitlines()[-1] == "mended: the next build encodes these shards again"
    assert not shard.exists()
    assert run(capsys, "verify", here.name)[0] == 2  # unfinished now
    assert run(capsys, "build", "birdlets", *SIZE)[0] == 0
    assert contents(here) == undisturbed

    code, out, _ = run(capsys, "rm", here.name)
    assert (code, out) == (0, f"removed {sum(map(len, undisturbed.values())) / 2**20:.1f} MiB\n")
    assert run(capsys, "ls")[1] == "no banks here\n"


def test_every_option_of_a_build_is_part_of_the_bank(tmp_path, capsys):
    options = ["--sampler", "area", "--seed", "3", "--dtype", "float32", "--factor", "1.2", "--steps", "2"]
    assert run(capsys, "build", "birdlets", *SIZE, *options, "--root", str(tmp_path / "mine"))[0] == 0
    (row,) = bank.ls(tmp_path / "mine")
    plan = {"sampler": "area", "n": 2, "scale": [0.4, 0.8], "seed": 3, "factor": 1.2, "steps": 2, "cls": False}
    assert row["identity"]["plan"] == plan
    assert row["identity"]["dtype"] == "float32"
    assert not (tmp_path / "bank").exists()
    assert run(capsys, "build", "birdlets", *SIZE, "--cls", "--root", "memory://cli/bank")[0] == 0
    (row,) = bank.ls("memory://cli/bank")
    assert row["identity"]["plan"]["cls"]
    assert run(capsys, "rm", row["key"], "--root", "memory://cli/bank")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "no-such-bank"], "there is no bank 'no-such-bank'"),
        (["rm", "no-such-bank"], "there is no bank 'no-such-bank'"),
        (["build", "no-such-data"], "no-such-data"),
        (["build", "birdlets", "--backbone", "no-such-model"], "unknown model 'no-such-model'"),
        (["build", "birdlets", "--precision", "fp16", "--device", "cpu"], "'fp16' is for GPUs"),
        (["build", "birdlets", "--alpha", "nan"], "0 < alpha <= beta <= 1, not (nan, 0.9)"),
        (["build", "birdlets", "--factor", "0.5"], "factor must be a finite number of at least 1"),
        (["build", "two\nlines\x1b[2J"], r"no data set 'two\nlines\x1b[2J'"),
        (["build", "x" * 10_000], "xxx ... "),
        (["build", "birdlets", "--gpus", "1"], "give --ray ADDRESS too"),
        (["build", "birdlets", "--root", "nosuch://bucket"], "nosuch"),
        (["build", "birdlets", "--ray", "auto"], 'pip install "upclose[cluster]"'),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, said):
    if "--ray" in arguments:
        monkeypatch.setitem(sys.modules, "ray", None)
    code, out, err = run(capsys, *arguments)
    last = err.strip().splitlines()[-1]
    assert (code, out) == (2, "")
    assert last.startswith("upclose bank: ")
    assert said in last
    assert len(last) < 1000
    assert "Traceback" not in err
    assert "--ray" in arguments or not (tmp_path / "bank").exists()


@pytest.mark.parametrize("given", ["--crops 0", "--crops 1e3", "--steps 0", "--seed -1", "--seed 9223372036854775808"])
def test_whole_numbers_have_ends(capsys, given):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bank", "build", "birdlets", *given.split()])
    assert stop.value.code == 2
    assert f"argument {given.split()[0]}: " in capsys.readouterr().err


def test_a_head_without_a_gpu_asks_for_workers_with_one(capsys, monkeypatch):
    asked = {}

    def build(data, encoder, *_, **options):
        asked.update(options, encoder=encoder)
        raise ValueError("as far as this test goes")

    monkeypatch.setattr(bank, "build", build)
    run(capsys, "build", "birdlets", "--precision", "fp16", "--ray", "auto", "--gpus", "1")
    assert (asked["encoder"].device.type, asked["encoder"].precision, asked["gpus"]) == ("cpu", "fp16", 1.0)


def test_what_ray_raises_is_no_traceback(capsys, monkeypatch):
    ray = pytest.importorskip("ray")

    def fail(_):
        raise ray.exceptions.RaySystemError("the raylet has gone")

    monkeypatch.setattr(bank, "ls", fail)
    code, _, err = run(capsys, "ls")
    assert code == 2
    assert "the raylet has gone" in err


def test_ctrl_c_says_that_the_same_command_goes_on(capsys, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bank, "ls", stop)
    assert run(capsys, "ls") == (130, "", "stopped; the same command goes on\n")


@pytest.mark.parametrize(
    "command",
    [
        ["run", "x.yaml", "--results", ""],
        ["bank", "ls", "--root", ""],
        ["bank", "build", "birdlets", "--steps", "100000000"],
        ["bank", "build", "birdlets", "--crops", "1000000000"],
    ],
)
def test_arguments_that_cannot_be_meant(command, capsys):
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "Traceback" not in capsys.readouterr().err


def test_a_parameter_is_given_once(capsys):
    assert cli.main(["run", "x.yaml", "-p", "images=1", "-p", "images=2"]) == 2
    assert "images is given twice" in capsys.readouterr().err


def test_a_command_ends_quietly_when_its_reader_goes(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        monkeypatch.setattr(cli, "_doctor", lambda options: print("x"))
        assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().err == ""
