"""JSON files of other programs: read as UTF-8 in every locale, and what is no object is one line."""

import os
import subprocess
import sys

import pytest

from mft_megatron.parsing.json_files import read_json_object
from tests.ranks import ROOT
from tests.refusals import refused_call


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "not JSON ("),
        (b"", "not JSON ("),
        (b'{"a": "\xe9"}', "not JSON ('utf-8' codec can't decode byte 0xe9"),
        (b"[" * 100_000, "not JSON (maximum recursion depth exceeded"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "is a pointer of Git LFS"),
    ],
)
def test_what_is_no_object_is_one_line(tmp_path, content, reason):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    line = refused_call(read_json_object, file)
    assert line.startswith(f"{file}: {reason}")
    advised = refused_call(read_json_object, file, "download it again")
    assert advised == (line if "Git LFS" in reason else f"{line}; download it again")


def test_text_is_utf_8_whatever_the_locale(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "é ▁的"}', encoding="utf-8")
    code = (
        "import locale, pathlib\nfrom mft_megatron.parsing.json_files import read_json_object\n"
        "print(locale.getpreferredencoding(False), ascii(read_json_object(pathlib.Path('config.json'))['name']))"
    )
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    output = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path, env=environment)
    encoding, text = output.rstrip().split(" ", 1)
    assert "UTF" not in encoding.upper()
    assert text == ascii("é ▁的")
