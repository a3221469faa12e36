"""The distribution of the layers over the stages of the pipeline.

A model has pipeline size × virtual stages per rank consecutive stages; stage ``s`` is on rank ``s % pipeline size``. By
default all stages have the same number of layers.
"""

import re

from mft_megatron.arguments.groups.distributed import DistributedArguments

UNEVEN = (
    ("decoder_first_pipeline_num_layers", "--decoder-first-pipeline-num-layers"),
    ("decoder_last_pipeline_num_layers", "--decoder-last-pipeline-num-layers"),
)
COUNTED = (
    ("account_for_embedding_in_pipeline_split", "--account-for-embedding-in-pipeline-split"),
    ("account_for_loss_in_pipeline_split", "--account-for-loss-in-pipeline-split"),
)
LAYOUT = "--pipeline-model-parallel-layout"
_REPEATED = (re.compile(r"\(([^()]*)\)\*(\d+)"), re.compile(r"([^()|*,])\*(\d+)"))
# Longest text after expansion, more than the layers and stages of any model.
_LIMIT = 100_000


def layout_stages(text: str) -> list[str]:
    """Expand ``--pipeline-model-parallel-layout`` into the content of each stage: ``"Et*2|L"`` -> ``["Ett", "L"]``.

    Raises:
        ValueError: the text does not have this form, or is too long.
    """
    expanded = text.replace(",", "").replace(" ", "")
    for repeated in _REPEATED:
        if sum(int(match[2]) * len(match[1]) for match in repeated.finditer(expanded)) > _LIMIT:
            raise ValueError(f"{text!r} is too long")
        expanded = repeated.sub(lambda match: match[1] * int(match[2]), expanded)
    stages = expanded.split("|")
    if set("".join(stages)) - set("EtL"):
        raise ValueError(f"{text!r} is no pipeline layout")
    return stages


def virtual_stages(num_layers: int, options: DistributedArguments) -> int | None:
    """Number of virtual stages on each pipeline rank, from checked options; ``None`` for one."""
    ranks, stages = options.pipeline_model_parallel_size, options.num_virtual_stages_per_pipeline_rank
    if options.pipeline_model_parallel_layout is not None:
        stages = len(layout_stages(options.pipeline_model_parallel_layout)) // ranks
    elif options.num_layers_per_virtual_pipeline_stage is not None:
        stages = (num_layers + num_counted(options)) // (ranks * options.num_layers_per_virtual_pipeline_stage)
    return None if stages == 1 else stages


def layers_of_stages(num_layers: int, options: DistributedArguments) -> list[int]:
    """Number of layers of each virtual stage, in no particular order, from checked options."""
    if options.pipeline_model_parallel_layout is not None:
        return [stage.count("t") for stage in layout_stages(options.pipeline_model_parallel_layout)]
    ranks, virtual = options.pipeline_model_parallel_size, options.num_virtual_stages_per_pipeline_rank or 1
    first, last = options.decoder_first_pipeline_num_layers, options.decoder_last_pipeline_num_layers
    uneven = [layers for layers in (first, last) if layers is not None]
    if uneven:
        rest = ranks - len(uneven)
        return [layers // virtual for layers in uneven + [(num_layers - sum(uneven)) // max(rest, 1)] * rest]
    stages = [(num_layers + num_counted(options)) // (ranks * virtual)] * (ranks * virtual)
    stages[0] -= options.account_for_embedding_in_pipeline_split
    stages[-1] -= options.account_for_loss_in_pipeline_split
    return stages


def num_counted(options: DistributedArguments) -> int:
    """How many of embedding and loss count as a layer when layers are distributed."""
    return sum(getattr(options, name) for name, _ in COUNTED)


def given_options(options: DistributedArguments, names: tuple[tuple[str, str], ...]) -> list[str]:
    """Return those of some options that are given, with their values, as a user types them.

    Args:
        options: the group.
        names: field and spelling of each option.
    """
    values = [(flag, getattr(options, name)) for name, flag in names]
    return [flag if value is True else f"{flag} {value}" for flag, value in values if value not in (None, False)]
