"""Prints the stages of a scale: what each is for, its command, about its time; at full scale also GPU-hours and disk.

    python tools/paper_plan.py --scale tiny
    python tools/paper_plan.py --scale own --data imagefolder:photos --test_fraction 0.1 -- --recipe cifar10_nano_ar_16 --lr 0.001
    python tools/paper_plan.py --scale full --data /data --gpus 64 --gpu h100-80g
    python tools/paper_plan.py --scale tiny --out runs/paper_tiny --gpus 2 --ds_config ds_configs/zero3_fp32.json --commands

With --commands (for tools/paper.sh and slurm/story_paper.sh) it writes changed recipes into OUT/recipes and prints one line per
unfinished stage: name, batch script, needed stages, file for the printed output, purpose, and the words of the command, separated
by the control character 1F. OUT belongs to one scale, data, size and number of steps; the flags of the machines may change. Scale
own trains one model on any images; flags of train.py follow "--" and name its recipe.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from igpt_ds import cli
from igpt_ds.config import Recipe, recipe_to_dict
from igpt_ds.console import count, duration
from igpt_ds.data.sources import LABELS, has_classes, has_test_images, open_source
from igpt_ds.data.sources.base import UNLABELLED
from igpt_ds.ds_config import load_ds_config
from igpt_ds.errors import InputError, error_text
from igpt_ds.json_files import write_json
from igpt_ds.paper import budget, forecast
from igpt_ds.paper.full import PRECISIONS, Full
from igpt_ds.paper.maker import chosen
from igpt_ds.paper.scales import SCALES, get_scale
from igpt_ds.paper.stage import Flags, Stage, command_line, shown, unfinished
from igpt_ds.paper.stages import stages
from igpt_ds.paper.system import Images, Scale, Training
from igpt_ds.plan.command import add_ds_config_flag, network
from igpt_ds.plan.gpus import GPUS
from igpt_ds.plan.step_time import Cluster
from igpt_ds.sealed import Format
from igpt_ds.train import flags as train_flags
from igpt_ds.train import run_dir

GPU, CPU = "h100-80g", "cpu"
PAPER = Format("igpt_ds.paper", "paper", "choose another directory, or remove this one", version=1, sealed=1, oldest=0)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan, or the commands."""
    args = parse(argv)
    cluster = Cluster(GPUS[GPU if args.gpu == CPU else args.gpu], args.node_gpus, network(args.nodes_nic))
    out = args.out or Path("runs") / f"paper_{args.scale}"
    training = with_images(args) if args.training and args.scale == "own" and args.data else args.training
    given = Full().precision if args.scale == "cifar" else args.precision
    paper = Full(given, args.search_rates, args.web, args.web_keep)
    scale = get_scale(args.scale, args.data, args.n_px, args.steps, training, paper)
    if args.scale == "cifar":
        scale = replace(scale, precision=args.precision)
    if scale.name == "full" and not Path(args.data).is_dir():  # it may exist on the machine that runs the stages
        print(
            f"warning: --data {args.data} is not a directory on this machine; give another --data if it should be",
            file=sys.stderr,
        )

    def machine(recipe: Recipe) -> Flags:
        if args.ds_config:
            return {"ds_config": args.ds_config}
        own = budget.FP32 if scale.precision == "fp32" else None
        return budget.machine_flags(budget.trained(recipe, args.gpus, cluster, ds_config=own))

    found = stages(scale, out, machine)
    if args.commands and not args.dry_run:
        begin(out, scale, asked(args, scale))
        left = unfinished(found)
        names = {stage.name for stage in left}
        for stage in left:
            line = command_line(stage, [name for name in stage.needs if name in names], forecast.purpose(stage))
            sys.stdout.buffer.write(os.fsencode(f"{line}\n"))  # for a script: as it is, with its separators
        return
    print(describe_stages(found, out, scale, machine_of(args, cluster, scale)))
    if scale.name == "full":
        found_costs = budget.costs(scale, args.gpus, cluster)
        print(f"\n{budget.describe_costs(found_costs, args.gpus, cluster)}")
        print(f"precision {paper.precision}; {other_precision(args, paper, cluster)}")


def machine_of(args: argparse.Namespace, cluster: Cluster, scale: Scale) -> forecast.Machine:
    """What the forecast of times assumes."""
    if args.gpu != CPU:
        return forecast.gpus(args.gpus, cluster, scale)
    bf16 = args.ds_config and (load_ds_config(args.ds_config).get("bf16") or {}).get("enabled")
    return forecast.cpu(args.gpus, "bf16" if bf16 else "fp32", scale.precision)


def other_precision(args: argparse.Namespace, paper: Full, cluster: Cluster) -> str:
    """What the plan costs in the other precision."""
    other = next(name for name in PRECISIONS if name != paper.precision)
    scale = get_scale("full", args.data, None, args.steps, None, replace(paper, precision=other))
    try:
        hours = f"{sum(cost.gpu_hours for cost in budget.costs(scale, args.gpus, cluster)):,.0f} GPU-hours"
    except InputError as error:
        hours = str(error)
    return f"--precision {other}: {hours}. The paper computed in float32 (A.1); bf16 here has fp32 master weights"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    scale = "own: one model on your images; tiny: digits; cifar: small models; full: the paper"
    parser.add_argument("--scale", required=True, choices=SCALES, help=scale)
    data = "own: KIND:WHERE; cifar: KIND:WHERE of CIFAR-10; full: the directory with ILSVRC2012, CIFAR-10, CIFAR-100, STL-10"
    parser.add_argument("--data", help=data)
    parser.add_argument("--name", help="own: name of the images in tables and figures (default: that of their folder)")
    parser.add_argument("--labels", choices=LABELS, default="use", help="own: ignore: train without labels, and probe nothing")
    what = "own: share of the images for testing; probes then are fitted on all others, and read the test images once"
    parser.add_argument("--test_fraction", type=float, help=what)
    parser.add_argument("--out", type=Path, help="directory for all results (default: runs/paper_SCALE)")
    parser.add_argument("--n_px", type=int, help="cifar: image size in pixels, 16 or 32 (default: 16)")
    parser.add_argument(
        "--steps", type=int, help="steps of each training and fine-tuning, for a rehearsal (default: the scale's own)"
    )
    parser.add_argument("--gpus", type=int, default=64, help="ranks of each training")
    parser.add_argument("--gpu", choices=(*GPUS, CPU), default=GPU, help="kind of GPU; cpu: two cores, for the small scales")
    parser.add_argument("--node_gpus", type=int, default=8, help="GPUs per node")
    parser.add_argument("--nodes_nic", default="8x400", help="network cards per node x Gbit/s of each")
    precision = "full: of trainings and features (default: bf16; fp32, the paper's, is several times as slow); cifar: of features"
    parser.add_argument("--precision", choices=PRECISIONS, help=f"{precision} (default: fp32; bf16 on a CPU that has it)")
    rates = "full: also search the learning rates of pre-training (paper 3.4), instead of taking Table 5's"
    parser.add_argument("--search_rates", action="store_true", help=rates)
    web = "full: web images for XL beside ImageNet (paper 3; default: ImageNet alone)"
    parser.add_argument("--web", metavar="KIND:WHERE", help=web)
    keep = "full: share of the web images to keep, those most like ImageNet by the features of S (default: 1)"
    parser.add_argument("--web_keep", type=float, metavar="SHARE", default=1.0, help=keep)
    best = "ds_config of every training (default: the plan's choice for each recipe)"
    add_ds_config_flag(parser, best)
    parser.add_argument("--dry_run", action="store_true", help="print the plan, also with --commands; nothing is run or written")
    parser.add_argument("--commands", action="store_true", help="print the unfinished stages as commands, for a script")
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    args = parser.parse_args([*given[:cut], *(["--dry_run"] if "--dry_run" in given[cut:] else [])])
    args.training = asked_training([word for word in given[cut + 1 :] if word != "--dry_run"]) if cut < len(given) else None
    args.precision = args.precision or _usual_precision(args.scale)
    if args.scale != "own" and (args.name or args.labels != "use" or args.test_fraction is not None):
        raise InputError(f"--name, --labels and --test_fraction belong to scale own; leave them out for scale {args.scale}")
    if args.gpu == CPU and args.scale == "full":
        raise InputError(f"--gpu {CPU} does not train scale full; choose a GPU: {', '.join(GPUS)}")
    for name in ("gpus", "node_gpus"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.ds_config:
        load_ds_config(args.ds_config)  # refuses what no training would take
    return args


def asked_training(words: Sequence[str]) -> Training:
    """The training that flags of train.py ask for.

    Raises:
        ValueError: what train.py refuses, a flag that the stages give, or one that ends the training before its last step.
    """
    given = {word.split("=")[0] for word in words}
    for name in ("--data", "--run_dir", "--resume"):
        if name in given:
            raise InputError(f"{name} after -- is given by the stages themselves; leave it out")
    if "--stop_at_step" in given:
        raise InputError(
            "--stop_at_step after -- would end the training before its last step; leave it out, or run train.py alone"
        )
    args = train_flags.parse("flags of train.py, after --", [*words, "--dry_run"])
    return Training(train_flags.choose_recipe(args), tuple(words))


def with_images(args: argparse.Namespace) -> Training:
    """The training with what the images have: labels, test images. Warns where they have no labels, or cannot be read here."""
    images = {"name": args.name, "labels": args.labels, "test_fraction": args.test_fraction}
    try:
        source = open_source(args.data, args.labels)
        probes, tests = has_classes(source), bool(args.test_fraction) or has_test_images(source)
    except (ValueError, OSError) as error:  # the machine that runs the stages may have it
        print(f"warning: {error}; the plan is that of labelled images", file=sys.stderr)
        return replace(args.training, tests=bool(args.test_fraction), **images)
    if not probes:
        why = "the images have no labels" if source.classes == UNLABELLED else f"all images are of class {source.classes[0]!r}"
        print(f"no probes: {why}, in {args.data}; training, features, samples and the report need none", file=sys.stderr)
    return replace(args.training, probes=probes, tests=tests, **images)


def _usual_precision(scale: str) -> str:
    # Of a plan without --precision. A CPU's processor decides in tools/paper.sh.
    return "fp32" if scale == "cifar" else Full().precision


def asked(args: argparse.Namespace, scale: Scale) -> dict[str, object]:
    """The flags that must stay the same in one directory. What earlier versions did not know is there only where it differs."""
    flags: dict[str, object] = {name: getattr(args, name) or None for name in ("scale", "data", "n_px", "steps")}
    usual = {**vars(Full()), "precision": _usual_precision(args.scale)}
    flags |= {name: getattr(args, name) for name, value in usual.items() if getattr(args, name) != value}
    if not args.training:
        return flags
    images, recipe = scale.images[0], args.training.recipe
    word = recipe.name.split("_")[0]
    earlier = args.data.split(":")[0] if word == "igpt" else word  # the name that earlier versions gave
    more = {"name": images.name if images.name != earlier else None, "labels": args.labels if args.labels != "use" else None}
    more |= {"test_fraction": args.test_fraction, "eval_split": images.eval_split if images.eval_split != "val" else None}
    return flags | {"training": " ".join(args.training.words)} | {key: value for key, value in more.items() if value is not None}


def begin(out: Path, scale: Scale, wanted: dict[str, object]) -> None:
    """Claims the directory for this scale and writes the changed recipes.

    Raises:
        ValueError: the directory belongs to another scale, data, size or number of steps.
    """
    file = out / "paper.json"
    if file.exists():
        found = PAPER.read(file)
        if found != wanted and not may_change(out, found, wanted):
            words = ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)
            names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
            now = ", ".join(f"{name} {wanted.get(name) or 'not given'}" for name in names)
            raise InputError(f"{out} holds the paper of {words}; choose another directory, or remove this one (now: {now})")
    for system in scale.systems if scale.name != "own" else ():
        if target := chosen(system.recipe, out).get("config"):
            Path(str(target)).parent.mkdir(parents=True, exist_ok=True)
            write_json(Path(str(target)), recipe_to_dict(system.recipe))
    file.parent.mkdir(parents=True, exist_ok=True)
    PAPER.write(file, wanted)


def may_change(out: Path, found: dict[str, object], wanted: dict[str, object]) -> bool:
    """Whether only the training differs, on the same shards, and has no checkpoint yet."""
    old, new = found.get("training"), wanted.get("training")
    if not old or not new or found | {"training": new} != wanted:
        return False
    if any(run_dir.has_checkpoints(run) for run in (out / "runs").glob("*")):
        return False
    before, after = (asked_training(str(words).split()).recipe.model for words in (old, new))
    return (before.n_px, before.n_vocab) == (after.n_px, after.n_vocab)


def describe_stages(found: Sequence[Stage], out: Path, scale: Scale, machine: forecast.Machine) -> str:
    """After a summary, for each stage its purpose, its section of the paper, its precision, its time and its command."""
    left = {stage.name for stage in unfinished(found)}
    done = len(found) - len(left)
    counts = {images.id: images_of(images, out / "shards" / images.id) for images in scale.images}
    times = [0.0 if stage.name not in left else forecast.seconds(stage, scale, machine, counts) for stage in found]
    lines = []
    for stage, time in zip(found, times, strict=True):
        section = f"paper {stage.section}" if stage.section else "not in the paper" if scale.name != "own" else ""
        ends = stage.name not in left
        takes = "finished" if ends else "time unknown" if time is None else f"about {rounded(time)}"
        about = "; ".join(filter(None, (forecast.purpose(stage), section, forecast.precision(stage), takes)))
        lines.append(f"{'done' if ends else 'to do':<6}{stage.name}: {about}")
        if not ends:
            lines.append(f"      {shown(stage)}")
    models = count(len(scale.systems), "model")
    head = f"the paper at scale {scale.name} in {out}: {models}, {count(len(found), 'stage')}, {done} finished"
    unknown = times.count(None)
    more = f", and {count(unknown, 'stage')} of unknown time" if unknown else ""
    total = f"about {rounded(sum(time or 0.0 for time in times))}{more} on {machine.words}, one stage after another"
    last = f"to do: {count(len(found) - done, 'stage')}, {total}; estimated, an idle machine assumed"
    return "\n".join([head, forecast.by_kind(found), *lines, last])


def images_of(images: Images, shards: Path) -> dict[str, int]:
    """The images of each split; empty, with a warning, if the source cannot be read on this machine."""
    try:
        return forecast.count_images(images, shards)
    except (InputError, OSError) as error:
        print(f"warning: the images of {images.id} cannot be counted: {error_text(error)}", file=sys.stderr)
        return {}


def rounded(seconds: float) -> str:
    """A duration in steps that an estimate deserves."""
    step = 5 if seconds < 60 else 60 if seconds < 7200 else 600
    return duration(max(step, step * round(seconds / step)))


if __name__ == "__main__":
    cli.run(main)
