"""Crops a second from a decoded picture to what the encoder takes, one thread, over a plain PIL loop."""

import time

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from upclose import crops

HEIGHT, WIDTH, CROPS, ROUNDS = 375, 500, 100, 7
TARGET = {224: 2.5, 64: 3.5}


def plain_loop(image, box, size):
    """What the authors' programs do: crop, resize, ToTensor and Normalize, one crop after the other."""
    to_tensor, normalise = transforms.ToTensor(), transforms.Normalize(crops.MEAN, crops.STD)
    return torch.stack(
        [normalise(to_tensor(image.crop(row).resize((size, size), Image.BICUBIC))) for row in map(tuple, box.tolist())]
    )


def rates(*functions):
    """Crops a second of each, the best of several rounds in turn."""
    best = [float("inf")] * len(functions)
    for _ in range(ROUNDS):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - start)
    return [CROPS / seconds for seconds in best]


def main():
    torch.set_num_threads(1)
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT // 5, WIDTH // 5, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    box = crops.sample_boxes(HEIGHT, WIDTH, CROPS)
    print(f"{CROPS} crops of side 0.5-0.9 of a {WIDTH} x {HEIGHT} picture, 1 thread, crops/s, best of {ROUNDS}")
    print("measure | baseline | ours | ratio | target")
    for size, target in TARGET.items():
        base, ours, raw = rates(
            lambda: plain_loop(image, box, size),  # noqa: B023
            lambda: crops.extract(pixels, box, size),  # noqa: B023
            lambda: crops.extract(pixels, box, size, torch.uint8),  # noqa: B023
        )
        print(f"{size} px, float32 normalised | {base:.0f} | {ours:.0f} | {ours / base:.2f} | {target}")
        print(f"{size} px, uint8 | {base:.0f} | {raw:.0f} | {raw / base:.2f} | -")


if __name__ == "__main__":
    main()
