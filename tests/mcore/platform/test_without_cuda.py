"""Each patch for machines without CUDA is still needed, and none of them changes what other libraries use."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mft_megatron.mcore.platform import patches, without_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA nothing is patched")
ROOT = Path(__file__).parents[3]
# Two steps, a save and a load, with one patch taken away before Megatron-Core is imported.
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from mft_megatron.mcore.platform import patches, without_cuda
{disable}
if __name__ == "__main__":
    from pathlib import Path
    from tests.parallel.run import train_save_load
    print(train_save_load({prefix!r}, {folder!r}))
"""
# needed by a loss scale (parallel/test_precision.py)
ELSEWHERE = ("optimizer.grad_scaler",)
DISABLE = {
    **{name: f"del patches.WITHOUT_CUDA[{name!r}]" for name in patches.WITHOUT_CUDA},
    **{
        name: f"without_cuda.FACTORY_USERS = tuple(n for n in without_cuda.FACTORY_USERS if n != {name!r})"
        for name in without_cuda.FACTORY_USERS
        if name not in ELSEWHERE
    },
    "": "",
}


def run_without(prefix, folder, disable):
    """Run the script with a patch disabled; returns the finished process."""
    script = folder / "script.py"
    values = {"root": str(ROOT), "prefix": prefix, "folder": str(folder / "run")}
    script.write_text(SCRIPT.format(disable=disable, **values))
    return subprocess.run([sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
# without jit it is only slower; token counts need ranks with experts: tests/parallel/test_experts.py
@pytest.mark.parametrize("name", [name for name in DISABLE if name not in ("jit", "token counts of experts")])
def test_each_is_still_needed(dataset_prefix, tmp_path, name):
    process = run_without(dataset_prefix, tmp_path, DISABLE[name])
    assert (process.returncode == 0) == (name == ""), process.stdout + process.stderr[-2000:]


def test_megatron_compiles_by_default():
    """Without its patch Megatron-Core's small functions go through torch.compile."""
    folder = Path(importlib.util.find_spec("megatron.core").submodule_search_locations[0])
    code = (
        "import sys, types, torch, runpy\n"
        # the package itself would import everything else
        "sys.modules['megatron.core'] = types.ModuleType('megatron.core')\n"
        "sys.modules['megatron.core.utils'] = utils = types.ModuleType('megatron.core.utils')\n"
        "utils.is_torch_min_version = lambda version: True\n"
        f"assert runpy.run_path({str(folder / 'jit.py')!r})['jit_fuser'] is torch.compile"
    )
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_torch_itself_is_not_changed():
    """Other libraries in the process make tensors too: wrapped factories once broke loading in transformers."""
    code = (
        "import torch\n"
        "def factories(): return torch.empty, torch.zeros, torch.tensor, torch.arange, torch.empty_like\n"
        "before = factories()\n"
        "import mft_megatron.mcore.platform.patched\n"
        "assert factories() == before"
    )
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
