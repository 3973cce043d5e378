"""Writes the PyTorch files that tests/weights.rs reads, into tests/golden/pytorch: a state dict of
the benchmark's model with what it gives, and small ones whose tensors are views of every kind.

    pip install torch safetensors numpy
    python tests/weights_pytorch.py
"""

import sys
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[2] / "benches/peers"))
from model import PixelCNN  # noqa: E402

folder = HERE / "golden/pytorch"
folder.mkdir(parents=True, exist_ok=True)


def save(value, name, legacy=False):
    torch.save(value, folder / name, _use_new_zipfile_serialization=not legacy)


torch.manual_seed(1)
model = PixelCNN(filters=4, resnet=1, mixtures=2, dropout=0.5).eval()
with torch.no_grad():
    for layer in model.layers():
        layer.g.uniform_(0.5, 1.5)
        layer.b.normal_(0, 0.1)
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    x = (images.permute(0, 3, 1, 2).float() - 127.5) / 127.5
    out = model(x).permute(0, 2, 3, 1).contiguous()
# As a model trained on several GPUs has it, with the versions of its modules as attributes.
save(torch.nn.DataParallel(model).state_dict(), "benchmark.pth")
save_file({"images_u8": images, "out": out}, folder / "benchmark_expected.safetensors")

numbers = torch.arange(24, dtype=torch.float32)
views = OrderedDict(
    whole=numbers.clone().view(2, 3, 4),
    transposed=numbers.clone().view(4, 6).t(),
    part=numbers.clone().view(4, 6)[1:3, ::2],
    offset=numbers[20:],
    shared=numbers[:4],
    scalar=torch.tensor(7.0),
    empty=torch.zeros(0, 3),
    parameter=torch.nn.Parameter(torch.tensor([1.5, -2.5])),
    double=torch.tensor([0.1, -3.0], dtype=torch.float64),
    half=torch.tensor([0.5, -65504.0], dtype=torch.float16),
    bfloat=torch.tensor([1.0, -3.0], dtype=torch.bfloat16),
)
save(views, "views.pth")
save(views, "views_legacy.pth", legacy=True)
save(OrderedDict(big=torch.zeros(1).expand(1 << 40)), "expanded.pth")
save(OrderedDict(counts=torch.tensor([1, 2])), "whole_numbers.pth")
save({"step": 3, "model": views}, "wrapped.pth")
save(model.first, "module.pth")
