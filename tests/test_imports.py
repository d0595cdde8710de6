"""Which part of the project imports which, against the map in BUILD.md."""

import ast
import re

from helpers import ROOT

# The public names of the package.
WITHOUT_PLACE = {"fpnas_keras/__init__.py", "export/__init__.py"}


def parts():
    """The files and folders of the map, from its top."""
    text = (ROOT / "BUILD.md").read_text()
    rows = re.findall(r"^\| (`.*?`) \|", text[text.index("| part |") :], re.MULTILINE)
    every = []
    for row in rows:
        names = re.findall(r"`(.*?)`", row)
        folder = names[0].split("/")[0]
        every += [names[0], *(f"{folder}/{name}" for name in names[1:])]
        if every[-1] == "benchmarks/":
            return every
    raise AssertionError("the map has no end")


def imported(file):
    """The modules of the project that a file imports, but for those inside functions."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def place(path, every):
    """Index of the part that a path, as `fpnas_keras/cost/count`, belongs to."""
    for index, part in enumerate(every):
        if f"{path}/".startswith(f"{part.removesuffix('.py').removesuffix('/')}/"):
            return index
    return None


def test_each_part_imports_what_stands_above_it():
    every = parts()
    checked = 0
    for file in sorted([*ROOT.glob("fpnas_keras/**/*.py"), *ROOT.glob("export/*.py")]):
        name = file.relative_to(ROOT).as_posix()
        if name in WITHOUT_PLACE:
            continue
        own = place(name.removesuffix(".py"), every)
        assert own is not None, f"{name} is not in BUILD.md"
        for module in imported(file):
            path = module.replace(".", "/")
            # A module, or a name of it.
            found = place(path, every)
            found = place(path.rpartition("/")[0], every) if found is None else found
            if found is not None:
                assert found <= own, f"{name} imports {module}"
                checked += found < own
    assert checked > 90
