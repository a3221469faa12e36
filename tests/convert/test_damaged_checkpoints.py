"""Conversions compare a checkpoint with its hashes before they read a weight, and refuse a damaged one."""

import pytest

from mft_megatron.convert.commands.huggingface import mcore_to_hf
from mft_megatron.convert.commands.merge import merge_lora
from mft_megatron.convert.commands.peft import lora_to_peft
from mft_megatron.exit_codes import DAMAGED
from mft_megatron.run_folder.manifest import DamagedCheckpointError
from mft_megatron.verify.packs.command import packs
from tests.saved_checkpoints import write_small

COMMANDS = {
    "mcore-to-hf": (mcore_to_hf, "--hf"),
    "lora-to-peft": (lora_to_peft, "--hf"),
    "merge-lora": (merge_lora, "--hf"),
    "verify packs": (packs, "--data-path"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, name):
    run = tmp_path / "run"
    whole, damaged = write_small(run, 10), write_small(run, 20)
    content = bytearray((damaged / "__3_0.distcp").read_bytes())
    content[300] ^= 2
    (damaged / "__3_0.distcp").write_bytes(content)
    command, target = COMMANDS[name]
    with pytest.raises(DamagedCheckpointError) as caught:
        command(["--load", str(run), target, str(tmp_path / "target")])
    line = str(caught.value)
    assert caught.value.code == DAMAGED
    assert line.startswith(f"{damaged}: its file __3_0.distcp is damaged: bytes 0 to ")
    assert line.endswith(f"give {whole} instead, or with --load in training --ckpt-step 10")
    assert not (tmp_path / "target").exists()
