import nbformat
import pytest

from upclose import params, paths
from upclose.params import ParameterError

CELL = """dataset: str = "birdlets"  # which
images: int = 20  # how many
alpha: float = 0.5  # smallest
beta: float = 0.9  # largest
crop_seeds: list[int] = [0, 1]  # sets
"""


@pytest.fixture
def sheet(tmp_path, monkeypatch):
    """A notebook with parameters, and a writer of parameter files."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]})])
    (tmp_path / "notebooks").mkdir()
    nbformat.write(book, tmp_path / "notebooks" / "small.ipynb")
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")

    def write(text):
        file = tmp_path / "table1.yaml"
        file.write_text(text)
        return file

    return write


def test_defaults_are_the_typed_assignments_of_the_tagged_cell(sheet):
    found = params.defaults(params.notebook_path("small"))
    assert found == {"dataset": "birdlets", "images": 20, "alpha": 0.5, "beta": 0.9, "crop_seeds": [0, 1]}


def test_the_grid_is_a_product_and_exceptions_change_cells(sheet):
    file = sheet(
        "notebook: small\nparameters: {images: 7}\ngrid: {dataset: [cub, places365], beta: [0.8, 0.9]}\n"
        "exceptions: [{when: {dataset: places365}, set: {alpha: 0.7}}]\n"
    )
    jobs = params.jobs(file)
    assert [job.name for job in jobs] == [
        "table1-cub-0.8",
        "table1-cub-0.9",
        "table1-places365-0.8",
        "table1-places365-0.9",
    ]
    assert [job.values["alpha"] for job in jobs] == [0.5, 0.5, 0.7, 0.7]
    assert all(job.values["images"] == 7 and job.values["crop_seeds"] == [0, 1] for job in jobs)


def test_an_override_fixes_what_the_grid_sweeps(sheet):
    file = sheet("notebook: small\ngrid: {dataset: [cub, dtd]}\n")
    jobs = params.jobs(file, dict([params.override("dataset=food101"), params.override("crop_seeds=[5]")]))
    assert [(job.name, job.values["dataset"], job.values["crop_seeds"]) for job in jobs] == [("table1", "food101", [5])]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("notebook: small\nparameters: {imagse: 3}", "no parameter 'imagse'; did you mean 'images'"),
        ("notebook: small\nparameters: {images: many}", "images='many'"),
        ("notebook: small\nparameters: {images: 2.5}", "images=2.5"),
        ("notebook: small\nparameters: {images: 0}", "images=0"),
        ("notebook: small\nparameters: {alpha: 0.95}", "alpha=0.95 is above beta=0.9"),
        ("notebook: small\nparameters: {alpha: -1.0}", "alpha=-1.0"),
        ("notebook: small\nparameters: {crop_seeds: []}", "crop_seeds"),
        ("notebook: smal", "no notebook 'smal'; did you mean 'small'"),
        ("notebook: small\ngrid: {images: []}", "grid.images"),
        ("notebook: small\nextra: 1", "extra"),
        ("notebook: small\nexceptions: [{when: {tau: 1}, set: {images: 3}}]", "'tau'"),
        ("- a\n- b", "holds a list"),
        ("notebook: [small", "is not YAML"),
        ("", "holds a NoneType"),
    ],
)
def test_one_sentence_names_the_thing(sheet, text, words):
    with pytest.raises(ParameterError) as error:
        params.jobs(sheet(text))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_broken_override():
    with pytest.raises(ParameterError, match="no parameter file"):
        params.jobs("params/nowhere.yaml")
    with pytest.raises(ParameterError, match="not of the form name=value"):
        params.override("images")


def test_a_parameter_that_the_registry_does_not_know_is_an_error(sheet, tmp_path):
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("zeal: int = 1", metadata={"tags": ["parameters"]})]
    )
    nbformat.write(book, tmp_path / "notebooks" / "odd.ipynb")
    with pytest.raises(ParameterError, match="does not say what 'zeal' may be"):
        params.jobs(sheet("notebook: odd"))


def test_every_shipped_file_resolves_against_its_notebook():
    files = sorted((paths.ROOT / "params").rglob("*.yaml"))
    assert files
    for file in files:
        assert params.jobs(file), file
