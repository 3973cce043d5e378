"""The package and the program give the same bits. With CIFAR10, the folder of its binary batches, 1,000 images
of the test set are taken, else a few."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pixelcnn


@pytest.fixture(scope="module")
def many(images):
    folder = os.environ.get("CIFAR10")
    if folder is None:
        return images
    records = np.fromfile(Path(folder) / "test_batch.bin", np.uint8).reshape(-1, 3073)
    planes = records[:1000, 1:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))


def test_likelihoods(many, program, tmp_path):
    np.save(tmp_path / "images.npy", many)
    program("eval", "--data", "images.npy", "-o", "found.npz", cwd=tmp_path)
    found = np.load(tmp_path / "found.npz")["bits_per_dim"]
    assert np.array_equal(pixelcnn.load().bits_per_dim(many), found)


def test_samples(many, program, tmp_path):
    count = len(many)
    arguments = ["--num", count, "--temperature", 0.9, "--seed", 7, "--npz", "drawn.npz"]
    program("sample", *arguments, cwd=tmp_path)
    drawn = np.load(tmp_path / "drawn.npz")["images"]
    assert np.array_equal(pixelcnn.load().sample(count, temperature=0.9, seed=7), drawn)


def test_completions(images, program, tmp_path):
    Image.fromarray(images[0]).save(tmp_path / "image.png")
    arguments = ["--keep", "left:20", "--variants", 3, "--singles", "completed"]
    program("complete", "image.png", *arguments, cwd=tmp_path)
    known = np.zeros((32, 32), bool)
    known[:, :20] = True
    (found,) = pixelcnn.load().complete(images[:1], known, 3)
    files = sorted((tmp_path / "completed").iterdir())
    variants = [np.asarray(Image.open(file)) for file in files][-3:]
    assert np.array_equal(found, variants)


def test_archives(many, program, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(many):
        Image.fromarray(image).save(tmp_path / f"pictures/{number:04}.png")
    program("compress", "shipped:cifar10", "pictures", "-o", "pictures.pxc", cwd=tmp_path)
    archive = (tmp_path / "pictures.pxc").read_bytes()
    model = pixelcnn.load()
    found = model.decompress(archive, names=True)
    assert list(found) == [f"{number:04}.png" for number in range(len(many))]
    assert np.array_equal(list(found.values()), many)
    files = {name: (tmp_path / "pictures" / name).read_bytes() for name in found}
    assert model.compress(files) == archive
    # Of arrays the very same is coded.
    assert model.compress(many) == archive


def test_trainings(sample, program, tiny, tmp_path):
    x, y = sample["trainx"], sample["trainy"]
    model = pixelcnn.train(x, y, run=tmp_path / "ours", test=sample["testx"], test_classes=sample["testy"],
                           optimizer="muon", **tiny)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in tiny.items()]
    program("train", "theirs", "--data", tmp_path / "ours/images.npz", "--class-conditional", "--optimizer=muon",
            *flags, cwd=tmp_path)
    theirs = pixelcnn.load(tmp_path / "theirs")
    same_parameters(model, theirs)
    assert model.card["measured"]["bits_per_dim"] == theirs.card["measured"]["bits_per_dim"]
    # Each goes on with the other's run.
    program("train", "--resume", "ours", "--steps", 20, cwd=tmp_path)
    resumed = pixelcnn.resume(tmp_path / "theirs", steps=20)
    same_parameters(resumed, pixelcnn.load(tmp_path / "ours"))


def same_parameters(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert np.array_equal(one[name], other[name]), name
