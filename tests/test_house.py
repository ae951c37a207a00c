"""Import rules, and the size of functions."""

import ast

from helpers import ROOT

TOP = {path.stem: path for path in ROOT.glob("*.py")}
ENGINE = {path.stem: path for path in ROOT.glob("engine/*.py")}
FLOORS = [
    "swin",
    "vit",
    "twins",
    "encoders",
    "model",
    "layouts",
    "weights",
    "show",
    "train",
    "finetune",
    "segment",
    "bench",
]  # each imports from below only


def imported(path):
    """Names of the project's files that a file imports; `engine` for any of the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        yield from {name.split(".")[0] for name in names} & {*TOP, "engine"}


def test_the_laws_of_imports():
    assert not {*imported(TOP["mixing"]), *imported(TOP["swin"])}
    assert {*imported(TOP["vit"]), *imported(TOP["twins"])} == {"swin"}
    assert {name for path in ENGINE.values() for name in imported(path)} <= {"engine"}
    assert set(TOP) == {"mixing", *FLOORS}
    for number, name in enumerate(FLOORS):
        assert set(imported(TOP[name])) <= {"engine", "mixing", *FLOORS[:number]}, name
    for name in ("model", "train", "finetune", "segment", "bench", "show"):
        assert not {"swin", "vit", "twins"} & set(imported(TOP[name])), (
            f"{name} must reach encoders through encoders.py"
        )


def test_the_engine_imports_in_one_direction():
    below = {
        name: {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module == "engine"
            for alias in node.names
        }
        | {
            node.module.split(".")[1]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module.startswith("engine.")
        }
        for name, path in ENGINE.items()
    }
    while below:
        free = {name for name, needs in below.items() if not needs & set(below)}
        assert free, f"a circle among {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in free}


def test_the_engine_has_never_heard_of_the_method():
    for path in [*ENGINE.values()]:
        assert not {
            word for word in ("eesmm", "greenmim", "simmim", "swin", "superpos") if word in path.read_text().lower()
        }, path


def test_functions_stay_readable():
    for path in [*TOP.values(), *ENGINE.values(), *ROOT.glob("tests/*.py"), *ROOT.glob("experiments/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 60, (
                    f"{path}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
                )
