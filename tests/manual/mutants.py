"""Break the program in one place after another and see that its tests notice:

    python -m tests.manual.mutants                      # all of tests/manual/mutant_list.py
    python -m tests.manual.mutants --only=12            # one, by its number
    python -m tests.manual.mutants --only="causal mask" # those whose description holds this text

The working tree is copied into a temporary folder for each process. First the named tests run
unchanged and have to pass. Then each mutant's line is changed, its tests run, and the line is put
back. A mutant is killed if a test fails, and survives if all pass.

Exit status 0 if every mutant was killed. 1 if one survived, if its tests could not be run, or if
its line is not in its file exactly once.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.helpers import ROOT
from tests.manual.mutant_list import MUTANTS, Mutant

LIMIT_SECONDS = 600  # for one mutant's tests: a mutant may make a program wait forever
RESULTS = {0: "survived", 1: "killed"}  # pytest's exit status; others mean that no test ran


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="a mutant's number, or a part of its description")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    chosen = choose(options.only)
    problems = [problem for mutant in chosen.values() for problem in problems_of(mutant)]
    if not chosen:
        problems.append(f"no mutant is called {options.only!r}")
    if problems:
        print("\n".join(problems))
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        trees: queue.Queue[Path] = queue.Queue()
        for i in range(options.processes):
            trees.put(copy_tree(Path(temporary) / f"tree-{i}"))
        if not tests_pass_unchanged(trees, chosen, options.processes):
            return 1
        return try_all(trees, chosen, options.processes)


def choose(only: str | None) -> dict[int, Mutant]:
    """Return the mutants that were asked for by their number, which counts from 1."""
    numbered = dict(enumerate(MUTANTS, start=1))
    if only is None:
        return numbered
    if only.isdecimal():
        return {n: mutant for n, mutant in numbered.items() if n == int(only)}
    return {n: mutant for n, mutant in numbered.items() if only.lower() in mutant.broken.lower()}


# --------------------------------------------------------------------------------------------------
# The tree


def code_of(line: str) -> str:
    """Return a line without its indentation and without a comment at its end."""
    return line.partition("  # ")[0].strip()


def problems_of(mutant: Mutant) -> list[str]:
    """Return what is wrong with a mutant: its line has to be in its file exactly once."""
    lines = (ROOT / mutant.file).read_text("utf-8").splitlines()
    count = sum(code_of(line) == mutant.before for line in lines)
    if count == 1:
        return []
    return [f"{mutant.file} has the line {mutant.before!r} {count} times: {mutant.broken}"]


def copy_tree(folder: Path) -> Path:
    """Copy the working tree without what git ignores. Returns the folder."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in found.stdout.split("\0"):
        if (ROOT / name).is_file():  # not one that was deleted and is still in the index
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def change_line(text: str, before: str, after: str) -> str:
    """Return the text of a file with the code of one line replaced; its indentation stays."""
    changed = []
    for line in text.splitlines():
        if code_of(line) == before:
            indentation = line[: len(line) - len(line.lstrip())]
            line = indentation + after
        changed.append(line)
    return "\n".join(changed) + "\n"


# --------------------------------------------------------------------------------------------------
# Running


def name_of_test(mutant: Mutant) -> str:
    """Return what pytest is given: a file, or one test of it."""
    if mutant.test:
        return f"tests/{mutant.test_file}::{mutant.test}"
    return f"tests/{mutant.test_file}"


def run_tests(folder: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    """Run tests in a copy of the tree until one fails."""
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)  # it might name the original tree
    # Python takes a compiled file for current if only the content of the source has changed.
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    argv = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(
        argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )


def tests_pass_unchanged(
    trees: queue.Queue[Path], chosen: dict[int, Mutant], processes: int
) -> bool:
    """Run every test that is named, in each process a part of them, and tell whether all pass."""
    names = sorted({name_of_test(mutant) for mutant in chosen.values()})

    def run_part(part: list[str]) -> subprocess.CompletedProcess[str]:
        folder = trees.get()
        try:
            return run_tests(folder, part)
        finally:
            trees.put(folder)

    parts = [names[i::processes] for i in range(min(processes, len(names)))]
    with ThreadPoolExecutor(processes) as pool:
        results = list(pool.map(run_part, parts))
    for done in results:
        if done.returncode != 0:
            print(f"{done.stdout}{done.stderr}\nthe tests fail without any change")
    return all(done.returncode == 0 for done in results)


def try_mutant(trees: queue.Queue[Path], mutant: Mutant) -> tuple[str, str]:
    """Return what became of a mutant, and what pytest printed if it was not killed."""
    folder = trees.get()
    file = folder / mutant.file
    original = file.read_bytes()
    try:
        changed = change_line(original.decode(), mutant.before, mutant.after)
        file.write_bytes(changed.encode())
        done = run_tests(folder, [name_of_test(mutant)])
    except subprocess.TimeoutExpired:
        return "did not end", ""
    finally:
        file.write_bytes(original)
        trees.put(folder)
    result = RESULTS.get(done.returncode, "did not run")
    return result, "" if result == "killed" else done.stdout[-2000:] + done.stderr[-2000:]


def try_all(trees: queue.Queue[Path], chosen: dict[int, Mutant], processes: int) -> int:
    """Try mutants, print a line for each as it is done, and return the exit status."""
    failed = 0
    with ThreadPoolExecutor(processes) as pool:
        numbers = {pool.submit(try_mutant, trees, mutant): n for n, mutant in chosen.items()}
        for future in as_completed(numbers):
            n = numbers[future]
            result, output = future.result()
            print(f"{n:3}  {result:11}  {chosen[n].file:24}  {chosen[n].broken}", flush=True)
            if result != "killed":
                failed += 1
                print(output)
    print(f"{len(chosen) - failed} of {len(chosen)} mutants were killed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
