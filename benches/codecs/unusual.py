"""How well scores find images of other sets among CIFAR-10's test images. Started by ./unusual,
which see."""

import argparse
import re
import shutil
import subprocess
from pathlib import Path

import imagecodecs
import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image, ImageFilter

from images import cifar10

SIDE = 32


def tiles(picture, count):
    """Squares of 32x32 cut out of a picture u8 [H, W, 3] without overlap, `count` spread over it."""
    rows, columns = (side // SIDE for side in picture.shape[:2])
    cut = picture[: rows * SIDE, : columns * SIDE].reshape(rows, SIDE, columns, SIDE, 3)
    cut = cut.transpose(0, 2, 1, 3, 4).reshape(-1, SIDE, SIDE, 3)
    return cut[np.linspace(0, len(cut) - 1, min(count, len(cut))).astype(int)]


def shrunk(picture, by):
    image = Image.fromarray(picture)
    return np.asarray(image.resize((image.width // by, image.height // by), Image.LANCZOS))


def digits(count):
    """Handwritten digits, 8x8 levels of 16, enlarged."""
    images = (sklearn.datasets.load_digits().images[:count] * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(image).resize((SIDE, SIDE), Image.BICUBIC) for image in images]
    return np.stack([np.asarray(image.convert("RGB")) for image in large])


def photographs(count):
    """Squares out of photographs, shrunk until objects are about as large as CIFAR-10's."""
    photographs = sklearn.datasets.load_sample_images().images + [
        getattr(skimage.data, name)() for name in ["astronaut", "chelsea", "coffee", "rocket"]
    ]
    return np.concatenate([tiles(shrunk(photograph, 2), count) for photograph in photographs])[:count]


def blurred(images):
    blur = ImageFilter.GaussianBlur(1)
    return np.stack([np.asarray(Image.fromarray(image).filter(blur)) for image in images])


# Sets of real images, and CIFAR-10's changed.
REAL = {
    "photographs": photographs,
    "histology": lambda count: tiles(skimage.data.immunohistochemistry(), count),
    "retina": lambda count: tiles(shrunk(skimage.data.retina(), 2), count),
    "galaxies": lambda count: tiles(skimage.data.hubble_deep_field(), count),
    "digits": digits,
}
CHANGED = {
    "upside down": lambda images: images[:, ::-1],
    "inverted": lambda images: 255 - images,
    "channels swapped": lambda images: images[..., ::-1],
    "blurred": blurred,
    "grey": lambda images: np.repeat(
        images.mean(-1, keepdims=True).round().astype(np.uint8), 3, axis=-1
    ),
    "constant": lambda images: np.broadcast_to(images[:, :1, :1], images.shape),
    "noise": lambda images: np.random.default_rng(1).integers(0, 256, images.shape, np.uint8),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("run", nargs="*", help="run folder or checkpoint file [the shipped model]")
    parser.add_argument("--images", type=int, default=1000, help="of each set at most")
    parser.add_argument("--sets", default="", help="only those whose names have one of these, a|b")
    options = parser.parse_args()
    count = options.images
    wanted = options.sets.split("|")

    work = Path(__file__).parent / "work"
    images = cifar10(2 * count)
    # The changed ones are others than those that they are compared with.
    sets = {name: make(count) for name, make in REAL.items()}
    sets |= {name: make(images[count:]) for name, make in CHANGED.items()}
    print("| set | images | likelihood alone | by PNG | by JPEG XL | by the smaller |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, images in sets.items():
        if not any(part in name for part in wanted):
            continue
        folder = work / name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for i, image in enumerate(images):
            png = imagecodecs.png_encode(np.ascontiguousarray(image), level=9)
            (folder / f"{i:05}.png").write_bytes(png)
        command = [options.program, "score", *options.run, "cifar10", "--limit", str(count)]
        command += ["--against", folder, "--maps", "12", "-o", work / "scores" / folder.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures = re.findall(r"^  (?:likelihood|corrected) .* ([\d.]+)$", said, re.MULTILINE)
        assert len(figures) == 4, said
        print(f"| {name} | {len(images)} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
