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
    """

    name: str
    function: Callable
    needs: tuple[str, ...]
    colour: str
    encodings: Callable[[int], int] = cropped
    source: str = ""
    rows: tuple[str, ...] = ()

    @property
    def zero_shot(self) -> bool:
        """It is called with views (or a ladder) and text alone."""
        return not {"shots", "encoder"} & set(self.needs)
