"""Lightning: configure_optimizers returns an optimizer of this library; checkpoints resume it.

python examples/training/lightning_train.py out/lightning
"""

import sys

import lightning
import torch
from digits import DeepNetwork, data

import steepest


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = DeepNetwork()

    def training_step(self, batch, _):
        x, y = batch
        loss = torch.nn.functional.cross_entropy(self.network(x), y)
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return steepest.optim.Shampoo(self.named_parameters(), lr=3e-3, precondition_frequency=5)


def fit(folder, epochs, resume=None):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=256)
    model = Classifier()
    trainer = lightning.Trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, loader, ckpt_path=resume)
    trainer.save_checkpoint(f"{folder}/epoch-{epochs}.ckpt")
    return model, float(trainer.callback_metrics["loss_epoch"])


def main(folder):
    _, first = fit(folder, 1)
    whole, last = fit(folder, 3)
    resumed, _ = fit(folder, 3, f"{folder}/epoch-1.ckpt")
    print("loss", first, "->", last)
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    assert same, "a resumed run must end where the uninterrupted one did"


if __name__ == "__main__":
    main(sys.argv[1])
