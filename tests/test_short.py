"""The short way: the same numbers as the modules below it, and text that stays text."""

import json

import pytest
import torch

import upclose
from upclose import cli, datasets, encode, evaluate, prompts
from upclose.features import Plan


@pytest.fixture(scope="module")
def birds():
    return datasets.load("birdlets", "test", limit=3)


@pytest.fixture(scope="module")
def classes(birds):
    said = prompts.load("lazsl", birds.name, birds.split, birds.class_names)
    return {name: said[name] for name in birds.class_names[:5]}


@pytest.mark.parametrize("method", ["lazsl", "LGCA", "CLIP-D", "D&D"])
def test_classify_is_the_methods_own_scores(birds, classes, method):
    found = upclose.classify([birds.load(i) for i in range(2)], classes, method=method)
    encoder = encode.load("birdlets-tiny")
    label = [prompts.TEMPLATE.format(name) for name in classes]
    text = encode.embed_text(encoder, label, list(classes.values()))
    plan = Plan(factor=1.25, steps=4 if method == "LGCA" else 1)
    name = evaluate.methods.get(method).name
    rule = evaluate.rules([name], lambda _: text)[name]
    assert found.scores.shape == (2, 5)
    assert torch.isfinite(found.scores).all()
    views = upclose.short._views(encoder, birds.load(1), "picture", plan)
    assert torch.allclose(found.scores[1], rule(views)[0], atol=1e-6)
    assert found.answer[1] == list(classes)[int(found.scores[1].argmax())]


@pytest.mark.parametrize("method", ["LaZSL", "D&D", "WCA"])
def test_explain_names_the_crop_with_most_of_a_sentences_mass(birds, classes, method):
    found = upclose.explain(birds.load(0), classes, method=method)
    height, width = found.pixels.shape[1:]
    assert found.class_name == upclose.classify([birds.load(0)], classes, method=method).answer[0]
    assert len(found.sentence) == len(found.box) == len(found.share) == len(classes[found.class_name])
    assert (found.share >= 1 - 1e-4).all()  # the largest of some shares is at least the mean
    assert (found.box >= 0).all()
    assert (found.box[:, 2:] <= torch.tensor([width, height])).all()


def test_what_cannot_be_done_is_one_sentence(birds, classes):
    picture = birds.load(0)
    with pytest.raises(ValueError, match="did you mean 'LaZSL'"):
        upclose.classify([picture], classes, method="lasl")
    with pytest.raises(ValueError, match="has no plan"):
        upclose.explain(picture, classes, method="CLIP")
    with pytest.raises(ValueError, match="no class 'crow'"):
        upclose.explain(picture, classes, class_name="crow")
    with pytest.raises(ValueError, match="needs"):
        upclose.classify([picture], classes, method="Tip-Adapter")
    for pictures in ([], picture, "bird.jpg"):
        with pytest.raises(ValueError, match=r"list of pictures: \[picture\] for one"):
            upclose.classify(pictures, classes)
    for few, said in (({"tern": ["an orange beak"]}, "at least two classes, not 1"), ({}, "no classes")):
        with pytest.raises(ValueError, match=said):
            upclose.classify([picture], few)
    assert upclose.explain(picture, {"tern": ["an orange beak"]}, class_name="tern").sentence == ["an orange beak"]


def test_names_and_sentences_are_escaped_in_jupyter(birds):
    said = {"<script>a</script>": ["<b>beak</b>"], "b": ["c"]}
    assert "<script>" not in upclose.classify([birds.load(0)], said)._repr_html_()
    shown = upclose.explain(birds.load(0), said, class_name="<script>a</script>")._repr_html_()
    assert "<script>" not in shown
    assert "<b>beak" not in shown


def test_the_command_writes_a_page(tmp_path, birds, classes, capsys):
    from PIL import Image

    Image.fromarray(birds.load(0).permute(1, 2, 0).numpy()).save(tmp_path / "bird.png")
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    command = ["explain", str(tmp_path / "bird.png"), "--classes", str(tmp_path / "classes.json")]
    assert cli.main([*command, "--out", str(tmp_path / "page")]) == 0
    assert "LaZSL says" in capsys.readouterr().out
    assert (tmp_path / "page" / "index.html").is_file()
    assert cli.main([*command, "--out", str(tmp_path / "other"), "--method", "nothing"]) == 2
    assert "no method 'nothing'" in capsys.readouterr().err


def test_readmes_example_runs_as_it_is_printed(capsys):
    from upclose import paths

    readme = paths.ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("README.md is not beside the package")
    code = readme.read_text().split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 10
    exec(compile(code, "README.md", "exec"), {})
    assert "the crop" in capsys.readouterr().out
