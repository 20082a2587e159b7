"""Downloads that go on where they stopped, and archives that are distrusted, against a server of this machine."""

import hashlib
import io
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servers import serving
from upclose import fetch

CONTENT = bytes(range(256)) * 1000
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
PAGE = b"\n<!DOCTYPE html><html><body>Quota exceeded</body></html>"


@pytest.fixture
def server():
    with serving({"a.bin": CONTENT}) as running:
        yield running


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(fetch.time, "sleep", lambda _: None)


def get(server, folder, name="a.bin", size=256_000, digest=SHA256):
    return fetch.download(f"{server.url}/{name}", folder / "a.bin", size, digest)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ------------------------------------------------------------------------------------------------------------ downloads


@pytest.mark.parametrize(("size", "digest"), [(len(CONTENT), SHA256), (0, MD5), (len(CONTENT), ""), (0, "")])
def test_a_file_is_read_whole_and_not_twice(server, tmp_path, size, digest):
    for _ in range(2):
        assert get(server, tmp_path / "new", size=size, digest=digest).read_bytes() == CONTENT
    assert names(tmp_path / "new") == ["a.bin"]
    assert server.asked == [("a.bin", None)]


@pytest.mark.parametrize("size", [len(CONTENT), 0])
def test_a_download_goes_on_where_it_stopped(server, tmp_path, size):
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:1000])
    assert get(server, tmp_path, size=size).read_bytes() == CONTENT
    assert server.asked == [("a.bin", "bytes=1000-")]
    assert names(tmp_path) == ["a.bin"]


def test_a_server_that_hangs_up_is_asked_for_the_rest(server, tmp_path):
    server.stop = 100_000
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, "bytes=100000-", "bytes=200000-"]


def test_what_was_read_is_kept_when_a_server_gives_no_more(server, tmp_path):
    server.stop = 100_000
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:1000])
    del server.files["a.bin"]
    with pytest.raises(ConnectionError, match=r"404 Not Found.*1,000 bytes are kept, and the next call goes on"):
        get(server, tmp_path)
    assert names(tmp_path) == ["a.bin.part"]
    server.files["a.bin"] = CONTENT
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_without_a_checksum_nothing_is_joined(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"of another version")
    assert get(server, tmp_path, digest="").read_bytes() == CONTENT
    assert server.asked == [("a.bin", None)]
    server.stop = 10
    with pytest.raises(ConnectionError, match=r"stopped after 10 of 256,000 bytes\)$"):
        get(server, tmp_path / "again", digest="")


def test_a_server_that_ignores_ranges_begins_anew(server, tmp_path):
    server.ranges = False
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:1000])
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_redirect_keeps_the_range(server, tmp_path):
    server.moved["old.bin"] = "a.bin"
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:1000])
    assert get(server, tmp_path, "old.bin").read_bytes() == CONTENT
    assert server.asked == [("old.bin", "bytes=1000-"), ("a.bin", "bytes=1000-")]


@pytest.mark.parametrize("size", [len(CONTENT), 0])
@pytest.mark.parametrize("extra", [b"", b"more"])
def test_a_whole_or_longer_part_is_checked(server, tmp_path, size, extra):
    (tmp_path / "a.bin.part").write_bytes(CONTENT + extra)
    if size and extra:
        with pytest.raises(ValueError, match="256,004 bytes, not 256,000: it is another file; it was removed"):
            get(server, tmp_path)
    assert get(server, tmp_path, size=size).read_bytes() == CONTENT


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize(("size", "digest"), [(0, ""), (0, SHA256), (len(PAGE), "")])
def test_a_web_page_is_no_file(server, tmp_path, said, size, digest):
    server.files["a.bin"] = PAGE
    server.pages |= {"a.bin"} if said else set()
    with pytest.raises(ValueError, match="gives a web page and no file"):
        get(server, tmp_path, size=size, digest=digest)
    assert not (tmp_path / "a.bin").exists()


def test_another_size_is_said_before_it_is_read(server, tmp_path):
    with pytest.raises(ValueError, match="gives 256,000 bytes, not the 1,000 that were published"):
        get(server, tmp_path, size=1000)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_another_checksum_leaves_nothing_and_the_next_call_goes_on(server, tmp_path, kind):
    server.files["a.bin"] = CONTENT[::-1]
    with pytest.raises(ValueError, match=f"has the {kind} .* it is not what was published; it was removed"):
        get(server, tmp_path, digest=MD5 if kind == "md5" else SHA256)
    assert names(tmp_path) == []
    server.files["a.bin"] = CONTENT
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_no_network_is_said_at_once(tmp_path):
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9/a.bin cannot be read \(.*refused\)$"):
        fetch.download("http://127.0.0.1:9/a.bin", tmp_path / "a.bin", 1, SHA256)


def full(monkeypatch, free):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free, 0, free))


def test_no_room_is_said_before_anything_is_read(server, tmp_path, monkeypatch):
    full(monkeypatch, 999)
    with pytest.raises(OSError, match=r"a.bin.part needs 256,000 bytes and .* has 999 free"):
        get(server, tmp_path)
    assert names(tmp_path) == []


def test_a_file_that_is_there_is_checked(server, tmp_path):
    (tmp_path / "a.bin").write_bytes(CONTENT[:1000])
    with pytest.raises(ValueError, match="has 1,000 bytes, not 256,000: it is cut short"):
        get(server, tmp_path)
    (tmp_path / "a.bin").write_bytes(PAGE)
    with pytest.raises(ValueError, match=r"is a web page and not a.bin"):
        get(server, tmp_path)


# ------------------------------------------------------------------------------------------------------------- archives


def tarred(file, members, mode="w:gz"):
    """A tar of {name: bytes, None for a folder, or a tarfile.TarInfo}."""
    with tarfile.open(file, mode) as packed:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, bytes):
                info.size = len(content)
            packed.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return file


def zipped(file, members):
    with zipfile.ZipFile(file, "w") as packed:
        for name, content in members.items():
            packed.writestr(name if content is not None else f"{name}/", content or b"")
    return file


TREE = {"set": None, "./set/images/a/1.jpg": b"one", "set/images/b/2.jpg": b"two", "set/list.txt": b"a b", "extra": b""}


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tgz", "zip"])
def test_only_what_is_wanted_is_unpacked(tmp_path, kind):
    make = zipped if kind == "zip" else tarred
    archive = make(tmp_path / f"x.{kind}", TREE, **({"mode": "w"} if kind == "tar" else {}))
    fetch.unpack(archive, tmp_path / "data" / "set", ["images", "list.txt"], inside="set")
    assert names(tmp_path / "data") == sorted(
        [
            "set",
            "set/images",
            "set/images/a",
            "set/images/a/1.jpg",
            "set/images/b",
            "set/images/b/2.jpg",
            "set/list.txt",
        ]
    )
    assert (tmp_path / "data/set/images/b/2.jpg").read_bytes() == b"two"


def test_a_folder_may_be_wanted_as_a_whole(tmp_path):
    archive = tarred(tmp_path / "x.tar", TREE, "w")
    (tmp_path / "data" / "named").mkdir(parents=True)
    fetch.unpack(archive, tmp_path / "data" / "named", ["."], inside="set/images")
    assert names(tmp_path / "data") == ["named", "named/a", "named/a/1.jpg", "named/b", "named/b/2.jpg"]


def test_an_archive_in_an_archive(tmp_path):
    inner = tarred(tmp_path / "in.tar.gz", TREE)
    archive = zipped(tmp_path / "x.zip", {"top/in.tar.gz": inner.read_bytes(), "top/other": b""})
    fetch.unpack(archive, tmp_path / "data", ["list.txt"], inside="set", inner="top/in.tar.gz")
    assert names(tmp_path / "data") == ["list.txt"]


def test_what_is_there_stays(tmp_path):
    archive = tarred(tmp_path / "x.tgz", TREE)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "list.txt").write_text("mine")
    fetch.unpack(archive, tmp_path / "data", ["images", "list.txt"], inside="set")
    assert (tmp_path / "data" / "list.txt").read_text() == "mine"
    assert (tmp_path / "data" / "images").is_dir()


@given(
    members=st.dictionaries(
        st.lists(st.sampled_from(["..", ".", "a", "b", ""]), max_size=4).map("/".join), st.just(b"x")
    )
)
def test_no_name_of_a_member_leads_out_of_the_folder(members):
    with tempfile.TemporaryDirectory() as place:
        archive = tarred(Path(place) / "x.tar", members, "w")
        with suppress(ValueError, OSError):
            fetch.unpack(archive, Path(place) / "data" / "set", ["a"])
        assert {name for name in names(Path(place)) if not name.startswith("data/set/a")} <= {
            "x.tar",
            "data",
            "data/set",
        }
        assert not any("unpacking" in name for name in names(Path(place)))


def link(kind, target="/etc/passwd"):
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("/images/x", b"", "would be written outside"),
        ("images/../../x", b"", "would be written outside"),
        ("images\\..\\x", b"", "would be written outside"),
        ("images/x", link(tarfile.SYMTYPE), "is a link"),
        ("images/x", link(tarfile.LNKTYPE, "images/1.jpg"), "is a link"),
        ("images/x", link(tarfile.CHRTYPE), "is a device"),
        ("images/x", link(tarfile.FIFOTYPE), "is a device"),
    ],
)
def test_a_tar_with_a_malicious_member_is_refused_as_a_whole(tmp_path, name, content, why):
    (tmp_path / "in").mkdir()
    archive = tarred(tmp_path / "in" / "x.tar.gz", {"images/1.jpg": b"good", name: content})
    with pytest.raises(ValueError, match=f"x.tar.gz is not safe: .* {why}.*nothing is unpacked"):
        fetch.unpack(archive, tmp_path / "data" / "set", ["images"])
    assert names(tmp_path) == ["data", "in", "in/x.tar.gz"]


@pytest.mark.parametrize("name", ["/x", "images/../../x", "link"])
def test_a_zip_with_a_malicious_member_is_refused_as_a_whole(tmp_path, name):
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "x.zip", "w") as packed:
        packed.writestr("images/1.jpg", b"good")
        info = zipfile.ZipInfo(name)
        info.external_attr = (stat.S_IFLNK if name == "link" else stat.S_IFREG) << 16
        packed.writestr(info, b"/etc/passwd")
    with pytest.raises(ValueError, match=r"x.zip is not safe"):
        fetch.unpack(tmp_path / "in" / "x.zip", tmp_path / "data" / "set", ["images"])
    assert names(tmp_path) == ["data", "in", "in/x.zip"]


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
@pytest.mark.parametrize("share", [0, 0.5, 0.9])
def test_a_damaged_archive_leaves_nothing(tmp_path, kind, share):
    whole = {f"images/{i}.jpg": bytes([i]) * 5000 for i in range(20)}
    make = zipped if kind == "zip" else tarred
    archive = make(tmp_path / f"x.{kind}", whole, **({"mode": "w"} if kind == "tar" else {}))
    archive.write_bytes(archive.read_bytes()[: int(share * archive.stat().st_size)])
    with pytest.raises(ValueError, match=r"cannot be unpacked \(.*\): it is cut short, or no tar or zip"):
        fetch.unpack(archive, tmp_path / "data" / "set", ["images"])
    assert names(tmp_path / "data") == []


def test_a_wrong_archive_is_named(tmp_path):
    archive = tarred(tmp_path / "x.tgz", TREE)
    with pytest.raises(ValueError, match=r"x.tgz holds no 'set/pictures': it is another archive"):
        fetch.unpack(archive, tmp_path / "data" / "set", ["images", "pictures"], inside="set")
    assert names(tmp_path / "data") == []


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_no_room_for_what_is_unpacked(tmp_path, monkeypatch, kind):
    archive = (zipped if kind == "zip" else tarred)(tmp_path / f"x.{kind}", {"images/1.jpg": bytes(100_000)})
    full(monkeypatch, 50)
    with pytest.raises(OSError, match=rf"what x.{kind} holds needs [\d,]+ bytes and .* has 50 free"):
        fetch.unpack(archive, tmp_path / "data" / "set", ["images"])
    assert names(tmp_path / "data") == []


def test_what_a_killed_call_left_goes(tmp_path):
    archive = tarred(tmp_path / "x.tgz", TREE)
    (tmp_path / "data" / ".set.unpacking" / "parts").mkdir(parents=True)
    fetch.unpack(archive, tmp_path / "data" / "set", ["list.txt"], inside="set")
    assert names(tmp_path / "data") == ["set", "set/list.txt"]


def test_a_disk_that_becomes_full_has_a_name(tmp_path, monkeypatch):
    archive = tarred(tmp_path / "x.tgz", TREE)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*\.set\.unpacking'"):
        fetch.unpack(archive, tmp_path / "data" / "set", ["images"], inside="set")
    assert names(tmp_path / "data") == []
