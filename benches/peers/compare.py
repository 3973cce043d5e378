"""Checks that PyTorch's PixelCNN++ (model.py) computes what ours does, then times both in turns.
Started by ./run, which see."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# [filters, resnet, mixtures, batch], and how many steps and evaluations a turn times.
SIZES = {
    "160/5": ([160, 5, 10, 8], 3, 5),
    "32/2": ([32, 2, 10, 16], 10, 20),
    "quick": ([24, 1, 5, 16], 20, 40),
}
FORMS = ["eager", "channels_last", "compile", "compile channels_last"]
WORK = ["training", "evaluation"]
PRECISIONS = ["f32", "bf16"]
# Cores used by other processes from which a measurement is taken again.
BUSY = 0.3

# Both sides compute in single precision and in different orders.
LOSS_TOLERANCE = 1e-5  # relative
GRADIENT_TOLERANCE = 1e-3  # of the norm of each parameter's gradient
UPDATE_TOLERANCE = 1e-6  # absolute, of a parameter after one step with our gradients


def load(file, form="eager"):
    """The file's tensors, the model with its parameters, and the images scaled, as `form` asks."""
    import torch
    from safetensors import safe_open

    from model import PixelCNN

    with safe_open(file, "pt") as tensors:
        config = json.loads(tensors.metadata()["config"])
        tensors = {name: tensors.get_tensor(name) for name in tensors.keys()}
    model = PixelCNN(
        config["nr_filters"], config["nr_resnet"], config["nr_logistic_mix"], dropout=0.5
    )
    model.load_tensorflow(tensors)
    x = (tensors["images"].permute(0, 3, 1, 2).float() - 127.5) / 127.5
    if "channels_last" in form:
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    else:
        x = x.contiguous()
    return tensors, model, x


def check(file, form):
    """Compares loss, every gradient and one update with the file's; gives the worst of each."""
    import torch

    from model import Adam, from_tensorflow, nats_per_image

    ours, model, x = load(file, form)
    loss = nats_per_image(x, model.eval()(x)).sum()
    loss.backward()
    expected = ours["nats"].item()
    worst_loss = abs(loss.item() - expected) / abs(expected)

    worst_gradient = (0.0, "")
    parameters = model.named_tensors()
    optimiser = Adam(parameters.values())
    for name, parameter in parameters.items():
        gradient = from_tensorflow(name, ours[f"gradient/{name}"])
        error = torch.linalg.vector_norm((parameter.grad - gradient).double())
        worst_gradient = max(
            worst_gradient, ((error / torch.linalg.vector_norm(gradient.double())).item(), name)
        )
        parameter.grad = gradient.contiguous()

    optimiser.step()
    worst_update = 0.0
    for (name, parameter), average in zip(parameters.items(), optimiser.average):
        for kind, value in [("stepped", parameter), ("average", average)]:
            expected = from_tensorflow(name, ours[f"{kind}/{name}"])
            worst_update = max(worst_update, (value - expected).abs().max().item())

    print(
        f"  {form}: loss {worst_loss:.1e} off, gradients at most {worst_gradient[0]:.1e} of their "
        f"norm ({worst_gradient[1]}), updated parameters {worst_update:.1e}",
        file=sys.stderr,
    )
    return (
        worst_loss <= LOSS_TOLERANCE
        and worst_gradient[0] <= GRADIENT_TOLERANCE
        and worst_update <= UPDATE_TOLERANCE
    )


def measure(work, form, precision, file, runs, threads):
    """Times PyTorch in this process; prints the seconds of each run and the peak memory. In bf16 it runs
    under its own autocast, which leaves the loss in single precision."""
    import torch

    from model import Adam, nats_per_image

    torch.set_num_threads(threads)
    tensors, model, x = load(file, form)
    del tensors
    compiled = "compile" in form

    def loss(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(x)
        return nats_per_image(x, logits.float())

    if compiled:
        loss = torch.compile(loss)
    if work == "training":
        model.train()
        optimiser = Adam(model.parameters(), compiled=compiled)

        def run():
            loss(x).sum().backward()
            optimiser.step()
    else:
        model.eval()

        def run():
            with torch.inference_mode():
                loss(x).tolist()

    # The first compiles, the second is the first with everything in place.
    run()
    run()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}))


def has_bf16():
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def peak_bytes():
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def cpu_seconds():
    """CPU time used on this machine since it started, by all and by our finished children."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    user, nice, system, _, _, irq, softirq = map(int, fields[1:8])
    everything = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return everything, children.ru_utime + children.ru_stime


def others_share(f):
    """What `f` gives, and the share of one core that other processes used meanwhile."""
    try:
        start, before, mine = time.perf_counter(), *cpu_seconds()
        result = f()
        after, mine_after = cpu_seconds()
        return result, (after - before - (mine_after - mine)) / (time.perf_counter() - start)
    except FileNotFoundError:
        return f(), 0.0  # Not Linux.


def last_json(command, environment):
    """Runs a command that prints one line of JSON; None where it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"  failed: {' '.join(map(str, command))}\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    result = json.loads(done.stdout.splitlines()[-1])
    return statistics.median(result["seconds"]), result["peak_bytes"]


def undisturbed(command, environment):
    """Runs a command while nobody else needs the cores, or at the third try anyway: PyTorch's
    threads wait for one another, so that another process slows it down many times over."""
    for _ in range(3):
        for _ in range(60):
            if others_share(lambda: time.sleep(1))[1] < BUSY:
                break
        result, others = others_share(lambda: last_json(command, environment))
        if result is None or others < BUSY:
            break
    return result, others


def rows(name, precision, file, runs, arguments, forms):
    """Lines of the table for one size and precision: time and memory of training and evaluation."""
    environment = dict(os.environ, RAYON_NUM_THREADS=str(arguments.threads))
    # Some machines force an old kernel on OpenBLAS and so on everything that uses it.
    environment.pop("OPENBLAS_CORETYPE", None)
    for work, runs in zip(WORK, runs):
        common = [file, str(runs)]
        flags = [] if precision == "f32" else ["--precision", precision]
        commands = {"ours": [arguments.ours, *flags, "--time", work, *common]}
        for form in forms:
            what, threads = ["measure", work, form, precision], str(arguments.threads)
            commands[form] = [sys.executable, __file__, *what, *common, threads]
        results = {form: [] for form in commands}
        for turn in range(arguments.turns):
            for form in list(commands):
                result, others = undisturbed(commands[form], environment)
                if result is None:
                    if form == "ours":
                        sys.exit("ours failed")
                    del commands[form], results[form]
                    continue
                results[form].append(result)
                memory = f"{result[1] / 1e6:.0f} MB" if result[1] else "unknown"
                print(
                    f"  {name} {work} in {precision} turn {turn + 1} {form}: {result[0]:.4f} s, {memory} "
                    f"(others: {others:.2f} cores)",
                    file=sys.stderr,
                )
        ours = results.pop("ours")
        for kind, what, show in [
            (0, work, lambda seconds: f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"),
            (1, f"peak memory, {work}", lambda size: f"{size / 1e6:.0f} MB"),
        ]:
            middle = lambda turns: statistics.median(turn[kind] for turn in turns)
            if any(turn[kind] is None for turns in [ours, *results.values()] for turn in turns):
                continue
            best = min(results, key=lambda form: middle(results[form]))
            ratio = statistics.median(b[kind] / a[kind] for a, b in zip(ours, results[best]))
            if precision != "f32":
                what += f", {precision}"
            yield (
                f"| {name} | {what} | {show(middle(ours))} | {show(middle(results[best]))} "
                f"| {best} | {ratio:.2f} |"
            )


def main(arguments):
    import torch

    torch.set_num_threads(arguments.threads)
    forms, precisions = arguments.forms.split(","), arguments.precisions.split(",")
    if "bf16" in precisions and not has_bf16():
        print("this CPU has no AVX-512 BF16: in f32 alone", file=sys.stderr)
        precisions.remove("bf16")
    with tempfile.TemporaryDirectory() as folder:
        table = []
        for name in arguments.sizes.split(","):
            size, *runs = SIZES[name]
            file = str(Path(folder, "exchange.safetensors"))
            print(f"{name}: filters, resnet, mixtures, batch = {size}", file=sys.stderr)
            subprocess.run([arguments.ours, "--exchange", file, *map(str, size)], check=True)
            for form in ["eager", "channels_last"]:
                if not check(file, form):
                    sys.exit("PyTorch computes something else: nothing is timed")
            if arguments.turns:
                for precision in precisions:
                    table += rows(name, precision, file, runs, arguments, forms)
        if table:
            print("| size | what | ours | PyTorch's best | its form | PyTorch / ours |")
            print("|---|---|--:|--:|---|--:|")
            print("\n".join(table))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        work, form, precision, file, runs, threads = sys.argv[2:]
        measure(work, form, precision, file, int(runs), int(threads))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("ours", help="our benchmark's executable")
        parser.add_argument("--sizes", default=",".join(SIZES))
        parser.add_argument("--forms", default=",".join(FORMS))
        parser.add_argument("--precisions", default=",".join(PRECISIONS))
        parser.add_argument("--turns", type=int, default=3, help="0 only checks")
        parser.add_argument("--threads", type=int, default=2)
        main(parser.parse_args())
