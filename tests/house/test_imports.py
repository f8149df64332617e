"""The first and fourth law: imports go down the floors only, and guests stay at their doors."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "igpt_ds").rglob("*.py"))
FRONT_DOOR = ROOT / "igpt_ds" / "__init__.py"  # the public API, which loads what it stands on when it is used
PROGRAMS = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "tools").rglob("*.py"))]

# Where a package from outside may be imported; elsewhere nobody needs to have it, or to know it. A benchmark knows our peers.
DOORS = {
    "deepspeed": ["train/engine.py", "train/ds_patches.py", "train/ds_faster.py", "train/checkpoint/"],
    "webdataset": ["data/streaming.py", "tools/bench/"],
    "PIL": [
        "data/images.py",
        "data/pictures.py",
        "data/grids.py",
        "data/duplicates.py",
        "tools/bench/",
    ],  # duplicates hands images to imagehash, which takes no else
    "imagehash": ["data/duplicates.py"],
    "simplejpeg": ["data/images.py"],
    "sklearn": ["evaluate/", "data/sources/digits.py", "tools/bench/"],
    "matplotlib": ["evaluate/report/"],
    "safetensors": ["model/store.py", "evaluate/probes/saved.py", "model/interchange/hf.py"],
    "triton": ["model/triton_gelu.py"],
    "crc32c": ["model/interchange/tf_bundle.py"],
    "tensorboard": ["train/metrics.py"],
    "wandb": ["train/wandb_curves.py"],
    "argcomplete": ["command_line/parser.py"],
    "transformers": ["tools/bench/"],
}
FLOORS = {"plan": 1, "data": 2, "model": 2, "paper": 3, "train": 4, "evaluate": 4, "api": 5, "ops": 5}  # the rest: 0
TOP = 6  # programs
# These load a guest when a function needs it and not before, so that the rest of the file works without.
LAZY = {"deepspeed", "webdataset", "sklearn", "matplotlib", "imagehash", "transformers", "wandb", "argcomplete"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every import of a file, in functions too: the dotted name of what is imported, and whether it waits for a function.

    What stands under `if TYPE_CHECKING:` never happens, so it waits as well.
    """
    tree = ast.parse(path.read_text(), str(path))
    waiting = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    waiting += [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    inside = {id(node) for block in waiting for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it out"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            dynamic = getattr(node, "id", getattr(node, "attr", "")) in ("__import__", "import_module")
            assert not dynamic or path.name == "lazy.py", f"{path}:{node.lineno}: an import that no reader can follow"
            continue
        yield from ((name, id(node) in inside) for name in names)


def floor(name: str) -> tuple[int, str]:
    """The floor of a dotted name of ours, and its wing: where two wings share a floor they do not know each other."""
    wing = name.split(".")[1] if "." in name else ""
    if wing and module(name) == "igpt_ds":  # a name of the front door
        return TOP, ""
    height = FLOORS.get(wing, 0)
    return height, wing if height else ""


def module(name: str) -> str:
    """The module of ours that a dotted name lies in: `igpt_ds.files.read_json` -> `igpt_ds.files`."""
    while not (path := ROOT / name.replace(".", "/")).with_suffix(".py").is_file() and not path.is_dir():
        name = name.rpartition(".")[0]
    return name


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", [*PACKAGE, *PROGRAMS], ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    here = floor(dotted(path)) if path in PACKAGE and path != FRONT_DOOR else (TOP, "")
    for name, _ in imports(path):
        root = name.split(".")[0]
        assert root not in ("tools", "tests", *(script.stem for script in ROOT.glob("*.py"))), f"{path} imports {name}"
        if root == "igpt_ds":
            there = floor(name)
            assert there[0] < here[0] or there == here, f"{path} imports {name}, which lies beside or above it"


def test_no_module_needs_itself():
    graph = {dotted(path): {module(name) for name, _ in imports(path) if name.startswith("igpt_ds")} for path in PACKAGE}
    packages = {dotted(path) for path in PACKAGE if path.name == "__init__.py"}
    graphlib.TopologicalSorter({name: needs - packages for name, needs in graph.items()}).prepare()  # raises on a circle


@pytest.mark.parametrize("path", [*PACKAGE, *PROGRAMS], ids=lambda path: str(path.relative_to(ROOT)))
def test_guests_stay_at_their_doors(path):
    here = str(path.relative_to(ROOT)).removeprefix("igpt_ds/")
    for name, waits in imports(path):
        guest = name.split(".")[0]
        if name.startswith("torch.utils.tensorboard"):
            guest = "tensorboard"
        if guest in DOORS:
            assert any(here.startswith(door) for door in DOORS[guest]), f"{path} imports {name}; its doors: {DOORS[guest]}"
            assert waits or guest not in LAZY, f"{path} imports {name} at the top; import it in the function that needs it"


@pytest.mark.parametrize(
    ("path", "friends"),
    [
        ("model/transformer.py", {"torch"}),
        ("model/cpu_kernels.py", {"torch"}),
        ("model/fused.py", {"torch"}),
        ("model/ulysses.py", {"torch"}),
        ("model/triton_gelu.py", {"torch", "triton"}),
        ("plan/estimate.py", set()),
        ("plan/options.py", set()),
        ("plan/command.py", set()),
        ("plan/recipes.py", set()),
        ("plan/text.py", set()),
        ("plan/costs.py", set()),
        ("plan/step_time.py", set()),
        ("config.py", set()),
        ("files.py", set()),
        ("cli.py", set()),
    ],
)
def test_the_plainest_files_need_next_to_nothing(path, friends):
    for name, _ in imports(ROOT / "igpt_ds" / path):
        plain = name.split(".")[0] in sys.stdlib_module_names | friends
        ours = name.startswith("igpt_ds.") and floor(name)[0] <= FLOORS["plan"] and not name.startswith("igpt_ds.dist")
        if path.startswith("model/"):  # the model stands on its config, and on what is written apart to keep it readable
            rooms = ["igpt_ds.model.cpu_kernels.", "igpt_ds.model.triton_gelu"]
            rooms += (
                ["igpt_ds.config.", "igpt_ds.model.fused.", "igpt_ds.model.ulysses."] if path == "model/transformer.py" else []
            )
            ours = path in ("model/transformer.py", "model/fused.py") and name.startswith(tuple(rooms))
            ours = ours or name == "igpt_ds.errors.InputError"
            ours = ours or name == "igpt_ds.errors.InputError"
        assert plain or ours, f"{path} imports {name}"


def test_no_room_for_what_has_no_home():
    homeless = {"utils", "util", "common", "helpers", "helper", "misc", "tools"}
    assert not [path for path in PACKAGE if path.stem in homeless or path.parent.name in homeless]
