"""The encoder: pictures, crops and sentences to unit vectors, with any open_clip model.

This package is the only one that imports open_clip. B pictures, N crops a picture, L sentences, D embedding
dimensions, W the width of the image tower, S the side in pixels of what the tower takes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import os
import time
import warnings
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor, nn

from upclose import crops, paths
from upclose.encode import fingerprint, published, sources, tiny
from upclose.features import Text

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_FROM = 2_000_000  # crops of a bank: compiling takes most of a minute and saves 5 to 30 microseconds a crop


class Prepared(NamedTuple):
    """A picture of which everything is known that needs no device; from `Encoder.prepare`.

    Attributes:
        pixels: uint8 (3, H, W)
        view: (1 + n, 8), the whole picture and its n distinct boxes as `crops.cut` takes them
        place: (1 + N,) int64, which of the views the picture is, and each box
        shape: (N,) or (T, N), of the boxes
    """

    pixels: Tensor
    view: np.ndarray
    place: np.ndarray
    shape: tuple[int, ...]


class Encoder:
    """A CLIP model with its tokenizer and its preprocessing; made by `load`.

    Attributes:
        name: what was asked for
        model: the open_clip model, float32 weights
        visual: its image tower: normalised (B, 3, S, S) -> (B, D), not unit norm
        tokenize: list of L strings -> (L, context length) int64
        image_size: S
        mean, std: per channel, of pixels in [0, 1]
        squash: the whole image is resized to S x S without regard to its shape, not cut to a square
        device, precision: where and in which arithmetic the model runs: autocast, but for bf16 on a GPU without
            gradients, which computes with bf16 copies of the weights and float32 LayerNorms
        compile: whether the image tower runs through `torch.compile`; None leaves it to who encodes much (`compiles`)
        batch_size: crops encoded at once; after the device ran out of memory fewer, for as long as this encoder lives:
            other batches than an undisturbed build has, whose features differ by rounding (cosine 1 - 1e-6)
    """

    def __init__(
        self,
        parts: sources.Parts,
        name: str,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        compile: bool | None = None,
        batch_size: int | None = None,
        runs_on: torch.device | None = None,
    ):
        self.name = name
        self.device = torch.device(device)
        self.model = parts.model.to(self.device).eval()
        self.visual = self.model.visual
        self.tokenize = parts.tokenize
        self.image_size = parts.image_size
        self.mean, self.std = tuple(parts.mean), tuple(parts.std)
        self.squash = parts.squash
        self.precision = precision
        self.batch_size = batch_size or _default_batch_size(self.image_size, self.device, self.visual)
        self.compile = compile
        self._runs_on = runs_on or self.device
        self._parts = parts
        self._half: _Half | None = None
        self._clock = _Clock()
        self._fits: int | None = None  # rows that fitted the device after it ran out of memory
        self._hashed: tuple[tuple, str] | None = None
        self._text: dict[str, Tensor] = {}
        self._text_state: tuple = ()

    @property
    def dim(self) -> int:
        """D, the dimensions of an embedding."""
        return self.visual.output_dim if hasattr(self.visual, "output_dim") else self.encode_text([""]).shape[-1]

    @property
    def logit_scale(self) -> float:
        """What the model's training multiplied cosines with before the softmax (100 for OpenAI's).

        A model that was trained with a sigmoid has a bias too (SigLIP): the same for all classes, it changes no
        softmax and is not asked for.
        """
        return self.model.logit_scale.detach().float().exp().item()

    @property
    def fingerprint(self) -> str:
        """A hash of the weights in use and the layers that they are in; it changes when a weight is adapted."""
        state = fingerprint.state(fingerprint.weights(self.model).values())
        if self._hashed is None or self._hashed[0] != state:
            self._hashed = state, fingerprint.of(self.model)
        return self._hashed[1]

    def to(self, device: str | torch.device) -> Encoder:
        """A copy on another device, with the same batch size; this encoder stays where it is."""
        parts = self._parts._replace(model=copy.deepcopy(self.model))
        return Encoder(parts, self.name, device, self.precision, self.compile, self.batch_size)

    def __getstate__(self) -> dict:
        return {**vars(self), "_half": None, "_clock": _Clock()}

    @property
    def streams(self) -> bool:
        """Whether `encode_views` takes pictures as they come: on a GPU, where `kernels` cuts them."""
        return crops.has_kernels(self.device)

    @property
    def whole_batches(self) -> bool:
        """Whether it `streams` where it does its work, so that all batches have one size."""
        return crops.has_kernels(self._runs_on)

    def compiles(self, count: int) -> bool:
        """Whether `encode_views` of so many crops should run compiled."""
        return self.whole_batches and count >= COMPILE_FROM if self.compile is None else self.compile

    @property
    def spent(self) -> dict[str, float]:
        """Seconds of the device so far for "cutting" and "encoding" crops, as far as it is done; nothing waits."""
        return self._clock.spent()

    def features(self, x: Tensor, cls: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Embed ready pictures in one batch; gradients flow to the weights and to `x`.

        Args:
            x: (B, 3, S, S) float, normalised with `mean` and `std`
            cls: also give the [CLS] token, after the tower's last LayerNorm and before the projection

        Returns:
            (B, D) float32 unit norm; with `cls` also (B, W) float32, as it is

        Raises:
            ValueError: `cls` of a tower that has no [CLS] token

        Deviates:
            Attentional pooling (CoCa) has no LayerNorm of width W; there the token is the transformer's output.
        """
        return self._features(x, cls, bool(self.compile))

    def _features(self, x: Tensor, cls: bool, compile: bool) -> Tensor | tuple[Tensor, Tensor]:
        if cls:
            self.check_cls()
        half = self._bf16_tower()
        with self._arithmetic() if half is None else contextlib.nullcontext():
            tower, x = (self.visual, x) if half is None else (half, x.bfloat16())
            feature, token = (_compiled_tower() if compile else _tower)(tower, x, cls)
        feature = F.normalize(feature.float(), dim=-1)
        return (feature, token.float()) if cls else feature

    def encode_crops(
        self, pixels: Tensor | Sequence[Tensor], box: Tensor | Sequence[Tensor], cls: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed crops, in batches that are filled across pictures; equal boxes of a picture are encoded once.

        Args:
            pixels: one picture, uint8 (3, H, W), or a list of B pictures of any sizes
            box: (N, 4) or (T, N, 4) float32 x0, y0, x1, y1 in pixels; of a list of pictures (B, N, 4) or (B, T, N, 4)
            cls: also give the [CLS] tokens before projection

        Returns:
            (..., D) float32 unit norm, in the shape of `box`; with `cls` also (..., W)

        Raises:
            ValueError: a picture is not uint8 (3, H, W), boxes and pictures do not belong together, or some pictures
                have more boxes than others
        """
        pictures, boxes = ([pixels], [box]) if isinstance(pixels, Tensor) and pixels.ndim == 3 else (pixels, box)
        if len(pictures) != len(boxes):
            raise ValueError(f"{len(pictures)} pictures but boxes for {len(boxes)}: give each picture its (N, 4) boxes")
        for picture, rows in zip(pictures, boxes):
            _check_picture(picture)
            _check_boxes(rows, *picture.shape[1:])
        shapes = {tuple(rows.shape[:-1]) for rows in boxes}
        if len(shapes) > 1:
            raise ValueError(f"the pictures' boxes have the shapes {sorted(shapes)}: give each picture as many boxes")
        shape = box.shape[:-1] if isinstance(box, Tensor) else (len(boxes), *(shapes.pop() if shapes else (0,)))
        distinct, place, first = [], [], [0]
        for rows in boxes:
            unique, where = _distinct(rows)
            distinct.append(unique)
            place.append(where + first[-1])
            first.append(first[-1] + len(unique))
        if self.streams:
            pieces = ((picture, crops.crop_view(rows, self.image_size)) for picture, rows in zip(pictures, distinct))
            feature, token = self._stream(pieces, cls, bool(self.compile))
        else:

            def cut(start: int, stop: int) -> Tensor:
                part = range(bisect_right(first, start) - 1, bisect_left(first, stop))
                rows = [distinct[i][max(start - first[i], 0) : stop - first[i]] for i in part]
                return self._crops([pictures[i] for i in part], [torch.from_numpy(row).float() for row in rows])

            feature, token = self._encode(cut, first[-1], cls)
        place = np.concatenate([np.empty(0, np.int64), *place])
        index = crops.upload([torch.from_numpy(place)], self.device)
        feature = feature[index].view(*shape, feature.shape[-1])
        return (feature, token[index].view(*shape, token.shape[-1])) if cls else feature

    def encode_images(self, pixels: Sequence[Tensor], cls: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Embed whole pictures as CLIP does: short side resized to S, centre crop (or squashed, if the tag says so).

        Args:
            pixels: B pictures, uint8 (3, H, W)
            cls: also give the [CLS] tokens before projection

        Returns:
            (B, D) float32 unit norm; with `cls` also (B, W)

        Deviates:
            Always bicubic, also where a tag was trained with bilinear resizing (MobileCLIP, PE).
        """
        for picture in pixels:
            _check_picture(picture)
        if self.streams:
            feature, token = self._stream(((x, self._whole_view(x)) for x in pixels), cls, bool(self.compile))
        else:
            feature, token = self._encode(
                lambda start, stop: torch.cat([self._whole(pixels[i]) for i in range(start, stop)]), len(pixels), cls
            )
        return (feature, token) if cls else feature

    def prepare(self, pixels: Tensor, box: Tensor) -> Prepared:
        """What `encode_views` needs of a picture; any thread may do it.

        Args:
            pixels: uint8 (3, H, W), on the host
            box: (N, 4) or (T, N, 4) float32 x0, y0, x1, y1 in pixels

        Raises:
            ValueError: as `encode_crops`
        """
        _check_picture(pixels)
        _check_boxes(box, *pixels.shape[1:])
        distinct, place = _distinct(box)
        view = np.concatenate([self._whole_view(pixels), crops.crop_view(distinct, self.image_size)])
        return Prepared(pixels, view, np.concatenate([[0], place + 1]), tuple(box.shape[:-1]))

    def encode_views(self, pictures: Iterable[Prepared], cls: bool = False, compile: bool = False) -> tuple:
        """Embed whole pictures and their crops as the pictures come, on a device that `streams`.

        All batches have `batch_size` rows, filled across pictures; the last is filled up with zeros, so that a result
        depends on its own pixels alone. Nothing waits for the device.

        Args:
            pictures: B, at least one, with boxes of one shape
            cls: also give the [CLS] tokens before projection
            compile: run the image tower through `torch.compile`

        Returns:
            image (B, D), crop (B, [T,] N, D), float32 unit norm, and the [CLS] tokens of both, or None twice
        """
        places, shapes, rows = [], [], 0

        def pieces() -> Iterator[tuple[Tensor, np.ndarray]]:
            nonlocal rows
            for picture in pictures:
                places.append(picture.place + rows)
                shapes.append(picture.shape)
                rows += len(picture.view)
                yield picture.pixels, picture.view

        found = self._stream(pieces(), cls, compile, whole_batches=True)
        index = crops.upload([torch.from_numpy(np.stack(places))], self.device)
        image, crop = zip(*((None, None) if x is None else (x[index[:, 0]], x[index[:, 1:]]) for x in found))
        crop = [None if x is None else x.unflatten(1, shapes[0]) for x in crop]
        return image[0], crop[0], image[1], crop[1]

    @torch.no_grad()
    def encode_text(self, text: Sequence[str]) -> Tensor:
        """Embed sentences; each distinct one is encoded once for these weights and then remembered.

        Args:
            text: L sentences; what is longer than the tokenizer reads is cut

        Returns:
            (L, D) float32 unit norm, on the encoder's device

        Raises:
            TypeError: one sentence instead of a list
        """
        if isinstance(text, str):
            raise TypeError(f"encode_text takes a list of sentences: give [{text!r}]")
        state = fingerprint.state(
            w for key, w in fingerprint.weights(self.model).items() if not key.startswith("visual.")
        )
        if state != self._text_state:
            self._text, self._text_state = {}, state
        new = [sentence for sentence in dict.fromkeys(text) if sentence not in self._text]
        found = self._fitting(lambda start, stop: self._sentences(new[start:stop]), len(new))
        self._text.update(zip(new, itertools.chain.from_iterable(found)))
        return torch.stack([self._text[s] for s in text]) if text else torch.empty(0, self.dim, device=self.device)

    def embed_prompts(self, text: Sequence[str], context: str) -> tuple[Tensor, Tensor]:
        """The tokens of L prompts that begin with the same words, and the embeddings of those words.

        Returns:
            tokens: (L, T) int64, cut behind the longest prompt
            embedding: (n, W) of the n tokens of `context`, which stand at positions 1 to n of every prompt

        Raises:
            ValueError: the text tower takes no embedded tokens, or a prompt does not begin with the context
        """
        if type(self.model) is not CLIP or self.model.attn_mask is None:
            raise ValueError(
                f"the text tower of {self.name!r} takes no embedded tokens: prompt tuning needs a plain CLIP, such as "
                "'ViT-B-32-quickgelu'"
            )
        tokens, words = self.tokenize(list(text)).to(self.device), self.tokenize([context])[0].to(self.device)
        n = int(words.argmax()) - 1
        for sentence, row in zip(text, tokens):
            if not torch.equal(row[: n + 1], words[: n + 1]):
                raise ValueError(f"the prompt {sentence!r} does not begin with {context!r}")
        return tokens[:, : int(tokens.argmax(1).max()) + 1], self.model.token_embedding(words[1 : n + 1]).detach()

    def encode_embedded(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Prompts whose first words are given as embeddings, with gradients.

        Args:
            tokens: (L, T) int64, from `embed_prompts`
            context: (B, n, W), one for each of B images, in place of the tokens at positions 1 to n

        Returns:
            (B, L, D), not of unit norm
        """
        model, (rows, length) = self.model, tokens.shape
        own = model.token_embedding(tokens).expand(len(context), rows, length, -1)
        shared = context[:, None].expand(-1, rows, -1, -1)
        x = torch.cat([own[:, :, :1], shared, own[:, :, 1 + context.shape[1] :]], dim=2).flatten(0, 1)
        with self._arithmetic():
            x = model.transformer(x + model.positional_embedding[:length], attn_mask=model.attn_mask[:length, :length])
            x = model.ln_final(x).unflatten(0, (len(context), rows))
            end = tokens.argmax(1)[None, :, None, None].expand(len(context), -1, 1, x.shape[-1])
            return x.gather(2, end)[:, :, 0] @ model.text_projection

    def check_cls(self) -> None:
        """Whether the image tower has a [CLS] token, which FAIR compares.

        Raises:
            ValueError: it has none: a ResNet, or a tower of timm's, as SigLIP's, whose head pools all tokens
        """
        if not isinstance(self.visual, VisionTransformer):
            raise ValueError(
                f"the image tower of {self.name!r} ({type(self.visual).__name__}) has no [CLS] token: "
                "leave cls=False, or choose a ViT such as 'ViT-B-32-quickgelu'"
            )

    def _sentences(self, text: list[str]) -> Tensor:
        tokens = self.tokenize(text).to(self.device)
        with self._arithmetic():
            feature = (
                tiny.text_features(self.model, tokens) if _plain_text(self.model) else self.model.encode_text(tokens)
            )
        return F.normalize(feature.float(), dim=-1)

    def _whole_view(self, picture: Tensor) -> np.ndarray:
        return crops.whole_view(*picture.shape[1:], self.image_size, self.squash)

    def _bf16_tower(self) -> nn.Module | None:
        """The image tower with bf16 weights beside float32 LayerNorms, as the weights are now; None where autocast is.

        It is used on a GPU, in bf16, without gradients. Copying the weights anew takes less than a thousandth of what a
        few batches take, and no change of them is missed.
        """
        wanted = self.device.type == "cuda" and self.precision == "bf16" and not torch.is_grad_enabled()
        if not (wanted and _plain(self.visual)):
            return None
        if self._half is None or not self._half.of(self.visual):
            self._half = _Half(self.visual)
        return self._half.refreshed()

    @torch.no_grad()
    def _stream(
        self, pieces: Iterable[tuple[Tensor, np.ndarray]], cls: bool, compile: bool, whole_batches: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Embed the views of pictures as they come, in batches filled across pictures: (rows, D), (rows, W) or None."""
        if cls:
            self.check_cls()
        found, held, rows = [], [], 0
        for picture, view in pieces:
            held.append((picture, view))
            rows += len(view)
            while rows >= self.batch_size:
                rest = len(view) - (rows - self.batch_size)
                found += self._batch([*held[:-1], (picture, view[:rest])], cls, compile, whole_batches)
                view, rows = view[rest:], rows - self.batch_size
                held = [(picture, view)]
        if rows:
            found += self._batch(held, cls, compile, whole_batches)
        if not cls:
            return _join(found, self.dim, self.device), None
        feature, token = zip(*found) if found else ([], [])
        return _join(feature, self.dim, self.device), _join(token, self.visual.transformer.width, self.device)

    def _batch(
        self, pieces: Sequence[tuple[Tensor, np.ndarray]], cls: bool, compile: bool, whole_batches: bool
    ) -> list:
        pictures, views = zip(*pieces)
        owner, view = np.arange(len(pieces)).repeat([len(view) for view in views]), np.concatenate(views)
        facts = (self.device, self.image_size, PRECISION[self.precision], self.mean, self.std)

        def run(start: int, stop: int) -> Tensor | tuple[Tensor, Tensor]:
            before = self._clock.now(self.device)
            part = owner[start:stop]
            x = crops.cut(pictures[part[0] : part[-1] + 1], part - part[0], view[start:stop], *facts)
            if (whole_batches or compile) and (short := (self._fits or self.batch_size) - len(x)) > 0:
                x = torch.cat([x, x.new_zeros(short, *x.shape[1:])])
            between = self._clock.now(self.device)
            found = self._features(x, cls, compile)
            self._clock.add(before, between, self._clock.now(self.device))
            return tuple(part[: stop - start] for part in found) if cls else found[: stop - start]

        return self._fitting(run, len(view))

    def _crops(self, pictures: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """The crops of some pictures, one after the other; on a GPU those of many pictures in one operation."""
        facts = {"size": self.image_size, "mean": self.mean, "std": self.std}
        pictures = [self._move(picture) for picture in pictures]
        if self.device.type == "cpu":
            return torch.cat([crops.extract(picture, rows, **facts) for picture, rows in zip(pictures, boxes)])
        found = []
        for group in _groups([picture.shape[1:] for picture in pictures]):
            rows = torch.nn.utils.rnn.pad_sequence([boxes[i] for i in group], batch_first=True)
            rows[..., 2:].clamp_(min=1)  # the padding is a box of one pixel
            cut = crops.extract([pictures[i] for i in group], rows, **facts)
            found += [cut[k, : len(boxes[i])] for k, i in enumerate(group)]
        return torch.cat(found)

    def _whole(self, picture: Tensor) -> Tensor:
        facts = {"size": self.image_size, "mean": self.mean, "std": self.std}
        if self.squash:
            height, width = picture.shape[1:]
            return crops.extract(self._move(picture), torch.tensor([[0.0, 0.0, width, height]]), **facts)
        return crops.whole(self._move(picture), **facts)[None]

    def _move(self, picture: Tensor) -> Tensor:
        if self.device.type == "cuda" and picture.device.type == "cpu":
            return picture.pin_memory().to(self.device, non_blocking=True)
        return picture.to(self.device)

    @torch.no_grad()
    def _encode(self, cut: Callable[[int, int], Tensor], count: int, cls: bool) -> tuple[Tensor, Tensor | None]:
        """Embed `cut(start, stop)`, (stop - start, 3, S, S) normalised: (count, D) and (count, W) tokens or None."""
        if cls:
            self.check_cls()

        def run(start: int, stop: int) -> Tensor | tuple[Tensor, Tensor]:
            before = self._clock.now(self.device)
            x = cut(start, stop)
            between = self._clock.now(self.device)
            found = self.features(x, cls)
            self._clock.add(before, between, self._clock.now(self.device))
            return found

        found = self._fitting(run, count)
        if cls:
            feature, token = zip(*found) if found else ([], [])
            return _join(feature, self.dim, self.device), _join(token, self.visual.transformer.width, self.device)
        return _join(found, self.dim, self.device), None

    def _fitting(self, run: Callable[[int, int], object], count: int) -> list:
        """[run(start, stop)] in batches of at most `batch_size` rows, halved as long as the device runs out of memory.

        What `run` extracts, moves and computes is all that a batch takes: everything is done again with half the rows.
        """
        found, start = [], 0
        while start < count:
            rows = min(self._fits or self.batch_size, count - start)
            try:
                found.append(run(start, start + rows))
                start += rows
            except torch.OutOfMemoryError as error:
                if rows == 1:
                    raise torch.OutOfMemoryError(
                        f"{self.name!r} does not fit {self.device} with one picture in {self.precision}: "
                        "take a smaller model, a lower precision or another device"
                    ) from error
                self._fits = (rows + 1) // 2
        return found

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Autocast, and attention by `scaled_dot_product_attention` whether there are gradients or not."""
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.autocast(self.device.type, PRECISION[self.precision], enabled=self.precision != "fp32"):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def load(
    name: str,
    pretrained: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    compile: bool | None = None,
    batch_size: int | None = None,
    runs_on: str | torch.device | None = None,
) -> Encoder:
    """Make an encoder.

    Args:
        name: an open_clip model ("ViT-B-32-quickgelu", "hf-hub:...", "local-dir:..."), "birdlets-tiny",
            "birdlets-tiny-1", "birdlets-tiny-2", "birdlets-tiny-whole", or a checkpoint file that tells its own
            architecture (OpenAI's layout)
        pretrained: an open_clip tag ("openai"), or a checkpoint file: a state dict of open_clip's (safetensors or
            `.pt`), OpenAI's archive, transformers' CLIPModel or the index of its shards (see `layouts`).
            None: the shipped weights of the birdlets models; random weights, the same in every process, and a warning
            for the others
        device: None is "cuda" where there is one, else "cpu"
        precision: "fp32" | "bf16" | "fp16"
        compile: run the image tower through `torch.compile`; None: for banks of many crops on a GPU
        batch_size: crops encoded at once; None chooses it from the size of a crop and the device, on a GPU from its
            memory too
        runs_on: the device that it will be moved to (`Encoder.to`) to do its work, for which precision and batch size
            are chosen; this machine need not have it. None is `device`

    Raises:
        ValueError: a name, tag, precision or device that does not exist; weights trained with QuickGELU for a model
            without it; a checkpoint that cannot be read or has other shapes
        FileNotFoundError: a checkpoint that is not there
        ConnectionError: weights that cannot be downloaded

    Example:
        >>> encoder = load("birdlets-tiny", device="cpu")
        >>> encoder.encode_text(["a photo of a bird.", "a photo of an orange beak."]).shape
        torch.Size([2, 128])
    """
    name = os.fspath(name)
    device = _device(device)
    target = torch.device(runs_on or device)
    _check_precision(precision, target)
    parts = sources.find(name, pretrained)
    batch_size = batch_size or _default_batch_size(parts.image_size, target, parts.model.visual)
    return Encoder(parts, name, device, precision, compile, batch_size, target)


def identity(name: str, pretrained: str | os.PathLike | None = None) -> str:
    """What tells weights apart before they are used: their fingerprint, of published ones `published.identity`.

    Args:
        name: as in `load`
        pretrained: as in `load`

    Raises:
        ValueError, FileNotFoundError: as `load`, for what is not there
    """
    if published.is_published(os.fspath(name).replace("/", "-"), pretrained):
        return published.identity(os.fspath(name).replace("/", "-"), pretrained)
    return load(name, pretrained, "cpu").fingerprint


def embed_text(
    encoder: Encoder,
    label: Sequence[str | Sequence[str]],
    description: Sequence[Sequence[str]],
    names: Sequence[str] | None = None,
) -> Text:
    """The text side of a classification problem from its sentences.

    Args:
        encoder: of the sentences
        label: C class prompts; a list of prompts (templates) stands for the re-normalised mean of their embeddings
        description: C lists of sentences, none empty
        names: C class names, only to make the errors readable

    Raises:
        ValueError: a class has no prompt or no description, or the number of classes differs
    """
    prompts = [[prompt] if isinstance(prompt, str) else list(prompt) for prompt in label]
    for c, (prompt, rows) in enumerate(zip(prompts, description)):
        if not prompt or isinstance(rows, str):
            wrong = "no prompt" if not prompt else f"the text {rows!r} and not a list of descriptions"
            raise ValueError(f"class {names[c] if names else c!r} has {wrong}: give it a list of at least one sentence")
    lists = [*prompts, *description]
    counts = [len(rows) for rows in lists]
    empty = torch.empty(sum(counts), 0).split(counts)
    Text.from_lists(torch.empty(len(prompts), 0), empty[len(prompts) :], names)  # raises before anything is encoded
    parts = encoder.encode_text([sentence for rows in lists for sentence in rows]).split(counts)
    mean = torch.stack([part.mean(0) for part in parts[: len(prompts)]])
    return Text.from_lists(F.normalize(mean, dim=-1), parts[len(prompts) :], names)


def _tower(visual: nn.Module, x: Tensor, cls: bool) -> tuple[Tensor, Tensor | None]:
    """(B, D) embeddings and, with `cls`, (B, W) [CLS] tokens of an image tower."""
    if _plain(visual):
        return tiny.image_features(visual, x)
    if cls:
        found = visual.forward_intermediates(
            x,
            indices=1,
            normalize_intermediates=visual.attn_pool is None,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return found["image_features"], found["image_intermediates_prefix"][0][:, 0]
    feature = visual(x)
    return (feature[0] if isinstance(feature, tuple) else feature), None


class _Norm(nn.LayerNorm):
    """A LayerNorm in float32 for bf16; compiled, torch makes one kernel of it and its neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        if crops.has_kernels(x.device) and not torch.compiler.is_compiling():
            from upclose import kernels

            return kernels.layer_norm(x, self.weight, self.bias, self.eps)
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class _Half:
    """An image tower with bf16 weights beside the float32 LayerNorms of another; bf16 flows between them."""

    def __init__(self, visual: nn.Module):
        self._weights = [*visual.parameters(), *visual.buffers()]
        norms = {id(w) for m in visual.modules() if isinstance(m, nn.LayerNorm) for w in m.parameters(recurse=False)}
        self._full = [w for w in self._weights if id(w) not in norms and w.is_floating_point()]
        self._copies = [nn.Parameter(w.detach().bfloat16(), requires_grad=False) for w in self._full]
        shared = {id(w): w for w in self._weights}
        self._tower = copy.deepcopy(visual, shared | {id(w): c for w, c in zip(self._full, self._copies)})
        for module in self._tower.modules():
            if isinstance(module, nn.LayerNorm):
                module.__class__ = _Norm

    def of(self, visual: nn.Module) -> bool:
        """Whether this tower was made from these very weights."""
        weights = [*visual.parameters(), *visual.buffers()]
        return len(weights) == len(self._weights) and all(a is b for a, b in zip(weights, self._weights))

    def refreshed(self) -> nn.Module:
        """The tower with the weights as they are now."""
        torch._foreach_copy_(self._copies, [w.detach() for w in self._full])
        return self._tower


@functools.cache
def _compiled_tower() -> Callable:
    return torch.compile(_tower)


def _plain(visual: nn.Module) -> bool:
    """Whether `tiny.image_features` computes what `visual(x)` would: a stock tower that nobody has hooked."""
    return (
        type(visual) is VisionTransformer
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and visual.proj is not None
        and not (
            visual.output_tokens or "forward" in vars(visual) or visual._forward_hooks or visual._forward_pre_hooks
        )
        and _plain_blocks(visual.transformer)
    )


def _plain_text(model: nn.Module) -> bool:
    """Whether `tiny.text_features` computes what `model.encode_text` would."""
    return (
        type(model) is CLIP
        and model.text_pool_type == "argmax"
        and model.attn_mask is not None
        and isinstance(model.text_projection, Tensor)
        and _plain_blocks(model.transformer)
    )


def _plain_blocks(transformer: Transformer) -> bool:
    return all(
        type(block) is ResidualAttentionBlock
        and isinstance(block.ls_1, nn.Identity)
        and isinstance(block.ls_2, nn.Identity)
        for block in transformer.resblocks
    )


def _groups(sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Neighbours whose common canvas, in uint8 and float32, takes at most `crops.BLOCK_BYTES`: their positions.

    Args:
        sizes: (H, W) of each picture
    """
    group, height, width = [], 0, 0
    for i, (tall, wide) in enumerate(sizes):
        height, width = max(height, tall), max(width, wide)
        if group and 15 * (len(group) + 1) * height * width > crops.BLOCK_BYTES:
            yield group
            group, height, width = [], tall, wide
        group.append(i)
    if group:
        yield group


def _distinct(box: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The distinct boxes of a picture, (n, 4) int64, and for each box, in a row, which of them it is."""
    rows = np.rint(box.cpu().numpy()).astype(np.int64).reshape(-1, 4)
    distinct, place = np.unique(rows, axis=0, return_inverse=True)
    return distinct, place.reshape(-1)


def _default_batch_size(image_size: int, device: torch.device, visual: nn.Module | None = None) -> int:
    """A power of two: on a GPU no faster with more pixels at once, and half of its memory at most."""
    if device.type == "cpu":
        return 64
    rows = 2**26 // image_size**2
    if device.type == "cuda" and torch.cuda.is_available():
        rows = min(rows, torch.cuda.get_device_properties(device).total_memory // (2 * _row_bytes(image_size, visual)))
    return 2 ** min(12, max(5, rows.bit_length() - 1))


def _row_bytes(image_size: int, visual: nn.Module | None) -> int:
    """About what a crop takes at most in an image tower, in float32: sixteen times the tokens of a transformer."""
    if isinstance(visual, VisionTransformer):
        return 4 * (16 * visual.positional_embedding.numel() + 3 * image_size**2)
    return 4 * 64 * 3 * image_size**2


def _check_picture(picture: Tensor) -> None:
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(f"a picture is {picture.dtype} {tuple(picture.shape)}: it must be uint8 (3, H, W)")


def _check_boxes(box: Tensor, height: int, width: int) -> None:
    if box.ndim < 2 or box.shape[-1] != 4:
        raise ValueError(f"boxes have shape {tuple(box.shape)}: they must be (N, 4), x0, y0, x1, y1 in pixels")
    crops.check_inside(box.cpu().numpy(), height, width)


class _Clock:
    """Seconds that cutting and encoding took: on the CPU the host's, on a GPU the device's, without a wait."""

    def __init__(self):
        self._total = [0.0, 0.0]
        self._open: deque[tuple] = deque()

    @staticmethod
    def now(device: torch.device) -> float | torch.cuda.Event:
        if device.type != "cuda" or not torch.cuda.is_initialized():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def add(self, *marks) -> None:
        """Before cutting, between, after encoding."""
        self._open.append(marks)
        self._settle()

    def spent(self) -> dict[str, float]:
        self._settle()
        return dict(zip(("cutting", "encoding"), self._total))

    def _settle(self) -> None:
        while self._open and (isinstance(self._open[0][2], float) or self._open[0][2].query()):
            a, b, c = self._open.popleft()
            for i, (start, end) in enumerate(((a, b), (b, c))):
                self._total[i] += end - start if isinstance(a, float) else start.elapsed_time(end) / 1000


def _join(rows: Sequence[Tensor], width: int, device: torch.device) -> Tensor:
    return torch.cat(list(rows)) if rows else torch.empty(0, width, device=device)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device '{device}' cannot be used here ({paths.reason(error)}): choose 'cpu'") from error
    return device


def _check_precision(precision: str, device: torch.device) -> None:
    if precision not in PRECISION:
        raise ValueError(f"unknown precision {precision!r}: choose fp32, bf16 or fp16")
    if device.type == "cpu" and precision == "fp16":
        raise ValueError("precision 'fp16' is for GPUs: on the CPU choose fp32, or bf16 where the processor has it")
    if device.type == "cpu" and precision == "bf16" and not bf16_on_cpu():
        warnings.warn("this processor has no bf16 instructions: bf16 is slower than fp32 here", stacklevel=3)


def bf16_on_cpu() -> bool:
    """Whether the processor multiplies bfloat16 matrices in hardware (AMX, AVX512-BF16, Arm's BF16)."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
