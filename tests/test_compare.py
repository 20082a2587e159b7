import numpy as np
import pandas as pd
import pytest
import torch

from upclose import claims, cli, compare, report


def row(value, n=1000, std=0.0, **changes):
    keys = dict(zip(compare.KEYS, ("LGCA", "Table 1", "CLIP", "cub", "ViT-B/32", "zero-shot", "top1"))) | changes
    return keys | {"value": value, "std": std, "n": n, "run": "r"}


def status(measured, **where):
    frame = compare.versus(pd.DataFrame(measured), "LGCA")
    for column, wanted in ({"method": "CLIP", "dataset": "cub", "backbone": "ViT-B/32"} | where).items():
        frame = frame[frame[column] == wanted]
    return frame.status.item()


def printed():
    frame = compare.published("LGCA", "Table 1")
    return frame[(frame.method == "CLIP") & (frame.dataset == "cub") & (frame.backbone == "ViT-B/32")].value.item()


def test_tolerance_is_two_standard_errors_of_images_and_crop_sets():
    assert compare.sampling_variance(50, 2500) == 1
    assert compare.sampling_variance(50, 0) == 0
    assert compare.tolerance(1, 0, 0) == pytest.approx(1.96)
    assert compare.tolerance(1, 1, np.nan) == pytest.approx(1.96 * np.sqrt(2))
    assert compare.tolerance(0, 3, 4) == pytest.approx(1.96 * 5)


def test_status_of_a_value():
    assert status([row(printed() + 0.5)]) == "reproduced"
    assert status([row(printed() - 20)]) == "off by -20.0"
    assert status([row(printed() + 0.5)], dataset="dtd") == "not run here"


def test_the_last_of_two_runs_counts():
    assert status([row(printed()), row(printed() + 20)]) == "off by +20.0"


def test_rivals_are_cited_and_notes_are_inconsistent():
    frame = compare.versus(pd.DataFrame([row(1)]), "FAIR")
    assert set(frame[frame.method == "UPL"].status) == {"cited, not run"}
    assert set(frame[frame.method == "FAIR (w/ CODER PL)"].status) == {"cited, not run"}
    noted = frame[(frame.note != "") & (frame.method == "CLIP")]
    assert set(noted.status) == {"inconsistent in print"}


def test_digest_without_a_backbone_is_compared_with_rn50():
    keys = {"paper": "D&D", "table": "Table 5", "method": "D&D", "dataset": "ucf101", "setting": "ablation"}
    frame = compare.versus(pd.DataFrame([row(62.0, backbone="RN50", **keys)]), "D&D", "Table 5")
    assert frame[frame.method == "D&D"].ours.item() == 62.0


def test_what_no_table_prints_is_listed_once():
    keys = {"paper": "LaZSL", "table": "Table 3", "backbone": "ViT-B/16", "setting": "ablation"}
    cells = [row(60.0 + k, dataset="cub", method=m, **keys) for k, m in enumerate(("Baseline", "LaZSL"))]
    control = row(58.0, dataset="cub", method="Baseline+OT, mean", **keys)
    world = row(30.0, std=1.5, n=600, dataset="birdlets", method="LaZSL", **keys)
    measured = pd.DataFrame([*cells, control, world, world | {"value": 31.0}])
    met, left = compare.versus(measured, "LaZSL", "Table 3"), compare.unprinted(measured, "LaZSL")
    assert met.ours.notna().sum() == 2
    assert list(zip(left.method, left.dataset)) == [("Baseline+OT, mean", "cub"), ("LaZSL", "birdlets")]
    assert left.iloc[1][["ours", "ours_std", "n", "status"]].tolist() == [31.0, 1.5, 600, "no published value"]
    assert left[["value", "difference"]].isna().all().all()
    assert set(left) <= set(met)
    assert compare.unprinted(measured[:2], "LaZSL").empty
    assert len(compare.unprinted(measured, "LGCA")) == 4


def test_a_digest_without_a_backbone_prints_what_was_measured_on_any():
    keys = {"paper": "D&D", "table": "Table 5", "method": "D&D", "setting": "ablation", "backbone": "RN50"}
    measured = pd.DataFrame([row(62.0, dataset="ucf101", **keys), row(30.0, dataset="birdlets", **keys)])
    assert compare.unprinted(measured, "D&D").dataset.tolist() == ["birdlets"]


def test_unknown_paper_or_table():
    with pytest.raises(ValueError, match="no published paper 'X'; there are D&D"):
        compare.published("X")
    with pytest.raises(ValueError, match="no published table 'Table 9'"):
        compare.published("LGCA", "Table 9")


def test_backbone_labels():
    assert compare.backbone_label("ViT-B-32-quickgelu", "openai") == "ViT-B/32"
    assert compare.backbone_label("ViT-B-32-quickgelu", "metaclip_400m") == "MetaCLIP ViT-B/32"
    assert compare.backbone_label("coca_ViT-L-14", "laion2b_s13b_b90k") == "CoCa ViT-L/14"
    assert compare.backbone_label("birdlets-tiny") == "birdlets-tiny"


def test_averages_need_every_data_set_of_their_row():
    keys = [("LaZSL", "Table 2", "CLIP", d, "ViT-B/16") for d in ("imagenet-v2", "imagenet-r", "imagenet-sketch")]
    part = compare.account(pd.DataFrame(keys, columns=compare.KEYS[:5]))
    full = compare.account(pd.DataFrame([*keys, (*keys[0][:3], "imagenet-a", "ViT-B/16")], columns=compare.KEYS[:5]))
    assert (part.account == "runnable").sum() == 3
    assert (full.account == "runnable").sum() == 5


SHIFT = {"paper": "LaZSL", "table": "Table 2", "backbone": "ViT-B/16", "setting": "domain shift"}
SHIFTED = {"imagenet-v2": 60.0, "imagenet-r": 74.0, "imagenet-sketch": 46.0, "imagenet-a": 50.0}


def average(measured, paper="LaZSL", table="Table 2", **where):
    frame = compare.versus(pd.DataFrame(measured), paper, table)
    for column, wanted in ({"method": "CLIP", "dataset": "average"} | where).items():
        frame = frame[frame[column] == wanted]
    return frame.squeeze()


def test_an_average_is_filled_from_its_cells():
    cells = [row(v, n=1000, std=2.0, dataset=d, **SHIFT) for d, v in SHIFTED.items()]
    line = average(cells)
    assert line.value == 57.2
    assert line.ours == 57.5  # (60 + 74 + 46 + 50) / 4
    assert line.n == 4000
    assert line.ours_std == pytest.approx(1.0)  # sqrt(4 * 2^2) / 4
    # (60*40 + 74*26 + 46*54 + 50*50) / 1000 = 9.308 points squared, over 4^2
    assert line.tolerance == pytest.approx(1.96 * np.sqrt(9.308 / 16 + 1))
    assert line.status == "reproduced"
    assert average([cell | {"value": cell["value"] + 9} for cell in cells]).status == "off by +9.3"
    assert np.isnan(average([cell | {"std": np.nan} for cell in cells]).ours_std)
    assert average(cells, method="LaZSL").status == "inconsistent in print"


def test_an_average_without_all_of_its_cells_is_incomplete():
    cells = [row(v, dataset=d, **SHIFT) for d, v in SHIFTED.items()]
    line = average(cells[:3])
    assert line.status == "incomplete: 3 of 4 data sets"
    assert np.isnan(line.ours)
    assert average([*cells[:3], row(99, dataset="cub", **SHIFT)]).status == "incomplete: 3 of 4 data sets"
    assert average([row(1, dataset="average", **SHIFT)]).status == "not run here"
    assert average([c | {"setting": "zero-shot"} for c in cells]).status == "not run here"


def test_an_average_that_is_printed_alone_says_over_how_many():
    keys = {"paper": "FAIR", "table": "Table 5", "method": "FAIR", "setting": "S_i only"}
    cells = [row(70.0 + k, dataset=d, **keys) for k, d in enumerate(("dtd", "eurosat", "cub", "aid", "food101", "x"))]
    assert average(cells, **keys).ours == 72.5
    assert average(cells[:5], **keys).status == "incomplete: 5 of 6 data sets"


def test_a_table_a_paper_is_written_and_escaped(tmp_path):
    files = report.tables(pd.DataFrame([row(printed())]), tmp_path / "tables")
    assert [f.name for f in files[:2]] == ["dnd.csv", "dnd.html"]
    assert len(files) == 2 * len(compare.papers())
    table = pd.read_csv(tmp_path / "tables" / "lgca.csv")
    assert (table.status == "reproduced").sum() == 1
    fair = (tmp_path / "tables" / "fair.html").read_text()
    assert "S_i and |S_i - S_j|" in fair
    assert "<title>D&amp;D" in (tmp_path / "tables" / "dnd.html").read_text()
    assert "<script" not in fair


def test_complete_runs_are_collected_and_the_newest_counts(tmp_path, capsys):
    for day, name, value in (
        ("2026-01-02", "b", printed()),
        ("2026-01-01", "a", 1.0),
        ("2026-01-03", ".partial-c", 2.0),
    ):
        folder = tmp_path / day / name
        folder.mkdir(parents=True)
        pd.DataFrame([row(value, std=np.nan, setting="zero-shot"), row(value, setting="")]).to_csv(
            folder / "metrics.csv", index=False
        )
        if name != ".partial-c":
            (folder / "run.json").write_text("{}")
    frame = report.collect(tmp_path)
    assert frame.value.tolist() == [1.0, 1.0, printed(), printed()]
    assert frame.setting.tolist() == ["zero-shot", ""] * 2
    assert status(frame) == "reproduced"
    assert cli.main(["compare", "--results", str(tmp_path)]) == 0
    assert "reproduced" in capsys.readouterr().out
    assert (pd.read_csv(tmp_path / "compare" / "lgca.csv").status == "reproduced").sum() == 1


def test_nothing_to_compare_is_one_sentence(tmp_path, capsys):
    assert cli.main(["compare", "--results", str(tmp_path)]) == 2
    assert "no complete run" in capsys.readouterr().err


def head_to_head(folder, share, backbone="x"):
    """A complete run that compared two methods."""
    right = np.random.default_rng(0).random((3, 200))
    found = claims.pairs(
        {"A": torch.from_numpy(right < share), "<b>": torch.from_numpy(right < 0.5)},
        dataset="cub", backbone=backbone, setting="16 encodings",
    )  # fmt: skip
    folder.mkdir(parents=True)
    found.to_csv(folder / "pairs.csv", index=False)
    pd.DataFrame([row(1.0)]).to_csv(folder / "metrics.csv", index=False)
    (folder / "run.json").write_text("{}")
    return claims.matrix(found)


def test_compare_writes_method_against_method_from_the_newest_run(tmp_path, capsys):
    head_to_head(tmp_path / "2026-01-01" / "old", 0.2)
    new = head_to_head(tmp_path / "2026-01-02" / "new", 0.8)
    head_to_head(tmp_path / "2026-01-02" / "other", 0.3, "y")
    assert cli.main(["compare", "--results", str(tmp_path)]) == 0
    assert "methods.html" in capsys.readouterr().out
    written = pd.read_csv(tmp_path / "compare" / "methods.csv")
    assert written.backbone.tolist() == ["x", "y"]
    assert written["same sign"].tolist() == ["1 of 2"] * 2
    line = written.iloc[0]
    for column in ("difference", "low", "high", "p", "p after Holm", "n"):
        assert line[column] == pytest.approx(new[column][0], abs=1e-4)
    page = (tmp_path / "compare" / "methods.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert f"{new.difference[0]:+.1f}*" in page
    assert f"{-new.difference[0]:+.1f}*" in page


def test_a_damaged_matrix_hides_no_other(tmp_path):
    head_to_head(tmp_path / "2026-01-01" / "a", 0.8)
    file = tmp_path / "2026-01-02" / "b" / "pairs.csv"
    head_to_head(file.parent, 0.8, "y")
    file.write_text(file.read_text().replace("gaps", "gap"))
    with pytest.warns(UserWarning, match="pairs.csv has no column 'gaps'"):
        assert report.matrix(tmp_path).backbone.tolist() == ["x"]
    assert report.matrix(tmp_path / "none").empty
    assert report.matrices(report.matrix(tmp_path / "none"), tmp_path) == []
