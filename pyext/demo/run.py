"""``python -m steepest demo``: options, the runs one after another, and the report."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from pathlib import Path

import torch

from steepest._version import __version__
from steepest.demo.model import Transformer
from steepest.demo.optimizers import OPTIMIZERS
from steepest.demo.text import VOCABULARY_SIZE, Text, load_text, training_batches, validation_windows
from steepest.demo.train import Run, train


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    _require("rich", *([] if options.no_plot else ["matplotlib"]))
    from steepest.demo import report

    try:
        text = load_text(options.text, options.characters, options.context)
        model = _model(options)
        options.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    title = (
        f"{parameters:,} parameters · {options.steps} steps · {options.batch} × {options.context} characters "
        f"· {text.source}"
    )
    runs = train_all(options, text)
    content = report.results(runs, _settings(options, text, parameters))
    report.save_json(options.output / "results.json", content)
    if not options.no_plot:
        report.save_plot(options.output / "curves.png", runs, title)
    if options.json:
        print(json.dumps(content, allow_nan=False))
    else:
        _print(options, title, report.table(runs))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m steepest demo",
        description="Train a small character-level transformer with several optimizers from one seed and compare them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    usual = [key for key in OPTIMIZERS if key != "shampoo-1"]  # whose roots in every step would double the whole run
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=usual, help="which to run (default: all but shampoo-1)")
    add("--steps", type=_positive, default=300, help="of each optimizer")
    add("--batch", type=_positive, default=16, help="windows per step")
    add("--context", type=_positive, default=128, help="characters per window")
    add("--width", type=_positive, default=128, help="of the residual stream")
    add("--layers", type=_positive, default=5, help="transformer blocks")
    add("--heads", type=_positive, default=4, help="of attention in each block")
    add("--text", type=Path, metavar="PATH", help="file or folder; None: the Python standard library's sources")
    add("--characters", type=_positive, default=5_000_000, help="at most so many of the text")
    add("--seed", type=int, default=0, help="of the initial weights and the order of the data")
    # Final validation loss of torch.optim.AdamW at --lr 1e-3, 2e-3, 3e-3, 6e-3: 2.352, 2.289, 2.288, 2.606.
    add("--lr", type=float, default=2e-3, help="of AdamW")
    # Of Muon at --muon-lr 0.02, 0.04, beside this AdamW: 1.828, 1.716.
    add("--muon-lr", type=float, default=0.04, help="of Muon, for the hidden matrices")
    add("--shampoo-lr", type=float, default=2e-3, help="of Shampoo, grafted to Adam, for the hidden matrices")
    add("--block-size", type=_positive, default=128, help="of Shampoo")
    add("--weight-decay", type=float, default=0.1, help="of every optimizer")
    add("--eval-every", type=_positive, default=25, metavar="STEPS", help="steps between validations")
    add("--device", type=_device, default="cpu", help="where to train: cpu, cuda, cuda:1, ...")
    add("--output", type=Path, default=Path("out/demo"), metavar="FOLDER", help="for results.json and curves.png")
    add("--no-plot", action="store_true", help="save no plot")
    add("--json", action="store_true", help="print the results as JSON instead of the table")
    return parser.parse_args(argv)


def train_all(options: argparse.Namespace, text: Text) -> dict[str, Run]:
    """Each optimizer from the same initial weights, on the same batches in the same order, with a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    runs = {}
    windows = validation_windows(text.validation, options.context)
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        for key in dict.fromkeys(options.optimizers):
            task = progress.add_task(OPTIMIZERS[key].name, total=options.steps, status="")

            def on_step(run: Run, task=task) -> None:
                status = f"loss {run.train_loss[-1]:.3f}  {1e3 * run.step_seconds[-1]:4.0f} ms/step"
                progress.update(task, advance=1, status=status)

            model = _model(options)
            optimizer = OPTIMIZERS[key].build(model, options)
            batches = training_batches(text.train, options.steps, options.batch, options.context, options.seed)
            runs[key] = train(model, optimizer, batches, windows, options.steps, options.eval_every, on_step)
            progress.update(task, status=f"loss {runs[key].train_loss[-1]:.3f}  {runs[key].step_ms:4.0f} ms/step")
    return runs


def _model(options: argparse.Namespace) -> Transformer:
    sizes = (options.context, options.width, options.layers, options.heads)
    return Transformer(VOCABULARY_SIZE, *sizes, seed=options.seed).to(options.device)


def _settings(options: argparse.Namespace, text: Text, parameters: int) -> dict:
    chosen = {
        name: str(value) if isinstance(value, (Path, torch.device)) else value for name, value in vars(options).items()
    }
    return {
        **chosen,
        "text": text.source,
        "train_characters": len(text.train),
        "validation_characters": len(text.validation),
        "parameters": parameters,
        "threads": torch.get_num_threads(),
        "steepest": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _print(options: argparse.Namespace, title: str, table) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    console.print(f"\n[bold]{escape(title)}[/bold]", soft_wrap=True)
    console.print(table)
    for name in ["results.json"] + ["curves.png"] * (not options.no_plot):
        console.print(f"saved {escape(str(options.output / name))}", soft_wrap=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {str(error).splitlines()[0]}") from None
    return device


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise SystemExit(f"demo: needs {' and '.join(missing)}: pip install steepest[cli]")


if __name__ == "__main__":
    sys.exit(main())
