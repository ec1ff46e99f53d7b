"""Verdicts in a file, one line of JSON each, so that a long run can be continued."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from mutation_rules import Mutant
from mutation_targets import ROOT, Target
from mutation_workspace import SURVIVED, Verdict


@functools.cache
def judges_digest(tests: tuple[str, ...]) -> str:
    """Of what decides: the cases and their bounds, and the tests."""
    digest = hashlib.sha256()
    for name in ("pyext/conformance", *(test.partition("::")[0] for test in tests)):
        place = ROOT / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def key_of(target: Target, mutant: Mutant) -> str:
    return hashlib.sha256(f"{target.file}\n{judges_digest(target.tests)}\n{mutant.text}".encode()).hexdigest()[:24]


class Record:
    """`path` None: remembers nothing.  Survivors are kept for people to read, and tried again."""

    def __init__(self, path: str | None):
        self.path, self.known = Path(path) if path else None, {}
        if self.path and self.path.exists():
            for line in self.path.read_text().splitlines():
                entry = json.loads(line)
                self.known[entry["key"]] = Verdict(**entry["verdict"])

    def get(self, target: Target, mutant: Mutant) -> Verdict | None:
        verdict = self.known.get(key_of(target, mutant))
        return None if verdict is None or verdict.status == SURVIVED else verdict

    def put(self, target: Target, mutant: Mutant, verdict: Verdict) -> None:
        if self.path:
            entry = {"key": key_of(target, mutant), "mutant": mutant.id, "verdict": asdict(verdict)}
            with self.path.open("a") as file:
                print(json.dumps(entry, ensure_ascii=False), file=file)
