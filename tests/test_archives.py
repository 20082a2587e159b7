"""Data sets from their archives: what the table says, miniature archives from a server of this machine, bad input."""

import hashlib
import io
import json
import re
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import scipy.io
import torch
from filelock import FileLock
from torchvision.datasets import imagenet

import trees
from servers import serving
from upclose import cli, datasets, doctor, fetch, paths
from upclose.datasets import archives, registry

pytestmark = pytest.mark.filterwarnings("ignore::upclose.datasets.CountWarning")
ENTRIES = registry.entries()
PACKED = [key for key, entry in ENTRIES.items() if archives.of(entry) and key[0] != "imagenet"]
PREFIX = {  # of the data set's files in its archives, where there is one
    "CUB_200_2011.tgz": "CUB_200_2011/",
    "dtd-r1.0.1.tar.gz": "dtd/",
    "food-101.tar.gz": "food-101/",
    "imagenetv2-matched-frequency.tar.gz": "imagenetv2-matched-frequency-format-val/",
    "imagenet-r.tar": "imagenet-r/",
    "imagenet-sketch.zip": "sketch/",
    "ImageNet-Sketch.zip": "sketch/",
    "imagenet-a.tar": "imagenet-a/",
    "fgvc-aircraft-2013b.tar.gz": "fgvc-aircraft-2013b/data/",
    "cifar-100-binary.tar.gz": "cifar-100-binary/",
}


def key(pair):
    return "-".join(pair)


@pytest.fixture(autouse=True)
def empty_machine(tmp_path, monkeypatch):
    for name in ("CACHE", "DATA"):
        monkeypatch.setenv(f"UPCLOSE_{name}", str(tmp_path / name.lower()))


# ----------------------------------------------------------------------------------------------------------- the table


def test_every_data_set_has_archives_or_says_what_to_do():
    for entry in ENTRIES.values():
        assert bool(archives.of(entry)) != bool(entry.get), entry
    assert {key[0] for key, entry in ENTRIES.items() if entry.get} == {
        *("caltech101", "eurosat", "sun397", "resisc45", "aid", "cub-painting")
    }


def test_what_the_table_says_has_a_form():
    for entry in ENTRIES.values():
        found = archives.of(entry)
        assert len({archive.name for archive in found}) == len(found)
        assert len({archive.page for archive in found if not archive.url}) <= 1  # one page to go to
        for archive in found:
            assert archive.gives, archive
            assert re.fullmatch(r"(md5:[0-9a-f]{32}|sha256:[0-9a-f]{64})?", archive.digest), archive
            assert re.match("https?://", archive.url or archive.page), archive
            assert archive.bytes >= 0


def test_checksums_are_torchvisions_where_they_are_from_there():
    known = {archive.name: archive.digest for archive in archives.of(registry.entry("imagenet"))}
    for name, md5 in (imagenet.ARCHIVE_META[part] for part in ("devkit", "val")):
        assert known[name] == f"md5:{md5}"


# ------------------------------------------------------------------------------------------------ miniature archives


def pack(archive, folder):
    """An archive as its publisher packs it, with the files of a data set's folder and some others."""
    if not archive.name.endswith(archives.PACKED):
        return (folder / archive.name).read_bytes()
    prefix, files = PREFIX.get(archive.name, ""), {"README.extra": b"of the publisher"}
    for name, *_ in archive.gives:
        found = [folder / name] if (folder / name).is_file() else [p for p in (folder / name).rglob("*") if p.is_file()]
        files |= {f"{prefix}{file.relative_to(folder).as_posix()}": file.read_bytes() for file in found}
    content = packed(archive.name, files)
    if archive.name == "caltech-101.zip":
        inner = {"caltech-101/101_ObjectCategories.tar.gz": packed("x.tar.gz", files), "caltech-101/show.m": b""}
        content = packed(archive.name, inner)
    return content


def packed(name, files):
    with io.BytesIO() as file:
        if name.endswith(".zip"):
            with zipfile.ZipFile(file, "w") as to:
                for path, content in files.items():
                    to.writestr(path, content)
        else:
            gz = {"compresslevel": 1} if name.endswith("gz") else {}
            with tarfile.open(fileobj=file, mode="w:gz" if gz else "w", **gz) as to:
                for path, content in files.items():
                    info = tarfile.TarInfo(path)
                    info.size = len(content)
                    to.addfile(info, io.BytesIO(content))
        return file.getvalue()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A maker of a data set's miniature archives: on a server, or in a folder where they are got by hand."""
    with serving({}) as server:

        def publish(name, protocol=None):
            entry = registry.entry(name, protocol)
            folder = trees.make(tmp_path / "made", name, entry.protocol)
            (tmp_path / "lying").mkdir(exist_ok=True)
            table = []
            for archive in archives.of(entry):
                content = pack(archive, folder)
                if archive.url:
                    server.files[archive.name] = content
                else:
                    (tmp_path / "lying" / archive.name).write_bytes(content)
                kind = archive.digest.partition(":")[0]
                table.append(
                    archive._replace(
                        bytes=len(content) if archive.bytes else 0,
                        digest=f"{kind}:{hashlib.new(kind, content).hexdigest()}" if kind else "",
                        url=f"{server.url}/{archive.name}" if archive.url else "",
                    )
                )
            monkeypatch.setitem(archives._table(), (entry.dataset, entry.protocol), table)
            return entry

        publish.server, publish.made, publish.lying = server, tmp_path / "made", tmp_path / "lying"
        yield publish


def listed(data):
    return list(zip(data.key, data.label.tolist())), data.class_names


@pytest.mark.parametrize("pair", PACKED, ids=key)
def test_archives_become_the_data_set(published, pair):
    entry = published(*pair)
    folder = datasets.download(*pair[:1], protocol=pair[1], source=published.lying)
    assert folder == paths.data() / entry.folder
    assert archives.state(entry, paths.data()) == "here"
    assert doctor.missing_data(*pair) == ""
    for split in (s for s in registry.SPLITS if getattr(entry, s) and (pair[0], s) != ("places365", "train")):
        domain = {"domain": "all"} if entry.domains else {}
        ours, wanted = (
            listed(datasets.load(pair[0], split, root, protocol=pair[1], **domain)) for root in (None, published.made)
        )
        assert ours == wanted
    assert not (paths.data() / "archives").exists()
    assert not list(paths.data().rglob("*.part"))
    asked = len(published.server.asked)
    datasets.download(pair[0], protocol=pair[1])  # nothing is done twice
    assert len(published.server.asked) == asked


def test_imagenets_pictures_are_put_into_the_folders_of_their_classes(tmp_path, monkeypatch):
    wnids = list(registry.imagenet_classes())
    of = [7, 3, 3, 999]
    synsets = np.array(
        [(c + 1, wnid, f"name {c}", "gloss", int(c == 1000)) for c, wnid in enumerate([*wnids, "n00000000"])],
        dtype=[("ILSVRC2012_ID", int), ("WNID", object), ("words", object), ("gloss", object), ("num_children", int)],
    )
    scipy.io.savemat(meta := io.BytesIO(), {"synsets": synsets})
    truth = "".join(f"{c + 1}\n" for c in of).encode()
    data = "ILSVRC2012_devkit_t12/data"
    devkit = {f"{data}/meta.mat": meta.getvalue(), f"{data}/ILSVRC2012_validation_ground_truth.txt": truth}
    jpeg = trees._encoded(0)
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg for i in range(len(of))}
    lying = tmp_path / "lying"
    lying.mkdir()
    table = []
    for archive, part, files in zip(archives.of(registry.entry("imagenet")), ("devkit", "val"), (devkit, val)):
        content = packed(archive.name, files)
        (lying / archive.name).write_bytes(content)
        md5 = hashlib.md5(content).hexdigest()
        monkeypatch.setitem(imagenet.ARCHIVE_META, part, (archive.name, md5))
        table.append(archive._replace(bytes=len(content) if archive.bytes else 0, digest=f"md5:{md5}"))
    monkeypatch.setitem(archives._table(), ("imagenet", "official"), table)
    with pytest.raises(datasets.LackingError, match=r"ILSVRC2012_devkit_t12.tar.gz and ILSVRC2012_img_val.tar by hand"):
        datasets.download("imagenet")
    folder = datasets.download("imagenet", source=lying)
    found = {path.stem: path.parent.name for path in (folder / "val").glob("*/*.JPEG")}
    assert found == {f"ILSVRC2012_val_{i + 1:08d}": wnids[c] for i, c in enumerate(of)}
    assert sorted(path.name for path in folder.iterdir()) == ["meta.bin", "val"]
    assert sorted(path.name for path in lying.iterdir()) == sorted(archive.name for archive in table)
    assert torch.load(folder / "meta.bin", weights_only=True)[1] == [wnids[c] for c in of]


# ----------------------------------------------------------------------------------------------------------- bad input


def test_what_failed_is_named_and_the_next_call_goes_on(published, capsys):
    published("domainnet-40")
    content = published.server.files.pop("painting.zip")
    assert cli.main(["data", "get", "domainnet-40"]) == 1
    assert "painting.zip cannot be read (the server says 404 Not Found)" in capsys.readouterr().err
    folder = paths.data() / "domainnet"
    assert sorted(path.name for path in folder.iterdir()) == ["real", "sketch"]
    assert archives.state(registry.entry("domainnet-40"), paths.data()) == "in part"
    published.server.asked.clear()
    published.server.files["painting.zip"] = content
    assert cli.main(["data", "get", "domainnet-40"]) == 0
    assert capsys.readouterr().out == f"domainnet-40 (official): {folder}\n"
    assert {"real.zip", "sketch.zip"}.isdisjoint(path for path, _ in published.server.asked)


def test_a_download_that_was_killed_goes_on(published):
    published("cifar100")
    content = published.server.files["cifar-100-binary.tar.gz"]
    waiting = paths.data() / "archives" / "cifar100"
    waiting.mkdir(parents=True)
    (waiting / "cifar-100-binary.tar.gz.part").write_bytes(content[:5000])
    datasets.download("cifar100")
    assert published.server.asked == [("cifar-100-binary.tar.gz", "bytes=5000-")]


@pytest.mark.parametrize("name", ["train.tgz", "images (1).tar.gz"])
def test_an_archive_is_recognised_by_size_and_checksum(published, name):
    published("oxford-pets")
    for archive in archives.of(registry.entry("oxford-pets")):
        (published.lying / f"{archive.name[:3]} {name}").write_bytes(published.server.files.pop(archive.name))
    datasets.download("oxford-pets", source=published.lying)
    assert published.server.asked == []
    assert len(list(published.lying.iterdir())) == 2  # they stay


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"another archive", r"CUB_200_2011.tgz has 15 bytes, not [\d,]+: it is cut short"),
        (b"<html>Please log in</html>", r"CUB_200_2011.tgz is a web page and not CUB_200_2011.tgz"),
        (None, r"CUB_200_2011.tgz has the sha256 .*, not .*: it is not what was published"),
    ],
)
def test_a_wrong_archive_in_a_folder_is_named_before_work(published, capsys, content, why):
    published("cub")
    right = published.server.files["CUB_200_2011.tgz"]
    (published.lying / "CUB_200_2011.tgz").write_bytes(content or right[::-1])
    assert cli.main(["data", "get", "cub", "--from", str(published.lying)]) == 1
    assert re.search(why, capsys.readouterr().err)
    assert published.server.asked == []
    assert not list((paths.data()).glob("CUB*/*"))
    (published.lying / "kept.tgz").write_bytes(right)
    assert cli.main(["data", "get", "cub", "--from", str(published.lying)]) == 0


def test_a_web_page_in_place_of_a_split_file(published):
    entry = published("ucf101", "coop")
    published.server.files["split_zhou_UCF101.json"] = b"<!DOCTYPE html><p>Google Drive: quota exceeded"
    with pytest.raises(ValueError, match="gives a web page and no file"):
        datasets.download("ucf101", protocol="coop", source=published.lying)
    folder = paths.data() / entry.folder
    assert [path.name for path in folder.iterdir()] == ["UCF-101-midframes"]
    shutil.copy(published.made / "ucf101" / "split_zhou_UCF101.json", published.lying)  # got in a browser
    datasets.download("ucf101", protocol="coop", source=published.lying)
    assert datasets.load("ucf101", protocol="coop").class_names


def test_what_must_be_got_by_hand_is_named_and_the_rest_fetched(published, capsys):
    published("stanford-cars", "coop")
    assert cli.main(["data", "get", "stanford-cars", "--protocol", "coop"]) == 1
    assert re.search(
        r"is not complete in .*: get cars_train.tgz and cars_test.tgz by hand from https://.*, then "
        r"`upclose data get stanford-cars --protocol coop --from FOLDER` unpacks it",
        capsys.readouterr().err,
    )
    assert (paths.data() / "stanford_cars" / "split_zhou_StanfordCars.json").is_file()


def test_a_data_set_that_a_script_makes_says_so():
    with pytest.raises(datasets.LackingError, match=r"create_caltech101_data_files\.py"):
        datasets.download("caltech101")


def test_no_room_is_said_before_anything_is_asked(published, monkeypatch):
    published("dtd")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"dtd-r1.0.1.tar.gz, packed and unpacked, needs [\d,]+ bytes and .* has 10 free"):
        datasets.download("dtd")
    assert published.server.asked == []


def test_two_processes_do_not_write_the_same(published):
    published("dtd")
    waiting = paths.data() / archives.DOWNLOADS / "dtd"
    waiting.mkdir(parents=True)  # by the other process, which is about to write there
    with FileLock(paths.data() / ".get.lock"), pytest.raises(OSError, match="another process gets data sets into"):
        datasets.download("dtd")
    assert waiting.is_dir()


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (["get", "dtd", "cubb"], "no data set 'cubb'; did you mean 'cub'?"),
        (["get"], "name data sets or a --table, one of both"),
        (["get", "dtd", "--table", "lgca-table1"], "name data sets or a --table, one of both"),
        (["get", "--table", "lgca-table9"], "no published table 'lgca-table9'"),
        (["get", "dtd", "--protocol", "vissl"], "dtd has no protocol 'vissl'; there are official, coop"),
        (["verify", "imagefolder:birds"], "nothing to get or to check of imagefolder:birds"),
        (["where", "birdlets"], "nothing to get or to check of birdlets"),
    ],
)
def test_names_are_checked_before_anything_is_done(monkeypatch, capsys, call, why):
    monkeypatch.setattr(datasets, "download", None)
    assert cli.main(["data", *call]) == 2
    assert why in capsys.readouterr().err


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert cli.main(["data", "get", "dtd", "--from", str(tmp_path / "no")]) == 1
    assert "there is no such folder" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("table", ["lgca-table1", "params/papers/lgca-table1.yaml"])
def test_the_data_sets_of_a_table(monkeypatch, table):
    got = []
    monkeypatch.setattr(datasets, "download", lambda *given: got.append(given))
    assert cli.main(["data", "get", "--table", table]) == 0
    wanted = {"oxford-pets", "cub", "dtd", "food101", "places365"}
    assert {(name, protocol) for name, _, protocol, _ in got} == {(name, "official") for name in wanted}
    assert len(got) == 5


def test_ls_has_a_line_for_each_and_says_what_is_not_known(capsys):
    trees.make(paths.data(), "dtd")
    assert cli.main(["data", "ls"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(ENTRIES)
    lines = {line.split("  ")[0]: line for line in said}
    assert re.search(r"here +596.3 MiB; research; https://.*dtd/; .*/dtd/dtd$", lines["dtd (official)"])
    assert "missing  755.2 MiB and 1 of unknown size; no published checksum: split_zhou" in lines["oxford-pets (coop)"]
    assert "by hand: UCF-101-midframes.zip; no published checksum: UCF" in lines["ucf101 (official)"]


def test_where_says_folder_archives_and_what_to_do(capsys):
    assert cli.main(["data", "where", "ucf101"]) == 0
    said = capsys.readouterr().out
    assert f"ucf101 (official): missing, {paths.data() / 'ucf101'}\n" in said
    assert "UCF-101-midframes.zip: missing, size not published, checksum not published\n    by hand from https" in said
    assert "113,943 bytes, sha256:5c0d1a53" in said
    assert "`upclose data get ucf101 --from FOLDER` unpacks it and fetches the rest" in said


def test_verify_reads_every_picture_and_counts(capsys):
    folder = trees.make(paths.data(), "oxford-pets")
    assert cli.main(["data", "verify", "oxford-pets", "--split", "test"]) == 1
    assert capsys.readouterr().out == "oxford-pets (official) test: 37 pictures, not 3,669\n"
    broken = folder / "images" / "breed_00_100.jpg"
    broken.write_bytes(b"no picture")
    (folder / "images" / "breed_02_0.jpg").unlink()
    assert cli.main(["data", "verify", "oxford-pets"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert "1 of 37 listed pictures are not there" in said[0]
    assert "3,669" in said[1]
    assert "breed_00_100.jpg" in said[2]


def test_verify_says_sound(monkeypatch, capsys):
    trees.make(paths.data(), "dtd")
    small = registry.entry("dtd")._replace(train=94, test=47)
    monkeypatch.setitem(registry.entries(), ("dtd", "official"), small)
    assert cli.main(["data", "verify", "dtd"]) == 0
    assert capsys.readouterr().out == "dtd (official): sound\n"


def test_what_is_missing_says_which_line_gets_it():
    with pytest.raises(
        FileNotFoundError,
        match=r"`upclose data get dtd --protocol coop` gets dtd-r1.0.1.tar.gz and 1 more, or set UPCLOSE_DATA",
    ):
        datasets.load("dtd", protocol="coop")
    folder = trees.make(paths.data(), "dtd", "coop")
    (folder / "split_zhou_DescribableTextures.json").write_text(json.dumps({"test": [["a/b.jpg", 0, "a"]]}))
    with pytest.raises(ValueError, match="puts there is there: remove it and get it again"):
        datasets.load("dtd", protocol="coop")
    assert fetch.total([]) == "nothing"
