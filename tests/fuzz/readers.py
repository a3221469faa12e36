"""Everything that reads files of users: how to make a whole example of its files, and how to read them."""

import dataclasses
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from mft_megatron.run_folder.description import CheckpointInfo, write_info
from mft_megatron.run_folder.names import iteration_folder
from tests.made_dataset import write_dataset

LENGTH = 64
RECORDS = (
    {
        "messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "a + b", "weight": 1}],
        "id": 7,
    },
    {"instruction": "Write a test.", "input": "def f(): ...", "output": "def test_f(): ..."},
    {"prompt": "def f(", "completion": "x):\n    return x"},
    {"chat_rounds": [{"role": "human", "content": "Hi"}, {"role": "bot", "content": "Hello"}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "tools": "[]"},
    {"text": "print(1)\n" * 9},
)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader of files, and an example of whole ones.

    Attributes:
        make: writes whole files into an empty folder, given the folder of a tokenizer.
        read: reads them; raises an InputError where they are damaged.
        files: patterns of the files that are damaged.
    """

    make: Callable[[Path, Path], None]
    read: Callable[[Path], object]
    files: str = "*"


def _records(suffix, compress=lambda content: content):
    def make(folder, tokenizer):
        content = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
        (folder / f"task.jsonl{suffix}").write_bytes(compress(content))
        shutil.copytree(tokenizer, folder / "tokenizer")

    return Reader(make, _read_task(f"task.jsonl{suffix}"), "task*")


def _read_task(file):
    return lambda folder: _preprocess(folder, f"task={folder}/{file}")


def _parquet(folder, tokenizer):
    import pyarrow
    import pyarrow.parquet

    rows = [record for record in RECORDS if "prompt" in record] * 5
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "task.parquet")
    shutil.copytree(tokenizer, folder / "tokenizer")


def _preprocess(folder, task):
    from mft_megatron.data.command import preprocess_main

    output = folder / "output"
    output.mkdir()
    words = f"--task {task} --tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}/tokenizer".split()
    words += f"--chat-template chatml --seq-length {LENGTH} --on-error skip --output-prefix {output}/set".split()
    preprocess_main(words)


def _task_file(folder, tokenizer):
    (folder / "a.jsonl").write_text(json.dumps(RECORDS[2]) + "\n")
    (folder / "tasks.yaml").write_text(
        "fill:\n  path: a.jsonl\n  weight: 2.5\n  sampling: 1.5\nother:\n  paths: [a.jsonl]\n"
    )


def _read_task_file(folder):
    from mft_megatron.data.tasks.task_file import read_task_file

    read_task_file(folder / "tasks.yaml")


def _dataset(folder, tokenizer):
    write_dataset(str(folder / "set"), LENGTH, tasks={"a": 20, "b": 40}, weighted="samples turns")


def _read_dataset(folder):
    from mft_megatron.data.loading.dataset import PackedDataset
    from mft_megatron.data.loading.step_plan import plan_step

    split = PackedDataset.open(str(folder / "set"), LENGTH).split("train")
    plan = plan_step(
        split, seed=1, global_batch_size=2, consumed_samples=0, end=None, batch_multiple=2, order_version=2
    )
    for pack in plan.packs_G.tolist():
        split.slices_of(pack)


def _checked_dataset(folder):
    from mft_megatron.data.inspect import check
    from mft_megatron.data.storage.ledger import read_ledger

    prefix = str(folder / "set")
    check(prefix, read_ledger(prefix))


def _checkpoint(folder, tokenizer):
    from mft_megatron.mcore.checkpointing.tensor_writer import Weight, write_weights
    from mft_megatron.mcore.checkpointing.weight_source import WeightSlice

    path = iteration_folder(folder, 3)
    path.mkdir()
    weight = torch.arange(24.0).view(2, 3, 4)

    class Source:
        def read(self, wanted):
            return weight[wanted.index][wanted.region]

    slices = [WeightSlice("layers.w", (layer,), (0, 0), (3, 4)) for layer in range(2)]
    write_weights(path, {"layers.w": Weight("layers.w", (2, 3, 4), torch.float32)}, slices, Source(), 200)
    info = CheckpointInfo(
        3, 24, {"num_layers": 2}, 99, {"type": "x"}, "a" * 64, 1, 8, layout={"tensor": 1, "device": "cpu"}
    )
    write_info(path, info)
    (folder / "latest_checkpointed_iteration.txt").write_text("3\n")


def _read_checkpoint(folder):
    from mft_megatron.common_state import read_common
    from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader
    from mft_megatron.run_folder.files import damage
    from mft_megatron.run_folder.found import latest_checkpoint

    path = latest_checkpoint(folder).path
    damage(path)
    read_common(path)
    reader = TensorReader(path)
    for name in reader.names():
        reader.read(name)


def _model(folder, tokenizer):
    from safetensors.torch import save_file

    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32, "rms_norm_eps": 1e-6}
    config |= {"max_position_embeddings": 64, "hidden_act": "silu", "rope_scaling": {"type": "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a.weight": torch.ones(3, 4)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b.weight": torch.ones(5).half()}, folder / "model-00002-of-00002.safetensors")
    names = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _read_model(folder):
    from mft_megatron.convert.huggingface.model_folder import read_architecture, unread_entries
    from mft_megatron.convert.huggingface.safetensors_reader import WeightFiles

    read_architecture(folder)
    unread_entries(folder)
    WeightFiles(folder)


def _adapter(folder, tokenizer):
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "rank_pattern": {"q_proj": 2}, "use_rslora": False})
    )


def _read_adapter(folder):
    from mft_megatron.convert.peft.config import read_config

    read_config(folder)


def _tokenizer(folder, tokenizer):
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    )


def _read_tokenizer(folder):
    from mft_megatron.data.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer("HuggingFaceTokenizer", folder)
    _ = tokenizer.vocab_size, tokenizer.fingerprint, tokenizer.chat_template, tokenizer.special_tokens


def _options_file(folder, tokenizer):
    (folder / "run.yaml").write_text("network:\n  num_layers: 2\nhidden_size: 64\nlr: 1e-4\nbf16: true\n")


def _read_options_file(folder):
    from mft_megatron.arguments.command import read_command_line

    read_command_line(["--yaml-cfg", str(folder / "run.yaml")])


def _tokens(folder, tokenizer):
    """Tokens of Megatron-LM, which are packed as a task."""
    write_dataset(str(folder / "set"), LENGTH, tasks={"a": 40})
    for suffix in ("bin", "idx"):
        (folder / f"set_input_ids.{suffix}").rename(folder / f"task.{suffix}")
    for other in folder.glob("set*"):
        other.unlink()
    shutil.copytree(tokenizer, folder / "tokenizer")


def _zstd(content):
    import zstandard

    return zstandard.compress(content)


READERS = {
    "records": _records(""),
    "records, gzip": _records(".gz", gzip.compress),
    "records, zstd": _records(".zst", _zstd),
    "records, parquet": Reader(_parquet, _read_task("task.parquet"), "task*"),
    "tokens": Reader(_tokens, _read_task("task.idx"), "task*"),
    "task file": Reader(_task_file, _read_task_file, "*.yaml"),
    "ledger": Reader(_dataset, _checked_dataset, "set_dataset.json"),
    "arrays": Reader(_dataset, _checked_dataset, "set_*"),
    "data set in training": Reader(_dataset, _read_dataset, "set_dataset.json"),
    "checkpoint": Reader(_checkpoint, _read_checkpoint, "**/*"),
    "model": Reader(_model, _read_model),
    "adapter": Reader(_adapter, _read_adapter),
    "tokenizer": Reader(_tokenizer, _read_tokenizer),
    "options file": Reader(_options_file, _read_options_file),
}
