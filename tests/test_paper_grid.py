"""A whole published table on miniature trees: real layouts, real names of weights, random numbers."""

import json

import open_clip
import pytest
from safetensors.torch import save_file

import trees
from upclose import compare, params, paths, report, run

SMALL = {"precision": "fp32", "epochs": 1, "seeds": [0, 1], "samples": 2}
VISION = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
CLIP = {"embed_dim": 64, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
COCA = {
    "embed_dim": 64,
    "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": {**TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "context_length": 76, "attn_pooler_heads": 1},
    "custom_text": True,
}


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """An empty machine; gives a maker of small models under published names, with random weights in the hub's cache."""
    for name in ("CACHE", "DATA", "RESULTS"):
        monkeypatch.setenv(f"UPCLOSE_{name}", str(tmp_path / name.lower()))
    monkeypatch.delenv("UPCLOSE_BANK", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})
    configs, startup = tmp_path / "configs", tmp_path / "ipython" / "profile_default" / "startup"
    configs.mkdir()
    startup.mkdir(parents=True)  # what every kernel does before its first cell
    (startup / "00.py").write_text(f"import open_clip\nopen_clip.add_model_config(r'{configs}')\n")

    def shrink(name, pretrained, config):
        (configs / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(configs)
        (hub,) = compare.backbones().query("name == @name and pretrained == @pretrained").hub
        folder = tmp_path / "hub" / f"models--{hub.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        state = open_clip.create_model(name, pretrained_text=False).state_dict()
        save_file(
            {key: value.clone() for key, value in state.items()},
            folder / "snapshots" / ("0" * 40) / "open_clip_model.safetensors",
        )

    return shrink


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::upclose.datasets.CountWarning")
def test_lares_first_table_fills_its_comparison(lab):
    file = paths.PARAMS / "papers" / "lare-table1.yaml"
    notebook = params.read(file).notebook
    if not (paths.NOTEBOOKS / f"{notebook}.ipynb").is_file():
        pytest.skip(f"the notebook {notebook} is not among those that have been run")
    lab("ViT-L-14-quickgelu", "openai", CLIP)
    lab("coca_ViT-L-14", "laion2b_s13b_b90k", COCA)
    for dataset in ("cub", "cub-painting", "domainnet-40"):
        trees.make(paths.data(), dataset, each=5)
    outcomes = run.execute(run.prepare(params.jobs(file, SMALL)))
    assert [(outcome.status, outcome.error) for outcome in outcomes] == [("done", "")] * 4

    measured = report.collect(paths.results())
    frame = compare.versus(measured, "LARE", "Table 1")
    assert len(frame) == len(measured) == 48
    assert not measured.duplicated(compare.KEYS).any()
    joined = frame.merge(measured, on=compare.KEYS, suffixes=("", "_measured"))
    assert len(joined) == 48, "a measured cell has no published one"
    assert (joined.ours == joined.value_measured).all()
    assert (joined.ours_std.notna() == (joined.method != "zero-shot")).all()
    assert joined.status.str.fullmatch(r"reproduced|off by [+-]\d+\.\d|inconsistent in print").all()
    assert (joined.status == "inconsistent in print").sum() == 1
    images = joined.drop_duplicates(["dataset", "setting"]).set_index(["dataset", "setting"]).n
    assert images["cub-painting"].to_dict() == {"in-domain": 1000, "out-of-domain": 1000, "extended": 2000}
    assert images["domainnet-40"].to_dict() == {"in-domain": 200, "out-of-domain": 600, "extended": 800}
    assert {outcome.status for outcome in run.execute(run.prepare(params.jobs(file, SMALL)))} == {"complete"}
