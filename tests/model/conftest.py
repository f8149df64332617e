"""A model small enough for brute force, with a head that says something."""

from collections.abc import Callable

import pytest
import torch

from igpt_ds.config import ModelConfig
from igpt_ds.model.store import fresh_model
from igpt_ds.model.transformer import Transformer


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(n_layer=3, n_head=2, n_embd=16, n_px=4, n_vocab=8)


@pytest.fixture
def telling(config: ModelConfig) -> Callable[[str], Transformer]:
    """telling(objective): fresh weights, but gains that differ from 1 and a head that differs from 0, so that each matters."""

    def make(objective: str) -> Transformer:
        model = fresh_model(config, seed=1, objective=objective)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            model.head.weight.normal_(generator=generator)
            for name, weight in model.named_parameters():
                if "ln_" in name:
                    weight.uniform_(0.5, 1.5, generator=generator)
        return model

    return make


@pytest.fixture
def model(telling: Callable[[str], Transformer]) -> Transformer:
    return telling("ar")


@pytest.fixture
def tokens(config: ModelConfig) -> torch.Tensor:
    return torch.randint(0, config.n_vocab, (5, config.n_ctx), generator=torch.Generator().manual_seed(3))
