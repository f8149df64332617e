"""Real launches of the real engine: ZeRO-3 over gloo, killed, resumed, consolidated."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt_ds.config import Recipe, override
from igpt_ds.data.loader import Augment, BatchLayout, Loader, sequential
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.json_files import read_json, read_json_lines, seal
from igpt_ds.model.cpu_kernels import PRODUCTS
from igpt_ds.model.dropout import Dropout
from igpt_ds.model.objectives import autoregressive_loss, image_nats
from igpt_ds.model.store import load_model
from igpt_ds.model.transformer import Transformer
from igpt_ds.plan.costs import parameters
from igpt_ds.train.engine import build_optimizer
from igpt_ds.train.schedule import learning_rate

pytestmark = pytest.mark.slow
Curves = Callable[[str], list[dict[str, Any]]]
Command = Callable[..., list[str]]


def plain_torch_losses(recipe: Recipe, data: Path, split: str = "train") -> list[float]:
    """The same training in a plain loop on one process, without DeepSpeed."""
    torch.manual_seed(recipe.seed)
    model = Transformer(recipe.model, head_std=recipe.head_std)
    optimizer = build_optimizer(model, recipe)
    batch = recipe.batch_images
    loader = Loader(
        ShardSet(data, split),
        BatchLayout(batch, batch, 0, 1),
        recipe.seed,
        augment=Augment(recipe.augment_pad, recipe.augment_flip),
    )
    losses = []
    for step in range(recipe.steps):
        images = loader.batch(step * batch, 0).to("cpu")
        drops = Dropout(recipe.dropout, recipe.seed, images.positions, 16) if recipe.dropout else None
        loss = autoregressive_loss(model(images.tokens, dropout=drops), images.tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        optimizer.step()
        losses.append(loss.item())
    return losses


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    """What it printed."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def training_losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def test_two_ranks_with_accumulation_equal_plain_torch(
    launch: Any, tool: Any, command: Command, curves: Curves, recipe: Recipe, tiny_dataset: Path, tmp_path: Path
) -> None:
    succeed(launch(command("two", "--micro_batch", "3"), ranks=2, by="deepspeed"))
    rows = curves("two")
    assert training_losses(rows) == pytest.approx(plain_torch_losses(recipe, tiny_dataset), abs=1e-5)
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 4, 8, 12]
    assert rows[0]["val_loss"] == pytest.approx(np.log(8), abs=1e-6)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert (tmp_path / "two" / "FINISHED").exists()

    # The checkpoint, consolidated without DeepSpeed, has the validation loss that the engine measured.
    model_dir = tmp_path / "model"
    assert tool("consolidate", "--run_dir", tmp_path / "two", "--out", model_dir)[0] == 0
    model, info = load_model(model_dir)
    assert (info.step, info.images_seen) == (12, 144)
    total = torch.zeros(2, dtype=torch.float64)
    for tokens, _, weight in sequential(ShardSet(tiny_dataset, "val"), 4):
        tokens = tokens.long()
        with torch.no_grad():
            total += torch.stack([(image_nats(model(tokens), tokens) * weight).sum(), weight.sum()])
    assert float(total[0] / total[1]) == pytest.approx(rows[-1]["val_loss"], abs=1e-6)


def test_every_knob_under_every_activation_checkpointing_interrupted_equals_plain_torch(
    launch: Any, tool: Any, command: Command, curves: Curves, recipe: Recipe, tiny_dataset: Path, tmp_path: Path
) -> None:
    """ZeRO-3 gathers a module's weights while it runs, also when it runs again: the same masks of dropout, and one tied matrix.

    A run whose activations are all kept equals, bit for bit, one that recomputes some and stops on the way.
    """
    knobs = {"dropout": 0.2, "weight_decay": 0.3, "head_std": 0.1, "tied_embeddings": True}
    words = ["--dropout", "0.2", "--weight_decay", "0.3", "--head_std", "0.1", "--tied_embeddings"]
    configs = {mode: tmp_path / f"{mode}.json" for mode in ("none", "selective")}
    for mode, path in configs.items():
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 500}
        path.write_text(json.dumps({"zero_optimization": zero, "igpt_ds": {"activation_checkpointing": mode}}))
    said = succeed(launch(command("whole", *words, "--ds_config", str(configs["none"])), ranks=2))
    assert "attention by torch's flash kernel on cpu" in said
    staged = command("staged", *words, "--ds_config", str(configs["selective"]))
    succeed(launch([*staged, "--stop_at_step", "8"], ranks=2))
    succeed(launch([*staged, "--resume", "auto"], ranks=2))
    assert curves("staged") == curves("whole")
    plain = plain_torch_losses(override(recipe, **knobs), tiny_dataset)
    assert training_losses(curves("whole")) == pytest.approx(plain, abs=1e-5)

    assert tool("consolidate", "--run_dir", tmp_path / "staged", "--out", tmp_path / "model")[0] == 0
    model, info = load_model(tmp_path / "model")
    assert sum(weight.numel() for weight in model.parameters()) == parameters(override(recipe, **knobs).model)
    assert (info.dropout, info.weight_decay, info.head_std, info.config.tied_embeddings) == tuple(knobs.values())


def test_torchrun_in_bf16_without_ninja_or_compiler(launch: Any, command: Command, curves: Curves, tmp_path: Path) -> None:
    """A PATH with nothing on it: DeepSpeed must not want to build anything."""
    words = command("three", "--ds_config", "ds_configs/zero3_bf16_full_checkpointing.json")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3", "--standalone"]
    succeed(launch([*launcher, *words], env={"PATH": str(tmp_path)}))
    losses = training_losses(curves("three"))
    assert losses[0] == pytest.approx(np.log(8), abs=1e-3)
    assert losses[-1] < losses[0]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Returns as soon as train.jsonl tells of the step."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["step"] >= step for row in read_json_lines(run_dir / "train.jsonl")):
            return
        time.sleep(0.01)
    pytest.fail(f"step {step} was never logged")


def test_kill_9_between_two_saves_then_resume_equals_never_stopping(
    launch: Any, command: Command, curves: Curves, tmp_path: Path
) -> None:
    longer = ["--steps", "40", "--save_every", "10"]
    succeed(launch(command("whole", *longer), ranks=2))

    process = launch.start(command("killed", *longer), ranks=2)
    wait_for_step(tmp_path / "killed", 14, process)
    launch.end()  # SIGKILL for the launcher and both ranks
    assert (tmp_path / "killed" / "checkpoints" / "step-00000010" / "COMPLETE").exists()
    assert not (tmp_path / "killed" / "FINISHED").exists()
    assert len(curves("killed")) < len(curves("whole"))

    succeed(launch(command("killed", *longer, "--resume", "auto"), ranks=2))
    assert curves("killed") == curves("whole")  # losses, validation losses, rates and gradient norms, bit for bit


def test_plain_python_runs_one_rank_and_a_staged_run_with_a_torn_checkpoint_ends_alike(
    launch: Any, command: Command, curves: Curves, recipe: Recipe, tiny_dataset: Path, tmp_path: Path
) -> None:
    """A run stopped at step 8 whose newest checkpoint is torn goes on from step 4, and ends where a whole run ends."""
    succeed(launch(command("whole")))
    assert training_losses(curves("whole")) == pytest.approx(plain_torch_losses(recipe, tiny_dataset), abs=1e-5)
    succeed(launch(command("staged", "--stop_at_step", "8")))
    torn = next((tmp_path / "staged" / "checkpoints" / "step-00000008").glob("*optim_states.pt"))
    os.truncate(torn, torn.stat().st_size // 2)

    done = launch(command("staged", "--resume", "auto"))
    succeed(done)
    assert "checkpoint skipped" in done.stderr
    assert str(torn) in done.stderr
    assert "4 steps, 48 images" in done.stdout
    assert curves("staged") == curves("whole")


def test_a_resumed_run_keeps_the_recorded_split_and_product(
    launch: Any, command: Command, curves: Curves, recipe: Recipe, tiny_dataset: Path, tmp_path: Path
) -> None:
    """The validation images are trained on. run.json decides which float32 product a CPU takes, as after a change of machine."""
    both = ["--train_split", "train+val"]
    said = succeed(launch(command("moved", *both, "--stop_at_step", "4")))
    assert "48 images of train+val, none for validation" in said
    assert "validation   none, because the validation images are trained on" in said
    path = tmp_path / "moved" / "run.json"
    values = read_json(path, "run")
    (other,) = set(PRODUCTS) - {values["cpu_product"]}
    path.write_text(json.dumps(seal(values | {"cpu_product": other})))
    refused = launch(command("moved", "--resume", "auto"))
    assert (refused.returncode, "--train_split is train+val there and train here" in refused.stderr) == (2, True)
    succeed(launch(command("moved", *both, "--resume", "auto"), ranks=2))
    assert read_json(path, "run")["cpu_product"] == other  # the resumed run writes the product that it uses
    assert training_losses(curves("moved")) == pytest.approx(plain_torch_losses(recipe, tiny_dataset, "train+val"), abs=1e-5)
    assert not any("val_loss" in row for row in curves("moved"))
    assert (tmp_path / "moved" / "FINISHED").exists()


def test_consolidated_logits_equal_the_engines(
    launch: Any, tool: Any, command: Command, sharded_config: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    recipe_file = Path(command("unused")[2])
    script = Path(__file__).with_name("engine_logits.py")
    succeed(launch([script, tiny_dataset, sharded_config, recipe_file, tmp_path / "run"], ranks=3))
    assert tool("consolidate", "--run_dir", tmp_path / "run", "--out", tmp_path / "model")[0] == 0
    model, _ = load_model(tmp_path / "model")
    tokens = torch.from_numpy(ShardSet(tiny_dataset, "train").tokens(np.arange(4)).reshape(4, -1).astype(np.int64))
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens), torch.from_numpy(np.load(tmp_path / "run" / "logits.npy")), atol=1e-6, rtol=1e-6
        )


def test_a_signal_to_one_rank_ends_the_launch_with_an_error(launch: Any, command: Command, tmp_path: Path) -> None:
    """Nothing that died may look finished: no FINISHED file, a non-zero status."""
    process = launch.start([*command("run"), "--steps", "5000", "--save_every", "0"], ranks=2, by="deepspeed")
    wait_for_step(tmp_path / "run", 2, process)
    ranks = subprocess.run(["pgrep", "-f", f"local_rank=1.*{tmp_path}/run"], capture_output=True, text=True, check=False)
    os.kill(int(ranks.stdout.split()[0]), signal.SIGKILL)
    process.communicate(timeout=600)
    assert process.returncode != 0
    assert not (tmp_path / "run" / "FINISHED").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"MASTER_ADDR": "no-host.invalid"}, "MASTER_ADDR=no-host.invalid cannot be resolved"),
        ({"MASTER_ADDR": "127.0.0.1"}, "another process uses this port"),
        ({"WORLD_SIZE": "1", "RANK": "x"}, "RANK='x' is no whole number"),
    ],
)
def test_ranks_that_cannot_meet_say_why_in_one_line(
    launch: Any, command: Command, place: dict[str, str], message: str, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": str(taken.getsockname()[1])}
        done = launch(command("run"), env=ranks | place, timeout=60)
    (line,) = (line for line in done.stderr.splitlines() if "rror" in line)
    assert (done.returncode, message in line) == (2, True), done.stderr
    assert not (tmp_path / "run").exists()
