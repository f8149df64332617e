"""The values that DeepSpeed uses are compared with the ds_config."""

from __future__ import annotations

import pytest

from igpt_ds.cli import SharedError
from igpt_ds.config import RECIPES
from igpt_ds.ds_config import join
from igpt_ds.train.ds_effective import check_effective, differences
from igpt_ds.train.engine import build_engine

RUN = join(RECIPES["igpt_s_ar_32"], {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, 4)
EFFECTIVE = RUN.ds_config | {"engine": {"weights": "bf16", "world_size": 4}, "steps_per_print": 10}


def test_equal_in_other_words_is_equal():
    assert not differences({"checkpoint": {"tag_validation": "FAIL"}}, {"checkpoint": {"tag_validation": "Fail"}})
    assert not differences({"data_types": {"grad_accum_dtype": "float32"}}, {"data_types": {"grad_accum_dtype": "fp32"}})
    assert not differences(
        {"zero_optimization": {"reduce_bucket_size": 2e8}}, {"zero_optimization": {"reduce_bucket_size": 200000000}}
    )


def test_defaults_that_nobody_asked_for_do_not_matter():
    assert not differences({"bf16": {"enabled": True}}, {"bf16": {"enabled": True, "immediate_grad_update": False}, "fp16": {}})


def test_a_difference_has_its_dotted_name():
    asked = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    effective = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}
    assert differences(asked, effective) == [("zero_optimization.offload_optimizer.device", "cpu", "none")]
    assert differences(asked, {"zero_optimization": {"stage": 3, "offload_optimizer": None}}) == [
        ("zero_optimization.offload_optimizer", {"device": "cpu"}, None)
    ]


def test_fp16_is_refused_without_a_gpu():
    run = join(RECIPES["igpt_s_ar_32"], {"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}}, 1)
    with pytest.raises(SharedError, match=r"^DeepSpeed supports fp16 only on a GPU; use a --ds_config in bf16 or f"):
        build_engine(run)


def test_an_engine_as_asked_for_goes_on():
    check_effective(RUN, EFFECTIVE)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"gradient_clipping": 0.0},
            r"^ds_config has gradient_clipping=1\.0 but DeepSpeed uses 0\.0; write 0\.0 or remove the key$",
        ),
        ({"zero_optimization": {"stage": 2}}, r"^ds_config has zero_optimization\.stage=3 but DeepSpeed uses 2; "),
        (
            {"engine": {"weights": "fp32", "world_size": 4}},
            r"^ds_config has engine\.weights='bf16' but DeepSpeed uses 'fp32'; ",
        ),
        ({"train_batch_size": 64}, r"^ds_config has train_batch_size=128 but DeepSpeed uses 64; "),
    ],
)
def test_an_engine_that_works_by_another_value_is_refused(changed, message):
    with pytest.raises(SharedError, match=message):
        check_effective(RUN, EFFECTIVE | changed)
