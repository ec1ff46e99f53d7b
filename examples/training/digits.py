"""The 1,797 handwritten digits of scikit-learn (8 x 8 pixels), and a network: what all examples here train.

python examples/training/digits.py digits.bin        writes both for examples/cpp
"""

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


class DeepNetwork(torch.nn.Module):
    """With hidden matrices, for Muon and Shampoo, which tell them by their names from embedding and head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Linear(64, 64)
        self.hidden = torch.nn.Linear(64, 64)
        self.wide = torch.nn.Linear(64, 96)
        self.head = torch.nn.Linear(96, CLASSES)

    def forward(self, x):
        for layer in (self.embed, self.hidden, self.wide):
            x = torch.relu(layer(x))
        return self.head(x)


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
