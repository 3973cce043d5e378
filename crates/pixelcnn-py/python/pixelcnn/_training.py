"""Training: what Python adds to it, images from arrays and a progress bar."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Callable, Dict, Optional, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _pixelcnn
from ._pixelcnn import Model

_Path = Union[str, "os.PathLike[str]"]
_Event = Dict[str, Any]

# Seconds between two lines of progress where there is no bar.
_INTERVAL = 10.0


def train(
    x: Union[ArrayLike, _Path],
    classes: Optional[ArrayLike] = None,
    *,
    test: Optional[ArrayLike] = None,
    test_classes: Optional[ArrayLike] = None,
    coarse: Optional[ArrayLike] = None,
    test_coarse: Optional[ArrayLike] = None,
    preset: str = "quick",
    init_from: Optional[Model] = None,
    run: Optional[_Path] = None,
    callback: Optional[Callable[[_Event], Optional[bool]]] = None,
    progress: bool = True,
    device: str = "auto",
    **settings: Any,
) -> Model:
    """Trains a model: the same, bit for bit, as ``pixelcnn train`` makes with the same settings.

    A run is a folder: ``config.toml``, ``checkpoints/``, ``metrics.jsonl``, TensorBoard events,
    ``samples.png``, and ``images.npz`` if the images were given as arrays. Ctrl-C saves the run and raises
    `KeyboardInterrupt`; :func:`resume`, or ``pixelcnn train --resume``, goes on exactly where it stopped.

    Parameters
    ----------
    x : uint8 [N, H, W, C], or str or os.PathLike
        The images, C 1 or 3; or the name of a data set (``"cifar10"``), or the path of a folder of pictures, a
        tar of them, or a NumPy file. Of a model of codes (``nr_codes=512``) whole numbers [N, H, W].
    classes : int [N], optional
        The class of each image, from 0: the model learns each class, so that it can draw and classify them,
        unless ``class_conditional=False``.
    test, test_classes : optional
        The images on which the model is measured; without them the share ``held_out`` (0.1) of `x` is kept
        for that.
    coarse, test_coarse : int [N, h, w], optional
        The coarser maps that a model of codes is to be given (``nr_coarse_codes=512``).
    preset : {"quick", "small", "cifar10", "cifar10-best"}
        The settings to begin with.
    init_from : Model, optional
        A trained model that the run begins with, which its own is like, whatever the preset says of models:
        fine-tuning. Size, classes and augmentation can be others (``class_conditional=False`` leaves its classes
        away). Classes are known by their names, or by their numbers where there are no names and as many; new ones
        begin as the mean of those that it knows.
    run : str or os.PathLike, optional
        The run's folder; by default ``runs/PRESET-N``, the first that is not there yet.
    callback : callable, optional
        Called with each event, a dict. Its ``"event"`` is

        - ``"note"``: ``text``, something about the images or the run's files
        - ``"downloading"``: ``what``, ``done``, ``total`` (bytes, None where it is not known)
        - ``"started"``: ``step``, ``last_step`` (None where time decides), ``steps_per_epoch``
        - ``"step"``: ``step``, ``last_step``, ``epoch``, ``bits_per_dim`` of the step's batch,
          ``learning_rate``, ``seconds``
        - ``"evaluated"``: ``step``, ``epoch``, ``bits_per_dim`` of the test images, its
          ``standard_error``, and whether it is the ``best``
        - ``"sampled"``: ``path``; ``"saved"``: ``step``, ``path``
        - ``"metrics_damaged"``: ``lines``, ``path`` of the file as it was

        If it returns False, the run is saved and stops.
    progress : bool
        Whether to show a bar, by tqdm where that is installed, else lines.
    device : str
        As of :func:`load`.
    **settings
        Override the preset's: ``nr_filters=32``, ``steps=1000``, ``optimizer="muon"`` and so on, every value of
        ``config.toml``.

    Returns
    -------
    Model
        The averaged parameters after the last step; ``model.run`` is the run's folder.
    """
    folder = os.fspath(_pixelcnn.first_free(preset) if run is None else run)
    _pixelcnn.expect_new(folder)
    if classes is not None:
        settings.setdefault("class_conditional", True)
    chosen = _as_json(settings)
    _pixelcnn.expect_settings(preset, chosen, init_from, device)
    arrays = {
        "classes": classes,
        "test": test,
        "test_classes": test_classes,
        "coarse": coarse,
        "test_coarse": test_coarse,
    }
    was_there = os.path.exists(folder)
    path = None
    if isinstance(x, (str, os.PathLike)):
        given = [name for name, array in arrays.items() if array is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: with the name of a data set there are no arrays beside it")
        data = os.fspath(x)
    else:
        codes = init_from.config.get("nr_codes", 0) if init_from is not None else 0
        named = _named(x, settings.get("nr_codes", codes) > 0, arrays)
        data = path = _write_images(folder, named)
    with _Listener(callback, progress) as hear:
        try:
            return _pixelcnn.train(folder, data, preset, chosen, init_from, device, hear)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_stopped(folder)) from None
        finally:
            # Of a run that has not begun nothing stays.
            if path is not None and not os.path.exists(os.path.join(folder, "config.toml")):
                os.remove(path)
                if not was_there and not os.listdir(folder):
                    os.rmdir(folder)


def resume(
    run: _Path,
    *,
    callback: Optional[Callable[[_Event], Optional[bool]]] = None,
    progress: bool = True,
    device: str = "auto",
    **settings: Any,
) -> Model:
    """Goes on with a run exactly where it stopped, after a crash from its last checkpoint.

    Parameters
    ----------
    run : str or os.PathLike
        The run's folder.
    callback, progress, device
        As of :func:`train`.
    **settings
        New values of what can be changed: the length (``steps``, ``epochs``, ``hours``), ``learning_rate`` of
        the next step and its schedule, ``shards``, how often to save and measure, and ``data`` where the images
        have moved.

    Returns
    -------
    Model
    """
    folder = os.fspath(run)
    with _Listener(callback, progress) as hear:
        try:
            return _pixelcnn.resume(folder, _as_json(settings), device, hear)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_stopped(folder)) from None


def _stopped(folder: str) -> str:
    if not os.path.isdir(os.path.join(folder, "checkpoints")):
        return "stopped before the first step"
    return f"stopped and saved; to go on: pixelcnn.resume({folder!r})"


def _as_json(settings: Dict[str, Any]) -> str:
    """As JSON, numbers and arrays of NumPy and paths too."""

    def other(value: Any) -> Any:
        return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else os.fspath(value)

    for name, value in settings.items():
        if value is None or isinstance(value, float) and not np.isfinite(value):
            raise ValueError(f"{name}={value}: that is no value; leave it out for the preset's")
        try:
            json.dumps(value, default=other)
        except TypeError:
            raise TypeError(f"{name}={value!r}: that is no setting's value") from None
    return json.dumps(settings, default=other)


def _named(x: ArrayLike, codes: bool, arrays: Dict[str, Optional[ArrayLike]]) -> Dict[str, NDArray[Any]]:
    """The arrays by the names that the file of a run's images has them under."""
    if not codes and (arrays["coarse"] is not None or arrays["test_coarse"] is not None):
        raise ValueError("coarse: only models of codes are given coarser maps: leave it out, or give nr_codes")
    test = arrays["test"]
    for name, own in [("test_classes", "classes"), ("test_coarse", "coarse")]:
        if arrays[name] is not None and test is None:
            raise ValueError(f"{name}: there are no test images: give test, or leave it out")
        if (arrays[name] is None) != (arrays[own] is None) and test is not None:
            raise ValueError(f"{own}: give both {own} and {name}, or neither")
    named = {}
    splits = [("", "_train" if test is not None else "", x)]
    if test is not None:
        splits.append(("test_", "_test", test))
    for prefix, split, images in splits:
        own_images = _checked(images, codes)
        named[("codes" if codes else "x") + split] = own_images
        classes, coarse = arrays[prefix + "classes"], arrays[prefix + "coarse"]
        if classes is not None:
            named["y" + split] = _checked_classes(prefix + "classes", classes, len(own_images))
        if coarse is not None:
            named["coarse" + split] = _checked(coarse, codes)
    return named


def _write_images(folder: str, named: Dict[str, NDArray[Any]]) -> str:
    """Writes the images to the run's folder, from where a resumed run reads them again."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "images.npz")
    # Whole or not at all; the name is one that an interrupted run's leftovers have.
    partial = os.path.join(folder, ".images.npz.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **named)  # type: ignore[arg-type]
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise
    return path


def _checked(images: ArrayLike, codes: bool) -> NDArray[Any]:
    """Images as they must be."""
    _pixelcnn.expect_images(images, codes)
    x = np.ascontiguousarray(images)
    return x if codes or x.ndim == 4 else x[..., None]


def _checked_classes(name: str, classes: ArrayLike, count: int) -> NDArray[Any]:
    numbers = np.asarray(classes)
    if np.ma.is_masked(classes):
        raise ValueError(f"{name}: some of them are masked: give only images that have one")
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        raise TypeError(
            f"{name}: an array {list(numbers.shape)} of {numbers.dtype}: classes are whole numbers [N], from 0; "
            "numpy.unique(..., return_inverse=True) numbers others"
        )
    if len(numbers) != count:
        raise ValueError(f"{name}: {len(numbers)} of them for {count} images: give one for each")
    if count and numbers.min() < 0:
        raise ValueError(f"{name}: classes are from 0 on")
    return numbers


class _Listener:
    """Hears each event: moves the bar, and calls the caller's function."""

    def __init__(self, callback: Optional[Callable[[_Event], Optional[bool]]], progress: bool) -> None:
        self.callback = callback
        self.bar = _Bar() if progress else None

    def __enter__(self) -> _Listener:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar:
            self.bar.close()

    def __call__(self, event: _Event) -> bool:
        if self.bar:
            self.bar.show(event)
        if self.callback is None:
            return True
        # What says nothing goes on; NumPy has a False of its own.
        go_on = self.callback(event)
        return go_on is None or bool(go_on)


class _Bar:
    def __init__(self) -> None:
        self.bar: Any = None
        self.spoke = time.monotonic()
        self.mean: Optional[float] = None
        self.tqdm: Any = None
        try:
            from tqdm.auto import tqdm

            self.tqdm = tqdm
        except ImportError:
            pass

    def show(self, event: _Event) -> None:
        kind = event["event"]
        if kind == "started" and self.tqdm:
            self.bar = self.tqdm(total=event["last_step"], initial=event["step"], unit="step")
        elif kind == "step":
            bits = event["bits_per_dim"]
            self.mean = bits if self.mean is None else 0.95 * self.mean + 0.05 * bits
            text = f"{self.mean:.3f} bits/dim"
            if self.bar is not None:
                self.bar.total = event["last_step"]
                self.bar.set_postfix_str(text, refresh=False)
                self.bar.update(event["step"] - self.bar.n)
            elif time.monotonic() - self.spoke >= _INTERVAL:
                self.spoke = time.monotonic()
                self.say(f"step {event['step']}/{event['last_step']}  {text}")
        elif kind == "note":
            self.say(event["text"])
        elif kind == "downloading" and time.monotonic() - self.spoke >= 1.0:
            self.spoke = time.monotonic()
            total = f" of {event['total'] / 1e6:.0f}" if event["total"] else ""
            self.say(f"{event['what']}: {event['done'] / 1e6:.0f}{total} MB")
        elif kind == "evaluated":
            bits, error = event["bits_per_dim"], event["standard_error"]
            best = "  (best)" if event["best"] else ""
            self.say(f"step {event['step']}  test {bits:.4f} ± {error:.4f} bits/dim{best}")
        elif kind == "metrics_damaged":
            lines = len(event["lines"])
            self.say(f"metrics.jsonl: {lines} damaged lines left out; as it was, it is in {event['path']}")

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
