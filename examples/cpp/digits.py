"""Writes the 1,797 handwritten digits of scikit-learn (8 x 8 pixels) and a network's first weights for train.cpp."""

import struct
import sys

import torch
from sklearn.datasets import load_digits

HIDDEN, CLASSES = 32, 10


def data():
    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, CLASSES))


def write(path):
    """int32 samples, features, hidden, classes; float32 pixels; int32 labels; float32 W1, b1, W2, b2, row by row."""
    x, y = data()
    with open(path, "wb") as file:
        file.write(struct.pack("4i", *x.shape, HIDDEN, CLASSES))
        file.write(x.numpy().tobytes() + y.to(torch.int32).numpy().tobytes())
        for p in network().parameters():
            file.write(p.detach().numpy().tobytes())


if __name__ == "__main__":
    write(sys.argv[1])
