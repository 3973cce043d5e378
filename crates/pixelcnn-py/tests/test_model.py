"""What one can do with a model."""

import copy
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import pixelcnn


@pytest.fixture(scope="module")
def model():
    return pixelcnn.load()


@pytest.fixture(scope="module")
def few(images):
    return images[:4]


@pytest.fixture(scope="module")
def classes(sample, tiny, tmp_path_factory):
    """A class-conditional model."""
    run = tmp_path_factory.mktemp("classes") / "run"
    return pixelcnn.train(sample["trainx"], sample["trainy"], run=run, progress=False, **tiny)


def test_likelihoods_agree(model, few):
    bits = model.bits_per_dim(few)
    assert bits.dtype == np.float64 and bits.shape == (4,)
    assert (0.5 < bits).all() and (bits < 8).all()
    dims = few[0].size
    assert np.allclose(model.score_samples(few), -bits * np.log(2) * dims, rtol=1e-12)
    pixels = model.bits_per_pixel(few)
    assert pixels.dtype == np.float32 and pixels.shape == (4, 32, 32)
    assert np.allclose(pixels.sum((1, 2)), bits * dims, rtol=1e-5)
    # Of images of any size, and however they lie.
    part = few[:, 1:20, ::-1]
    assert np.array_equal(model.bits_per_dim(part), model.bits_per_dim(np.ascontiguousarray(part)))
    assert np.array_equal(model.bits_per_dim(few[::-1]), bits[::-1])
    for lying in [np.asfortranarray(few), few.copy()[:, :, :, :], memoryview(few), np.ma.masked_array(few)]:
        assert np.array_equal(model.bits_per_dim(lying), bits)
    few.setflags(write=False)
    assert np.array_equal(model.bits_per_dim(few), bits)
    assert model.bits_per_dim(few[:0]).shape == (0,)


def test_distributions_are_the_likelihood(model, few):
    expected = model.distribution(few[:2])
    shape = (2, 32, 32, 3, model.config["nr_logistic_mix"])
    assert expected.weights.shape == expected.means.shape == expected.scales.shape == shape
    assert np.allclose(expected.weights.sum(-1), 1, atol=1e-5)
    assert (expected.scales > 0).all()
    bits = model.bits_per_pixel(few[:2])
    for image, row, column in [(0, 0, 0), (1, 31, 31), (0, 7, 12)]:
        probabilities = expected.probabilities(image, row, column)
        assert probabilities.shape == (3, 256)
        assert np.allclose(probabilities.sum(1), 1, atol=1e-4)
        of_levels = probabilities[range(3), few[image, row, column]]
        assert np.isclose(-np.log2(of_levels).sum(), bits[image, row, column], rtol=1e-3)
    # The logistics by themselves.
    edges = (np.arange(-1, 256) + 0.5)[:, None, None]
    means, scales = expected.means[0, 7, 12], expected.scales[0, 7, 12]
    cumulative = 1 / (1 + np.exp(-(edges - means) / scales))
    cumulative[0], cumulative[-1] = 0, 1
    by_hand = (np.diff(cumulative, axis=0) * expected.weights[0, 7, 12]).sum(-1).T
    assert np.allclose(by_hand, expected.probabilities(0, 7, 12), atol=1e-4)
    with pytest.raises(IndexError, match="column 32"):
        expected.probabilities(0, 0, 32)
    copied = pickle.loads(pickle.dumps(expected))
    assert np.array_equal(copied.probabilities(0, 7, 12), expected.probabilities(0, 7, 12))
    nothing = model.distribution(few[:0])
    assert nothing.means.shape == (0, *shape[1:])


def test_samples(model):
    four = model.sample(4)
    assert four.dtype == np.uint8 and four.shape == (4, 32, 32, 3)
    assert np.array_equal(model.sample(2), four[:2])
    assert not np.array_equal(model.sample(2, seed=2), four[:2])
    assert model.sample(1, size=(5, 9)).shape == (1, 5, 9, 3)
    assert model.sample(0).shape == (0, 32, 32, 3)
    for wrong in [{"n": -1}, {"seed": -1}, {"size": (-1, 3)}, {"size": (0, 3)}]:
        with pytest.raises(ValueError):
            model.sample(**wrong)
    for many in [10**12, 2**62]:
        with pytest.raises(MemoryError):
            model.sample(many)
        with pytest.raises(MemoryError):
            model.complete(four, np.ones((32, 32), bool), variants=many)
    for temperature in [0, -1, float("nan")]:
        with pytest.raises(ValueError, match="temperature"):
            model.sample(1, temperature=temperature)
    with pytest.raises(ValueError, match="no classes"):
        model.sample(1, classes=0)


def test_completions(model, few):
    known = np.zeros((32, 32), bool)
    known[:20, 3:] = True
    found = model.complete(few[:2], known, variants=2)
    assert found.shape == (2, 2, 32, 32, 3)
    assert (found[:, :, known] == few[:2, None][:, :, known]).all()
    assert not np.array_equal(found[:, 0], found[:, 1])
    # However the mask lies.
    turned = model.complete(few[:1, :4, :6], known[:6, :4].T)
    assert np.array_equal(turned, model.complete(few[:1, :4, :6], np.ascontiguousarray(known[:6, :4].T)))
    for mask, error in [(known[:5], ValueError), (known.astype(int), TypeError)]:
        with pytest.raises(error, match="mask"):
            model.complete(few, mask)


def test_archives(model, few):
    grey = few[..., 0]
    things = {"a/b.png": few[0], "grey": grey[1], "notes.txt": b"of no picture", "cut.png": few[2][:3, 5:]}
    data = model.compress(things)
    found = model.decompress(data, names=True)
    assert list(found) == list(things)
    assert np.array_equal(found["a/b.png"], few[0])
    assert np.array_equal(found["grey"][..., 0], grey[1])
    assert np.array_equal(found["cut.png"], few[2][:3, 5:])
    assert found["notes.txt"] == b"of no picture"
    assert len(model.decompress(data)) == 4
    for given in [bytearray(data), memoryview(data)]:
        assert len(model.decompress(given)) == 4
    assert model.compress([bytearray(data)]) == model.compress([data])
    with pytest.raises(ValueError, match="choose shipped:cifar10"):
        pixelcnn.load("shipped:none")
    (turned,) = model.decompress(model.compress([np.asfortranarray(few[0])]))
    assert np.array_equal(turned, few[0])
    for single in [few[0], grey[0]]:
        with pytest.raises(ValueError, match=r"\[image\]"):
            model.compress(single)
    for cut in [data[:-1], data[:20], data[: len(data) // 2], data.replace(b"pxc", b"pxd", 1), b""]:
        with pytest.raises(ValueError):
            model.decompress(cut)
    with pytest.raises(ValueError, match=r"\.\./up"):
        model.compress({"../up": few[0]})
    with pytest.raises(TypeError, match="PNG"):
        model.compress([few[0].astype(float)])
    with pytest.raises(TypeError, match="list"):
        model.compress(data)


def test_pictures_of_many_kinds_come_back(model, tmp_path):
    from PIL import Image

    random = np.random.default_rng(0)
    alpha = random.integers(0, 256, (9, 7, 4), dtype=np.uint8)
    deep = random.integers(0, 1 << 16, (6, 8), dtype=np.uint16)
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    files = [(tmp_path / name).read_bytes() for name in ["alpha.png", "deep.png"]]
    one, two = model.decompress(model.compress(files))
    assert np.array_equal(one, alpha)
    assert two.dtype == np.uint16 and np.array_equal(two[..., 0], deep)


def test_what_is_no_image_is_refused_with_what_to_do(model, few):
    for wrong, error, remedy in [
        (few.transpose(0, 3, 1, 2), ValueError, r"x\.transpose\(0, 2, 3, 1\)"),
        (few / 255, TypeError, r"numpy\.rint\(numpy\.asarray\(x\) \* 255\)"),
        (few.astype(int), TypeError, r"asarray\(x\)\.astype\('uint8'\)"),
        (few.astype(int) - 300, TypeError, "scale them"),
        (few > 100, TypeError, "black and white"),
        (few[:1, :2, :2].tolist(), TypeError, r"asarray\(x\)\.astype\('uint8'\)"),
        (np.ma.masked_array(few, few > 100), ValueError, "masked"),
        (few[0], ValueError, r"x\[None\]"),
        (few[..., :2], ValueError, r"\[N, H, W, 3\]"),
        (few[:, :0], ValueError, "nothing"),
        ("images.png", ValueError, r"\[N, H, W, 3\]"),
        (None, ValueError, r"\[N, H, W, 3\]"),
    ]:
        with pytest.raises(error, match=remedy):
            model.bits_per_dim(wrong)
    for names in [{"coarse": few}, {"classes": 1}]:
        with pytest.raises(ValueError, match="leave"):
            model.bits_per_dim(few, **names)
    with pytest.raises(ValueError, match="no classes"):
        model.predict_proba(few)


def test_classes(classes, few):
    assert classes.config["nr_classes"] == 10
    bits = np.stack([classes.bits_per_dim(few, classes=label) for label in range(10)], axis=1)
    each = classes.bits_per_dim(few, classes=[0, 9, 3, 3])
    assert np.array_equal(each, bits[range(4), [0, 9, 3, 3]])
    probabilities = classes.predict_proba(few)
    nats = -bits * np.log(2) * few[0].size
    by_hand = np.exp(nats - nats.max(1, keepdims=True))
    assert np.allclose(probabilities, by_hand / by_hand.sum(1, keepdims=True))
    # Each class in turn, where none is asked for.
    drawn = classes.sample(3, size=(8, 8))
    assert np.array_equal(drawn, classes.sample(3, size=(8, 8), classes=np.arange(3)))
    for wrong, error in [(10, ValueError), (-1, ValueError), ([1], ValueError), ([1.5] * 4, TypeError)]:
        with pytest.raises(error, match="class"):
            classes.bits_per_dim(few, classes=wrong)
    with pytest.raises(ValueError, match="give classes"):
        classes.bits_per_dim(few)
    with pytest.raises(ValueError, match="choose a number from 0 to 9"):
        classes.sample(1, classes="horse")


def test_archives_find_their_model(model, few, tiny, sample, tmp_path):
    """Those of a shipped model are read by any, those of others by theirs alone."""
    other = pixelcnn.train(sample["trainx"], run=tmp_path / "run", progress=False, **tiny)
    named = pixelcnn.load("shipped:cifar10")
    assert np.array_equal(other.decompress(named.compress([few[0]]))[0], few[0])
    with pytest.raises(ValueError, match="made with the model"):
        model.decompress(other.compress([few[0]]))


def test_names_of_classes(tiny, tmp_path):
    from PIL import Image

    for name, level in [("dark", 20), ("light", 200)]:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for image in range(20):
            Image.new("RGB", (8, 8), (level, level, image)).save(tmp_path / "photos" / name / f"{image}.png")
    model = pixelcnn.train(tmp_path / "photos", class_conditional=True, run=tmp_path / "run", progress=False, **tiny)
    assert model.card["class_names"] == ["dark", "light"]
    model.save(tmp_path / "saved")
    for path in ["run", "saved"]:
        found = pixelcnn.load(tmp_path / path)
        assert np.array_equal(found.sample(2, classes="light"), model.sample(2, classes=1))
    with pytest.raises(ValueError, match="choose dark, light"):
        model.sample(1, classes="grey")


def test_codes(tmp_path):
    random = np.random.default_rng(1)
    coarse = random.integers(0, 3, (60, 4, 4))
    codes = (coarse.repeat(2, 1).repeat(2, 2) * 5 + random.integers(0, 2, (60, 8, 8))).astype(np.uint16)
    settings = {"nr_codes": 12, "nr_coarse_codes": 3, "nr_filters": 6, "steps": 10, "init_batch_size": 8}
    model = pixelcnn.train(codes, coarse=coarse, run=tmp_path / "run", batch_size=8, progress=False, **settings)
    bits = model.bits_per_dim(codes[:5], coarse=coarse[:5])
    assert bits.shape == (5,) and (bits < 12).all()
    expected = model.distribution(codes[:5], coarse=coarse[:5])
    assert expected.shape == (5, 8, 8, 12) and np.allclose(expected.sum(-1), 1, atol=1e-5)
    of_codes = np.take_along_axis(expected, codes[:5, ..., None].astype(int), -1)[..., 0]
    assert np.allclose(-np.log2(of_codes).mean((1, 2)), bits, rtol=1e-4)
    begun = {"init_from": model, "steps": 1, "learning_rate": 1e-12, "batch_size": 8, "progress": False}
    more = pixelcnn.train(codes, coarse=coarse, run=tmp_path / "more", **begun)
    assert np.allclose(more.bits_per_dim(codes[:5], coarse=coarse[:5]), bits, atol=1e-4)
    drawn = model.sample(coarse=coarse[:3])
    assert drawn.dtype == np.uint16 and drawn.shape == (3, 8, 8) and drawn.max() < 12
    known = np.ones((8, 8), bool)
    known[5:] = False
    completed = model.complete(codes[:2], known, 2, coarse=coarse[:2])
    assert completed.shape == (2, 2, 8, 8)
    assert (completed[:, :, :5] == codes[:2, None, :5]).all()
    for wrong in [{}, {"coarse": coarse[:4]}, {"coarse": coarse[:5, :3]}]:
        with pytest.raises(ValueError, match="coarse"):
            model.bits_per_dim(codes[:5], **wrong)
    with pytest.raises(TypeError, match="whole numbers"):
        model.bits_per_dim(codes[:5] / 2, coarse=coarse[:5])
    with pytest.raises(ValueError):
        model.bits_per_dim(codes[:5] + 12, coarse=coarse[:5])
    with pytest.raises(ValueError):
        model.compress([codes[0].astype(np.uint8)])


def test_files(model, few, tmp_path):
    model.save(tmp_path / "saved")
    for saved in ["saved", "saved/model.safetensors"]:
        again = pixelcnn.load(tmp_path / saved)
        assert np.array_equal(again.bits_per_dim(few), model.bits_per_dim(few))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        model.save(tmp_path / "saved")
    model.save(tmp_path / "saved", overwrite=True)
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["nr_filters"] == model.config["nr_filters"]
    with pytest.raises(FileNotFoundError, match="nothing-there"):
        pixelcnn.load(tmp_path / "nothing-there")
    (tmp_path / "no-model").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="no-model"):
        pixelcnn.load(tmp_path / "no-model")
    with pytest.raises(ValueError, match="device"):
        pixelcnn.load(device="tpu")


def test_state_dicts(model, classes, tmp_path):
    from safetensors.numpy import load_file

    original = model.state_dict()
    model.save(tmp_path / "saved")
    file = load_file(tmp_path / "saved/model.safetensors")
    assert set(file) == set(original)
    for name, values in original.items():
        assert values.dtype == np.float32
        assert np.array_equal(file[name].astype(np.float32), values), name
    port = model.state_dict("port")
    assert len(port) == len(original)
    assert sum(values.size for values in port.values()) >= sum(values.size for values in original.values())
    # A convolution of both: weights [out, in, rows, columns] of unit length times g.
    v, g = original["model/conv2d_0/V"], original["model/conv2d_0/g"]
    assert np.array_equal(port["u_init.conv.weight_v"], v.transpose(3, 2, 0, 1))
    assert np.array_equal(port["u_init.conv.weight_g"].ravel(), g)
    # A transposed one [in, out, rows, columns]: the same weights, whose lengths are told otherwise.
    v, g = original["model/deconv2d_0/V"], original["model/deconv2d_0/g"]
    wanted = v * (g / np.sqrt((v**2).sum((0, 1, 3))))[:, None]
    v, g = port["upsize_u_stream.0.deconv.weight_v"], port["upsize_u_stream.0.deconv.weight_g"]
    found = v * (g / np.sqrt((v**2).sum((1, 2, 3), keepdims=True)))
    assert np.allclose(found, wanted.transpose(3, 2, 0, 1), atol=1e-6)
    with pytest.raises(ValueError, match="nr_classes"):
        classes.state_dict("port")
    with pytest.raises(ValueError, match="original"):
        model.state_dict("keras")


def test_copies_are_the_same(model, classes, few):
    for one in [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]:
        assert np.array_equal(one.bits_per_dim(few), model.bits_per_dim(few))
        assert one.card == model.card and one.run is None
    assert pickle.loads(pickle.dumps(classes)).run == classes.run


def test_a_notebook_shows_card_and_samples(model):
    html = model._repr_html_()
    assert "3.216" in html and "2184104" in html and "data:image/png;base64," in html
    assert "<pixelcnn.Model PixelCNN++ cifar10: bits/dim 3.216" in repr(model)


def test_everything_is_documented():
    for thing in [pixelcnn, pixelcnn.load, pixelcnn.train, pixelcnn.resume, pixelcnn.Model, pixelcnn.Distribution]:
        assert thing.__doc__
    for kind in [pixelcnn.Model, pixelcnn.Distribution]:
        for name, thing in vars(kind).items():
            if not name.startswith("_"):
                assert thing.__doc__, name
    for thing in [pixelcnn.Model.bits_per_dim, pixelcnn.Model.sample, pixelcnn.Model.complete]:
        assert "uint8 [N, H, W, C]" in thing.__doc__ or "uint8 [n, H, W, C]" in thing.__doc__


def test_other_threads_go_on(model):
    counted, done = 0, threading.Event()
    begin = time.monotonic()
    thread = threading.Thread(target=lambda: (model.sample(8), done.set()))
    thread.start()
    while not done.is_set():
        counted += 1
        time.sleep(0.001)
    took = time.monotonic() - begin
    thread.join()
    # Had the lock been held, it would have counted once or twice.
    assert counted > 20 * took, (counted, took)


def test_threads_may_share_a_model(model, images):
    alone = model.bits_per_dim(images[:24])
    found = [None] * 6

    def measure(place):
        found[place] = model.bits_per_dim(images[4 * place : 4 * place + 4])

    threads = [threading.Thread(target=measure, args=[place]) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(np.concatenate(found), alone)


def test_a_callback_shares_a_model_with_another_thread(model, images, tmp_path):
    """Neither waits for the other's end."""
    thread = threading.Thread(target=lambda: [model.bits_per_dim(images[:8]) for _ in range(6)])
    thread.start()
    steps = 0

    def measure(event):
        nonlocal steps
        if event["event"] == "step":
            steps += 1
            model.bits_per_dim(images[:2])

    pixelcnn.train(images, run=tmp_path / "run", callback=measure, progress=False, nr_filters=4, steps=10,
                   init_batch_size=8, samples=0)
    thread.join(timeout=60)
    assert steps == 10 and not thread.is_alive()


def test_what_takes_long_does_not_hold_up_others(model, images, tmp_path):
    went_on = threading.Event()
    training = threading.Thread(target=lambda: pixelcnn.train(
        images, run=tmp_path / "run", callback=lambda _: not went_on.is_set(), progress=False, nr_filters=8,
        steps=10**6, epochs=10**6, init_batch_size=8, samples=0))
    training.start()
    time.sleep(0.5)
    begin = time.monotonic()
    for _ in range(8):
        model.bits_per_dim(images[:4])
    took = time.monotonic() - begin
    alive = training.is_alive()
    went_on.set()
    training.join(timeout=60)
    # The training would have gone on for hours.
    assert alive and not training.is_alive() and took < 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_forked_in_the_middle_of_work_can_work(model, few):
    alone = model.bits_per_dim(few)
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            model.bits_per_dim(few)

    thread = threading.Thread(target=busy)
    thread.start()
    time.sleep(0.2)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply_async(model.bits_per_dim, (few,)).get(timeout=120)
    stop.set()
    thread.join()
    assert np.array_equal(found, alone)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_processes_have_threads_of_their_own(model, few):
    alone = model.bits_per_dim(few)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply_async(model.bits_per_dim, (few,)).get(timeout=120)
    assert np.array_equal(found, alone)


def interrupted(code, cwd, ready="ready"):
    """Runs some Python, sends Ctrl-C once it is ready, and gives what it said and how long it took to end."""
    command = [sys.executable, "-c", code]
    # As in a shell: what runs tests in the background may ignore the signal.
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    child = subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             preexec_fn=heed)
    for line in child.stdout:
        if line.strip() == ready:
            break
    time.sleep(0.5)
    begin = time.monotonic()
    child.send_signal(signal.SIGINT)
    said, errors = child.communicate(timeout=120)
    return said, errors, time.monotonic() - begin


@pytest.mark.parametrize("work", [
    "model.sample(2000)",
    "model.bits_per_dim(np.zeros((20000, 32, 32, 3), np.uint8))",
    "model.compress(np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 3), np.uint8))",
])
def test_ctrl_c_stops_long_work(work, tmp_path):
    code = f"""
import numpy as np, pixelcnn
model = pixelcnn.load()
print("ready", flush=True)
try:
    {work}
except KeyboardInterrupt:
    print("stopped", model.sample(1).shape)
"""
    said, errors, took = interrupted(code, tmp_path)
    assert said == "stopped (1, 32, 32, 3)\n", errors
    assert took < 30
