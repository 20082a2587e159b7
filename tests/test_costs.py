import pytest

from upclose import costs, doctor, params

PETS = {"dataset": "oxford-pets", "backbone": "ViT-B-32-quickgelu", "pretrained": "openai"}
CROPS = {"crops": 100, "alpha": 0.5, "beta": 0.9, "crop_seeds": [0, 1]}
TEST = params.About()
WHOLE = params.About(splits=["train", "validation", "test"])


def views(about=TEST, **values):
    """Encodings that banks keep, and those that pass."""
    work = costs.work(about, PETS | values)
    return sum(bank.encodings for bank in work.banks), work.passing


@pytest.mark.parametrize(
    ("rows", "each"),
    [
        (["CLIP"], 1),
        (["nobody's"], 1),
        (["WCA (N=16)"], 2 * 101),
        (["LGCA"], 2 * 601),  # six levels of 100 crops
        (["CLIP", "WCA", "LGCA", "nobody's"], 2 * 601),  # who reads crops reads a ladder's first level
        (["WCA", "TPT"], 2 * 101 + 64),  # TPT has views of its own, once
    ],
)
def test_a_bank_holds_the_picture_and_its_crops_once_a_crop_set(rows, each):
    assert views(methods=rows, **CROPS) == (3669 * each, 0)


def test_a_budget_is_spent_once_a_crop_set_that_methods_share():
    values = {"budgets": [1, 4, 16], "budget": 16, "crop_seeds": [0, 1], "large_seeds": [0]}
    assert views(methods=["CLIP", "CuPL"], **values) == (3669, 0)
    assert views(methods=["CLIP", "WCA", "LaZSL", "multi-crop"], **values) == (3669 * 2 * 16, 0)
    assert views(methods=["WCA", "D&D", "LGCA"], **values) == (3669 * 2 * (16 + 16 + 15), 0)  # 7 crops at two sizes
    assert views(methods=["WCA", "LaZSL"], **values | {"budget": 4}) == (3669 * (2 * 4 + 16), 0)


def test_trainings_draw_anew_in_every_epoch_and_keep_nothing():
    fair = {"epochs": 15, "crops": 16, "seeds": [0], "methods": ["CLIP", "FAIR", "FAIR w/o LAS"]}
    assert views(**fair) == (3669, 2 * 3680 * 15 * 20)
    assert views(**fair | {"seeds": [0, 1, 2]})[1] == 3 * views(**fair)[1]


def test_training_pictures_are_counted_where_they_are_read():
    shots = {"methods": ["Tip-Adapter"], "shots": [1, 16]}
    assert views(**shots)[0] == 3669 + 37 * 16
    assert views(WHOLE, **shots)[0] == 3669 + 3680
    lare = {"methods": ["LARE"], "dataset": "cub-painting", "train_dataset": "cub"}
    assert views(WHOLE, **lare)[0] == 3047 + 5794 + 5994


def test_banks_are_told_apart_by_their_crops_only_where_crops_are_drawn():
    for rows, equal in ((["WCA"], False), (["CLIP"], True)):
        works = [costs.work(TEST, PETS | CROPS | {"alpha": alpha, "methods": rows}) for alpha in (0.5, 0.6)]
        assert (works[0].banks == works[1].banks) == equal


def test_a_bank_is_paid_by_its_first_reader_alone():
    files = doctor.sheets()
    zero, few = (
        [costs.work(params.about("03_dnd"), v) for _, v in params.cells(files[name]) if v["dataset"] == "dtd"]
        for name in ("dnd-zero-shot", "dnd-few-shot")
    )
    readers = costs.readers(zero + few)
    assert list(readers.values()) == [[0, 1], [0], [0], [1]]  # three crop sets; the first is few-shot's; the shots
    assert [bank.seed for bank in readers] == [0, 1, 2, 0]
    counted = costs.encodings(readers, zero + few)
    assert counted == {costs.Backbone("RN50-quickgelu", "openai"): 10 * (3 * 1692 + 16 * 47)}


def test_sweeps_of_what_needs_no_encoding_share_their_bank():
    sheet = doctor.sheets()["lazsl-fig5"]
    cells = [v for _, v in params.cells(sheet) if v["dataset"] == "cub"]
    shared = costs.readers(costs.work(params.about(sheet.notebook), values) for values in cells)
    assert sorted(map(len, shared.values())) == [1] * 8 + [8]  # theta at alpha 0.6; the other alphas


def test_a_backbone_of_no_paper_is_named():
    with pytest.raises(ValueError, match="'ViT-B-32' with 'openai' is no backbone of the papers' tables"):
        costs.gflops(costs.Backbone("ViT-B-32", "openai"))
