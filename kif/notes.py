"""What is odd about a run though it can be trained: said once, of its data before training, never a reason to stop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

from kif.arena import ParameterArena
from kif.config import RunConfig
from kif.evaluate import normal
from kif.families import Encoded, LanguageModel
from kif.tasks import Example, Task


def warn_of_data(
    config: RunConfig,
    lm: LanguageModel,
    tasks: Sequence[Task],
    scored: Callable[[Task], Sequence[Example]],
    encode: Callable[[Task, Sequence[Example]], Sequence[Encoded]],
) -> None:
    """Warn of rows that are cut, of labels that cannot be learned or written, of batches that cannot be filled.

    Args:
        config: of the run.
        lm: its model.
        tasks: those to train.
        scored: the rows of a task that are scored.
        encode: rows as token ids.
    """
    found: dict[str, list[str]] = {}
    for task in tasks:
        rows = scored(task)
        for kind, what in {
            **_cut(lm, task, encode(task, task.train), encode(task, rows)),
            **_labels(task, rows),
            **_tokens(config, lm, task),
            **_batches(config, task),
        }.items():
            found.setdefault(kind, []).append(f"{task.name}: {what}")
    for kind, lines in found.items():
        warnings.warn(f"{kind}: {'; '.join(lines)}", stacklevel=3)


def warn_of_unreached(names: Sequence[str], arena: ParameterArena) -> None:
    """Warn of trained parameters that no gradient reached in a whole task, if there are any."""
    if not names:
        return
    elements = sum(segment.numel for segment in arena.segments if segment.name in set(names))
    warnings.warn(
        f"no gradient reached {len(names)} of {len(arena.segments)} trained tensors "
        f"({100 * elements / arena.numel:.1f}% of the elements), such as {names[0]}: they learn nothing, and masks by "
        "density count them; leave their layers out of target_modules",
        stacklevel=3,
    )


def _cut(lm: LanguageModel, task: Task, train: Sequence[Encoded], scored: Sequence[Encoded]) -> Mapping[str, str]:
    """Rows whose prompt was cut, and labels that are as long as a label may be."""
    notes = {}
    counts = [(sum(row.truncated for row in rows), len(rows)) for rows in (train, scored)]
    if any(count for count, _ in counts):
        kind = f"texts longer than max_length={lm.max_length} tokens are cut at their end, raise it to keep them whole"
        (cut, total), (cut_scored, total_scored) = counts
        notes[kind] = f"{cut} of {total} rows to train, {cut_scored} of {total_scored} to score"
    full = sum(len(row.target) >= lm.max_target_length for row in train)
    if full and lm.family != "encoder":
        kind = f"labels that fill max_target_length={lm.max_target_length} tokens may be cut, raise it to be sure"
        notes[kind] = f"{full} of {len(train)} rows to train"
    return notes


def _labels(task: Task, scored: Sequence[Example]) -> Mapping[str, str]:
    """Labels to score that no row teaches, and tasks with nothing to tell apart. Free text has no labels."""
    if task.labels is None:
        return {}
    notes = {}
    taught = {row.label for row in task.train}
    unseen = [row for row in scored if not taught & set(row.references)]
    if unseen:
        listed = _listed([repr(name) for name in dict.fromkeys(row.label for row in unseen)])
        kind = "labels that no training row has cannot be learned, add rows for them or do not score them"
        notes[kind] = f"{listed} in {len(unseen)} of {len(scored)} rows to score"
    if len(taught) == 1:
        kind = "only one label in all training rows, so that the task teaches to answer it always"
        notes[kind] = f"{next(iter(taught))!r} in {len(task.train)} rows"
    return notes


def _tokens(config: RunConfig, lm: LanguageModel, task: Task) -> Mapping[str, str]:
    """Labels that are the same to the model, and labels that it cannot write. Which case they have does not matter."""
    if task.labels is None:
        return {}
    notes = {}
    known = lm.label_tokens(task)
    same: dict[tuple[int, ...], list[str]] = {}
    for label, ids in known.items():
        same.setdefault(ids, []).append(label)
    alike = [names for names in same.values() if len(set(map(normal, names))) > 1 and set(names) & set(task.labels)]
    if alike:
        kind = "labels of equal tokens cannot be told apart, name them otherwise or take another model"
        notes[kind] = _listed([" = ".join(map(repr, names)) for names in alike])
    if lm.family != "encoder" and config.eval_mode == "generate" and task.metric == "accuracy":
        texts = lm.tokenizer.batch_decode(list(known.values()), skip_special_tokens=True)
        # those that are cut have a note of their own
        lost = [
            f"{label!r} becomes {text.strip()!r}"
            for (label, ids), text in zip(known.items(), texts, strict=True)
            if normal(text) != normal(label) and len(ids) < lm.max_target_length
        ]
        if lost:
            kind = "labels that the tokenizer cannot write are never answered, rename them or use eval_mode rank"
            notes[kind] = _listed(lost)
        # an answer is one without the end-of-sequence token, too
        most = config.max_new_tokens
        long = [f"{label!r} has {len(ids) - 1}" for label, ids in known.items() if len(ids) - 1 > most]
        if long:
            kind = f"labels of more than max_new_tokens={most} tokens are never answered whole, raise it"
            notes[kind] = _listed(long)
    return notes


def _listed(found: Sequence[str]) -> str:
    return ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")


def _batches(config: RunConfig, task: Task) -> Mapping[str, str]:
    if config.batch_size <= len(task.train):
        return {}
    kind = f"fewer rows than batch_size={config.batch_size}, so that every step takes all of them"
    return {kind: f"{len(task.train)} rows to train"}
