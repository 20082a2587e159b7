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
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor, nn

from upclose import crops
from upclose.encode import fingerprint, sources, tiny
from upclose.features import Text

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        device, precision: where and in which arithmetic (autocast) the model runs
        batch_size: crops encoded at once; after the device ran out of memory fewer, for as long as this encoder lives:
            other batches than an undisturbed build has, whose features differ by rounding (cosine 1 - 1e-6)
    """

    def __init__(
        self,
        parts: sources.Parts,
        name: str,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        compile: bool = False,
        batch_size: int | None = None,
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
        self.batch_size = batch_size or _default_batch_size(self.image_size, self.device)
        self._parts = parts
        self._compile = compile
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
        """What the model's training multiplied cosines with before the softmax (100 for OpenAI's)."""
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
        return Encoder(parts, self.name, device, self.precision, self._compile, self.batch_size)

    def features(self, x: Tensor, cls: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Embed ready pictures in one batch; gradients flow to the weights and to `x`.

        Args:
            x: (B, 3, S, S) float, normalised with `mean` and `std`
            cls: also give the [CLS] token, after the tower's last LayerNorm and before the projection

        Returns:
            (B, D) float32 unit norm; with `cls` also (B, W) float32, as it is

        Raises:
            ValueError: `cls` of a tower that has no [CLS] token

        Deviates: attentional pooling (CoCa) has no LayerNorm of width W; there the token is the transformer's output.
        """
        self._check_cls(cls)
        with self._arithmetic():
            feature, token = (_compiled_tower() if self._compile else _tower)(self.visual, x, cls)
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

        def cut(start: int, stop: int) -> Tensor:
            part = range(bisect_right(first, start) - 1, bisect_left(first, stop))
            rows = [distinct[i][max(start - first[i], 0) : stop - first[i]] for i in part]
            return self._crops([pictures[i] for i in part], rows)

        feature, token = self._encode(cut, first[-1], cls)
        index = torch.cat(place or [torch.empty(0, dtype=torch.int64)]).to(self.device)
        feature = feature[index].view(*shape, feature.shape[-1])
        return (feature, token[index].view(*shape, token.shape[-1])) if cls else feature

    def encode_images(self, pixels: Sequence[Tensor], cls: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Embed whole pictures as CLIP does: short side resized to S, centre crop (or squashed, if the tag says so).

        Args:
            pixels: B pictures, uint8 (3, H, W)
            cls: also give the [CLS] tokens before projection

        Returns:
            (B, D) float32 unit norm; with `cls` also (B, W)

        Deviates: always bicubic, also where a tag was trained with bilinear resizing (MobileCLIP, PE).
        """
        for picture in pixels:
            _check_picture(picture)
        feature, token = self._encode(
            lambda start, stop: torch.cat([self._whole(pixels[i]) for i in range(start, stop)]), len(pixels), cls
        )
        return (feature, token) if cls else feature

    @torch.no_grad()
    def encode_text(self, text: Sequence[str]) -> Tensor:
        """Embed L sentences; each distinct one is encoded once for these weights and then remembered.

        Returns:
            (L, D) float32 unit norm
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

    def _check_cls(self, cls: bool) -> None:
        if cls and not isinstance(self.visual, VisionTransformer):
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
        self._check_cls(cls)
        found = self._fitting(lambda start, stop: self.features(cut(start, stop), cls), count)
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
    compile: bool = False,
    batch_size: int | None = None,
    runs_on: str | torch.device | None = None,
) -> Encoder:
    """Make an encoder.

    Args:
        name: an open_clip model ("ViT-B-32-quickgelu", "hf-hub:...", "local-dir:..."), "birdlets-tiny",
            "birdlets-tiny-whole", or a checkpoint file that tells its own architecture (OpenAI's layout)
        pretrained: an open_clip tag ("openai"), or a checkpoint file: safetensors or a `.pt` state dict.
            None: the shipped weights of the birdlets models; random weights, the same in every process, and a warning
            for the others
        device: None is "cuda" where there is one, else "cpu"
        precision: "fp32" | "bf16" | "fp16"; the latter two are autocast over float32 weights
        compile: run the image tower through `torch.compile`
        batch_size: crops encoded at once; None chooses it from the size of a crop and the device
        runs_on: the device that it will be moved to (`Encoder.to`) to do its work, for which precision and batch size
            are chosen; this machine need not have it. None is `device`

    Raises:
        ValueError: a name, tag, precision or device that does not exist; weights trained with QuickGELU for a model
            without it; a checkpoint that cannot be read or has other shapes
        FileNotFoundError: a checkpoint that is not there
        ConnectionError: weights that cannot be downloaded
    """
    name = os.fspath(name)
    device = _device(device)
    target = torch.device(runs_on or device)
    _check_precision(precision, target)
    parts = sources.find(name, pretrained)
    batch_size = batch_size or _default_batch_size(parts.image_size, target)
    return Encoder(parts, name, device, precision, compile, batch_size)


def identity(name: str, pretrained: str | os.PathLike | None = None) -> str:
    """What tells weights apart before they are used: their fingerprint, or "name:tag" where they come from the network.

    Args:
        name: as in `load`
        pretrained: as in `load`

    Raises:
        ValueError, FileNotFoundError: as `load`, for what is not there
    """
    if sources.is_published(name, pretrained):
        return f"{name}:{pretrained}"
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


def _distinct(box: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct boxes of a picture, (n, 4) on whole pixels, and for each box which of them it is."""
    return box.reshape(-1, 4).round().unique(dim=0, return_inverse=True)


def _default_batch_size(image_size: int, device: torch.device) -> int:
    if device.type == "cpu":
        return 64
    return min(1024, max(32, 2**24 // image_size**2))


def _check_picture(picture: Tensor) -> None:
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(f"a picture is {picture.dtype} {tuple(picture.shape)}: it must be uint8 (3, H, W)")


def _check_boxes(box: Tensor, height: int, width: int) -> None:
    if box.ndim < 2 or box.shape[-1] != 4:
        raise ValueError(f"boxes have shape {tuple(box.shape)}: they must be (N, 4), x0, y0, x1, y1 in pixels")
    x0, y0, x1, y1 = box.round().unbind(-1)
    wrong = ~((x0 >= 0) & (x0 < x1) & (x1 <= width) & (y0 >= 0) & (y0 < y1) & (y1 <= height))
    if wrong.any():
        first = tuple(box[wrong][0].tolist())
        raise ValueError(f"box {first} is empty or not inside the picture of width {width} and height {height}")


def _join(rows: Sequence[Tensor], width: int, device: torch.device) -> Tensor:
    return torch.cat(list(rows)) if rows else torch.empty(0, width, device=device)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device '{device}' cannot be used here ({sources.reason(error)}): choose 'cpu'") from error
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
