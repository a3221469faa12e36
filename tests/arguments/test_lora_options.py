"""Options of adapters: names of matrices, options that a checkpoint or an adapter determines, refusals."""

import dataclasses
import json

import pytest

from mft_megatron.arguments.command import make_arguments, parse_arguments, read_command_line
from mft_megatron.convert.run_start import open_start
from mft_megatron.lora import Lora, Target, num_sources, read_targets
from mft_megatron.run_folder.configuration import effective_configuration
from mft_megatron.run_folder.content import content_digest
from tests.arguments.command_line import WITHOUT_SHAPE, checkpoint, parse, resumed
from tests.command_lines import SHORT_RUN
from tests.descriptions import description_of, redescribe
from tests.refusals import refused

LORA = Lora(8, 16.0, read_targets(["q_proj", "linear_proj"], gated=True))
EACH = (
    Target("linear_qkv", 3, ((0,), (1,), (2,))),
    Target("linear_proj", 1, ((0,),)),
    Target("linear_fc1", 2, ((0,), (1,))),
    Target("linear_fc2", 1, ((0,),)),
)


@pytest.mark.parametrize(
    ("names", "gated", "expected"),
    [
        ("linear_qkv", True, (Target("linear_qkv", 3, ((0, 1, 2),)),)),
        ("query_key_value dense", False, (Target("linear_qkv", 3, ((0, 1, 2),)), Target("linear_proj", 1, ((0,),)))),
        ("v_proj q_proj", True, (Target("linear_qkv", 3, ((0,), (2,))),)),
        ("linear_k", True, (Target("linear_qkv", 3, ((1,),)),)),
        ("up_proj", True, (Target("linear_fc1", 2, ((1,),)),)),
        ("c_fc c_proj", False, (Target("linear_fc1", 1, ((0,),)), Target("linear_fc2", 1, ((0,),)))),
        ("dense_4h_to_h dense_h_to_4h", False, (Target("linear_fc1", 1, ((0,),)), Target("linear_fc2", 1, ((0,),)))),
        ("linear_fc1", False, (Target("linear_fc1", 1, ((0,),)),)),
        ("linear_fc1", True, (Target("linear_fc1", 2, ((0, 1),)),)),
        ("all-linear", True, EACH),
        ("all-linear", False, (*EACH[:2], Target("linear_fc1", 1, ((0,),)), EACH[3])),
    ],
)
def test_names_of_matrices(names, gated, expected):
    targets = read_targets(names.split(), gated)
    assert targets == expected
    assert all(target.sources == num_sources(target.module, gated) for target in targets)
    assert read_targets([name for target in targets for name in target.names], gated) == targets
    lora = Lora(4, 8.0, targets, 0.1, True)
    assert Lora.from_dict(json.loads(json.dumps(lora.as_dict()))) == lora


@pytest.mark.parametrize(
    ("names", "extra", "words"),
    [
        ("embed_tokens", "", "--lora-target-modules: 'embed_tokens' cannot have an adapter; known are linear_qkv,"),
        ("q_proj linear_qkv", "", "linear_qkv: is named twice, also as a part of linear_qkv; name it once"),
        ("q_proj q_proj", "", "q_proj: is named twice"),
        ("gate_proj", "", "gate_proj: the MLPs of this model are not gated; name linear_fc1"),
        ("c_fc", "--swiglu", "c_fc: the MLPs of this model are gated; name gate_proj and up_proj"),
        (
            "linear_fc1",
            "--num-experts 4 --disable-bias-linear",
            "linear_fc1 of experts cannot have adapters; name those of attention alone",
        ),
    ],
)
def test_targets_that_are_refused(names, extra, words):
    with refused(words):
        parse(f"--peft-type lora {extra} --lora-target-modules {names}")


def test_defaults_of_adapters():
    assert parse().adapters is None
    assert parse().saves_base
    lora = parse("--peft-type lora").adapters
    assert (lora.rank, lora.alpha, lora.dropout, lora.scale) == (32, 32.0, 0.0, 1.0)
    assert [target.module for target in lora.targets] == ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    assert parse("--peft-type lora --lora-rank 16 --lora-alpha 8 --use-rslora").adapters.scale == 2.0
    mftcoder = "--peft_type lora --lora_rank 8 --lora_alpha 4 --lora_dropout 0.05 --target_modules q_proj"
    assert parse(mftcoder).adapters == Lora(8, 4.0, (Target("linear_qkv", 3, ((0,),)),), 0.05)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (
            "--peft-type lora --num-experts 2 --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
            "--moe-router-bias-update-rate 0.1",
            "--moe-router-bias-update-rate has no effect without training of the routers",
        ),
        ("--lora-rank 4", "--lora-rank has no effect without --peft-type lora or qlora"),
        ("--use-rslora", "--use-rslora has no effect without --peft-type lora or qlora"),
        ("--peft-type lora --lora-rank 0", "--lora-rank 0"),
        ("--peft-type lora --lora-dropout 1", "--lora-dropout 1"),
        ("--peft-type lora --decoupled-lr 1", "--decoupled-lr is of embedding and output layer"),
        ("--peft-type lora --bf16 --transformer-impl transformer_engine", "goes with --transformer-impl local"),
        ("--peft-type qlora", "--peft-type qlora needs a model to start from"),
        ("--peft-type lora --hf-adapter x", "--hf-adapter x belongs to a model: give it with --hf-checkpoint"),
        ("--peft-type lora --save-adapters-only", "--save-adapters-only: the model has random weights"),
    ],
)
def test_refused(extra, words):
    with refused(words):
        parse(extra)


def _with_adapters(folder, **changes):
    return checkpoint(folder, lora=LORA.as_dict(), peft_type="lora", **changes)


def test_adapters_follow_from_the_checkpoint(tmp_path):
    folder = _with_adapters(tmp_path / "run")
    for extra in ("", "--peft-type lora --lora-rank 8", "--lora-target-modules linear_proj linear_q", "--finetune"):
        arguments = resumed(f"--load {folder} {extra}")
        assert arguments.adapters == LORA
        assert arguments.lora.peft_type == "lora"
        assert arguments.base is None
    assert resumed(f"--load {folder} --lora-dropout 0.5").adapters.dropout == 0.5


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("--lora-rank 4", "--lora-rank 4: the checkpoint"),
        ("--lora-alpha 4", "has 16.0; leave the option out"),
        ("--lora-target-modules q_proj v_proj", "--lora-target-modules q_proj v_proj: the checkpoint"),
        ("--peft-type none", "--peft-type none: the checkpoint"),
        ("--lora-target-modules foo", "--lora-target-modules: 'foo' cannot have an adapter"),
        ("--peft-type qlora", "was trained with lora; leave the option out"),
        ("--peft-type qlora --finetune", "start from the model itself with --hf-adapter"),
        ("--save-adapters-only", "--save-adapters-only: {path} holds model and adapters"),
    ],
)
def test_contradicting_the_checkpoint_is_refused(tmp_path, extra, words):
    folder = _with_adapters(tmp_path / "run")
    with refused(words.format(path=folder / "iter_0000005")):
        resumed(f"--load {folder} {extra}")


def test_a_model_gets_adapters_only_in_a_new_pass(tmp_path):
    folder = checkpoint(tmp_path / "run")
    with refused(f"--peft-type lora: --load {folder} has no adapters; start from its weights with --finetune"):
        resumed(f"--load {folder} --peft-type lora")
    for start in (f"--load {folder} --finetune", f"--pretrained-checkpoint {folder}"):
        arguments = resumed(f"{start} --peft-type lora")
        assert arguments.base == arguments.resume
    assert resumed(f"--pretrained-checkpoint {folder}").base is None


def test_a_checkpoint_of_only_adapters_needs_their_model(tmp_path):
    model = checkpoint(tmp_path / "model")
    weights = model / "iter_0000005" / "__0_0.distcp"
    weights.write_bytes(bytes(range(256)) * 5000)
    path = str(model / "iter_0000005")
    digest = content_digest(model / "iter_0000005")
    folder = _with_adapters(tmp_path / "run", has_base=False, base=path, base_digest=digest)
    with refused(
        f"it holds only adapters; give the model that they were trained with as --hf-checkpoint or "
        f"--pretrained-checkpoint (it was {path})"
    ):
        resumed(f"--load {folder}")
    arguments = resumed(f"--load {folder} --pretrained-checkpoint {model}")
    assert str(arguments.base.path) == path
    assert arguments.resume.info.lora is not None
    assert not arguments.weights_alone
    assert not arguments.saves_base
    with refused(f"--pretrained-checkpoint {folder}/iter_0000005: it holds only adapters; give it as --load with"):
        resumed(f"--pretrained-checkpoint {folder}")
    weights.write_bytes(bytes(255 - byte for byte in range(256)) * 5000)
    with refused(f"{path}: its weight files are not those that the adapters of"):
        resumed(f"--load {folder} --pretrained-checkpoint {model}")


@pytest.mark.parametrize(("before", "now"), [("lora", "qlora"), ("qlora", "lora")])
def test_a_new_pass_may_change_the_precision_of_the_model(tmp_path, before, now):
    model = checkpoint(tmp_path / "model")
    known = {"has_base": False, "base_digest": content_digest(model / "iter_0000005")}
    folder = checkpoint(tmp_path / "run", lora=LORA.as_dict(), peft_type=before, **known)
    words = f"--load {folder} --pretrained-checkpoint {model}"
    with refused(f"--peft-type {now}: the checkpoint {folder}/iter_0000005 was trained with {before}"):
        resumed(f"{words} --peft-type {now}")
    assert resumed(f"{words} --finetune").lora.peft_type == before
    arguments = resumed(f"{words} --finetune --peft-type {now}")
    assert arguments.lora.peft_type == now
    assert arguments.adapters == LORA
    assert arguments.weights_alone


def test_checkpoints_of_adapters_must_not_replace_their_model(tmp_path):
    """Their iterations start at 0 again, so that one could overwrite the checkpoint of the model that they need."""
    folder = checkpoint(tmp_path / "run")
    (tmp_path / "link").symlink_to(folder)
    words = f"--load {folder} --finetune --peft-type lora"
    for save in (folder, f"{tmp_path}/link/"):
        with refused(f"--save {save}: the model {folder}/iter_0000005 is in that folder"):
            resumed(f"{words} --save-adapters-only --save {save}")
    assert resumed(f"{words} --save {folder}").saves_base
    assert not resumed(f"{words} --save-adapters-only --save {tmp_path}/other").saves_base


def test_a_damaged_description_of_adapters_is_refused(tmp_path):
    folder = _with_adapters(tmp_path / "run")
    file = folder / "iter_0000005" / "mft_checkpoint.json"
    lora = description_of(file)["lora"]
    del lora["targets"]
    redescribe(file, lora=lora)
    with refused("mft_checkpoint.json: not a checkpoint description (Object missing required field `targets`); "):
        resumed(f"--load {folder}")


def test_options_follow_from_the_adapter_of_hf_adapter(tmp_path):
    folder = checkpoint(tmp_path / "model")

    def of(extra):
        words = f"{WITHOUT_SHAPE} --pretrained-checkpoint {folder} --hf-adapter there {extra}".split()
        return parse_arguments(words, adapter=dataclasses.replace(LORA, dropout=0.2))

    arguments = of("--peft-type qlora")
    assert arguments.adapters == LORA
    assert arguments.starts_from_adapter
    with refused("--lora-rank 4: the adapter there has 8; leave the option out"):
        of("--peft-type lora --lora-rank 4")
    with refused("--hf-adapter there: adapters are trained with --peft-type lora or qlora; give one of them"):
        of("")


def test_an_adapter_is_opened_once_for_the_model_it_belongs_to(tmp_path, monkeypatch):
    folder, opened = checkpoint(tmp_path / "model"), []

    class Adapter:
        lora = dataclasses.replace(LORA, dropout=0.2)

        def __init__(self, adapter, info):
            opened.append((adapter, info.iteration))

    monkeypatch.setattr("mft_megatron.convert.peft.weight_source.AdapterSource", Adapter)
    words = f"{WITHOUT_SHAPE} --pretrained-checkpoint {folder} --hf-adapter there --peft-type lora"
    command_line = read_command_line(words.split())
    start, _, adapter = open_start(command_line)
    assert opened == [("there", 5)]
    assert isinstance(adapter, Adapter)
    assert make_arguments(command_line, start).starts_from_adapter
    # When the job is restarted with the same command, its own adapters take precedence.
    run = _with_adapters(tmp_path / "run")
    command_line = read_command_line(f"{words} --load {run}".split())
    start, _, adapter = open_start(command_line)
    assert len(opened) == 1
    assert adapter is None
    assert not make_arguments(command_line, start).starts_from_adapter


def test_the_digest_of_weight_files_differs_between_models(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"x" * 2_000_000)
    digests = {content_digest(tmp_path)}
    for offset in (0, 999_999 // 4096 * 4096, 1_999_999):
        changed = bytearray(b"x" * 2_000_000)
        changed[offset // 31250 * 31250 : offset // 31250 * 31250 + 1] = b"y"
        (tmp_path / "a.safetensors").write_bytes(changed)
        digests.add(content_digest(tmp_path))
    (tmp_path / "a.safetensors").write_bytes(b"x" * 2_000_001)
    digests.add(content_digest(tmp_path))
    (tmp_path / "config.json").write_text("no weights")
    assert len(digests | {content_digest(tmp_path)}) == 5


def test_adapters_of_a_configuration_file(tmp_path):
    import yaml

    arguments = parse("--peft-type lora --lora-rank 4 --lora-target-modules q_proj v_proj")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"peft_type": "lora", "lora_rank": 4, "lora_target_modules": ["q_proj", "v_proj"]}))
    assert parse_arguments(f"{SHORT_RUN} --yaml-cfg {file}".split()).adapters == arguments.adapters


def test_options_of_adapters_in_a_configuration_have_no_effect_without_adapters(tmp_path):
    """Options without effect in a run's config.yaml are not refused, and must have no effect."""
    file = tmp_path / "config.yaml"
    options = parse("--peft-type lora --lora-rank 4").as_options()
    file.write_text(effective_configuration({**options, "save_adapters_only": True}, 1))
    arguments = parse_arguments(["--yaml-cfg", str(file), "--peft-type", "none"])
    assert arguments.adapters is None
    assert arguments.saves_base
