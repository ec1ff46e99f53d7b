"""Real text that every machine has, as character ids: the Python standard library's own sources, or a given path."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

# One fixed vocabulary whatever the text, so that losses on two texts compare: newline, tab, printable ASCII.
# All else shares one last id (2 characters in 100,000 of the standard library's sources).
CHARACTERS = "\n\t" + "".join(map(chr, range(32, 127)))
VOCABULARY_SIZE = len(CHARACTERS) + 1


@dataclass(frozen=True)
class Text:
    """Character ids, split by position: the first 90 % train, the last 10 % validate."""

    source: str
    train: torch.Tensor
    validation: torch.Tensor


def load_text(path: str | Path | None, characters: int, context: int) -> Text:
    """At most ``characters`` characters of ``path``, a file or a folder; of the standard library's top level if None.

    Raises FileNotFoundError for a missing path and ValueError where either part of the split has no full window
    of ``context`` characters and the one that follows it.
    """
    if path is None:
        source, files = "Python standard library", _standard_library()
    else:
        source, files = str(path), _files_of(Path(path))
    text = _read(files, characters)
    shortest = 10 * (context + 1)
    if len(text) < shortest:
        raise ValueError(
            f"demo: {source} gives {len(text)} characters, a context of {context} needs at least {shortest}: "
            "choose a longer text, more characters or a smaller context"
        )
    ids = encode(text)
    split = len(ids) * 9 // 10
    return Text(source, ids[:split], ids[split:])


def encode(text: str) -> torch.Tensor:
    """Ids of the characters of ``text``, int64."""
    ids = {character: index for index, character in enumerate(CHARACTERS)}
    return torch.tensor([ids.get(character, len(CHARACTERS)) for character in text])


def training_batches(ids: torch.Tensor, steps: int, batch: int, context: int, seed: int):
    """Yield (inputs, targets), each (batch, context), at positions that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for starts in torch.randint(len(ids) - context, (steps, batch), generator=generator):
        windows = ids[starts[:, None] + torch.arange(context + 1)]
        yield windows[:, :-1], windows[:, 1:]


def validation_windows(ids: torch.Tensor, context: int, most: int = 128) -> torch.Tensor:
    """At most ``most`` windows of ``context`` + 1 characters, evenly spaced over ``ids`` and without overlap."""
    count = min(most, len(ids) // (context + 1))
    starts = torch.arange(count) * (len(ids) // count)
    return ids[starts[:, None] + torch.arange(context + 1)]


def _standard_library() -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    if not files:
        raise FileNotFoundError(f"demo: no Python sources in {folder}: give a text with --text PATH")
    return files


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"demo: --text {path} is neither a file nor a folder")
    files = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts))


def _read(files: list[Path], characters: int) -> str:
    """The files one after another, up to ``characters``; files of a folder that are not UTF-8 text are left out."""
    parts, missing = [], characters
    for file in files:
        if missing <= 0:
            break
        try:
            parts.append(file.read_text(encoding="utf-8")[:missing])
        except UnicodeDecodeError:
            if len(files) == 1:
                raise ValueError(f"demo: {file} is not UTF-8 text") from None
            continue
        missing -= len(parts[-1])
    return "".join(parts)
