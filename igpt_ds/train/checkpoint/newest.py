"""Finds the newest checkpoint that is whole, on all ranks together and in every directory of a run.

Each candidate is compared with its manifest. One that is damaged or incomplete is named, and the next one follows at once, from
whichever directory. With a disk for each node the parts of lost nodes come from copies (collect.py). Called by
train/checkpoint/load.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.errors import InputError, error_text
from igpt_ds.train.checkpoint.collect import collect_newest
from igpt_ds.train.checkpoint.directory import refuse_to_start_over, say_skipped, search
from igpt_ds.train.checkpoint.manifest import Checkpoint, FileEntry, damaged_files
from igpt_ds.train.checkpoint.removal import remove_together
from igpt_ds.train.checkpoint.tiers import Tier, run_tier
from igpt_ds.train.run_dir import check_owner


def newest_state(tiers: Sequence[Tier]) -> Checkpoint | None:
    """The newest checkpoint whose files hold what was written; None if none was saved. All ranks share the reading.

    Removes the leftovers of interrupted saves. Newer checkpoints that are damaged are named on stderr. Once an older one is
    verified, they are renamed to `.broken` in the run directory, and removed in the fast one.

    Args:
        tiers: the run directory first.

    Raises:
        SharedError: the run directory has checkpoints but none is usable, or one cannot be read or has another version; nothing
            is changed then.
    """
    directory = tiers[0].directory
    dist.from_rank_0(lambda: check_owner(tiers[0].run_dir))
    remove_together(dist.from_rank_0(lambda: sorted(directory.glob("step-*.partial"))))
    skipped: dict[Tier, list[str]] = {tier: [] for tier in tiers}
    for tier in tiers:
        tier.remove_leftovers()
    found = {tier: _search(tier, None, skipped[tier]) for tier in tiers}
    in_parts = next((tier for tier in tiers if tier.ranks is not None), None)
    before: int | None = None
    while True:
        newest = max((one.manifest.step for one in found.values() if one is not None), default=-1)
        if in_parts and (tried := collect_newest(in_parts, tiers[0], newest, before, skipped[in_parts])) is not None:
            before, found[tiers[0]] = tried, _search(tiers[0], tried + 1, [])
            continue
        # Of one step the run directory's: the end of the run relies on it, and removes the fast one.
        candidates = [(one.manifest.step, not tier.fast, tier, one) for tier, one in found.items() if one is not None]
        if not candidates:
            dist.from_rank_0(partial(refuse_to_start_over, directory, skipped[tiers[0]]))
            dist.from_rank_0(lambda: say_skipped([reason for reasons in skipped.values() for reason in reasons]))
            for tier in tiers[1:]:
                tier.forget_newer(0)  # they would push out the states that this start saves
            return None
        step, _, tier, one = max(candidates, key=lambda candidate: candidate[:2])
        damaged = damage(one, tier)
        if not damaged:
            dist.from_rank_0(lambda: say_skipped([reason for reasons in skipped.values() for reason in reasons]))
            for each in tiers:
                each.forget_newer(step - 1 if tier.fast and not each.fast else step)
            return one
        skipped[tier].append(damaged)
        found[tier] = _search(tier, step, skipped[tier])


def _search(tier: Tier, before: int | None, reasons: list[str]) -> Checkpoint | None:
    """The newest candidate of a tier, after a step that is none any more. With a disk for each node, all nodes must have it.

    Args:
        before: its step must be lower; None: any.
        reasons: gets why newer ones are no candidates.
    """
    if tier.ranks is None:
        found, skipped = dist.from_rank_0(lambda: _look(tier, before))
        reasons += skipped
        return found
    while True:
        answers = dist.gather_objects(_look(tier, before) if tier.leads else (None, []))
        firsts = [answers[first] for first in sorted(set(dist.gather_objects(tier.members[0])))]
        reasons += [reason for _, skipped in firsts for reason in skipped]
        mine: Checkpoint | None = answers[tier.members[0]][0]
        steps = {None if one is None else one.manifest.step for one, _ in firsts}
        if mine is None or None in steps:
            if steps != {None}:
                reasons.append(f"{tier.directory}: not every node has a state there")
            return None
        if len(steps) > 1:
            before = min(step for step in steps if step is not None) + 1
            continue
        before = mine.manifest.step
        if len({one.manifest.start for one, _ in firsts if one is not None}) > 1:
            reasons.append(f"{mine.path}: the parts on the nodes are of two starts")
        elif all(dist.gather_objects(_has_files(mine))):
            return mine
        else:
            reasons.append(f"{mine.path} was saved by other ranks than those of its nodes now")


def _look(tier: Tier, before: int | None) -> tuple[Checkpoint | None, list[str]]:
    """The newest candidate that this rank sees, and why newer ones are none. No error of a fast directory ends the run."""
    if not tier.fast:
        return search(tier.directory, before)
    reasons = list[str]()
    try:
        while True:
            found, skipped = search(tier.directory, before, (InputError, OSError))
            reasons += skipped
            if found is None:
                return None, reasons
            if not tier.has_branch(found.manifest):
                reasons.append(f"{found.path} was left by a start that began at an earlier step")
            elif tier.ranks is None and not found.manifest.is_whole:
                reasons.append(f"{found.path} has the files of one node, and the other nodes are gone")
            else:
                return found, reasons
            before = found.manifest.step
    except OSError as error:
        return None, [*reasons, error_text(error)]


def _has_files(checkpoint: Checkpoint) -> bool:
    """Whether the files of this rank are in a checkpoint of a node."""
    manifest = checkpoint.manifest
    mine = ("optim", dist.rank()) in {entry.of_rank for entry in manifest.files}
    return manifest.world_size == dist.world_size() and manifest.stage == 3 and mine


def _files_of(tier: Tier, checkpoint: Checkpoint) -> list[FileEntry]:
    """The files that the ranks of a directory load: not the copies of another node's."""
    files, ranks = checkpoint.manifest.files, tier.ranks
    return [entry for entry in files if ranks is None or (entry.of_rank and entry.of_rank[1] in ranks)]


def damage(checkpoint: Checkpoint, tier: Tier | None = None) -> str:
    """Which file of a checkpoint does not hold what was written, in words; "" if all do. All ranks share the reading.

    Args:
        tier: where it is; None: in the run directory.

    Raises:
        SharedError: a file of the run directory cannot be read, which says nothing about its content.
    """
    tier = tier or run_tier(checkpoint.path.parent.parent)
    mine, error, members = [], "", tier.members
    try:
        share = _files_of(tier, checkpoint)[members.index(dist.rank()) :: len(members)]
        mine = [str(checkpoint.path / name) for name in damaged_files(checkpoint.path, share)]
    except OSError as caught:
        error = error_text(caught) if tier.fast else f"{caught.filename}: {caught.strerror}"
    dist.meet()
    answers = dist.gather_objects((mine, error))
    for rank, (_, error) in enumerate(answers):
        if error and tier.fast:
            return f"{checkpoint.path} cannot be read on rank {rank}: {error}"
        if error:
            raise SharedError(
                f"{error}: rank {rank} cannot read it, and nothing was changed; repair the disk and run the same command again, "
                f"or move {checkpoint.path} away to continue from the previous checkpoint"
            )
    found = [(name, rank) for rank, (names, _) in enumerate(answers) for name in names]
    of_node = f", on the node of rank {found[0][1]}" if found and tier.ranks is not None else ""
    return f"{found[0][0]} is damaged (sha256 differs{of_node})" if found else ""
