"""The norms by layer are those of plain torch, at every stage, on one rank and on several."""

from pathlib import Path
from typing import Any

import pytest

from igpt_ds.json_files import read_json


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_norms_are_those_of_plain_torch_and_a_replay_leaves_the_bits(launch: Any, tmp_path: Path, ranks: int) -> None:
    done = launch([Path(__file__).with_name("layer_ranks.py"), tmp_path / "found.json"], ranks=ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = read_json(tmp_path / "found.json", "found")
    assert len(found) == 10
    for kind, of in found.items():
        squares = [norm**2 for name, norm in of["layers"].items() if name.startswith("grad_norm/")]
        assert sum(squares) ** 0.5 == pytest.approx(of["global"]["norm"], rel=1e-5), kind
        weights, plain = ({name: of[by][name] for name in of["plain"] if "weight" in name} for by in ("layers", "plain"))
        assert weights == pytest.approx(plain, rel=1e-5), kind
        assert of["layers"] == pytest.approx(of["plain"], rel=0.03 if "bf16" in kind else 1e-5), kind
