"""The tests' world: calm surroundings, a tiny model, a few 4x4 images and their shards, launches that leave no orphan."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import launcher
import numpy as np
import pytest
import torch
from launcher import Launcher
from PIL import Image

from igpt_ds.config import ModelConfig, Recipe, recipe_to_dict
from igpt_ds.data.images import decode_image
from igpt_ds.data.palette import fit_palette
from igpt_ds.data.shards.build import write_dataset
from igpt_ds.data.shards.layout import ShardOptions
from igpt_ds.data.sources import open_source
from igpt_ds.model.cpu_speed import PRODUCT_VARIABLE

ROOT = Path(__file__).parent.parent

# Tests run on the CPU with one thread a process, see nothing of a launcher around them, and need no PYTHONPATH. Nothing is
# compiled: DeepSpeed decorates an optimizer that we do not use with torch.compile, which imports the compiler for two seconds.
# The float32 product is named: a busy machine may measure another one for the second of two runs that shall be equal.
os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
os.environ[PRODUCT_VARIABLE] = "torch"
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "PYTHONWARNINGS"):
    os.environ.pop(_name, None)
for _name in (
    "ARGS",
    "MAKEFLAGS",
    "MAKELEVEL",
    "MAKEOVERRIDES",
    "MFLAGS",
):  # those of `make test ARGS=...`, for the makes of tests
    os.environ.pop(_name, None)
for _name in [name for name in os.environ if name.startswith("SLURM_")]:
    del os.environ[_name]
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # deepspeed and ninja of this environment
# A shell that started the tests in its background had them, and all they launch, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
# A busy machine takes longer for one example than for the next.
hypothesis.settings.register_profile("calm", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("calm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the work of pytest-xdist: the cluster's tests first, the longest chain, then launches; fast tests fill the gaps."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: (item.get_closest_marker("slurm") is None, item.get_closest_marker("slow") is None))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives each worker whole files, for tests of a file share fixtures; house/ shares a report, slurm/ two clusters."""
    from xdist.scheduler import LoadScopeScheduling

    class Rooms(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            shared = ("tests/slurm/test_pretrain.py", "tests/slurm/", "tests/house/")
            return next((room for room in shared if nodeid.startswith(room)), nodeid.split("::", 1)[0])

    return Rooms(config, log)


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """What a program wrote into the environment (its rank, its port) is not for the next test's launches."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def free_port() -> int:
    """A TCP port for a test that starts ranks by itself."""
    return launcher.free_port()


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """Two layers over the tiny dataset's 4x4 images of 8 colours."""
    return ModelConfig(n_layer=2, n_head=2, n_embd=16, n_px=4, n_vocab=8)


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders blue, green, red of 16 noisy 4x4 PNGs each; read only."""
    directory = tmp_path_factory.mktemp("tiny") / "images"
    random = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (directory / name).mkdir(parents=True)
        for number in range(16):
            image = random.integers(0, 100, (4, 4, 3), dtype=np.uint8)
            image[..., channel] += 150
            Image.fromarray(image).save(directory / name / f"{number:02d}.png")
    return directory


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> Path:
    """Shards of the tiny images with a palette of 8 colours, splits train and val; read only."""
    source = open_source(f"imagefolder:{tiny_images}")
    images = [decode_image(file.read_bytes()) for file in sorted(tiny_images.rglob("*.png"))]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images])
    palette, _ = fit_palette(pixels, 8, seed=0)
    directory = tmp_path_factory.mktemp("tiny") / "shards"
    write_dataset(directory, source, palette, ShardOptions(4, val_fraction=0.25, images_per_shard=16))
    return directory


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    """tool("name", *arguments) -> (exit status, stdout, stderr), in this process, as `python tools/name.py` would."""

    def run(name: str, *arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        status: Any = 0
        try:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def launch() -> Iterator[Launcher]:
    """`launch(["train.py", ...], ranks=2)` -> CompletedProcess; `launch.start(...)` -> Popen for tests that kill."""
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def launch_once() -> Iterator[Launcher]:
    """`launch` for fixtures whose run many tests look at."""
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture
def run_stages(launch: Launcher, tool: Callable[..., tuple[Any, str, str]]) -> Callable[..., None]:
    """run_stages([flags of tools/paper_plan.py], before="train") runs stages of the paper, to the first with such a name.

    Trainings are launched, tools run in this process, which saves their imports.
    """

    def run(asked: list[object], before: str = "-") -> None:
        for line in tool("paper_plan", "--commands", *asked)[1].splitlines():
            name, job, _, printed, _, *words = line.split("\x1f")
            if name.startswith(before):
                return
            if job == "sweep_lr":
                words.insert(words.index("--") + 1, sys.executable)
            if job in ("pretrain", "finetune"):
                done = launch(words, ranks=1)
                status, stdout, stderr = done.returncode, done.stdout, done.stderr
            else:
                status, stdout, stderr = tool(Path(words[0]).stem, *words[1:])
            assert status == 0, f"{name}: {stdout[-1000:]}{stderr[-2000:]}"
            if printed:
                Path(printed).write_text(stdout)

    return run


@pytest.fixture(scope="session")
def recipe(tiny_config: ModelConfig) -> Recipe:
    """Twelve steps of 12 images: two epochs and a half of the tiny dataset's training split, augmented."""
    return Recipe("tiny", tiny_config, batch_images=12, steps=12, lr=0.01, warmup_steps=3, augment_pad=1, augment_flip=True)


def write_sharded_config(directory: Path) -> Path:
    """A ds_config that shards even the smallest tensor, where the shipped ones would keep a tiny model whole on each rank."""
    path = directory / "sharded.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 500}
    path.write_text(json.dumps({"zero_optimization": zero, "igpt_ds": {"activation_checkpointing": "full"}}))
    return path


@pytest.fixture
def sharded_config(tmp_path: Path) -> Path:
    """A ds_config that shards even the smallest tensor."""
    return write_sharded_config(tmp_path)


Command = Callable[..., list[str]]


@pytest.fixture(scope="session")
def command_in(recipe: Recipe, tiny_dataset: Path) -> Callable[[Path], Command]:
    """command_in(directory) -> `command` for a directory."""

    def made(directory: Path) -> Command:
        config, ds_config = directory / "recipe.json", write_sharded_config(directory)
        config.write_text(json.dumps(recipe_to_dict(recipe)))

        def words(run_dir: str, *more: str) -> list[str]:
            fixed = {"config": config, "data": tiny_dataset, "run_dir": directory / run_dir, "ds_config": ds_config}
            often = {"log_every": 1, "val_every": 4, "save_every": 4}
            return ["train.py", *(word for name, value in (fixed | often).items() for word in (f"--{name}", str(value))), *more]

        return words

    return made


@pytest.fixture
def command(command_in: Callable[[Path], Command], tmp_path: Path) -> Command:
    """command("run", "--resume", "auto") -> the words of a training command that writes to tmp_path/run."""
    return command_in(tmp_path)
