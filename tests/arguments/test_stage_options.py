"""Options that distribute layers over pipeline stages: accepted, derived and refused ones."""

import dataclasses
import re

import pytest

from mft_megatron.arguments.stages import layout_stages
from tests.arguments.command_line import parse
from tests.refusals import refused

PP2, PP4 = "--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 4"
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
EMBEDDING, LOSS = "--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"
LAYOUT = "--pipeline-model-parallel-layout"
PER_STAGE, STAGES = "--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"


def parsed(layers, words, world=None):
    """Parse options of the pipeline; the number of ranks is the second word unless ``world`` is given."""
    world = int(words.split()[1]) if world is None else world
    return parse(f"--num-layers {layers} --micro-batch-size 1 --global-batch-size 16 {words}", world).distributed


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("Et*3|(tt|)*3,t|L", ["Ettt", "tt", "tt", "tt", "t", "L"]),
        ("E|(t|)*2L", ["E", "t", "t", "L"]),
        ("(|)*2Et L", ["", "", "EtL"]),
        ("E t*2, |t L", ["Ett", "tL"]),
    ],
)
def test_a_pipeline_layout_is_expanded(text, stages):
    assert layout_stages(text) == stages


@pytest.mark.parametrize("text", ["Et|m|L", "E(t|L", "Et*|L", "E((t|)*2)*2L", "Et*999999999|L", "E(t|)*99999999L"])
def test_a_malformed_pipeline_layout_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        layout_stages(text)


def test_megatron_core_expands_a_pipeline_layout_likewise():
    from mft_megatron.mcore.model.config import pipeline_layout  # first, for it readies Megatron-Core for this machine

    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout  # isort: skip

    for text in ("Et*3|(tt|)*3,t|L", "Et|(t|)*2L", "E|t*4|(|)*1tL|"):
        theirs = PipelineParallelLayerLayout.parse_str_to_list(text)
        layout = parsed(4, PP2)
        ours = pipeline_layout(dataclasses.replace(layout, pipeline_model_parallel_layout=text))
        assert [[kind.name for kind in stage] for stage in theirs] == ours


@pytest.mark.parametrize(
    ("layers", "words", "virtual"),
    [
        (4, f"{PP2} {FIRST} 3", None),
        (6, f"{PP4} {FIRST} 2 {LAST} 2", None),
        (6, f"{PP2} {FIRST} 4 {STAGES} 2", 2),
        (6, f"{PP2} {EMBEDDING} {LOSS} {PER_STAGE} 2", 2),
        (7, f"{PP4} {LOSS}", None),
        (8, f"{PP2} {PER_STAGE} 4", None),
        (4, f"{PP2} {LAYOUT} Ett|t|t|L", 2),
        (4, f"{PP2} {LAYOUT} Ettt|tL", None),
    ],
)
def test_accepted(layers, words, virtual):
    layout = parsed(layers, words)
    assert layout.num_virtual_stages_per_pipeline_rank == virtual
    assert layout.num_layers_per_virtual_pipeline_stage is None


@pytest.mark.parametrize(
    ("layers", "words", "line"),
    [
        (5, PP2, "--pipeline-model-parallel-size 2 does not divide --num-layers 5"),
        (5, PP2, FIRST),
        (6, f"{PP2} {STAGES} 2", f"{STAGES} 2 × --pipeline-model-parallel-size 2 = 4 does not divide --num-layers 6"),
        (6, f"{PP2} {PER_STAGE} 2", f"{PER_STAGE} 2 × --pipeline-model-parallel-size 2 = 4 does not divide"),
        (4, f"{FIRST} 3", f"{FIRST} 3 needs --pipeline-model-parallel-size of at least 2"),
        (4, EMBEDDING, f"{EMBEDDING} needs --pipeline-model-parallel-size of at least 2"),
        (4, f"{PP2} {FIRST} 4", f"{FIRST} 4: of --num-layers 4 that leaves 0 for the other 1 of"),
        (4, f"{PP2} {FIRST} 1 {LAST} 2", f"{FIRST} 1 and {LAST} 2: of --num-layers 4 that leaves 1 for the other 0"),
        (9, f"{PP4} {FIRST} 4", f"{FIRST} 4: of --num-layers 9 that leaves 5, which the other 3"),
        (7, f"{PP4} {LAST} 3", "leaves 4, which the other 3 of --pipeline-model-parallel-size 4 ranks cannot split"),
        (6, f"{PP2} {FIRST} 3 {STAGES} 2", f"a pipeline rank has 3 layers, which {STAGES} 2 does not divide"),
        (6, f"{PP2} {FIRST} 4 {PER_STAGE} 1", f"{PER_STAGE} 1 does not go with {FIRST} 4"),
        (6, f"{PP2} {FIRST} 4 {LOSS}", f"{FIRST} 4 and {LOSS} both distribute the layers"),
        (6, f"{PP2} {LOSS}", f"--num-layers 6 + 1 ({LOSS}) = 7"),
        (7, f"{PP2} {EMBEDDING} {LOSS}", f"--num-layers 7 + 2 ({EMBEDDING} and {LOSS}) = 9"),
        (4, f"{PP2} {LAYOUT} Ettm|ttL", "(m) are not supported"),
        (4, f"{PP2} {LAYOUT} Ett|t|tL", "3 stages for --pipeline-model-parallel-size 2"),
        (4, f"{LAYOUT} EttttL", "1 stages for --pipeline-model-parallel-size 1"),
        (4, f"{PP2} {LAYOUT} Ett|tL", "has 3 layers, 1 E and 1 L; it must have one E at the beginning, the 4 t of"),
        (4, f"{PP2} {LAYOUT} ttE|ttL", "it must have one E at the beginning"),
        (4, f"{PP2} {LAYOUT} Ettt|tL {FIRST} 3", f"{LAYOUT} and {FIRST} 3 both distribute the layers"),
        (4, f"{PP2} {LAYOUT} Ettt|tL {STAGES} 2", f"has 2 stages, {STAGES} 2 × --pipeline-model-parallel-size 2 = 4"),
        (4, f"{PP2} {LAYOUT} Ettt|tL {PER_STAGE} 2", f"{LAYOUT} and {PER_STAGE} both set the stages"),
        (4, f"{PP2} {FIRST} 0", f"{FIRST} 0: must be at least 1"),
    ],
)
def test_refused(layers, words, line):
    with refused(line):
        parsed(layers, words, world=None if "size" in words.split()[0] else 1)
