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
def digest_of(judge: str) -> str:
    """Of what noticed: a test's file, or the cases and their bounds."""
    digest = hashlib.sha256()
    place = ROOT / (judge if judge.startswith("tests/") else "pyext/conformance")
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def key_of(target: Target, mutant: Mutant) -> str:
    return hashlib.sha256(f"{target.file}\n{mutant.text}".encode()).hexdigest()[:24]


class Record:
    """`path` None: remembers nothing.  Survivors are kept for people to read, and tried again."""

    def __init__(self, path: str | None):
        self.path, self.known = Path(path) if path else None, {}
        if self.path and self.path.exists():
            for line in self.path.read_text().splitlines():
                entry = json.loads(line)
                self.known[entry["key"]] = Verdict(**entry["verdict"]), entry["judge"]

    def get(self, target: Target, mutant: Mutant, survivors: bool = False) -> Verdict | None:
        """None when it is to be tried: new, a survivor (unless asked for), or killed by a test that has changed."""
        verdict, judge = self.known.get(key_of(target, mutant), (None, ""))
        if verdict is None or (verdict.status == SURVIVED and not survivors) or judge != self.judge(verdict):
            return None
        return verdict

    def put(self, target: Target, mutant: Mutant, verdict: Verdict) -> None:
        if self.path:
            entry = {"key": key_of(target, mutant), "mutant": mutant.id}
            entry |= {"judge": self.judge(verdict), "verdict": asdict(verdict)}
            with self.path.open("a") as file:
                print(json.dumps(entry, ensure_ascii=False), file=file)

    @staticmethod
    def judge(verdict: Verdict) -> str:
        file = verdict.noticed.partition("::")[0]
        return digest_of(file if file.startswith("tests/") and (ROOT / file).exists() else "")
