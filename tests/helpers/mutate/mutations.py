"""The mutants of a file: one changed operator, constant, argument or statement each."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}
# Texts for people, and arguments that only guard against mistakes of the program itself.
IGNORED_KEYWORDS = {"hint", "where", "strict", "encoding", "description", "help"}
TYPES = {"int", "str", "float", "bytes", "bool", "list", "tuple", "dict", "set", "Path", "Any"}


@dataclass(frozen=True)
class Mutant:
    """One change of a file.

    Attributes:
        line: number of its line.
        scope: name of the function or class around it, with those around that.
        text: its line without indentation.
        change: what becomes what, with a number from the second equal change of the line on.
        source: text of the changed file.
        lines: first and last line of the statement, or of its head.
        at_import: whether the statement runs when the module is imported.
    """

    line: int
    scope: str
    text: str
    change: str
    source: str
    lines: tuple[int, int]
    at_import: bool

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies it when lines above it come and go."""
        return self.scope, self.text, self.change


def mutants(source: str) -> list[Mutant]:
    """All mutants of a file that compile, in the order of their lines."""
    made, counts = [], Counter[tuple[str, str, str]]()
    for mutant in sorted(_Walk(source).module(), key=lambda mutant: mutant.line):
        try:
            compile(mutant.source, "mutant", "exec")
        except SyntaxError:
            continue
        counts[mutant.key] += 1
        number = counts[mutant.key]
        made.append(replace(mutant, change=f"{mutant.change} ({number})") if number > 1 else mutant)
    return made


def _changed(node: ast.AST, **fields: object) -> ast.AST:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


class _Walk:
    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        self.lines = source.splitlines()
        self.bytes = source.encode()
        self.starts = [0]
        for line in self.bytes.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def module(self) -> Iterator[Mutant]:
        yield from self.body(self.tree.body, "", True)

    def body(self, statements: list[ast.stmt], scope: str, at_import: bool) -> Iterator[Mutant]:
        for number, statement in enumerate(statements):
            if number == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # a docstring
            yield from self.statement(statement, scope, at_import)

    def statement(self, node: ast.stmt, scope: str, at_import: bool) -> Iterator[Mutant]:
        inner = [part for name in ("body", "orelse", "finalbody") for part in getattr(node, name, ())]
        parts = [handler.body for handler in getattr(node, "handlers", ())] + [case.body for case in getattr(node, "cases", ())]
        inner += [part for body in parts for part in body]
        end = min((part.lineno for part in inner), default=(node.end_lineno or node.lineno) + 1) - 1
        where = (scope, (node.lineno, max(end, node.lineno)), at_import)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not isinstance(node, ast.ClassDef):
                for default in (*node.args.defaults, *node.args.kw_defaults):
                    yield from self.expression(default, where)
            name = f"{scope}.{node.name}".lstrip(".")
            yield from self.body(node.body, name, at_import and isinstance(node, ast.ClassDef))
            return
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            return
        yield from self.changes_of_statement(node, where)
        if not isinstance(node, ast.Raise | ast.Assert):
            for name, value in ast.iter_fields(node):
                if name in ("annotation", "target", "targets") and not isinstance(node, ast.Delete):
                    continue
                for part in value if isinstance(value, list) else [value]:
                    if isinstance(part, ast.withitem):
                        yield from self.expression(part.context_expr, where)
                    elif isinstance(part, ast.match_case):
                        yield from self.expression(part.guard, where)
                    elif isinstance(part, ast.expr):
                        yield from self.expression(part, where)
        for part in inner:
            yield from self.statement(part, scope, at_import)

    def changes_of_statement(self, node: ast.stmt, where: tuple) -> Iterator[Mutant]:
        if isinstance(node, ast.Break | ast.Continue):
            yield self.made(node, "continue" if isinstance(node, ast.Break) else "break", where)
        elif isinstance(node, ast.Return) and node.value is not None:
            if not (isinstance(node.value, ast.Constant) and node.value.value is None):
                yield self.made(node, "return None", where)
        elif isinstance(node, ast.AugAssign):
            yield self.made(node, "pass", where)
            if type(node.op) in ARITHMETIC:
                yield self.made(node, ast.unparse(_changed(node, op=ARITHMETIC[type(node.op)]())), where)
        elif isinstance(node, ast.Raise) or (isinstance(getattr(node, "value", None), ast.Call) and isinstance(node, ast.Expr)):
            yield self.made(node, "pass", where)
        elif isinstance(node, ast.Assign):
            if all(isinstance(one, ast.Attribute | ast.Subscript) for one in node.targets):
                yield self.made(node, "pass", where)
        elif isinstance(node, ast.If | ast.While) and not isinstance(
            node.test, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Constant
        ):
            yield self.made(node.test, f"not ({ast.unparse(node.test)})", where)

    def expression(self, node: ast.expr | None, where: tuple) -> Iterator[Mutant]:
        if node is None or isinstance(node, ast.JoinedStr):
            return
        for other, change in self.changes_of_expression(node):
            yield self.made(node, f"({other})" if not isinstance(node, ast.Slice) else other, where, change or other)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.keyword):
                if child.arg not in IGNORED_KEYWORDS:
                    yield from self.expression(child.value, where)
            elif isinstance(child, ast.comprehension):
                for part in (child.iter, *child.ifs):
                    yield from self.expression(part, where)
                for test in child.ifs:
                    if not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp):
                        yield self.made(test, f"(not ({ast.unparse(test)}))", where)
            elif isinstance(child, ast.arguments):
                for default in (*child.defaults, *child.kw_defaults):
                    yield from self.expression(default, where)
            elif isinstance(child, ast.expr):
                yield from self.expression(child, where)

    def changes_of_expression(self, node: ast.expr) -> Iterator[tuple[str, str]]:
        """Replacements of an expression, each with its description where the replacement alone would be long."""
        if isinstance(node, ast.Compare):
            for index, operator in enumerate(node.ops):
                for other in COMPARISONS[type(operator)]:
                    yield ast.unparse(_changed(node, ops=[*node.ops[:index], other(), *node.ops[index + 1 :]])), ""
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            texts = any(isinstance(n, ast.JoinedStr) or _is_text(n) for n in (node.left, node.right))
            types = any((isinstance(n, ast.Name) and n.id in TYPES) or _is_none(n) for n in (node.left, node.right))
            if not texts and not types:
                yield ast.unparse(_changed(node, op=ARITHMETIC[type(node.op)]())), ""
        elif isinstance(node, ast.BoolOp):
            yield ast.unparse(_changed(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())), ""
        elif isinstance(node, ast.UnaryOp):
            yield ast.unparse(node.operand), ""
        elif isinstance(node, ast.IfExp) and not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
            yield ast.unparse(_changed(node, test=ast.UnaryOp(ast.Not(), node.test))), ""
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, bool):
                yield str(not node.value), ""
            elif isinstance(node.value, int | float):
                yield from ((repr(node.value + by), "") for by in (1, -1))
        elif isinstance(node, ast.Slice):
            for name in ("lower", "upper", "step"):
                if getattr(node, name) is not None and ast.unparse(getattr(node, name)) != "0":
                    yield ast.unparse(_changed(node, **{name: None})), ""
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                yield ast.unparse(_changed(node, func=ast.Name(CALLS[node.func.id]))), ""
            for keyword in node.keywords:
                if keyword.arg and keyword.arg not in IGNORED_KEYWORDS:
                    fewer = [other for other in node.keywords if other is not keyword]
                    yield ast.unparse(_changed(node, keywords=fewer)), f"without {ast.unparse(keyword)}"

    def made(self, node: ast.AST, text: str, where: tuple, description: str = "") -> Mutant:
        scope, lines, at_import = where
        begin = self.starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        end = self.starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        before = " ".join(self.bytes[begin:end].decode().split())
        source = (self.bytes[:begin] + text.encode() + self.bytes[end:]).decode()
        line = self.lines[node.lineno - 1].strip()  # type: ignore[attr-defined]
        return Mutant(node.lineno, scope, line, f"{before} → {description or text}", source, lines, at_import)  # type: ignore[attr-defined]


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
