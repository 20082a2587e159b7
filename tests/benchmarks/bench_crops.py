"""Crops a second from a decoded photograph to what the encoder takes, one thread, over a plain PIL loop."""

import torch
from measure import rates
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision import transforms

from upclose import crops

CROPS, ROUNDS = 100, 7
TARGET = {224: 2.5, 64: 3.5}


def plain_loop(image, box, size):
    """What the authors' programs do: crop, resize, ToTensor and Normalize, one crop after the other."""
    to_tensor, normalise = transforms.ToTensor(), transforms.Normalize(crops.MEAN, crops.STD)
    return torch.stack(
        [normalise(to_tensor(image.crop(row).resize((size, size), Image.BICUBIC))) for row in map(tuple, box.tolist())]
    )


def main():
    torch.set_num_threads(1)
    photograph = load_sample_image("china.jpg")
    image, pixels = Image.fromarray(photograph), torch.from_numpy(photograph.copy()).permute(2, 0, 1).contiguous()
    box = crops.sample_boxes(image.height, image.width, CROPS)
    size = f"{image.width} x {image.height}"
    print(f"{CROPS} crops of side 0.5-0.9 of a photograph of {size}, 1 thread, crops/s, best of {ROUNDS}")
    print("measure | baseline | ours | ratio | target")
    for size, target in TARGET.items():
        base, ours, raw = rates(
            CROPS,
            lambda: plain_loop(image, box, size),  # noqa: B023
            lambda: crops.extract(pixels, box, size),  # noqa: B023
            lambda: crops.extract(pixels, box, size, torch.uint8),  # noqa: B023
            rounds=ROUNDS,
        )
        print(f"{size} px, float32 normalised | {base:.0f} | {ours:.0f} | {ours / base:.2f} | {target}")
        print(f"{size} px, uint8 | {base:.0f} | {raw:.0f} | {raw / base:.2f} | -")


if __name__ == "__main__":
    main()
