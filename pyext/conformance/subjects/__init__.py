"""Subjects: other libraries' implementations put through the same cases, `validate --subject NAME`.

One file per library, imported only in a process of its own (see `isolate`), because a subject may print, compile,
overwrite memory or crash.  A file defines

    implementations() -> list[Subject]

each a Backend for one op: an adapter with the op's public signature that calls the library as its documentation says.
What an implementation does not offer is "unsupported" with the reason; so is an input that it refuses with an exception
before it changed anything.  Equality with our reference bit for bit is not asked of subjects.  They are judged by

    the derived bound, for the precision in which they say they work (an implementation that rounds every operation to
    bfloat16 gets the bound of that arithmetic, and its error is shown beside ours)
    NaN and infinity where the exact result has them, and nowhere else; NaN for infinity only where its own arithmetic
        gives that (see adamw_judge)
    guard bands: nothing written outside the tensors, gaps between their elements included
    two runs on the same input give the same bits

so a FAIL of a subject is a finding about it, not about us, and does not change the exit status.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Library:
    """Where a subject comes from.  `module`, a file of this package, adapts the importable `package`."""

    name: str
    module: str
    package: str
    distribution: str
    pip: str
    summary: str

    def missing(self) -> str:
        """ "" when it can be imported, else what to do."""
        if importlib.util.find_spec(self.package) is not None:
            return ""
        return f"{self.name} is not installed: pip install {self.pip}"

    @property
    def version(self) -> str:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "?"

    def implementations(self):
        """Imports the library."""
        return importlib.import_module(f"{__name__}.{self.module}").implementations()


def _library(name: str, summary: str, *, package: str | None = None, pip: str | None = None) -> Library:
    package = package or name.replace("-", "_")
    return Library(name, package + "_adapter", package, name, pip or name, summary)


# gram-newton-schulz: its requirements are CUDA only, and its torch code, which is what runs here, needs none of them.
LIBRARIES = {
    library.name: library
    for library in (
        _library("torch", "AdamW fused, foreach and for-loop; Muon"),
        _library("pytorch-optimizer", "FlashAdamW without quantization; Muon, standard and Gram"),
        _library("heavyball", "AdamW; Muon's orthogonalization"),
        _library("bitsandbytes", "AdamW with 32-bit states, on the CPU"),
        _library("flashoptim", "FlashAdamW, unfused and without quantization (the rest needs CUDA)"),
        _library("gram-newton-schulz", "its torch code in float16", pip="--no-deps gram-newton-schulz"),
    )
}
