"""The shape of llmq.py: a true map, sections that build on those above, nothing without bound."""

from __future__ import annotations

import ast
import builtins
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Callable, Union

import pytest

from tests.fakes import LLMQ, ROOT, need

BANNER = re.compile(r"^# ==== (\d+)\. (\S.*?) =+$", re.MULTILINE)
PART_BANNER = re.compile(r"^# ==== ([A-Z])  (\S.*?) =+$", re.MULTILINE)
BANNER_LIKE = re.compile(r"^ *# *={2,}.*$", re.MULTILINE)
BANNER_WIDTH = 100
MAP_PART = re.compile(r"^ {0,3}([A-Z])  +(\S.*)$", re.MULTILINE)
MAP_LINE = re.compile(r"^ +(\d+)\. (\S+(?: \S+)*)(?:  +(\S.*))?$", re.MULTILINE)
FIRST_IMPURE = "Streams"  # the first section that may await, open a socket or read a clock
USED_LATE = {"PAGE"}  # the web page at the very end, looked up by a function above it
OLDEST_GRAMMAR = (3, 8)  # so that Python 3.8 can say that it is too old

FUNCTION_LINES = 60  # fewer
FUNCTION_LINES_95 = 50  # 95 % are shorter than this
FUNCTION_LINES_MEDIAN = 12
NESTING = 4
CLASS_LINES = 300
SECTION_LINES = 600  # past it, the map is drawn again
FILE_LINES = 17275  # outgrown: the design says 8,500, and never above 9,500
# How far each section may grow before somebody asks why; the sum is FILE_LINES at most.
BUDGET = {
    "front page": 155,
    "Errors": 145,
    "Tools": 105,
    "Kinds": 105,
    "Settings": 335,
    "Layers": 490,
    "Metrics": 120,
    "Identity": 380,
    "Backends": 500,
    "Fair share": 225,
    "Fleet": 290,
    "Scheduler": 545,
    "Forecast": 220,
    "Words": 550,
    "Tasks": 325,
    "Model choice": 170,
    "Cache": 105,
    "Messages": 310,
    "Bodies": 390,
    "Dialects": 540,
    "OpenAI": 50,
    "Ollama": 50,
    "Anthropic": 70,
    "Translation": 575,
    "Streams": 290,
    "Replies": 410,
    "Server": 375,
    "Upstream": 270,
    "Probes": 345,
    "Cards": 180,
    "Calls": 495,
    "Records": 285,
    "Store": 180,
    "Recall": 155,
    "Jobs": 260,
    "Auto": 270,
    "Admission": 300,
    "Gateway": 320,
    "Models": 365,
    "Leases": 105,
    "Runs": 225,
    "Batches": 280,
    "Changes": 80,
    "Background": 260,
    "Webhooks": 195,
    "Access": 170,
    "Snapshot": 340,
    "Job routes": 320,
    "Connect": 130,
    "Handlers": 405,
    "Routes": 280,
    "Demo": 215,
    "Terminal view": 475,
    "Service": 515,
    "Configuration": 110,
    "Process": 135,
    "Setup": 480,
    "Asking": 105,
    "Command line": 600,
    "Web page": 600,
}
TOP_LEVEL = {"llmq.py", "tray", "tests", "README.md", "pyproject.toml", "install.sh", "LICENSE"}

Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]
Scope = Union[ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try)

IMPURE_MODULES = {"asyncio", "random", "secrets", "select", "selectors", "socket", "ssl", "uuid"}
CLOCKS = {
    "datetime.now",
    "datetime.today",
    "datetime.utcnow",
    "date.today",
    "loop.time",
    "os.getrandom",
    "os.urandom",
    *(f"time.{name}" for name in ("monotonic", "perf_counter", "process_time", "sleep", "time")),
    *(f"time.{name}_ns" for name in ("monotonic", "perf_counter", "process_time", "time")),
}
CLOCKS_WITHOUT_ARGUMENT = {"time.ctime", "time.gmtime", "time.localtime"}
OPTIONAL_MODULES = {"tomli"}  # the one package that llmq uses where it is installed
POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
# sys.stdlib_module_names is there from 3.10 on; this is for 3.9 and holds what a server may need.
STDLIB_39 = """
__future__ abc argparse ast asyncio base64 bisect codecs collections concurrent contextlib copy
ctypes dataclasses datetime difflib email enum errno faulthandler fnmatch functools gc getpass
gzip hashlib heapq hmac html http inspect io ipaddress itertools json logging math mimetypes
msvcrt operator os pathlib platform pwd queue random re resource secrets select shlex shutil signal
socket sqlite3 ssl stat statistics string struct subprocess sys tempfile termios textwrap
threading time traceback tty types typing unicodedata urllib uuid weakref
"""
STDLIB = frozenset(getattr(sys, "stdlib_module_names", STDLIB_39.split())) | {"tomllib"}


@dataclass(frozen=True)
class Section:
    """One banner and what follows it; number 0 is what stands above the first."""

    number: int
    title: str
    first: int  # line of the banner
    last: int


def read() -> str:
    return LLMQ.read_text(encoding="utf-8")


def sections(source: str) -> list[Section]:
    found = [
        (int(match[1]), match[2], source.count("\n", 0, match.start()) + 1)
        for match in BANNER.finditer(source)
    ]
    starts = [(0, "front page", 1), *found]
    lines = source.splitlines()
    ends = [line - 1 for _, _, line in starts[1:]] + [len(lines)]
    # A part's banner stands right above its first section's, and belongs to neither side.
    ends = [end - bool(PART_BANNER.fullmatch(lines[end - 1])) for end in ends if lines]
    return [Section(*start, end) for start, end in zip(starts, ends)]


def section_of(source: str) -> Callable[[ast.AST], Section]:
    """Which section a node stands in."""
    all_of_them = sections(source)

    def find(node: Any) -> Section:
        return next(s for s in reversed(all_of_them) if s.first <= node.lineno)

    return find


# ---- The map ---------------------------------------------------------------------------------


def check_map(source: str) -> Iterator[str]:
    """The numbered map of the docstring is the list of banners, in parts A, B, C …"""
    page = ast.get_docstring(ast.parse(source), clean=False) or ""
    promised = [(int(number), title) for number, title, _ in MAP_LINE.findall(page)]
    kept = [(section.number, section.title) for section in sections(source)[1:]]
    if not kept:
        yield "there is no banner"
    for number, title in sorted(set(promised) - set(kept)):
        yield f"{number}. {title} is on the map, but no banner says so"
    for number, title in sorted(set(kept) - set(promised)):
        yield f"{number}. {title} is a banner, but not on the map"
    if [number for number, _ in kept] != list(range(1, len(kept) + 1)):
        yield f"banners are not numbered in order: {[number for number, _ in kept]}"
    if promised != sorted(promised):
        yield "the map is not in order"
    yield from check_parts(page)
    yield from check_part_banners(page, source)
    for line in BANNER_LIKE.findall(source):
        good = BANNER.fullmatch(line) or PART_BANNER.fullmatch(line)
        if not good or len(line) != BANNER_WIDTH:
            yield f"not a banner padded to column {BANNER_WIDTH}: {line!r}"


def check_parts(page: str) -> Iterator[str]:
    """Parts are lettered in order, before the first section, and none is empty."""
    lines = [line for line in page.splitlines() if MAP_PART.match(line) or MAP_LINE.match(line)]
    letters = [line.strip()[0] for line in lines if MAP_PART.match(line)]
    if letters != [chr(ord("A") + place) for place in range(len(letters))] or not letters:
        yield f"parts are not lettered in order: {letters}"
    if lines and not MAP_PART.match(lines[0]):
        yield "the map does not begin with a part"
    for line, after in zip(lines, [*lines[1:], "A  end"]):
        if MAP_PART.match(line) and MAP_PART.match(after):
            yield f"the part {line.strip()!r} has no section"
    for line in lines:
        found = MAP_LINE.match(line)
        if found and not found[3]:
            yield f"the map says nothing about {found[2]}"


def check_part_banners(page: str, source: str) -> Iterator[str]:
    """Parts have banners, all of them or none, right above the section that the map says."""
    found = re.findall(rf"{PART_BANNER.pattern}\n(?:{BANNER.pattern})?", source, re.MULTILINE)
    lines = [line for line in page.splitlines() if MAP_PART.match(line) or MAP_LINE.match(line)]
    firsts = [MAP_LINE.match(line) for line in lines[1:]]
    promised = [
        (*part.groups(), first[1])
        for part, first in zip(map(MAP_PART.match, lines), firsts)
        if part and first
    ]
    if found and [(letter, title, number) for letter, title, number, _ in found] != promised:
        yield f"the banners of parts are {found}, the map has {promised}"


# ---- Only names from above -------------------------------------------------------------------


def bound_at_module(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Every name that a statement of the module binds, with that statement."""
    for statement in tree.body:
        for name in bound_by(statement):
            yield name, statement


def bound_by(node: ast.AST) -> Iterator[str]:
    """The names that `node` binds in its own scope, nested scopes left out."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        for alias in node.names:
            yield alias.asname or alias.name.split(".")[0]
    elif isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
        yield node.id
    elif not isinstance(node, ast.Lambda):
        if isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name
        for child in ast.iter_child_nodes(node):
            # In 3.8 grammar a comprehension's own variables end with it; `:=` inside leaks out.
            if isinstance(node, COMPREHENSIONS) and isinstance(child, ast.comprehension):
                yield from bound_by(child.iter)
            else:
                yield from bound_by(child)


def own_names(scope: Scope) -> set[str]:
    """Arguments and other names bound in the body of a function, lambda or class."""
    names: set[str] = set()
    if not isinstance(scope, ast.ClassDef):
        spec = scope.args
        every = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
        names.update(argument.arg for argument in every if argument)
    for statement in scope.body if isinstance(scope.body, list) else [scope.body]:
        names.update(bound_by(statement))
    return names


def uses(node: ast.AST, hidden: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Every name that `node` looks up outside `hidden`, annotations (also quoted) included."""
    if isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Load) and node.id not in hidden:
            yield node
    elif isinstance(node, (*FUNCTIONS, ast.Lambda, ast.ClassDef)):
        yield from uses_of_scope(node, hidden)
    else:
        if isinstance(node, COMPREHENSIONS):
            hidden |= {name for part in node.generators for name in bound_by(part.target)}
        for field, child in fields(node):
            yield from quoted(child, hidden) if field == "annotation" else uses(child, hidden)


def uses_of_scope(
    scope: Scope, hidden: frozenset[str], around: frozenset[str] | None = None
) -> Iterator[ast.Name]:
    """The body sees its own names; decorators, defaults, bases, annotations what is `around`."""
    around = hidden if around is None else around
    inner = hidden | own_names(scope)
    for field, child in fields(scope):
        if field == "returns":
            yield from quoted(child, around)
        elif field != "body":
            yield from uses(child, around)
        elif isinstance(scope, ast.ClassDef) and isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            # What a class body binds is seen beside a method's `def`, not inside the method.
            yield from uses_of_scope(child, hidden, inner)
        else:
            yield from uses(child, inner)


def fields(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield field, child


def quoted(annotation: ast.AST, hidden: frozenset[str]) -> Iterator[ast.Name]:
    """The names in an annotation, those inside its strings too."""
    yield from uses(annotation, hidden)
    for node in ast.walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                inside = ast.parse(node.value, mode="eval")
            except SyntaxError:
                continue  # a Literal's value
            for name in uses(inside, hidden):
                name.lineno = node.lineno
                yield name


def check_order(source: str) -> Iterator[str]:
    """A section uses module-level names of itself and of the sections above it only."""
    tree, find = ast.parse(source), section_of(source)
    home: dict[str, Section] = {}
    for name, statement in bound_at_module(tree):
        home.setdefault(name, find(statement))
    for statement in tree.body:
        here = find(statement)
        for use in uses(statement):
            there = home.get(use.id)
            if there and there.number > here.number and use.id not in USED_LATE:
                yield f"line {use.lineno}: {here.title} uses {use.id} of {there.title} below it"


def check_known(source: str) -> Iterator[str]:
    """Every name that is looked up exists: else the check above would be blind to it."""
    tree = ast.parse(source)
    known = {name for name, _ in bound_at_module(tree)} | set(dir(builtins))
    known |= {"__file__", "__name__"}
    for use in uses(tree):
        if use.id not in known:
            yield f"line {use.lineno}: {use.id} is not a name of the module"


# ---- Pure above the transport ----------------------------------------------------------------


def check_pure(source: str) -> Iterator[str]:
    """Above the transport nothing awaits, opens a socket, reads a clock or rolls a die."""
    tree, find = ast.parse(source), section_of(source)
    limit = [section.number for section in sections(source) if section.title == FIRST_IMPURE]
    if not limit:
        yield f"there is no section {FIRST_IMPURE!r}"
        return
    for statement in tree.body:
        if not 0 < find(statement).number < limit[0]:
            continue
        for node in ast.walk(statement):
            if why := impurity(node):
                yield f"line {node.lineno}: {find(statement).title} {why}"  # type: ignore[attr-defined]
    yield from check_pure_imports(tree)


def impurity(node: ast.AST) -> str:
    """What `node` does that a pure section must not, or nothing."""
    if isinstance(node, (ast.Await, ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith)):
        return "awaits"
    if isinstance(node, ast.comprehension) and node.is_async:
        return "awaits"
    if isinstance(node, ast.Name) and node.id in IMPURE_MODULES:
        return f"uses {node.id}"
    if isinstance(node, ast.Attribute) and dotted(node) in CLOCKS:
        return f"uses {dotted(node)}"
    if (
        isinstance(node, ast.Call)
        and not node.args
        and dotted(node.func) in CLOCKS_WITHOUT_ARGUMENT
    ):
        return f"reads the clock with {dotted(node.func)}"
    return ""


def dotted(node: ast.AST) -> str:
    """`a.b.c` as "b.c": the last two words."""
    if not isinstance(node, ast.Attribute):
        return ""
    base = node.value
    before = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "?")
    return f"{before}.{node.attr}"


def check_pure_imports(tree: ast.Module) -> Iterator[str]:
    """No clock, socket or die under a name that the check above does not know."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in CLOCKS or node.module in IMPURE_MODULES:
                    yield f"line {node.lineno}: import {node.module} itself, not {alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname and alias.name in IMPURE_MODULES | {"time", "os", "datetime"}:
                    yield f"line {node.lineno}: {alias.name} is imported as {alias.asname}"


# ---- Sizes -----------------------------------------------------------------------------------


def length(node: Any) -> int:
    """Lines from `def` or `class` to the end, the decorators left out."""
    return int(node.end_lineno - node.lineno + 1)


def depth(node: ast.AST) -> int:
    """How deep blocks stand in one another; `elif` is no deeper than its `if`."""
    deepest = 0
    for field, child in fields(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            continue
        chained = isinstance(node, ast.If) and field == "orelse" and is_elif(node)
        own = 1 if isinstance(child, BLOCKS) and not chained else 0
        deepest = max(deepest, own + depth(child))
    return deepest


def is_elif(node: ast.If) -> bool:
    only = node.orelse[0] if len(node.orelse) == 1 else None
    return isinstance(only, ast.If) and only.col_offset == node.col_offset


def check_functions(source: str) -> Iterator[str]:
    """Functions fit on a screen, most of them on a card, and do not nest without end."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS)]
    for node in functions:
        if length(node) >= FUNCTION_LINES:
            yield f"line {node.lineno}: {node.name} has {length(node)} lines"
        if depth(node) > NESTING:
            yield f"line {node.lineno}: {node.name} nests {depth(node)} deep"
    lengths = sorted(map(length, functions)) or [0]
    if (median := statistics.median(lengths)) > FUNCTION_LINES_MEDIAN:
        yield f"the median function has {median} lines"
    long = [lines for lines in lengths if lines >= FUNCTION_LINES_95]
    if len(long) > len(lengths) * 0.05:
        yield f"{len(long)} of {len(lengths)} functions have {FUNCTION_LINES_95} lines or more"


def check_classes(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and length(node) > CLASS_LINES:
            yield f"line {node.lineno}: class {node.name} has {length(node)} lines"


def check_sections(source: str) -> Iterator[str]:
    """Each section has its promise under the banner, and keeps to its budget."""
    lines = source.splitlines()
    for section in sections(source):
        budget = min(BUDGET.get(section.title, 0), SECTION_LINES)
        text = "\n".join(lines[section.first - 1 : section.last]).rstrip()
        if (count := len(text.splitlines())) > budget:
            yield f"{section.title} has {count} lines, its budget is {budget}"
        if section.number and not lines[section.first].startswith("# "):
            yield f"{section.title} says nothing under its banner"
    if len(lines) > FILE_LINES:
        yield f"the file has {len(lines)} lines"


def test_the_budgets_fit_the_file():
    assert sum(BUDGET.values()) <= FILE_LINES
    assert max(BUDGET.values()) <= SECTION_LINES


# ---- What it may import and bind -------------------------------------------------------------


def check_imports(source: str) -> Iterator[str]:
    """The standard library alone, and what POSIX alone has not while being imported itself."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for module in imported_by(node):
            if module not in STDLIB | OPTIONAL_MODULES:
                yield f"imports {module}, which is not in the standard library"
    for statement in tree.body:
        for module in imported_by(statement):
            if module in POSIX_MODULES | OPTIONAL_MODULES | {"tomllib"}:
                yield f"line {statement.lineno}: not every machine can import {module}"


def imported_by(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(node.module or ".").split(".")[0]]
    return []


def check_bindings(source: str) -> Iterator[str]:
    """No name of the module is bound twice or rebound from a function; either-or counts once."""
    tree = ast.parse(source)
    home: dict[str, ast.stmt] = {}
    for name, statement in bound_at_module(tree):
        if home.setdefault(name, statement) is not statement:
            yield f"line {statement.lineno}: {name} is bound again"
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"line {node.lineno}: global {', '.join(node.names)}"
    for statement in tree.body:
        if isinstance(statement, (ast.AugAssign, ast.For, ast.While, ast.With, ast.Delete)):
            yield f"line {statement.lineno}: import-time work"


def check_grammar(source: str) -> Iterator[str]:
    """The oldest Python can read the file far enough to say that it is too old."""
    try:
        ast.parse(source, feature_version=OLDEST_GRAMMAR)
    except SyntaxError as error:
        yield f"line {error.lineno}: {error.msg}"


CHECKS = [
    check_map,
    check_order,
    check_known,
    check_pure,
    check_functions,
    check_classes,
    check_sections,
    check_imports,
    check_bindings,
    check_grammar,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_llmq_keeps_its_shape(check: Callable[[str], Iterator[str]]):
    assert not list(check(read()))


# ---- The checks themselves: each is shown a file that breaks its rule -------------------------


def banner(number: int, title: str) -> str:
    return f"# ==== {number}. {title} ".ljust(BANNER_WIDTH, "=")


def example(
    first: str = "", second: str = "", last: str = "", page: str = "", imports: str = ""
) -> str:
    """A file in the shape of llmq.py with three sections, and these lines in them."""
    page = page or "A  Words\n  1. Errors     what goes wrong\n  2. Tools      small things\n"
    page += "\nB  HTTP\n  3. Streams  the first await\n"
    sort_of = "class Error(Exception):\n    pass\n"
    return "\n".join(
        [
            f'"""A thing.\n\n{page}"""\n',
            "from __future__ import annotations\n\nimport asyncio\nimport os\nimport time",
            imports,
            banner(1, "Errors"),
            f"# What goes wrong.\n{sort_of}{first}\n",
            banner(2, "Tools"),
            f"# Small things.\ndef tool(now: float) -> float:\n    return now\n{second}\n",
            banner(3, "Streams"),
            "# The first await.\nasync def serve() -> Error:\n    await asyncio.sleep(tool(1))",
            f"    return Error()\n{last}\n",
        ]
    )


def function(body: str, head: str = "def f(x):") -> str:
    return "\n".join([head, *("    " + line for line in body.splitlines())])


def nested(levels: int) -> str:
    lines = ["    " * level + "if x:" for level in range(levels)]
    return function("\n".join([*lines, "    " * levels + "return x"]))


def parted(source: str, first: str, last: str) -> str:
    """The same with banners of parts above sections 1 and 3."""
    for title, number in ((first, 1), (last, 3)):
        line = f"# ==== {title} ".ljust(BANNER_WIDTH, "=") + "\n" if title else ""
        source = source.replace(f"# ==== {number}.", f"{line}# ==== {number}.")
    return source


ELSE_IFS = function("if x:\n    return 1\n" + "elif x:\n    return 2\n" * 6)
SHORT = "\n".join(f"def short_{number}():\n    return {number}" for number in range(30))
ALLOWED = [
    example(),
    example(second="def use() -> Error:\n    return Error()"),
    example(first="def f(tool):\n    return tool"),
    example(first="def f():\n    tool = 1\n    return [serve for serve in tool]"),
    example(first="def f():\n    return PAGE", last="PAGE = ''"),
    example(first="class A:\n    tool: int = 1\n    other: int = tool"),
    example(first="def f(x):\n    return time.gmtime(x), x.time, x.sleep"),
    example(first="def f():\n    import resource\n    return resource"),
    example(first="try:\n    import tomllib\nexcept ImportError:\n    tomllib = None"),
    example(last=SHORT + "\n" + function("x = 1\n" * (FUNCTION_LINES - 2))),
    example(second=nested(NESTING)),
    example(second=ELSE_IFS),
    example(first="class A:\n    tool = 1\n    @tool.setter\n    def f(self):\n        return 2"),
    parted(example(), "A  Words", "B  HTTP"),
    example(last="if __name__ == '__main__':\n    tool(1)"),
]
PLANTED = [
    (check_map, parted(example(), "A  Words", "B  Http"), "banners of parts"),
    (check_map, parted(example(), "A  Words", ""), "banners of parts"),
    (check_map, parted(example(), "A  Words", "B  HTTP " + "=" * 99), "padded to column"),
    (check_map, example(page="A  Words\n  1. Errors  what\n"), "2. Tools is a banner"),
    (check_map, example(last=banner(4, "More")), "4. More is a banner"),
    (check_map, example(last=banner(3, "Streams")), "not numbered in order"),
    (check_map, example(last="# ==== 4. Short ===="), "padded to column 100"),
    (check_map, example(last="# === Odd " + "=" * 40), "padded to column 100"),
    (check_map, example(page="A  Words\n  1. Errors\n  2. Tools  x\n"), "nothing about Errors"),
    (check_map, example(page="A  Words\n  1. Errors  x\n  2. Tool  y\n"), "no banner says so"),
    (check_map, example(page="A  Words\nB  Not\n  1. Errors  x\n  2. Tools  y\n"), "no section"),
    (check_map, example(page="  1. Errors  x\n  2. Tools  y\n"), "begin with a part"),
    (check_map, example(page="B  Words\n  1. Errors  x\n  2. Tools  y\n"), "lettered in order"),
    (check_map, "'''Nothing.'''\n", "no banner"),
    (check_order, example(first="def f():\n    return tool(1)"), "Errors uses tool of Tools"),
    (check_order, example(first="def f(x: serve):\n    return x"), "uses serve of Streams"),
    (check_order, example(first="def f(x: 'list[serve]'):\n    return x"), "uses serve"),
    (check_order, example(first="def f() -> 'serve':\n    return 1"), "uses serve"),
    (check_order, example(first="class A:\n    x: serve"), "uses serve"),
    (check_order, example(first="def f(x=tool):\n    return x"), "uses tool"),
    (check_order, example(first="@tool\ndef f():\n    return 1"), "uses tool"),
    (check_order, example(first="X = [lambda: tool]"), "uses tool"),
    (
        check_order,
        example(first="class A:\n    tool = 1\n    def f(self):\n        return tool"),
        "uses tool",
    ),
    (check_order, example(first="def f():\n    return LATE", last="LATE = 1"), "uses LATE"),
    (check_known, example(first="def f():\n    return missing"), "missing is not a name"),
    (check_pure, example(second="async def f():\n    return 1"), "Tools awaits"),
    (check_pure, example(second="def f():\n    return asyncio.Event()"), "uses asyncio"),
    (check_pure, example(second="def f():\n    return time.time()"), "uses time.time"),
    (check_pure, example(second="X = time.monotonic"), "uses time.monotonic"),
    (check_pure, example(second="def f(loop):\n    return loop.time()"), "uses loop.time"),
    (check_pure, example(second="def f(self):\n    return self.loop.time()"), "uses loop.time"),
    (check_pure, example(second="def f():\n    return os.urandom(8)"), "uses os.urandom"),
    (check_pure, example(second="def f():\n    return time.localtime()"), "reads the clock"),
    (check_pure, example(second="def f():\n    return datetime.now()"), "uses datetime.now"),
    (check_pure, example(imports="import random", second="X = random.random"), "uses random"),
    (check_pure, example(imports="from time import monotonic"), "import time itself"),
    (check_pure, example(imports="import time as t"), "imported as t"),
    (check_pure, example().replace("3. Streams ", "3. Strains "), "no section 'Streams'"),
    (check_functions, example(second=function("x = 1\n" * 59)), "f has 60 lines"),
    (check_functions, example(second=nested(NESTING + 1)), "f nests 5 deep"),
    (check_functions, example(second=function("x = 1\n" * 49)), "1 of 3 functions have 50"),
    (
        check_functions,
        example(second="\n".join(function("x = 1\n" * 20) for _ in range(4))),
        "median function has 21",
    ),
    (check_classes, example(second="class Big:\n" + "    x = 1\n" * 300), "Big has 301 lines"),
    (check_sections, example(second="# more\n" * 110), "Tools has 114 lines"),
    (check_sections, example().replace("2. Tools ", "2. Odds  "), "its budget is 0"),
    (check_sections, example().replace("# Small things.\n", ""), "Tools says nothing"),
    (check_sections, "# more\n" * (FILE_LINES + 1), "the file has"),
    (check_imports, example(imports="import requests"), "imports requests"),
    (check_imports, example(second="def f():\n    import uvloop.loop"), "imports uvloop"),
    (check_imports, example(second="from . import fakes"), "not in the standard library"),
    (check_imports, example(imports="import resource"), "not every machine"),
    (check_imports, example(imports="from fcntl import flock"), "not every machine"),
    (check_imports, example(imports="import tomllib"), "not every machine"),
    (check_bindings, example(first="X = 1", last="X = 2"), "X is bound again"),
    (check_bindings, example(last="def tool():\n    return 1"), "tool is bound again"),
    (check_bindings, example(last="def f():\n    global tool\n    tool = 1"), "global tool"),
    (check_bindings, example(last="X = 1\nX += 1"), "import-time work"),
    (check_bindings, example(last="for x in range(3):\n    print(x)"), "import-time work"),
    (
        check_grammar,
        example(last="def f(x):\n    match x:\n        case 1:\n            pass"),
        "line",
    ),
]


@pytest.mark.parametrize("source", ALLOWED, ids=range(len(ALLOWED)))
def test_what_the_rules_allow_passes_every_check(source: str):
    ast.parse(source)
    assert not [problem for check in CHECKS for problem in check(source)]


@pytest.mark.parametrize(("check", "source", "word"), PLANTED, ids=[row[2] for row in PLANTED])
def test_a_planted_violation_is_found(
    check: Callable[[str], Iterator[str]], source: str, word: str
):
    problems = list(check(source))
    assert any(word in problem for problem in problems), problems


def test_every_check_has_a_planted_violation():
    assert {check for check, _, _ in PLANTED} == set(CHECKS)


# ---- Around llmq.py --------------------------------------------------------------------------


def sleeps(source: str) -> list[int]:
    """The lines that call something named `sleep`, `fakes.eventually` left out."""
    tree = ast.parse(source)
    allowed: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef) and node.name == "eventually":
            allowed.update(ast.walk(node))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node not in allowed]
    return [
        c.lineno for c in calls if getattr(c.func, "attr", getattr(c.func, "id", "")) == "sleep"
    ]


def test_no_test_sleeps_to_see_whether_something_happened():
    files = [*(ROOT / "tests").glob("*.py"), *(ROOT / "tests" / "real").glob("*.py")]
    texts = {path.name: path.read_text(encoding="utf-8") for path in files}
    slept = {name: sleeps(text) for name, text in texts.items() if "sleep" in text}
    assert not {name: lines for name, lines in slept.items() if lines}


def test_a_planted_sleep_is_found():
    source = "import time\ntime.sleep(1)\nasync def f():\n    await asyncio.sleep(0)\nsleep(2)\n"
    assert sorted(sleeps(source)) == [2, 4, 5]
    assert not sleeps("async def eventually():\n    await asyncio.sleep(0)\n")


def kept_files() -> list[str]:
    """What git keeps or would keep, from the top of the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    need(done.returncode == 0, "this is not a git clone")
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def test_the_top_of_the_repository_is_what_the_design_names():
    top = {name.split("/")[0] for name in kept_files()}
    assert not {name for name in top if not name.startswith(".")} - TOP_LEVEL


def test_each_test_file_says_in_one_line_what_it_checks():
    for path in (ROOT / "tests").glob("*.py"):
        beginning = path.read_text(encoding="utf-8").partition("\nfrom ")[0]
        said = ast.get_docstring(ast.parse(beginning)) or ""
        assert said.split("\n\n")[0].count("\n") == 0, path.name
        assert said, path.name


def test_no_two_tests_of_a_file_share_a_name():
    for path in (ROOT / "tests").glob("test_*.py"):
        found = re.findall(r"^(?:async )?def (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        names = Counter(found)
        assert not [name for name, count in names.items() if count > 1], path.name
