"""Times a training step and an evaluation of PyTorch's PixelCNN++ (../peers/model.py) on a GPU, in
bf16 and channels_last, eagerly and compiled. Started by ./run."""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "peers"))
from model import Adam, PixelCNN, nats_per_image  # noqa: E402

SIZES = [([160, 5, 10], [64, 16, 256]), ([64, 2, 10], [64, 256]), ([48, 2, 5], [64, 256])]


def median(run):
    run(), run(), run()
    torch.cuda.synchronize()
    seconds = []
    begin = time.perf_counter()
    while len(seconds) < 3 or (len(seconds) < 10 and time.perf_counter() - begin < 1):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(size, batch, compiled):
    filters, resnet, mixtures = size
    torch.manual_seed(1)
    model = PixelCNN(filters, resnet, mixtures, dropout=0.5).cuda()
    model = model.to(memory_format=torch.channels_last)
    x = (torch.rand(batch, 3, 32, 32, device="cuda") * 2 - 1).to(
        memory_format=torch.channels_last
    )
    optimiser = Adam(model.parameters(), compiled=compiled)

    def loss(x):
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(x)
        return nats_per_image(x, logits.float())

    if compiled:
        loss = torch.compile(loss)

    def step():
        loss(x).sum().backward()
        optimiser.step()

    torch.cuda.reset_peak_memory_stats()
    model.train()
    training = median(step)
    memory = torch.cuda.max_memory_allocated() / 2**20
    model.eval()

    @torch.inference_mode()
    def evaluate():
        loss(x)

    return training, median(evaluate), memory


print(f"PyTorch {torch.__version__}")
print("| size | batch | form | step | images/s | evaluation, images/s | memory |")
print("|---|--:|---|--:|--:|--:|--:|")
for compiled in [False, True]:
    for size, batches in SIZES:
        for batch in batches:
            name = f"{size[0]}/{size[1]} | {batch} | {'compile' if compiled else 'eager'}"
            try:
                step, evaluation, memory = measure(size, batch, compiled)
                print(
                    f"| {name} | {1e3 * step:.2f} ms | {batch / step:.0f} "
                    f"| {batch / evaluation:.0f} | {memory:.0f} MiB |",
                    flush=True,
                )
            except Exception as error:  # The next one may go.
                print(f"| {name} | {str(error).splitlines()[0][:100]} |", flush=True)
            torch.cuda.empty_cache()
