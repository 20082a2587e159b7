"""A bank built by a real Ray cluster is the local one, also when a worker is killed while it builds."""

import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from bank_world import PLAN, SHARD, FakeDataset, FakeEncoder, contents
from upclose import bank, datasets
from upclose.bank import BankError

ray = pytest.importorskip("ray", reason='needs Ray: pip install "upclose[cluster]"')
N = 64


class Telling(FakeDataset):
    """Leaves the number of the process that loads from it in a folder; most pictures wait until one was killed."""

    folder = None

    def load(self, i):
        if self.folder:
            (Path(self.folder) / str(os.getpid())).touch()
            for _ in range(12_000 if i >= 2 * SHARD else 0):
                if (Path(self.folder) / "killed").exists():
                    break
                time.sleep(0.01)
        return super().load(i)


class Poisoned(FakeDataset):
    """Kills whoever loads picture 20."""

    def load(self, i):
        return os.kill(os.getpid(), signal.SIGKILL) if i == 20 else super().load(i)


@pytest.fixture(scope="module")
def cluster():
    """Two workers on this machine, who import the tests' modules; the GPU is declared, nobody looks for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    yield
    ray.shutdown()
    torch.set_num_threads(threads)


def local(root, dataset=None):
    return contents(Path(bank.build(dataset or FakeDataset(N), FakeEncoder(), PLAN, root, shard=SHARD).folder.path))


def spread(root, dataset, **options):
    held = bank.build(dataset, FakeEncoder(), PLAN, root, executor="ray", shard=SHARD, **options)
    return contents(Path(held.folder.path))


def test_a_killed_worker_is_replaced_and_its_shards_done_again(tmp_path, cluster):
    dataset = Telling(N)
    folder = tmp_path / "pids"
    folder.mkdir()
    dataset.folder = str(folder)
    killed, finished = [], threading.Event()

    def kill_one():
        while not killed and not finished.wait(0.02):
            pids = [int(path.name) for path in folder.iterdir()]
            if len(pids) == 2 and len(list((tmp_path / "ray").glob("*/*.safetensors"))) == 2:
                os.kill(pids[0], signal.SIGKILL)  # both workers are in the middle of a shard
                killed.append(pids[0])
                (folder / "killed").touch()

    assassin = threading.Thread(target=kill_one)
    assassin.start()
    try:
        built = spread(tmp_path / "ray", dataset)
    finally:
        finished.set()
        assassin.join()
    assert len(killed) == 1
    assert killed[0] != os.getpid()
    assert built == local(tmp_path / "local")


def test_a_shard_that_kills_every_worker_is_named(tmp_path, cluster):
    with pytest.raises(BankError, match=r"lost the worker 4 times at images \(16, 24\)"):
        spread(tmp_path, Poisoned(N), workers=1)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2  # those before it are kept


def test_pictures_in_tars_give_the_local_bank_when_a_worker_goes_through_a_tar(tmp_path, cluster):
    wds = pytest.importorskip("webdataset", reason='needs the extra: pip install "upclose[webdataset]"')
    with wds.ShardWriter(f"{tmp_path}/%d.tar", maxcount=20, verbose=0) as sink:
        for i in range(N):
            Image.new("RGB", (9, 8), (i, 2 * i, 3 * i)).save(packed := io.BytesIO(), "PNG")
            sink.write({"__key__": f"s{i:07d}", "png": packed.getvalue(), "cls": i % 2})
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    data = datasets.load(f"webdataset:{tmp_path}/{{0..3}}.tar")
    assert len(data.tar_starts) == 4
    assert spread(tmp_path / "ray", data) == local(tmp_path / "local", data)


def test_unreadable_pictures_are_reported_as_they_are_locally(tmp_path, cluster):
    bad = FakeDataset(N, unreadable=(3, 40))
    with pytest.raises(ValueError, match=r"picture 3 |picture 40 "):
        spread(tmp_path / "ray", bad)
    with pytest.warns(UserWarning, match="2 pictures cannot be read"):
        held = bank.build(bad, FakeEncoder(), PLAN, tmp_path / "ray", "ray", on_error="skip", shard=SHARD)
    with pytest.warns(UserWarning, match="2 pictures cannot be read"):
        alone = bank.build(bad, FakeEncoder(), PLAN, tmp_path / "local", on_error="skip", shard=SHARD)
    assert contents(Path(held.folder.path)) == contents(Path(alone.folder.path))


def test_progress_reaches_the_drivers_bar(tmp_path, cluster, capfd):
    spread(tmp_path, FakeDataset(N), progress=True)
    assert f"{N * PLAN.n}/{N * PLAN.n}" in capfd.readouterr().err


def test_a_root_that_is_not_shared_is_an_error(tmp_path, cluster):
    with pytest.raises(BankError, match="every machine of the cluster shares"):
        spread(f"memory://{tmp_path}", FakeDataset(N))


class Moving(FakeEncoder):
    """Leaves in a folder where it was moved to and in which process; computes on the CPU all the same."""

    folder = None

    def to(self, device):
        (Path(self.folder) / f"{device}-{os.getpid()}").touch()
        moved = Moving()
        moved.folder, moved.device = self.folder, torch.device(device)
        return moved


class Counted(FakeDataset):
    """Leaves the number of the process that loads from it in a folder."""

    folder = None

    def load(self, i):
        (Path(self.folder) / f"decoder-{os.getpid()}").touch()
        return super().load(i)


def test_an_actor_with_a_gpu_moves_the_encoder_there_and_keeps_its_decoders(tmp_path, cluster):
    folder = tmp_path / "seen"
    folder.mkdir()
    dataset, encoder = Counted(N), Moving()
    dataset.folder, encoder.folder, encoder.device = str(folder), str(folder), torch.device("cuda")
    held = bank.build(dataset, encoder, PLAN, tmp_path / "ray", "ray", shard=SHARD, gpus=0.5)
    assert contents(Path(held.folder.path)) == local(tmp_path / "local")
    seen = [path.name.rsplit("-", 1) for path in folder.iterdir()]
    moves = sorted((where, int(pid) == os.getpid()) for where, pid in seen if where != "decoder")
    # here to main memory, so that nothing on a GPU goes through the object store; then two halves of the GPU
    assert moves in ([("cpu", True), *[("cuda", False)] * n] for n in (1, 2))  # one may be done before the other starts
    decoders = {pid for where, pid in seen if where == "decoder"}
    assert decoders
    assert decoders <= {pid for where, pid in seen if where == "cuda"}  # threads of the actors


def test_an_encoder_on_a_gpu_without_gpus_is_an_error(tmp_path, cluster):
    encoder = Moving()
    encoder.device = torch.device("cuda")
    with pytest.raises(ValueError, match=r"encoder is on cuda but gpus is 0.*gpus=1, or load .*device='cpu'"):
        bank.build(FakeDataset(N), encoder, PLAN, tmp_path, "ray", shard=SHARD)


def test_what_ray_itself_raises_is_an_error_of_the_bank(tmp_path, cluster, monkeypatch):
    def full(_):
        raise ray.exceptions.ObjectStoreFullError("the object store is full")

    monkeypatch.setattr(ray, "put", full)
    with pytest.raises(BankError, match=r"Ray failed.*the object store is full"):
        spread(tmp_path, FakeDataset(N))


def test_more_than_the_cluster_has(tmp_path, cluster):
    with pytest.raises(ValueError, match=r"no machine of the Ray cluster has 1 processors and 1\.5 GPUs"):
        spread(tmp_path, FakeDataset(N), gpus=1.5)


def test_no_cluster_at_the_address(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def refuse(**_):
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConnectionError, match=r"no Ray cluster at 'nowhere:1'.*ray start --head"):
        spread(tmp_path, FakeDataset(N), address="nowhere:1")


def test_without_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"upclose\[cluster\]"):
        spread(tmp_path, FakeDataset(N))
