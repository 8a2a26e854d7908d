"""Simple mutants of a Python file: each is the file with one small change, made on its syntax tree.

What is changed: comparisons and their boundaries, arithmetic and boolean operators and their
operands, conditions, numbers, bounds of ranges and slices, indices, loops (without their first or
last round, or one round only), calls (min for max, no call at all, a keyword argument less), lists
(an item less), and statements, which are left out. Strings, annotations, decorators and what stands
in a `raise` are left alone: no task promises the words of a message. So is `strict`, which only
checks arguments. Outside functions only numbers change.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

COMPARED_INSTEAD: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
COMPUTED_INSTEAD: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
CALLED_INSTEAD = {"rint": "floor"}
for one, other in [
    ("min", "max"), ("minimum", "maximum"), ("argmin", "argmax"), ("any", "all"),
    ("floor", "ceil"), ("zeros", "ones"), ("zeros_like", "ones_like"),
]:  # fmt: skip
    CALLED_INSTEAD |= {one: other, other: one}
UNTOUCHED = {"annotation", "returns", "decorator_list", "type_params", "format_spec"}
DROPPED = (
    ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.Delete, ast.Return, ast.Raise,
    ast.For, ast.While, ast.With, ast.Try,
)  # fmt: skip
LEFT_OUT = "(left out)"
LONGEST_LINE = 80  # characters of a line that is told whole
AROUND = 30  # and so many on either side of a change in a longer one
LEAVING = ast.Return | ast.Raise | ast.Break | ast.Continue


@dataclass(frozen=True)
class Mutant:
    """One change, in the statement at `line` of `function` (its qualified name; none: "").

    `change` is "before → after", of a compound statement only its first line, of a long line only
    the part around the change; `source` is the whole changed file.
    """

    line: int
    function: str
    change: str
    source: str


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of a file, in the order of its lines; no two are the same program.

    A second change that reads as another one of the same function ends in " (2)".
    """
    tree = ast.parse(source)
    seen = {ast.unparse(tree)}
    told: Counter[tuple[str, str]] = Counter()
    found = []
    for block, place, function, numbers_only in statements(tree):
        before, line = first_line(block[place]), block[place].lineno
        for holder, key, new in edits(block, place):
            old = put(holder, key, new)
            if numbers_only and not isinstance(new, ast.Constant):
                mutated = None
            else:
                mutated, change = ast.unparse(tree), told_change(before, first_line(block[place]))
            put(holder, key, old)
            if mutated is None or mutated in seen:
                continue
            seen.add(mutated)
            told[function, change] += 1
            number = told[function, change]
            found.append(
                Mutant(line, function, f"{change} ({number})" if number > 1 else change, mutated)
            )
    return found


def statements(
    node: ast.AST, scope: str = "", numbers_only: bool = True
) -> Iterator[tuple[list[Any], int, str, bool]]:
    """Each statement below `node`: the list that holds it, its place there, the function that it
    is in, and whether it is in none."""
    for field in ("body", "handlers", "orelse", "finalbody"):
        block = getattr(node, field, [])
        for place, child in enumerate(block):
            yield block, place, scope, numbers_only
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{scope}.{child.name}".lstrip(".")
                yield from statements(
                    child, inner, numbers_only and isinstance(child, ast.ClassDef)
                )
            else:
                yield from statements(child, scope, numbers_only)


def edits(block: list[Any], place: int) -> Iterator[tuple[Any, Any, ast.AST | None]]:
    """Where a statement is changed (in a node or list, by field or place), and what comes there."""
    for new in changed_statement(block[place]):
        yield block, place, new
    for holder, key in slots(block[place]):
        for changed in changed_expression(take(holder, key)):
            if not isinstance(holder, ast.Expr) or isinstance(
                changed, ast.Call
            ):  # else as left out
                yield holder, key, changed


def slots(node: ast.AST) -> Iterator[tuple[Any, Any]]:
    """The places of all expressions of a statement that may change, not of statements within it."""
    if isinstance(node, ast.Raise) or (isinstance(node, ast.keyword) and node.arg == "strict"):
        return
    for field, value in ast.iter_fields(node):
        if field in UNTOUCHED:
            continue
        holder, keys = (value, range(len(value))) if isinstance(value, list) else (node, [field])
        for key in keys:
            child = take(holder, key)
            if isinstance(child, ast.AST) and not isinstance(child, ast.stmt | ast.excepthandler):
                yield holder, key
                yield from slots(child)


def changed_statement(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.If(test=test) | ast.While(test=test):
            for other in changed_condition(test, endless=isinstance(node, ast.While)):
                yield altered(node, test=other)
        case ast.For(iter=iterable):
            for other in shortened(iterable):
                yield altered(node, iter=other)
        case ast.AugAssign(target=target, op=op, value=value):
            yield ast.Assign([target], value, lineno=node.lineno)
            if type(op) in COMPUTED_INSTEAD:
                yield altered(node, op=COMPUTED_INSTEAD[type(op)]())
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()
    if isinstance(node, ast.For | ast.While) and not isinstance(node.body[-1], LEAVING):
        yield altered(node, body=[*node.body, ast.Break()])
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    is_field = isinstance(node, ast.AnnAssign) and node.value is None
    if isinstance(node, DROPPED) and not is_docstring and not is_field:
        yield ast.Pass()


def changed_expression(node: Any) -> Iterator[ast.AST | None]:
    match node:
        case ast.Compare(ops=ops):
            for place, op in enumerate(ops):
                for compared in COMPARED_INSTEAD[type(op)]:
                    yield altered(node, ops=[*ops[:place], compared(), *ops[place + 1 :]])
        case ast.BinOp(left=left, op=op, right=right):
            if type(op) in COMPUTED_INSTEAD:
                yield altered(node, op=COMPUTED_INSTEAD[type(op)]())
            yield from (left, right)
        case ast.BoolOp(op=op, values=values):
            yield altered(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
            for rest in one_less(values):
                yield rest[0] if len(rest) == 1 else altered(node, values=rest)
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.IfExp(test=test):
            for other in changed_condition(test):
                yield altered(node, test=other)
        case ast.comprehension(iter=iterable, ifs=ifs):
            for other in shortened(iterable):
                yield altered(node, iter=other)
            for place, test in enumerate(ifs):
                for other in changed_condition(test):
                    yield altered(node, ifs=[*ifs[:place], other, *ifs[place + 1 :]])
        case ast.Call():
            yield from changed_call(node)
        case ast.Slice():
            for bound in ("lower", "upper", "step"):
                if getattr(node, bound):
                    yield altered(node, **{bound: None})
                    for other in off_by_one(getattr(node, bound)):
                        yield altered(node, **{bound: other})
        case ast.Subscript(slice=ast.Tuple(elts=indices)):
            for place, index in enumerate(indices):
                for other in off_by_one(index):
                    several = [*indices[:place], other, *indices[place + 1 :]]
                    yield altered(node, slice=altered(node.slice, elts=several))
        case ast.Subscript(slice=index):
            for other in off_by_one(index):
                yield altered(node, slice=other)
        case ast.List(elts=items, ctx=ast.Load()) if len(items) > 1:
            for rest in one_less(items):
                yield altered(node, elts=rest)


def changed_call(node: ast.Call) -> Iterator[ast.AST]:
    """Another function, its first argument or its object instead, and one keyword less."""
    function, arguments = node.func, node.args
    field = "id" if isinstance(function, ast.Name) else "attr"
    name = getattr(function, field, "")
    if name in CALLED_INSTEAD:
        yield altered(node, func=altered(function, **{field: CALLED_INSTEAD[name]}))
    if isinstance(function, ast.Attribute) and (not arguments or name == "astype"):
        yield function.value
    elif arguments and not isinstance(arguments[0], ast.Starred | ast.GeneratorExp):
        yield arguments[0]
    for place, keyword in enumerate(node.keywords):
        if keyword.arg != "strict":
            yield altered(node, keywords=[*node.keywords[:place], *node.keywords[place + 1 :]])
    if name == "range":
        for place, bound in enumerate(arguments):
            for other in off_by_one(bound):
                yield altered(node, args=[*arguments[:place], other, *arguments[place + 1 :]])


def changed_condition(test: ast.expr, endless: bool = False) -> Iterator[ast.expr]:
    """Negated, unless another operator does that; never true; always true, if not `endless`."""
    opposite = ast.Eq | ast.NotEq | ast.In | ast.NotIn | ast.Is | ast.IsNot
    if not (isinstance(test, ast.Compare) and isinstance(test.ops[-1], opposite)):
        yield ast.UnaryOp(ast.Not(), test)
    yield ast.Constant(False)
    if not endless:
        yield ast.Constant(True)


def shortened(iterable: ast.expr) -> Iterator[ast.expr]:
    """What is iterated over, without its first and without its last; ranges change by bounds."""
    if isinstance(iterable, ast.Call) and getattr(iterable.func, "id", "") == "range":
        return
    for cut in ("1:", ":-1"):
        yield ast.parse(f"list({ast.unparse(iterable)})[{cut}]", mode="eval").body


def off_by_one(node: ast.expr) -> Iterator[ast.expr]:
    """One more and one less; none for what changes by itself, or is no number."""
    if not isinstance(node, ast.Constant | ast.UnaryOp | ast.Slice | ast.Tuple):
        yield ast.BinOp(node, ast.Add(), ast.Constant(1))
        yield ast.BinOp(node, ast.Sub(), ast.Constant(1))


def one_less(items: list[Any]) -> Iterator[list[Any]]:
    return ([*items[:place], *items[place + 1 :]] for place in range(len(items)))


def altered(node: Any, **fields: Any) -> Any:
    """A copy of a node with other fields; it shares the rest with the node."""
    new = copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def take(holder: Any, key: Any) -> Any:
    return holder[key] if isinstance(holder, list) else getattr(holder, key)


def put(holder: Any, key: Any, value: Any) -> Any:
    """Set a place of a list or a field of a node; what was there."""
    old = take(holder, key)
    if isinstance(holder, list):
        holder[key] = value
    else:
        setattr(holder, key, value)
    return old


def told_change(before: str, after: str) -> str:
    """ "before → after", cut around the change where the line is long."""
    start = len(commonprefix([before, after]))
    end = len(commonprefix([before[start:][::-1], after[start:][::-1]]))
    if after == LEFT_OUT or len(before) <= LONGEST_LINE:
        return f"{before} → {after}"
    first, last = max(0, start - AROUND), max(0, end - AROUND)
    head, tail = "…" if first else "", "…" if last else ""
    return " → ".join(f"{head}{line[first : len(line) - last]}{tail}" for line in (before, after))


def first_line(statement: ast.AST) -> str:
    """A statement as one reads it, in one line, without the statements that it holds."""
    if isinstance(statement, ast.Pass):
        return LEFT_OUT
    lines = [line for line in ast.unparse(statement).splitlines() if not line.startswith("@")]
    once = isinstance(statement, ast.For | ast.While) and isinstance(statement.body[-1], ast.Break)
    return f"{lines[0]} (once)" if once else lines[0]
