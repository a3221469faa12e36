"""The description of a checkpoint that a run saves, from its options, its data set and its progress."""

import dataclasses
import os
from pathlib import Path

from mft_megatron.arguments.table import Arguments
from mft_megatron.data.chat_templates.trained_format import trained_format
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.run_folder.content import content_digest
from mft_megatron.run_folder.description import CheckpointInfo
from mft_megatron.training.progress import Progress
from mft_megatron.training.restarts.differences import options_of, versions

from .data_order import model_vocab_size, order_version


class Describer:
    """Describes the checkpoints of a run."""

    def __init__(self, arguments: Arguments, dataset: PackedDataset):
        self._arguments, self._dataset = arguments, dataset
        self._base, self._base_digest = _base_of_adapters(arguments)

    def describe(self, progress: Progress, best: bool, asked_for: bool, evaluation_due: bool) -> CheckpointInfo:
        """Describe a checkpoint.

        Args:
            progress: after its last step.
            best: as ``CheckpointInfo`` says, like the other two.
            asked_for: likewise.
            evaluation_due: likewise.
        """
        a, ledger = self._arguments, self._dataset.ledger
        trained = trained_format(ledger)
        return CheckpointInfo(
            iteration=progress.step,
            consumed_samples=progress.consumed_samples,
            skipped_steps=progress.skipped_steps,
            architecture=dataclasses.asdict(a.network),
            vocab_size=model_vocab_size(a, self._dataset),
            tokenizer={
                **dataclasses.asdict(ledger.tokenizer),
                "stop_token_ids": ledger.chat_template["stop_token_ids"],
                **({} if trained is None else {"chat_template": dataclasses.asdict(trained)}),
            },
            dataset_hash=self._dataset.dataset_hash,
            seed=a.initialization.seed,
            global_batch_size=a.training.global_batch_size,
            has_optimizer=a.checkpoint.save_optim,
            has_rng=a.checkpoint.save_rng,
            precision=a.precision.name,
            optimizer=a.optimizer_states,
            distributed_optimizer=a.distributed.use_distributed_optimizer,
            decoupled_lr=a.learning_rate.decoupled_lr is not None,
            layout=process_groups.parallel_layout(),
            best=best,
            asked_for=asked_for,
            source=a.resume.info.source if a.resume is not None else "",
            lora=a.adapters.as_dict() if a.adapters is not None else None,
            peft_type=a.lora.peft_type,
            has_base=a.saves_base,
            base=self._base,
            base_digest=self._base_digest,
            order_version=order_version(a, self._dataset),
            mft_normalization=a.multi_task.mft_normalization,
            options=options_of(a),
            versions=versions(),
            evaluation_due=evaluation_due,
        )


def _base_of_adapters(arguments: Arguments) -> tuple[str, str]:
    """The folder of the model that a run's adapters belong to, and its digest if checkpoints do not hold the model.

    Both are empty for a run without adapters, or with a model of its own.
    """
    if arguments.adapters is None or arguments.resume is None:
        return "", ""
    folder = os.path.abspath(arguments.base.path) if arguments.base is not None else arguments.resume.info.base
    return folder, "" if arguments.saves_base else content_digest(Path(folder))
