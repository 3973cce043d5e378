"""Scores images as a loader of PyTorch brings them, and shows those that a model finds the most unusual.

    python unusual.py images.npz
"""

import sys

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

import pixelcnn


def main(path: str) -> None:
    images = torch.from_numpy(np.load(path)["testx"])
    model = pixelcnn.load()
    loader = DataLoader(TensorDataset(images), batch_size=16, num_workers=2)
    # Tensors on the CPU are read where they lie.
    bits = np.concatenate([model.bits_per_dim(batch) for (batch,) in loader])
    print(f"{bits.mean():.3f} bits/dim")
    print("the most unusual:", np.argsort(bits)[-3:])

    # The parameters for the PyTorch port.
    state = {name: torch.from_numpy(value) for name, value in model.state_dict("port").items()}
    torch.save(state, "port.pth")
    again = pixelcnn.load("port.pth")
    difference = np.abs(again.bits_per_dim(images[:4]) - bits[:4]).max()
    print(f"through PyTorch and back: within {difference:.1e} bits/dim")


if __name__ == "__main__":
    main(sys.argv[1])
