"""Sentences for classes: {class name: [sentences]}, by source, fetched at a pinned commit and linted before every use.

| source | sentences |
| --- | --- |
| clip | "a photo of a {name}." |
| clip-e | the templates of CLIP's prompt ensemble |
| clip-d | "{name}, which (is/has/...) {descriptor}." (Menon and Vondrick) |
| clip-d-shuffled | clip-d with the descriptors of another class: known words that do not belong |
| lazsl | "a photo of a {name}, which (is/has/...) {descriptor}." (LaZSL section 4.1) |
| dnd | "a photo of a bird with {descriptor}.": the descriptor without the class's name |
| cupl | full sentences by a language model (Pratt et al.) |
| waffle | "a photo of a {name}, which has {random words}." (Roth et al.) |

What the linter finds, and what becomes of it:

| finding | handling |
| --- | --- |
| missing | error, with the nearest name |
| renamed | the class is spelled otherwise (case, hyphens, articles, a place's short name): its sentences are taken |
| extra | dropped |
| order | put in the data set's order |
| empty | the class's own prompt, "a photo of a {name}." |
| duplicate | kept once |
| malformed | white space, list marks, markdown, outer quotes and control characters removed; blank ones dropped |
| chat | dropped: a language model's preamble, heading or closing line, which describes nothing |
| doubtful | kept: it reads like a language model's remark |
| long | cut at a word, to what the tokenizer reads |
| tie | kept: two classes have the same sentences, so no zero-shot method can tell them apart by these |

Inside a run, `run.json` lists what was chat or doubtful.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch

from upclose import paths, seeds, shipped

TEMPLATE = "a photo of a {}."
SOURCES = ("clip", "clip-e", "clip-d", "clip-d-shuffled", "lazsl", "dnd", "cupl", "waffle")
PAIRS = 15  # of WaffleCLIP: a descriptor of words and one of letters
FILES = {"cupl": "cupl"} | dict.fromkeys(("clip-d", "clip-d-shuffled", "lazsl", "dnd"), "clip-d")
"""The sources that read a file of sentences -> the source under which it is published."""
TOKENS = 75  # of CLIP's 77, without start and end
_FAMILY = {name: "imagenet" for name in ("imagenet-v2", "imagenet-r", "imagenet-sketch", "imagenet-a")}
_FAMILY |= {"cub-painting": "cub"}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MARK = re.compile(r"^\s*(?:(?:[-*•–—·◦▪+]+|\(?\d{1,3}[.)]|[a-z]\))\s+|[-•–](?=[^\W\d]))")
_QUOTED = re.compile(r"^(?:\"(.*)\"|“(.*)”|'(.*)'|`(.*)`),?$")
_BOLD = re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1|(?<![\w*])(\*)(?=[^\s*])([^*]+)(?<=\S)\*(?![\w*])")
_CHAT = re.compile(  # no description is a rule, a heading or the start of a list, or speaks of the answer itself
    r"(?:[-*_=]\s*){3,}$|`{3}\w*$|#{1,6}\s[^.]{,60}$|[^:]*:\W*$|here are\b[^:]*$"
    r"|let me know\b|feel free to\b|as an ai\b"
    r"|(?:sure|certainly|of course|absolutely|okay|ok)\s*[!,.:]+\s*(?:(?:here|below|i|the following)\b|$)"
    r"|(?:i )?hope (?:this|that|these) help|if you (?:need|want|have|would like)\b.*\b(?:me|help|questions?)\b"
    r"|i(?:'m| am) sorry\b|i (?:can't|cannot) (?:answer|help|assist|provide)\b|(?:would you like|is there anything)\b",
    re.IGNORECASE,
)
_DOUBTFUL = re.compile(
    r"(?:i|we|note|please|overall|remember|sure|okay|in (?:summary|conclusion)|(?:here|below) (?:is|are))\b(?!-)"
    r"|.*\b(?:these|those|the above) (?:\w+ )?(?:features|characteristics|traits|descript\w+)\b|.*[?!]$|#|`{3}",
    re.IGNORECASE,
)
_EXAMPLES = {  # the two worked examples of Menon and Vondrick's question
    "lemur": (
        "four-limbed primate",
        "black, grey, white, brown, or red-brown",
        "wet and hairless nose with curved nostrils",
        "long tail",
        "large eyes",
        "furry bodies",
        "clawed hands and feet",
    ),
    "television": (
        "electronic device",
        "black or grey",
        "a large, rectangular screen",
        "a stand or mount to hold the screen",
        "one or more speakers",
        "a power cord",
        "input ports for connecting to other devices",
        "a remote control",
    ),
}


class PromptWarning(UserWarning):
    """Sentences were repaired before use."""


class Finding(NamedTuple):
    """Something the linter found: its kind (the module's table), the class, and what was done, as text."""

    kind: str
    class_name: str
    detail: str


class Checked(NamedTuple):
    """Sentences ready for use and what was repaired; `findings` as plain data is `[f._asdict() for f in findings]`."""

    sentences: dict[str, list[str]]
    findings: list[Finding]


class Source(NamedTuple):
    """A published file: a line of `published/prompts.csv`."""

    source: str
    variant: str
    dataset: str
    repository: str
    commit: str
    path: str
    sha256: str
    bytes: str
    licence: str


# ------------------------------------------------------------------------------------------------------------- files


def read(file: str | Path) -> dict[str, list[str]]:
    """A description file, {class: [sentences]}, in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        ValueError: it is no JSON of that form, or a class stands in it twice
        FileNotFoundError: there is no such file
    """
    content = _json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; it must map class names to lists of sentences")
    for name, rows in content.items():
        if not isinstance(rows, list) or not all(isinstance(row, str) for row in rows):
            raise ValueError(f"{file}: the descriptions of {name!r} must be a list of strings")
    return content


def _json(file: str | Path) -> object:
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no description file {file}")
    content = file.read_bytes()
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if marked else "utf-8-sig")
        return json.loads(text, object_pairs_hook=_once)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply; it must map class names to lists of sentences") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object whose keys differ: `dict` would keep the last of two and lose the first."""
    place: dict[str, int] = {}
    for k, (key, _) in enumerate(pairs, 1):
        if key in place:
            raise ValueError(f"{key!r} stands twice, as entries {place[key]} and {k}; keep one of them")
        place[key] = k
    return dict(pairs)


@cache
def published() -> tuple[Source, ...]:
    """Every file of `published/prompts.csv`; a data set's first variant of a source is the default."""
    with shipped.checked(paths.PUBLISHED / "prompts.csv").open(newline="", encoding="utf-8") as file:
        return tuple(Source(**line) for line in csv.DictReader(file))


def find(source: str, dataset: str, variant: str | None = None) -> Source:
    """The published file of (source, variant, data set).

    Raises:
        ValueError: there is none; says which there are
    """
    files = [f for f in published() if f.source == source and f.dataset == dataset]
    files = files or [f for f in published() if f.source == source and f.dataset == _FAMILY.get(dataset)]
    if not files:
        known = sorted({f.dataset for f in published() if f.source == source})
        raise ValueError(
            f"no {source} sentences of {dataset!r} are published; there are {', '.join(known) or 'none'}; "
            "give a file of your own, {class: [sentences]}"
        )
    for file in files:
        if variant in (None, "", file.variant):
            return file
    raise ValueError(
        f"no variant {variant!r} of {source} for {dataset}; there are {', '.join(f.variant for f in files)}"
    )


def local(file: Source) -> Path:
    """Where a published file is kept on this machine, fetched or put there by hand."""
    return paths.cache() / "prompts" / file.repository.replace("/", "--") / file.commit[:10] / file.path


def fetch(file: Source) -> Path:
    """A published file at its pinned commit, downloaded once and compared with its sha256.

    Of the few files whose sha256 is not known, that of the first download is kept beside it.

    Raises:
        ConnectionError: it is not here and cannot be downloaded; says where to put it
        ValueError: its bytes are not those that were published

    Warns:
        PromptWarning: nothing told whether the first download was what was published
    """
    target = local(file)
    kept = target.with_name(f"{target.name}.sha256")
    known = file.sha256 or (kept.read_text().strip() if kept.is_file() else "")
    url = f"https://raw.githubusercontent.com/{file.repository}/{file.commit}/{file.path.replace(' ', '%20')}"
    if target.is_file() and known and (found := pooch.file_hash(target)) != known:
        raise ValueError(f"{target} has the sha256 {found}, not {known}: remove it, it will be fetched again")
    try:
        got = pooch.retrieve(url, f"sha256:{known}" if known else None, target.name, target.parent, progressbar=False)
    except ValueError as error:
        raise ValueError(f"{url} is not what was published: {error}") from None
    except Exception as error:
        raise ConnectionError(f"{url} cannot be fetched ({error}): put the file at {target}") from error
    if not known:
        paths.write(kept, pooch.file_hash(got).encode())
        said = f"nobody has said which sha256 {url} has: that of this copy is kept in {kept}"
        warnings.warn(said, PromptWarning, stacklevel=2)
    return Path(got)


# ----------------------------------------------------------------------------------------------------------- sentences


def waffle(class_names: Sequence[str], seed: int = 0) -> dict[str, list[str]]:
    """WaffleCLIP's prompts: the same random descriptors for every class, half of them words, half letters.

    Args:
        class_names: C names
        seed: of the descriptors

    Source:
        Roth et al., "Waffling around for Performance", section 4.
    """
    rng = seeds.rng(seed, "waffle")
    words = shipped.checked(paths.PUBLISHED / "words.txt").read_text().split()
    descriptors = []
    for _ in range(PAIRS):
        descriptors.append(" ".join(words[int(k)] for k in rng.choice(len(words), 2, replace=False)))
        letters = ("".join(_LETTERS[int(k)] for k in rng.integers(26, size=int(n))) for n in rng.integers(3, 8, size=2))
        descriptors.append(" ".join(letters))
    return {
        name: [f"a photo of a {name}, which has {descriptor}." for descriptor in descriptors] for name in class_names
    }


def shuffled(found: Mapping[str, Sequence[str]], seed: int = 0) -> dict[str, Sequence[str]]:
    """Each class with the sentences of another, and each class's sentences used once.

    Args:
        found: class -> sentences, of at least two classes
        seed: of who gets whose

    Raises:
        ValueError: there is no other class
    """
    names = list(found)
    if len(names) < 2:
        raise ValueError(f"descriptions are shuffled between at least two classes, not {len(names)}")
    order = seeds.rng(seed, "shuffled").permutation(len(names))
    given = {names[k]: found[names[other]] for k, other in zip(order, np.roll(order, 1))}
    return {name: given[name] for name in names}


def templates(dataset: str) -> tuple[str, ...]:
    """CLIP's prompt ensemble of a data set; ImageNet's is fetched, a data set without one has the plain template.

    Source:
        OpenAI's CLIP repository, data/prompts.md; Places365, which it lacks: WCA's released file.
    """
    if rows := _json(shipped.checked(paths.PUBLISHED / "templates.json")).get(_FAMILY.get(dataset, dataset)):
        return tuple(rows)
    if any(f.source == "clip-e" and f.dataset == dataset for f in published()):
        rows = _json(fetch(find("clip-e", dataset)))
        if not isinstance(rows, list) or not all(isinstance(row, str) and row.count("{}") == 1 for row in rows):
            raise ValueError(f"the templates of {dataset} must be a list of strings with one {{}} each")
        return tuple(rows)
    return (TEMPLATE,)


def identity(dataset: str) -> str:
    """A hash of all that the sources say of a data set: published files by commit and path, shipped ones by content."""
    known = {dataset, _FAMILY.get(dataset)}
    own = sorted((paths.PACKAGE / "birdlets" / "prompts").glob("*.json")) if dataset == "birdlets" else ()
    ensemble = _json(shipped.checked(paths.PUBLISHED / "templates.json")).get(_FAMILY.get(dataset, dataset))
    words = shipped.checked(paths.PUBLISHED / "words.txt").read_text()
    files = [[*f] for f in published() if f.dataset in known]
    said = [files, ensemble, words, *(_json(shipped.checked(file)) for file in own)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def which(descriptor: str) -> str:
    """The relative clause of a descriptor: "which is a seabird", "which has long legs", "which can fly".

    Source:
        Menon and Vondrick (CLIP-D); LaZSL section 4.1, "which (is/has/etc) {attribute}".

    Deviates:
        Neither paper says when "is" and when "has"; an article or "used" takes "is", a verb stays, else "has".

    Example:
        >>> which("long legs"), which("a seabird")
        ('which has long legs', 'which is a seabird')
    """
    first = descriptor.split(" ", 1)[0].lower()
    if first in ("has", "have", "is", "are", "often", "typically", "usually", "may", "can"):
        return f"which {descriptor}"
    return f"which {'is' if first in ('a', 'an', 'used') else 'has'} {descriptor}"


def _descriptors(source: str, dataset: str, split: str, variant: str | None, file: str | Path | None) -> dict:
    if file:
        return read(file)
    if dataset == "birdlets":
        return read(shipped.checked(paths.PACKAGE / "birdlets" / "prompts" / f"{source}_{split}.json"))
    return read(fetch(find(source, dataset, variant)))


def examine(
    source: str,
    dataset: str,
    split: str,
    class_names: Sequence[str],
    *,
    seed: int = 0,
    variant: str | None = None,
    file: str | Path | None = None,
) -> Checked:
    """`load`, with everything that was repaired.

    Args:
        source: one of SOURCES
        dataset: the registry's name
        split: for Birdlets, whose species differ from split to split
        class_names: C different names in the data set's order
        seed: of WaffleCLIP's descriptors and of the shuffle
        variant: of the published files ("full", "base", "menon", ...); None for the default
        file: of one's own, {class: [sentences]}, instead of a published one

    Raises:
        ValueError: an unknown source, or sentences that the linter cannot repair
    """
    names = list(class_names)
    match source:
        case "clip":
            return Checked({name: [TEMPLATE.format(name)] for name in names}, [])
        case "clip-e":
            return Checked({name: [row.format(name) for row in templates(dataset)] for name in names}, [])
        case "waffle":
            return Checked(waffle(names, seed=seed), [])
        case "cupl":
            return lint(_descriptors("cupl", dataset, split, variant, file), names, dataset)
        case "clip-d" | "clip-d-shuffled" | "lazsl" | "dnd":
            found = lint(_descriptors("clip-d", dataset, split, variant, file), names, dataset)
            given = found.sentences
            if source == "clip-d-shuffled":  # a class without descriptors has none to give
                given = given | shuffled({n: rows for n, rows in given.items() if rows != [TEMPLATE.format(n)]}, seed)
            said = {name: [_said(source, dataset, name, row) for row in rows] for name, rows in given.items()}
            return Checked(said, found.findings)
    raise ValueError(f"no prompt source {source!r}; there are {', '.join(SOURCES)}")


def _said(source: str, dataset: str, name: str, descriptor: str) -> str:
    if descriptor == TEMPLATE.format(name):  # a class without descriptors
        return descriptor
    if source == "dnd":
        return f"a photo of {'a bird' if dataset == 'birdlets' else 'something'} with {descriptor}."
    clause = f"which has {descriptor}" if dataset == "birdlets" else which(descriptor)
    start = "a photo of a " if source == "lazsl" or dataset == "birdlets" else ""  # birdlets-tiny was trained on these
    return f"{start}{name}, {clause}."


def load(source: str, dataset: str, split: str, class_names: Sequence[str], **options) -> dict[str, list[str]]:
    """The sentences of a source for the classes of a data set, in the data set's order.

    Args:
        source: as in `examine`
        dataset: as in `examine`
        split: as in `examine`
        class_names: as in `examine`
        options: the others of `examine`

    Raises:
        ValueError: an unknown source, or sentences that the linter cannot repair

    Warns:
        PromptWarning: what was repaired, in one line
    """
    sentences, findings = examine(source, dataset, split, class_names, **options)
    if findings:
        kinds = [finding.kind for finding in findings]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        warnings.warn(f"{source} of {dataset}: {counts} (see prompts.examine)", PromptWarning, stacklevel=2)
    return sentences


# -------------------------------------------------------------------------------------------------------------- linter


def plain(name: str) -> str:
    """A class name without case, marks and leading article: what makes two spellings the same."""
    return re.sub(r"^(?:the|an?)\s+", "", re.sub(r"[\W_]+", " ", name.casefold()).strip())


def _match(name: str, there: Mapping[str, str], squeezed: Mapping[str, str], short: bool) -> str | None:
    """The key of the sentences of a class: its own name, another spelling, or, for places, the longest shorter name."""
    key = plain(name)
    for known, spelling in ((there, key), (squeezed, key.replace(" ", ""))):
        if spelling in known:
            return known[spelling]
    words = key.split()
    starts = [" ".join(words[:k]) for k in range(len(words) - 1, 0, -1)] if short else []
    return next((there[start] for start in starts if start in there), None)


def lint(
    found: Mapping[str, Sequence[str]],
    class_names: Sequence[str],
    dataset: str = "",
) -> Checked:
    """Sentences in the data set's order, repaired as the module's table says.

    Args:
        found: class -> sentences, as they were read
        class_names: C different names
        dataset: Places365's and SUN397's classes may have only their short name ("church" for "church indoor")

    Raises:
        ValueError: a class is missing, or a name stands twice in `class_names`
    """
    names = list(class_names)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two classes are called {twice!r}: sentences go by name, so rename one of them")
    there = {plain(key): key for key in found}
    short = dataset in ("places365", "sun397")
    squeezed = {spelling.replace(" ", ""): key for spelling, key in there.items()}
    keys = {name: name if name in found else _match(name, there, squeezed, short) for name in names}
    if lost := [name for name, key in keys.items() if key is None]:
        close = difflib.get_close_matches(plain(lost[0]), there, 1, 0.5)
        hint = f"the nearest is {there[close[0]]!r}" if close else "nothing is near"
        more = f" ({len(lost)} of {len(names)} classes lack sentences)" if len(lost) > 1 else ""
        raise ValueError(f"no sentences for {lost[0]!r}: {hint}{more}; rename it in a file of your own")
    findings = [Finding("renamed", n, f"the sentences of {k!r}") for n, k in keys.items() if n != k]
    used = set(keys.values())
    findings += [Finding("extra", key, "dropped") for key in found if key not in used]
    position = {key: k for k, key in enumerate(found)}
    places = [position[key] for key in keys.values()]
    if places != sorted(places):
        first = next(name for name, a, b in zip(names, places, sorted(places)) if a != b)
        findings.append(Finding("order", first, "put in the data set's order; the first class that stood elsewhere"))
    sentences = {}
    for name, key in keys.items():
        sentences[name], more = _clean(name, found[key])
        findings += more
    _note(findings)
    return Checked(sentences, findings + _ties(sentences))


def _note(findings: Sequence[Finding]) -> None:
    paths.note("sentences", [f._asdict() for f in findings if f.kind in ("chat", "doubtful")])


def _bare(row: str) -> str:
    """A sentence without control characters, markdown, list marks and outer quotes, however many it had."""
    text = " ".join("".join(c if c.isprintable() else " " for c in row).split())
    while (barer := _barer(text)) != text:
        text = barer
    return text


def _barer(text: str) -> str:
    if not _CHAT.match(text):  # a rule of dashes is no list mark
        text = _BOLD.sub(lambda m: m[2] or m[4], text)
        text = _MARK.sub("", re.sub(r"\*{2,}", "", text))
    quoted = _QUOTED.match(text)
    return next(filter(None, quoted.groups()), "").strip() if quoted else text.strip()


def _remark(text: str, name: str) -> str:
    """What a line is: "chat" for no description of the class, "doubtful" for what may be none, else ""."""
    if _CHAT.match(text):
        return "chat"
    return "doubtful" if _DOUBTFUL.match(text) or plain(text) == plain(name) else ""


def _pieces(sentence: str) -> int:
    """Words and marks, of which each is at least one token."""
    return len(re.findall(r"\w+|[^\w\s]+", sentence))


def _clean(name: str, rows: Sequence[str]) -> tuple[list[str], list[Finding]]:
    out, findings = [], []
    for row in rows:
        text = _bare(row)
        if (kind := _remark(text, name)) == "chat":
            findings.append(Finding(kind, name, f"{row!r} dropped"))
            continue
        if text != row:
            findings.append(Finding("malformed", name, f"{row!r} became {text!r}" if text else f"{row!r} dropped"))
        if not text:
            continue
        if kind:
            findings.append(Finding(kind, name, f"{row!r} kept"))
        if _pieces(text) > TOKENS:
            whole, words = text, text.split(" ")
            while len(words) > 1 and _pieces(" ".join(words)) > TOKENS:
                words.pop()
            text = " ".join(words)
            findings.append(Finding("long", name, f"{whole!r} cut to {len(words)} words"))
        if text in out:
            findings.append(Finding("duplicate", name, f"{text!r} kept once"))
            continue
        out.append(text)
    if not out:
        findings.append(Finding("empty", name, "its own prompt instead"))
        out = [TEMPLATE.format(name)]
    return out, findings


def _ties(sentences: dict[str, list[str]]) -> list[Finding]:
    seen: dict[frozenset[str], str] = {}
    findings = []
    for name, rows in sentences.items():
        first = seen.setdefault(frozenset(rows), name)
        if first != name:
            findings.append(Finding("tie", name, f"the same sentences as {first!r}"))
    return findings


# ------------------------------------------------------------------------------------------------ one's own sentences


def question(class_name: str) -> str:
    """What to ask a language model for descriptors of a new class, with two worked examples.

    Source:
        LaZSL section 4.1; Menon and Vondrick, section 2.
    """
    asked = "Q: What are useful features for distinguishing a {} in a photo?\n"
    answered = "A: There are several useful visual features to tell there is a {} in a photo:\n"
    shown = [
        asked.format(name) + answered.format(name) + "".join(f"- {row}\n" for row in rows) + "\n"
        for name, rows in _EXAMPLES.items()
    ]
    return "".join(shown) + asked.format(class_name) + answered.format(class_name) + "-"


def answer(text: str) -> list[str]:
    """The descriptors of a language model's answer: one a line, marked by "-", "*", "•", a number or quotes.

    The first line needs no mark, because the question ends with one. Other lines, preambles, headings, markdown and
    quotes are left out.

    Raises:
        ValueError: no line is a descriptor
    """
    return _answer(text, "")[0]


def _answer(text: str, name: str) -> tuple[list[str], list[Finding]]:
    rows, findings = [], []
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for k, line in enumerate(lines):
        row = _bare(line)
        kind = _remark(row, name)
        listed = k == 0 or _MARK.match(line) or _QUOTED.match(line)
        if not row or kind == "chat" or plain(row) == plain(name) or not listed:
            findings.append(Finding("chat", name, f"{line!r} dropped"))
            continue
        if kind:
            findings.append(Finding(kind, name, f"{line!r} kept"))
        rows.append(row)
    if rows:
        return rows, findings
    raise ValueError(f"no list in the answer {text[:60]!r}; it must have a line a descriptor, '- long tail'")


def from_answers(answers: Mapping[str, str]) -> dict[str, list[str]]:
    """Class -> descriptors, from class -> answer; write it as JSON and `load(..., file=...)` takes it.

    Raises:
        ValueError: an answer holds no list; names the class

    Warns:
        PromptWarning: which lines were left out, and which may be no descriptors
    """
    out, findings = {}, []
    for name, text in answers.items():
        try:
            out[name], more = _answer(text, name)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        findings += more
    if findings:
        shown = "; ".join(f"{f.class_name}: {f.detail}" for f in findings[:5]) + ("; ..." if len(findings) > 5 else "")
        warnings.warn(f"{len(findings)} lines of the answers look like no descriptors ({shown})", PromptWarning, 2)
    _note(findings)
    return out
