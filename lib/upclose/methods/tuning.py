"""What of an image tower is trained: its LayerNorms, LoRA's additions to the MLPs, or K-Adaptation's to the attention.

    W_qkv   (3W, W)       the packed query, key and value matrix of a block
    A_s     (t, t)        K-Adaptation's matrices, s = 1..t, shared between the blocks
    u_s     (W/t, rank)   and v_s (rank, W/t) of a block, so that A_s (x) u_s v_s^T is (W, W)

Source: FAIR (arXiv 2507.09615) section 4, Figure 9 and Table 10; Hu et al. 2022 (LoRA); He et al. 2023 (K-Adaptation,
arXiv 2203.16329).
"""

from __future__ import annotations

import math
import re
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from upclose import seeds

Tuning = Literal["layernorm", "lora", "k-adaptation"]

KRONECKER = 4
"""t, the number and side of K-Adaptation's shared matrices."""
LORA_TARGETS = r".*mlp\.(c_fc|c_proj|fc1|fc2)"
"""The names of the layers that LoRA adds to: the two matrices of every MLP of open_clip's or timm's ViT."""


def tune(visual: nn.Module, tuning: Tuning = "layernorm", *, rank: int = 4, seed: int = 0) -> dict[str, nn.Parameter]:
    """Freeze an image tower, in place, but for what a way of tuning trains.

    Args:
        visual: an open_clip image tower
        tuning: "layernorm": the affine parameters of all LayerNorms. "lora": low-rank additions to the two matrices of
            every MLP, by the peft library. "k-adaptation": sum_s A_s (x) u_s v_s^T added to the query and value
            matrices of every block, A shared between the blocks
        rank: of LoRA's matrices, and of u_s v_s^T
        seed: of the additions' initial values; the tower computes the same as before

    Returns:
        name -> parameter, all that is trained in the tower

    Raises:
        ValueError: an unknown tuning, rank < 1, or a tower that has nothing that it could train
        ImportError: "lora" without peft

    Source:
        FAIR section 4, "we focus on fine-tuning the layer-normalization weights"; Figure 9 and Table 10.

    Deviates:
        The paper does not say where its LoRA and K-Adaptation sit, nor their sizes. LoRA: the MLPs, since open_clip
        packs query, key and value in one parameter that is no Linear layer; lora_alpha = rank. K-Adaptation: query and
        value, t = `KRONECKER` matrices of side t.
    """
    if tuning not in get_args(Tuning):
        raise ValueError(f"tuning must be one of {', '.join(map(repr, get_args(Tuning)))}, not {tuning!r}")
    if rank < 1:
        raise ValueError(f"rank={rank}: LoRA and K-Adaptation add matrices of rank 1 or more")
    visual.requires_grad_(False)
    if tuning == "layernorm":
        for module in visual.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seeds.derive(seed, tuning))
            _add_lora(visual, rank) if tuning == "lora" else _add_kronecker(visual, rank)
    found = {name: weight for name, weight in visual.named_parameters() if weight.requires_grad}
    if not found:
        raise ValueError(f"tuning={tuning!r} finds nothing to train in a {type(visual).__name__}: take a ViT")
    return found


class _Kronecker(nn.Module):
    """W_qkv (3W, W) -> the same with sum_s A_s (x) u_s v_s^T added to W_q and W_v; 0 at the start."""

    def __init__(self, shared: nn.Parameter, width: int, rank: int):
        super().__init__()
        t, side = len(shared), width // len(shared)
        self.shared = shared
        self.u = nn.Parameter(torch.zeros(2, t, side, rank))
        self.v = nn.Parameter(torch.randn(2, t, rank, side) / math.sqrt(side))

    def forward(self, weight: Tensor) -> Tensor:
        query, key, value = weight.chunk(3)
        delta = torch.einsum("sab,psmr,psrn->pambn", self.shared, self.u, self.v).reshape(2, *query.shape)
        return torch.cat([query + delta[0], key, value + delta[1]])


def _add_kronecker(visual: nn.Module, rank: int) -> None:
    layers = [m for m in visual.modules() if isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None]
    shared = nn.Parameter(torch.randn(KRONECKER, KRONECKER, KRONECKER) / KRONECKER)
    for layer in layers:
        if layer.embed_dim % KRONECKER:
            raise ValueError(f"k-adaptation needs a width that {KRONECKER} divides, not {layer.embed_dim}")
        addition = _Kronecker(shared, layer.embed_dim, rank).to(layer.in_proj_weight.device)
        parametrize.register_parametrization(layer, "in_proj_weight", addition)


def _add_lora(visual: nn.Module, rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError('tuning="lora" uses the peft library: install it with `pip install peft`') from error
    if any(re.fullmatch(LORA_TARGETS, name) for name, _ in visual.named_modules()):
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS), visual)
