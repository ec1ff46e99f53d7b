"""Hugging Face Accelerate: an optimizer of this library is prepared like any other; save_state and load_state resume.

accelerate launch examples/training/accelerate_train.py out/accelerate        (or plain python, for one process)
"""

import sys

import torch
from accelerate import Accelerator
from digits import DeepNetwork, data

import steepest


def train(folder, epochs=3):
    accelerator = Accelerator(cpu=True)
    model = DeepNetwork()
    optimizer = steepest.optim.Muon(model.named_parameters(), lr=0.01, adamw={"lr": 3e-3})
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=128)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def epoch():
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            total += loss.item() / len(loader)
        return total

    losses = [epoch() for _ in range(epochs)]
    accelerator.save_state(folder)
    after = epoch()
    accelerator.load_state(folder)
    again = epoch()
    return losses, after, again


if __name__ == "__main__":
    losses, after, again = train(sys.argv[1])
    print("losses", *losses, "after", after, "resumed", again)
    assert after == again, "a resumed run must repeat the one that went on"
