"""The command line of all certificates."""

import pytest

from mft_megatron.verify.command import CERTIFICATES, main


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_says_what_each_certificate_shows(words, capsys):
    assert main(words) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: verify.py {objective,packs} [options]\n")
    for name, (shows, _) in CERTIFICATES.items():
        assert f"{name:<11}{shows}\n" in text
