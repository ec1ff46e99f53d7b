"""All mutants of a C++ file in one text, each behind a run-time switch, so that they are compiled once together.

What cannot be a switch is left out, and compiled by itself: numbers that the compiler needs, and lines that do not
compile with switches.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from mutation_rules import Mutant

HEADER = Path(__file__).parent / "mutation_switches.h"


def insertions(text: str, mutant: Mutant, k: int) -> tuple[str, int, int, int] | None:
    """(kind, begin, end, number of the switch within the kind); None when the mutant has to be compiled by itself."""
    begin, end = mutant.begin, mutant.end
    old = text[begin:end]
    if mutant.rule == "operator":
        return ("assignment" if text[end] == "=" else "operator"), begin, end, 0
    if mutant.rule == "term":
        return "operator", begin + 1, begin + 2, 1
    if mutant.rule in ("comparison", "boundary"):
        return "comparison", begin, end, int(mutant.rule == "boundary")
    if mutant.rule == "sign":
        return "sign", begin, end, 0
    if mutant.rule == "constant":
        return "constant", begin, end + bool(re.match(r"[uf](?![\w.])", text[end:])), 0
    if mutant.rule == "statement":
        rest = text[text.index("\n", begin) + 1 :].lstrip()
        if old.startswith("if ") and rest.startswith("else"):
            return None
        return "statement", begin, end, 0
    if mutant.rule == "rounding" and old.startswith("h."):
        return "rounded", begin, end, 0
    if mutant.rule == "rounding" and (place := expression(text, begin)):
        return "alternative", *place, 0
    return None


def expression(text: str, at: int) -> tuple[int, int] | None:
    """What the line's statement assigns or returns, when it is all of it: then its type is what it is converted to."""
    start, end = text.rindex("\n", 0, at) + 1, text.index("\n", at)
    whole = re.match(
        r"\s*(?:return|(?:const )?(?:float )?[\w.]+(?:\[\w+\])? =) ([^;{}=]*);\s*(?://.*)?$", text[start:end]
    )
    if not whole:
        return None
    depth, commas = 0, 0
    for c in whole[1]:
        depth += (c in "([") - (c in ")]")
        commas += c == "," and not depth
    return None if commas or at < start + whole.start(1) else (start + whole.start(1), start + whole.end(1))


def switched(text: str, mutants: Iterable[tuple[int, Mutant]], without: Collection[int]) -> tuple[str, set[int]]:
    """The text with switches, and the numbers of those mutants that are in it; none on lines `without` (from 1)."""
    places: dict[tuple[str, int, int], list[int]] = {}
    new: dict[int, str] = {}
    numbers = set()
    before: dict[int, str] = {}
    after: dict[int, str] = {}
    for k, mutant in mutants:
        if mutant.line in without or (place := insertions(text, mutant, k)) is None:
            continue
        *where, which = place
        numbers.add(k)
        if where[0] == "alternative":  # in another type, so with all that is around it
            _, begin, end = where
            other = text[begin : mutant.begin] + mutant.new + text[mutant.end : end]
            before[begin] = before.get(begin, "") + f"(mutation::on({k}) ? static_cast<float>({other}) : "
            after[end] = after.get(end, "") + ")"
            continue
        places.setdefault(tuple(where), [-1, -1])[which] = k
        new[k] = mutant.new
    replaced: dict[int, tuple[int, str]] = {}
    for (kind, begin, end), (a, b) in sorted(places.items(), key=lambda item: (item[0][1], -item[0][2])):
        old = text[begin:end]
        if kind == "operator":
            replaced[begin] = end, f"{old} mutation::Op({a}, {b}) {old}"
        elif kind == "comparison":
            replaced[begin] = end, f"{old} mutation::Comparison({a}, {b}) {old}"
        elif kind == "assignment":
            replaced[begin] = end + 1, f"{old}= mutation::Op({a}, -1) {old}="
        elif kind == "sign":
            replaced[begin] = end, f"mutation::Negate({a}) - "
        elif kind == "rounded":
            replaced[begin] = end, f"mutation::rounded({a}, {old})"
        elif kind == "constant":
            suffix = old[-1] if old[-1] == "u" or (old[-1] == "f" and not old.startswith("0x")) else ""
            replaced[begin] = end, f"mutation::pick({a}, {old}, {new[a]}{suffix})"
        else:
            before[begin] = f"{{ if (!mutation::on({a})) "
            after[end] = " }"
    out, at = [], 0
    while at < len(text):
        out.append(after.get(at, "") + before.get(at, ""))
        if at in replaced:
            at, words = replaced[at]
            out.append(words)
        else:
            out.append(text[at])
            at += 1
    return "".join(out), numbers


def with_header(text: str, header: Path = HEADER) -> str:
    return f'#include "{header}"\n#line 1\n{text}'


def lines_to_blame(errors: str, files: Collection[str]) -> set[tuple[str, int]]:
    """(file, line) of what the compiler could not digest, or of what made it inline or instantiate that."""
    blamed, users = set(), set()
    for text in errors.splitlines():
        if not (place := re.search(r"(?:^| at )([^\s:]+):(\d+):\d+", text)):
            continue
        file, line = next((file for file in files if place[1].endswith(file)), None), int(place[2])
        if re.search(r": +(fatal )?error: ", text):
            blamed.update({(file, line)} if file else users)
            users = set()
        elif file and not users and "required from" in text:
            users = {(file, line)}
        elif file and not users and "inlined from" in text:  # where the statement begins; two lines of it
            users = {(file, line), (file, line + 1)}
        elif re.search(r": +(warning|note): ", text):
            users = set()
    return blamed
