import tomllib

import yaml

from upclose import paths

PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
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
    assert renamed == set(PROJECT["dependencies"])


def test_every_line_of_the_environment_gives_a_reason():
    text = (paths.ROOT / "environment.yml").read_text()
    packages = [line for line in text.splitlines() if line.startswith("  - ") and ">" in line and "python>" not in line]
    assert len(packages) > 15
    assert all("#" in line for line in packages)


def test_every_dependency_has_an_upper_bound_where_it_breaks_often():
    free = [line for line in PROJECT["dependencies"] if "<" not in line]
    assert free == ["fsspec>=2024.6"]  # dated versions, stable interface
