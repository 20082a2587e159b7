import ast
import os

import nbformat
import pytest

from upclose import compare, methods, params, paths
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


@pytest.fixture
def base(tmp_path):
    """The file `defaults/base.yaml` beside the sheets."""
    (tmp_path / "defaults").mkdir()
    (tmp_path / "defaults" / "base.yaml").write_text(
        "notebook: small\nparameters: {images: 7, alpha: 0.6}\ngrid: {dataset: [cub, dtd]}\n"
    )


def test_a_sheet_says_only_what_differs_from_its_defaults(sheet, base):
    (first, second) = params.jobs(sheet("defaults: base\nparameters: {alpha: 0.7}\n"))
    assert (first.values["images"], first.values["alpha"], first.values["dataset"]) == (7, 0.7, "cub")
    assert second.values == {**first.values, "dataset": "dtd"}
    (one,) = params.jobs(sheet("defaults: base\nparameters: {dataset: food101}\n"))
    assert one.values["dataset"] == "food101"  # fixed, so that the defaults' grid does not sweep it
    swept = params.jobs(sheet("defaults: base\ngrid: {images: [1, 2], dataset: [cub]}\n"))
    assert [(job.values["dataset"], job.values["images"]) for job in swept] == [("cub", 1), ("cub", 2)]


def test_cells_are_grids_one_after_the_other(sheet):
    file = sheet(
        "notebook: small\nparameters: {images: 7}\ngrid: {dataset: [cub, dtd]}\n"
        "cells: [{alpha: [0.1, 0.2], beta: [0.8]}, {alpha: [0.3], beta: [0.9]}]\n"
        "exceptions: [{when: {alpha: 0.3}, set: {images: 9}}]\n"
    )
    found = [(v["dataset"], v["alpha"], v["beta"], v["images"]) for v in (job.values for job in params.jobs(file))]
    assert found == [
        ("cub", 0.1, 0.8, 7),
        ("cub", 0.2, 0.8, 7),
        ("dtd", 0.1, 0.8, 7),
        ("dtd", 0.2, 0.8, 7),
        ("cub", 0.3, 0.9, 9),
        ("dtd", 0.3, 0.9, 9),
    ]
    assert {job.name for job in params.jobs(file, {"alpha": 0.5})} == {
        f"table1-{dataset}-{beta}" for dataset in ("cub", "dtd") for beta in (0.8, 0.9)
    }


def test_a_text_quotes_other_parameters():
    sheet = params.Sheet(notebook="x", parameters={"setting": "alpha {alpha}, {images}"}, grid={"alpha": [0.5, 1.0]})
    said = [values["setting"] for _, values in params.cells(sheet, {"images": 3})]
    assert said == ["alpha 0.5, 3", "alpha 1, 3"]


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
        ("notebook: small\nnotebook: small", "'notebook' stands twice in one mapping in line"),
        ("notebook: small\nparameters: {images: 3, alpha: 0.6, images: 4}", "'images' stands twice"),
        ("parameters: {images: 3}", "'notebook' is missing"),
        ("notebook: small\nparameters: {dataset: cubs}", "no data set 'cubs'; did you mean 'cub'"),
        ("", "holds a NoneType"),
        ("notebook: small\ndefaults: none", "no parameter file"),
        ("notebook: small\ndefaults: [a]", "no parameter file"),
        ("notebook: small\ncells: [{images: 3}]", "cells.0.images"),
        ("notebook: small\nparameters: {dataset: 'imagefolder:{place}'}", "quotes 'place'"),
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
    with pytest.raises(ParameterError, match=r"-p 'images=\[1': the value is not YAML"):
        params.override("images=[1")


def test_a_file_that_is_not_there_names_the_nearest_and_not_all(tmp_path):
    with pytest.raises(ParameterError, match=r"did you mean params/papers/lgca-table1\.yaml\?"):
        params.read("lgca-table1.yaml")
    for wrong in ("zzz", tmp_path, paths.PARAMS):
        with pytest.raises(ParameterError) as error:
            params.read(wrong)
        assert len(str(error.value)) < 250


def test_a_notebook_that_is_cut_short(sheet, tmp_path):
    file = sheet("notebook: small\n")
    book = tmp_path / "notebooks" / "small.ipynb"
    book.write_text(book.read_text()[:50])
    with pytest.raises(ParameterError, match=r"small\.ipynb is cut short or no notebook"):
        params.jobs(file)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("3E2", 300.0), ("1.5e3", 1500.0), ("1e", "1e"), ("7", 7)])
def test_numbers_are_read_as_python_reads_them(text, value):
    assert params.override(f"epsilon={text}") == ("epsilon", value)


@pytest.mark.parametrize(
    ("line", "good", "bad"),
    [
        ("zeal: int = 1", 9, 0),
        ("zeal: int = 0", 0, -1),
        ("zeal: float = 0.5", 0.0, -0.5),
        ("zeal: float = 0.5", 2, float("inf")),
        ("zeal: float = -1.0", -1.0, -2.0),
        ("zeal: str = ''", "any", 1),
        ("zeal: bool = True", False, 1),
        ("zeal: list[int] = [1, 2]", [3], []),
        ("zeal: list[int] = [1, 2]", [3], [0]),
        ("zeal: list[str] = ['a']", ["b"], "b"),
        ("taus: list[float] = [1.5]", [1.1, 2.0], [0.9]),
    ],
)
def test_a_parameter_of_a_new_notebook_may_be_what_its_line_says(sheet, tmp_path, line, good, bad):
    cell = nbformat.v4.new_code_cell(line, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "notebooks" / "new.ipynb")
    name = line.partition(":")[0]
    assert params.check(params.notebook_path("new"), {name: good})[name] == good
    with pytest.raises(ParameterError, match=name):
        params.check(params.notebook_path("new"), {name: bad})


def test_a_type_that_no_sheet_can_hold_is_refused(sheet, tmp_path):
    cell = nbformat.v4.new_code_cell("zeal: dict = {}", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "notebooks" / "odd.ipynb")
    with pytest.raises(ParameterError, match="'zeal' is a dict; a parameter is an int"):
        params.jobs(sheet("notebook: odd"))


@pytest.mark.parametrize(
    ("takes", "value", "words"),
    [
        ("images: {least: 4}", "images=3", "greater than or equal to 4"),
        ("dataset: {among: [birdlets]}", "dataset=cub", "'birdlets'"),
        ("crop_seeds: {among: [0, 1]}", "crop_seeds=[2]", "should be 0 or 1"),
        ("dataset: {rows_of: LGCB}", "images=3", "no method 'LGCB'; did you mean 'LGCA'"),
        ("picture: {least: 4}", "images=3", "takes 'picture', which is no parameter"),
    ],
)
def test_a_notebook_takes_less_where_its_own_sheet_says_so(sheet, tmp_path, monkeypatch, takes, value, words):
    monkeypatch.setattr(paths, "PARAMS", tmp_path)
    (tmp_path / "birdlets").mkdir()
    (tmp_path / "birdlets" / "small.yaml").write_text(f"notebook: small\nabout: {{takes: {{{takes}}}}}\n")
    with pytest.raises(ValueError) as error:
        params.check(params.notebook_path("small"), dict([params.override(value)]))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("notebook", "name", "value", "choice"),
    [
        ("01_lgca", "methods", ["LGCB"], "'LGCA'"),
        ("01_lgca", "source", "nope", "'clip-d'"),
        ("01_lgca", "crops", 3, "equal to 4"),
        ("03_dnd", "setting", "fewshot", "'few-shot'"),
        ("03_dnd", "device", "tpu", "cuda"),
        ("04_fair", "methods", ["FAIR", "FAIRY"], "'FAIR-LN'"),
        ("04_fair", "methods", ["CLIP"], "a row of FAIR: FAIR, FAIR-LN"),
        ("04_fair", "domain", "oil", "painting"),
        ("04_fair", "precision", "fp16", "'bf16'"),
        ("04_fair", "top_k", 17, "crops=16"),
        ("04_fair", "table", "Table 6", "'Table 7'"),
        ("05_lare", "dataset", "dtd", "'cub-painting'"),
        ("ablations/lazsl", "alphas", [0.5, 0.95], "beta=0.9"),
        ("ablations/dnd", "lower_scales", [0.8], "beta=0.75"),
        ("ablations/fair", "top_ks", [32], "crops=16"),
    ],
)
def test_what_a_notebook_does_not_know_is_refused_with_its_choices(notebook, name, value, choice):
    with pytest.raises(ParameterError) as error:
        params.check(params.notebook_path(notebook), {name: value}, "here")
    said = str(error.value)
    assert said.startswith(f"here: {name}")
    assert choice in said


@pytest.mark.parametrize("value", ["photo", "photo+sketch", "all"])
def test_domains_may_be_joined(value):
    assert params.check(params.notebook_path("04_fair"), {"domain": value})["domain"] == value


def allowed(notebook, name):
    taken = params.about(notebook).takes[name]
    return {*taken.among, *(methods.get(taken.rows_of).rows if taken.rows_of else ())}


@pytest.mark.parametrize("notebook", ["01_lgca", "02_lazsl", "03_dnd", "04_fair", "05_lare", "ablations/lare"])
def test_a_notebook_takes_rows_that_are_registered_or_that_its_code_names(notebook):
    cells = params.notebook_cells(params.notebook_path(notebook))
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    said = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    assert allowed(notebook, "methods") <= said | set(methods.REGISTRY) | set(methods.get("FAIR").rows)


def test_dnds_methods_are_all_run_by_default():
    values = params.defaults(params.notebook_path("03_dnd"))
    assert set(values["methods"]) == allowed("03_dnd", "methods")


@pytest.mark.parametrize(
    ("notebook", "paper"),
    [("01_lgca", "LGCA"), ("02_lazsl", "LaZSL"), ("03_dnd", "D&D"), ("04_fair", "FAIR"), ("05_lare", "LARE")],
)
def test_every_published_table_of_ours_may_be_asked_for(notebook, paper):
    printed = set(compare.published(paper).table)
    if paper == "LARE":
        printed -= allowed("ablations/lare", "table")
    assert printed <= allowed(notebook, "table")


def test_methods_tables_and_data_are_declared_for_every_notebook_that_takes_them():
    books = [p for p in paths.NOTEBOOKS.rglob("*.ipynb") if not {"solutions", ".ipynb_checkpoints"} & set(p.parts)]
    for book in books:
        assert params.check(book, {}) == params.defaults(book)  # its own defaults are among its choices


def test_every_shipped_file_resolves_against_its_notebook():
    files = [file for file in (paths.ROOT / "params").rglob("*.yaml") if file.parent.name != "defaults"]
    assert files
    for file in files:
        assert params.jobs(file), file


def test_a_sheet_cannot_run_a_notebook_of_another_place(tmp_path):
    (tmp_path / "elsewhere.ipynb").write_text("{}")
    outside = os.path.relpath(tmp_path / "elsewhere", paths.NOTEBOOKS)
    for name in (outside, str(tmp_path / "elsewhere.ipynb")):
        with pytest.raises(ParameterError, match="is not in"):
            params.notebook_path(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tau", ".inf"),
        ("images", "1e25"),
        ("crop_seeds", "[0, 0, 0]"),
        ("alpha", "1e-320"),
        ("dataset", "imagefolder:"),
        ("crops", "1000000000"),
        ("crop_seeds", "[-1]"),
        ("images", "1:30"),
        ("images", "0x1F"),
        ("tau", ".nan"),
    ],
)
def test_what_was_taken_once_is_refused(name, value):
    with pytest.raises(ParameterError, match=name):
        params.check(params.notebook_path("01_lgca"), dict([params.override(f"{name}={value}")]))


def test_bombs_are_refused_before_they_go_off(tmp_path):
    file = tmp_path / "bomb.yaml"
    file.write_text("notebook: 01_lgca\nparameters: {a: &a [1, 2], b: *a}\n")
    with pytest.raises(ParameterError, match="alias"):
        params.read(file)
    many = list(range(1, 1001))
    file.write_text(f"notebook: 01_lgca\ngrid: {{images: {many}, crops: {many}}}\n")
    with pytest.raises(ParameterError, match="1,000,000 cells"):
        params.jobs(file)
    file.write_text("notebook: " + "[" * 5000)
    with pytest.raises(ParameterError, match="bomb"):
        params.read(file)
