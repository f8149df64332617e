"""The members of DeepSpeed's engine that this project uses, so that types are checked where DeepSpeed is not imported.

`train/engine.py` builds an engine; the other modules of `train/` take it as an `Engine`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Engine(Protocol):
    """A `deepspeed.DeepSpeedEngine`. Calling it runs the module's forward pass."""

    module: nn.Module
    optimizer: Any  # the ZeRO optimizer of the stage, with `param_groups` as in torch
    checkpoint_engine: Any  # the object that writes the files of a checkpoint
    skipped_steps: int
    communication_data_type: torch.dtype
    _config: Any
    checkpoint_mp_rank: int
    loaded_checkpoint_dp_world_size: int
    _copy_recovery_script: Any
    _get_all_zero_checkpoint_names: Any
    _get_mp_rank_zero_checkpoint_names: Any

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The forward pass."""

    def backward(self, loss: Tensor) -> Any:
        """The backward pass of one micro batch."""

    def step(self) -> None:
        """The update, after the last micro batch of an accumulation."""

    def train(self, mode: bool = True) -> Any:
        """Training mode."""

    def eval(self) -> Any:
        """Evaluation mode."""

    def get_global_grad_norm(self) -> Any:
        """The gradient norm over all ranks before clipping, of the last step."""

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """The types of weights and of accumulated gradients."""

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage: 0 to 3."""

    def zero_sub_group_size(self) -> int:
        """Parameters in one sub-group of the optimizer at stage 3."""

    def save_checkpoint(self, save_dir: str, tag: str, client_state: Any, save_latest: bool) -> Any:
        """Writes this rank's files."""

    def load_checkpoint(self, load_dir: str, tag: str) -> tuple[str | None, Any]:
        """Reads this rank's files; returns their path and the client state."""

    def destroy(self) -> None:
        """Frees what the engine holds, for another engine in the same process."""

    def _get_zero_param_shapes(self) -> Any:
        """The names and shapes of each sub-group's parameters."""


def model_size(engine: Engine) -> tuple[int, int]:
    """The number of weights of the whole model, and the bytes of one in the forward pass."""
    parameters: list[Any] = list(engine.module.parameters())
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in parameters), parameters[0].element_size()
