"""Registers, spilled bytes and narrow offsets of every Triton kernel, compiled for GPUs that are not here; prints JSON.

Usage: ``python -m tests.mcore.kernels.compiled [COMPUTE CAPABILITY …]``, 80 and 90 by default. It needs Triton, which
brings NVIDIA's assembler, and no GPU.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mft_megatron.mcore.kernels import norm_triton, rotary_triton


def rotary_variants():
    """Name, kernel, signature and constants of the rotation at a 70B model's sizes, and with a part of each head."""
    for heads, size, pairs, interleaved in ((8, 128, 64, False), (64, 128, 64, False), (8, 80, 10, True)):
        constants = dict(
            PAIRS=pairs, SIZE=size, INTERLEAVED=interleaved, BACK=False, **rotary_triton.blocks(heads, pairs, size)
        )
        signature = {
            **dict.fromkeys(("value", "result"), "*bf16"), **dict.fromkeys(("cos", "sin"), "*fp32"),
            **dict.fromkeys(("heads", "token_stride", "head_stride"), "i32"),
        }  # fmt: skip
        yield f"rotary {heads}x{size}", rotary_triton.rotate_kernel, signature, constants, 4


def norm_variants():
    """Name, kernel, signature and constants of norms of the widest rows, of a 70B model's, and of heads."""
    fp32 = dict.fromkeys(("mean", "scale", "of_weight", "of_bias"), "*fp32")
    pointers = dict.fromkeys(("hidden", "weight", "bias", "normed", "gradient", "of_hidden"), "*bf16") | fp32
    numbers = dict.fromkeys(("rows", "row_stride", "gradient_stride"), "i32") | {"eps": "fp32", "shift": "fp32"}
    for size in (norm_triton.LONGEST_ROW, 5120, 128):
        for centered in (False, True):
            for kernel in (norm_triton.forward_kernel, norm_triton.backward_kernel):
                constants = dict(SIZE=size, CENTERED=centered, TRAINED=True, **norm_triton.blocks(size))
                warps = constants.pop("num_warps")
                constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
                name = f"norm {kernel.__name__.partition('_')[0]} {size}{' centered' if centered else ''}"
                yield name, kernel, pointers | numbers, constants, warps


def compiled(kernel, signature, constants, warps, capability):
    """Compile a kernel; return the assembler's registers and spilled bytes a thread, and offsets of rows in 32 bits."""
    signature = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    pointers = [index for index, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in pointers})
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder, "kernel.ptx")
        code.write_text(result.asm["ptx"])
        target = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [assembler(), "-v", f"-arch={target}", str(code), "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    narrow = re.findall(r"tt\.addptr .*(?:ptr<\w+>, i32|tensor<\d+x1xi32>) loc", result.asm["ttir"])
    return {"registers": registers, "spilled": spills, "narrow": len(narrow)}


def assembler():
    """Path of the assembler that Triton brings."""
    return str(next(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas")))


if __name__ == "__main__":
    targets = [int(word) for word in sys.argv[1:]] or [80, 90]
    json.dump(
        {
            f"{name} sm_{target}": compiled(*variant, target)
            for name, *variant in (*rotary_variants(), *norm_variants())
            for target in targets
        },
        sys.stdout,
        indent=1,
    )
