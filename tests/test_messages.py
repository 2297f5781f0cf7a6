"""Style of error messages, read from the sources: "what is wrong" in lower case, a hint in the imperative, no odd phrases."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.sources import parsed

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])
BASE = "FoveaError"
BUILTIN = {"ValueError", "TypeError", "BadParameter", "UsageError", "ClickException"}  # shown to users by pydantic and typer
NAMES = ("Slurm", "DeepSpeed", "Python")  # capitalized words that may begin a message
IMPERATIVES = (
    "Add|Allow|Append|Build|Change|Check|Choose|Clean|Convert|Copy|Correct|Declare|Delete|Download|End|Evaluate|Export|Fix|"
    "Flatten|Free|Give|Install|Join|Leave|Let|List|Load|Log|Lower|Make|Match|Move|Name|Pack|Pass|Point|"
    "Put|Quote|Raise|Read|Register|Remove|Rename|Repair|Repeat|Report|Request|Restore|Resume|Run|Save|See|"
    "Set|Sign|Start|Stop|Store|Submit|Train|Trust|Try|Unpack|Unset|Use|Wait|Write"
)
PHRASES = {
    r"\bgoing on\b|\bsigns? of life\b|\bheard of\b|\btaken? for granted\b": "continuing, heartbeat, assumes",
    r"(?<!there )\b(is|are|was) no (?!longer\b|more\b|better\b)": "is not a …",
    r"\bchoose of\b": "choose one of",
    r"\bor the like\b": "name the choices",
    r"\b(no|some)body\b|\bof whom\b|\bwhoever\b": "name the process, the user or the file",
    r"\b(tells?|told|asked for|stands?|stood|wants?|wanted|mend(ed|s)?|anew|meanwhile|nothing of it)\b": "use a technical term",
    r"\bjudg(e|es|ed|ing|ment)\b": "evaluate",
    r"\bpictures?\b": "image",
    r"\bwhole\b(?! numbers?)": "complete, entire",
    r"(?<!^Input )\bshould\b": "must",  # "Input should" is pydantic's
    r"\bat work\b|\bgoes? on\b|\btakes? for\b": "running, continues",
}


@dataclass(frozen=True)
class Text:
    """A string of the source; ``…`` stands for interpolated values."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text!r}"


def name_of(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


@cache
def error_classes() -> frozenset[str]:
    """The classes of errors.py and all that derive from them in any file."""
    bases = {
        node.name: {name_of(base) for base in node.bases}
        for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef)
    }
    known = {BASE}
    while more := {name for name, above in bases.items() if above & known} - known:
        known |= more
    return frozenset(known)


def assigned(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Pairs of target and value; ``a, b = 1, 2`` gives two."""
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value


def texts(node: ast.expr, scope: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """All strings that an expression can be: both sides of a condition, all assignments of a name in the innermost scope."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value
    elif isinstance(node, ast.JoinedStr):
        yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body, scope)
        yield from texts(node.orelse, scope)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from texts(value, scope)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for line, left in texts(node.left, scope):
            for _, right in list(texts(node.right, scope)) or [(0, "…")]:
                yield line, left + right
    elif isinstance(node, ast.Name):
        for place in reversed(scope):
            if isinstance(place, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = place.args
                if node.id in {one.arg for one in (*arguments.args, *arguments.kwonlyargs, *arguments.posonlyargs)}:
                    return  # the callers' strings are seen at the calls
            values = [
                value
                for inner in (place.body if isinstance(place, ast.Module) else ast.walk(place))
                if isinstance(inner, ast.Assign)
                for target, value in assigned(inner)
                if name_of(target) == node.id
            ]
            if values:
                for value in values:
                    yield from texts(value, [])
                return


def calls(path: Path) -> Iterator[tuple[ast.Call, list[ast.AST]]]:
    """Calls of a file, each with the module and the functions around it."""

    def look(node: ast.AST, scope: list[ast.AST]) -> Iterator[tuple[ast.Call, list[ast.AST]]]:
        inside = [*scope, node] if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef) else scope
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call):
                yield child, inside
            yield from look(child, inside)

    yield from look(parsed(path), [])


@cache
def messages() -> list[Text]:
    """What is wrong: the first argument of every error."""
    found = []
    for path in FILES:
        file = path.relative_to(ROOT).as_posix()
        for call, scope in calls(path):
            if call.args and name_of(call.func) in error_classes() | BUILTIN | {"error"}:
                found += [Text(file, line, text) for line, text in texts(call.args[0], scope) if text]
    return found


@cache
def hints() -> list[Text]:
    """The hints of all calls that have one, whatever is called: some go through a function."""
    found = []
    for path in FILES:
        file = path.relative_to(ROOT).as_posix()
        for call, scope in calls(path):
            for word in call.keywords:
                if word.arg == "hint":
                    found += [Text(file, line, text) for line, text in texts(word.value, scope) if text.strip("… \n")]
        for node in ast.walk(parsed(path)):  # keyword arguments in a dictionary
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "hint":
                        found += [Text(file, line, text) for line, text in texts(value, []) if text]
    return found


@cache
def strings() -> list[Text]:
    """All strings of more than one word that are not docstrings."""
    found = []
    for path in FILES:
        tree = parsed(path)
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and isinstance(node.body[0], ast.Expr)
        }
        parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        found += [
            Text(path.relative_to(ROOT).as_posix(), line, text)
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant | ast.JoinedStr) and not {id(node)} & (documentation | parts)
            for line, text in texts(node, [])
            if " " in text.strip()
        ]
    return found


def report(wrong: list[Text], rule: str) -> None:
    assert not wrong, f"{rule}:\n" + "\n".join(map(str, wrong))


def test_the_scan_sees_messages_and_hints() -> None:
    assert len(messages()) > 300 and len(hints()) > 300 and len(strings()) > 1000
    assert {"ConfigError", "InvalidConfig", "TarDamage", "ShardNotFound"} <= error_classes()


def test_messages_begin_in_lower_case_or_with_a_value() -> None:
    wrong = [one for one in messages() if re.match(r"[A-Z][a-z]+\b", one.text) and not one.text.startswith(NAMES)]
    report(wrong, "begin in lower case, with the quoted value or with a setting")


def test_messages_end_without_a_period() -> None:
    report([one for one in messages() if re.search(r"[.!?\s]$", one.text)], "end without a period")


def test_hints_are_imperative_sentences() -> None:
    first = re.compile(rf"({IMPERATIVES})\b|If [^,]+, ({IMPERATIVES.lower()})\b")
    report([one for one in hints() if not first.match(one.text)], f"begin with an imperative ({IMPERATIVES})")


def test_hints_end_without_a_period() -> None:
    report([one for one in hints() if re.search(r"[.!?\s]$", one.text)], "end without a period")


def test_every_error_has_a_hint() -> None:
    wrong = []
    for path in FILES:
        for call, scope in calls(path):
            named = {word.arg for word in call.keywords}
            raised = name_of(call.func) in error_classes() | {"error"} and call.args and list(texts(call.args[0], scope))
            if raised and not named & {"hint", None}:
                wrong.append(Text(path.relative_to(ROOT).as_posix(), call.lineno, ast.unparse(call)))
    report(wrong, "give a hint")


@pytest.mark.parametrize("phrase", PHRASES)
def test_no_odd_phrases(phrase: str) -> None:
    pattern = re.compile(phrase, re.IGNORECASE)
    report([one for one in strings() if pattern.search(one.text)], f"write: {PHRASES[phrase]}")
