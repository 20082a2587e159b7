"""The encoder: pictures, crops and sentences to unit vectors, with any open_clip model.

This package is the only one that imports open_clip. B pictures, N crops a picture, L sentences, D embedding
dimensions, W the width of the image tower, S the side in pixels of what the tower takes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor, nn

from upclose import crops
from upclose.encode import sources, tiny
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
        batch_size: crops encoded at once
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
        state = _state(_weights(self.model).values())
        if self._hashed is None or self._hashed[0] != state:
            self._hashed = state, _hash(self.model)
        return self._hashed[1]

    def to(self, device: str | torch.device) -> Encoder:
        """The same model, moved to another device, with the same batch size."""
        return Encoder(self._parts, self.name, device, self.precision, self._compile, self.batch_size)

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
            ValueError: a picture is not uint8 (3, H, W), or boxes and pictures do not belong together
        """
        pictures, boxes = ([pixels], [box]) if isinstance(pixels, Tensor) and pixels.ndim == 3 else (pixels, box)
        if len(pictures) != len(boxes):
            raise ValueError(f"{len(pictures)} pictures but boxes for {len(boxes)}: give each picture its (N, 4) boxes")
        for picture, rows in zip(pictures, boxes):
            _check_picture(picture)
            _check_boxes(rows, *picture.shape[1:])
        shape = box.shape[:-1] if isinstance(box, Tensor) else (len(boxes), *(boxes[0].shape[:-1] if boxes else (0,)))
        distinct, place, count = [], [], 0
        for rows in boxes:
            unique, where = rows.reshape(-1, 4).round().unique(dim=0, return_inverse=True)
            distinct.append(unique)
            place.append(where + count)
            count += len(unique)
        feature, token = self._encode(self._crops(pictures, distinct), cls)
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
        feature, token = self._encode(map(self._whole, pixels), cls)
        return (feature, token) if cls else feature

    @torch.no_grad()
    def encode_text(self, text: Sequence[str]) -> Tensor:
        """Embed L sentences; each distinct one is encoded once for these weights and then remembered.

        Returns:
            (L, D) float32 unit norm
        """
        if isinstance(text, str):
            raise TypeError(f"encode_text takes a list of sentences: give [{text!r}]")
        state = _state(w for key, w in _weights(self.model).items() if not key.startswith("visual."))
        if state != self._text_state:
            self._text, self._text_state = {}, state
        new = [sentence for sentence in dict.fromkeys(text) if sentence not in self._text]
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            rows = torch.cat(self._fitting(self._sentences, self.tokenize(part).to(self.device)))
            self._text.update(zip(part, rows))
        return torch.stack([self._text[s] for s in text]) if text else torch.empty(0, self.dim, device=self.device)

    def _check_cls(self, cls: bool) -> None:
        if cls and not isinstance(self.visual, VisionTransformer):
            raise ValueError(
                f"the image tower of {self.name!r} ({type(self.visual).__name__}) has no [CLS] token: "
                "leave cls=False, or choose a ViT such as 'ViT-B-32-quickgelu'"
            )

    def _sentences(self, tokens: Tensor) -> Tensor:
        with self._arithmetic():
            feature = (
                tiny.text_features(self.model, tokens) if _plain_text(self.model) else self.model.encode_text(tokens)
            )
        return F.normalize(feature.float(), dim=-1)

    def _crops(self, pictures: Sequence[Tensor], boxes: Sequence[Tensor]) -> Iterator[Tensor]:
        for picture, rows in zip(pictures, boxes):
            pixels = self._move(picture)
            for part in rows.split(self.batch_size):
                if len(part):
                    yield crops.extract(pixels, part, self.image_size, mean=self.mean, std=self.std)

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
    def _encode(self, pieces: Iterable[Tensor], cls: bool) -> tuple[Tensor, Tensor | None]:
        """Pieces of normalised (n, 3, S, S) to (sum of n, D) and the (sum of n, W) tokens or None."""
        self._check_cls(cls)
        found = [part for x in _batches(pieces, self.batch_size) for part in self._fitting(self.features, x, cls)]
        if cls:
            feature, token = zip(*found) if found else ([], [])
            return _join(feature, self.dim, self.device), _join(token, self.visual.transformer.width, self.device)
        return _join(found, self.dim, self.device), None

    def _fitting(self, run: Callable, x: Tensor, *options: bool) -> list:
        """[run(part, *options)] for the parts of `x` that fit the device; halved as long as it runs out of memory."""
        while True:
            rows = min(self._fits or len(x), len(x))
            try:
                return [run(part, *options) for part in x.split(rows)]
            except torch.OutOfMemoryError as error:
                if rows == 1:
                    raise torch.OutOfMemoryError(
                        f"{self.name!r} does not fit {self.device} with one picture in {self.precision}: "
                        "take a smaller model, a lower precision or another device"
                    ) from error
            self._fits = (rows + 1) // 2

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

    Raises:
        ValueError: a name, tag, precision or device that does not exist; weights trained with QuickGELU for a model
            without it; a checkpoint that cannot be read or has other shapes
        FileNotFoundError: a checkpoint that is not there
        ConnectionError: weights that cannot be downloaded
    """
    name = os.fspath(name)
    device = _device(device)
    _check_precision(precision, device)
    return Encoder(sources.find(name, pretrained), name, device, precision, compile, batch_size)


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


def _batches(pieces: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """Pieces (n, ...) joined and cut into (rows, ...), the last one shorter."""
    held, count = [], 0
    for piece in pieces:
        held.append(piece)
        count += len(piece)
        if count >= rows:
            *full, rest = torch.cat(held).tensor_split(tuple(range(rows, count + 1, rows)))
            yield from full
            held, count = [rest], len(rest)
    if count:
        yield torch.cat(held)


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


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return dict((*model.named_parameters(), *model.named_buffers()))


def _state(weights: Iterable[Tensor]) -> tuple:
    """Differs as soon as a weight was written to: by autograd's rules (its version) or behind their back (its sum)."""
    weights = [weight.detach() for weight in weights]
    bits = [weight.contiguous().view(-1).view(torch.uint8) for weight in weights]
    sums = [(row if (len(row) | row.storage_offset()) % 8 else row.view(torch.int64)).sum() for row in bits]
    return (
        tuple((weight.data_ptr(), weight._version) for weight in weights),
        tuple(torch.stack(sums).tolist()) if sums else (),
    )


def _hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__name__}\n".encode())
    for name, weight in sorted(_weights(model).items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


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
