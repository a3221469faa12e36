"""Check the parallel layout."""

from mft_megatron.arguments.groups.distributed import DistributedArguments
from mft_megatron.arguments.stages import COUNTED, LAYOUT, UNEVEN, given_options, layout_stages, num_counted
from mft_megatron.arguments.table import Arguments


def check_layout(a: Arguments) -> str | None:
    """Check that the ranks can be divided into tensor-, pipeline- and context-parallel groups."""
    tp, pp = a.distributed.tensor_model_parallel_size, a.distributed.pipeline_model_parallel_size
    cp = a.distributed.context_parallel_size
    if a.world_size % (tp * pp * cp):
        context = f" × --context-parallel-size {cp}" if cp > 1 else ""
        return (
            f"{a.world_size} ranks cannot be divided into --tensor-model-parallel-size {tp} × "
            f"--pipeline-model-parallel-size {pp}{context} = {tp * pp * cp}; start a multiple of {tp * pp * cp} with "
            "torchrun (of a dry run: --world-size)"
        )
    if a.distributed.sequence_parallel and tp == 1:
        return "--sequence-parallel needs --tensor-model-parallel-size of at least 2; leave it out"
    return None


def check_virtual_stages(a: Arguments) -> str | None:
    """Check, before and after completion, the options that set the number of stages."""
    d, pp = a.distributed, a.distributed.pipeline_model_parallel_size
    given = {
        "--num-layers-per-virtual-pipeline-stage": d.num_layers_per_virtual_pipeline_stage,
        "--num-virtual-stages-per-pipeline-rank": d.num_virtual_stages_per_pipeline_rank,
    }
    given = {name: number for name, number in given.items() if number is not None}
    if len(given) == 2:
        return f"{' and '.join(given)} both set the number of virtual stages; give one of them"
    for name, number in given.items():
        if pp == 1:
            return f"{name} {number} needs --pipeline-model-parallel-size of at least 2; leave it out"
    per_stage = d.num_layers_per_virtual_pipeline_stage
    uneven = given_options(d, UNEVEN)
    if per_stage is not None and uneven:
        return (
            f"--num-layers-per-virtual-pipeline-stage {per_stage} does not go with {uneven[0]}, where stages differ; "
            "give --num-virtual-stages-per-pipeline-rank"
        )
    text = d.pipeline_model_parallel_layout
    if text is not None:
        return _layout_problem(text, a.network.num_layers, pp, d)
    total = a.network.num_layers + num_counted(d)
    if per_stage is not None and total % (pp * per_stage):
        return (
            f"--num-layers-per-virtual-pipeline-stage {per_stage} × --pipeline-model-parallel-size {pp} = "
            f"{pp * per_stage} does not divide {_of_layers(a)}; change one of them"
        )
    return None


def check_stages(a: Arguments) -> str | None:
    """Check, after completion, that the layers can be distributed over the stages."""
    d, layers = a.distributed, a.network.num_layers
    pp, virtual = d.pipeline_model_parallel_size, d.num_virtual_stages_per_pipeline_rank or 1
    uneven, counts = given_options(d, UNEVEN), given_options(d, COUNTED)
    for option in uneven + counts:
        if pp == 1:
            return f"{option} needs --pipeline-model-parallel-size of at least 2; leave it out"
    if d.pipeline_model_parallel_layout is not None:
        for option in uneven + counts:
            return f"{LAYOUT} and {option} both distribute the layers; give one of them"
        return None
    if uneven and counts:
        return f"{uneven[0]} and {counts[0]} both distribute the layers; give one of them"
    if uneven:
        return _uneven_problem(layers, pp, virtual, d)
    if (layers + num_counted(d)) % (pp * virtual):
        stages = f"--pipeline-model-parallel-size {pp}"
        if virtual > 1:
            stages = f"--num-virtual-stages-per-pipeline-rank {virtual} × {stages} = {pp * virtual}"
        remedy = "change one of them"
        if virtual == 1 and not counts:
            remedy += ", or let stages differ with --decoder-first-pipeline-num-layers or " + LAYOUT
        return f"{stages} does not divide {_of_layers(a)}; {remedy}"
    return None


def _of_layers(a: Arguments) -> str:
    extra = num_counted(a.distributed)
    if not extra:
        return f"--num-layers {a.network.num_layers}"
    counts = " and ".join(given_options(a.distributed, COUNTED))
    return f"--num-layers {a.network.num_layers} + {extra} ({counts}) = {a.network.num_layers + extra}"


def _uneven_problem(num_layers: int, pp: int, virtual: int, d: DistributedArguments) -> str | None:
    options = " and ".join(given_options(d, UNEVEN))
    named = [layers for name, _ in UNEVEN if (layers := getattr(d, name)) is not None]
    rest, ranks = num_layers - sum(named), pp - len(named)
    if rest < ranks or (ranks == 0 and rest):
        return (
            f"{options}: of --num-layers {num_layers} that leaves {rest} for the other {ranks} of "
            f"--pipeline-model-parallel-size {pp} ranks; change one of them"
        )
    if ranks and rest % ranks:
        return (
            f"{options}: of --num-layers {num_layers} that leaves {rest}, which the other {ranks} of "
            f"--pipeline-model-parallel-size {pp} ranks cannot split evenly; leave a multiple of {ranks}"
        )
    for layers in [*named, *([rest // ranks] if ranks else [])]:
        if layers % virtual:
            return (
                f"{options}: a pipeline rank has {layers} layers, which --num-virtual-stages-per-pipeline-rank "
                f"{virtual} does not divide; give every rank a multiple of {virtual}"
            )
    return None


def _layout_problem(text: str, layers: int, pp: int, d: DistributedArguments) -> str | None:
    named = f"{LAYOUT} {text!r}"
    if d.num_layers_per_virtual_pipeline_stage is not None:
        return f"{LAYOUT} and --num-layers-per-virtual-pipeline-stage both set the stages; give one of them"
    try:
        stages = layout_stages(text)
    except ValueError:
        return (
            f"{named}: only E (embedding), t (layer), L (loss), | between stages and *N or (…)*N for repetition; "
            "layers that predict several tokens (m) are not supported"
        )
    if len(stages) % pp or pp == 1:
        return f"{named}: {len(stages)} stages for --pipeline-model-parallel-size {pp}; give a multiple, of at least 2"
    given = d.num_virtual_stages_per_pipeline_rank
    if given is not None and given * pp != len(stages):
        return (
            f"{named} has {len(stages)} stages, --num-virtual-stages-per-pipeline-rank {given} × "
            f"--pipeline-model-parallel-size {pp} = {given * pp}; leave the latter out"
        )
    order = "".join(stages)
    if order != "E" + "t" * layers + "L":
        return (
            f"{named} has {order.count('t')} layers, {order.count('E')} E and {order.count('L')} L; it must have one E "
            f"at the beginning, the {layers} t of --num-layers, and one L at the end"
        )
    return None


def check_experts_layout(a: Arguments) -> str | None:
    """Check that experts can be distributed over ranks."""
    d, pp = a.distributed, a.distributed.pipeline_model_parallel_size
    ep, tp = d.expert_model_parallel_size, d.tensor_model_parallel_size
    etp = d.expert_tensor_parallel_size
    if a.network.num_experts is None:
        if ep > 1 or etp is not None:
            option = f"--expert-model-parallel-size {ep}" if ep > 1 else f"--expert-tensor-parallel-size {etp}"
            return f"{option} without --num-experts has nothing to distribute; leave it out"
        return None
    etp = tp if etp is None else etp
    if a.network.num_experts % ep:
        return f"--expert-model-parallel-size {ep} does not divide --num-experts {a.network.num_experts}"
    if a.world_size % (etp * ep * pp):
        return (
            f"{a.world_size} ranks cannot be divided into expert-tensor size {etp} × --expert-model-parallel-size {ep} "
            f"× --pipeline-model-parallel-size {pp} = {etp * ep * pp}; start a multiple of that with torchrun "
            "(of a dry run: --world-size)"
        )
    if a.network.expert_size % etp:
        return f"--expert-tensor-parallel-size {etp} does not divide --moe-ffn-hidden-size {a.network.expert_size}"
    if tp > 1 and not d.sequence_parallel:
        return (
            f"--num-experts with --tensor-model-parallel-size {tp} needs --sequence-parallel: otherwise each of its "
            "ranks would compute the same tokens; add it"
        )
    return None
