import hashlib
import shutil

import pytest

from upclose import paths, shipped


def test_every_shipped_file_is_listed_and_is_what_was_shipped():
    before = shipped.LIST.read_bytes()
    there = {line.split("  ")[1] for line in before.decode().splitlines()}
    found = [*paths.PUBLISHED.iterdir(), *paths.WEIGHTS.iterdir(), *shipped.PACKAGE.glob("birdlets/prompts/*")]
    assert there == {f.relative_to(shipped.PACKAGE).as_posix() for f in found if f.suffix not in (".md", "")}
    for name in there:
        assert shipped.checked(shipped.PACKAGE / name) == shipped.PACKAGE / name, (
            "write the list: python -m upclose.shipped"
        )


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with three shipped files."""
    for name in ("weights/tiny.json", "published/a.csv", "birdlets/prompts/b.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path)
    monkeypatch.setattr(shipped, "LIST", tmp_path / "shipped.sha256")
    shipped.write()
    return tmp_path


def test_a_shipped_file_that_was_altered_is_named(package):
    file = package / "published" / "a.csv"
    file.write_text("{ ")
    with pytest.raises(ValueError, match=r"a\.csv is not what was shipped"):
        shipped.checked(file)
    (package / "published" / "new.csv").write_text("")
    with pytest.raises(ValueError, match=r"new\.csv is not what was shipped"):
        shipped.checked(package / "published" / "new.csv")
    shipped.write()
    assert shipped.checked(file) == file
    assert f"{hashlib.sha256(b'{ ').hexdigest()}  published/a.csv" in shipped.LIST.read_text().splitlines()


def test_files_of_ones_own_are_not_asked_about(package, tmp_path_factory):
    own = tmp_path_factory.mktemp("own") / "a.csv"
    shutil.copy(package / "published" / "a.csv", own)
    own.write_text("altered")
    assert shipped.checked(own) == own
