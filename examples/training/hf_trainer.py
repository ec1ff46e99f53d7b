"""Hugging Face Trainer: pass (optimizer, scheduler); it saves and resumes the optimizer's state like torch's own.

python examples/training/hf_trainer.py out/trainer
"""

import sys

import torch
from digits import DeepNetwork, data
from transformers import Trainer, TrainingArguments

import steepest


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network = DeepNetwork()

    def forward(self, x, labels):
        logits = self.network(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def make(folder, steps):
    x, y = data()
    rows = [{"x": a, "labels": b} for a, b in zip(x, y)]
    model = Classifier()
    optimizer = steepest.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 40)
    arguments = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=128, save_steps=20, logging_steps=20,
        report_to=[], use_cpu=True, disable_tqdm=True, max_grad_norm=0.0, save_strategy="steps",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, scheduler))
    return trainer, model


def main(folder):
    trainer, model = make(folder, 40)
    trainer.train()
    resumed, again = make(folder, 40)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-20")
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    print("loss", trainer.state.log_history[0]["loss"], "->", trainer.state.log_history[1]["loss"])
    assert same, "a resumed run must end where the uninterrupted one did"


if __name__ == "__main__":
    main(sys.argv[1])
