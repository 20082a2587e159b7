"""Readers of the official layouts: a folder and a split -> files, labels and class names.

Each adapter is `(folder, split, entry) -> Items`. Where a path tells the class, `Items.folders` says what it must be,
and `check` compares every single item, so that a wrong class order cannot go unseen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io
import torchvision.datasets as tv

from upclose import paths, seeds
from upclose.datasets.registry import Entry, imagenet_classes

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
SUFFIXES |= {".avif", ".heic", ".heif"}
_EUROSAT = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments",
    "River": "river",
    "SeaLake": "lake or sea",
}
_COOP = {  # the folder of the pictures below CoOp's folder of the data set, and the split file's ending
    "oxford-pets": ("images", "OxfordPets"),
    "dtd": ("images", "DescribableTextures"),
    "food101": ("images", "Food101"),
    "caltech101": ("101_ObjectCategories", "Caltech101"),
    "eurosat": ("2750", "EuroSAT"),
    "flowers102": ("jpg", "OxfordFlowers"),
    "stanford-cars": (".", "StanfordCars"),
    "sun397": ("SUN397", "SUN397"),
    "ucf101": ("UCF-101-midframes", "UCF101"),
}


class Record(NamedTuple):
    """A picture of 32 x 32 pixels inside a file: uint8 (3, 32, 32) that begins at byte `offset`."""

    file: Path
    offset: int


class Items(NamedTuple):
    """What a split holds.

    Attributes:
        files: n paths or records
        label: n class numbers
        class_names: C names in the data set's own order
        folders: what the paths call the C classes, None where they do not tell
        domain: n domain numbers, None where there is one domain
        domain_names: what they mean
        said: n, what each path calls its class; None means the name of its folder
    """

    files: list[Path] | list[Record]
    label: list[int]
    class_names: list[str]
    folders: list[str] | None = None
    domain: list[int] | None = None
    domain_names: tuple[str, ...] = ()
    said: list[str] | None = None


def words(folder: str) -> str:
    """A folder's name as a class name: "001.Black_footed_Albatross" -> "Black footed Albatross"."""
    return re.sub(r"^\d+\.", "", paths.printable(folder)).replace("_", " ").strip()


def lines(file: Path) -> list[str]:
    """The lines of a list file that are not empty.

    Raises:
        ValueError: the file is not UTF-8
    """
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): save it as UTF-8") from None


SYSTEM = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", "System Volume Information"}  # nobody's classes


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted; hidden ones and those of operating systems are left out."""
    found = (child.name for child in folder.iterdir() if child.is_dir())
    return sorted(name for name in found if not name.startswith(".") and name not in SYSTEM)


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def from_folders(folder: Path, names: dict[str, str] | None = None, left_out: Container[str] = ()) -> Items:
    """A folder a class.

    Args:
        folder: that holds them
        names: folder -> class name, in label order; None takes what is there, sorted, underscores as spaces
        left_out: folders that are no classes

    Raises:
        ValueError: a folder that `names` lacks, or the other way round
    """
    there = [name for name in class_folders(folder) if name not in left_out]
    names = {name: words(name) for name in there} if names is None else names
    if unknown := [name for name in there if name not in names]:
        raise ValueError(f"{folder}: {unknown[0]!r} is no class of it ({len(unknown)} class folders too many)")
    if absent := [name for name in names if name not in there]:
        raise ValueError(f"{folder}: there is no folder {absent[0]!r} ({len(absent)} class folders are missing)")
    files = [_pictures(folder / name) for name in names]
    label = [c for c, rows in enumerate(files) for _ in rows]
    said = [name for name, rows in zip(names, files) for _ in rows]
    return Items([p for rows in files for p in rows], label, list(names.values()), list(names), said=said)


def _torchvision(
    make: Callable, folder: Path, split: str, depth: int = 1, **options
) -> tuple[list[Path], list[int], list[str]]:
    """Files, labels and classes of a torchvision data set, whose root is `depth` folders up."""
    data = make(folder.parents[depth - 1], split=split, **options)
    samples = getattr(data, "_samples", None)
    files = [s[0] for s in samples] if samples else getattr(data, "_image_files", None) or data._images
    label = [s[1] for s in samples] if samples else data._labels
    return [Path(f) for f in files], [int(c) for c in label], list(data.classes)


def _pets(folder: Path, split: str, entry: Entry) -> Items:
    files, label, classes = _torchvision(tv.OxfordIIITPet, folder, {"train": "trainval"}.get(split, split))
    said = [p.stem.rsplit("_", 1)[0] for p in files]
    raw = {c: name for name, c in zip(said, label)}
    return Items(
        files, label, [words(raw[c]) for c in range(len(classes))], [raw[c] for c in range(len(classes))], said=said
    )


def _cub(folder: Path, split: str, entry: Entry) -> Items:
    table = {name: dict(line.split(" ", 1) for line in lines(folder / f"{name}.txt")) for name in _CUB_LISTS}
    folders = [table["classes"][key] for key in sorted(table["classes"], key=int)]
    wanted = "1" if split == "train" else "0"
    keys = [key for key in table["images"] if table["train_test_split"][key] == wanted]
    files = [folder / "images" / table["images"][key] for key in keys]
    return Items(files, [int(table["image_class_labels"][k]) - 1 for k in keys], [words(f) for f in folders], folders)


_CUB_LISTS = ("images", "train_test_split", "image_class_labels", "classes")


def _dtd(folder: Path, split: str, entry: Entry) -> Items:
    parts = ("train", "val") if split == "train" else ("test",)
    found = [_torchvision(tv.DTD, folder, part, depth=2) for part in parts]
    files, label = ([x for part in found for x in part[k]] for k in (0, 1))
    return Items(files, label, [words(c) for c in found[0][2]], found[0][2])


def _food101(folder: Path, split: str, entry: Entry) -> Items:
    files, label, classes = _torchvision(tv.Food101, folder, split)
    return Items(files, label, [words(c) for c in classes], classes)


def _cars(folder: Path, split: str, entry: Entry) -> Items:
    return Items(*_torchvision(tv.StanfordCars, folder, split))


def _aircraft(folder: Path, split: str, entry: Entry) -> Items:
    part = {"train": "trainval" if entry.protocol == "official" else "train", "validation": "val"}.get(split, split)
    return Items(*_torchvision(tv.FGVCAircraft, folder, part, depth=2))


def _mat(file: Path, field: str) -> np.ndarray:
    with file.open("rb") as opened:
        return scipy.io.loadmat(opened)[field]


def _flowers(folder: Path, split: str, entry: Entry) -> Items:
    field = {"train": "trnid", "validation": "valid", "test": "tstid"}[split]
    ids = _mat(folder / "setid.mat", field).ravel()
    label = _mat(folder / "imagelabels.mat", "labels").ravel()
    names = tv.Flowers102.classes
    if (described := folder / "cat_to_name.json").is_file():
        table = json.loads(described.read_text(encoding="utf-8"))
        names = [table[str(c)] for c in range(1, len(table) + 1)]
    return Items(
        [folder / "jpg" / f"image_{i:05d}.jpg" for i in ids], [int(label[i - 1]) - 1 for i in ids], list(names)
    )


def _places(folder: Path, split: str, entry: Entry) -> Items:
    table = dict(line.rsplit(" ", 1) for line in lines(folder / "categories_places365.txt"))
    categories = sorted(table, key=lambda name: int(table[name]))
    listed = folder / ("places365_val.txt" if split == "test" else "places365_train_standard.txt")
    rows = [line.rsplit(" ", 1) for line in lines(listed)]
    kind = "val" if split == "test" else "data"
    sizes = [f"{kind}_256", f"{kind}_large"] if kind == "val" else ["data_256_standard", "data_large_standard"]
    pictures = next((folder / name for name in sizes if (folder / name).is_dir()), folder / sizes[0])
    names = [" ".join(words(part) for part in name.split("/")[2:]) for name in categories]
    return Items([pictures / name.lstrip("/") for name, _ in rows], [int(c) for _, c in rows], names)


def _imagenet(folder: Path, split: str, entry: Entry) -> Items:
    inside = {"train": "train", "test": "val"}[split]
    base = folder / "images" if (folder / "images").is_dir() else folder
    return from_folders(base / inside, imagenet_classes())


def _imagenet_v2(folder: Path, split: str, entry: Entry) -> Items:
    return from_folders(folder, {str(c): name for c, name in enumerate(imagenet_classes().values())})


def _imagenet_part(folder: Path, split: str, entry: Entry) -> Items:
    """The classes whose folders are there, in ImageNet's order: only they are scored."""
    known, there = imagenet_classes(), set(class_folders(folder))
    if alien := sorted(there - set(known)):
        raise ValueError(f"{folder}: {alien[0]!r} is no ImageNet class ({len(alien)} class folders too many)")
    return from_folders(folder, {wnid: name for wnid, name in known.items() if wnid in there})


def _vissl(folder: Path, split: str, entry: Entry) -> Items:
    """The `train` and `test` (or `val`) folders that VISSL's scripts write."""
    inside = split if split == "train" or (folder / "test").is_dir() else "val"
    if entry.dataset == "eurosat":
        return from_folders(folder / inside, _EUROSAT)
    left_out = {"BACKGROUND_Google", "Faces_easy"} if entry.dataset == "caltech101" else set()
    return from_folders(folder / inside, left_out=left_out)


def split_file(folder: Path, entry: Entry) -> Path:
    """CoOp's split file where an entry goes by it, else the folder: without it the data set is not there."""
    by_file = entry.protocol == "coop" and entry.dataset in _COOP
    return folder / f"split_zhou_{_COOP[entry.dataset][1]}.json" if by_file else folder


def _coop(folder: Path, split: str, entry: Entry) -> Items:
    pictures, file = _COOP[entry.dataset][0], split_file(folder, entry)
    content = json.loads(file.read_text(encoding="utf-8"))
    rows = content[{"validation": "val"}.get(split, split)]
    named: dict[int, str] = {}
    for path, label, name in (row for part in content.values() for row in part):
        if named.setdefault(label, name) != name:
            raise ValueError(f"{file}: class {label} is {named[label]!r} and, for {path}, {name!r}")
    names = [words(named[c]) for c in sorted(named)]
    files = [folder / pictures / path for path, _, _ in rows]
    told = {label: Path(path).parent.as_posix() for path, label, _ in rows}
    if len(set(told.values())) < len(told):  # the pictures of Flowers and Cars lie in one folder
        return Items(files, [label for _, label, _ in rows], names)
    said = [Path(path).parent.as_posix() for path, _, _ in rows]
    return Items(files, [label for _, label, _ in rows], names, [told.get(c, "") for c in sorted(named)], said=said)


def _ucf101(folder: Path, split: str, entry: Entry) -> Items:
    lists = folder / "ucfTrainTestlist"
    table = dict(line.split() for line in lines(lists / "classInd.txt"))
    folders = ["_".join(re.findall(r"[A-Z][^A-Z]*", table[k])) for k in sorted(table, key=int)]
    label = {table[k]: c for c, k in enumerate(sorted(table, key=int))}
    videos = [line.split()[0] for line in lines(lists / f"{split}list01.txt")]
    rows = [(label[v.split("/")[0]], Path(v).stem) for v in videos]
    files = [folder / "UCF-101-midframes" / folders[c] / f"{stem}.jpg" for c, stem in rows]
    return Items(files, [c for c, _ in rows], [words(f) for f in folders], folders)


def _cifar100(folder: Path, split: str, entry: Entry) -> Items:
    """The binary archive: a record is the coarse label, the fine label and 3072 bytes of a picture."""
    file = folder / ("test.bin" if split == "test" else "train.bin")
    table = np.fromfile(file, dtype=np.uint8)
    if len(table) % 3074:
        raise ValueError(f"{file} has {len(table):,} bytes, not a multiple of 3,074: it is cut short")
    label = table.reshape(-1, 3074)[:, 1].astype(int)
    index = np.arange(len(label))
    if entry.protocol == "held-out" and split != "test":
        held = seeds.rng(0, "cifar100", "held-out").permutation(len(label)) < len(label) // 5
        index = index[held if split == "validation" else ~held]
    files = [Record(file, int(i) * 3074 + 2) for i in index]
    return Items(files, label[index].tolist(), [words(name) for name in lines(folder / "fine_label_names.txt")])


def _cub_painting(folder: Path, split: str, entry: Entry) -> Items:
    return from_folders(folder)


def _domainnet(folder: Path, split: str, entry: Entry) -> Items:
    """Lists of "domain/class/picture.jpg label"; every domain of the split, one after the other."""
    domains = [name for name, counts in entry.domains.items() if counts[split == "test"]]
    rows = [
        (line.rsplit(" ", 1), d)
        for d, name in enumerate(domains)
        for line in lines(folder / f"{name}_{split}_mini.txt")
    ]
    told = {int(label): Path(path).parent.name for (path, label), _ in rows}
    folders = [told[c] for c in sorted(told)]
    return Items(
        [folder / path for (path, _), _ in rows],
        [int(label) for (_, label), _ in rows],
        [words(name) for name in folders],
        folders,
        [d for _, d in rows],
        tuple(domains),
    )


_OFFICIAL = {
    "oxford-pets": _pets,
    "cub": _cub,
    "dtd": _dtd,
    "food101": _food101,
    "places365": _places,
    "imagenet": _imagenet,
    "imagenet-v2": _imagenet_v2,
    "imagenet-r": _imagenet_part,
    "imagenet-sketch": _imagenet_part,
    "imagenet-a": _imagenet_part,
    "flowers102": _flowers,
    "stanford-cars": _cars,
    "fgvc-aircraft": _aircraft,
    "ucf101": _ucf101,
    "cifar100": _cifar100,
    "cub-painting": _cub_painting,
    "domainnet-40": _domainnet,
}


def read(folder: Path, split: str, entry: Entry) -> Items:
    """The items of a split of a registry entry."""
    by_file = split_file(folder, entry) != folder
    adapter = _vissl if entry.protocol == "vissl" else _coop if by_file else _OFFICIAL[entry.dataset]
    return adapter(folder, split, entry)


def check(items: Items, where: str) -> None:
    """That labels, names and paths agree.

    Raises:
        ValueError: two classes of one name, a label out of range, or a path that names another class than the label
    """
    names = items.class_names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{where}: two classes are called {twice!r}")
    for c in (min(items.label, default=0), max(items.label, default=0)):
        if not 0 <= c < len(names):
            raise ValueError(f"{where}: label {c} is outside the {len(names)} classes")
    if items.folders is None:
        return
    for k, (file, c) in enumerate(zip(items.files, items.label)):
        said = items.said[k] if items.said else file.parent.name
        if said != items.folders[c]:
            raise ValueError(
                f"{where}: {file} has label {c}, {names[c]!r}, whose folder is {items.folders[c]!r}: "
                "the class order is wrong"
            )
