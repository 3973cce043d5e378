"""What the tests have in common: a few real images, and the program, with which the package has to agree."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ROOT / "crates/pixelcnn/tests/data/cifar10-sample.npz"
EXAMPLES = ROOT / "crates/pixelcnn-py/examples"


@pytest.fixture(scope="session")
def sample():
    return dict(np.load(SAMPLE))


@pytest.fixture(scope="session")
def images(sample):
    return sample["testx"]


@pytest.fixture(scope="session")
def program():
    """Runs the program and gives what it says."""
    path = os.environ.get("PIXELCNN_PROGRAM")
    if path is None:
        build = ["cargo", "build", "--quiet", "--release", "--bin", "pixelcnn"]
        subprocess.run(build, cwd=ROOT, check=True)
        path = ROOT / "target/release/pixelcnn"

    def run(*arguments, cwd):
        command = [str(path), *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def tiny():
    """Settings of a model that is trained in seconds."""
    return {"nr_filters": 6, "nr_logistic_mix": 2, "steps": 12, "init_batch_size": 16, "samples": 0}
