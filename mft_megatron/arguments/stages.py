"""How the layers are shared out among the stages of the pipeline.

A model has pipeline size × virtual stages per rank stages, one behind the other; stage ``s`` is on rank ``s % pipeline
size``. By default all have as many layers.
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
# stages and layers of a layout; more than any model has
_LIMIT = 100_000


def layout_stages(text: str) -> list[str] | None:
    """What each stage of ``--pipeline-model-parallel-layout`` holds, a letter each: ``"Et*2|L"`` -> ``["Ett", "L"]``.

    Returns:
        ``None`` where the text is not of this form.
    """
    text = text.replace(",", "").replace(" ", "")
    for repeated in _REPEATED:
        if sum(int(match[2]) * len(match[1]) for match in repeated.finditer(text)) > _LIMIT:
            return None
        text = repeated.sub(lambda match: match[1] * int(match[2]), text)
    stages = text.split("|")
    return None if set("".join(stages)) - set("EtL") else stages


def virtual_stages(num_layers: int, layout: DistributedArguments) -> int | None:
    """Stages on each pipeline rank, from the options that say it; ``None`` for one. They have been checked."""
    if layout.pipeline_model_parallel_layout is not None:
        stages = len(layout_stages(layout.pipeline_model_parallel_layout)) // layout.pipeline_model_parallel_size
    elif layout.num_layers_per_virtual_pipeline_stage is not None:
        shared = num_layers + counted(layout)
        stages = shared // (layout.pipeline_model_parallel_size * layout.num_layers_per_virtual_pipeline_stage)
    else:
        stages = layout.num_virtual_stages_per_pipeline_rank
    return None if stages == 1 else stages


def layers_of_stages(num_layers: int, layout: DistributedArguments) -> list[int]:
    """How many layers the stages have, virtual ones apart, in no order; the options have been checked."""
    if layout.pipeline_model_parallel_layout is not None:
        return [stage.count("t") for stage in layout_stages(layout.pipeline_model_parallel_layout)]
    ranks, virtual = layout.pipeline_model_parallel_size, layout.num_virtual_stages_per_pipeline_rank or 1
    first, last = layout.decoder_first_pipeline_num_layers, layout.decoder_last_pipeline_num_layers
    own = [number for number in (first, last) if number is not None]
    if own:
        rest = ranks - len(own)
        return [number // virtual for number in own + [(num_layers - sum(own)) // max(rest, 1)] * rest]
    stages = [(num_layers + counted(layout)) // (ranks * virtual)] * (ranks * virtual)
    stages[0] -= layout.account_for_embedding_in_pipeline_split
    stages[-1] -= layout.account_for_loss_in_pipeline_split
    return stages


def counted(layout: DistributedArguments) -> int:
    """How many of embedding and loss are shared out like layers."""
    return sum(getattr(layout, name) for name, _ in COUNTED)


def given_of(layout: DistributedArguments, options: tuple[tuple[str, str], ...]) -> list[str]:
    """Those of some options that are given, with their values, as a user types them."""
    values = [(flag, getattr(layout, name)) for name, flag in options]
    return [flag if value is True else f"{flag} {value}" for flag, value in values if value not in (None, False)]
