"""What the trainings that are compared here have in common: data, runs, and how they are measured."""

import json
import shutil
import signal
import statistics
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Where `pixelcnn train` puts CIFAR-10.
CIFAR10 = Path.home() / ".cache/pixelcnn/cifar10"
# An average that begins with the run holds its start for thousands of steps: with it, so short a training
# would show nothing else.
GROWING = "--polyak-start growing"


def build():
    """Builds the program, and gives its path."""
    command = ["cargo", "build", "--quiet", "--release", "--bin", "pixelcnn"]
    subprocess.run(command, cwd=ROOT, check=True)
    return ROOT / "target/release/pixelcnn"


def training_images(path, cifar10):
    """Writes CIFAR-10's 50,000 training images to a .npy file: u8 [N, C, H, W]."""
    if path.exists():
        return
    record = 1 + 3 * 32 * 32
    images = bytearray()
    for batch in range(1, 6):
        data = (cifar10 / f"cifar-10-batches-bin/data_batch_{batch}.bin").read_bytes()
        for start in range(0, len(data), record):
            images += data[start + 1 : start + record]
    count = len(images) // (record - 1)
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, 3, 32, 32), }}"
    head = head.ljust(128 - 10 - 1) + "\n"
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + images)
    partial.rename(path)


def new_run(program, run, images, steps, flags):
    """The command that begins a run of the preset `small` on all images but 1,000, which it is measured on."""
    command = f"{program} train {run} --preset small --data {images} --held-out 0.02"
    # The end of the run has the only evaluation.
    command += f" --steps {steps} --epochs 1000000 --samples 0 --eval-interval 1000000 {flags}"
    return command.split()


def seconds(run, step):
    """Of training up to a step."""
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["step"] == step and "train_bits_per_dim" in record:
            return record["seconds"]
    raise SystemExit(f"{run}: step {step} is not in metrics.jsonl")


def seconds_per_step(program, output, images, flags):
    """Of a run that is thrown away."""
    run = output / "timing"
    shutil.rmtree(run, ignore_errors=True)
    command = new_run(program, run, images, 24, flags)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = seconds(run, 20) / 20
    shutil.rmtree(run)
    return found


def bits_per_dim(program, run, *flags):
    """Of the images held out: the mean and its standard error."""
    table = run.with_suffix(".csv")
    command = [program, "eval", run, "--output", table, "--force", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    values = [float(line.split(",")[2]) for line in table.read_text().splitlines()[1:]]
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def train(program, run, images, steps, flags, device_flags="", longer=False):
    """Trains a run to its end, or goes on with one that was stopped, or with a shorter one to be made longer."""
    command = new_run(program, run, images, steps, f"{flags} {device_flags}")
    if (run / "config.toml").exists():
        settings = tomllib.loads((run / "config.toml").read_text())
        if settings["train"]["steps"] != steps and not longer:
            raise SystemExit(f"{run} is of another length: choose another --output")
        command = [program, "train", "--resume", run, "--steps", str(steps), *device_flags.split()]
    with open(run.with_suffix(".log"), "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        # Stopped itself, it lets the run save; behind `nohup` that heeds no SIGINT.
        signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
        if process.wait() != 0:
            raise SystemExit(f"{run} stopped: {log.name}; start again to go on")
