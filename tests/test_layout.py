"""The layout of the shipped code: how much there is, who may import what, what no file may do."""

import ast
from collections.abc import Iterable
from dataclasses import fields
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from gpt12.settings import BenchConfig, SampleConfig, TrainConfig
from tests.helpers import ROOT

FOLDERS = ("gpt12", "data")
# A house that one can walk through: files in gpt12/, imports between files, floors; and the nodes
# of the syntax trees without docstrings, which long lines and short names do not change.
MOST_FILES = 26
MOST_IMPORTS = 160
LONGEST_CHAIN = 9
MOST_NODES = 63_500
MOST_NODES_OF_TESTS = 92_000


def python_files(*patterns: str) -> list[Path]:
    """Return the files that a pattern matches, without what users prepare, train and install."""
    files = [file for pattern in patterns for file in sorted(ROOT.glob(pattern))]
    return [file for file in files if "cache" not in file.relative_to(ROOT).parts]


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SHIPPED = python_files("*.py", "gpt12/**/*.py", "data/**/*.py")  # presets are something else
TREES = {module_name(file): ast.parse(file.read_text("utf-8")) for file in SHIPPED}


def imported_modules(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the full names of the modules that are imported, `a.b` for `from a import b` too."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found.add(str(node.module))
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


# What each file imports, inside functions too; and what of it is ours. The packages are empty.
IMPORTS = {name: imported_modules(ast.walk(tree)) for name, tree in TREES.items()}
OURS = {name: IMPORTS[name] & TREES.keys() - {name, *FOLDERS} for name in TREES}


def nodes_of(files: list[Path]) -> int:
    """Return the number of nodes in the files' syntax trees without docstrings."""
    count = 0
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            count += 1
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                count -= 2 * (ast.get_docstring(node) is not None)
    return count


def test_the_code_is_small():
    assert nodes_of(SHIPPED + python_files("config/**/*.py")) <= MOST_NODES
    assert nodes_of(python_files("tests/**/*.py")) <= MOST_NODES_OF_TESTS
    assert sum(name.startswith("gpt12.") for name in TREES) <= MOST_FILES
    assert max(len(file.read_text("utf-8").splitlines()) for file in SHIPPED) <= 650


def test_imports_form_no_cycle_and_no_long_chain():
    floors: dict[str, int] = {}
    for name in TopologicalSorter(OURS).static_order():  # CycleError names a cycle
        floors[name] = 1 + max((floors[below] for below in OURS[name]), default=0)
    assert max(floors.values()) <= LONGEST_CHAIN
    assert sum(map(len, OURS.values())) <= MOST_IMPORTS


def test_each_part_imports_only_what_it_may():
    """model.py explains itself, data/ is a program of its own, and scripts build on gpt12/."""
    assert OURS["model"] <= {"gpt12.loss", "gpt12.errors", "gpt12.recompute"}
    others = {module.split(".")[0] for module in IMPORTS["model"]} - {"gpt12"}
    assert others <= {"torch", "__future__", "dataclasses", "functools", "math", "typing"}
    for name, modules in OURS.items():
        if name.startswith("data."):
            outside = {module for module in modules if not module.startswith("data.")}
            assert outside <= {"gpt12.errors", "gpt12.files"}, name
        if name.startswith("gpt12."):
            assert not modules & {"sample", "bench"}, name
    for folder in FOLDERS:
        assert all(isinstance(node, ast.Expr) for node in TREES[folder].body), "not empty"


@pytest.mark.parametrize("settings", [TrainConfig, SampleConfig, BenchConfig])
def test_every_key_is_read_somewhere(settings):
    """A key in settings.py alone would be accepted and change nothing."""
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert {field.name for field in fields(settings)} <= read


HEAVY = {"datasets", "wandb", "matplotlib", "transformers", "torchao", "torch._dynamo", "peft"}
# What may stand at a file's top level. Besides it: the settings that must be made before torch is
# imported, Triton where it is installed, and a prepare.py's path to the repository.
DEFINITIONS = (
    *(ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef),
    ast.Assign,
    ast.AnnAssign,
)
ALLOWED = {
    "os.environ.setdefault('PYTORCH_ALLOC_CONF', 'expandable_segments:True')",
    "require_packages()",  # names a missing package before anything imports it
}


def runs_at_import(node: ast.AST) -> bool:
    """Tell whether a statement at the top level does more than define something."""
    if isinstance(node, DEFINITIONS) or ast.unparse(node) in ALLOWED:
        return False
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)  # a docstring
    if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
        return False
    # A definition under a condition, as of the Triton kernel, or an optional library.
    if isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
        parts = [part for part in ast.iter_child_nodes(node) if not isinstance(part, ast.expr)]
        return any(runs_at_import(part) for part in parts)
    return True


def at_import(tree: ast.AST) -> Iterable[ast.AST]:
    """Return the nodes outside of functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef):
            yield node
            yield from at_import(node)


def test_importing_a_file_runs_nothing_and_loads_no_heavy_library():
    for name, tree in TREES.items():
        assert [ast.unparse(node)[:80] for node in tree.body if runs_at_import(node)] == [], name
        loaded = imported_modules(at_import(tree))
        assert not {module for module in loaded if HEAVY & {module, module.split(".")[0]}}, name


FORBIDDEN = [
    "TYPE_CHECKING",  # an import for a type alone is an import, too
    "__wrapped__",
    "object.__new__",
    "_compiled_call_impl",
    "os._exit",
    "gc.disable",
    "set_wakeup_fd",
    "inspect.getsource",
    "_step_supports_amp_scaling",
    "torch.nn.init.normal_ =",
    "setattr(torch",
]


def replaced_in_libraries(name: str) -> list[str]:
    """Return the attributes of imported libraries that a file assigns to."""
    libraries = {module.split(".")[0] for module in IMPORTS[name]} - TREES.keys()
    allowed = ("torch.backends.", "sys.stdout", "sys.argv")
    found = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            words = ast.unparse(node)
            if words.split(".")[0] in libraries and not words.startswith(allowed):
                found.append(words)
    return found


def test_no_file_contains_a_hack_or_patches_a_library():
    """Assigning to an attribute of a library changes it for everybody who uses it."""
    for file in SHIPPED:
        text = file.read_text("utf-8")
        name = module_name(file)
        assert [word for word in FORBIDDEN if word in text] == [], name
        assert replaced_in_libraries(name) == [], name


def test_every_mutant_breaks_a_line_that_is_there_and_names_a_test_that_is_there():
    """tests/manual/mutants.py takes an hour, so a renamed line would be noticed late."""
    from tests.manual.mutants import problems_of, read_mutants

    for mutant in read_mutants():
        assert problems_of(mutant) == []
        file, _, test = mutant.test.partition("::")
        assert not test or f"def {test}(" in (ROOT / file).read_text("utf-8")
