"""Trains a small model and reads its curves as TensorBoard does.

    python curves.py images.npz
"""

import sys
import tempfile

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pixelcnn


def main(path: str) -> None:
    images = np.load(path)["trainx"]
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        pixelcnn.train(images, run=run, nr_filters=8, steps=60, init_batch_size=16, samples=4)
        events = EventAccumulator(run).Reload()
        for name in events.Tags()["scalars"]:
            points = events.Scalars(name)
            print(name, [(point.step, round(point.value, 3)) for point in points])


if __name__ == "__main__":
    main(sys.argv[1])
