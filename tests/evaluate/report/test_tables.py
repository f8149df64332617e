"""The paper's numbers, and its tables with ours beside them."""

from __future__ import annotations

import pytest

from igpt_ds.config import get_recipe
from igpt_ds.evaluate.report.row_types import as_row
from igpt_ds.evaluate.report.tables import TITLES, paper_table
from igpt_ds.paper import published

SMALL = {"n_layer": 8, "n_head": 4, "n_embd": 128, "n_px": 16, "n_vocab": 512}
L_48 = {"n_layer": 48, "n_head": 16, "n_embd": 1536, "n_px": 48, "n_vocab": 512}


NOT = "| not measured | not measured |"


def probe(**changes):
    about = {"kind": "probe", "protocol": "every_layer", "features": "normed", "weights": "trained", "model_hash": "h", "step": 9}
    seen = {"dataset": "cifar10", "dataset_hash": {}, "eval_split": "val", "n_features": 128, "seed": 0, "model": SMALL}
    row = about | seen | {"layer": 4, "model_objective": "ar", "accuracy": 0.5, "held_out_accuracy": 0.5}
    return as_row(row | changes)


def parts(number, rows, **more):
    """The lines of the table, and the sentences below it."""
    title, table, *said = paper_table(number, rows, **more).split("\n\n")
    assert title == f"### {TITLES[number]}"
    return table.splitlines(), "".join(said).splitlines()


def lines(number, rows, **more):
    return parts(number, rows, **more)[0]


def test_the_papers_own_rows():
    """Numbers of which a slip of the finger would not be seen elsewhere."""
    assert [(one.dataset, one.accuracy) for one in published.TABLE_1 if one.ours] == [
        ("cifar10", 96.3),
        ("cifar100", 82.8),
        ("stl10", 95.5),
    ]
    assert [(one.n_px, one.features, one.accuracy) for one in published.TABLE_2 if one.ours] == [
        (32, 512, 41.9),
        (32, 1024, 54.5),
        (32, 1536, 60.3),
        (48, 1536, 65.2),
        (64, 3072, 68.7),
        (64, 15360, 72.0),
    ]
    assert [one.accuracy for one in published.TABLE_2] == sorted(one.accuracy for one in published.TABLE_2)
    assert {one.model: one.errors.get(40) for one in published.TABLE_4}["FixMatch CTA"] == (11.4, 3.4)
    for bar in published.FIGURE_4:  # Figure 4 says nothing that a table contradicts
        table = {"probe": (*published.TABLE_1, *published.TABLE_2), "finetune": published.TABLE_3}[bar.evaluation]
        same = [one.accuracy for one in table if (one.dataset, one.model, one.n_px or 32) == (bar.dataset, "iGPT-L", 32)]
        assert bar.objective == "bert" or same == [bar.accuracy]


def test_table_1():
    rows = [
        probe(layer=3, accuracy=0.9, held_out_accuracy=0.4),
        probe(layer=5, accuracy=0.514, held_out_accuracy=0.5),
        probe(protocol="concat", layer=4, layers=[2, 3, 4, 5, 6], accuracy=0.52, n_features=640),
        probe(protocol="sgd", layer=2, accuracy=0.49),
        probe(protocol="mask_vote", model_objective="bert", n_masks=5, accuracy=0.41),
        probe(weights="untrained", accuracy=0.3),
        probe(weights="pixels", features="pixels", layer=0, model=None, model_objective=None, accuracy=0.42),
        probe(dataset="stl10", model=None, accuracy=0.6),
        probe(dataset="mnist"),
    ]
    table, said = parts(1, rows)
    ours = [line for line in table if "ours" in line]
    assert said == [
        "- Caution: raw pixels are better than 8 x 128 BERT at step 9 (4 normed, 5 masks vote) on cifar10 by 1.0 points "
        "(42.0 against 41.0 %)."
    ]
    assert ours == [
        "| cifar10 | **ours: 8 x 128, 1.7M at 16x16** | no labels, step 9 | 5 normed | val | 51.4 | -44.9 | +9.4 | +21.4 |",
        "| cifar10 | **ours: 8 x 128, 1.7M at 16x16** | no labels, step 9 | 2 normed, SGD | val | 49.0 | -47.3 | +7.0 | +19.0 |",
        "| cifar10 | **ours: 8 x 128, 1.7M at 16x16** | no labels, step 9 | 2..6 normed | val | 52.0 | -44.3 | +10.0 | +22.0 |",
        "| cifar10 | **ours: 8 x 128, 1.7M at 16x16, BERT** | no labels, step 9 | 4 normed, 5 masks vote "
        "| val | 41.0 | -55.3 | -1.0 | not measured |",
        f"| stl10 | **ours: model of unknown shape** | no labels, step 9 | 4 normed | val | 60.0 | -35.5 {NOT}",
        f"| mnist | **ours: 8 x 128, 1.7M at 16x16** | no labels, step 9 | 4 normed | val | 50.0 | - {NOT}",
    ], "what trained models reach, at the layer that held-out images chose, beside the paper's model"
    assert "| cifar10 | ResNet-152 | ImageNet, with labels |  | test | 94.0 |  |  |  |" in lines(1, [])
    assert len(lines(1, [])) == 2 + len(published.TABLE_1)


def test_table_2_compares_with_the_same_size_and_input():
    row = probe(dataset="imagenet", model=L_48, n_features=1536, accuracy=0.66, eval_split="test")
    small = row | {"model": SMALL, "n_features": 128, "model_hash": "s"}
    assert [line for line in lines(2, [row, small]) if "ours" in line] == [
        f"| **ours: 8 x 128, 1.7M at 16x16** | 16x16 | 1.7 | 128 | 4 normed | test | 66.0 | -6.0 {NOT}",
        f"| **ours: iGPT-L, 1364M at 48x48** | 48x48 | 1364 | 1536 | 4 normed | test | 66.0 | +0.8 {NOT}",
    ]
    assert "| iGPT-L | 48x48 | 1362 | 1536 |  | test | 65.2 |  |  |  |" in lines(2, [])
    assert "| SimCLR | orig. | 24 | 2048 |  | test | 69.3 |  |  |  |" in lines(2, [])


def minus(row):
    """The cell "minus the paper's" of Table 3's row of ours."""
    [ours] = [line for line in lines(3, [row]) if "ours" in line]
    return ours.split("|")[-4].strip()


def test_table_3():
    about = {"kind": "finetune", "dataset": "cifar10", "model": SMALL, "model_objective": "ar", "step": 9, "eval_split": "val"}
    about |= {"train_split": "train", "held_out_split": "val", "eval_split": "test"}
    about |= {"n_train": 45_000, "dataset_hash": {"train": "t", "val": "v", "test": "e"}, "held_out_accuracy": 0.5}
    row = as_row(about | {"weights": "trained", "loss": "joint", "lr": 0.001, "accuracy": 0.7})
    scratch = row | {"weights": "untrained", "loss": "clf", "accuracy": 0.6, "n_masks": 5}
    fitted = {"n_train": 45_000, "dataset_hash": {"train": "t", "test": "e"}, "eval_split": "test"}
    pixels = probe(weights="pixels", features="pixels", accuracy=0.65, **fitted)
    folded = scratch | {"held_out_accuracy": None, "held_out_split": None, "accuracy": 0.9}
    ours = [line for line in lines(3, [row, scratch, pixels, folded]) if "ours" in line][:2]
    assert ours == [
        "| cifar10 | **ours: 8 x 128, 1.7M at 16x16** | no labels, step 9 | joint, lr 0.001 "
        "| test | 70.0 | -29.0 | +5.0 | +10.0 |",
        "| cifar10 | **ours: 8 x 128, 1.7M at 16x16** | none, from scratch | clf, lr 0.001, 5 masks vote "
        "| test | 60.0 | - | -5.0 |  |",
    ]
    assert minus(row | {"model_objective": "bert", "accuracy": 0.986}) == "+0.0", "Figure 4 has BERT's"
    assert minus(row | {"model_objective": "bert", "dataset": "cifar100"}) == "-"
    large = row | {"dataset": "imagenet", "model": L_48, "weights": "untrained", "accuracy": 0.53}
    assert minus(large) == "-0.2", "from scratch beside from scratch"
    assert minus(large | {"weights": "trained"}) == "-19.6"
    few = [line for line in lines(3, [row, row | {"n_train": 4000}]) if "ours" in line]
    assert ["joint, lr 0.001, 45000 labels" in few[0], "joint, lr 0.001, 4000 labels" in few[1]] == [True, True]
    assert lines(3, [row | {"dataset": "digits"}])[-1].startswith("| digits | **ours: 8 x 128, 1.7M at 16x16** | no labels")
    assert "| cifar100 | EfficientNet | ImageNet, with labels |  | test | 91.7 |  |  |  |" in lines(3, [])


def test_table_4_counts_errors():
    few = [probe(protocol="low_data", n_labels=n, accuracy=a, deviation=0.012) for n, a in ((40, 0.5), (4000, 0.75))]
    pixels = probe(protocol="low_data", n_labels=250, accuracy=0.3, deviation=0.0, weights="pixels", features="pixels", layer=0)
    digits = few[0] | {"dataset": "digits", "model": SMALL | {"n_layer": 4, "n_embd": 24, "n_px": 8, "n_vocab": 17}}
    table, said = parts(4, [*few, pixels, digits])
    assert said == ["- Not measured on the same images and labels: pixels and untrained."]
    worse = few[0] | {"accuracy": 0.2, "n_labels": 250}
    assert parts(4, [worse, pixels, worse | {"weights": "untrained"}])[1] == [
        "- Caution: raw pixels are better than 8 x 128 at step 9 (4 normed, 250 labels) on cifar10 by 10.0 points "
        "(30.0 against 20.0 %)."
    ]
    ours = [line for line in table if "ours" in line]
    assert ours == [
        "| **ours: 8 x 128, 1.7M at 16x16** | 4 normed, val | 50.0 ± 1.2 (+23.2) |  | 25.0 ± 1.2 (+19.3) |",
        "| **ours: raw pixels** | 0 pixels, val |  | 70.0 ± 0.0 (+57.6) |  |",
        "| **ours: 4 x 24, 0.03M at 8x8** | digits, 4 normed, val | 50.0 ± 1.2 |  |  |",
    ]
    lone = probe(protocol="low_data", n_labels=250, accuracy=0.6, deviation=None, seed=7)
    other = few[0] | {"dataset_hash": {"train": "t"}, "eval_split": "train"}
    ours = [line for line in lines(4, [*few, lone, other]) if "ours" in line]
    assert [line.split("|", 2)[2] for line in ours] == [
        " 4 normed, val, seed 0 | 50.0 ± 1.2 (+23.2) |  | 25.0 ± 1.2 (+19.3) |",
        " 4 normed, val, seed 7 |  | 40.0 (+27.6) |  |",
        " 4 normed, train, seed 0 | 50.0 ± 1.2 (+23.2) |  |  |",
    ], "other seeds and other images have rows of their own"
    assert "| Mean Teacher |  |  | 32.3 ± 2.3 | 9.2 ± 0.2 |" in lines(4, [])
    searched = few[0] | {"layer_chosen_by": "held-out tenth of all labels"}
    assert " 4 normed, chosen with all labels, val | 50.0" in lines(4, [searched])[-1]


def test_table_4_has_fine_tunings_on_few_labels():
    about = {
        "kind": "finetune",
        "weights": "trained",
        "model_hash": "f",
        "start_hash": "h",
        "model": SMALL,
        "model_objective": "ar",
    }
    about |= {
        "step": 9,
        "dataset": "cifar10",
        "eval_split": "test",
        "held_out_split": "val",
        "train_split": "train",
        "n_train": 45000,
    }
    about |= {"loss": "joint", "lr": 0.001, "head_layer": 8, "accuracy": 0.4, "n_labels": 40, "n_subsets": 5, "deviation": 0.021}
    more = {"n_labels": 250, "accuracy": 0.6, "model_hash": "g", "train_split": "train+val"}
    rows = [as_row(about), as_row(about | more | {"train_split": "train"}), as_row(about | more | {"weights": "untrained"})]
    table = lines(4, rows)
    assert "| iGPT-L, fine-tuned (4.7) |  | 57.9 |  |  |" in table
    assert [line.split("|", 2)[2] for line in table if "ours" in line] == [
        " 8, fine-tuned, joint, lr 0.001, step chosen by all of val, test | 60.0 ± 2.1 (+2.1) | 40.0 ± 2.1 |  |",
        " 8, from scratch, joint, lr 0.001, the last step, test |  | 40.0 ± 2.1 |  |",
    ]
    assert "| 40 labels | 100 labels | 250 labels |" in lines(4, [rows[0] | {"n_labels": 100}])[0], "any number"
    assert not [line for line in lines(3, rows) if "ours" in line], "Table 3 is of all labels"
    dropped = as_row(about | {"dropout": 0.1, "train_split": "train+val", "held_out_split": None})
    ours = [line.split("|", 3)[2] for line in lines(4, [rows[0], dropped]) if "ours" in line]
    assert ours[1] == " 8, fine-tuned, joint, lr 0.001, dropout 0.1, the last step, test ", "and a line of its own"


def test_table_5_compares_recipes():
    table = lines(5, [], recipes=[get_recipe("cifar10_nano_ar_16")])
    assert "| iGPT-L | auto-regressive | 48x48 | 0.01 | `igpt_l_ar_48`: 0.01 | 0 |" in table
    assert table[-1] == "| 8 x 128 | auto-regressive | 16x16 |  | `cifar10_nano_ar_16`: 0.003 |  |"
    assert all(line.endswith("| 0 |") for line in table[2:-1]), "our recipes learn at the paper's rates"


@pytest.mark.parametrize("number", TITLES)
def test_every_line_has_every_column(number):
    table = lines(number, [probe()])
    assert len({line.count("|") for line in table}) == 1
