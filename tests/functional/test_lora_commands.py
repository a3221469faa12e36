"""Commands for adapters, as a user runs them: export, merging, listing."""

import shutil

import pytest
from safetensors.torch import load_file

from tests.ranks import run_forked, torchrun
from tests.refusals import refusal

TOOL = "tools/convert_checkpoint.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with two checkpoints of adapters alone, beside the folder of its model."""
    from tests.convert import made_adapters, tiny_models

    root = tmp_path_factory.mktemp("adapters")
    tiny_models.write_model("qwen2 tied", root / "hf")
    info = made_adapters.info_of(root / "hf")
    for iteration in (7, 14):
        made_adapters.write_random_adapters(
            root / "run", info, ("linear_qkv", "up_proj"), seed=iteration, iteration=iteration, base=str(root / "hf")
        )
    (root / "run" / "best_checkpointed_iteration.txt").write_text("7\n")
    shutil.copytree(root / "hf", root / "run" / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    return root / "run"


def test_export_merge_and_list(run, tmp_path):
    process = run_forked(TOOL, "lora-to-peft", "--load", run, "--hf", tmp_path / "peft")
    assert process.returncode == 0, process.stderr
    assert "LoRA of rank 3, alpha 5, on linear_qkv, up_proj, iteration 14" in process.stdout
    files = {path.name for path in (tmp_path / "peft").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for number, words in enumerate(
        (("--load", run), ("--load", run, "--best"), ("--adapter", tmp_path / "peft", "--base", run.parent / "hf"))
    ):
        process = run_forked(TOOL, "merge-lora", *words, "--hf", tmp_path / str(number))
        assert process.returncode == 0, process.stderr
        assert f"-> {tmp_path / str(number)}: Qwen2" in process.stdout
    newest, best, adapter = (load_file(tmp_path / str(number) / "model.safetensors") for number in range(3))
    assert all(newest[name].equal(adapter[name]) for name in newest)
    differing = {name.split(".")[-2] for name in newest if not newest[name].equal(best[name])}
    assert differing == {"q_proj", "k_proj", "v_proj", "up_proj"}


def test_listed(run, tmp_path):
    process = run_forked(TOOL, "lora-to-peft", "--load", run, "--hf", tmp_path / "peft", "--base-model-name", "a/b")
    assert process.returncode == 0, process.stderr
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "iter_0000021").mkdir()  # a save that was never finished
    (tmp_path / "run" / "iter_0000014" / "mft_checkpoint.json").write_text("{")
    process = run_forked(TOOL, "adapters", tmp_path)
    assert process.returncode == 0, process.stderr
    note, header, peft, checkpoint = process.stdout.splitlines()
    assert note.startswith(f"not read: {tmp_path}/run/iter_0000014/mft_checkpoint.json: not a checkpoint description")
    assert header.split() == "adapter kind iteration packs rank alpha rsLoRA on MB dtype base".split()
    on = "q_proj,k_proj,v_proj,up_proj"
    assert sorted(peft.split()[7].split(",")) == sorted(on.split(","))
    cells = peft.split()
    assert cells[:7] + cells[8:] == [f"{tmp_path}/peft", *"PEFT - - 3 5 no 0.0 float32 a/b".split()]
    expected = [f"{tmp_path}/run/iter_0000007", *"adapters 7 28 3 5 no linear_qkv,up_proj 0.0 float32".split()]
    assert checkpoint.split() == [*expected, f"{run.parent}/hf"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("adapters",), "give the folders to search: adapters DIR"),
        (("adapters", "HERE"), "no adapters in or below; give folders"),
        (("adapters", "HERE/absent"), "absent: is no folder"),
        (("lora-to-peft", "--hf", "HERE/a"), "missing option: give --load"),
        (("merge-lora", "--adapter", "HERE", "--base", "HERE", "--hf", "HERE/a"), "is neither a Hugging Face folder"),
        (("merge-lora", "--adaptor", "HERE"), "unknown option --adaptor; did you mean --adapter?"),
    ],
)
def test_refused(words, reason, tmp_path):
    process = run_forked(TOOL, *(word.replace("HERE", str(tmp_path)) for word in words))
    assert reason in refusal(process)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT
@pytest.mark.parametrize(
    "alone",
    [
        pytest.param((), marks=pytest.mark.slow, id="with the model"),
        pytest.param(("--save-adapters-only",), id="alone"),
    ],
)
def test_trained_on_several_ranks_and_exported(dataset_prefix, tokenizer_folder, tmp_path, alone):
    """Adapters trained on two ranks give the same logits in PEFT and merged, and other logits than before."""
    from tests.convert import made_adapters, tiny_models

    sizes = {"vocab_size": 500, "max_position_embeddings": 256}
    tiny_models.write_model("llama", tmp_path / "hf", tokenizer=tokenizer_folder, **sizes)
    process = torchrun(
        2,
        "pretrain_mft.py",
        *"--tensor-model-parallel-size 2 --micro-batch-size 2 --global-batch-size 4 --train-iters 4".split(),
        *"--eval-iters 0 --attention-dropout 0 --hidden-dropout 0 --lr 1e-2 --lr-decay-style constant".split(),
        *"--peft-type lora --lora-rank 4 --lora-target-modules q_proj v_proj linear_fc1 linear_proj".split(),
        *("--data-path", dataset_prefix, "--hf-checkpoint", tmp_path / "hf", "--save", tmp_path / "run"),
        *("--save-hf", tmp_path / "exports", *alone),
    )
    assert process.returncode == 0, process.stderr
    process = run_forked(TOOL, "merge-lora", "--load", tmp_path / "run", "--hf", tmp_path / "merged")
    assert process.returncode == 0, process.stderr
    before = made_adapters.logits_of(made_adapters.load(tmp_path / "hf", "float32"))
    adapter = tmp_path / "exports" / "iter_0000004"
    adapted = made_adapters.logits_of(made_adapters.load_with_adapter(tmp_path / "hf", adapter))
    merged = made_adapters.logits_of(made_adapters.load(tmp_path / "merged", "float32"))
    assert (adapted - merged).abs().max() < 1e-4
    assert (adapted - before).abs().max() > 0.1
