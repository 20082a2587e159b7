"""birdlets-tiny: a small CLIP for the embedded world, in open_clip's own module, with a word tokenizer.

A model is two files in `upclose/weights`: `<name>.safetensors` (fp16) and `<name>.json`, which has open_clip's keys
`model_cfg` and `preprocess_cfg`, the words of the tokenizer, and the sha256 of the weights. The state dict is that of
`open_clip.model.CLIP`: copied to a folder as `open_clip_model.safetensors` and `open_clip_config.json`, the two files
load with `open_clip.create_model("local-dir:FOLDER")`.

Tokens: 0 pads, then one a known word, `BUCKETS` for all other words, begin, end. End is the largest, which is where
open_clip's "argmax" pooling reads the text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from upclose import paths, seeds, shipped

NAMES = ("birdlets-tiny", "birdlets-tiny-1", "birdlets-tiny-2", "birdlets-tiny-whole")
BUCKETS = 64
CONTEXT = 32
MEAN = STD = (0.5, 0.5, 0.5)
CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 48, "patch_size": 8, "width": 128, "head_width": 32, "layers": 4, "mlp_ratio": 4.0},
    "text_cfg": {"context_length": CONTEXT, "width": 128, "heads": 4, "layers": 3},
}
_WORD = re.compile(r"[^\W\d_]+")


class Loaded(NamedTuple):
    """A model that is ready to use.

    Attributes:
        model: in fp32, in eval mode
        tokenize: L sentences -> (L, context) int64
        image_size: side of the square pictures that it reads
        mean, std: (3,) of the pixels in [0, 1]
    """

    model: CLIP
    tokenize: Callable[[Sequence[str]], Tensor]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def words_of(sentence: str) -> list[str]:
    """The lower-case words of a sentence; whatever is not a letter separates ("orange-billed" is two words)."""
    return _WORD.findall(sentence.lower())


def tokenizer(words: Sequence[str], context: int = CONTEXT) -> Callable[[Sequence[str]], Tensor]:
    """A function from L sentences to (L, context) int64 tokens.

    A word that is not in `words` becomes one of `BUCKETS` tokens by its hash. A sentence that is too long loses its
    last words and keeps the end token.
    """
    number = {word: 1 + i for i, word in enumerate(words)}
    begin = 1 + len(words) + BUCKETS

    def tokenize(sentences: Sequence[str]) -> Tensor:
        rows = torch.zeros(len(sentences), context, dtype=torch.int64)
        for row, sentence in zip(rows, sentences):
            tokens = [number[w] if w in number else 1 + len(words) + _bucket(w) for w in words_of(sentence)]
            tokens = [begin, *tokens[: context - 2], begin + 1]
            row[: len(tokens)] = torch.tensor(tokens)
        return rows

    return tokenize


def _bucket(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "little") % BUCKETS


def build(config: dict, words: Sequence[str], seed: int = 0) -> CLIP:
    """A new model with random weights.

    Args:
        config: open_clip's `embed_dim`, `vision_cfg`, `text_cfg`; the vocabulary's size is filled in
        words: of the tokenizer
        seed: same seed, same weights
    """
    text = {**config["text_cfg"], "vocab_size": 1 + len(words) + BUCKETS + 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "weights"))
        return CLIP(**{**config, "text_cfg": text})


def save(folder: str | os.PathLike, name: str, model: CLIP, config: dict, words: Sequence[str]) -> str:
    """Write `<name>.safetensors` in fp16 and `<name>.json`; returns the sha256 of the weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = save_tensors({key: value.detach().half().contiguous() for key, value in model.state_dict().items()})
    sha256 = hashlib.sha256(weights).hexdigest()
    text = {**config["text_cfg"], "vocab_size": model.vocab_size}
    card = {
        "model_cfg": {**config, "text_cfg": text},
        "preprocess_cfg": {"size": config["vision_cfg"]["image_size"], "mean": MEAN, "std": STD},
        "words": list(words),
        "sha256": sha256,
    }
    paths.write(folder / f"{name}.safetensors", weights)
    paths.write(folder / f"{name}.json", (json.dumps(card, indent=1) + "\n").encode())
    if folder == paths.WEIGHTS:
        shipped.write()
    return sha256


def load(name_or_path: str | os.PathLike) -> Loaded:
    """Read a model: one of `NAMES`, or the path of a `.safetensors` file with its `.json` beside it.

    Raises:
        ValueError: no such model, a file that is missing or damaged, or weights that are not the ones the JSON names
    """
    path = paths.WEIGHTS / f"{name_or_path}.safetensors" if name_or_path in NAMES else Path(name_or_path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"unknown model {str(name_or_path)!r}: choose one of {', '.join(NAMES)} or a .safetensors file"
        )
    for file in (path, path.with_suffix(".json")):
        if not file.is_file():
            raise ValueError(f"{file} is missing: restore it or make it with `python -m upclose.train {path.stem}`")
        shipped.checked(file)
    try:
        card = json.loads(path.with_suffix(".json").read_text())
        config, size = card["model_cfg"], card["preprocess_cfg"]
        words, sha256 = card["words"], card["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.with_suffix('.json')} is not a model's JSON ({error!r}): restore it") from None
    weights = path.read_bytes()
    if hashlib.sha256(weights).hexdigest() != sha256:
        raise ValueError(
            f"{path} ({len(weights):,} bytes) is cut short or belongs to another model: "
            f"its sha256 is not the {sha256[:12]}... of {path.with_suffix('.json').name}; restore both files together"
        )
    model = build(config, words)
    model.load_state_dict({key: value.float() for key, value in load_tensors(weights).items()})
    tokenize = tokenizer(words, config["text_cfg"]["context_length"])
    return Loaded(model.eval(), tokenize, size["size"], tuple(size["mean"]), tuple(size["std"]))


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) as the models read it."""
    return (pixels.float() / 255 - MEAN[0]) / STD[0]


def image_features(
    visual: nn.Module, x: Tensor, attend: Callable[..., Tensor] = F.scaled_dot_product_attention
) -> tuple[Tensor, Tensor]:
    """`visual(x)` by a shorter way, and the [CLS] token before projection.

    The last block computes [CLS] alone. Equal to open_clip's forward but for rounding, with gradients, about 1.4
    times as fast with four blocks. Best on a CPU in batches of 16 to 64, whose activations stay in the cache.

    Args:
        visual: an open_clip `VisionTransformer` with default blocks and [CLS] pooling
        x: (B, 3, S, S) normalised
        attend: called as PyTorch's scaled dot product attention is

    Returns:
        (B, D) embedding, not normalised; (B, W) [CLS] after the last LayerNorm
    """
    x = visual._embeds(x)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = _block(block, x, x, attend)
    cls = visual.ln_post(_block(last, x[:, :1], x, attend)[:, 0])
    return cls @ visual.proj, cls


def text_features(model: CLIP, tokens: Tensor, chunk: int = 128) -> Tensor:
    """`model.encode_text(tokens)` by a shorter way: sorted by length, trimmed, the last block for the end token alone.

    Args:
        model: an open_clip CLIP with a causal text tower and "argmax" pooling
        tokens: (L, context) int64
        chunk: how many texts are trimmed to one length

    Returns:
        (L, D) embedding, not normalised
    """
    end = tokens.argmax(1)
    order = end.argsort(stable=True)
    parts = [trimmed_features(model, tokens[rows, : int(end[rows].max()) + 1]) for rows in order.split(chunk)]
    return torch.cat(parts)[order.argsort()]


def trimmed_features(
    model: CLIP, tokens: Tensor, attend: Callable[..., Tensor] = F.scaled_dot_product_attention
) -> Tensor:
    """`text_features` of tokens (L, length) that are as long as the longest text: a GPU need not be asked for it."""
    (count, length), end = tokens.shape, tokens.argmax(1)
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    row = torch.arange(count, device=tokens.device)
    *blocks, last = model.transformer.resblocks
    for block in blocks:
        x = _block(block, x, x, attend, model.attn_mask[:length, :length])
    x = _block(last, x[row, end][:, None], x, attend, model.attn_mask[end, None, None, :length])
    return model.ln_final(x[:, 0]) @ model.text_projection


def _block(
    block: nn.Module, query: Tensor, x: Tensor, attend: Callable[..., Tensor], mask: Tensor | None = None
) -> Tensor:
    """A residual attention block for the tokens `query` (B, Q, W) among the tokens `x` (B, T, W)."""
    attention, (b, n, w) = block.attn, query.shape
    heads = (attention.num_heads, w // attention.num_heads)
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    if query is x:
        q, k, v = F.linear(block.ln_1(x), weight, bias).view(b, n, 3, *heads).permute(2, 0, 3, 1, 4)
    else:
        q = F.linear(block.ln_1(query), weight[:w], bias[:w]).view(b, n, *heads).transpose(1, 2)
        k, v = F.linear(block.ln_1(x), weight[w:], bias[w:]).view(b, -1, 2, *heads).permute(2, 0, 3, 1, 4)
    mixed = attend(q, k, v, attn_mask=mask)
    query = query + attention.out_proj(mixed.transpose(1, 2).reshape(b, n, w))
    return query + block.mlp(block.ln_2(query))
