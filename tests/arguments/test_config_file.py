"""Options from a file: read like the command line, overridden by it, and a run's config.yaml read again."""

import dataclasses
import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mft_megatron.arguments.table import GROUPS, Arguments
from mft_megatron.errors import InputError
from mft_megatron.run_folder.configuration import effective_configuration
from tests.arguments.command_line import checkpoint, parse
from tests.command_lines import SHORT_RUN
from tests.refusals import refused

NEEDED = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "data_path": "data",
    "seq_length": 128,
    "micro_batch_size": 2,
    "train_iters": 10,
    "lr": 1e-3,
}


def write(folder, content, name="options.yaml"):
    """Write a file of options, a text or a mapping, and return its path."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def read(path, extra="", world_size=1):
    return parse(f"--yaml-cfg {path} {extra}", world_size, base="")


def same(a: Arguments, b: Arguments):
    for field in dataclasses.fields(Arguments):
        assert getattr(a, field.name) == getattr(b, field.name), field.name


def test_a_file_says_what_the_command_line_says(tmp_path):
    same(read(write(tmp_path, NEEDED)), parse())
    same(read(write(tmp_path, json.dumps(NEEDED), "options.json")), parse())
    assert parse(f"--config-file {write(tmp_path, {'seed': 7})}").initialization.seed == 7


def test_the_command_line_overrides_the_file(tmp_path):
    path = write(tmp_path, {**NEEDED, "seed": 7, "task_weights": ["a=1", "b=2"], "bf16": True})
    a = read(path, "--seed 8 --task-weights c=3")
    assert (a.initialization.seed, a.multi_task.task_weights, a.precision.bf16) == (8, ("c=3",), True)


def test_spellings(tmp_path):
    text = """
        add-qkv-bias: true
        disable_bias_linear: true
        untie-embeddings-and-output-weights: true
        --no-save-optim: true
        weighted_loss_mode: case4   # MFTCoder's name
        data_paths: other
        lr: 1e-4
        wandb_project: 123
        step-batch-size-schedule: 0:2,1K:4
        tokenizer_model: no
        rampup_batch_size: null
        moe_layer_freq: [0, 1, 1, 1]
        num_experts: 2
        save: ''
    """.replace("        ", "").replace("save: ''", "")
    a = parse(
        f"--yaml-cfg {write(tmp_path, text)}", base=SHORT_RUN.replace("--lr 1e-3", "").replace("--data-path data", "")
    )
    assert (a.network.add_qkv_bias, a.network.add_bias_linear, a.network.tie_embeddings) == (True, False, False)
    assert (a.checkpoint.save_optim, a.multi_task.mft_loss, a.data.data_path) == (False, "task-sample", "other")
    assert (a.learning_rate.lr, a.logging.wandb_project, a.data.tokenizer_model) == (1e-4, "123", "no")
    assert a.batch_sizes.sizes == [2, 4]
    assert a.network.expert_layers == (False, True, True, True)
    assert parse(f"--yaml-cfg {write(tmp_path, 'disable_bias_linear: false')}").network.add_bias_linear
    assert not parse(f"--yaml-cfg {write(tmp_path, 'add_bias_linear: false')}").network.add_bias_linear


def test_sections(tmp_path):
    network = ("num_layers", "hidden_size", "num_attention_heads")
    content = {"network": {name: NEEDED[name] for name in network}, "learning-rate": {"lr": 1e-3}}
    content |= {name: value for name, value in NEEDED.items() if name not in (*network, "lr")}
    same(read(write(tmp_path, content)), parse())
    same(read(write(tmp_path, json.dumps(content), "a.json")), parse())


REFUSED = {
    "num_layrs: 4": ":1: unknown option num_layrs; did you mean num_layers?",
    "\n\nxyzzy: 4": ":3: unknown option xyzzy; see --help",
    "split: 98,2,0": ":1: split: tools/preprocess_data.py makes the split",
    "use-mcore-models: true": ":1: use-mcore-models: all models here are",
    "num_layers: four": ":1: num_layers is 'four'; it must be a whole number",
    "num_layers: 4.0": ":1: num_layers is '4.0'; it must be a whole number",
    "num_layers: '4'": ":1: num_layers is '4'; it must be a whole number",
    "num_layers: [4]": ":1: num_layers is a whole number, not a list",
    "num_layers: 0": "--num-layers 0: must be at least 1",
    "lr: fast": ":1: lr is 'fast'; it must be a number",
    "lr: .nan": ":1: lr is '.nan'",
    "lr: nan": "must be finite",
    "bf16: 1": ":1: bf16 is '1'; it must be true or false",
    "bf16: yes": ":1: bf16 is 'yes'; it must be true or false",
    "lr_decay_style: cubic": ":1: lr_decay_style is 'cubic'; choose from constant, linear",
    "rampup_batch_size: 4": ":1: rampup_batch_size takes a list of 3 values, not one",
    "rampup_batch_size: [4, 4]": ":1: rampup_batch_size takes 3 value(s), not 2",
    "rampup_batch_size: [4, 4, x]": ":1: rampup_batch_size is 'x'; it must be a whole number",
    "task_weights: []": ":1: task_weights takes at least 1 value(s), not 0",
    "task_weights: [[a]]": ":1: task_weights is a list of lists or mappings",
    "window_size: [1]": ":1: window_size is '[1]'",
    "seed: 1\nseed: 2": "options.yaml:2: seed is given a second time, after ",
    "bf16: true\n--bf16: true": ":2: --bf16 is given a second time",
    "add_bias_linear: true\ndisable_bias_linear: true": ":2: disable_bias_linear is given a second time",
    "": "options.yaml: the file is empty",
    "# nothing": "options.yaml: the file is empty",
    "- seed": ":1: no mapping of options to values",
    "seed": ":1: no mapping of options to values",
    "seed: [1": "options.yaml:1: not YAML",
    "seed: 1\n  lr: 2": ":2: not YAML",
    "\tseed: 1": ":1: not YAML",
    "[1]: 2": ":1: a key that is no option's name",
    "netwrk: {num_layers: 4}": ":1: unknown section netwrk; did you mean network?",
    "xyzzy: {num_layers: 4}": ":1: unknown section xyzzy; sections are network, ",
    "network: {lr: 4}": ":1: lr is no option of network; put it into learning_rate",
    "network: {network: {lr: 4}}": ":1: network is a section within a section",
    "network: 4": ":1: network is a section; give options below it",
    "network: {world_size: 4}": ":1: unknown option world_size",
    "focal_gamma: 1": "--focal-gamma has no effect without",
}


def without(text):
    """The command line of a run without the options that a file gives."""
    base = SHORT_RUN.replace("--num-layers 4", "") if "num_layers:" in text else SHORT_RUN
    return base.replace("--lr 1e-3", "") if text.startswith(("lr:", '{"lr"')) else base


@pytest.mark.parametrize("text", REFUSED)
def test_refused_in_one_line_with_file_and_line(text, tmp_path):
    path = write(tmp_path, text)
    place = [f"{path}:"] if REFUSED[text].startswith(":") else []
    with refused(REFUSED[text], *place):
        parse(f"--yaml-cfg {path}", base=without(text))


REFUSED_JSON = {
    '{"seed": 1, "seed": 2}': "seed is given a second time",
    '{"seed": "1"}': "seed is '1'; it must be a whole number",
    '{"seed": 1.5}': "seed is '1.5'; it must be a whole number",
    '{"bf16": 1}': "bf16 is '1'; it must be true or false",
    json.dumps(
        {"rope_scaling": json.dumps({"rope_type": "linear", "factor": 10**400})}
    ): "options.json: rope_scaling is",
    '{"sed": 1}': "did you mean seed?",
    '{"lr": NaN}': "must be finite",
    '{"seed": 1,\n"lr"}': ":2: not JSON",
    '{"task_weights": [["a"]]}': "list of lists",
    "[]": "no mapping of options",
    "3": "no mapping of options",
    " ": "the file is empty",
}


@pytest.mark.parametrize("text", REFUSED_JSON)
def test_json_is_refused_in_one_line(text, tmp_path):
    path = write(tmp_path, text, "options.json")
    with refused(REFUSED_JSON[text]):
        parse(f"--yaml-cfg {path}", base=without(text))


@pytest.mark.parametrize(
    ("name", "text"), [("x.yaml", "[" * 9000), ("x.yaml", "{a: " * 9000), ("x.json", "[" * 99_999)]
)
def test_nesting_without_end_is_one_line(name, text, tmp_path):
    with refused(name, "recursion depth" if name == "x.yaml" else "nested too deeply"):
        parse(f"--yaml-cfg {write(tmp_path, text, name)}")


def test_json_with_tabs_and_every_kind(tmp_path):
    text = '{\n\t"seed": 7,\n\t"lr": 1e-4,\n\t"bf16": true,\n\t"save": null,\n\t"task_weights": ["a=1"]\n}'
    a = parse(f"--yaml-cfg {write(tmp_path, text, 'x.json')}", base=SHORT_RUN.replace("--lr 1e-3", ""))
    assert (a.initialization.seed, a.learning_rate.lr, a.precision.bf16) == (7, 1e-4, True)
    assert (a.checkpoint.save, a.multi_task.task_weights) == (None, ("a=1",))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"seed: \xff")
    for path, text in {
        tmp_path / "nowhere.yaml": "cannot be read (No such file or directory)",
        tmp_path: "cannot be read (Is a directory)",
        tmp_path / "bytes.yaml": "not a text in UTF-8",
    }.items():
        with refused(f"--yaml-cfg {path}: {text}"):
            parse(f"--yaml-cfg {path}")


def test_a_default_in_a_file_is_not_refused_for_having_no_effect(tmp_path):
    assert parse(f"--yaml-cfg {write(tmp_path, {'focal_gamma': 2.0})}").multi_task.mft_loss == "task-token"
    growth = "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1"
    a = parse(f"--yaml-cfg {write(tmp_path, {'weight_decay': 0.01})} {growth}")
    assert a.regularization.end_weight_decay == 0.1
    with pytest.raises(InputError, match="--weight-decay has no effect"):
        parse(f"--yaml-cfg {write(tmp_path, {'weight_decay': 0.02})} {growth}")
    same(read(write(tmp_path, {**NEEDED, "save_best": False, "early_stopping_patience": None})), parse())


COMBINATIONS = st.fixed_dictionaries(
    {},
    optional={
        "shape": st.sampled_from(
            (
                "--swiglu --position-embedding-type rope --normalization RMSNorm --disable-bias-linear",
                "--group-query-attention --num-query-groups 2 --qk-layernorm --apply-wd-to-qk-layernorm",
                "--window-size 20,0 --window-attn-skip-freq 2 --untie-embeddings-and-output-weights",
                "--num-experts 4 --moe-layer-freq [0]+[1]*3 --moe-aux-loss-coeff 0.01 --moe-ffn-hidden-size 96",
                "--apply-layernorm-1p --squared-relu --embedding-init-method-std 0.1",
                "--init-method-xavier-uniform",
            )
        ),
        "layout": st.sampled_from(
            (
                "--tensor-model-parallel-size 2 --sequence-parallel",
                "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 16",
                "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 1",
                "--context-parallel-size 2",
                "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
            )
        ),
        "batches": st.sampled_from(
            (
                "--rampup-batch-size 16 16 64 --global-batch-size 64",
                "--step-batch-size-schedule 0:16,4K:32",
                "--global-batch-size 32",
            )
        ),
        "precision": st.sampled_from(("--bf16", "--fp16 --hysteresis 3", "--bf16 --grad-reduce-in-bf16")),
        "rate": st.sampled_from(
            (
                "--lr-decay-style WSD --lr-wsd-decay-iters 4 --lr-warmup-fraction 0.3",
                "--lr-decay-style constant --lr-warmup-iters 2 --lr-warmup-init 1e-5",
                "--lr-decay-style cosine --min-lr 1e-5 --decoupled-lr 1e-4 --decoupled-min-lr 1e-6 --lr-decay-iters 8",
            )
        ),
        "decay": st.sampled_from(
            (
                "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1",
                "--weight-decay 0.3 --adam-eps 1e-6 --clip-grad 0",
            )
        ),
        "objective": st.sampled_from(
            (
                "--weighted_loss_mode coba --coba-tau 3",
                "--mft-loss focal-task --focal-gamma 1.5 --focal-detach",
                "--task-balance famo --famo-lr 0.1",
                "--task-weights a=1 b=2.5",
                "--early-stopping-patience 3 --early-stopping-metric a --save run",
                "--task-early-stopping-patience 2 --early-stopping-min-delta 0.1",
            )
        ),
        "recompute": st.sampled_from(
            (
                "--recompute-activations",
                "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
                "--recompute-granularity selective --recompute-modules core_attn layernorm",
            )
        ),
        "rest": st.sampled_from(
            (
                "--tensorboard-dir 'null' --wandb-project 123 --wandb-exp-name 1e3",
                "--save there --save-interval 2 --save-retain-interval 4 --no-save-rng --async-save",
                "--manual-gc --manual-gc-interval 3 --full-validation --log-throughput",
                "--eval-iters 3 --tokenizer-model ~",
            )
        ),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=COMBINATIONS)
def test_the_effective_configuration_can_be_read_unchanged(chosen, tmp_path):
    words = " ".join(chosen.values())
    try:
        a = parse(words, 8)
    except InputError:  # two of the options exclude each other
        return
    path = write(tmp_path, effective_configuration(a.as_options(), a.world_size), "config.yaml")
    assert yaml.safe_load(path.read_text())["world_size"] == 8
    same(read(path, world_size=8), a)


def test_a_combination_of_most_is_read_again(tmp_path):
    """The test above does not pass just because all combinations are refused."""
    words = (
        "--swiglu --position-embedding-type rope --tensor-model-parallel-size 2 --sequence-parallel --bf16 "
        "--rampup-batch-size 16 16 64 --global-batch-size 64 --lr-decay-style cosine --min-lr 1e-5 "
        "--recompute-activations --weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1 "
        "--task-weights a=1 b=2.5"
    )
    a = parse(words, 8)
    same(read(write(tmp_path, effective_configuration(a.as_options(), 8)), world_size=8), a)
    assert (a.recompute.recompute_activations, a.recompute.recompute_modules) == (False, ("core_attn",))
    assert a.precision.accumulate_allreduce_grads_in_fp32


def test_null_is_not_given(tmp_path):
    assert parse(f"--yaml-cfg {write(tmp_path, 'eval_interval: null')}").validation.eval_interval == 1000
    with refused("--decoupled-min-lr has no effect without --decoupled-lr"):
        parse(f"--yaml-cfg {write(tmp_path, 'decoupled_lr: ~')} --decoupled-min-lr 1e-4")


def test_an_edited_configuration_is_checked_too(tmp_path):
    """Its options without effect are not refused, but contradictions are."""
    a = parse("--save there --save-interval 2 --save-retain-interval 4")
    options = {**a.as_options(), "save_interval": None}
    with refused("--save-retain-interval 4 without --save-interval"):
        read(write(tmp_path, effective_configuration(options, 1)))


def test_a_configuration_can_be_used_on_another_number_of_ranks(tmp_path):
    a = parse("--swiglu", 2)
    path = write(tmp_path, effective_configuration(a.as_options(), 2))
    assert read(path, world_size=1).data_parallel_size == 1
    assert read(path, "--lr-decay-style constant").learning_rate.lr_decay_style == "constant"


def test_the_configuration_of_a_resumed_run_can_be_read(tmp_path):
    folder = checkpoint(tmp_path)
    a = parse(f"--load {folder} --save {folder}", base=SHORT_RUN.replace("--num-layers 4 --hidden-size 64", ""))
    same(read(write(tmp_path, effective_configuration(a.as_options(), 1))), a)


def test_sections_of_the_help_are_sections_of_a_file():
    titles = {title.replace(" ", "_").replace("-", "_") for title, _ in GROUPS}
    assert {"network", "learning_rate", "mixed_precision", "multi_task_fine_tuning"} <= titles
