import numpy as np
import pandas as pd
import pytest

from upclose import compare


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
    assert compare.tolerance(50, 2500, 0, 0) == pytest.approx(1.96)
    assert compare.tolerance(50, 2500, 1, np.nan) == pytest.approx(1.96 * np.sqrt(2))
    assert compare.tolerance(50, 0, 3, 4) == pytest.approx(1.96 * 5)


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


def test_a_table_a_paper_is_written_and_escaped(tmp_path):
    files = compare.write(pd.DataFrame([row(printed())]), tmp_path / "tables")
    assert [f.name for f in files[:2]] == ["lgca.csv", "lgca.html"]
    assert len(files) == 2 * len(compare.PAPERS)
    table = pd.read_csv(files[0])
    assert (table.status == "reproduced").sum() == 1
    fair = (tmp_path / "tables" / "fair.html").read_text()
    assert "S_i and |S_i - S_j|" in fair
    assert "<title>D&amp;D" in (tmp_path / "tables" / "dnd.html").read_text()
    assert "<script" not in fair
