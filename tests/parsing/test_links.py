"""A link is copied where it leads to a file of the same name, or into the cache of Hugging Face."""

import pytest

from mft_megatron.convert.huggingface.model_folder import kept_files
from mft_megatron.errors import InputError
from mft_megatron.parsing.links import refuse_odd_link
from mft_megatron.run_folder.tokenizer import copy_tokenizer


@pytest.fixture
def model(tmp_path):
    """A folder of a model with one file, and a secret beside it."""
    (tmp_path / "secret").write_text("key")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname"])
def test_links_to_other_files_are_refused(model, tmp_path, target):
    for name in ("LICENSE", "tokenizer.json"):
        (model / name).symlink_to(target)
    with pytest.raises(InputError, match=r"LICENSE: a link to /.*; put a copy there, or remove it"):
        kept_files(model)
    with pytest.raises(InputError, match=r"tokenizer\.json: a link to"):
        copy_tokenizer(model, tmp_path / "copy")
    assert not (tmp_path / "copy" / "tokenizer.json").exists()


def test_links_to_the_same_file_elsewhere_are_copied(model, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "LICENSE").write_text("MIT")
    (model / "LICENSE").symlink_to("../other/LICENSE")
    assert [file.name for file in kept_files(model)] == ["LICENSE", "config.json"]


def test_files_of_the_cache_are_copied(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "rev"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs" / "0a1b").write_text("MIT")
    snapshot.mkdir(parents=True)
    (snapshot / "LICENSE").symlink_to("../../blobs/0a1b")
    refuse_odd_link(snapshot / "LICENSE")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "LICENSE").symlink_to("../models--a--b/blobs/0a1b")
    with pytest.raises(InputError, match="a link to"):
        refuse_odd_link(tmp_path / "elsewhere" / "LICENSE")
