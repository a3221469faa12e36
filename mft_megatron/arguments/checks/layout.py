"""Whether the ranks make a layout."""

from mft_megatron.arguments.table import Arguments


def check_layout(a: Arguments) -> str | None:
    tp, pp = a.distributed.tensor_model_parallel_size, a.distributed.pipeline_model_parallel_size
    if a.world_size % (tp * pp):
        return (
            f"{a.world_size} ranks cannot be divided into --tensor-model-parallel-size {tp} × "
            f"--pipeline-model-parallel-size {pp} = {tp * pp}; start a multiple of {tp * pp} with torchrun"
        )
    if a.network.num_layers % pp:
        return f"--pipeline-model-parallel-size {pp} does not divide --num-layers {a.network.num_layers}"
    if a.distributed.sequence_parallel and tp == 1:
        return "--sequence-parallel needs --tensor-model-parallel-size of at least 2; leave it out"
    if a.distributed.sequence_parallel and a.data.seq_length % tp:
        return (
            f"--sequence-parallel: --tensor-model-parallel-size {tp} does not divide --seq-length {a.data.seq_length}"
        )
    return None


def check_virtual_stages(a: Arguments) -> str | None:
    pp = a.distributed.pipeline_model_parallel_size
    given = {
        "--num-layers-per-virtual-pipeline-stage": a.distributed.num_layers_per_virtual_pipeline_stage,
        "--num-virtual-stages-per-pipeline-rank": a.distributed.num_virtual_stages_per_pipeline_rank,
    }
    given = {name: number for name, number in given.items() if number is not None}
    if len(given) == 2:
        return f"{' and '.join(given)} both set the number of virtual stages; give one of them"
    for name, number in given.items():
        if pp == 1:
            return f"{name} {number} needs --pipeline-model-parallel-size of at least 2; leave it out"
        if a.network.num_layers % (pp * number):
            return (
                f"{name} {number} × --pipeline-model-parallel-size {pp} = {pp * number} does not divide --num-layers "
                f"{a.network.num_layers}; change one of them"
            )
    return None
