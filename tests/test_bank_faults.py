"""What goes wrong in the world: killed processes, full disks, damaged files, two builders at once."""

import errno
import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from bank_world import PLAN, SHARD, FakeDataset, FakeEncoder, contents
from upclose import bank
from upclose.bank import BankError, store

PROGRAM = Path(__file__).with_name("bank_world.py")
N = 64
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    held = build(tmp_path_factory.mktemp("undisturbed"))
    torch.set_num_threads(threads)
    return contents(Path(held.folder.path))


def build(root, encoder=None, **options):
    return bank.build(FakeDataset(N), encoder or FakeEncoder(), PLAN, root, shard=SHARD, **options)


def open_bank(root):
    return bank.open(root, FakeDataset(N), FakeEncoder(), PLAN)


def in_a_process(work, *arguments):
    """`work(*arguments)` in a forked process, and the pipe on which its result, or its error, comes back."""
    here, there = FORK.Pipe(duplex=False)

    def run():
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # tqdm's own is shared with the parent, and would be held for ever by the dead
        try:
            there.send(work(*arguments))
        except Exception as error:
            there.send(str(error))

    process = FORK.Process(target=run, daemon=True)
    process.start()
    return process, here


def result(process, pipe):
    assert pipe.poll(60)
    answer = pipe.recv()
    process.join(60)
    return answer


def slow_build(root, pause):
    return bank.build(FakeDataset(N, pause=pause), FakeEncoder(), PLAN, root, shard=SHARD).folder.path


def wait_for_a_shard(root):
    for _ in range(6000):
        if list(root.glob("*/*.safetensors")):
            return
        time.sleep(0.01)
    pytest.fail("no shard in a minute")


def fork_and_kill(root, delay, number):
    """Build in a forked process and send it a signal after `delay` seconds; True when it was ended in its work."""
    process, _ = in_a_process(slow_build, root, 0.002)
    time.sleep(delay)
    os.kill(process.pid, number)
    process.join(60)
    return process.exitcode != 0


def kill_until_finished(root, undisturbed, delays, signals=()):
    killed = 0
    for delay, number in itertools.zip_longest(delays, signals, fillvalue=signal.SIGKILL):
        killed += fork_and_kill(root, delay, number)
        folders = [path for path in Path(root).glob("*") if path.is_dir()] if Path(root).exists() else []
        for name, content in (contents(folders[0]) if folders else {}).items():
            if ".partial-" not in name:  # whatever bears a final name is whole
                assert content == undisturbed[name]
        if folders and "manifest.json" not in contents(folders[0]):
            with pytest.raises(BankError, match=r"unfinished|does not exist"):
                open_bank(root)
    return killed


def test_killed_at_random_moments_a_bank_loses_nothing(tmp_path, undisturbed):
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")  # shown when the test fails
    delays = sorted(np.random.default_rng(seed).uniform(0.0, 0.15, 15))  # a long one first might see the build finish
    killed = kill_until_finished(tmp_path, undisturbed, delays)
    encoder = FakeEncoder()
    kept = len(list(tmp_path.glob("*/*.safetensors")))
    finished = bool(list(tmp_path.glob("*/manifest.json")))
    held = build(tmp_path, encoder)
    assert killed > 0
    assert encoder.encoded == (0 if finished else N - kept * SHARD)
    assert contents(Path(held.folder.path)) == undisturbed


def test_a_killed_program_leaves_a_bank_that_the_next_one_finishes(tmp_path, undisturbed):
    process = subprocess.Popen([sys.executable, str(PROGRAM), str(tmp_path), str(N), "0.1"])
    wait_for_a_shard(tmp_path)
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("*/manifest.json"))
    encoder = FakeEncoder()
    held = build(tmp_path, encoder)
    assert 0 < encoder.encoded < N
    assert contents(Path(held.folder.path)) == undisturbed


@pytest.mark.parametrize("when", range(1, 10))
def test_killed_between_writing_and_renaming(tmp_path, undisturbed, monkeypatch, when):
    calls, real = [], os.replace

    def die(*names):
        calls.append(names)
        if len(calls) == when:
            raise KeyboardInterrupt
        real(*names)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path)
    monkeypatch.setattr(os, "replace", real)
    encoder = FakeEncoder()
    held = build(tmp_path, encoder)
    assert encoder.encoded == N - (when - 1) * SHARD
    assert contents(Path(held.folder.path)) == undisturbed


def test_leftovers_are_swept_away(tmp_path, undisturbed):
    folder = Path(build(tmp_path).folder.path)
    (folder / "manifest.json").unlink()
    shard = folder / "00000008-00000016.safetensors"
    (folder / f"{shard.name}.partial-{'0' * 32}").write_bytes(shard.read_bytes()[:100])
    (folder / "00000004-00000012.safetensors").write_bytes(shard.read_bytes())  # overlaps
    (folder / "00000064-00000072.safetensors").write_bytes(shard.read_bytes())  # beyond the data set
    assert contents(Path(build(tmp_path).folder.path)) == undisturbed


def test_a_resumed_build_with_another_shard_size_keeps_what_is_there(tmp_path, undisturbed):
    folder = Path(build(tmp_path).folder.path)
    (folder / "manifest.json").unlink()
    for name in ("00000024-00000032", "00000032-00000040"):
        (folder / f"{name}.safetensors").unlink()
    encoder = FakeEncoder()
    held = bank.build(FakeDataset(N), encoder, PLAN, tmp_path, shard=2 * SHARD)
    assert encoder.encoded == 2 * SHARD
    whole = bank.build(FakeDataset(N), FakeEncoder(), PLAN, tmp_path / "whole", shard=SHARD)
    assert torch.equal(held.read()[0].crop, whole.read()[0].crop)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("where", ["length", "header", "checksum", "first number", "last number"])
def test_a_flipped_byte_is_found_named_and_mended(tmp_path, undisturbed, where):
    folder = Path(build(tmp_path).folder.path)
    shard = folder / "00000016-00000024.safetensors"
    content = shard.read_bytes()
    header = int.from_bytes(content[:8], "little")
    position = {
        "length": 0,
        "header": content.index(b"data_offsets") + 16,
        "checksum": content.index(b"checksum") + 20,
        "first number": 8 + header,
        "last number": len(content) - 1,
    }[where]
    flip(shard, position)
    key = folder.name
    assert [row["shard"] for row in bank.verify(tmp_path, key)] == [shard.name]
    assert [row["shard"] for row in bank.verify(tmp_path, key, mend=True)] == [shard.name]
    with pytest.raises(BankError, match="unfinished"):
        open_bank(tmp_path)
    encoder = FakeEncoder()
    build(tmp_path, encoder)
    assert encoder.encoded == SHARD
    assert contents(folder) == undisturbed
    assert bank.verify(tmp_path, key) == []


@pytest.mark.parametrize("position", [0, 5, 40, 200, -1])
def test_a_flipped_byte_in_an_unfinished_bank_is_not_reused(tmp_path, undisturbed, position):
    folder = Path(build(tmp_path).folder.path)
    (folder / "manifest.json").unlink()
    flip(folder / "00000016-00000024.safetensors", position)
    encoder = FakeEncoder()
    build(tmp_path, encoder)
    assert encoder.encoded == SHARD
    assert contents(folder) == undisturbed


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_shard_cut_short_is_an_error_that_names_it(tmp_path, undisturbed, length):
    held = build(tmp_path)
    folder = Path(held.folder.path)
    shard = folder / "00000016-00000024.safetensors"
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(BankError, match=rf"{shard.name}.*instead of.*verify --mend {folder.name}"):
        open_bank(tmp_path)
    with pytest.raises(BankError, match=shard.name):
        held.read()
    assert held.read(slice(0, 16))[0].crop.shape[0] == 16  # the other shards are sound
    encoder = FakeEncoder()
    with pytest.warns(UserWarning, match=rf"{shard.name}.*encodes them again\. That is done now"):
        build(tmp_path, encoder)
    assert encoder.encoded == SHARD
    assert contents(folder) == undisturbed


def test_a_missing_shard_is_an_error_that_names_it(tmp_path):
    folder = Path(build(tmp_path).folder.path)
    (folder / "00000016-00000024.safetensors").unlink()
    with pytest.raises(BankError, match=r"00000016-00000024\.safetensors: the file is missing"):
        open_bank(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"null", b'{"a": ', b"\xff\xfe"])
def test_a_damaged_manifest_is_not_believed(tmp_path, undisturbed, damage):
    folder = Path(build(tmp_path).folder.path)
    (folder / "manifest.json").write_bytes(damage)
    with pytest.raises(BankError, match=r"manifest.*damaged"):
        open_bank(tmp_path)
    encoder = FakeEncoder()
    with pytest.warns(UserWarning, match=r"the manifest of bank .*damaged.*done now"):
        build(tmp_path, encoder)
    assert encoder.encoded == 0
    assert contents(folder) == undisturbed


def test_a_changed_number_in_the_manifest_is_not_believed(tmp_path):
    path = Path(build(tmp_path).folder.path) / "manifest.json"
    path.write_text(path.read_text().replace('"images": 64', '"images": 63'))
    with pytest.raises(BankError, match="manifest"):
        open_bank(tmp_path)


def test_a_full_disk_says_so_and_loses_nothing(tmp_path, undisturbed, monkeypatch):
    calls, real = [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*make room.*UPCLOSE_BANK") as caught:
        build(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.glob("*/*.partial-*"))
    monkeypatch.setattr(os, "fsync", real)
    held = build(tmp_path)
    assert contents(Path(held.folder.path)) == undisturbed


def test_the_kernel_refuses_to_write_on(tmp_path, undisturbed):
    """A real refusal in the middle of a file: the process may write no file longer than 1,000 bytes."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        build(tmp_path)

    said = result(*in_a_process(limited))
    assert "File too large" in said
    assert "make room" in said
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert contents(folder) == {}
    assert contents(Path(build(tmp_path).folder.path)) == undisturbed


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_root(tmp_path):
    held = build(tmp_path)
    for path in (tmp_path, Path(held.folder.path)):
        path.chmod(0o555)
    try:
        assert build(tmp_path).read()[0].crop.shape == (N, 3, 16)  # a finished bank is only read
        with pytest.raises(OSError, match="cannot write to the bank"):
            build(tmp_path, FakeEncoder(1))
    finally:
        for path in (tmp_path, Path(held.folder.path)):
            path.chmod(0o755)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write")
def test_a_root_that_nobody_can_write():
    with pytest.raises(OSError, match=r"cannot write to the bank at /proc.*choose another root"):
        build("/proc/bank")


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="cannot write to the bank"):
        build(tmp_path / "file")


def test_a_finished_bank_is_read_without_writing_anything(tmp_path, monkeypatch):
    build(tmp_path)
    monkeypatch.setattr(store, "lock", lambda *_: pytest.fail("locked"))
    monkeypatch.setattr(store, "write", lambda *_: pytest.fail("written"))
    assert len(build(tmp_path)) == N


def test_two_builders_at_once_do_the_work_once(tmp_path, undisturbed):
    first = in_a_process(slow_build, tmp_path, 0.02)
    wait_for_a_shard(tmp_path)
    encoder = FakeEncoder()
    with pytest.warns(UserWarning, match=r"another process is building.*waiting"):
        held = build(tmp_path, encoder)
    assert encoder.encoded == 0
    assert result(*first) == held.folder.path
    assert contents(Path(held.folder.path)) == undisturbed


def test_the_waiting_builder_goes_on_when_the_first_is_killed(tmp_path, undisturbed):
    first, _ = in_a_process(slow_build, tmp_path, 0.1)
    wait_for_a_shard(tmp_path)
    second = in_a_process(slow_build, tmp_path, 0.0)
    time.sleep(0.3)
    assert not second[1].poll()
    assert not list(tmp_path.glob("*/manifest.json"))
    first.kill()
    first.join(60)
    assert contents(Path(result(*second))) == undisturbed


def test_a_script_without_a_main_guard_builds_a_bank(tmp_path):
    """Whatever decodes does not import the program that called; nothing is left behind when it ends."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "print('began')\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from bank_world import *\n"
        "encoder = FakeEncoder()\n"
        "encoder.device = torch.device('cuda')\n"
        f"bank.build(FakeDataset({N}), encoder, PLAN, {str(tmp_path / 'root')!r}, shard=SHARD)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "began\n"), done.stderr
    assert len(list(tmp_path.glob("root/*/manifest.json"))) == 1


def test_a_forked_process_decodes_with_threads_of_its_own(tmp_path, undisturbed):
    bank.build(FakeDataset(N), FakeEncoder(), PLAN, tmp_path / "here", shard=SHARD)  # this process has its threads now
    process = in_a_process(slow_build, tmp_path / "there", 0)
    assert contents(Path(result(*process))) == undisturbed


def test_a_shard_carries_its_own_checksum():
    content = store.pack({"index": torch.arange(5)}, {7: "0" * 64, 9: "damaged"})
    assert store.unpack_errors(content) == {7: "0" * 64, 9: "damaged"}
    assert content == store.pack({"index": torch.arange(5)}, {7: "0" * 64, 9: "damaged"})
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1
        assert store.unpack_errors(bytes(flipped)) is None, position
    for length in range(0, len(content), 7):
        assert store.unpack_errors(content[:length]) is None


def test_a_bank_under_another_banks_key_is_not_read(tmp_path):
    """Two banks of one shape, told apart by their keys alone."""
    ours, theirs = (build(tmp_path, encoder=FakeEncoder(seed)) for seed in (0, 1))
    folder = Path(ours.folder.path)
    shutil.rmtree(folder)
    shutil.copytree(theirs.folder.path, folder)
    with pytest.raises(BankError, match="manifest of another bank"):
        bank.verify(tmp_path, folder.name)
    (folder / "manifest.json").unlink()  # an unfinished build with shards of other weights
    again, alone = build(tmp_path, encoder=FakeEncoder(0)), build(tmp_path / "b", encoder=FakeEncoder(0))
    assert again.folder.name == alone.folder.name == ours.folder.name
    assert torch.equal(again.read()[0].crop, alone.read()[0].crop)


def test_damage_that_keeps_the_size_is_found_by_the_first_read(tmp_path):
    held = build(tmp_path)
    shard = sorted(Path(held.folder.path).glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(BankError, match="checksum"):
        held.read()


def test_a_link_in_a_banks_place_is_not_followed(tmp_path):
    name = build(tmp_path / "other").folder.name
    (tmp_path / "home").mkdir()
    kept = tmp_path / "home" / "thesis.txt"
    kept.write_text("years of work")
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / name).symlink_to(tmp_path / "home")
    for call in (
        lambda: build(tmp_path / "bank"),
        lambda: bank.rm(tmp_path / "bank", name),
        lambda: bank.verify(tmp_path / "bank", name, mend=True),
    ):
        with pytest.raises(BankError, match="is a link"):
            call()
    with pytest.warns(UserWarning, match="is a link and no bank"):
        assert bank.ls(tmp_path / "bank") == []
    assert kept.read_text() == "years of work"


def test_what_is_not_the_banks_stays_in_its_folder(tmp_path):
    name = build(tmp_path / "other").folder.name
    (tmp_path / name).mkdir()
    kept = tmp_path / name / "notes.txt"
    kept.write_text("mine")
    build(tmp_path)
    bank.rm(tmp_path, name)
    assert [file.name for file in (tmp_path / name).iterdir()] == ["notes.txt"]
