"""Trains with ours and with PyTorch's PixelCNN++ (model.py) side by side, for the same time on as
many cores, from the same parameters on the same images in the same order, then measures both on
CIFAR-10's test set. Started by ./run --equal-time MINUTES, which see."""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Of the preset `small`.
SIZE = {"nr_filters": 32, "nr_resnet": 2, "nr_logistic_mix": 10}
SETTINGS = {
    "batch_size": 32,
    "learning_rate": 0.002,
    "learning_rate_decay": 0.9999,
    "dropout": 0.0,
    "polyak_decay": 0.999,
    "seed": 1,
}
# More epochs than anyone gets through.
EPOCHS = 64
# The first record of our metrics is the mean of so many steps; both must agree on it. Rounding
# alone makes PyTorch's own repetitions differ by 0.004 there, another order of the images by 0.3.
CHECKED_STEPS = 20
TOLERANCE = 0.02  # bits/dim


def on(cores, command):
    """COMMAND on these cores alone."""
    return ["taskset", "--cpu-list", ",".join(map(str, cores)), *map(str, command)]


def flags(values):
    named = [(f"--{name.replace('_', '-')}", str(value)) for name, value in values.items()]
    return [part for flag in named for part in flag]


def start_ours(program, run, cores):
    """Starts training as a user would. Keeps the parameters before the first step beside RUN."""
    # Nothing but training steps: no evaluation, no samples.
    rest = {"preset": "small", "init_batch_size": 128, "eval_interval": 10**6, "samples": 0}
    rest |= {"checkpoint_minutes": 10**6, "epochs": EPOCHS, "threads": len(cores)}
    command = [program, "train", run, "--device", "cpu", *flags(SIZE | SETTINGS | rest)]
    start = run / "checkpoints/step-00000000.safetensors"
    training = subprocess.Popen(on(cores, command), stdout=subprocess.DEVNULL)
    # Saved in one go, just before the first step.
    while not start.exists():
        if training.poll() is not None:
            sys.exit("ours failed")
        time.sleep(0.01)
    shutil.copy(start, run.with_name("start.safetensors"))
    return training


def stop_ours(training, run):
    """Presses Ctrl-C, and reads from the last checkpoint how far the training came."""
    training.send_signal(signal.SIGINT)
    if training.wait() != 130:  # what it ends with after Ctrl-C
        sys.exit("ours failed")
    from safetensors import safe_open

    with safe_open(max((run / "checkpoints").glob("step-*")), "pt") as checkpoint:
        state = checkpoint.metadata()
    records = (run / "metrics.jsonl").read_text().splitlines()
    if not records:
        sys.exit(f"fewer than {CHECKED_STEPS} steps: give more minutes")
    first = json.loads(records[0])
    return {
        "seconds": float(state["seconds"]),
        "steps": int(state["step"]),
        "first_bits_per_dim": first["train_bits_per_dim"],
    }


def train_theirs(start, data, form, seconds, threads, out):
    """Trains PyTorch's model in this process; prints a line of JSON, and writes averaged and raw
    weights to folders in `out`."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from model import Adam, PixelCNN, nats_per_image, to_tensorflow

    torch.set_num_threads(threads)
    with safe_open(start, "pt") as file:
        config = json.loads(file.metadata()["config"])
        parameters = {name: file.get_tensor(name) for name in file.keys()}
    data = load_file(data)
    images, order = data["images"], data["order"].long()
    per_epoch = len(images) // SETTINGS["batch_size"]
    layout = torch.channels_last if "channels_last" in form else torch.contiguous_format
    compiled = "compile" in form

    model = PixelCNN(*SIZE.values(), dropout=SETTINGS["dropout"]).to(memory_format=layout).train()
    model.load_tensorflow(parameters)
    names = model.named_tensors()
    optimiser = Adam(
        names.values(),
        learning_rate=SETTINGS["learning_rate"],
        decay=SETTINGS["learning_rate_decay"],
        polyak_decay=SETTINGS["polyak_decay"],
        compiled=compiled,
    )

    def loss(x):
        return nats_per_image(x, model(x)).sum()

    if compiled:
        loss = torch.compile(loss)

    def step(number):
        epoch, batch = divmod(number, per_epoch)
        indices = order[epoch, batch * SETTINGS["batch_size"] :][: SETTINGS["batch_size"]]
        x = (images[indices].permute(0, 3, 1, 2).float() - 127.5) / 127.5
        nats = loss(x.contiguous(memory_format=layout))
        nats.backward()
        optimiser.step()
        return nats.item() / (math.log(2) * x.numel())

    # Compiles, warms up, and goes back to the start.
    for number in range(3):
        step(number)
    model.load_tensorflow(parameters)
    optimiser.restart()

    steps, first, started = 0, [], time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        bits_per_dim = step(steps)
        first = first if len(first) == CHECKED_STEPS else [*first, bits_per_dim]
        steps += 1

    for kind, values in [("averaged", optimiser.average), ("raw", optimiser.parameters)]:
        folder = Path(out, kind)
        folder.mkdir()
        tensors = {name: to_tensorflow(name, v.detach()) for name, v in zip(names, values)}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "pixelcnn++"}))
    print(
        json.dumps(
            {"seconds": elapsed, "steps": steps, "first_bits_per_dim": sum(first) / len(first)}
        )
    )


def evaluate(program, run, *options):
    """Bits/dim on the whole test set, as the program prints it."""
    command = [program, "eval", str(run), *options]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return said.split("images")[1].split("bits/dim")[0].strip()


def main(arguments):
    seconds, program, form = 60 * arguments.minutes, arguments.program, arguments.form
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    if half == 0:
        sys.exit("two cores are needed, one for each")
    environment = dict(os.environ)
    # Some machines force an old kernel on OpenBLAS and so on everything that uses it.
    environment.pop("OPENBLAS_CORETYPE", None)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        run, data = folder / "ours", folder / "data.safetensors"
        command = [arguments.network, "--order", data, str(SETTINGS["seed"]), str(EPOCHS)]
        subprocess.run(command, check=True)
        print(
            f"ours and PyTorch, {form}: {arguments.minutes:g} minutes side by side, cores for each:"
            f" {half}",
            file=sys.stderr,
        )
        training = start_ours(program, run, cores[:half])
        began = time.perf_counter()
        command = [sys.executable, __file__, "theirs", folder / "start.safetensors", data, form]
        command = on(cores[half : 2 * half], [*command, seconds, half, folder])
        peer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            try:
                peer.wait(max(0.0, seconds - (time.perf_counter() - began)))
                sys.exit("PyTorch's failed")
            except subprocess.TimeoutExpired:
                ours = stop_ours(training, run)
            said, _ = peer.communicate()
            if peer.returncode != 0:
                sys.exit("PyTorch's failed")
        finally:
            training.kill()
            peer.kill()
        theirs = json.loads(said.splitlines()[-1])
        if min(ours["steps"], theirs["steps"]) < CHECKED_STEPS:
            sys.exit(f"fewer than {CHECKED_STEPS} steps: give more minutes")
        first = [trained["first_bits_per_dim"] for trained in (ours, theirs)]
        print(
            f"mean of the first {CHECKED_STEPS} steps: {first[0]:.5f} and {first[1]:.5f} bits/dim",
            file=sys.stderr,
        )
        if abs(first[0] - first[1]) > TOLERANCE:
            sys.exit("the two don't train alike: nothing is compared")

        print("evaluating", file=sys.stderr)
        rows = [["ours", ours, evaluate(program, run), evaluate(program, run, "--raw")]]
        figures = []
        for kind in ["averaged", "raw"]:
            run = folder / f"theirs-{kind}"
            command = [program, "import", folder / kind / "model.safetensors", "-o", run]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            figures.append(evaluate(program, run))
        rows.append([f"PyTorch, {form}", theirs, *figures])
    print("| | seconds | steps | images seen | test bits/dim, averaged weights | raw weights |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, trained, averaged, raw in rows:
        steps = trained["steps"]
        images = steps * SETTINGS["batch_size"]
        print(f"| {name} | {trained['seconds']:.0f} | {steps} | {images} | {averaged} | {raw} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["theirs"]:
        start, data, form, seconds, threads, out = sys.argv[2:]
        train_theirs(start, data, form, float(seconds), int(threads), out)
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("network", help="our benchmark's executable")
        parser.add_argument("program", help="our program")
        parser.add_argument("--minutes", type=float, default=30)
        parser.add_argument("--form", default="eager")
        main(parser.parse_args())
