import json
import os
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import trees
from upclose import datasets, images
from upclose.datasets import adapters, registry
from upclose.features import Dataset

ENTRIES = sorted(registry.entries())


def load(root, name, split="test", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", datasets.CountWarning)
        return datasets.load(name, split, root, **options)


@pytest.mark.parametrize(("name", "protocol"), ENTRIES)
def test_every_entry_loads_from_its_official_layout(tmp_path, name, protocol):
    entry = registry.entry(name, protocol)
    trees.make(tmp_path, name, protocol)
    seen = {}
    for split in (s for s in registry.SPLITS if getattr(entry, s)):
        if name == "places365" and split == "train":
            continue
        with pytest.warns(datasets.CountWarning, match="pictures, not"):
            data = datasets.load(name, split, tmp_path, protocol=protocol)
        assert isinstance(data, Dataset)
        assert len(data.class_names) == entry.classes == len(set(data.class_names))
        assert len(data) == len(data.key) == len(data.label) == len(set(data.key)) >= (entry.classes > 100)
        assert not any("_" in c for c in data.class_names)
        last = data.load(len(data) - 1)
        assert last.dtype == torch.uint8
        assert last.shape[0] == 3
        if split != "validation" or name != "cifar100":
            assert set(data.label) <= set(range(entry.classes))
        seen[split] = set(data.key)
    parts = list(seen.values())
    assert all(not parts[i] & parts[j] for i in range(len(parts)) for j in range(i)), "splits share pictures"


def test_registry_agrees_with_the_papers_counts():
    assert len(registry.names()) == 22
    assert (registry.entry("cub").train, registry.entry("cub").test) == (5994, 5794)
    assert registry.entry("caltech101").test == 6645
    assert registry.entry("caltech101", "coop").test == 2465
    assert registry.entry("domainnet-40").domains["real"] == (0, 6943)
    for entry in registry.entries().values():
        assert entry.licence
        assert entry.homepage.startswith("http")


def test_coops_counts_follow_its_rules():
    official = {name: registry.entry(name, "official") for name in ("dtd", "food101", "flowers102", "oxford-pets")}
    official |= {name: registry.entry(name, "official") for name in ("stanford-cars", "ucf101", "fgvc-aircraft")}
    coop = {name: registry.entry(name, "coop") for name in (*official, "caltech101", "eurosat", "sun397")}
    everything = {name: e.train + e.validation + e.test for name, e in official.items()} | {"eurosat": 27000}
    for name in ("dtd", "food101", "eurosat", "flowers102"):  # of every class a half, a fifth and the rest
        assert coop[name].train + coop[name].validation + coop[name].test == everything[name]
    for name in ("dtd", "food101", "eurosat"):  # whose classes can be divided so
        assert coop[name].train == everything[name] // 2
        assert coop[name].validation == everything[name] // 5
    for name in ("oxford-pets", "stanford-cars", "ucf101"):  # a fifth of the training images, to half an image a class
        assert coop[name].test == official[name].test
        assert coop[name].train + coop[name].validation == official[name].train
        assert abs(coop[name].validation - official[name].train / 5) <= coop[name].classes / 2
    for name in ("caltech101", "flowers102"):
        whole = coop[name].train + coop[name].validation + coop[name].test
        assert abs(coop[name].train - whole / 2) <= coop[name].classes / 2
        assert abs(coop[name].validation - whole / 5) <= coop[name].classes / 2
    assert (coop["sun397"].train, coop["sun397"].validation) == (397 * 40, 397 * 10)
    assert coop["fgvc-aircraft"].train + coop["fgvc-aircraft"].validation == official["fgvc-aircraft"].train


def test_imagenet_names_are_distinct_and_in_folder_order():
    classes = registry.imagenet_classes()
    assert list(classes) == sorted(classes)
    assert len(classes) == len(set(classes.values())) == 1000
    assert classes["n01440764"] == "tench"
    assert list(classes.values())[134] == "crane bird"


def test_imagenet_v2_counts_its_folders_as_numbers(tmp_path):
    trees.make(tmp_path, "imagenet-v2")
    data = load(tmp_path, "imagenet-v2")
    assert [k.split("/")[-2] for k in data.key[:12]] == [str(c) for c in range(12)]


def test_imagenet_r_scores_only_the_classes_that_are_there(tmp_path):
    trees.make(tmp_path, "imagenet-r")
    data = load(tmp_path, "imagenet-r")
    assert data.class_names == list(registry.imagenet_classes().values())[::5]


def test_class_names_are_cleaned(tmp_path):
    trees.make(tmp_path, "cub")
    trees.make(tmp_path, "eurosat")
    trees.make(tmp_path, "places365")
    assert load(tmp_path, "cub").class_names[1] == "Painted bird 1"
    assert load(tmp_path, "eurosat").class_names[:3] == ["annual crop land", "forest", "brushland or shrubland"]
    assert load(tmp_path, "places365").class_names[:2] == ["place 0 outdoor", "place 1"]


def test_wrong_class_order_is_an_error(tmp_path):
    folder = trees.make(tmp_path, "cub")
    rows = (folder / "classes.txt").read_text().splitlines()
    a, b = (row.split(" ")[1] for row in rows[:2])
    (folder / "classes.txt").write_text("\n".join([f"1 {b}", f"2 {a}", *rows[2:]]))
    with pytest.raises(ValueError, match="class order is wrong"):
        load(tmp_path, "cub")


def test_coop_split_that_names_a_class_twice_is_an_error(tmp_path):
    folder = trees.make(tmp_path, "dtd", "coop")
    file = folder / "split_zhou_DescribableTextures.json"
    content = json.loads(file.read_text())
    content["test"][0][2] = "another"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"class 0 is .* and, for"):
        load(tmp_path, "dtd", protocol="coop")


def test_too_many_and_too_few_class_folders(tmp_path):
    folder = trees.make(tmp_path, "imagenet-a")
    (folder / "n99999999").mkdir()
    with pytest.raises(ValueError, match=r"n99999999.*too many"):
        load(tmp_path, "imagenet-a")
    shutil.rmtree(folder / "n99999999")
    shutil.rmtree(folder / "n01440764")
    with pytest.raises(ValueError, match="199 classes, not 200"):
        load(tmp_path, "imagenet-a")


@pytest.mark.parametrize(
    ("name", "protocol", "lost"),
    [
        ("cub", None, "train_test_split.txt"),
        ("dtd", None, "labels/test1.txt"),
        ("food101", None, "meta/test.json"),
        ("places365", None, "categories_places365.txt"),
        ("flowers102", "official", "setid.mat"),
        ("domainnet-40", None, "real_test_mini.txt"),
        ("ucf101", "coop", "split_zhou_UCF101.json"),
        ("cifar100", None, "test.bin"),
    ],
)
def test_missing_list_file_is_named(tmp_path, name, protocol, lost):
    folder = trees.make(tmp_path, name, protocol)
    (folder / lost).unlink()
    with pytest.raises(FileNotFoundError, match=lost.split("/")[-1]):
        load(tmp_path, name, protocol=protocol)


def test_missing_data_set_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`upclose data get dtd` gets dtd-r1.0.1.tar.gz, or set UPCLOSE_DATA"):
        load(tmp_path, "dtd")
    with pytest.raises(FileNotFoundError, match=r"get ImageNet-Sketch\.zip by hand from https://"):
        load(tmp_path, "imagenet-sketch")
    with pytest.raises(FileNotFoundError, match=r"get the official images, split into train/ and test/"):
        load(tmp_path, "aid")


def test_missing_picture_is_named_when_the_data_set_is_opened(tmp_path):
    folder = trees.make(tmp_path, "food101")
    next(iter(sorted(folder.glob("images/*/test0.jpg")))).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 101 listed pictures"):
        load(tmp_path, "food101")


def test_corrupt_picture_is_an_error_of_its_own(tmp_path):
    folder = trees.make(tmp_path, "oxford-pets")
    (folder / "images" / "breed_00_100.jpg").write_bytes(b"no picture")
    data = load(tmp_path, "oxford-pets")
    with pytest.raises(images.ImageError, match="breed_00_100"):
        data.load(0)
    assert data.load(1).shape == (3, 8, 10)


def test_symlinks_are_followed_and_broken_ones_are_missing(tmp_path):
    folder = trees.make(tmp_path / "real", "oxford-pets")
    (tmp_path / "linked").mkdir()
    os.symlink(folder, tmp_path / "linked" / folder.name)
    assert load(tmp_path / "linked", "oxford-pets").fingerprint == load(tmp_path / "real", "oxford-pets").fingerprint
    file = folder / "images" / "breed_00_100.jpg"
    file.unlink()
    os.symlink(tmp_path / "nowhere.jpg", file)
    with pytest.raises(FileNotFoundError, match="1 of 37"):
        load(tmp_path / "real", "oxford-pets")


def test_fingerprint_knows_sizes_names_and_order_and_nothing_of_the_place(tmp_path):
    trees.make(tmp_path / "a", "food101", each=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, moved = load(tmp_path / "a", "food101"), load(tmp_path / "b", "food101")
    assert first.fingerprint == moved.fingerprint
    assert first.key == moved.key
    assert first.select([1, 0]).fingerprint != first.select([0, 1]).fingerprint
    with moved.files[0].open("ab") as file:
        file.write(b"x")
    assert load(tmp_path / "b", "food101").fingerprint != first.fingerprint
    assert load(tmp_path / "a", "food101", "train").fingerprint != first.fingerprint


def test_limit_spreads_over_the_classes(tmp_path):
    trees.make(tmp_path, "dtd", each=4)
    data = load(tmp_path, "dtd", limit=47)
    assert len(data) == 47
    assert set(data.label) == set(range(47))
    assert len(load(tmp_path, "dtd", limit=10**6)) == 47 * 4


def test_domains(tmp_path):
    trees.make(tmp_path, "domainnet-40")
    data = load(tmp_path, "domainnet-40")
    assert data.domain_names == ["sketch", "real", "painting", "clipart"]
    assert np.bincount(data.domain).tolist() == [40] * 4
    part = load(tmp_path, "domainnet-40", domain="real+clipart")
    assert set(part.domain) == {1, 3}
    assert load(tmp_path, "domainnet-40", "train").domain_names == ["sketch"]
    with pytest.raises(ValueError, match="no domain 'photo'"):
        load(tmp_path, "domainnet-40", domain="photo")


def test_cifar_pixels_and_held_out_split(tmp_path):
    folder = trees.make(tmp_path, "cifar100", each=10)
    table = np.fromfile(folder / "test.bin", np.uint8).reshape(-1, 3074)
    data = load(tmp_path, "cifar100")
    assert np.array_equal(data.load(7).numpy().ravel(), table[7, 2:])
    assert data.label[7] == table[7, 1]
    train, held = (load(tmp_path, "cifar100", s, protocol="held-out") for s in ("train", "validation"))
    assert len(train) == 4 * len(held) == 800
    (folder / "test.bin").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cut short"):
        load(tmp_path, "cifar100")


def test_imagefolder(tmp_path):
    trees.folders(tmp_path / "mine", ["great tit", "måne", "z"], 2)
    data = datasets.load(f"imagefolder:{tmp_path / 'mine'}")
    assert data.class_names == ["great tit", "måne", "z"]
    assert data.label.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.load(0).shape == (3, 8, 10)
    trees.folders(tmp_path / "split" / "train", ["a"], 1)
    trees.folders(tmp_path / "split" / "test", ["a"], 3)
    assert len(datasets.load(f"imagefolder:{tmp_path / 'split'}", "test")) == 3
    with pytest.raises(FileNotFoundError, match="one folder a class"):
        datasets.load(f"imagefolder:{tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        datasets.load(f"imagefolder:{tmp_path / 'empty'}")


def test_bad_names_are_one_clear_sentence(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'oxford-pets'"):
        datasets.load("oxfordpets")
    with pytest.raises(ValueError, match="no protocol 'zhou'; there are official, coop"):
        datasets.load("dtd", root=tmp_path, protocol="zhou")
    with pytest.raises(ValueError, match="no split 'val'; there are train"):
        datasets.load("dtd", "val")
    with pytest.raises(ValueError, match="no split 'train'; there are test"):
        datasets.load("imagenet-v2", "train", tmp_path)
    with pytest.raises(ValueError, match="no option 'knobs'"):
        datasets.load("dtd", root=tmp_path, knobs=1)
    with pytest.raises(ValueError, match="limit=0"):
        datasets.load("dtd", root=tmp_path, limit=0)


def test_data_sets_travel_to_other_processes(tmp_path):
    trees.make(tmp_path, "oxford-pets")
    data = load(tmp_path, "oxford-pets")
    again = pickle.loads(pickle.dumps(data))
    assert again.fingerprint == data.fingerprint
    assert torch.equal(again.load(3), data.load(3))


def test_birdlets_keep_their_own_options():
    data = datasets.load("birdlets", "validation", limit=12, domain="sketch", classes=5)
    assert len(data) == 12
    assert data.domain_names == ["sketch"]


def test_folders_of_equal_names_and_sizes_are_told_apart_by_content(tmp_path):
    for name, value in (("clean", 10), ("noisy", 20)):
        for label in ("owl", "tern"):
            (tmp_path / name / label).mkdir(parents=True)
            Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(tmp_path / name / label / "a.bmp")
    first, second = (datasets.load(f"imagefolder:{tmp_path / name}") for name in ("clean", "noisy"))
    assert first.fingerprint != second.fingerprint


def test_a_class_may_be_called_train_and_system_folders_are_none(tmp_path):
    for label in ("train", "ship", "__MACOSX", "@eaDir"):
        (tmp_path / label).mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / label / "a.png")
    with pytest.warns(datasets.FolderWarning, match="passed over: @eaDir, __MACOSX"):
        assert datasets.load(f"imagefolder:{tmp_path}", "train").class_names == ["ship", "train"]


def test_folders_of_splits_without_the_one_asked_for_are_no_classes(tmp_path):
    trees.folders(tmp_path / "train", ["a"], 1)
    trees.folders(tmp_path / "val", ["a"], 2)
    assert len(datasets.load(f"imagefolder:{tmp_path}", "validation")) == 2
    with pytest.raises(FileNotFoundError, match="taken for splits: train, val; there is no 'test'"):
        datasets.load(f"imagefolder:{tmp_path}", "test")


def test_wordnet_ids_become_imagenets_names_and_are_said(tmp_path):
    trees.folders(tmp_path, ["n01440764", "n01855672", "my_dog"], 1)
    with pytest.warns(datasets.FolderWarning, match="2 of 3 folders .* are WordNet ids"):
        data = datasets.load(f"imagefolder:{tmp_path}")
    assert data.class_names == ["my dog", "tench", "goose"]


def test_numbers_as_class_names_are_said_and_a_file_gives_names(tmp_path):
    trees.folders(tmp_path, ["0", "1", "10"], 1)
    with pytest.warns(datasets.FolderWarning, match=r"put a classes\.txt beside them"):
        assert datasets.load(f"imagefolder:{tmp_path}").class_names == ["0", "1", "10"]
    (tmp_path / "classes.txt").write_text("0 great_tit\n10 robin\n")
    with pytest.raises(ValueError, match="no line for '1'"):
        datasets.load(f"imagefolder:{tmp_path}")
    (tmp_path / "classes.json").write_text('{"0": "great tit", "1": "tern", "10": "robin"}')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert datasets.load(f"imagefolder:{tmp_path}").class_names == ["great tit", "tern", "robin"]
    (tmp_path / "classes.json").write_text('["great tit"]')
    with pytest.raises(ValueError, match="must map folders to class names"):
        datasets.load(f"imagefolder:{tmp_path}")


def test_folders_without_a_readable_picture_and_pictures_of_other_endings_are_said(tmp_path):
    trees.folders(tmp_path, ["owl", "tern", "wren"], 2)
    for file in (tmp_path / "tern").iterdir():
        file.write_bytes(b"no picture")
    (tmp_path / "wren" / "picture 0.jpg").rename(tmp_path / "wren" / "picture")
    (tmp_path / "wren" / "Thumbs.db").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()  # a class that is meant to have none
    with pytest.warns(datasets.FolderWarning) as said:
        data = datasets.load(f"imagefolder:{tmp_path}")
    assert len(data) == 5
    first, second = (str(warning.message) for warning in said)
    assert "1 class folders" in first
    assert "'tern'" in first
    assert "1 pictures" in second
    assert os.path.join("wren", "picture") in second


def test_names_that_command_a_terminal_or_are_not_utf8(tmp_path):
    trees.folders(tmp_path / "a", ["\x1b[31mred\x1b[0m\x07 owl"], 1)
    assert datasets.load(f"imagefolder:{tmp_path / 'a'}").class_names == ["red owl"]
    trees.folders(tmp_path / "b", ["owl"], 1)
    os.rename(tmp_path / "b" / "owl" / "picture 0.jpg", os.fsencode(tmp_path / "b" / "owl") + b"/m\xf6we.jpg")
    with pytest.raises(ValueError, match=r"xf6we\.jpg' is not UTF-8: rename it"):
        datasets.load(f"imagefolder:{tmp_path / 'b'}")
    (tmp_path / "list.txt").write_bytes(b"m\xf6we\n")
    with pytest.raises(ValueError, match=r"list\.txt is not UTF-8"):
        adapters.lines(tmp_path / "list.txt")
