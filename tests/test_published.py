"""Published weights: pinned, listed, fetched from a hub on this machine by the hub's own client, taken from files."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import open_clip
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from test_encode import VISION, clip, encoder_of, openai_layout, registry
from test_layouts import as_transformers
from upclose import cli, compare, doctor, encode, params
from upclose.encode import published, sources

__all__ = ["registry"]  # a fixture

REVISION = "a" * 40
NAME = "small-quickgelu:quick"
FILE = "open_clip_model.safetensors"


@pytest.fixture
def model():
    return clip(7, quick_gelu=True)


@pytest.fixture
def content(tmp_path, model):
    save_file(model.state_dict(), tmp_path / "source.safetensors")
    return (tmp_path / "source.safetensors").read_bytes()


@pytest.fixture(autouse=True)
def here(registry, monkeypatch, content):
    """An empty machine on which one of the papers' weights is small."""
    pin = published.Pin("small-quickgelu", "quick", "nobody/quick", FILE, REVISION, len(content), sha(content), "MIT")
    monkeypatch.setenv("UPCLOSE_CACHE", str(registry / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(registry / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(published, "pins", lambda: {("small-quickgelu", "quick"): pin})
    sources._away.cache_clear()
    yield pin
    sources._away.cache_clear()


@pytest.fixture
def hub(monkeypatch, content):
    """A hub that holds the file at one revision; `code` is the error it answers with, `asked` what it was asked."""
    state = SimpleNamespace(content=content, code="", asked=[])
    status = {"RepoNotFound": 401, "GatedRepo": 403, "RevisionNotFound": 404, "EntryNotFound": 404}

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            state.asked.append(self.path)
            known = self.path in ("/", f"/nobody/quick/resolve/{REVISION}/{FILE}")
            code = "" if self.path == "/" else state.code or ("" if known else "EntryNotFound")
            self.send_response(status.get(code, 200))
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("ETag", f'"{sha(state.content)}"')
            self.send_header("Content-Length", "0" if code else str(len(state.content)))
            self.end_headers()
            return code

        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            if not self.answer():
                self.wfile.write(state.content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", state.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", state.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield state
    server.shutdown()
    server.server_close()


def sha(content):
    return hashlib.sha256(content).hexdigest()


def get(*arguments):
    return cli.main(["weights", "get", *map(str, arguments)])


def line(name):
    return next(row for row in published.rows() if row["weights"] == name)


# what is pinned


def test_every_backbone_of_the_tables_is_listed_and_no_other(monkeypatch):
    monkeypatch.undo()
    used = {(v["backbone"], v["pretrained"]) for sheet in doctor.sheets().values() for _, v in params.cells(sheet)}
    assert used == {*published.pins()} == {(line.name, line.pretrained) for line in compare.backbones().itertuples()}
    for (name, tag), pin in published.pins().items():
        facts = open_clip.get_pretrained_cfg(name, tag)
        assert pin.hub == facts["hf_hub"].rstrip("/")
        assert pin.licence
        assert bool(pin.revision) == bool(pin.sha256) == bool(pin.bytes) == bool(pin.file)
        if pin.revision:
            assert (len(pin.revision), len(pin.sha256)) == (40, 64)
            with torch.device("meta"):
                model = open_clip.create_model(name, device="meta", pretrained_text=False)
            numbers = sum(weight.nbytes for weight in model.state_dict().values())
            assert abs(pin.bytes - numbers) < 1e-3 * numbers, "the size is not that of float32 weights"
    assert [pin.tag for pin in published.pins().values() if not pin.revision] == ["metaclip_400m"]


def test_names_are_written_with_or_without_a_tag(monkeypatch):
    assert published.parse("small-quickgelu") == published.parse(NAME) == ("small-quickgelu", "quick")
    assert published.parse("small:gelu") == ("small", "gelu")  # no table uses it
    for wrong in ("small", "small:none", "medium:quick"):
        with pytest.raises(ValueError, match=rf"{wrong!r} is not the name .*as small-quickgelu:quick"):
            published.parse(wrong)


# from the hub


def test_get_fetches_the_pinned_revision_once(hub, registry, model, capsys):
    assert line(NAME) | {"where": ""} == {
        "weights": NAME,
        "here": "no",
        "MiB": "1",
        "licence": "MIT",
        "revision": "a" * 12,
        "where": "",
    }
    assert line(NAME)["where"] == f"{hub.url}/nobody/quick"
    assert get(NAME) == 0
    said = capsys.readouterr().out
    assert f"sha256 {sha(hub.content)} (the published file)" in said
    assert f"fingerprint {encoder_of(model).fingerprint}" in said
    assert any(REVISION in path for path in hub.asked)
    assert not any("/main/" in path for path in hub.asked)
    hub.asked.clear()
    assert get("small-quickgelu") == 0
    assert encode.load("small-quickgelu", "quick", "cpu").fingerprint == encoder_of(model).fingerprint
    assert hub.asked == []
    assert (line(NAME)["here"], line(NAME)["where"]) == ("yes", published.cached("small-quickgelu", "quick"))
    assert doctor.missing_weights("small-quickgelu", "quick") == ""
    assert encode.identity("small-quickgelu", "quick") == NAME


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("GatedRepo", "it is gated: agree to its terms on its page, then `hf auth login`"),
        ("RepoNotFound", "there is no such repository, or it is private"),
        ("RevisionNotFound", "the repository has no such revision"),
        ("EntryNotFound", "the repository has no such file"),
    ],
)
def test_why_the_hub_gives_nothing_is_one_sentence(hub, monkeypatch, capsys, code, message):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("a model was built"))
    hub.code = code
    assert get(NAME) == 2
    error = capsys.readouterr().err
    assert f"not be downloaded from nobody/quick at revision aaaaaaaaaaaa ({message}" in error
    assert error.count("\n") == 1
    monkeypatch.undo()


@pytest.mark.parametrize(("code", "message"), [("GatedRepo", "it is gated"), ("RepoNotFound", "there is no such")])
def test_a_model_of_the_hub_that_is_not_given_is_one_sentence(hub, code, message):
    hub.code = code
    with pytest.raises(ConnectionError, match=rf"'hf-hub:nobody/closed' cannot be built \({message}") as error:
        encode.load("hf-hub:nobody/closed", device="cpu")
    assert "\n" not in str(error.value)


def test_no_network_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert get(NAME) == 2
    error = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set" in error
    assert "upclose weights get small-quickgelu:quick --from FILE" in error
    assert error.count("\n") == 1


def test_a_hub_that_gives_another_file_is_not_believed(hub, capsys):
    hub.content = b"<html>an error</html>"
    assert get(NAME) == 2
    assert "is not what was downloaded" in capsys.readouterr().err


def test_what_is_in_the_hubs_cache_and_in_no_table_is_listed(hub, registry, content):
    assert [row["weights"] for row in published.rows()] == [NAME]
    folder = registry / "hub" / "models--nobody--gelu"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("b" * 40)
    (folder / "snapshots" / ("b" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("b" * 40) / FILE).write_bytes(content)
    other = line("small:gelu")
    assert (other["here"], other["licence"], other["revision"]) == ("yes", "not known", "not pinned")
    assert doctor.missing_weights("small", "gelu") == ""


# from a file


@pytest.mark.parametrize("layout", ["published", "openai", "transformers", "half"])
def test_a_file_is_kept_once_it_has_loaded(registry, model, content, layout, capsys):
    file = registry / ("mine.pt" if layout == "openai" else "mine.safetensors")
    if layout == "published":
        file.write_bytes(content)
    elif layout == "openai":
        torch.save(openai_layout(model), file)
    elif layout == "transformers":
        save_file(as_transformers(model), file)
    else:
        model.load_state_dict({key: value.half() for key, value in model.state_dict().items()})
        save_file({key: value.half() for key, value in model.state_dict().items()}, file)
    assert get(NAME, "--from", file) == 0
    said, digest = capsys.readouterr().out, sha(file.read_bytes())
    assert f"sha256 {digest} ({'the published file' if layout == 'published' else 'taken at your word'})" in said
    file.unlink()
    encoder = encode.load("small-quickgelu", "quick", "cpu")
    assert encoder.fingerprint == encoder_of(model).fingerprint
    assert encoder.fingerprint in said
    assert line(NAME)["here"] == "given"
    assert doctor.missing_weights("small-quickgelu", "quick") == ""
    assert encode.identity("small-quickgelu", "quick") == NAME + ("" if layout == "published" else f" from {digest}")


def test_the_last_file_given_counts_and_is_believed_with_its_checksum(registry, model):
    for seed in (1, 2):
        save_file(clip(seed).state_dict(), registry / "mine.safetensors")
        assert get(NAME, "--from", registry / "mine.safetensors") == 0
        assert (
            encode.load("small-quickgelu", "quick", "cpu").fingerprint
            == encoder_of(clip(seed, quick_gelu=True)).fingerprint
        )
    kept = published.kept("small-quickgelu", "quick")
    assert [*kept.parent.iterdir()] == [kept]
    changed = bytearray(kept.read_bytes())
    changed[-1] ^= 1
    kept.write_bytes(changed)
    with pytest.raises(ValueError, match="is not what was downloaded: its sha256 is not"):
        encode.load("small-quickgelu", "quick", "cpu")


def test_what_does_not_load_is_not_kept(registry, content, capsys):
    wide = clip(vision_cfg={**VISION, "width": 128})
    save_file(wide.state_dict(), registry / "wide.safetensors")
    (registry / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (registry / "page.safetensors").write_text("<html>log in</html>")
    (registry / "model.safetensors.index.json").write_text("{}")
    for file, said in (
        ("wide.safetensors", "does not fit 'small-quickgelu' (visual."),
        ("cut.safetensors", "it is cut short"),
        ("page.safetensors", "is a web page"),
        ("model.safetensors.index.json", "give one that holds all tensors"),
        ("none.safetensors", "there is no checkpoint"),
    ):
        assert get(NAME, "--from", registry / file) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert published.kept("small-quickgelu", "quick") is None
    assert get("small:quick", "--from", registry / "cut.safetensors") == 2
    assert "was trained with QuickGELU" in capsys.readouterr().err
    assert get(NAME, "small:gelu", "--from", registry / "cut.safetensors") == 2
    assert "name one of the weights" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_behind(registry, content, monkeypatch, capsys):
    (registry / "mine.safetensors").write_bytes(content)

    def full(source, target):
        target.write_bytes(b"some")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(published.shutil, "copyfile", full)
    assert get(NAME, "--from", registry / "mine.safetensors") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [*(registry / "cache" / "weights").rglob("*.*")] == []
    assert published.kept("small-quickgelu", "quick") is None


def test_ls_is_a_table(capsys):
    assert cli.main(["weights", "ls"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["weights", "here", "MiB", "licence", "revision", "where"]
    assert row.split()[:5] == [NAME, "no", "1", "MIT", "a" * 12]


def test_sizes_of_weights_are_summed_up(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(published, "cached", lambda *_: None)
    sheet = doctor.sheets()["lgca-table1"]
    found = {
        n.name: n.bytes
        for n in doctor.needs(sheet.notebook, (v for _, v in params.cells(sheet)))
        if n.kind == "weights"
    }
    assert found == {"ViT-B/32": 605_143_284, "ViT-B/16": 598_516_980}
