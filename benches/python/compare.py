#!/usr/bin/env python3
"""How fast the Python package measures and draws images beside the program, with the shipped model, in turns; see
README.md. Exits with 1 where it is slower by more than --within per cent."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import pixelcnn

ROOT = Path(__file__).resolve().parents[2]
BATCH = 64


def images(count):
    """Real ones, repeated."""
    sample = np.load(ROOT / "crates/pixelcnn/tests/data/cifar10-sample.npz")
    real = np.concatenate([sample["trainx"], sample["testx"]])
    return real[np.arange(count) % len(real)]


def seconds(work):
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=5 * BATCH)
    parser.add_argument("--within", type=float, default=3.0, help="per cent")
    arguments = parser.parse_args()
    count = arguments.images
    build = ["cargo", "build", "--quiet", "--release", "--bin", "pixelcnn"]
    subprocess.run(build, cwd=ROOT, check=True)
    program = ROOT / "target/release/pixelcnn"
    model, x = pixelcnn.load(), images(count)

    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/images.npy", x)
        np.save(f"{folder}/one.npy", x[:1])

        def run(*command):
            subprocess.run([program, *map(str, command)], cwd=folder, check=True, capture_output=True)

        # What it takes to begin is not counted: the program's is what one image takes.
        def evaluate(file):
            return seconds(lambda: run("eval", "--data", file))

        def sample(n):
            return seconds(lambda: run("sample", "--num", n, "-o", f"{time.time_ns()}.png"))

        def ours():
            for first in range(0, count, BATCH):
                model.bits_per_dim(x[first : first + BATCH])

        works = {
            "bits_per_dim": (lambda: evaluate("images.npy") - evaluate("one.npy"), lambda: seconds(ours)),
            "sample": (lambda: sample(BATCH + 1) - sample(1), lambda: seconds(lambda: model.sample(BATCH))),
        }
        slower = False
        print("| | program | package | ratio |\n|---|--:|--:|--:|")
        for name, (theirs, own) in works.items():
            own()
            times = [(theirs(), own()) for _ in range(arguments.rounds)]
            medians = [statistics.median(times) for times in zip(*times)]
            ratio = statistics.median(own / theirs for theirs, own in times)
            print(f"| `{name}` | {medians[0]:.2f} s | {medians[1]:.2f} s | {ratio:.3f} |", flush=True)
            slower |= ratio > 1 + arguments.within / 100
    return slower


if __name__ == "__main__":
    sys.exit(main())
