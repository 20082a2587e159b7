"""Crop and encode: over a plain PIL loop that encodes image by image, and over encoding alone."""

import warnings

import torch
from bench_crops import plain_loop
from measure import rates
from PIL import Image
from sklearn.datasets import load_sample_image

from upclose import birdlets, crops, encode
from upclose.encode import sources, tiny

CROPS, ROUNDS = 60, 5


def baseline(visual, images, boxes, encoder):
    """What the authors' programs do: one image after the other, its crops by PIL, then open_clip's own forward."""
    with torch.no_grad():
        for image, box in zip(images, boxes):
            torch.nn.functional.normalize(visual(plain_loop(image, box, encoder.image_size)), dim=-1)


def measure(encoder, pictures, *others):
    """Crops/s of the baseline, of ours, of ours on ready tensors, and of other encoders' ours, all in turn."""
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    boxes = torch.stack([crops.sample_boxes(*p.shape[1:], CROPS, key=str(i)) for i, p in enumerate(pictures)])
    ready = crops.extract(pictures, boxes, encoder.image_size, mean=encoder.mean, std=encoder.std).flatten(0, 1)

    @torch.no_grad()
    def encode_only():
        for x in ready.split(encoder.batch_size):
            encoder.features(x)

    return rates(
        len(ready),
        lambda: baseline(encoder.visual, images, boxes, encoder),
        lambda: encoder.encode_crops(pictures, boxes),
        encode_only,
        *(lambda other=other: other.encode_crops(pictures, boxes) for other in others),
        rounds=ROUNDS,
    )


def birdlets_tiny():
    """The shipped model, or its architecture with random weights, which is as fast."""
    try:
        return encode.load("birdlets-tiny", device="cpu")
    except ValueError:
        words = birdlets.vocabulary()
        model = tiny.build(tiny.CONFIG, words)
        parts = sources.Parts(model, tiny.tokenizer(words), model.visual.image_size[0], tiny.MEAN, tiny.STD)
        return encode.Encoder(parts, "birdlets-tiny with random weights")


def main():
    warnings.simplefilter("ignore")
    print(f"{CROPS} crops an image, crops/s, {torch.get_num_threads()} threads, best of {ROUNDS}")
    print("measure | baseline | ours | ratio | target")
    photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1).contiguous()
    half = [encode.load("ViT-B-32", device="cpu", precision="bf16")] if encode.bf16_on_cpu() else []
    base, ours, alone, *half = measure(encode.load("ViT-B-32", device="cpu"), [photograph], *half)
    print(f"ViT-B-32, fp32 | {base:.1f} | {ours:.1f} | {ours / base:.2f} | 1.0")
    print(f"ViT-B-32, fp32, end to end over encoding alone | {alone:.1f} | {ours:.1f} | {ours / alone:.2f} | -")
    if half:
        print(f"ViT-B-32, bf16 over the fp32 baseline | {base:.1f} | {half[0]:.1f} | {half[0] / base:.2f} | 1.7")
    else:
        print("ViT-B-32, bf16 over the fp32 baseline | - | not measured: no bf16 hardware | - | 1.7")
    small = birdlets_tiny()
    world = birdlets.dataset(n=8)
    base, ours, alone = measure(small, [world.load(i) for i in range(8)])
    print(f"{small.name} | {base:.0f} | {ours:.0f} | {ours / base:.2f} | 1.5")
    print(f"{small.name}, end to end over encoding alone | {alone:.0f} | {ours:.0f} | {ours / alone:.2f} | 0.80")


if __name__ == "__main__":
    main()
