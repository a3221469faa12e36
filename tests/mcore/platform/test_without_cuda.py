"""Every replacement for machines without CUDA is still needed, and none of them touches what others use."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mft_megatron.mcore.platform import without_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is replaced where there is CUDA")
ROOT = Path(__file__).parents[3]
# Two steps, a save and a load, with one replacement taken away before Megatron-Core is imported.
SCRIPT = """
import importlib.util, sys
sys.path.insert(0, {root!r})
spec = importlib.util.spec_from_file_location("mft_megatron.mcore.platform.without_cuda", {module!r})
without_cuda = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(without_cuda)
{disable}
if __name__ == "__main__":
    from pathlib import Path
    from tests.parallel.run import train_save_load
    print(train_save_load({prefix!r}, {folder!r}))
"""
# needed by a loss scale (parallel/test_precision.py) and by ranks that share the reading of a checkpoint
# (parallel/test_checkpoints_of_distributed_optimizer.py)
ELSEWHERE = ("optimizer.grad_scaler", "dist_checkpointing.exchange_utils")
DISABLE = {
    **{name: f"del without_cuda.REPLACEMENTS[{name!r}]" for name in without_cuda.REPLACEMENTS},
    **{
        name: f"without_cuda.FACTORY_USERS = tuple(n for n in without_cuda.FACTORY_USERS if n != {name!r})"
        for name in without_cuda.FACTORY_USERS
        if name not in ELSEWHERE
    },
    "": "",
}


def run_without(prefix, folder, disable):
    script = folder / "script.py"
    values = {"root": str(ROOT), "module": without_cuda.__file__, "prefix": prefix, "folder": str(folder / "run")}
    script.write_text(SCRIPT.format(disable=disable, **values))
    return subprocess.run([sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
# without jit it is only slower; the other takes ranks that share experts to see: tests/parallel/test_experts.py
@pytest.mark.parametrize("name", [name for name in DISABLE if name not in ("jit", "numbers of tokens")])
def test_each_is_still_needed(dataset_prefix, tmp_path, name):
    process = run_without(dataset_prefix, tmp_path, DISABLE[name])
    assert (process.returncode == 0) == (name == ""), process.stdout + process.stderr[-2000:]


def test_torch_itself_is_left_alone():
    """Other libraries in the process make tensors, too: wrapped factories once broke loading in transformers."""
    code = (
        "import torch\n"
        "def factories(): return torch.empty, torch.zeros, torch.tensor, torch.arange, torch.empty_like\n"
        "before = factories()\n"
        "import mft_megatron.mcore\n"
        "assert factories() == before"
    )
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
