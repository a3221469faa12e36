"""The checkpoint that a run goes back to: whole, with states of the optimizer, and of its own past."""

from types import SimpleNamespace

import pytest

from mft_megatron.run_folder import verification
from mft_megatron.training.bad_steps import good_checkpoint as module
from mft_megatron.training.saving.saver import Saver
from tests.saved_checkpoints import write_small


def change_byte(path):
    file = path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Options of a run on one rank."""
    monkeypatch.setattr(module.process_groups, "is_main", lambda: True)
    monkeypatch.setattr(module.process_groups, "object_from_main", lambda value: value)
    monkeypatch.setattr(module, "verify", verification.verify)
    return SimpleNamespace(save=str(tmp_path), verify_checkpoint=verification.AUTO)


def test_damaged_checkpoints_are_named_and_passed_over(tmp_path, options):
    paths = [write_small(tmp_path, step, has_optimizer=True) for step in (10, 20, 30)]
    lines = []

    def found(most):
        lines.clear()
        arguments = SimpleNamespace(checkpoint=options)
        checkpoint = module.good_checkpoint(arguments, most, lambda step: True, lines.append)
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


def test_those_without_states_of_the_optimizer_or_of_another_past_are_passed_over(tmp_path, options, monkeypatch):
    """A run that resumed from step 10, in a folder that still has what came after it before."""
    for step in (10, 20, 30, 40):
        write_small(tmp_path, step, has_optimizer=step != 40)
    monkeypatch.setattr(Saver, "__init__", lambda self: None)
    saver = Saver()
    saver._resumed, saver._saved = 10, {30, 40}

    def found(most):
        arguments = SimpleNamespace(checkpoint=options)
        return module.good_checkpoint(arguments, most, saver.of_this_run, lambda line: None).info.iteration

    assert [found(most) for most in (45, 29)] == [30, 10]
    saver.go_back(10)
    assert found(45) == 10
