"""Training from Python."""

import os
import subprocess
import sys

import numpy as np
import pytest

import pixelcnn
from test_model import interrupted
from test_parity import same_parameters


@pytest.fixture()
def x(sample):
    return sample["trainx"][:96]


def test_a_run_is_told_and_kept(x, tiny, tmp_path):
    events = []
    model = pixelcnn.train(x, run=tmp_path / "run", callback=events.append, **tiny)
    kinds = [event["event"] for event in events]
    assert kinds[0] == "started" and kinds.count("step") == 12 and "evaluated" in kinds and "saved" in kinds
    step = next(event for event in events if event["event"] == "step")
    assert step["step"] == 1 and step["last_step"] == 12 and 3 < step["bits_per_dim"] < 30
    assert model.run == tmp_path / "run" or str(model.run) == str(tmp_path / "run")
    assert model.config["nr_filters"] == 6 and model.card["step"] == 12
    for name in ["config.toml", "metrics.jsonl", "images.npz", "checkpoints"]:
        assert (tmp_path / "run" / name).exists(), name
    same_parameters(model, pixelcnn.load(tmp_path / "run"))


def test_a_stopped_run_goes_on_to_the_same_end(x, tiny, tmp_path):
    whole = pixelcnn.train(x, run=tmp_path / "whole", progress=False, **tiny)
    stopped = pixelcnn.train(
        x, run=tmp_path / "parts", progress=False, callback=lambda event: event.get("step") != 5, **tiny
    )
    assert stopped.card["step"] == 5
    resumed = pixelcnn.resume(tmp_path / "parts", progress=False)
    assert resumed.card["step"] == 12
    same_parameters(whole, resumed)


def test_a_run_begins_with_a_model(x, sample, tiny, tmp_path):
    model = pixelcnn.train(x, run=tmp_path / "model", progress=False, **tiny)
    still = {"steps": 1, "learning_rate": 1e-12, "progress": False}
    shape = {name: value for name, value in tiny.items() if not name.startswith("nr_")}
    more = pixelcnn.train(x, init_from=model, run=tmp_path / "more", **{**shape, **still})
    assert more.config == model.config and more.card["step"] == 1
    wanted = model.bits_per_dim(x[:8])
    assert np.allclose(more.bits_per_dim(x[:8]), wanted, atol=1e-4)
    # Classes that it has yet to learn begin as it is.
    labels = sample["trainy"][:96]
    classes = pixelcnn.train(x, labels, init_from=model, run=tmp_path / "classes", **{**shape, **still})
    assert np.allclose(classes.bits_per_dim(x[:8], classes=labels[:8]), wanted, atol=1e-4)
    with pytest.raises(ValueError, match="init_from: nr_filters is 7 in the run and 6 in the model"):
        pixelcnn.train(x, init_from=model, run=tmp_path / "other", progress=False, nr_filters=7)
    assert not (tmp_path / "other").exists()
    with pytest.raises(TypeError):
        pixelcnn.train(x, init_from="model", run=tmp_path / "other", progress=False)


def test_an_error_of_the_callback_is_raised_and_nothing_lost(x, tiny, tmp_path):
    def fail(event):
        if event.get("step") == 3:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        pixelcnn.train(x, run=tmp_path / "run", progress=False, callback=fail, **tiny)
    assert pixelcnn.load(tmp_path / "run").card["step"] == 3


def test_ctrl_c_saves(x, tmp_path):
    np.save(tmp_path / "x.npy", x)
    code = """
import numpy as np, pixelcnn
def ready(event):
    if event.get("step") == 2:
        print("ready", flush=True)
try:
    pixelcnn.train(np.load("x.npy"), run="run", callback=ready, steps=100000, nr_filters=6, init_batch_size=8)
except KeyboardInterrupt as error:
    print(error)
"""
    said, errors, took = interrupted(code, tmp_path)
    assert "stopped and saved; to go on: pixelcnn.resume('run')" in said, errors
    step = pixelcnn.load(tmp_path / "run").card["step"]
    assert step >= 2
    assert pixelcnn.resume(tmp_path / "run", steps=step + 2, progress=False).card["step"] == step + 2


def test_a_callback_may_use_models_on_a_single_thread(x, tiny, tmp_path):
    np.save(tmp_path / "x.npy", x)
    code = f"""
import numpy as np, pixelcnn
x, model = np.load("x.npy"), pixelcnn.load()
def measure(event):
    if event.get("step") == 2:
        print(model.bits_per_dim(x[:2]).shape)
pixelcnn.train(x, run="run", callback=measure, progress=False, **{tiny})
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "RAYON_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "(2,)" in done.stdout


def test_progress_is_shown(x, tiny, tmp_path, capfd):
    pixelcnn.train(x, run=tmp_path / "run", **tiny)
    shown = capfd.readouterr().err
    assert "12/12" in shown and "bits/dim" in shown and "test " in shown
    pixelcnn.train(x, run=tmp_path / "silent", progress=False, **tiny)
    assert capfd.readouterr() == ("", "")


def test_without_tqdm_there_are_lines(x, tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    pixelcnn.train(x, run=tmp_path / "run", **tiny)
    assert "step 12  test " in capfd.readouterr().err


def test_what_is_wrong_is_said_before_anything_is_written(x, tiny, tmp_path):
    run = tmp_path / "run"
    for arguments, error, said in [
        ({"x": x / 255}, TypeError, "rint"),
        ({"x": x.transpose(0, 3, 1, 2)}, ValueError, r"transpose\(0, 2, 3, 1\)"),
        ({"x": x.astype(int)}, TypeError, "astype"),
        ({"x": x[0]}, ValueError, r"x\[None\]"),
        ({"x": x, "test_classes": [1]}, ValueError, "give test"),
        ({"x": x, "test": x, "classes": [1] * 96}, ValueError, "test_classes"),
        ({"x": x, "classes": [1]}, ValueError, "96 images"),
        ({"x": x, "classes": [-1] * 96}, ValueError, "from 0"),
        ({"x": x, "classes": ["a"] * 96}, TypeError, "return_inverse"),
        ({"x": x, "learning_rate": float("nan")}, ValueError, "learning_rate=nan"),
        ({"x": x, "steps": None}, ValueError, "steps=None"),
        ({"x": x, "batch_size": 1000}, ValueError, "1000"),
        ({"x": x, "device": "tpu"}, ValueError, "tpu"),
        ({"x": x, "coarse": x}, ValueError, "nr_codes"),
        ({"x": "cifar10", "classes": [1]}, ValueError, "classes"),
        ({"x": x, "preset": "huge"}, ValueError, "choose quick, small, cifar10"),
        ({"x": x, "filters": 3}, ValueError, "no setting filters.*nr_filters"),
        ({"x": x, "nr_filters": "many"}, ValueError, "nr_filters"),
        ({"x": x, "nr_filters": 0}, ValueError, "nr_filters"),
        ({"x": x, "optimizer": "sgd"}, ValueError, "optimizer"),
        ({"x": x, "class_conditional": True}, ValueError, "needs labels"),
        ({"x": str(tmp_path / "nowhere")}, (OSError, ValueError), "nowhere"),
    ]:
        with pytest.raises(error, match=said):
            pixelcnn.train(run=run, progress=False, **{**tiny, **arguments})
        assert not run.exists(), arguments
    run.mkdir()
    (run / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="pixelcnn.resume"):
        pixelcnn.train(x, run=run, progress=False, **tiny)
    assert [file.name for file in run.iterdir()] == ["mine.txt"]


def test_what_a_run_is_made_of_stays(x, tiny, tmp_path):
    run = tmp_path / "run"
    pixelcnn.train(x, run=run, progress=False, warmup_steps=0, cooldown=0, **tiny)
    with pytest.raises(ValueError, match="nr_filters: the run was begun with 6"):
        pixelcnn.resume(run, nr_filters=8)
    with pytest.raises(ValueError, match="not the folder of a run"):
        pixelcnn.resume(tmp_path / "nothing")
    with pytest.raises(ValueError, match="class_conditional"):
        pixelcnn.resume(run, class_conditional=True)
    with pytest.raises(ValueError, match="no setting filters"):
        pixelcnn.resume(run, filters=3)
    rates = []
    watch = lambda event: rates.append(event.get("learning_rate"))  # noqa: E731
    model = pixelcnn.resume(run, steps=14, learning_rate=1e-4, progress=False, callback=watch)
    assert model.card["step"] == 14
    assert [round(rate, 5) for rate in rates if rate] == [1e-4, 1e-4]
    # Where the images were is nothing any more.
    (run / "images.npz").rename(tmp_path / "moved.npz")
    with pytest.raises(ValueError, match="images are not there"):
        pixelcnn.resume(run, steps=15)
    assert pixelcnn.resume(run, steps=15, data=tmp_path / "moved.npz", progress=False).card["step"] == 15


def test_a_resumed_run_takes_what_it_is_given(x, tiny, tmp_path):
    by_time = {**tiny, "hours": 1e-9}
    del by_time["steps"]
    model = pixelcnn.train(x, run=tmp_path / "hours", progress=False, **by_time)
    step = model.card["step"]
    model = pixelcnn.resume(tmp_path / "hours", steps=step + 3, progress=False)
    assert model.card["step"] == step + 3
    # The rate that it was begun with, which has fallen since.
    run = tmp_path / "rate"
    schedule = {"learning_rate": 3e-3, "learning_rate_decay": 0.5, "warmup_steps": 0, "cooldown": 0}
    pixelcnn.train(x, run=run, progress=False, **schedule, **tiny)
    rates = []
    pixelcnn.resume(run, steps=13, learning_rate=3e-3, progress=False,
                    callback=lambda event: rates.append(event.get("learning_rate")))
    assert [rate for rate in rates if rate] == [pytest.approx(3e-3 * 0.5)]
    # What was edited is not taken in silence.
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("seed = 1", "seed = 2"))
    with pytest.raises(ValueError, match="seed is 2, in the checkpoint 1"):
        pixelcnn.resume(run, steps=15)


def test_without_its_checkpoints_a_run_is_not_begun_again(x, tiny, tmp_path):
    run = tmp_path / "run"
    pixelcnn.train(x, run=run, progress=False, **tiny)
    for checkpoint in (run / "checkpoints").glob("step-*"):
        checkpoint.unlink()
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="checkpoints are gone"):
        pixelcnn.resume(run)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_numpy_false_stops_too(x, tiny, tmp_path):
    stop = lambda event: np.bool_(event.get("step") != 4)  # noqa: E731
    assert pixelcnn.train(x, run=tmp_path / "run", progress=False, callback=stop, **tiny).card["step"] == 4


def test_notes_are_told(x, tiny, tmp_path, capfd):
    np.savez(tmp_path / "more.npz", x=x, unused=x[:2, :3])
    notes = []
    pixelcnn.train(tmp_path / "more.npz", run=tmp_path / "run", **tiny,
                   callback=lambda event: notes.append(event.get("text")) if event["event"] == "note" else None)
    assert any("unused" in note for note in notes)
    assert "unused" in capfd.readouterr().err
