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
