"""What is known of the mutants, in a file that is kept with the sources, so that a run can be continued by anybody.

One line of JSON per mutated file.  `verdicts` has a character per mutant, in the order in which `Target.mutants` names
them: a small letter for one that was killed, by the judge of that number in `judges` (a = 0); S survived; N does not
build; . not tried, or equivalent.  `source` and the judges' values are digests of what was judged and of what judged.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import string
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from mutation_rules import Mutant
from mutation_targets import ROOT, Target
from mutation_workspace import KILLED, NO_BUILD, SURVIVED, Verdict

CASES = "pyext/conformance"  # the judge of what a cell of `validate` noticed
NOT_TRIED = "."
SAVED_SECONDS = 5.0


@functools.cache
def digest_of(place: str) -> str:
    """Of a source, of a test's file, or of the cases and their bounds; "" when there is no such file."""
    digest, path = hashlib.sha256(), ROOT / place
    for part in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        if not part.exists():
            return ""
        digest.update(part.read_bytes())
    return digest.hexdigest()[:12]


@dataclass
class Row:
    """One mutated file's line."""

    source: str
    judges: dict[str, str] = field(default_factory=dict)  # file or folder -> digest
    verdicts: list[str] = field(default_factory=list)

    def judge_of(self, letter: str) -> str:
        """The judge that killed; "" when none did."""
        return list(self.judges)[string.ascii_lowercase.index(letter)] if letter in string.ascii_lowercase else ""

    def outdated(self, letter: str) -> bool:
        judge = self.judge_of(letter)
        return judge != "" and self.judges[judge] != digest_of(judge)

    def put(self, at: int, verdict: Verdict) -> None:
        letter = {SURVIVED: "S", NO_BUILD: "N"}.get(verdict.status)
        if letter is None:
            judge = judge_of(verdict)
            if self.judges.get(judge) != digest_of(judge):
                self.forget(judge)
                self.judges[judge] = digest_of(judge)
            letter = string.ascii_lowercase[list(self.judges).index(judge)]
        self.verdicts[at] = letter

    def forget(self, judge: str) -> None:
        """What an earlier version of a judge noticed."""
        self.verdicts = [NOT_TRIED if self.judge_of(v) == judge else v for v in self.verdicts]


def judge_of(verdict: Verdict) -> str:
    file = verdict.noticed.partition("::")[0]
    return file if file.startswith("tests/") and (ROOT / file).exists() else CASES


class Record:
    """`path` None: remembers nothing.  Survivors are kept for people to read, and tried again."""

    def __init__(self, path: str | None, targets: list[Target]):
        self.path, self.saved = Path(path) if path else None, time.perf_counter()
        self.places = {m: (target, at) for target in targets for at, m in enumerate(target.mutants())}
        size = Counter(target.file for target, _ in self.places.values())
        stored = self.read()
        self.rows: dict[str, Row] = {}
        for target in targets:
            row = stored.get(target.file)
            for judge in target.tests:  # as they are now, not as they may be when something is noticed
                digest_of(judge)
            if row is None or row.source != digest_of(target.file) or len(row.verdicts) != size[target.file]:
                row = Row(digest_of(target.file), {}, [NOT_TRIED] * size[target.file])
            self.rows[target.file] = row
        self.changed: set[str] = set()

    def read(self) -> dict[str, Row]:
        if not self.path or not self.path.exists():
            return {}
        lines = map(json.loads, self.path.read_text().splitlines())
        return {line["file"]: Row(line["source"], line["judges"], list(line["verdicts"])) for line in lines}

    def get(self, mutant: Mutant, for_people: bool = False) -> Verdict | None:
        """None when it is to be tried: new, or (unless asked for) a survivor or killed by a judge that has changed."""
        target, at = self.places[mutant]
        row = self.rows[target.file]
        letter = row.verdicts[at]
        if letter == NOT_TRIED or (not for_people and (letter == "S" or row.outdated(letter))):
            return None
        judge = row.judge_of(letter)
        return Verdict({"S": SURVIVED, "N": NO_BUILD}.get(letter, KILLED), judge, noticed=judge)

    def put(self, mutant: Mutant, verdict: Verdict) -> None:
        target, at = self.places[mutant]
        self.rows[target.file].put(at, verdict)
        self.changed.add(target.file)
        if time.perf_counter() - self.saved > SAVED_SECONDS:
            self.save()

    def save(self) -> None:
        """Writes the rows that have changed, beside what others may have written meanwhile."""
        self.saved = time.perf_counter()
        if not self.path or not self.changed:
            return
        rows = self.read() | {file: self.rows[file] for file in self.changed}
        new = self.path.with_name(self.path.name + ".new")
        with new.open("w") as file:
            for name, row in sorted(rows.items()):
                line = {"file": name, "source": row.source, "judges": row.judges, "verdicts": "".join(row.verdicts)}
                print(json.dumps(line), file=file)
        os.replace(new, self.path)
