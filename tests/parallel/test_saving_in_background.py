"""--async-save: a checkpoint has the state at its save, becomes the newest when it is complete, and may fail alone."""

import os
from pathlib import Path

import numpy as np
import pytest

from mft_megatron.run_folder.found import latest_checkpoint
from tests.parallel.run import arguments_for, info_of_step, plans_of, trainer_and_split
from tests.ranks import run_on_ranks
from tests.saved_checkpoints import tensors_of

OPTIONS = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --async-save --save"


def _newest(folder):
    tracker = Path(folder) / "latest_checkpointed_iteration.txt"
    return tracker.read_text().strip() if tracker.exists() else None


def _save_twice(prefix, folder, world):
    """Train a step, save in the background during two more steps, and save again; return facts in order of time."""
    import dataclasses

    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, f"{OPTIONS} {folder}", world)
    facts = []
    with process_groups.process_groups(arguments.distributed, 1):
        trainer, split = trainer_and_split(prefix, f"{OPTIONS} {folder}", world)
        plans = plans_of(split, 1)
        trainer.train_step(split, plans[0], np.ones(4))
        at_once = dataclasses.replace(arguments.checkpoint, async_save=False)
        checkpoint.save(Path(f"{folder}/at once"), trainer, info_of_step(1), at_once)
        writer = checkpoint.Writer(arguments.checkpoint)
        writer.save(Path(folder), trainer, info_of_step(1), None, lambda: facts.append("complete 1"))
        facts.append(_newest(folder))
        for plan in plans[1:3]:
            trainer.train_step(split, plan, np.ones(4))
        process_groups.barrier()
        facts.append("trained")
        writer.save(Path(folder), trainer, info_of_step(3), None, lambda: facts.append("complete 3"))
        process_groups.barrier()
        facts.append(_newest(folder))
        process_groups.barrier()
        while facts[-1] != "complete 3":
            writer.poll()
        facts.append(_newest(folder))
        writer.finish()
        with pytest.raises(ChildProcessError):  # no process is left behind the rank
            os.waitpid(-1, os.WNOHANG)
        return facts


def test_a_checkpoint_has_the_state_at_its_save_and_is_the_newest_when_complete(dataset_prefix, tmp_path):
    for facts in run_on_ranks(2, _save_twice, dataset_prefix, str(tmp_path), 2):
        assert facts == [None, "trained", "complete 1", "1", "complete 3", "3"]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1\n")
    saved, expected = (tensors_of(latest_checkpoint(folder).path) for folder in (tmp_path, tmp_path / "at once"))
    assert saved.keys() == expected.keys()
    assert all(saved[name].equal(expected[name]) for name in saved)


def _die(*args, **kwargs):
    import os

    os._exit(1)


def _lose_a_writer(prefix, folder, world):
    """Complete a save, and start one whose writing process dies on one rank; return the error's message."""
    from mft_megatron.errors import InputError
    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.checkpointing.writers import save_in_progress
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, f"{OPTIONS} {folder}", world)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer, split = trainer_and_split(prefix, f"{OPTIONS} {folder}", world)
        trainer.train_step(split, plans_of(split, 1)[0], np.ones(4))
        writer = checkpoint.Writer(arguments.checkpoint)
        writer.save(Path(folder), trainer, info_of_step(1))
        writer.finish()
        if not process_groups.is_main():
            save_in_progress.write_files = _die
        writer.save(Path(folder), trainer, info_of_step(2))
        try:
            writer.finish()
        except InputError as error:
            return str(error), _newest(folder)


def test_a_save_that_fails_leaves_the_one_before(dataset_prefix, tmp_path):
    for said, newest in run_on_ranks(2, _lose_a_writer, dataset_prefix, str(tmp_path), 2):
        assert "iter_0000002: cannot be written in the background (ChildProcessError: the writing process ended" in said
        assert newest == "1"
    assert {path.name for path in tmp_path.iterdir()} == {"iter_0000001", "latest_checkpointed_iteration.txt"}


def _diverge(prefix, folder):
    """Run until the second evaluation is not finite, while the first checkpoint is still being written."""
    import dataclasses

    import torch

    from mft_megatron.errors import InputError
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.training.pretrain import pretrain
    from mft_megatron.training.saving.saver import Saver

    evaluate, calls = Trainer.evaluate, []

    def worse(self, *arguments):
        calls.append(_newest(folder))
        report = evaluate(self, *arguments)
        return (
            report if len(calls) < 2 else dataclasses.replace(report, loss_K=torch.full_like(report.loss_K, torch.nan))
        )

    Trainer.evaluate, Saver.poll = worse, lambda *_: None
    try:
        pretrain(arguments_for(prefix, f"--eval-interval 1 --save-interval 1 --async-save --save {folder}", 1))
    except InputError as error:
        return calls, str(error)


def test_a_run_that_diverges_completes_what_is_being_written(dataset_prefix, tmp_path):
    calls, said = run_on_ranks(1, _diverge, dataset_prefix, str(tmp_path))[0]
    assert calls == [None, None]
    assert "step 2: a validation loss is not finite" in said
    assert _newest(tmp_path) == "1"
    assert (tmp_path / "iter_0000001" / "mft_checkpoint.json").exists()
