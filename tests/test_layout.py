"""The layout of the shipped code: who may import what, and what no file may do."""

import ast
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import pytest

from gpt12.settings import BenchConfig, SampleConfig, TrainConfig

ROOT = Path(__file__).parents[1]
SCRIPTS = ["model.py", "train.py", "sample.py", "bench.py"]
FOLDERS = ["gpt12", "data"]
# A house that one can walk through: files in gpt12/, arrows between files, floors.
MOST_FILES = 26
MOST_IMPORTS = 180
LONGEST_CHAIN = 9


def shipped_files() -> list[Path]:
    """Return our scripts and the files of our packages; presets and caches are something else."""
    files = [ROOT / name for name in SCRIPTS]
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if "cache" not in file.relative_to(ROOT).parts:
                files.append(file)
    return files


FILES = shipped_files()
NAMES = [file.relative_to(ROOT).as_posix() for file in FILES]


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


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


def imports_of(file: Path) -> set[str]:
    """Return the modules that a file imports, inside functions too."""
    return imported_modules(ast.walk(parse(file)))


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


OURS = {module_name(file): file for file in FILES}


def imports_of_our_files() -> dict[str, set[str]]:
    """Return which files of ours each file imports. The packages' __init__ are empty."""
    modules = OURS.keys() - set(FOLDERS)
    return {name: imports_of(file) & modules - {name} for name, file in OURS.items()}


def test_imports_form_no_cycle_and_no_long_chain():
    graph = imports_of_our_files()
    floors: dict[str, int] = {}

    def floor_of(name: str, path: tuple[str, ...]) -> int:
        assert name not in path, f"a cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in floors:
            below = [floor_of(other, (*path, name)) for other in sorted(graph[name])]
            floors[name] = 1 + max(below, default=0)
        return floors[name]

    assert max(floor_of(name, ()) for name in sorted(graph)) <= LONGEST_CHAIN
    assert sum(map(len, graph.values())) <= MOST_IMPORTS
    assert sum(name.startswith("gpt12.") for name in graph) <= MOST_FILES


def test_model_py_imports_only_torch_the_loss_the_errors_and_recomputation():
    allowed = {"gpt12.loss", "gpt12.errors", "gpt12.recompute"}
    for module in imports_of(ROOT / "model.py"):
        top = module.split(".")[0]
        if top == "gpt12":
            assert any(f"{module}.".startswith(f"{name}.") for name in allowed), module
        else:
            assert top in {"torch", "__future__", "dataclasses", "functools", "math", "typing"}, (
                module
            )


def test_the_data_pipeline_imports_of_gpt12_only_errors_and_files():
    allowed = {"gpt12.errors", "gpt12.files"}
    for name, modules in imports_of_our_files().items():
        if name.startswith("data."):
            outside = {module for module in modules if not module.startswith("data.")}
            assert outside <= allowed, f"{name} imports {outside - allowed}"


def test_the_technique_files_do_not_import_the_scripts():
    """gpt12/ is what the scripts are built from."""
    for name, modules in imports_of_our_files().items():
        if name.startswith("gpt12."):
            assert not modules & {"sample", "bench"}, name


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_packages_init_is_nearly_empty(folder):
    tree = parse(ROOT / folder / "__init__.py")
    assert all(isinstance(node, ast.Expr) for node in tree.body)  # a docstring at most
    assert len(tree.body) <= 1


@pytest.mark.parametrize("settings", [TrainConfig, SampleConfig, BenchConfig])
def test_every_key_is_read_somewhere(settings):
    """A key in settings.py alone would be accepted and change nothing."""
    nodes = [node for file in FILES for node in ast.walk(parse(file))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert {field.name for field in fields(settings)} <= read


HEAVY = {"datasets", "wandb", "matplotlib", "transformers", "torchao", "torch._dynamo", "peft"}


@pytest.mark.parametrize("name", NAMES)
def test_heavy_libraries_are_imported_only_where_they_are_needed(name):
    tree = parse(ROOT / name)
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            inside |= set(ast.walk(node))
    at_import = imported_modules(node for node in ast.walk(tree) if node not in inside)
    assert not {module for module in at_import if HEAVY & {module, module.split(".")[0]}}


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


@pytest.mark.parametrize("name", NAMES)
def test_only_definitions_imports_and_constants_run_at_import(name):
    for node in parse(ROOT / name).body:
        assert not runs_at_import(node), f"line {node.lineno}: {ast.unparse(node)[:80]}"


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


@pytest.mark.parametrize("name", NAMES)
def test_no_file_contains_a_forbidden_hack(name):
    text = (ROOT / name).read_text("utf-8")
    assert [word for word in FORBIDDEN if word in text] == []


@pytest.mark.parametrize("name", NAMES)
def test_no_file_assigns_to_an_attribute_of_an_imported_library(name):
    """Patching a library changes it for everybody who uses it."""
    tree = parse(ROOT / name)
    libraries = {module.split(".")[0] for module in imports_of(ROOT / name)} - set(OURS)
    allowed = ("torch.backends.", "sys.stdout", "sys.argv")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            words = ast.unparse(node)
            replaced = words.split(".")[0] in libraries and not words.startswith(allowed)
            assert not replaced, f"line {node.lineno}: {words} is replaced"


@pytest.mark.parametrize("name", NAMES)
def test_files_are_short_enough_to_read_in_one_sitting(name):
    assert len((ROOT / name).read_text("utf-8").splitlines()) <= 650


def test_every_mutant_breaks_a_line_that_is_there_and_names_a_test_that_is_there():
    """tests/manual/mutants.py takes an hour, so a renamed line would be noticed late."""
    from tests.manual.mutants import problems_of, read_mutants

    for mutant in read_mutants():
        assert problems_of(mutant) == []
        file, _, test = mutant.test.partition("::")
        assert not test or f"def {test}(" in (ROOT / file).read_text("utf-8")
