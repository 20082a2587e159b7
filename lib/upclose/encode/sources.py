"""Where models come from: names and tags of open_clip, checkpoint files, the shipped birdlets models."""

from __future__ import annotations

import difflib
import functools
import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import open_clip
import torch
from huggingface_hub import constants as hub
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from open_clip.model import build_model_from_openai_state_dict, convert_to_custom_text_state_dict
from open_clip.pretrained import download_pretrained_from_hf
from torch import Tensor, nn

from upclose import paths, shipped
from upclose.encode import fingerprint, layouts, published, tiny

_HUB_SECONDS = 5  # that the hub may take to answer
_REFUSED = {  # the first that fits
    GatedRepoError: "it is gated: agree to its terms on its page, then `hf auth login`",
    RevisionNotFoundError: "the repository has no such revision",
    RepositoryNotFoundError: "there is no such repository, or it is private: correct the name, or `hf auth login`",
    RemoteEntryNotFoundError: "the repository has no such file",
}
_Found = TypeVar("_Found")


class Parts(NamedTuple):
    """What an encoder is made of.

    Attributes:
        model: an open_clip model
        tokenize: list of L strings -> (L, context length) int64
        image_size: side of the square pictures that the image tower takes
        mean, std: per channel, of pixels in [0, 1]
        squash: whole pictures are squashed to the square, not resized by the short side and cropped
    """

    model: nn.Module
    tokenize: Callable[[list[str]], Tensor]
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    squash: bool = False


def find(name: str, pretrained: str | os.PathLike | None) -> Parts:
    """The parts that `encode.load`'s name and pretrained stand for, and its errors."""
    return _birdlets(name, pretrained) or _self_described(name, pretrained) or _from_open_clip(name, pretrained)


def get(name: str, tag: str, file: Path | None = None) -> tuple[Path, str]:
    """Fetch published weights, or take a file as them; whatever is to be kept has loaded first.

    Args:
        name: as `published.parse` gives it
        tag: likewise
        file: a checkpoint, see `layouts`; None: the hub is asked for what is not here

    Returns:
        where the weights lie, and the model's fingerprint

    Raises:
        ValueError: the file holds other tensors than the model, or none
        FileNotFoundError, ConnectionError: as `encode.load`
    """
    if file is None:
        found = fingerprint.of(find(name, tag).model)
        return published.cached(name, tag), found
    file = _existing(file)
    if file.name.endswith(".index.json"):
        raise ValueError(f"{file} is the index of several files: give one that holds all tensors")
    _check_activation(name, tag, open_clip.get_pretrained_cfg(name, tag))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tag tells the preprocessing
        found = fingerprint.of(find(name, str(file.absolute())).model)
    return published.keep(name, tag, file), found


def _birdlets(name: str, pretrained: str | os.PathLike | None) -> Parts | None:
    """One of the repository's own models, by name or by a safetensors file with its JSON beside it."""
    described = not pretrained and Path(name).suffix == ".safetensors" and Path(name).with_suffix(".json").is_file()
    if name not in tiny.NAMES and not described:
        return None
    return Parts(*tiny.load(_existing(pretrained) if pretrained else name))


def _self_described(name: str, pretrained: str | os.PathLike | None) -> Parts | None:
    """A checkpoint file given as the name: OpenAI's layout tells the architecture by its shapes."""
    if not _is_path(name):
        return None
    if pretrained:
        raise ValueError(
            f"{name!r} is a checkpoint file and has its own weights: leave pretrained={str(pretrained)!r} out"
        )
    state, openai, _ = layouts.read(_existing(name))
    if not openai:
        alike = _architectures(state)
        raise ValueError(
            f"{name} does not tell its architecture or activation: name the model, "
            f"load({alike[0] if alike else 'NAME'!r}, pretrained={name!r})"
        )
    try:
        model = build_model_from_openai_state_dict(dict(state), cast_dtype=None).float()
    except (KeyError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{name} begins like OpenAI's layout but is not whole ({paths.reason(error)}): get it again"
        ) from error
    _load_state(model, state, name, name)  # once more, since it was rounded to fp16
    return _parts(model, open_clip.tokenize, {})


def _from_open_clip(name: str, pretrained: str | os.PathLike | None) -> Parts:
    if name.startswith(("hf-hub:", "local-dir:")):
        return _from_hub(name, pretrained)
    name = name.replace("/", "-")
    names = open_clip.list_models()
    if name not in names:
        raise ValueError(
            f"unknown model {name!r}: {_nearest(name, [*tiny.NAMES, *names])}, or any of open_clip.list_models()"
        )
    wanted = None if pretrained is None else os.fspath(pretrained)
    tags = open_clip.list_pretrained_tags_by_model(name)
    state = None
    if wanted is None:
        warnings.warn(
            f"{name!r} without pretrained has random weights; tags: {', '.join(tags) or 'none'}", stacklevel=4
        )
        facts = {}
    elif _is_path(wanted):
        state, openai, quick_gelu = layouts.read(_existing(wanted))
        facts = {} if openai else _published(name, wanted, tags)
        facts = facts if quick_gelu is None else {**facts, "quick_gelu": quick_gelu}
    elif not (facts := open_clip.get_pretrained_cfg(name, wanted)):
        raise ValueError(_unknown_tag(name, wanted, tags))
    _check_activation(name, wanted, facts)
    file = None
    if wanted and state is None:
        if file := published.kept(name, wanted):
            _check_bytes(file, file.stem)
            state = layouts.read(file).state
        else:
            file = _download(published.pin(name, wanted), facts)
    model = _build(name)
    if file and not state:
        _load_published(model, file, published.pin(name, wanted))
    elif state:
        _load_state(model, state, name, wanted)
    return _parts(model, _tokenizer(name), facts)


def _from_hub(name: str, pretrained: str | os.PathLike | None) -> Parts:
    """A model with its own configuration: "hf-hub:owner/model" or "local-dir:folder"."""
    if pretrained:
        raise ValueError(f"{name!r} has its own weights: leave pretrained={str(pretrained)!r} out")
    model = _build(name, require_pretrained=True)
    return _parts(model, _tokenizer(name), model.visual.preprocess_cfg)


def _build(name: str, **options: bool) -> nn.Module:
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it says "initialized randomly" of models whose weights we load next
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            make = functools.partial(open_clip.create_model, name, pretrained_text=False, **options)
            return make() if name.startswith("local-dir:") else _fetch(make)
    except Exception as error:
        kind = ConnectionError if name.startswith("hf-hub:") else ValueError
        raise kind(
            f"{name!r} cannot be built ({_why(error)}): what it needs from the network must be in the cache"
        ) from error
    finally:
        logging.disable(quiet)


def _fetch(ask: Callable[[], _Found]) -> _Found:
    """What `ask` gives with the cache's files alone, else with the hub's, which a process tries to reach once.

    Raises:
        ConnectionError: the cache lacks something and the hub cannot be reached
    """
    asked, quiet = hub.HF_HUB_OFFLINE, logging.root.manager.disable
    try:
        hub.HF_HUB_OFFLINE = True
        logging.disable(logging.CRITICAL)
        return ask()
    except Exception as error:
        lacking = error
    finally:
        hub.HF_HUB_OFFLINE = asked
        logging.disable(quiet)
    if away := _away(asked):
        raise ConnectionError(f"{away}; with the cache alone: {paths.reason(lacking)}") from lacking
    return ask()


@functools.cache
def _away(offline: bool) -> str:
    """Why the hub is not asked for files, "" where it answers."""
    if offline:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(hub.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception as error:
        return f"{hub.ENDPOINT} cannot be reached: {paths.reason(error)}; HF_HUB_OFFLINE=1 says so beforehand"
    return ""


def _tokenizer(name: str) -> Callable[[list[str]], Tensor]:
    try:
        return _fetch(lambda: open_clip.get_tokenizer(name))
    except Exception as error:
        raise ConnectionError(
            f"the tokenizer of {name!r} is not in the cache and could not be downloaded ({_why(error)}): "
            "load it once where there is a network and copy the cache"
        ) from error


def _parts(model: nn.Module, tokenize: Callable[[list[str]], Tensor], facts: dict) -> Parts:
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"the model takes pictures of {width} x {height} pixels: only square ones are supported")
    mean, std, mode = _preprocessing(facts)
    return Parts(model, tokenize, height, mean, std, mode == "squash")


def _check_activation(name: str, pretrained: str | None, facts: dict) -> None:
    """QuickGELU weights in a model without it give wrong embeddings, and nothing else would tell."""
    wanted, applied = facts.get("quick_gelu"), bool(open_clip.get_model_config(name).get("quick_gelu"))
    if wanted and not applied:
        raise ValueError(
            f"{pretrained!r} was trained with QuickGELU, which {name!r} does without: "
            f"load({f'{name}-quickgelu'!r}, pretrained={pretrained!r})"
        )
    if applied and wanted is False:
        raise ValueError(
            f"{pretrained!r} was trained with GELU, but {name!r} applies QuickGELU: "
            f"load({name.removesuffix('-quickgelu')!r}, pretrained={pretrained!r})"
        )


def _published(name: str, path: str, tags: Sequence[str]) -> dict:
    """What the registry knows of a file: of that published name, else the preprocessing that all tags agree on."""
    known = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    for facts in known:
        if facts.get("url", "").rsplit("/", 1)[-1] == Path(path).name:
            return facts
    if known and all(_preprocessing(facts) == _preprocessing(known[0]) for facts in known):
        return dict(zip(("mean", "std", "resize_mode"), _preprocessing(known[0])))
    why = "its tags differ in it" if known else "it has no tags"
    warnings.warn(
        f"nothing tells the preprocessing that {path} was trained with as {name!r} ({why}): OpenAI's mean and std are "
        "taken, the short side is resized and the middle cut out",
        stacklevel=5,
    )
    return {}


def _preprocessing(facts: dict) -> tuple:
    mean, std = facts.get("mean", open_clip.OPENAI_DATASET_MEAN), facts.get("std", open_clip.OPENAI_DATASET_STD)
    return tuple(mean), tuple(std), facts.get("resize_mode", "shortest")


def _unknown_tag(name: str, tag: str, tags: Sequence[str]) -> str:
    others = [
        other for other in open_clip.list_pretrained_models_by_tag(tag) if other.startswith(name.split("-quick")[0])
    ]
    if others:
        return f"{name!r} has no weights {tag!r}, but {others[0]!r} has: load({others[0]!r}, pretrained={tag!r})"
    if not tags:
        return f"{name!r} has no published weights, so no {tag!r}: give a checkpoint file"
    return f"{name!r} has no weights {tag!r}: {_nearest(tag, tags)}; all: {', '.join(tags)}; or give a checkpoint file"


def _download(pin: published.Pin, facts: dict) -> str:
    def ask() -> str:
        if not pin.revision:
            return open_clip.download_pretrained(facts)
        return download_pretrained_from_hf(pin.hub, pin.file, pin.revision)

    try:
        return _fetch(ask)
    except Exception as error:
        source = f"{pin.hub} at revision {pin.revision[:12]}" if pin.revision else pin.hub or facts.get("url")
        raise ConnectionError(
            f"the weights {pin.tag!r} of {pin.name!r} are not in the cache and could not be downloaded from {source} "
            f"({_why(error)}): fetch the file where there is a network and give its path, "
            f"load({pin.name!r}, pretrained='/path/to/file'), or once for all, "
            f"`upclose weights get {pin.name}:{pin.tag} --from FILE`; 'birdlets-tiny' is shipped"
        ) from error


def _why(error: BaseException | None) -> str:
    """Why the hub gave no file: what it said of the repository, else the error's first line."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for kind, said in _REFUSED.items():
        if any(isinstance(each, kind) for each in chain):
            return said
    return paths.reason(error)


def _load_published(model: nn.Module, file: str, pin: published.Pin) -> None:
    _check_bytes(Path(file), pin.sha256)
    try:
        open_clip.load_checkpoint(model, file)
    except Exception as error:
        raise ValueError(
            f"{file}, downloaded as {pin.tag!r} of {pin.name!r}, cannot be loaded ({paths.reason(error)}): it is cut "
            "short or belongs to another model; remove it, and it is downloaded again"
        ) from error


def _check_bytes(file: Path, wanted: str = "") -> None:
    """A file has the checksum that is known of it, or by which it is called, as in the hub's cache."""
    stored = file.resolve()
    wanted = wanted or (stored.name if re.fullmatch("[0-9a-f]{64}", stored.name) else "")
    if wanted and shipped.sha256(stored) != wanted:
        raise ValueError(f"{stored} is not what was downloaded: its sha256 is not {wanted}; remove it")


def _is_path(name: str) -> bool:
    return name.endswith(layouts.SUFFIXES) or name.startswith(("/", "./", "../", "~")) or os.path.isfile(name)


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder: give the checkpoint file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}, nor a folder {path.parent}: correct the path")
    beside = [file.name for file in path.parent.iterdir() if file.name.endswith(layouts.SUFFIXES)]
    there = _nearest(path.name, beside) if beside else "none is beside it"
    raise FileNotFoundError(f"there is no checkpoint {path}: correct the path ({there})")


def _load_state(model: nn.Module, state: dict[str, Tensor], name: str, path: str) -> None:
    if hasattr(model, "text"):
        state = convert_to_custom_text_state_dict(state)
    wanted = model.state_dict()
    state = {key: value for key, value in state.items() if key in wanted or key not in dict(model.named_buffers())}
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in wanted and state[key].numel() == 1:
            state[key] = state[key].reshape(wanted[key].shape)
    if "logit_bias" not in wanted:
        state.pop("logit_bias", None)  # of training with a sigmoid: the same for all classes
    wrong = [
        f"{key} is {tuple(state[key].shape)} and not {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    wrong += [f"{key} is missing" for key in wanted if key not in state]
    wrong += [f"{key} has no place" for key in state if key not in wanted]
    if wrong:
        alike = _architectures(state)
        more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        hint = "name the model that it was trained as"
        if alike:
            hint = "it is not whole" if name in alike else f"its shapes are those of {', '.join(alike)}"
        raise ValueError(f"{path} does not fit {name!r} ({'; '.join(wrong[:2])}{more}): {hint}")
    model.load_state_dict(state)


def _architectures(state: dict[str, Tensor]) -> list[str]:
    """The open_clip models whose ViT has the width, depth, patches and picture size of a state dict."""
    patch, grid = state.get("visual.conv1.weight"), state.get("visual.positional_embedding")
    projection = state.get("text_projection", state.get("text.text_projection"))
    if patch is None or grid is None or projection is None or patch.ndim != 4:
        return []
    layers = len({key.split(".")[3] for key in state if key.startswith("visual.transformer.resblocks.")})
    size = round((len(grid) - 1) ** 0.5) * patch.shape[-1]
    found = (len(patch), layers, patch.shape[-1], size, projection.shape[-1])
    return [name for name in open_clip.list_models() if _shape(open_clip.get_model_config(name)) == found]


def _shape(config: dict) -> tuple:
    vision = config["vision_cfg"]
    return *(vision.get(key) for key in ("width", "layers", "patch_size", "image_size")), config["embed_dim"]


def _nearest(name: str, names: Sequence[str]) -> str:
    lower = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.3) or list(lower)[:3]
    return f"nearest: {', '.join(lower[other] for other in close)}"
