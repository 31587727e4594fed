"""The shape of the module: pure rooms, names defined above their use."""

from __future__ import annotations

import ast
import re
import symtable

import harness

SOURCE = (harness.ROOT / "rating_agent_hep.py").read_text()
NAMES = (
    "imports",
    "limits",
    "errors and types",
    "options",
    "HEP",
    "SIP",
    "routes",
    "the call: facts and a judge",
    "call table",
    "call records",
    "outbox",
    "configuration",
    "logs and metrics",
    "store",
    "Redis",
    "rating API",
    "delivery",
    "cluster",
    "forwarding",
    "agent",
    "servers",
    "recordings",
    "command line",
)
FOUND = list(re.finditer(r"^# Room: (.+)$", SOURCE, re.M))
ROOMS = {number: match.start() for number, match in enumerate(FOUND)}
PURE = range(NAMES.index("errors and types"), NAMES.index("configuration"))
FORBIDDEN = {
    "socket",
    "gevent",
    "logging",
    "log",
    "time",
    "urllib3",
    "statsd",
    "signal",
    "os",
    "sys",
}


def room_of(node: ast.AST) -> int:
    offset = len("".join(SOURCE.splitlines(keepends=True)[: node.lineno - 1]))  # type: ignore[attr-defined]
    return max((room for room, start in ROOMS.items() if start <= offset), default=-1)


def test_all_rooms_are_there_in_order() -> None:
    assert [match[1] for match in FOUND] == list(NAMES)


def test_the_rooms_from_the_types_to_the_outbox_are_pure() -> None:
    """They take bytes, settings and `now`: no socket, gevent, logging, clock or urllib3."""
    tree = ast.parse(SOURCE)
    modules = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert {"socket", "gevent", "logging", "time", "urllib3", "statsd"} <= modules
    faults = []
    for node in tree.body:
        if room_of(node) not in PURE:
            continue
        # `time` is also the field's word for a time stamp: as a module it has an attribute.
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
                if inner.value.id in FORBIDDEN:
                    faults.append(f"line {inner.lineno}: {inner.value.id}.{inner.attr}")
            elif isinstance(inner, ast.Global | ast.Import | ast.ImportFrom):
                faults.append(f"line {inner.lineno}: {type(inner).__name__}")
            elif isinstance(inner, ast.Name) and inner.id in ("open", "print", "input", "log"):
                faults.append(f"line {inner.lineno}: {inner.id}")
    assert faults == []


def globals_used(table: symtable.SymbolTable) -> set[str]:
    """The names that a scope and those in it look up in the module."""
    used = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return used.union(*(globals_used(child) for child in table.get_children()))


def test_a_room_uses_only_names_defined_in_it_or_above() -> None:
    tree = ast.parse(SOURCE)
    rooms: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            rooms[node.name] = room_of(node)
        for name in ast.walk(node) if isinstance(node, ast.Assign | ast.AnnAssign) else ():
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                rooms.setdefault(name.id, room_of(node))
    assert len(rooms) > 150
    scopes = symtable.symtable(SOURCE, "rating_agent_hep.py", "exec").get_children()
    faults = [
        f"{scope.get_name()} uses {name}"
        for scope in scopes
        if scope.get_name() in rooms
        for name in globals_used(scope)
        if rooms.get(name, 0) > rooms[scope.get_name()]
    ]
    assert faults == []
