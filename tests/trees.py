"""Makers of miniature data sets in the official layouts: every class, `each` small pictures a class and split."""

import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from upclose.datasets import registry
from upclose.datasets.adapters import _COOP, _EUROSAT

PARTS = {"train": "train", "validation": "val", "test": "test"}


# Configurations of small models that stand under the names of published ones.
VISION = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
CLIP = {"embed_dim": 64, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
COCA = {
    "embed_dim": 64,
    "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": {**TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "context_length": 76, "attn_pooler_heads": 1},
    "custom_text": True,
}


@cache
def _encoded(value: int) -> bytes:
    with io.BytesIO() as file:
        Image.new("RGB", (10, 8), (value * 37 % 256, value * 91 % 256, 128)).save(file, "JPEG")
        return file.getvalue()


def picture(file: Path, value: int = 0) -> str:
    """A picture of 10 x 8 pixels; returns its name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(_encoded(value % 16))
    return file.name


def write(file: Path, rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def names(n: int) -> list[str]:
    """Folder names, some with letters beyond ASCII."""
    return [f"kind_{c:03d}" if c % 7 else f"Ærø_señal_{c:03d}" for c in range(n)]


def pets(folder, entry, each):
    # lower and upper case mixed, as in the real list, whose label order ignores case
    raw = [f"Breed_{c:02d}" if c % 2 else f"breed_{c:02d}" for c in range(entry.classes)]
    for k, part in enumerate(("trainval", "test")):
        rows = []
        for c, name in enumerate(raw):
            for i in range(each):
                stem = f"{name}_{k * 100 + i}"
                picture(folder / "images" / f"{stem}.jpg", c)
                rows.append(f"{stem} {c + 1} 1 1")
        write(folder / "annotations" / f"{part}.txt", rows)


def cub(folder, entry, each):
    names_ = [f"{c + 1:03d}.Painted_bird_{c}" for c in range(entry.classes)]
    items = [(c, train, i) for c in range(entry.classes) for train in (0, 1) for i in range(each)]
    paths = [f"{names_[c]}/b_{train}_{i}.jpg" for c, train, i in items]
    for (c, _, _), path in zip(items, paths):
        picture(folder / "images" / path, c)
    write(folder / "classes.txt", (f"{c + 1} {name}" for c, name in enumerate(names_)))
    write(folder / "images.txt", (f"{k + 1} {path}" for k, path in enumerate(paths)))
    write(folder / "image_class_labels.txt", (f"{k + 1} {item[0] + 1}" for k, item in enumerate(items)))
    write(folder / "train_test_split.txt", (f"{k + 1} {item[1]}" for k, item in enumerate(items)))


def dtd(folder, entry, each):
    for part in PARTS.values():
        rows = [f"{n}/{n}_{part}{i}.jpg" for n in names(entry.classes) for i in range(each)]
        for row in rows:
            picture(folder / "images" / row)
        write(folder / "labels" / f"{part}1.txt", rows)


def food101(folder, entry, each):
    for part in ("train", "test"):
        table = {n: [f"{n}/{part}{i}" for i in range(each)] for n in sorted(names(entry.classes))}
        for row in (row for rows in table.values() for row in rows):
            picture(folder / "images" / f"{row}.jpg")
        write(folder / "meta" / f"{part}.json", [json.dumps(table)])


def places365(folder, entry, each):
    kinds = [f"/a/place_{c}" if c % 5 else f"/a/place_{c}/outdoor" for c in range(entry.classes)]
    write(folder / "categories_places365.txt", (f"{name} {c}" for c, name in enumerate(kinds)))
    rows = []
    for k in range(entry.classes * each):
        name = picture(folder / "val_256" / f"Places365_val_{k:08d}.jpg", k)
        rows.append(f"{name} {k % entry.classes}")
    write(folder / "places365_val.txt", rows)


def folders(folder, names_, each):
    for c, name in enumerate(names_):
        for i in range(each):
            picture(folder / name / f"picture {i}.jpg", c)


def imagenet(folder, entry, each):
    for part in ("train", "val"):
        folders(folder / part, registry.imagenet_classes(), each)


def imagenet_part(folder, entry, each):
    folders(folder, list(registry.imagenet_classes())[:: 1000 // entry.classes], each)


def imagenet_v2(folder, entry, each):
    folders(folder, map(str, range(1000)), each)


def vissl(folder, entry, each):
    kinds = list(_EUROSAT) if entry.dataset == "eurosat" else names(entry.classes)
    extra = ["BACKGROUND_Google", "Faces_easy"] if entry.dataset == "caltech101" else []
    for part in ("train", "val" if entry.dataset == "eurosat" else "test"):
        folders(folder / part, [*kinds, *extra], each)


def flowers102(folder, entry, each):
    n = entry.classes * each * 3
    label = np.arange(n) % entry.classes + 1
    ids = np.arange(1, n + 1).reshape(3, -1)
    for i in range(n):
        picture(folder / "jpg" / f"image_{i + 1:05d}.jpg", i)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": label[None]})
    scipy.io.savemat(folder / "setid.mat", {"trnid": ids[:1], "valid": ids[1:2], "tstid": ids[2:]})


def stanford_cars(folder, entry, each):
    kinds = np.array([f"Maker Model {c} 2012" for c in range(entry.classes)], dtype=object)
    (folder / "devkit").mkdir(parents=True)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": kinds})
    for part, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = []
        for k in range(entry.classes * each):
            rows.append((picture(folder / f"cars_{part}" / f"{k:05d}.jpg", k), k % entry.classes + 1))
        table = np.array(rows, dtype=[("fname", object), ("class", int)])
        scipy.io.savemat(folder / file, {"annotations": table})


def aircraft(folder, entry, each):
    kinds = [f"707-3{c:02d} Series/B" for c in range(entry.classes)]
    write(folder / "variants.txt", kinds)
    k = 0
    for part in ("train", "val", "test"):
        rows = []
        for kind in kinds * each:
            k += 1
            rows.append(f"{picture(folder / 'images' / f'{k:07d}.jpg', k)[:-4]} {kind}")
        write(folder / f"images_variant_{part}.txt", rows)
    both = [(folder / f"images_variant_{part}.txt").read_text() for part in ("train", "val")]
    (folder / "images_variant_trainval.txt").write_text("".join(both))


def ucf101(folder, entry, each):
    kinds = [f"Play{chr(65 + c // 26)}{chr(97 + c % 26)}Game" for c in range(entry.classes)]
    spread = [f"Play_{k[4:6]}_Game" for k in kinds]
    write(folder / "ucfTrainTestlist" / "classInd.txt", (f"{c + 1} {k}" for c, k in enumerate(kinds)))
    for part, group in (("train", 8), ("test", 1)):
        rows = []
        for c, kind in enumerate(kinds):
            for i in range(each):
                stem = f"v_{kind}_g{group:02d}_c{i:02d}"
                picture(folder / "UCF-101-midframes" / spread[c] / f"{stem}.jpg", c)
                rows.append(f"{kind}/{stem}.avi" + (f" {c + 1}" if part == "train" else ""))
        write(folder / "ucfTrainTestlist" / f"{part}list01.txt", rows)


def cifar100(folder, entry, each):
    folder.mkdir(parents=True)
    write(folder / "fine_label_names.txt", [f"thing_{c}" for c in range(100)])
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        table = rng.integers(0, 256, (100 * each, 3074), dtype=np.uint8)
        table[:, 1] = np.arange(len(table)) % 100
        table.tofile(folder / f"{part}.bin")


def cub_painting(folder, entry, each):
    folders(folder, [f"{c + 1:03d}.Painted_bird_{c}" for c in range(entry.classes)], each)


def domainnet(folder, entry, each):
    for domain, (train, _) in entry.domains.items():
        for part in ("train", "test") if train else ("test",):
            rows = []
            for c, name in enumerate(names(entry.classes)):
                for i in range(each):
                    path = f"{domain}/{name}/{domain}_{part}_{i}.jpg"
                    picture(folder / path, c)
                    rows.append(f"{path} {c}")
            write(folder / f"{domain}_{part}_mini.txt", rows)


def coop(folder, entry, each):
    pictures, ending = _COOP[entry.dataset]
    flat = entry.dataset in ("flowers102", "stanford-cars", "oxford-pets")
    content = {}
    for part in PARTS.values():
        content[part] = []
        for c, name in enumerate(names(entry.classes)):
            for i in range(each):
                path = f"{name}_{part}{i}.jpg" if flat else f"{name}/{part}{i}.jpg"
                if entry.dataset == "stanford-cars":
                    path = f"cars_{'test' if part == 'test' else 'train'}/{path}"
                picture(folder / pictures / path, c)
                content[part].append([path, c, f"{name}_named"])
    (folder / f"split_zhou_{ending}.json").write_text(json.dumps(content))


_OFFICIAL = {
    "oxford-pets": pets,
    "cub": cub,
    "dtd": dtd,
    "food101": food101,
    "places365": places365,
    "imagenet": imagenet,
    "imagenet-v2": imagenet_v2,
    "imagenet-r": imagenet_part,
    "imagenet-sketch": imagenet_part,
    "imagenet-a": imagenet_part,
    "flowers102": flowers102,
    "stanford-cars": stanford_cars,
    "fgvc-aircraft": aircraft,
    "ucf101": ucf101,
    "cifar100": cifar100,
    "cub-painting": cub_painting,
    "domainnet-40": domainnet,
}


def make(root: Path, dataset: str, protocol: str | None = None, each: int = 1) -> Path:
    """A miniature of a registry entry below `root`; returns its folder."""
    entry = registry.entry(dataset, protocol)
    by_file = entry.protocol == "coop" and dataset in _COOP
    maker = vissl if entry.protocol == "vissl" else coop if by_file else _OFFICIAL[dataset]
    folder = root / entry.folder
    maker(folder, entry, each)
    return folder
