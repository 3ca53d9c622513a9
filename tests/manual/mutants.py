"""Break the program in one place after another and see that its tests notice:

    python -m tests.manual.mutants                      # all of tests/manual/mutants.txt
    python -m tests.manual.mutants --only=12            # one, by its number
    python -m tests.manual.mutants --only="causal mask" # those whose description holds this text
    python -m tests.manual.mutants --part=2/3           # the second third

The working tree is copied into a temporary folder. First the named tests run unchanged and have to
pass. Then each mutant's line is changed, its tests run, and the line is put back. A mutant is
killed if a test fails, and survives if all pass.

Exit status 0 if every mutant was killed. 1 if one survived, if its tests could not be run, or if
its line is not in its file exactly once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.helpers import ROOT, options_parser

LIMIT_SECONDS = 600  # for one mutant's tests: a mutant may make a program wait forever
RESULTS = {0: "survived", 1: "killed"}  # pytest's exit status; others mean that no test ran


class Mutant(NamedTuple):
    """A change of one line, and the test that has to notice it."""

    broken: str  # what is broken, in plain words
    file: str
    before: str  # the line's code, without its indentation and without a comment at its end
    after: str
    test: str  # a file of tests, or file::test


def read_mutants() -> list[Mutant]:
    """Return the mutants of mutants.txt."""
    mutants = []
    for block in Path(__file__).with_suffix(".txt").read_text("utf-8").split("\n\n"):
        if not block.startswith("#"):
            broken, file, before, after, test = block.splitlines()
            mutants.append(Mutant(broken, file, before[2:], after[2:], test))
    return mutants


def main() -> int:
    options = options_parser(__doc__, only="", part="1/1").parse_args()
    only = options.only.lower()
    part, parts = map(int, options.part.split("/"))
    chosen = {
        number: mutant
        for number, mutant in list(enumerate(read_mutants(), start=1))[part - 1 :: parts]
        if only == str(number) or (not only.isdecimal() and only in mutant.broken.lower())
    }
    problems = [problem for mutant in chosen.values() for problem in problems_of(mutant)]
    if problems or not chosen:
        print("\n".join(problems) or f"no mutant is called {only!r}")
        return 1
    killed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = copy_tree(Path(temporary))
        status, output = run_tests(folder, {mutant.test for mutant in chosen.values()})
        if status != 0:
            print(f"{output}\nthe tests fail without any change")
            return 1
        for number, mutant in chosen.items():
            result, output = try_mutant(folder, mutant)
            print(f"{number:3}  {result:11}  {mutant.file:24}  {mutant.broken}", flush=True)
            if result == "killed":
                killed += 1
            else:
                print(output[-4000:])
    print(f"{killed} of {len(chosen)} mutants were killed")
    return 0 if killed == len(chosen) else 1


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


def run_tests(folder: Path, tests: set[str], limit_s: float | None = None) -> tuple[int, str]:
    """Run tests in a copy of the tree until one fails. Returns pytest's exit status and output."""
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)  # it might name the original tree
    # Python takes a compiled file for current if only the content of the source has changed.
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    options = "-oaddopts= -x -q -p no:cacheprovider".split()
    argv = [sys.executable, "-m", "pytest", *options, *sorted(tests)]
    done = subprocess.run(
        argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit_s
    )
    return done.returncode, done.stdout + done.stderr


def try_mutant(folder: Path, mutant: Mutant) -> tuple[str, str]:
    """Return what became of a mutant, and what pytest printed."""
    file = folder / mutant.file
    original = file.read_text("utf-8")
    lines = []
    for line in original.splitlines():
        if code_of(line) == mutant.before:
            line = line[: len(line) - len(line.lstrip())] + mutant.after
        lines.append(line)
    file.write_text("\n".join(lines) + "\n", "utf-8")
    try:
        status, output = run_tests(folder, {mutant.test}, LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return "did not end", ""
    finally:
        file.write_text(original, "utf-8")
    return RESULTS.get(status, "did not run"), output


if __name__ == "__main__":
    sys.exit(main())
