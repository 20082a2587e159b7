"""The sheets of `make record`: every notebook, at the sizes on which a claim may rest."""

import pytest

from upclose import params, paths, run
from upclose.encode import tiny

RECORDED = sorted((paths.PARAMS / "recorded").glob("*.yaml"))
PHOTOS, OTHERS = 2000, 1000  # pictures, for claims about accuracy on photos and in other domains
FEW = {
    "images": 24, "domain_images": 12, "tuning_images": 12, "sweep_images": 12, "validation_images": 24,
    "exact_images": 12, "clip_images": 8, "tpt_images": 4, "adapt_images": 16, "adapt_epochs": 1, "epochs": 1,
    "probe_steps": 50, "repeats": 1, "samples": 16,
}  # fmt: skip
PHOTO_BOOKS = [
    "01_lgca",
    "02_lazsl",
    "03_dnd",
    "05_lare",
    "06_head_to_head",
    *(f"ablations/{n}" for n in ("dnd", "lare", "lazsl", "lgca")),
]


SHEETS = {params.read(file).notebook: file for file in RECORDED}


def jobs(notebook: str) -> list[dict]:
    """The values of every cell of a notebook's recorded sheet."""
    return [job.values for job in params.jobs(SHEETS[notebook])]


def test_every_notebook_has_a_sheet_that_resolves():
    names = [params.read(file).notebook for file in RECORDED]
    small = sorted(params.read(file).notebook for file in (paths.PARAMS / "birdlets").rglob("*.yaml"))
    assert sorted(names) == small
    assert all(jobs(name) for name in names)


@pytest.mark.parametrize("notebook", PHOTO_BOOKS)
def test_claims_on_photos_rest_on_enough_pictures(notebook):
    for values in jobs(notebook):
        assert values["images"] >= PHOTOS
        assert values.get("tpt_images", PHOTOS) >= PHOTOS


def test_claims_in_other_worlds_rest_on_enough_pictures():
    for values in jobs("00_start_here"):
        assert values["images"] / 4 >= OTHERS  # a quarter in each
    assert all(values["domain_images"] >= OTHERS for values in jobs("06_head_to_head"))
    for notebook in ("02_lazsl",):
        assert all(values["images"] / 2 >= OTHERS for values in jobs(notebook))  # half in each


@pytest.mark.parametrize("notebook", SHEETS)
def test_crop_sets_and_seeds_are_enough(notebook):
    least = 5 if "shots" in jobs(notebook)[0] or "lare" in notebook else 3
    for values in jobs(notebook):
        assert len(values.get("crop_seeds", range(3))) >= 3
        assert len(values.get("seeds", range(least))) >= least


def test_fair_has_the_papers_epochs_and_pictures():
    for values in jobs("04_fair"):
        assert values["epochs"] >= 15
        assert values["images"] >= 1000
    for values in jobs("ablations/fair"):
        assert values["repeats"] >= 15
        assert min(values["images"], values["samples"]) >= 1000


def test_all_are_run_with_every_encoder_that_has_seen_crops():
    names = [[values.get("backbone") for values in jobs(params.read(file).notebook)] for file in RECORDED]
    every = [name for name in tiny.NAMES if name != "birdlets-tiny-whole"]
    assert all(swept in (every, [None]) for swept in names)  # 06 takes its encoders as a list


@pytest.mark.slow
@pytest.mark.parametrize("notebook", SHEETS)
def test_every_sheet_runs_to_its_end_with_few_pictures(notebook, lab):
    """Lists keep their lengths: 06 once ran for an hour before five seeds met three crop sets."""
    few = {name: FEW[name] for name in jobs(notebook)[0].keys() & FEW.keys()}
    if "lare" in notebook:
        few["images"] = 600  # five folds need five pictures of a class
    outcomes = run.execute(run.prepare(params.jobs(SHEETS[notebook], few | {"backbone": "birdlets-tiny"})))
    assert [(outcome.status, outcome.error) for outcome in outcomes] == [("done", "")]
