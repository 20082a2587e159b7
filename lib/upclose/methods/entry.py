"""An entry of the registry: what a table, a figure and a machine have to know of a method."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

NEEDS = {
    "crops": "N crops an image, as `Views`",
    "ladder": "N crops an image at T sizes, as `Ladder`, in place of `Views`",
    "descriptions": "sentences of every class; without this only the class prompts are read",
    "shots": "labelled images",
    "stream": "all images at once, in their order: an image's scores depend on the others",
    "cls": "[CLS] tokens before projection",
    "encoder": "the encoder itself, to adapt it or its prompts",
}


def whole(crops: int) -> int:
    """The cost of a method that looks at the whole image alone."""
    return 1


def cropped(crops: int) -> int:
    """The cost of a method that looks at the whole image and at each crop."""
    return crops + 1


class Method(NamedTuple):
    """A method by its name in the tables. A module lists its own as `METHODS`, and so they are found.

    Attributes:
        name: as the papers call it
        function: `(views, text) -> (B, C)`, or `(ladder, text)`, for a method that needs neither shots nor the
            encoder; else as its docstring says. Hyper-parameters are bound in or keep their defaults
        needs: keys of `NEEDS`
        colour: in figures, "#rrggbb"
        encodings: of an image with N crops; where the encoder is trained, of a training image in an epoch
        source: the prompts whose sentences it reads, as `upclose.prompts` calls them; "" leaves them to the caller
        rows: other names under which the papers' tables print it, its parts and its controls
        sampler: of its paper's crops, as `Plan` calls it
    """

    name: str
    function: Callable
    needs: tuple[str, ...]
    colour: str
    encodings: Callable[[int], int] = cropped
    source: str = ""
    rows: tuple[str, ...] = ()
    sampler: str = "square"

    @property
    def zero_shot(self) -> bool:
        """It is called with views (or a ladder) and text alone."""
        return not {"shots", "encoder"} & set(self.needs)

    @property
    def crop_set(self) -> str:
        """Methods of one crop set read the same crops: "ladder", or their sampler."""
        return "ladder" if "ladder" in self.needs else self.sampler

    def afford(self, budget: int) -> int:
        """The most crops that a budget of encodings an image pays for; 0 for a method that reads the whole image alone.

        Raises:
            ValueError: it does not pay for one
        """
        if self.encodings(1) > budget:
            raise ValueError(f"{self.name} needs {self.encodings(1)} encodings an image at least, not {budget}")
        if self.encodings(1) == self.encodings(2):
            return 0
        return max(n for n in range(1, budget + 1) if self.encodings(n) <= budget)
