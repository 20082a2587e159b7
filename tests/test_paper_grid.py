"""A whole published table on miniature trees: real layouts, real names of weights, random numbers."""

import pytest

import trees
from upclose import compare, params, paths, report, run

SMALL = {"precision": "fp32", "epochs": 1, "seeds": [0, 1], "samples": 2}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::upclose.datasets.CountWarning")
def test_lares_first_table_fills_its_comparison(lab):
    file = paths.PARAMS / "papers" / "lare-table1.yaml"
    notebook = params.read(file).notebook
    if not (paths.NOTEBOOKS / f"{notebook}.ipynb").is_file():
        pytest.skip(f"the notebook {notebook} is not among those that have been run")
    lab("ViT-L-14-quickgelu", "openai", trees.CLIP)
    lab("coca_ViT-L-14", "laion2b_s13b_b90k", trees.COCA)
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::upclose.datasets.CountWarning")
def test_the_head_to_head_compares_methods_on_three_encoders(lab):
    """One data set of nine. No sentences can be fetched here, so that random words stand for descriptions."""
    file = paths.PARAMS / "papers" / "head-to-head.yaml"
    (own,) = [
        values for swept, values in params.cells(params.read(file), {"backbone": "x"}) if swept["dataset"] == "eurosat"
    ]
    methods = [name for name in own["methods"] if name != "CuPL"]
    small = {"precision": "fp32", "crop_seeds": [0, 1], "budgets": [1, 4, 16], "budget": 16, "tuning_images": 10}
    for name in ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu"):
        lab(name, "openai", trees.CLIP)
    trees.make(paths.data(), "eurosat", each=2)
    jobs = params.jobs(file, small | {"dataset": "eurosat", "source": "waffle", "methods": methods})
    outcomes = run.execute(run.prepare(jobs))
    assert [(outcome.status, outcome.error) for outcome in outcomes] == [("done", "")] * 3

    tested = report.matrix(paths.results())
    assert len(tested) == 3 * len(methods) * (len(methods) - 1) / 2
    assert set(tested.backbone) == {"ViT-B/32", "ViT-B/16", "ViT-L/14"}
    assert tested["same sign"].str.fullmatch("[0-3] of 3").all()
    measured = report.collect(paths.results())
    accuracy = measured[measured.metric == "top1"]
    assert set(accuracy.method) == set(methods)
    assert set(accuracy.n) == {20}
    assert {"1 encodings", "4 encodings", "16 encodings"} <= set(accuracy.setting)
