"""pretrain_mft.py and tools/convert_checkpoint.py through the command line, as a user runs them.

Runs with torchrun, and in one process that ends and restarts, are new processes; refusals are tested in forked ones,
which start faster.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from mft_megatron.exit_codes import FINISHED, LEFT, STORAGE
from tests.batches import one_segment
from tests.command_lines import SMALL
from tests.descriptions import description_of, redescribe
from tests.full_disk import largest_file
from tests.made_dataset import batch_of_packs
from tests.preprocessed_again import preprocess_again
from tests.ranks import run_forked, run_on_ranks, run_tool, torchrun
from tests.refusals import refusal
from tests.run_records import records

MODEL = (
    f"{SMALL} --group-query-attention --num-query-groups 2 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights"
).split()
RUN = (
    "--micro-batch-size 1 --global-batch-size 4 --train-iters 5 --lr 1e-3 --log-interval 1 --eval-interval 5 "
    "--mft-loss task-token --task-weights completion=2"
).split()
LAYOUT = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2".split()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, dataset_prefix):
    """The folder of a run of five steps at TP 2 × PP 2 with dropout, saved after steps three and five."""
    folder = tmp_path_factory.mktemp("run")
    words = [*MODEL, *RUN, *LAYOUT, "--data-path", dataset_prefix, "--save", folder, "--save-interval", 3]
    process = torchrun(4, "pretrain_mft.py", *words)
    assert process.returncode == 0, process.stderr
    assert "step 5 | validation" in process.stdout
    packs = json.loads(Path(f"{dataset_prefix}_dataset.json").read_text())["lengths"]["128"]["packs"]["train"]["packs"]
    assert f"--train-iters 5: 20 packs, {20 / packs:.2f} epochs" in process.stdout
    assert "objective task-token, normalisation global (the default), weights static" in process.stdout
    assert "task completion: target 40.0%, in " in process.stdout
    return folder


def test_files_of_the_run_folder(run_folder, dataset_prefix):
    names = {path.name for path in run_folder.iterdir()}
    assert {"iter_0000003", "iter_0000005", "latest_checkpointed_iteration.txt", "config.yaml"} <= names
    assert {"metrics.jsonl", "tensorboard", "tokenizer"} <= names
    assert (run_folder / "latest_checkpointed_iteration.txt").read_text().strip() == "5"
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert (config["hidden_dropout"], config["global_batch_size"], config["world_size"]) == (0.1, 4, 4)
    assert not [path for path in run_folder.rglob("*.tmp")]


def test_metrics_agree_with_the_data_set_and_the_weights(run_folder, dataset_prefix):
    ledger = json.loads(Path(f"{dataset_prefix}_dataset.json").read_text())
    names = [task["name"] for task in ledger["tasks"]]
    train = records(run_folder, "train")
    assert [record["step"] for record in train] == [1, 2, 3, 4, 5]
    assert [record["consumed_samples"] for record in train] == [4, 8, 12, 16, 20]
    for record in train:
        assert list(record["tasks"]) == names
        assert sum(task["supervised_tokens"] for task in record["tasks"].values()) == record["supervised_tokens"]
        assert record["supervised_tokens"] < record["tokens"] <= 4 * 128
        assert record["tasks"]["completion"]["weight"] == 2.0
        present = {n: task for n, task in record["tasks"].items() if task["supervised_tokens"]}
        total = sum(task["weight"] for task in present.values())
        for task in present.values():
            assert task["share"] == pytest.approx(task["weight"] / total, rel=1e-6)
        assert sum(task["run_share"] for task in record["tasks"].values()) == pytest.approx(1)
        assert record["tasks"]["completion"]["run_target_share"] == pytest.approx(0.4)
        assert record["mean_loss"] == pytest.approx(record["loss"], rel=1e-12)
        objective = sum(task["weight"] * task["loss"] for task in present.values()) / total
        assert record["loss"] == pytest.approx(objective, rel=1e-6)
    (valid,) = records(run_folder, "valid")
    supervised = sum(task["supervised_tokens"] for task in valid["tasks"].values())
    assert supervised == ledger["lengths"]["128"]["packs"]["valid"]["supervised_tokens"]
    assert valid["macro_loss"] == pytest.approx(sum(task["loss"] for task in valid["tasks"].values()) / 4)


def test_resuming_is_bit_equal(run_folder, dataset_prefix, tmp_path):
    process = run_forked(
        *("pretrain_mft.py", *RUN, *LAYOUT, "--data-path", dataset_prefix),
        *("--load", run_folder / "iter_0000003", "--save", tmp_path / "again"),
        world_size=4,
    )
    assert process.returncode == 0, process.stderr
    resumed, whole = records(tmp_path / "again", "train"), records(run_folder, "train")[3:]
    assert [record.pop("step_time") > 0 for record in resumed + whole] == [True] * 4
    assert resumed == whole
    assert records(tmp_path / "again", "valid") == records(run_folder, "valid")


def _hf_difference(checkpoint, hf, prefix):
    """Largest difference of fp32 logits between the model at this parallel layout and transformers."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.data.loading.dataset import PackedDataset
    from mft_megatron.mcore.checkpointing import checkpoint as checkpoints
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.parallel.device_batch import to_device
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.run_folder.found import latest_checkpoint

    words = [*RUN, *LAYOUT, "--data-path", prefix, "--load", str(checkpoint), "--finetune", "--seed", "99"]
    arguments = parse_arguments(words, 4, lambda prefix: [128])
    dataset = PackedDataset.open(prefix, 128)
    with process_groups.process_groups(arguments.distributed, seed=99):
        trainer = Trainer(arguments, dataset.vocab_size, 4)
        latest = latest_checkpoint(checkpoint)
        checkpoints.load(latest.path, trainer, latest.info, arguments.checkpoint)
        trainer.chunks[0].eval()
        tokens = batch_of_packs(dataset.split("train"), [3]).tokens_BS
        batch = to_device(one_segment(tokens))
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        hidden = torch.empty(len(tokens[0]), 1, arguments.network.hidden_size)
        with torch.no_grad():
            for stage in range(stages):
                if parallel_state.get_pipeline_model_parallel_rank() == stage:
                    trainer.chunks[0].module.set_input_tensor(hidden)
                    output = trainer.chunks[0].module.run(batch, with_loss=False)
                    if stage + 1 < stages:
                        torch.distributed.send(
                            output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank()
                        )
                elif parallel_state.get_pipeline_model_parallel_rank() == stage + 1:
                    torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        if not process_groups.is_last_stage():
            return None
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(output)[0, :, : dataset.vocab_size]
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = model(torch.from_numpy(tokens)).logits[0]
        assert expected.shape == logits.shape
        return float((logits - expected).abs().max()), float(expected.std())


@pytest.fixture(scope="module")
def hf_folder(run_folder, tmp_path_factory):
    hf = tmp_path_factory.mktemp("export") / "hf"
    process = run_tool("tools/convert_checkpoint.py", "mcore-to-hf", "--load", run_folder, "--hf", hf)
    assert process.returncode == 0, process.stderr
    return hf


def test_exported_logits_agree(run_folder, hf_folder, dataset_prefix):
    results = [r for r in run_on_ranks(4, _hf_difference, str(run_folder), str(hf_folder), dataset_prefix) if r]
    assert len(results) == 2
    for difference, spread in results:
        assert difference < 1e-4
        assert spread > 0.05  # or the comparison would be one of zeros


def test_the_export_is_a_complete_hugging_face_folder(hf_folder, tokenizer_folder, dataset_prefix):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(hf_folder)
    ledger = json.loads(Path(f"{dataset_prefix}_dataset.json").read_text())
    assert config.vocab_size == ledger["tokenizer"]["vocab_size"]
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert (config.eos_token_id, config.tie_word_embeddings) == (ledger["tokenizer"]["eos_token_id"], False)
    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    assert len(tokenizer) == config.vocab_size
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert GenerationConfig.from_pretrained(hf_folder).eos_token_id == stops
    assert (hf_folder / "tokenizer.json").read_bytes() == (tokenizer_folder / "tokenizer.json").read_bytes()


def test_export_in_shards_is_the_same_model(run_folder, hf_folder, tmp_path):
    from safetensors.torch import load_file

    process = run_forked(
        *("tools/convert_checkpoint.py", "mcore-to-hf", "--load", run_folder, "--hf", tmp_path / "hf"),
        *("--max-shard-size", "100KB"),
    )
    assert process.returncode == 0, process.stderr
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    weights = {}
    for shard in shards:
        weights.update(load_file(tmp_path / "hf" / shard))
    whole = load_file(hf_folder / "model.safetensors")
    assert weights.keys() == whole.keys() == index["weight_map"].keys()
    assert all(weights[name].equal(whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in whole.values())


def test_export_refuses_in_one_line(run_folder, hf_folder, tmp_path):
    tool = ("tools/convert_checkpoint.py", "mcore-to-hf")
    assert "exists already" in refusal(run_forked(*tool, "--load", run_folder, "--hf", hf_folder))
    assert "does not exist" in refusal(run_forked(*tool, "--load", tmp_path / "nothing", "--hf", tmp_path / "hf"))
    assert "did you mean --load" in refusal(run_forked(*tool, "--laod", run_folder, "--hf", tmp_path / "hf"))
    assert "--max-shard-size" in refusal(
        run_forked(*tool, "--load", run_folder, "--hf", tmp_path / "hf", "--max-shard-size", "5")
    )
    assert "unknown direction" in refusal(run_forked("tools/convert_checkpoint.py", "hf-to-gguf"))
    other = tmp_path / "gelu"
    shutil.copytree(run_folder, other)
    info = other / "iter_0000005" / "mft_checkpoint.json"
    redescribe(info, architecture={**description_of(info)["architecture"], "swiglu": False})
    line = refusal(run_forked(*tool, "--load", other, "--hf", tmp_path / "hf"))
    assert "swiglu is False, Llama has True" in line
    assert not list(tmp_path.glob("*hf*"))


def refused(*words):
    return refusal(run_forked("pretrain_mft.py", *words))


def test_bad_input_is_refused_in_one_line(dataset_prefix, tmp_path):
    good = [*MODEL, *RUN, "--data-path", dataset_prefix]
    assert "does not divide --num-attention-heads 4" in refused(*good, "--tensor-model-parallel-size", 3)
    assert "did you mean --pipeline-model-parallel-size" in refused(*good, "--pipline-model-parallel-size", 2)
    assert "does not exist" in refused(*good, "--load", tmp_path / "nothing")
    assert "no ledger" in refused(*MODEL, *RUN, "--data-path", tmp_path / "nothing")
    assert "is packed for 128" in refused(*good, "--seq-length", 64)
    assert "unexpected" in refused(*good, "stray")
    assert "no CUDA device" in refused(*good, "--distributed-backend", "nccl")
    weights = [*MODEL, *RUN[: RUN.index("--task-weights")], "--data-path", dataset_prefix, "--task-weights"]
    assert "with a task of: completion" in refused(*weights, "unknown=1")
    assert "not be negative" in refused(*weights, "read=-1")


def test_the_tokenizer_must_be_that_of_the_data_set(dataset_prefix, tokenizer_folder, tmp_path):
    good = [*MODEL, *RUN, "--data-path", dataset_prefix]
    assert "was made with HuggingFaceTokenizer" in refused(*good, "--tokenizer-type", "SentencePieceTokenizer")
    other = tmp_path / "other"
    shutil.copytree(tokenizer_folder, other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": config["eos_token"]}))
    assert "its content differs" in refused(*good, "--tokenizer-model", other)


@pytest.mark.parametrize("change", ["shorter", "one byte", "missing", "ledger"])
def test_a_data_set_that_does_not_match_its_ledger_is_refused(dataset_prefix, tmp_path, change):
    folder = tmp_path / "copy"
    shutil.copytree(Path(dataset_prefix).parent, folder)
    damaged = folder / "mixed_input_ids.bin"
    content = damaged.read_bytes()
    if change == "shorter":
        damaged.write_bytes(content[:-2])
    elif change == "one byte":
        damaged.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif change == "missing":
        damaged.unlink()
    else:
        damaged = folder / "mixed_dataset.json"
        damaged.write_text(damaged.read_text()[:-20])
    line = refused(*MODEL, *RUN, "--data-path", folder / "mixed")
    assert str(damaged) in line
    assert "preprocess the data again" in line


def test_with_torchrun_one_rank_prints_the_error(dataset_prefix):
    process = torchrun(2, "pretrain_mft.py", *MODEL, *RUN, "--data-path", dataset_prefix, "--lr-decay-style", "cubic")
    assert process.returncode != 0
    assert process.stderr.count("error: ") == 1
    assert "invalid choice: 'cubic'" in process.stderr


def test_resuming_on_other_data_is_refused(run_folder, dataset_prefix, tmp_path):
    preprocess_again(dataset_prefix, tmp_path / "other", "--split", "80,20,0", "--seed", 5)
    line = refused(*RUN, "--data-path", tmp_path / "other", "--load", run_folder, "--train-iters", 6)
    assert "saved while training on another data set" in line


def test_one_process_without_torchrun_exits_and_restarts_with_the_same_command(dataset_prefix, tmp_path):
    """Its length is in epochs: 19 packs, of which 3 remain for the fifth step."""
    folder = tmp_path / "run"
    packs = json.loads(Path(f"{dataset_prefix}_dataset.json").read_text())["lengths"]["128"]["packs"]["train"]["packs"]
    run = " ".join(RUN).replace("--train-iters 5", f"--num-train-epochs {18.5 / packs} --lr-decay-iters 4").split()
    command = [*MODEL, *run, "--data-path", dataset_prefix, "--save", folder, "--load", folder, "--exit-interval", 3]
    for expected, code in (("3", LEFT), ("5", FINISHED)):
        process = run_tool("pretrain_mft.py", *command)
        assert process.returncode == code, process.stderr
        assert ": 19 packs, 5 steps" in process.stdout
        assert "note: --lr-decay-iters 4 and --min-lr 0: the last 1 of 5 steps change nothing" in process.stdout
        assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == expected
    assert [record["step"] for record in records(folder, "train")] == [1, 2, 3, 4, 5]
    assert records(folder, "train")[-1]["global_batch_size"] == 3
    happened = [record["event"] for record in records(folder, "event")]
    assert [event for event in happened if event != "warning"] == ["save", "exit", "load", "save"]
    # a chain of jobs starts the finished one again, and only its export is left to do
    first = [word for word in command if word != "--load"]
    first.remove(folder)  # as if the run had been started without --load
    process = run_forked("pretrain_mft.py", *first, "--save-hf", tmp_path / "hf")
    assert process.returncode == 0, process.stderr
    finished = f"{folder}: this run is finished, at iteration 5; train on with a larger --num-train-epochs"
    assert finished in process.stdout
    assert (tmp_path / "hf" / "iter_0000005" / "config.json").is_file()
    assert len(records(folder, "event")) == len(happened)
    assert "holds the checkpoints of another run: add --load" in refused(*first, "--lr", "2e-3")
    assert "epochs already; raise it" in refused(*command, "--num-train-epochs", 18 / packs)
    assert "already at iteration 5; raise it" in refused(*RUN, "--data-path", dataset_prefix, "--load", folder)


def test_adapters_need_a_model(dataset_prefix):
    line = refused(*MODEL, *RUN, "--data-path", dataset_prefix, "--peft-type", "lora")
    assert "--peft-type lora: there is no model, and adapters beside random weights learn nothing of use; give" in line


def test_divergence_ends_the_run_without_saving(dataset_prefix, tmp_path):
    words = [*MODEL, *RUN, "--data-path", dataset_prefix, "--save", tmp_path / "run", "--clip-grad", 0, "--lr", "1e30"]
    line = refused(*words)
    assert "step 2: the gradient norm is nan; it updated nothing. Every sample of the batch has a finite loss" in line
    assert "so the weights are to blame: training has diverged. Lower --lr" in line
    assert line.endswith("and start again: no checkpoint was saved before that")
    assert not list((tmp_path / "run").glob("iter_*"))


def test_a_disk_that_takes_no_checkpoint_is_one_line_before_anything_is_trained(run_folder, dataset_prefix, tmp_path):
    """The files of the run fit, those of a checkpoint do not, which the rehearsal of a save finds."""
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    words = [*RUN, "--data-path", dataset_prefix, "--load", folder, "--save", folder, "--train-iters", 6]
    with largest_file(200_000):
        process = run_tool("pretrain_mft.py", *words)
    assert process.returncode == STORAGE
    line = refusal(process)
    assert f"error: {folder}: cannot be written in a rehearsal of a save (File too large for the file " in line
    assert "nothing was trained" in line
    assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == "5"
    assert records(folder, "train")[-1]["step"] == 5
    assert not list(folder.glob(".saving*"))


def damaged(run_folder, target, change):
    """Copy the last checkpoint of the run and damage one file of it."""
    shutil.copytree(run_folder / "iter_0000005", target / "iter_0000005")
    path = target / "iter_0000005"
    if change == "no index":
        (path / ".metadata").unlink()
    else:
        # the largest file has weights, others may have random states only
        shard = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
        shard.unlink() if change == "missing" else shard.write_bytes(shard.read_bytes()[:2000])
    return path


@pytest.mark.parametrize("change", ["missing", "truncated", "no index"])
def test_a_damaged_checkpoint_is_refused_in_one_line(run_folder, dataset_prefix, tmp_path, change):
    path = damaged(run_folder, tmp_path, change)
    said = {
        "missing": " is missing; ",
        "truncated": " is cut off: 2,000 of ",
        "no index": "its file .metadata is missi",
    }
    words = [*RUN, "--data-path", dataset_prefix, "--load", path, "--train-iters", 6]
    for line in (
        refused(*words),
        refusal(run_forked("tools/convert_checkpoint.py", "mcore-to-hf", "--load", path, "--hf", tmp_path / "hf")),
    ):
        assert line.startswith(f"error: {path}: its ")
        assert said[change] in line
        assert line.endswith("; there is no other checkpoint beside it")
    assert not (tmp_path / "hf").exists()


def test_an_export_with_another_models_tokenizer_keeps_its_configuration(run_folder, tokenizer_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tokenizer_folder, other)
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        (other / name).write_text("{}")
    process = run_forked(
        *("tools/convert_checkpoint.py", "mcore-to-hf", "--load", run_folder, "--hf", tmp_path / "hf"),
        *("--tokenizer-model", other),
    )
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["hidden_size"] == 64
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert not (tmp_path / "hf" / "model.safetensors.index.json").exists()


def test_a_file_in_place_of_the_run_folder_is_named(dataset_prefix, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused(*MODEL, *RUN, "--data-path", dataset_prefix, "--save", tmp_path / "file")
