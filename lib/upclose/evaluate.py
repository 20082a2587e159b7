"""The living room: from a data set and the names of methods to who is right, and to a test of two of them.

    said = evaluate.texts(encoder, data)
    rules = evaluate.rules(["CLIP", "CLIP-D", "WCA"], said)
    plans = [Plan("square", 16, (0.5, 0.9), seed) for seed in (0, 1, 2)]
    hits = evaluate.hits(rules, encoder, data, plans)
    evaluate.check({"C1": ("WCA beats CLIP", "WCA", "CLIP")}, {"photo": hits})

A rule is any function of `Views` (or of a `Ladder`, for a plan with steps) that gives (B, C) scores. So a notebook adds
rules of its own to the dictionary and everything below treats them as it treats the named ones.

A data set may be a file of features (`datasets.Encoded`): its words and its crops are in it, and the encoder only says
on which device they are reckoned with, None on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from upclose import bank, claims, datasets, encode, methods, metrics, prompts
from upclose.features import Dataset, Ladder, Plan, Text, Views, check_cropped

NUMBERS = 2**26
"""Numbers in a block of views, 256 MB; a block has 256 images where that is less."""

_EMBEDDED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # label of a text -> fingerprint of its encoder


class Rule(NamedTuple):
    """A method of the registry, bound to the text that it reads and, if need be, to so many crops."""

    method: methods.Method
    text: Text
    crops: int | None = None

    def __call__(self, views: Views | Ladder) -> Tensor:
        """(B, C) scores; a method of crops reads the first level of a ladder."""
        is_ladder, wants_ladder = isinstance(views, Ladder), "ladder" in self.method.needs
        if wants_ladder and not is_ladder:
            raise ValueError(f"{self.method.name} reads a ladder: give a plan with more than one step")
        views = views.level(0) if is_ladder and not wants_ladder else views
        if "crops" in self.method.needs:
            check_cropped(views)
        if self.crops:
            views = views.cut(crops=self.crops, **({"levels": self.levels} if wants_ladder else {}))
        return self.method.function(views, self.text)

    @property
    def levels(self) -> int:
        """Sizes of each crop that are encoded, 1 where the number of crops is not bound."""
        return (self.method.encodings(self.crops) - 1) // self.crops if self.crops else 1

    def check(self, plan: Plan) -> None:
        """Raise unless the method can be paid from what a plan draws.

        Raises:
            ValueError: the plan has no ladder, fewer crops or fewer steps than the method reads
        """
        name, needs = self.method.name, self.method.needs
        if "ladder" in needs and plan.steps == 1:
            raise ValueError(f"{name} reads a ladder: give a plan with more than one step, not {plan}")
        if (self.crops or 1) > plan.n and {"crops", "ladder"} & {*needs}:
            raise ValueError(f"{name} reads {self.crops or 1} crops an image, and the plan draws {plan.n}: {plan}")
        if self.levels > plan.steps and "ladder" in needs:
            raise ValueError(f"{name} expands {self.crops} crops {self.levels - 1} times: {plan} has too few steps")

    def within(self, budget: int) -> Rule:
        """The same method with as many crops as a budget of encodings an image allows.

        Raises:
            ValueError: it allows not even one
        """
        return self._replace(crops=self.method.afford(budget) or None)


# ------------------------------------------------------------------------------------------------------------ the text


def text(encoder: encode.Encoder, data: Dataset, source: str, **options) -> Text:
    """The text of a problem: plain prompts as labels, a source's sentences as descriptions.

    The templates of "clip-e" are averaged into the labels as well.

    Args:
        encoder: of the sentences
        data: whose classes; its `name`, `split` and `class_names` are read, and `templates` where it brings its own. A
            file of features has words of its own, which are read instead
        source: one of `prompts.SOURCES`
        options: of `prompts.load`: seed, variant, file

    Raises:
        ValueError: an unknown source, sentences that the linter cannot repair, or a file without this source's words
    """
    if isinstance(data, datasets.Encoded):
        found = data.text(source)
        return found.to(encoder.device) if encoder else found
    names = data.class_names
    if source == "clip-e" and (own := getattr(data, "templates", ())):
        said = [[template.format(c=name) for template in own] for name in names]
    else:
        said = list(prompts.load(source, data.name, data.split, names, **options).values())
    label = said if source == "clip-e" else [prompts.TEMPLATE.format(name) for name in names]
    found = encode.embed_text(encoder, label, said, names)
    _EMBEDDED[found.label] = encoder.fingerprint
    return found


def texts(encoder: encode.Encoder, data: Dataset) -> Callable[[str], Text]:
    """Source -> `text`; each source is embedded once."""
    return cache(partial(text, encoder, data))


# ----------------------------------------------------------------------------------------------------------- the views


def read(
    encoder: encode.Encoder, data: Dataset, plan: Plan, images: slice = slice(None), **options
) -> tuple[Views | Ladder, Tensor, Tensor]:
    """The views of a data set, encoded the first time and read from the bank afterwards.

    Args:
        encoder: of the crops
        data: whose pictures
        plan: which crops
        images: positions in the data set, without a step
        options: of `bank.build`

    Returns:
        as `bank.Bank.read`, the views and labels on the encoder's device
    """
    return _on(encoder, _source(encoder, data, plan, **options).read(images))


def blocks(
    encoder: encode.Encoder, data: Dataset, plan: Plan, **options
) -> Iterator[tuple[Views | Ladder, Tensor, Tensor]]:
    """`read`, a block of images at a time: at most 256 of them, and at most `NUMBERS` numbers."""
    source = _source(encoder, data, plan, **options)
    numbers = source.numbers if isinstance(source, datasets.Encoded) else plan.n * plan.steps * encoder.dim
    for block in source.batches(min(256, max(1, NUMBERS // max(1, numbers)))):
        yield _on(encoder, block)


def _source(encoder: encode.Encoder, data: Dataset, plan: Plan, **options) -> bank.Bank | datasets.Encoded:
    if isinstance(data, datasets.Encoded):
        return data.crop_set(plan)
    return bank.build(data, encoder, plan, **options)


def _on(encoder: encode.Encoder | None, block: tuple) -> tuple[Views | Ladder, Tensor, Tensor]:
    views, label, index = block
    return (views.to(encoder.device), label.to(encoder.device), index) if encoder else block


# --------------------------------------------------------------------------------------------------------- the methods


def rules(names: Iterable[str], said: Callable[[str], Text], *, source: str = "clip-d") -> dict[str, Rule]:
    """Methods of the registry by name.

    Args:
        names: in tables
        said: source -> text, from `texts` or one's own
        source: whose sentences those methods read that bring none (CLIP, multi-crop, WCA, LGCA, D&D)

    Raises:
        ValueError: an unknown method, one that needs more than views and text, or a text without the descriptions that
            it reads
    """
    found = {name: methods.get(name) for name in names}
    for name, method in found.items():
        if not method.zero_shot:
            raise ValueError(f"{name} needs {', '.join(method.needs)}: call it in the notebook")
    bound = {name: Rule(method, said(method.source or source)) for name, method in found.items()}
    for name, (method, words, _) in bound.items():
        if "descriptions" in method.needs and not len(words.description):
            raise ValueError(f"{name} reads sentences of every class, and the text has none: write text.description")
    return bound


def collect(
    keep: Callable[[Tensor, Tensor], Tensor],
    rules: Mapping[str, Callable[[Views | Ladder], Tensor]],
    encoder: encode.Encoder,
    data: Dataset,
    plans: Sequence[Plan],
    **options,
) -> dict[str, Tensor]:
    """What one wants to keep of the scores of each crop set and image; the scores themselves live a block long.

    Args:
        keep: (scores (B, C), label (B,)) -> (B, ...)
        rules: {method: rule}; those of a stream get all images at once
        encoder: of the crops
        data: whose pictures
        plans: one a crop set
        options: of `bank.build`

    Returns:
        {method: (S, n, ...)} on the CPU, for the n readable images

    Raises:
        ValueError: before anything is encoded, a rule that reads more than the plans draw, or sentences that another
            encoder embedded
    """
    if not isinstance(data, datasets.Encoded):
        _check(rules, encoder, plans)
    stream = {name for name, rule in rules.items() if isinstance(rule, Rule) and "stream" in rule.method.needs}
    found: dict[str, list[Tensor]] = {name: [] for name in rules}
    for plan in plans:
        row: dict[str, list[Tensor]] = {name: [] for name in rules}
        for views, label, _ in blocks(encoder, data, plan, **options):
            for name in rules.keys() - stream:
                row[name].append(keep(rules[name](views), label).cpu())
        if stream:
            views, label, _ = read(encoder, data, plan, **options)
            for name in stream:
                row[name].append(keep(rules[name](views), label).cpu())
        for name, parts in row.items():
            found[name].append(torch.cat(parts))
    return {name: torch.stack(parts) for name, parts in found.items()}


def _check(rules: Mapping[str, Callable], encoder: encode.Encoder, plans: Sequence[Plan]) -> None:
    for name, rule in rules.items():
        if not isinstance(rule, Rule):
            continue
        if _EMBEDDED.get(rule.text.label, encoder.fingerprint) != encoder.fingerprint:
            raise ValueError(f"{name} reads sentences of another encoder than {encoder.name}: embed its text with this")
        for plan in plans:
            rule.check(plan)


def hits(
    rules: Mapping[str, Callable[[Views | Ladder], Tensor]],
    encoder: encode.Encoder,
    data: Dataset,
    plans: Sequence[Plan],
    **options,
) -> dict[str, Tensor]:
    """Who is right, for each crop set and image: {method: (S, n) bool}. Arguments as in `collect`."""
    return collect(metrics.correct, rules, encoder, data, plans, **options)


# ------------------------------------------------------------------------------------------------------ the paired test


def differences(
    hits: Mapping[str, Tensor], method: str, rivals: Iterable[str] | None = None
) -> dict[str, tuple[float, float, float]]:
    """A method minus each rival, in points, with its interval.

    Args:
        hits: {method: (S, n) bool}
        method: the one that is compared
        rivals: with whom; None for all others

    Returns:
        {rival: (difference, lower end, upper end)}, as `claims.interval`
    """
    rivals = [rival for rival in hits if rival != method] if rivals is None else rivals
    return {rival: claims.interval(hits[method], hits[rival]) for rival in rivals}


def check(asked: Mapping[str, tuple[str, str, str]], results: Mapping[str, Mapping[str, Tensor]]) -> list[claims.Claim]:
    """Claims about methods, each decided in every world in which both methods were run.

    Args:
        asked: {"C1": (what is claimed, the better method, the worse)}
        results: {world: {method: (S, n) bool}}; the world's name is appended to the claim's, "" appends nothing
    """
    return [
        claims.check(f"{name} {world}".strip(), f"{what}, {world}" if world else what, hits[better], hits[worse])
        for name, (what, better, worse) in asked.items()
        for world, hits in results.items()
        if better in hits and worse in hits
    ]
