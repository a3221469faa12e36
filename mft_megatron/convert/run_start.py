"""The checkpoint, the model of ``--hf-checkpoint`` and the adapter that a training run starts from, opened."""

import dataclasses
import os
from typing import TYPE_CHECKING

from mft_megatron.arguments.command import CommandLine
from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.arguments.groups.lora import LoraArguments
from mft_megatron.arguments.start import Start, find_checkpoint, reads_adapter, reads_hf_model

if TYPE_CHECKING:
    from mft_megatron.convert.huggingface.weight_source import HuggingFaceSource
    from mft_megatron.convert.peft.weight_source import AdapterSource


def open_start(command_line: CommandLine) -> "tuple[Start, HuggingFaceSource | None, AdapterSource | None]":
    """Find the checkpoint of a run, and open the model of ``--hf-checkpoint`` and the adapter of ``--hf-adapter``.

    Each is opened once, because that reads weights, and only if the run reads it. Torch is imported only then.
    """
    options, lora = command_line.group(CheckpointArguments), command_line.group(LoraArguments)
    start, model, adapter = Start(find_checkpoint(options)), None, None
    if options.hf_checkpoint is not None and reads_hf_model(options, start.checkpoint):
        from mft_megatron.convert.huggingface.weight_source import HuggingFaceSource

        model = HuggingFaceSource(options.hf_checkpoint)
        start = dataclasses.replace(start, hf_model=model.info)
        for note in model.notes if os.environ.get("RANK", "0") == "0" else ():
            print(f"note: {note}")
    resume = start.resume(options)
    if lora.hf_adapter is not None and resume is not None and reads_adapter(lora, start.checkpoint):
        from mft_megatron.convert.peft.weight_source import AdapterSource

        adapter = AdapterSource(lora.hf_adapter, resume.info)
        start = dataclasses.replace(start, adapter=adapter.lora)
    return start, model, adapter
