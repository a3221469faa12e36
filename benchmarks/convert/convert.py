"""Conversions in both directions: peak memory and time on models of growing size.

::

    a Llama-shaped folder of random bf16 weights ─► hf-to-mcore ─► mcore-to-hf ─► compared byte by byte
                                                 └► a plain copy: read and write of the same bytes

Each conversion is a separate process, so that its peak memory is its own; imports are measured alone and printed
beside it. Everything is written through to the disk (fsync), and input is dropped from the page cache before it is
read, as far as the system allows. ``--largest`` adds one layer of a 70B model with its vocabulary: a conversion holds
one weight at a time, so that more layers take no more memory.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import resident_bytes

BLOCK = 16 * 2**20
# hidden, ffn, heads, groups, vocabulary
HUGE = (8192, 28672, 64, 8, 128256)
SHARD = "1GB"


def write_model(folder: Path, shape: tuple[int, ...], layers: int) -> int:
    """Write random bf16 weights in shards; returns the bytes of the weights."""
    import torch

    from mft_megatron.convert.huggingface.families.llama import LLAMA
    from mft_megatron.convert.huggingface.row_layouts import sizes_of
    from mft_megatron.convert.huggingface.safetensors_writer import PlannedWeight, ShardWriter

    hidden, ffn, heads, groups, vocabulary = shape
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    architecture = LLAMA.read_config(config)
    sizes = sizes_of(architecture, vocabulary)
    planned = [
        PlannedWeight(name, torch.bfloat16, shape)
        for weight in LLAMA.weights(architecture)
        for index in weight.indices(architecture)
        for name, shape in zip(weight.hf_names_at(index), weight.hf_shapes(sizes), strict=True)
    ]
    writer = ShardWriter(folder, planned, 10**9)
    generator = torch.Generator().manual_seed(1)
    for weight in planned:
        # bits of finite numbers; a model with NaN or infinities is refused
        values = torch.empty(weight.shape, dtype=torch.int16).random_(0, 0x7F80, generator=generator)
        writer.write(weight.name, values.view(torch.bfloat16))
    writer.finish()
    return sum(weight.size for weight in planned)


def copy(source: Path, target: Path) -> None:
    """Copy the same bytes, block by block."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        with open(file, "rb", buffering=0) as read, open(target / file.name, "wb", buffering=0) as written:
            while block := read.read(BLOCK):
                written.write(block)
            os.fsync(written.fileno())


def to_mcore(source: Path, target: Path) -> None:
    """Convert from Hugging Face."""
    from mft_megatron.convert.commands.huggingface import hf_to_mcore

    hf_to_mcore(["--hf", str(source), "--save", str(target)])


def to_hf(source: Path, target: Path) -> None:
    """Convert to Hugging Face."""
    from mft_megatron.convert.commands.huggingface import mcore_to_hf

    mcore_to_hf(["--load", str(source), "--hf", str(target), "--max-shard-size", SHARD])


def imports(source: Path, target: Path) -> None:
    """Import what a conversion imports."""
    import mft_megatron.convert.commands.convert
    import mft_megatron.convert.huggingface.model_export
    import mft_megatron.convert.huggingface.model_import  # noqa: F401


WORK: dict[str, Callable[[Path, Path], None]] = {
    "imports": imports,
    "copy": copy,
    "hf-to-mcore": to_mcore,
    "mcore-to-hf": to_hf,
}


def work(name: str, source: Path, target: Path) -> None:
    """Do the work in this process, and print wall time, CPU time and peak memory; the times leave out imports."""
    if name != "copy":
        imports(source, target)
    before, start = time.process_time(), time.perf_counter()
    WORK[name](source, target)
    seconds, cpu = time.perf_counter() - start, time.process_time() - before
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": resident_bytes("VmHWM")}))


def measured(name: str, source: Path, target: Path) -> dict[str, float]:
    """Measure the work in a separate process, after its input has left the page cache."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    for file in source.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--work", name, str(source), str(target)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same bytes under the same names."""
    from mft_megatron.convert.huggingface.safetensors_reader import WeightFiles, same_content

    a, b = WeightFiles(one), WeightFiles(other)
    return a.weights.keys() == b.weights.keys() and all(same_content(a, name, b, name) for name in a.weights)


def main() -> None:
    """Measure, print the tables, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; needs three times the largest model")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 12, 66], help="of the models")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the models, a multiple of 128")
    parser.add_argument("--largest", action="store_true", help="also a layer and the vocabulary of a 70B model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        name, source, target = options.work
        return work(name, Path(source), Path(target))
    heads = options.hidden // 64
    small = (options.hidden, options.hidden * 11 // 4, heads, heads // 2, 32016)
    models = [(small, layers) for layers in options.layers] + ([(HUGE, 1)] if options.largest else [])
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        base = measured("imports", root, root / "none")["peak"]
        print(f"imports alone: {base / 2**20:.0f} MiB", flush=True)
        print(
            "| weights | | seconds | times a copy | CPU seconds | peak above imports |\n|---:|---|---:|---:|---:|---:|"
        )
        for shape, layers in models:
            hf, checkpoint, back = root / "hf", root / "checkpoint", root / "back"
            size = write_model(hf, shape, layers)
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ("copy", "hf-to-mcore", "mcore-to-hf")}
            for _ in range(options.repeats):
                for name, source, target in (
                    ("copy", hf, root / "copy"),
                    ("hf-to-mcore", hf, checkpoint),
                    ("mcore-to-hf", checkpoint, back),
                ):
                    rounds[name].append(measured(name, source, target))
                    shutil.rmtree(root / "copy", ignore_errors=True)
            if not same_weights(hf, back):
                raise SystemExit("the weights have changed")
            for name, readings in rounds.items():
                ratios = [r["seconds"] / c["seconds"] for r, c in zip(readings, rounds["copy"], strict=True)]
                middle = {key: sorted(r[key] for r in readings)[len(readings) // 2] for key in readings[0]}
                above = "" if name == "copy" else f"{(middle['peak'] - base) / 2**20:.0f} MiB"
                print(
                    f"| {size / 1e9:.2f} GB | {name} | {middle['seconds']:.1f} | "
                    f"{sorted(ratios)[len(ratios) // 2]:.2f} | {middle['cpu']:.1f} | {above} |",
                    flush=True,
                )
            for path in (hf, checkpoint, back):
                shutil.rmtree(path)


if __name__ == "__main__":
    main()
