"""Endings of a run are said and recorded."""

from mft_megatron.training.restarts.endings import Ending, left_before_the_export


def test_a_signal_during_the_export_is_said(capsys):
    ending = left_before_the_export(Ending(7))
    assert (ending.left, ending.hurried) == ("a signal during the export; the training is complete", True)
    assert capsys.readouterr().out == (
        "--save-hf: a signal came before the export at step 7; the next start makes it\n"
    )
    assert left_before_the_export(Ending(7, "a rank got SIGTERM")).left == "a rank got SIGTERM"
