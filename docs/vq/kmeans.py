#!/usr/bin/env python3
"""Codes of CIFAR-10 by k-means, to try a prior over codes on; see ../vq.md.

A code is the nearest of K small square patches of colour, found by k-means on the training images. It
stands in for the encoder of a VQ-VAE: what a prior is given is the same.

    kmeans.py encode CIFAR10 codes.npz    maps [N, 16, 16] of 512 codes, with labels
    kmeans.py decode codes.npz maps.npy pictures.png

Needs numpy and pillow.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def read(folder, names, count):
    """Images u8 [N, 32, 32, 3] and labels of CIFAR-10's binary version."""
    records = [np.fromfile(folder / name, np.uint8).reshape(-1, 3073) for name in names]
    records = np.concatenate(records)[:count]
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def patches(images, side):
    """[N, 32 / side, 32 / side, side * side * 3], in single precision."""
    n, s = 32 // side, side
    cut = images.reshape(-1, n, s, n, s, 3).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(-1, n, n, s * s * 3).astype(np.float32)


def nearest(points, centres):
    """The number of the centre that is nearest to each of the points [N, D]."""
    found = np.empty(len(points), np.uint16)
    squares = (centres**2).sum(1)
    for start in range(0, len(points), 1 << 14):
        part = points[start : start + (1 << 14)]
        found[start : start + len(part)] = (squares - 2 * part @ centres.T).argmin(1)
    return found


def k_means(points, k, rounds, random):
    """K centres of some points [N, D]; a centre that has lost all of its points begins anew."""
    centres = points[random.choice(len(points), k, replace=False)]
    for _ in range(rounds):
        codes = nearest(points, centres)
        counts = np.bincount(codes, minlength=k)
        for i in range(points.shape[1]):
            sums = np.bincount(codes, weights=points[:, i], minlength=k)
            centres[:, i] = sums / np.maximum(counts, 1)
        lost = counts == 0
        centres[lost] = points[random.choice(len(points), lost.sum())]
    return centres


def encode(arguments):
    random = np.random.default_rng(1)
    batches = [f"data_batch_{i}.bin" for i in range(1, 6)]
    splits = {
        "train": read(arguments.cifar10, batches, arguments.images),
        "test": read(arguments.cifar10, ["test_batch.bin"], arguments.images),
    }
    arrays = {f"labels_{split}": labels for split, (_, labels) in splits.items()}
    levels = {"codes": (arguments.side, arguments.codes)}
    if arguments.coarse:
        levels["coarse"] = (2 * arguments.side, arguments.coarse)
    for name, (side, k) in levels.items():
        points = patches(splits["train"][0], side).reshape(-1, side * side * 3)
        some = points[random.choice(len(points), min(len(points), 200_000), replace=False)]
        centres = np.rint(k_means(some, k, 20, random))
        for split, (images, _) in splits.items():
            cut = patches(images, side)
            codes = nearest(cut.reshape(-1, cut.shape[-1]), centres).reshape(cut.shape[:3])
            arrays[f"{name}_{split}"] = codes
            error = np.mean((centres[codes] - cut) ** 2)
            print(f"{name}_{split}: {codes.shape}, {k} codes, mean squared error {error:.1f}")
        np.save(arguments.output.with_suffix(f".{name}.npy"), centres.astype(np.uint8))
    np.savez(arguments.output, **arrays)


def decode(arguments):
    centres = np.load(arguments.codes.with_suffix(f".{arguments.level}.npy"))
    maps = np.load(arguments.maps)
    side = int((centres.shape[1] / 3) ** 0.5)
    n, (h, w) = len(maps), maps.shape[1:]
    images = centres[maps].reshape(n, h, w, side, side, 3).transpose(0, 1, 3, 2, 4, 5)
    images = images.reshape(n, h * side, w * side, 3)
    columns = int(np.ceil(n**0.5))
    rows = -(-n // columns)
    grid = np.full((rows * (h * side + 1) - 1, columns * (w * side + 1) - 1, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (h * side + 1), i % columns * (w * side + 1)
        grid[y : y + h * side, x : x + w * side] = image
    Image.fromarray(grid).save(arguments.output)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("encode", help="CIFAR-10 to codes")
    command.add_argument("cifar10", type=Path, help="folder of data_batch_1.bin and so on")
    command.add_argument("output", type=Path, help=".npz file")
    command.add_argument("--codes", type=int, default=512)
    command.add_argument("--side", type=int, default=2, help="of a patch, in pixels")
    command.add_argument("--coarse", type=int, default=0, help="codes of patches twice as large")
    command.add_argument("--images", type=int, help="of each split at most")
    command.set_defaults(run=encode)
    command = commands.add_parser("decode", help="maps of codes to pictures")
    command.add_argument("codes", type=Path, help="what encode has written")
    command.add_argument("maps", type=Path, help=".npy file of codes")
    command.add_argument("output", type=Path, help="picture")
    command.add_argument("--level", default="codes", choices=["codes", "coarse"])
    command.set_defaults(run=decode)
    arguments = parser.parse_args()
    arguments.run(arguments)


main()
