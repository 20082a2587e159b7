import hashlib
import json
import os
import warnings
from pathlib import Path

import pytest

from upclose import birdlets, paths, prompts
from upclose.birdlets import held_out
from upclose.datasets import registry

SHARED = Path(os.environ.get("UPCLOSE_SHARED", paths.ROOT.parent / "shared")) / "prompts"
NAMES = ["Black footed Albatross", "mew", "crane"]
FOUND = {"Black-footed Albatross": ["a seabird"], "mew": ["long legs", "can fly"], "crane": ["used in zoos"]}


def kinds(checked):
    return {finding.kind for finding in checked.findings}


def given(tmp_path, content):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


@pytest.mark.parametrize("source", prompts.SOURCES)
def test_birdlets_have_sentences_of_every_source_without_a_repair_that_loses_a_class(source):
    names = [bird.name for bird in held_out()["test"]]
    sentences = prompts.examine(source, "birdlets", "test", names).sentences
    assert list(sentences) == names
    assert all(sentences.values())


def test_sound_sentences_have_no_findings():
    assert prompts.lint({"a": ["x"], "b": ["y"]}, ["a", "b"]) == ({"a": ["x"], "b": ["y"]}, [])


def test_other_spelling_is_renamed_and_recorded():
    checked = prompts.lint(FOUND, NAMES)
    assert checked.sentences["Black footed Albatross"] == ["a seabird"]
    assert checked.findings == [prompts.Finding("renamed", NAMES[0], "the sentences of 'Black-footed Albatross'")]


def test_missing_class_is_an_error_with_the_nearest_name():
    with pytest.raises(ValueError, match="'laysan albatros': the nearest is 'Laysan Albatross'"):
        prompts.lint({"Laysan Albatross": ["x"]}, ["laysan albatros"])
    with pytest.raises(ValueError, match=r"nothing is near \(2 of 2 classes"):
        prompts.lint({"xyz": ["x"]}, ["a bird", "another"])


def test_class_names_must_differ():
    with pytest.raises(ValueError, match="two classes are called 'crane'"):
        prompts.lint(FOUND, ["crane", "crane"])


def test_extra_order_empty_duplicate_tie():
    checked = prompts.lint({"b": ["y", "y"], "extra": ["z"], "a": [], "c": ["y"]}, ["a", "b", "c"])
    assert checked.sentences == {"a": ["a photo of a a."], "b": ["y"], "c": ["y"]}
    assert kinds(checked) == {"extra", "order", "empty", "duplicate", "tie"}
    assert list(checked.sentences) == ["a", "b", "c"]


def test_malformed_sentences_are_cleaned_or_dropped():
    checked = prompts.lint({"a": ["- long tail", "  ", "1. red\tbeak ", "ok"]}, ["a"])
    assert checked.sentences == {"a": ["long tail", "red beak", "ok"]}
    assert [f.kind for f in checked.findings] == ["malformed"] * 3


def test_long_sentences_are_cut_to_what_the_tokenizer_reads():
    checked = prompts.lint({"a": [" ".join(["word"] * 100)]}, ["a"])
    assert len(checked.sentences["a"][0].split()) == prompts.TOKENS
    marked = prompts.lint({"a": [" ".join(["word,"] * 60)]}, ["a"])
    assert len(marked.sentences["a"][0].split()) == prompts.TOKENS // 2
    assert kinds(checked) == kinds(marked) == {"long"}


def test_short_names_serve_places_only_and_tie():
    found = {"church": ["a steeple"], "alley": ["narrow"]}
    names = ["church indoor", "church outdoor", "alley"]
    checked = prompts.lint(found, names, "places365")
    assert [f.kind for f in checked.findings] == ["renamed", "renamed", "tie"]
    with pytest.raises(ValueError, match="no sentences for 'church indoor'"):
        prompts.lint(found, names, "cub")


def test_relative_clauses():
    assert prompts.which("a seabird") == "which is a seabird"
    assert prompts.which("long legs") == "which has long legs"
    assert prompts.which("can fly") == "which can fly"
    assert prompts.which("used in zoos") == "which is used in zoos"


def test_own_file_warns_of_repairs(tmp_path):
    file = given(tmp_path, FOUND)
    with pytest.warns(prompts.PromptWarning, match="clip-d of mine: 1 renamed"):
        said = prompts.load("clip-d", "mine", "test", NAMES, file=file)
    assert said["Black footed Albatross"] == ["Black footed Albatross, which is a seabird."]
    with pytest.warns(prompts.PromptWarning):
        said = prompts.load("lazsl", "mine", "test", NAMES, file=file)
    assert said["mew"] == ["a photo of a mew, which has long legs.", "a photo of a mew, which can fly."]


def test_class_without_descriptors_keeps_its_own_prompt(tmp_path):
    file = given(tmp_path, {"donuts": [], "ramen": ["noodles"]})
    checked = prompts.examine("clip-d", "food101", "test", ["donuts", "ramen"], file=file)
    assert checked.sentences["donuts"] == ["a photo of a donuts."]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "holds a list"),
        ('{"a": "x"}', "must be a list of strings"),
        ('{"a": [1]}', "list of strings"),
        ("{", "JSON"),
    ],
)
def test_files_of_another_form(tmp_path, content, said):
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=said):
        prompts.read(file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prompts.read(tmp_path / "nowhere.json")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A published file whose download is a copy of local bytes."""
    content = json.dumps({"a": ["red beak"]}).encode()
    source = prompts.Source(
        "clip-d", "menon", "mine", "o/r", "0" * 40, "d/x.json", hashlib.sha256(content).hexdigest(), "", ""
    )
    calls = []

    def download(url, known_hash, fname, path, **_):
        calls.append(url)
        target = Path(path) / fname
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return str(target)

    monkeypatch.setenv("UPCLOSE_CACHE", str(tmp_path))
    monkeypatch.setattr(prompts.pooch, "retrieve", download)
    monkeypatch.setattr(prompts, "published", lambda: (source,))
    return source, calls


def test_fetch_asks_for_the_pinned_commit(published):
    _, calls = published
    assert prompts.load("clip-d", "mine", "test", ["a"]) == {"a": ["a, which has red beak."]}
    assert calls == [f"https://raw.githubusercontent.com/o/r/{'0' * 40}/d/x.json"]


def test_damaged_copy_is_not_read(published):
    source, _ = published
    prompts.fetch(source).write_text("{}")
    with pytest.raises(ValueError, match="has the sha256"):
        prompts.fetch(source)


def test_of_a_file_without_a_known_checksum_the_first_is_kept(published):
    source = published[0]._replace(sha256="")
    with pytest.warns(prompts.PromptWarning, match="nobody has said which sha256"):
        file = prompts.fetch(source)
    prompts.fetch(source)
    file.write_text("{}")
    with pytest.raises(ValueError, match="has the sha256"):
        prompts.fetch(source)


def test_without_a_network_the_error_says_where_to_put_the_file(published, monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(prompts.pooch, "retrieve", fail)
    with pytest.raises(ConnectionError, match=r"no network.*put the file at .*x\.json"):
        prompts.load("clip-d", "mine", "test", ["a"])


def test_shuffled_gives_every_class_the_sentences_of_another_and_each_once():
    found = {f"class {k}": [f"row {k}", f"line {k}"] for k in range(30)}
    given = prompts.shuffled(found, seed=1)
    assert list(given) == list(found)
    assert all(given[name] != rows for name, rows in found.items())
    assert sorted(given.values()) == sorted(found.values())
    assert given == prompts.shuffled(found, seed=1) != prompts.shuffled(found, seed=2)
    assert prompts.shuffled({"a": ["x"], "b": ["y"]}) == {"a": ["y"], "b": ["x"]}
    with pytest.raises(ValueError, match="at least two classes, not 1"):
        prompts.shuffled({"a": ["x"]})


def test_shuffled_descriptions_keep_the_names_and_the_words():
    names = [bird.name for bird in held_out()["test"]]
    own, other = (prompts.load(source, "birdlets", "test", names) for source in ("clip-d", "clip-d-shuffled"))
    for name in names:
        assert all(line.startswith(f"a photo of a {name}, which has ") for line in other[name])
        assert own[name] != other[name]
    words = [sorted(line.split(", which has ")[1] for rows in said.values() for line in rows) for said in (own, other)]
    assert words[0] == words[1]
    assert other != prompts.load("clip-d-shuffled", "birdlets", "test", names, seed=1)


def test_a_class_without_descriptors_gives_and_gets_none(tmp_path):
    file = given(tmp_path, {"a": [], "b": ["red"], "c": ["blue"]})
    checked = prompts.examine("clip-d-shuffled", "mine", "test", ["a", "b", "c"], file=file)
    assert checked.sentences == {"a": ["a photo of a a."], "b": ["b, which has blue."], "c": ["c, which has red."]}


def test_registry_of_published_files():
    files = prompts.published()
    assert len({(f.source, f.variant, f.dataset) for f in files}) == len(files)
    assert all(len(f.commit) == 40 and len(f.sha256) in (0, 64) for f in files)
    assert prompts.find("cupl", "dtd").variant == "full"
    assert prompts.find("cupl", "dtd", "base").path.endswith("texture_prompts_base.json")
    assert prompts.find("clip-d", "cub-painting").dataset == "cub"
    with pytest.raises(ValueError, match="no variant 'x' of cupl for dtd; there are full, base, wca"):
        prompts.find("cupl", "dtd", "x")
    with pytest.raises(ValueError, match="give a file of your own"):
        prompts.find("clip-d", "aid")
    with pytest.raises(ValueError, match="there are clip, clip-e"):
        prompts.load("gpt", "dtd", "test", ["a"])


def test_templates():
    assert prompts.templates("dtd")[0] == "a photo of a {} texture."
    assert prompts.templates("cub-painting") == prompts.templates("cub")
    assert prompts.templates("aid") == (prompts.TEMPLATE,)
    assert prompts.templates("birdlets") == birdlets.TEMPLATES  # the training's vocabulary is made of them


def test_ensembles_are_as_long_as_clips_and_each_has_one_place_for_the_name():
    ensembles = json.loads((paths.PUBLISHED / "templates.json").read_text())
    counts = {"cub": 1, "oxford-pets": 1, "food101": 1, "places365": 2, "dtd": 8, "eurosat": 3, "resisc45": 18}
    counts |= {"flowers102": 1, "fgvc-aircraft": 2, "stanford-cars": 8, "sun397": 2, "ucf101": 48, "cifar100": 18}
    assert {name: len(set(rows)) for name, rows in ensembles.items()} == counts | {"caltech101": 34, "birdlets": 7}
    assert {row.count("{}") for rows in ensembles.values() for row in rows} == {1}
    assert set(ensembles) <= {*registry.names(), "birdlets"}


def test_marks_of_lists_go_however_many_there_are():
    checked = prompts.lint({"tern": ["- 1) a beak", "\0* a tail"]}, ["tern"])
    assert checked.sentences == {"tern": ["a beak", "a tail"]}
    assert prompts.answer("* a beak\n* a tail") == prompts.answer("1. a beak\n2. a tail") == ["a beak", "a tail"]


def test_question_and_answers_go_round():
    asked = prompts.question("blue tit")
    assert asked.count("Q: What are useful features for distinguishing a") == 3
    assert asked.endswith("there is a blue tit in a photo:\n-")
    assert prompts.answer(" blue cap\n- yellow belly\n\n2. white cheeks") == [
        "blue cap",
        "yellow belly",
        "white cheeks",
    ]
    assert prompts.from_answers({"a": "- x\n- y"}) == {"a": ["x", "y"]}
    with pytest.raises(ValueError, match="'a': no list"):
        prompts.from_answers({"a": " "})


real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the published files are not at {SHARED}")


@real
def test_published_files_are_those_of_the_registry():
    hashes = {f.sha256 for f in prompts.published()}
    for file in [*SHARED.glob("clip-d/*.json"), *SHARED.glob("cupl/*.json")]:
        assert hashlib.sha256(file.read_bytes()).hexdigest() in hashes, file.name


@real
@pytest.mark.parametrize("name", ["cub", "dtd", "eurosat", "food101", "oxford-pets", "places365"])
def test_ensembles_are_those_of_the_released_files(name):
    released = SHARED / "wca" / Path(prompts.find("clip-e", name).path).relative_to("prompts")
    assert prompts.templates(name) == tuple(json.loads(released.read_text()))


@real
def test_what_is_wrong_with_the_published_files():
    def lint(file, dataset, names):
        return prompts.lint(json.loads((SHARED / file).read_text()), names, dataset)

    def found(checked, kind):
        return [f.class_name for f in checked.findings if f.kind == kind]

    food = [n.replace("_", " ") for n in json.loads((SHARED / "wca/food101/classes.json").read_text())]
    assert len(found(lint("clip-d/descriptors_food101.json", "food101", food), "empty")) == 5
    places = [k.replace("_", " ").replace("-", " ") for k in prompts.read(SHARED / "clip-d/descriptors_places365.json")]
    assert found(lint("clip-d/descriptors_places365.json", "places365", places), "empty") == ["corn field"]
    assert len(found(lint("wca/place365/cupl.json", "places365", places), "tie")) == 21
    texture = json.loads((SHARED / "wca/dtd/classes.json").read_text())
    assert found(lint("cupl/texture_prompts_full.json", "dtd", texture), "order")


def test_waffle_is_fifteen_pairs_of_words_and_of_letters_the_same_for_all_classes():
    found = prompts.waffle(["owl", "jay"], seed=1)
    tails = [[row.removeprefix(f"a photo of a {n}, which has ").removesuffix(".") for row in found[n]] for n in found]
    assert tails[0] == tails[1]
    assert len(tails[0]) == 30
    words = set((paths.PACKAGE / "published" / "words.txt").read_text().split())
    assert all(len(tail.split()) == 2 and set(tail.split()) <= words for tail in tails[0][::2])
    assert all(3 <= len(w) <= 7 and w.isascii() and w.islower() for tail in tails[0][1::2] for w in tail.split())
    assert prompts.waffle(["owl", "jay"], seed=2) != found
    assert prompts.examine("waffle", "any", "test", ["owl", "jay"], seed=1).sentences == found


def test_sentences_of_clip_clip_e_and_dnd():
    names = [bird.name for bird in held_out()["test"]][:3]
    clip, clip_e, dnd = (prompts.examine(s, "birdlets", "test", names).sentences for s in ("clip", "clip-e", "dnd"))
    own = prompts.read(paths.PACKAGE / "birdlets" / "prompts" / "clip-d_test.json")
    for name in names:
        assert clip[name] == [f"a photo of a {name}."]
        assert clip_e[name] == [template.format(name) for template in prompts.templates("birdlets")]
        assert dnd[name] == [f"a photo of a bird with {descriptor}." for descriptor in own[name]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_of_windows_editors_are_read(tmp_path, encoding):
    (tmp_path / "x.json").write_bytes('{"Möwe": ["weiß"]}'.encode(encoding))
    assert prompts.read(tmp_path / "x.json") == {"Möwe": ["weiß"]}


def test_a_class_that_stands_twice_is_refused_with_both_places(tmp_path):
    (tmp_path / "x.json").write_text('{"tern": ["a"], "gull": ["b"], "tern": ["c"]}')
    with pytest.raises(ValueError, match=r"x\.json: 'tern' stands twice, as entries 1 and 3"):
        prompts.read(tmp_path / "x.json")


def test_deep_nesting_is_one_sentence(tmp_path):
    (tmp_path / "x.json").write_text('{"tern": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ValueError, match=r"x\.json is nested too deeply"):
        prompts.read(tmp_path / "x.json")


CHATTY = """Sure! Here are some useful features of an arctic tern:

## Appearance
**Arctic tern**
1) ***long, forked* tail**
- "red beak"
* *black* cap,
2. Overall, it is slender
---
I hope this helps! Let me know if you need more.
"""


def test_answers_lose_preambles_headings_marks_and_closing_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("UPCLOSE_RUN", str(tmp_path))
    with pytest.warns(prompts.PromptWarning, match=r"6 lines of the answers.*Sure! Here are"):
        found = prompts.from_answers({"Arctic tern": CHATTY})
    rows = ["long, forked tail", "red beak", "black cap,", "Overall, it is slender"]
    assert found == {"Arctic tern": rows}
    kept = json.loads((tmp_path / "facts.json").read_text())["sentences"]
    assert [row["kind"] for row in kept] == ["chat"] * 3 + ["doubtful"] + ["chat"] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prompts.from_answers({"a": " sure-footed\n- here and there a red spot\n- 40 cm long"}) == {
            "a": ["sure-footed", "here and there a red spot", "40 cm long"]
        }


def test_the_linter_drops_chat_and_reports_what_is_doubtful(tmp_path, monkeypatch):
    monkeypatch.setenv("UPCLOSE_RUN", str(tmp_path))
    rows = ["Here are the features:", "a __long__ tail", "'a red beak'", "These features help to tell it apart.", "---"]
    said = prompts.lint({"tern": [*rows, "1) white"], "gull": ["As an AI, I cannot see."]}, ["tern", "gull"])
    assert said.sentences["tern"] == ["a long tail", "a red beak", rows[3], "white"]
    assert said.sentences["gull"] == ["a photo of a gull."]
    kinds = [(f.kind, f.class_name) for f in said.findings if f.kind in ("chat", "doubtful")]
    assert kinds == [("chat", "tern"), ("doubtful", "tern"), ("chat", "tern"), ("chat", "gull")]
    assert len(json.loads((tmp_path / "facts.json").read_text())["sentences"]) == 4
