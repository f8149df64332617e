"""Every experiment, ablation and protocol of the paper, and the stages of scale full that repeat it.

In: nothing. Out: `EXPERIMENTS`, in the paper's order. docs/paper.md shows the same list with a command for each; a test compares
both with the stages of full.py. M. Chen et al., Generative Pretraining from Pixels, ICML 2020 (the second version of its text).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Experiment:
    """One statement of the paper that can be repeated."""

    section: str
    statement: str
    stages: str = ""  # a regular expression that the names of the stages match; "": none
    flag: str = ""  # of `make paper SCALE=full` (ARGS) that adds the stages
    why: str = ""  # there is no stage


EXPERIMENTS = (
    Experiment("2.1", "Next-pixel prediction in raster order", "train-igpt_(s|m|l)_ar_32"),
    Experiment("2.1", "BERT with 15 % of the pixels masked", "train-igpt_(s|m|l)_bert_32"),
    Experiment("2.3", "Fine-tuning on the joint loss; on the class loss alone", "igpt_l_ar_32-cifar10_32-(finetuned|clf)"),
    Experiment("2.4", "Linear probes of every layer n^l, averaged over positions", "features-igpt_l_ar_32-1000000-.*"),
    Experiment("3", "100 million web images, filtered to be like ImageNet, for XL", "shards-web_64", "--web"),
    Experiment("3.1", "ImageNet: 4 % validate, the ILSVRC validation images test", "shards-imagenet_(32|48|64)"),
    Experiment("3.1", "CIFAR and STL-10: 10 % validate; STL-10's unlabelled images unused", "shards-(cifar10|cifar100|stl10)_32"),
    Experiment("3.1", "ImageNet: short side 256 to 384, random crop of 224", "shards-imagenet_(32|48|64)_views"),
    Experiment("3.1", "CIFAR: padded by 4, cropped, mirrored in fine-tuning", "igpt_l_(ar|bert)_32-cifar100?_32-finetuned"),
    Experiment("3.1", "Validation images return to training for the final run", "train-igpt_(s|m|l|xl)_(ar|bert)_(32|48|64)"),
    Experiment("3.2", "A palette of 512 colours by k-means", "palette"),
    Experiment("3.3", "S, M, L and XL", "train-igpt_(s|m|l|xl)_ar_(32|48|64)"),
    Experiment(
        "3.3",
        "Weights drawn as in Sparse Transformer",
        why="the released code draws them otherwise; its way is the default, the paper's is a flag",
    ),
    Experiment(
        "3.4", "Batch 128 for 1M steps, XL 64 for 2M; Adam, warm-up, cosine", "train-igpt_(s|m|l|xl)_(ar|bert)_(32|48|64)"
    ),
    Experiment(
        "3.4",
        "Rates 0.01, 0.003, ... until the final loss rises",
        "search-igpt_(s|m|l|xl)_(ar|bert)_(32|48|64)",
        "--search_rates",
    ),
    Experiment("3.4", "ImageNet probes by SGD, a million steps, rates 30, 10, 3, ...", "probe-.*-imagenet_(32|48|64)-layers-.*"),
    Experiment("3.4", "CIFAR and STL-10 probes by L-BFGS", "probe-igpt_l_ar_32-1000000-(cifar10|cifar100|stl10)_32"),
    Experiment("4.1", "Figure 2: accuracy by layer; the last layer of L is 2.4 points lower", "figure-datasets"),
    Experiment(
        "4.2",
        "Figure 3: accuracy against loss at 65K, 131K, 262K, 524K and 1000K steps",
        "(likelihood|probe)-igpt_.*_ar_32-(65|131|262|524|1000)000(-cifar10_32)?|figure-loss",
    ),
    Experiment(
        "4.3",
        "Table 1: CIFAR-10 96.3, CIFAR-100 82.8, STL-10 95.5",
        "probe-igpt_l_ar_32-1000000-(cifar10|cifar100|stl10)_32|tables",
    ),
    Experiment("4.3", "Wide ResNet as a supervised baseline", why="another network; the tables show its published numbers"),
    Experiment(
        "4.4",
        "Table 2: S 41.9, M 54.5, L 60.3 and 65.2, XL 68.7",
        "probe-igpt_(s|m|l|xl)_ar_(32|48|64)-.*-imagenet_(32|48|64)-layers-.*",
    ),
    Experiment("4.4", "Five layers of XL side by side: 72.0", "probe-igpt_xl_ar_64-2000000-imagenet_64-concat"),
    Experiment("4.5", "The class head on the best layer", "igpt_l_ar_32-cifar10_32-best_layer"),
    Experiment("4.5", "Table 3: CIFAR-10 99.0, CIFAR-100 88.5", "igpt_l_ar_32-cifar100?_32-finetuned"),
    Experiment("4.5", "ImageNet 66.3 at 32x32, 72.6 at 48x48", "igpt_l_ar_(32|48)-imagenet_(32|48)_views-finetuned"),
    Experiment("4.5", "From scratch at 48x48 in 18 epochs: 53.2", "(search-)?igpt_l_ar_48-imagenet_48_views-from_scratch"),
    Experiment("4.5", "The rate of fine-tuning is searched again", "search-.*-finetuned"),
    Experiment("4.5", "Dropout in fine-tuning", "igpt_l_ar_32-cifar10_32-dropout"),
    Experiment("4.6", "BERT probes: 1 point lower on CIFAR-10, 6 on ImageNet", "probe-igpt_l_bert_32-.*"),
    Experiment("4.6", "BERT fine-tuned: CIFAR-10 98.6, ImageNet 66.5", "igpt_l_bert_32-.*-finetuned"),
    Experiment(
        "4.6", "Votes of five masks; Figure 4", "probe-igpt_l_bert_32-.*-mask_vote|igpt_l_bert_32-.*-finetuned|figure-objectives"
    ),
    Experiment("4.7", "Table 4: 40, 250 and 4000 labels, five subsets each", "probe-igpt_l_ar_32-1000000-cifar10_32-low_data"),
    Experiment("4.7", "Fine-tuned on 40 labels: 42.1", "igpt_l_ar_32-cifar10_32-40_labels"),
    Experiment("A.1", "Table 5: learning rates", "tables"),
    Experiment("A.1", "Adam's second beta of 0.999 makes the loss spike", why="a run that is expected to fail"),
    Experiment("A.1", "A weight decay of 0.01", "(train|probe)-igpt_s_ar_32_weight_decay.*"),
    Experiment("A.1", "float32 instead of float16", "(train|probe)-igpt_s_ar_32_fp(16|32).*"),
    Experiment("A.1", "Tied embeddings", "(train|probe)-igpt_s_ar_32_tied.*"),
    Experiment("A.1", "Heads that do not start at zero", "(train|probe)-igpt_s_ar_32_head.*"),
    Experiment("A.1", "Masking rates of 20, 25, 30 and 35 %", "(train|probe)-igpt_s_bert_32_mask_(20|25|30|35).*"),
)
