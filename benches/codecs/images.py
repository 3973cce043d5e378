"""CIFAR-10's test images, as the program `pixelcnn` keeps them in the user's cache."""

import os
import sys
from pathlib import Path

import numpy as np


def cifar10(count):
    """The first `count` test images, u8 [count, 32, 32, 3]."""
    cache = os.environ.get("PIXELCNN_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pixelcnn"
    )
    file = Path(cache, "cifar10", "cifar-10-batches-bin", "test_batch.bin")
    if not file.exists():
        sys.exit(f"{file} not found: fetch it with `pixelcnn eval RUN --data cifar10 --limit 1`")
    rows = np.fromfile(file, np.uint8).reshape(-1, 1 + 3 * 32 * 32)[:count, 1:]
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
