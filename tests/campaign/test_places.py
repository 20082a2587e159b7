"""Full disks, disks without room for names, read-only places, no home: one sentence, nothing half, and it goes on."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bank_world import contents
from tally import Tally
from test_bank_faults import build, one_thread, undisturbed  # noqa: F401
from test_injections import complete
from upclose import cli, compare, paths, report

POINTS = 20  # at which each fault strikes: the first half in a build, the second where pages and tables are written

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def pages(root):
    """What `upclose run` and `upclose compare` write below a results folder."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report.refresh(root)
    if lost := [str(row.message) for row in caught if "cannot be written" in str(row.message)]:
        raise OSError(lost[0])
    report.tables(report.collect(root), root / "compare")


def attempt(point, root, undisturbed, mend):  # noqa: F811
    """Work in a place that fails, have it mended, work again; "detected", "harmless", or what went wrong."""
    building = point < POINTS // 2
    work = build if building else pages
    try:
        work(root)
        outcome = "harmless"
    except OSError as error:
        outcome = "detected" if str(root) in str(error) else f"does not name the place: {error}"
    for file in root.rglob("*"):
        if ".partial-" in file.name:
            return f"left behind: {file}"
        if building and file.suffix in (".safetensors", ".json") and file.read_bytes() != undisturbed[file.name]:
            return f"a part of {file}"
        if file.name == "index.html" and not file.read_text().endswith("</html>\n"):
            return f"a part of {file}"
    mend()
    held = work(root)
    if building and contents(Path(held.folder.path)) != undisturbed:
        return "the next build has other bytes"
    return outcome


def mounted(place, options):
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("only root may mount")


def prepare(point, root, tmp_path):
    """What stands in the place before the fault: half of the time a day with a run, whose page is lacking."""
    if point >= POINTS // 2:
        shutil.copytree(tmp_path / "day", root / "results")
        return root / "results"
    return root


@pytest.fixture
def day(tmp_path):
    complete(tmp_path / "day", "small-0123456789", "plain")


@pytest.mark.parametrize(("fault", "option"), [("full disks", "size={}k"), ("no room for names", "nr_inodes={}")])
def test_full(tmp_path, day, undisturbed, fault, option):  # noqa: F811
    tally = Tally(fault)
    taken = {"full disks": 32, "no room for names": 9}[fault]  # what the day takes itself
    for point in range(POINTS):
        within = point % (POINTS // 2)
        room = within * 8 + 4 if fault == "full disks" else within + 2
        place = tmp_path / f"{point}"
        mounted(place, option.format(room + (taken if point >= POINTS // 2 else 0)))
        try:
            root = prepare(point, place, tmp_path)
            enough = ["mount", "-o", "remount,size=64m,nr_inodes=10000", str(place)]
            tally.add(
                point, attempt(point, root, undisturbed, lambda enough=enough: subprocess.run(enough, check=True))
            )
        finally:
            subprocess.run(["umount", str(place)], check=True)
    tally.close(POINTS)


class _Refusal:
    """From the n-th on, whatever makes or renames a file below a folder fails as on a read-only file system."""

    def __init__(self):
        self.root, self.left = None, 0
        sys.addaudithook(self.look)

    def look(self, event, arguments):
        if self.root is None or event not in ("open", "os.mkdir", "os.rename"):
            return
        path = arguments[event == "os.rename"]
        if not isinstance(path, str | bytes | os.PathLike) or not os.fsdecode(path).startswith(self.root):
            return
        writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        self.left -= bool(writes)
        if writes and self.left < 0:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fsdecode(path))

    @contextlib.contextmanager
    def after(self, writes, root):
        self.root, self.left = str(root), writes
        try:
            yield
        finally:
            self.root = None


def test_read_only_places(tmp_path, day, undisturbed):  # noqa: F811
    tally, refusal = Tally("read-only places"), _Refusal()
    compare.published()  # read once a process
    for point in range(POINTS):
        (tmp_path / str(point)).mkdir()
        root = prepare(point, tmp_path / str(point), tmp_path)
        with contextlib.ExitStack() as stack:
            stack.enter_context(refusal.after(point % (POINTS // 2), root))
            tally.add(point, attempt(point, root, undisturbed, stack.close))
    tally.close(POINTS)


HOMES = ("/dev/null/home", "/proc/home", "")  # no folder, not to be written, unset
COMMANDS = [
    (["doctor"], 0),
    (["doctor", "--json"], 0),
    (["bank", "ls"], 0),
    (["bank", "verify", "x"], 2),
    (["bank", "build", "cub"], 2),
    (["run", "params/birdlets/00_start_here.yaml", "--dry-run"], 0),
    (["run", "params/papers/lare-table1.yaml", "--dry-run"], 1),
]


def test_no_home(tmp_path, monkeypatch, capsys):
    tally = Tally("no home")
    for name in ("UPCLOSE_CACHE", "UPCLOSE_BANK", "UPCLOSE_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UPCLOSE_RESULTS", str(tmp_path / "results"))
    monkeypatch.chdir(paths.ROOT)
    for k in range(POINTS):
        home, (command, code) = HOMES[k % 3], COMMANDS[k % len(COMMANDS)]
        if home:
            monkeypatch.setenv("HOME", home)
        else:
            monkeypatch.delenv("HOME", raising=False)
        try:
            found = cli.main(command)
            said = capsys.readouterr().err
            fine = found == code and "Traceback" not in said and (code != 2 or said.count("\n") == 1)
            outcome = ("detected" if code else "harmless") if fine else f"exit code {found}: {said[:300]}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        tally.add((home, command), outcome)
    tally.close(POINTS)
