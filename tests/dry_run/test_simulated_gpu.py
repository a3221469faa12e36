"""Each replacement for a simulated GPU is still needed: without it something fails, or is another thing."""

import subprocess
import sys
from pathlib import Path

import pytest

from mft_megatron.mcore.platform import patches

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys, torch
sys.path.insert(0, {root!r})
from mft_megatron.mcore.platform import devices, patches
from mft_megatron.mcore.platform.simulated_gpu import SIMULATED_GPUS
from mft_megatron.mcore.platform.simulation import listener
del patches.SIMULATED[{name!r}]
devices.simulate(SIMULATED_GPUS["h100-80g"])
import mft_megatron.mcore.platform.patched
from mft_megatron.mcore.platform.simulation.device_mode import running
from mft_megatron.mcore.platform.simulation.process_group import start
class Prints(listener.Nobody):
    def resized(self, storage): print("resized")
    def waited(self, kind): print("waited")
listener.listen(Prints())
"""
# each prints something else, or fails, with the replacement
SHOWN = {
    "jit": "import megatron.core.jit as j; print(j.jit_fuser is torch.compile)",
    "tensor methods": "print(torch.empty(1, device='meta').type())",
    "tensors of values": "torch.tensor([1.0], device='cuda')",
    "sizes of storages": (
        "t = torch.empty(8, device='meta'); t.untyped_storage().resize_(0); print(t.untyped_storage().nbytes())"
    ),
    "choices of kernels": (
        "p = torch.nn.Parameter(torch.empty(8, device='meta')); p.grad = p.detach()\n"
        "torch.optim.AdamW([p], fused=True).step()"
    ),
    "objects of other ranks": (
        "start(0, 2); o = [None, None]; torch.distributed.all_gather_object(o, 'mine'); print(o == ['mine', 'mine'])"
    ),
    "messages sent together": (
        "start(0, 2); t = torch.empty(8, device='meta')\n"
        "from megatron.core.distributed import param_and_grad_buffer as b\n"
        "with b._coalescing_manager(torch.distributed.group.WORLD, async_ops=True) as c:\n"
        "    torch.distributed.all_reduce(t)\n"
        "c.wait()"
    ),
}
DONE = {
    "jit": "True",
    "tensor methods": "torch.meta.FloatTensor",
    "sizes of storages": "0",
    "objects of other ranks": "True",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", patches.SIMULATED)
def test_each_is_still_needed(name):
    body = SHOWN[name].replace("\n", "\n    ")
    code = WITHOUT.format(root=str(ROOT), name=name) + f"with running({{}}):\n    {body}\n"
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    if name in DONE:
        assert process.stdout.strip() == DONE[name], process.stderr
    else:
        assert process.returncode, process.stdout
        assert "Error" in process.stderr
