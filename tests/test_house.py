"""Import rules, and the size of the code in tokens."""

import ast
import io
import tokenize

from helpers import ROOT

# Each of these imports only from the names before it in the list, besides `mixing`, `engine` and `images`.
ORDER = [
    "plan",
    "backbone",
    "swin",
    "encoders.vit",
    "encoders.twins",
    "encoders",
    "model",
    "encoders.layouts",
    "weights",
]
ORDER += ["show", "train", "predict", "finetune", "segment", "bench"]
PACKAGES = ("engine", "images", "encoders")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in ROOT.glob(f"{package}/*.py"))]
}
CORE = ("mixing", "plan", "backbone", "swin", "model", "train")
CORE_TOKENS, ALL_TOKENS = 14_820, 93_480  # later changes raise these in a commit of their own


def imports(name: str) -> set[str]:
    """The project's modules that a module imports, by their dotted names."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in MODULES}
            found |= (
                {node.module} if any(f"{node.module}.{alias.name}" not in MODULES for alias in node.names) else set()
            )
    return found & set(MODULES)


def package(name: str) -> str:
    return name.split(".")[0]


def test_import_rules():
    assert set(MODULES) == {"mixing", *ORDER} | {name for name in MODULES if package(name) in ("engine", "images")}
    assert not imports("mixing") and not imports("plan")
    assert {package(name) for name in imports("backbone")} <= {"plan"}
    for number, name in enumerate(ORDER):
        below = {"mixing", *ORDER[:number]}
        assert {found for found in imports(name) if package(found) not in ("engine", "images")} <= below, name
    for name in MODULES:
        found = imports(name)
        if package(name) == "images":
            assert found <= {"engine.errors", "engine.rng", "engine.files"} | set(filter(is_image, MODULES)), name
        if package(name) == "engine":
            assert {package(other) for other in found} <= {"engine", "images"}, name
    for name in ("engine.errors", "engine.rng", "engine.files"):
        assert imports(name) <= {"engine.errors"}, name
    for name in ("model", "train", "predict", "finetune", "segment", "bench", "show"):
        assert not {"swin", "encoders.vit", "encoders.twins"} & imports(name), f"{name} must reach encoders by encoders"


def is_image(name: str) -> bool:
    return package(name) == "images"


def test_no_circular_imports():
    left = {name: imports(name) - {name} for name in MODULES}
    while left:
        free = {name for name, needs in left.items() if not needs & set(left)}
        assert free, f"circular imports among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


def test_engine_and_images_do_not_know_the_method():
    for name, path in MODULES.items():
        if package(name) in ("engine", "images"):
            text = path.read_text().lower()
            assert not [word for word in ("eesmm", "greenmim", "simmim", "swin", "superpos") if word in text], name


def count_tokens(path) -> int:
    """Python tokens of a file, without comments and white space. A docstring is one token, so it may be long."""
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    return sum(token.type not in silent for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline))


def test_budget_of_tokens():
    sizes = {name: count_tokens(path) for name, path in MODULES.items()}
    core = sum(sizes[name] for name in CORE)
    total = sum(sizes.values()) + sum(map(count_tokens, ROOT.glob("experiments/*.py")))
    assert core <= CORE_TOKENS and total <= ALL_TOKENS, f"core {core}, with everything else {total}"
