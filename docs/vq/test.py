#!/usr/bin/env python3
"""Runs the example of ../vq.md in small: `test.py PROGRAM`, with numpy and pillow."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
PROGRAM = Path(sys.argv[1]).resolve()


def main():
    sample = np.load(HERE.parent.parent / "crates/pixelcnn/tests/data/cifar10-sample.npz")
    images = sample["testx"].transpose(0, 3, 1, 2).reshape(-1, 3072)
    labels = sample["testy"].astype(np.uint8).reshape(-1, 1)
    records = np.concatenate([labels, images], 1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)

        def run(*command):
            done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(f"{command}: {done.stderr}")
            return done.stdout

        for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
            records.tofile(folder / name)
        script = [sys.executable, HERE / "kmeans.py"]
        run(*script, "encode", folder, "codes.npz", "--codes", 24, "--coarse", 6)
        codes = np.load(folder / "codes.npz")
        assert codes["codes_train"].shape == (5 * len(images), 16, 16)
        np.savez(folder / "top.npz", codes=codes["coarse_train"])

        train = ["--nr-filters", 8, "--batch-size", 8, "--init-batch-size", 8, "--steps", 12, "--samples", 0]
        run(PROGRAM, "train", "top", "--data", "top.npz", "--nr-codes", 6, *train)
        told = run(
            PROGRAM, "train", "bottom", "--data", "codes.npz", "--nr-codes", 24, "--nr-coarse-codes", 6, *train
        )
        assert "bits/code" in told and "a histogram" in told, told
        run(PROGRAM, "sample", "top", "--num", 4, "-o", "top.npy")
        run(PROGRAM, "sample", "bottom", "--coarse", "top.npy", "-o", "bottom.npy")
        assert np.load(folder / "bottom.npy").shape == (4, 16, 16)
        run(*script, "decode", "codes.npz", "bottom.npy", "drawn.png")
        assert Image.open(folder / "drawn.png").size == (65, 65)

        # The codes of images are decoded to what they are of.
        np.save(folder / "own.npy", codes["codes_test"][:1])
        run(*script, "decode", "codes.npz", "own.npy", "own.png")
        decoded = np.asarray(Image.open(folder / "own.png")).astype(float)
        error = np.mean((decoded - sample["testx"][0]) ** 2)
        assert error < 0.3 * np.var(sample["testx"][0].astype(float)), error
    print("ok")


main()
