"""Beside other libraries: the examples run, and types are as the stubs say."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from conftest import EXAMPLES, SAMPLE


def run(*command, cwd):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_scikit_learn(tmp_path):
    said = run(EXAMPLES / "cross_validation.py", SAMPLE, 8, cwd=tmp_path)
    assert "bits/dim of each fold" in said and "drawn: (2, 32, 32, 3)" in said and "right: [" in said


def test_torch(tmp_path):
    pytest.importorskip("torch")
    said = run(EXAMPLES / "unusual.py", SAMPLE, cwd=tmp_path)
    assert "the most unusual" in said
    within = float(said.split("within ")[1].split()[0])
    assert within < 1e-5


def test_tensorboard(tmp_path):
    said = run(EXAMPLES / "curves.py", SAMPLE, cwd=tmp_path)
    assert "(60, " in said


def test_estimators_are_scikit_learns(sample, tiny):
    tiny = dict(tiny)
    from sklearn.base import clone
    from sklearn.exceptions import NotFittedError

    from pixelcnn.sklearn import PixelCNN, PixelCNNClassifier

    tiny = {name: tiny.pop(name) for name in ["nr_filters", "nr_logistic_mix", "steps"]} | {"settings": tiny}
    estimator = PixelCNN(**tiny)
    assert clone(estimator).get_params() == estimator.get_params()
    with pytest.raises(NotFittedError):
        estimator.score(sample["testx"])
    names = np.array(["plane", "car"])[sample["trainy"] % 2]
    classifier = PixelCNNClassifier(**tiny).fit(sample["trainx"], names)
    assert classifier.model_.run is None
    assert 0 <= classifier.score(sample["testx"][:4], ["car"] * 4, sample_weight=[1, 2, 3, 4]) <= 1
    few = sample["testx"][:3]
    assert set(classifier.predict(few)) <= {"plane", "car"}
    assert np.allclose(classifier.predict_proba(few).sum(1), 1)
    each = [classifier.model_.score_samples(few, classes=label) for label in range(2)]
    drawn = [classifier.sample(1, random_state=state) for state in [None, np.random.RandomState(3), 5]]
    assert all(image.shape == (1, 32, 32, 3) for image in drawn)
    again = pickle.loads(pickle.dumps(classifier))
    assert np.array_equal(again.predict_proba(few), classifier.predict_proba(few))
    assert np.allclose(classifier.score_samples(few), np.logaddexp(*each) - np.log(2))


def test_the_notebook_runs(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png;base64" in output.get("data", {}).get("text/html", "") for output in outputs)


def test_the_stubs_are_the_module(tmp_path):
    run("-m", "mypy.stubtest", "pixelcnn._pixelcnn", cwd=tmp_path)
    (tmp_path / "use.py").write_text(
        "import numpy as np\nimport pixelcnn\n\n"
        "model = pixelcnn.load()\n"
        "images = model.sample(2, size=(8, 8), temperature=0.9)\n"
        "bits: float = float(model.bits_per_dim(images).mean())\n"
        "data: bytes = model.compress(images)\n"
        "names: list[str] = list(model.decompress(data, names=True))\n"
        "trained: pixelcnn.Model = pixelcnn.train(images, steps=3)\n"
        "from pixelcnn.sklearn import PixelCNN\n"
        "estimator = PixelCNN(steps=3).fit(images)\n"
        "score: float = estimator.score(images)\n"
    )
    run("-m", "mypy", "--strict", "use.py", cwd=tmp_path)
