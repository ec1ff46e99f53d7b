"""Small mistakes, made by pattern: which changes of one place in a source file there are.

Comments, strings, checks that raise, and code that only another compiler sees are left alone.  Every change is one that
a person could make: an operator or a sign, a comparison, a number, a rounding, a statement or a term left out.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SWAPPED = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "%", "%": "//", "<<": ">>", ">>": "<<", "&": "|", "|": "&"}
NEGATED = {"<": ">=", ">=": "<", ">": "<=", "<=": ">", "==": "!=", "!=": "=="}
SHIFTED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
OPERAND = r"(?<=[\w)\]])"  # behind it comes a binary operator
NUMBER = re.compile(r"(?<![\w.])(0x[0-9a-fA-F]+|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)(?=[uf]?(?![\w.]))")
DOUBLE = re.compile(r"(?<![\w.])\d+\.\d*(?:[eE][-+]?\d+)?(?![\w.])")  # a number that makes an expression one of doubles


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int  # from 1
    rule: str
    before: str  # the whole line, stripped
    after: str
    text: str  # the whole file, mutated
    begin: int  # the part of the unchanged file that is replaced
    end: int
    new: str

    @property
    def id(self) -> str:
        """Stable while other lines move."""
        return f"{self.file}: {self.before} => {self.after}"


def mutants(file: str, text: str, functions: Sequence[str] | None, skip: str) -> Iterator[Mutant]:
    """All mutants of a file.  functions: only inside these (Python); skip: leave out lines that match."""
    masked = python_code(text, functions) if file.endswith(".py") else cpp_code(text)
    lines, seen, start, before = text.split("\n"), set(), 0, ""
    for number, (line, code) in enumerate(zip(lines, masked.split("\n")), 1):
        if code.strip() and not (skip and re.search(skip, line)):
            for rule, begin, end, new in edits(line, code, file):
                if rule == "statement" and not re.search(r"(^|[;{}:])\s*$", before):
                    continue  # the rest of a statement
                after = line[:begin] + new + line[end:]
                if after != line and (number, after) not in seen:
                    seen.add((number, after))
                    whole = text[:start] + after + text[start + len(line) :]
                    place = start + begin, start + end, new
                    yield Mutant(file, number, rule, line.strip(), after.strip() or "(nothing)", whole, *place)
        start += len(line) + 1
        before = code


def edits(line: str, code: str, file: str) -> Iterator[tuple[str, int, int, str]]:
    """(rule, begin, end, replacement) for one line; `code` is the line with all that is not code blanked."""
    for match in re.finditer(OPERAND + r" (\+|-|\*|//?|%|<<|>>|&|\|) (?=\S)", code):
        swapped = SWAPPED[match[1]]
        yield "operator", *match.span(1), swapped if file.endswith(".py") or swapped != "//" else "/"
    for match in re.finditer(OPERAND + r" ([-+*/])= ", code):
        yield "operator", *match.span(1), SWAPPED[match[1]]
    for match in re.finditer(OPERAND + r" (<=?|>=?|[=!]=) (?=\S)", code):
        yield "comparison", *match.span(1), NEGATED[match[1]]
        if match[1] in SHIFTED:
            yield "boundary", *match.span(1), SHIFTED[match[1]]
    for match in NUMBER.finditer(code):
        if not re.search(r"\[$|\b(dim|axis)=\(?-?$|^\s*#", code[: match.start()]):  # x[0] and dim=0 name things
            yield "constant", *match.span(1), other_number(match[1])
    for match in re.finditer(r"(?<=[=(,?:\[] )-(?=[\w(])|(?<=[(\[])-(?=[\w(])|(?<=return )-(?=[\w(])", code):
        yield "sign", *match.span(), ""
    for match in re.finditer(r"(?<=[\w)\]]) [-+] [\w.]+(?=[;)]|$)", code.rstrip()):
        yield "term", *match.span(), ""
    statement = r"\s+((?:if \([^;]*\) )?[\w.\[\]>*&-]+(?:\(.*\)| (?:[-+*/|&]|<<|>>)?= [^;]*);)$"
    if not file.endswith(".py"):
        if (match := re.match(statement, code.rstrip())) and not match[1].startswith("return"):
            yield "statement", *match.span(1), ";"
        yield from roundings(code, file)
    elif match := re.match(r"\s+(tl\.store\(.*\)|(\w+) = .*\b\2\b.*)$", code.rstrip()):
        yield "statement", *match.span(1), "pass"


def roundings(code: str, file: str) -> Iterator[tuple[str, int, int, str]]:
    """C++: one operation of a longer expression in double, or a double rounded to float before it is used.

    The engine and the matrix products compute places and counts, where such a change is no mistake that compiles and
    matters; there only lines that show a float are changed.
    """
    if re.search(r" [-+*/] |pow", code):
        for match in re.finditer(r"\bh\.\w+", code):
            yield "rounding", *match.span(), f"static_cast<float>({match[0]})"
    if re.search(r"\bh\.|double|int64_t|uint32_t|float_bits", code) or DOUBLE.search(code):
        return
    if file.startswith(("csrc/engine", "csrc/matrix")) and not re.search(r"float(?! \*)|fabsf|\d\.?f\b", code):
        return
    if len(re.findall(OPERAND + r" [-+*/] ", code)) > 1:
        for match in re.finditer(OPERAND + r" [*/] ([\w.]+)(?=[\s;)])", code):
            yield "rounding", *match.span(1), f"(1.0 * {match[1]})"
    for match in re.finditer(r"\bsqrtf\(", code):
        yield "rounding", *match.span(), "std::sqrt(1.0 * "


def other_number(text: str) -> str:
    if text.startswith("0x"):
        return hex(int(text, 16) + 1)
    if re.fullmatch(r"\d+", text):
        return str(int(text) + 1)
    return repr(float(text) * 3 or 0.5)


def blank(text: str, keep: Sequence[tuple[int, int]]) -> str:
    """`text` with everything but the given ranges and line ends replaced by spaces."""
    out = [c if c == "\n" else " " for c in text]
    for begin, end in keep:
        out[begin:end] = text[begin:end]
    return "".join(out)


def cpp_code(text: str) -> str:
    """Without comments, strings, the preprocessor's lines, declarations of constants' names, and device-only parts."""
    text = re.sub(r'//.*|"(?:[^"\\]|\\.)*"', lambda m: " " * len(m[0]), text)
    lines, skipping = [], False
    for line in text.split("\n"):
        if re.match(r"\s*#\s*if.*\b__CUDA", line):
            skipping = True
        elif re.match(r"\s*#\s*(else|endif)", line):
            skipping = False
        lines.append(" " * len(line) if skipping or re.match(r"\s*(#|template|asm)", line) else line)
    return "\n".join(lines)


def python_code(text: str, functions: Sequence[str] | None) -> str:
    """Names, numbers and operators inside the bodies of `functions`, without statements that raise and their tests."""
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    wanted, unwanted, annotations = set(), set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and (functions is None or node.name in functions):
            wanted.update(range(node.body[0].lineno, node.end_lineno + 1))
        if isinstance(node, ast.Raise) or (isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise)):
            last = node.end_lineno if isinstance(node, ast.Raise) else node.body[-1].end_lineno
            unwanted.update(range(node.lineno, last + 1))
        if isinstance(node, ast.AnnAssign):  # inside a function never evaluated
            a = node.annotation
            annotations.add(((a.lineno, a.col_offset), (a.end_lineno, a.end_col_offset)))
    keep, inside_text = [], 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        inside_text += {"FSTRING_START": 1, "FSTRING_END": -1}.get(name, 0)
        if any(begin <= token.start < end for begin, end in annotations):
            continue
        if token.start[0] in wanted - unwanted and name in ("NAME", "NUMBER", "OP") and not inside_text:
            keep.append(tuple(starts[row - 1] + column for row, column in (token.start, token.end)))
    return blank(text, keep)
