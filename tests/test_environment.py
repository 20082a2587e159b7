import ast
import sys
import tomllib
from importlib import metadata

import yaml
from packaging.requirements import Requirement

from upclose import paths

PYPROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
CONDA = {"pytorch": "torch"}  # conda-forge's name -> PyPI's


def test_environment_and_pyproject_name_the_same_packages_and_ranges():
    lines = yaml.safe_load((paths.ROOT / "environment.yml").read_text())["dependencies"]
    conda = {line for line in lines if isinstance(line, str)} - {"pip"}
    python = next(line for line in conda if line.startswith("python>"))
    assert python == f"python{PROJECT['requires-python']}"
    renamed = set()
    for line in conda - {python}:
        name = line.split(">")[0]
        renamed.add(line.replace(name, CONDA.get(name, name), 1))
    extras = PROJECT["optional-dependencies"]
    assert renamed == {*PROJECT["dependencies"], *extras["notebooks"], *extras["webdataset"]}


def test_what_is_installed_lies_in_the_ranges():
    """So the ranges have a solution: this one."""
    for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["notebooks"]):
        wanted = Requirement(line)
        assert wanted.specifier.contains(metadata.version(wanted.name).split("+")[0]), line


def test_every_line_of_the_environment_gives_a_reason():
    text = (paths.ROOT / "environment.yml").read_text()
    packages = [line for line in text.splitlines() if line.startswith("  - ") and ">" in line and "python>" not in line]
    assert len(packages) > 15
    assert all("#" in line for line in packages)


def test_every_dependency_has_an_upper_bound_where_it_breaks_often():
    free = [line for line in PROJECT["dependencies"] if "<" not in line]
    assert free == ["fsspec>=2024.6"]  # dated versions, stable interface


def imported():
    """The packages that the library imports at a module's top."""
    for file in paths.PACKAGE.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            yield from (name.split(".")[0] for name in names)


def test_what_is_imported_is_declared():
    foreign = set(imported()) - sys.stdlib_module_names - {"upclose", "triton"}  # torch brings Triton, kernels use it
    declared = {metadata.distribution(line.split(">")[0]).name.lower() for line in PROJECT["dependencies"]}
    providers = metadata.packages_distributions()
    missing = {name for name in foreign if not {d.lower() for d in providers[name]} & declared}
    assert not missing


def test_the_citation_names_five_papers_and_their_people():
    cited = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text())
    assert len({paper["url"] for paper in cited["references"]}) == 5
    for paper in cited["references"]:
        assert all(set(person) == {"family-names", "given-names"} for person in paper["authors"])
