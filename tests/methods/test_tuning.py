"""What is trained of a tower; that training itself changes nothing else is `test_fair`'s."""

import sys

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from torch import nn

from upclose.methods import tuning


def test_vit_b_32_with_ten_classes_trains_45_056_parameters():
    with torch.device("meta"):
        visual = CLIP(**open_clip.get_model_config("ViT-B-32")).visual
    assert sum(weight.numel() for weight in tuning.tune(visual).values()) + 10 * visual.output_dim == 45_056


@pytest.mark.parametrize("way", ["layernorm", "k-adaptation"])
def test_a_tower_with_nothing_to_train_is_an_error(way):
    with pytest.raises(ValueError, match=f"tuning='{way}' finds nothing to train"):
        tuning.tune(nn.Sequential(nn.Linear(2, 2)), way)


def test_lora_of_a_tower_without_its_layers_is_an_error():
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="tuning='lora' finds nothing to train"):
        tuning.tune(nn.Sequential(nn.Linear(2, 2)), "lora")


def test_lora_without_peft_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        tuning.tune(nn.Sequential(nn.Linear(2, 2)), "lora")


@pytest.mark.parametrize(("way", "rank", "message"), [("all", 4, "tuning must be one of"), ("lora", 0, "rank=0")])
def test_a_way_that_there_is_not_is_an_error(way, rank, message):
    with pytest.raises(ValueError, match=message):
        tuning.tune(nn.Sequential(nn.LayerNorm(2)), way, rank=rank)
