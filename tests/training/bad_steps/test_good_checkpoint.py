"""The checkpoint that a run goes back to after a bad step is whole."""

from types import SimpleNamespace

from mft_megatron.run_folder import verification
from mft_megatron.training.bad_steps import good_checkpoint as module
from tests.saved_checkpoints import write_small


def change_byte(path):
    file = path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)


def test_damaged_checkpoints_are_named_and_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(module.process_groups, "is_main", lambda: True)
    monkeypatch.setattr(module.process_groups, "object_from_main", lambda value: value)
    monkeypatch.setattr(module, "verify", verification.verify)
    paths = [write_small(tmp_path, step) for step in (10, 20, 30)]
    options = SimpleNamespace(save=str(tmp_path), verify_checkpoint=verification.AUTO)
    lines = []

    def found(most):
        lines.clear()
        checkpoint = module.good_checkpoint(SimpleNamespace(checkpoint=options), most, lines.append)
        return None if checkpoint is None else checkpoint.path

    assert found(25) == paths[1]
    assert [line.split(": ")[1] for line in lines] == ["whole"]
    change_byte(paths[1])
    assert found(25) == paths[0]
    assert lines[0].startswith(f"damaged: {paths[1]}: its file __0_0.distcp is damaged: bytes 0 to ")
    assert len(lines) == 2
    change_byte(paths[0])
    assert found(25) is None
    options.save = None
    assert found(25) is None
