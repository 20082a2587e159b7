"""Checkpoint files in the layouts that people have, as state dicts by open_clip's names; nothing in them is run."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from upclose import paths

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".index.json")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.", "clip.", "clip_model.")
_OPENAI_FACTS = ("input_resolution", "context_length", "vocab_size")
_TRANSFORMERS = (  # CLIPModel's names, one after the other replaced by open_clip's
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_projection.weight", "text_projection"),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.", ".attn."),
)


class Checkpoint(NamedTuple):
    """What a file holds.

    Attributes:
        state: its tensors by open_clip's names, without wrappers and prefixes
        openai: it is in OpenAI's layout, which tells the architecture and means QuickGELU
        quick_gelu: whether the model applies it, None where neither the layout nor a configuration tells
    """

    state: dict[str, Tensor]
    openai: bool
    quick_gelu: bool | None


def read(path: Path) -> Checkpoint:
    """A checkpoint: a state dict (torch or safetensors), OpenAI's archive, transformers' CLIPModel, an index of shards.

    A `config.json` beside a CLIPModel tells its activation.

    Raises:
        ValueError: it holds something else, is cut short, or reading it would execute something
    """
    state = _unwrapped(path, _tensors(path))
    if any(key.startswith("vision_model.") for key in state):
        return Checkpoint(_from_transformers(path, state), False, _activation(path.with_name("config.json")))
    openai = any(key in state for key in _OPENAI_FACTS)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and key not in _OPENAI_FACTS}
    return Checkpoint(tensors, openai, openai or None)


def _tensors(path: Path) -> object:
    with path.open("rb") as file:
        head = file.read(100).lstrip()
    if head.startswith(b"<"):
        raise ValueError(
            f"{path} is a web page and no weights: an error, or a licence to agree to, was downloaded; get it again"
        )
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS and no weights: `git lfs pull` fetches them")
    try:
        if path.name.endswith(".index.json"):
            return _shards(path)
        return load_file(path) if path.suffix == ".safetensors" else _torch(path)
    except Exception as error:
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} cannot be read as weights: it asks for {asked[1]} to be executed, and nothing of it was; "
                "save its state dict as safetensors where you trust it"
            ) from error
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as weights ({paths.reason(error)}): "
            "it is cut short or holds something else than tensors; get it again, or save it as safetensors"
        ) from error


def _shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index of transformers names."""
    names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    files = [index.with_name(name) for name in names if Path(name).name == name]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{', '.join(missing)} of its {len(names)} files is not beside it")
    return {key: value for file in files for key, value in _tensors(file).items()}


def _unwrapped(path: Path, state: object) -> dict[str, Tensor]:
    """The state dict in a training program's checkpoint, its keys without what DDP, compile and wrappers put before."""
    while isinstance(state, dict) and (key := next((k for k in _WRAPPERS if isinstance(state.get(k), dict)), None)):
        state = state[key]
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict: save model.state_dict()")
    state = {str(key).replace("_orig_mod.", ""): value for key, value in state.items()}
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _from_transformers(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a CLIPModel by open_clip's names."""
    if "vision_model.embeddings.class_embedding" not in state:
        raise ValueError(
            f"{path} is a model of transformers and no CLIPModel (SigLIP, say): take the file that open_clip reads"
        )
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(".position_ids"):
            continue
        for theirs, ours in _TRANSFORMERS:
            key = key.replace(theirs, ours)
        found[key] = value.T if key in ("visual.proj", "text_projection") else value
    for key in [key for key in found if ".attn.q_proj." in key]:
        parts = [key.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if found.keys() >= {*parts}:
            found[key.replace(".q_proj.", ".in_proj_")] = torch.cat([found.pop(part) for part in parts])
    return found


def _activation(config: Path) -> bool | None:
    """Whether transformers' configuration names QuickGELU, None where there is none."""
    if not config.is_file():
        return None
    try:
        said = json.loads(config.read_bytes()).get("vision_config", {}).get("hidden_act", "quick_gelu")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{config} is no configuration of transformers ({paths.reason(error)}): get it again"
        ) from error
    return said == "quick_gelu"


_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Record:
    """What stands for every class of a TorchScript archive: it holds what it is given and does nothing."""

    def __setstate__(self, state: dict) -> None:
        self.held = state


class _Script(pickle.Unpickler):
    """The data of a TorchScript archive. Its classes become records, its numbers tensors, all else is refused."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] == "__torch__":
            return _Record
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch.jit._pickle":
            return lambda value, *_: value  # lists with a type, and values with a tag
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda flat, offset, size, stride, *_: flat.as_strided(size, stride, offset).clone()
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is in no archive of weights")

    def persistent_load(self, pid: tuple) -> Tensor:
        _, dtype, key, *_ = pid
        content = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def script_state(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript archive, of whose program nothing is executed."""
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("/data.pkl")
        return dict(_held(_Script(archive, root).load()))


def _held(record: _Record, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in record.held.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Record):
            yield from _held(value, f"{prefix}{name}.")


def _torch(path: Path) -> dict:
    """A `.pt` file: tensors only, or a TorchScript archive as OpenAI published them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            script = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if script:
            return script_state(path)
    return torch.load(path, map_location="cpu", weights_only=True)
