"""Checkpoints and run folders as text for a terminal."""

from collections.abc import Iterator, Sequence

from .facts import Checkpoint, Facts


def describe_checkpoint(checkpoint: Checkpoint) -> Iterator[str]:
    """Lines about one checkpoint."""
    info = checkpoint.info
    yield f"{checkpoint.path}: {_state(checkpoint)}"
    if info is not None:
        a = info.architecture
        named = (("num_layers", "layers"), ("hidden_size", "hidden size"), ("num_experts", "experts"))
        sizes = [f"{word} {a[name]}" for name, word in named if a.get(name)]
        model = ", ".join([info.source or "trained from random weights", *sizes])
        yield f"  step {info.iteration:,}, {info.consumed_samples:,} packs, {info.skipped_steps} steps skipped"
        yield f"  model: {model}; vocabulary {info.vocab_size:,}; {info.precision}"
        if info.lora is not None:
            where = "beside its model" if info.has_base else f"alone; their model: {info.base}"
            yield f"  adapters: {info.peft_type}, {where}"
        states = f"{info.optimizer}" if info.has_optimizer else "none"
        yield f"  optimizer states: {states}; random states: {'yes' if info.has_rng else 'no'}"
        layout = ", ".join(f"{name} {size}" for name, size in info.layout.items() if size != 1)
        yield f"  written on: {layout or 'one process'}"
        data = (
            f"data set {info.dataset_hash[:16]}, seed {info.seed}, order {info.order_version}"
            if info.dataset_hash
            else "none"
        )
        yield f"  data: {data}; global batch {info.global_batch_size}"
        yield f"  format version {info.format_version}"
    entries = ", ".join(f"{count:,} {name}" for name, count in checkpoint.entries.items())
    yield f"  {checkpoint.files} files, {checkpoint.size / 1e9:,.2f} GB{f': {entries}' if entries else ''}"
    if checkpoint.unlisted:
        yield f"  not of the checkpoint: {', '.join(checkpoint.unlisted)}"
    if checkpoint.compared:
        compared = checkpoint.compared.removeprefix(f"{checkpoint.path}: ")
        # the option of runs has another name here
        yield f"  {compared.replace('--verify-checkpoint', '--verify')}"


def describe_run(run: Facts, checkpoints: Sequence[Checkpoint]) -> Iterator[str]:
    """A table of the checkpoints of a run folder, and lines about the run."""
    yield f"{run['folder']}: newest {run['newest'] or 'not named'}, best {run['best'] or 'none'}"
    for name in ("owner", "outcome"):
        if run[name] is not None:
            value = run[name]
            if name == "outcome":
                step = "" if value["step"] is None else f" at step {value['step']}"
                value = f"{value['name']}{step}: {value['reason']} ({value['time']}, {value['host']})"
            yield f"{name}: {value}"
    if run["unfinished"]:
        yield f"unfinished: {', '.join(run['unfinished'])}"
    head = ("checkpoint", "step", "packs", "GB", "precision", "optimizer", "layout", "state")
    rows = [head, *(_row(checkpoint, run) for checkpoint in checkpoints)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    for row in rows:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])


def _row(checkpoint: Checkpoint, run: Facts) -> tuple[str, ...]:
    info, size = checkpoint.info, f"{checkpoint.size / 1e9:,.2f}"
    marks = [word for word in ("newest", "best") if run[word] == checkpoint.path.name]
    name = " ".join([checkpoint.path.name, *(f"({word})" for word in marks)])
    if info is None:
        return name, "?", "?", size, "?", "?", "?", _state(checkpoint)
    short = {"world": "ranks", "tensor": "TP", "pipeline": "PP", "context": "CP", "data": "DP", "expert": "EP"}
    layout = " ".join(f"{short[key]} {value}" for key, value in info.layout.items() if key in short and value != 1)
    optimizer = info.optimizer if info.has_optimizer else "no"
    steps = f"{info.iteration:,}", f"{info.consumed_samples:,}"
    return name, *steps, size, info.precision, optimizer, layout or "1 rank", _state(checkpoint)


def _state(checkpoint: Checkpoint) -> str:
    if checkpoint.damage is not None:
        return f"damaged: {checkpoint.damage.removeprefix(f'{checkpoint.path}: ')}"
    if checkpoint.info is not None and not checkpoint.info.manifest:
        return "no hashes"
    if "were not compared" in checkpoint.compared:
        return "not looked at (--verify off)"
    return "whole" if ": whole: " in checkpoint.compared else "no damage found (not all bytes were read)"
