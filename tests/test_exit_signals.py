"""Signals that ask a run to save and leave, in processes of their own that import no torch."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest

from mft_megatron import exit_codes, exit_signals

SETUP = """
import os, signal, sys, threading, time
from mft_megatron import exit_signals
from mft_megatron.exit_signals import Phase, watched

exit_signals.SAME_REQUEST, exit_signals.GRACE = 0.3, 1.5
def tell(code, reason):
    print(code, reason, flush=True)
def hang():
    # as a collective does: the main thread runs no Python code, so no handler of a signal
    import ctypes
    print("hangs", flush=True)
    for _ in range(9):  # a signal ends each
        ctypes.CDLL(None).sleep(60)
"""


def start(body):
    """Start a process with this body, and wait until it has printed that it is ready, or hangs."""
    code = SETUP + textwrap.dedent(body)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() in ("ready\n", "hangs\n")
    return process


def end(process):
    """Code and output of a process that ends by itself."""
    try:
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    return process.returncode, output


def test_a_signal_is_remembered_and_one_that_a_launcher_passes_on_is_the_same_request():
    process = start("""
        with watched(before_leaving=tell):
            exit_signals.enter(Phase.STEPS)
            assert exit_signals.received() is None
            print("ready", flush=True)
            while exit_signals.received() is None:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
            print(exit_signals.received())
        print(signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL, threading.active_count())
    """)
    process.send_signal(signal.SIGUSR1)
    assert end(process) == (0, "SIGUSR1\nTrue 1\n")


@pytest.mark.parametrize(
    ("phase", "signals", "reason"),
    [
        ("STEPS", "TERM USR1", "a second signal, SIGUSR1: left at once"),
        ("START", "TERM", "SIGTERM before the first step"),
    ],
)
def test_a_process_that_hangs_leaves(phase, signals, reason):
    process = start(f"""
        with watched(before_leaving=tell):
            exit_signals.enter(Phase.{phase})
            hang()
    """)
    for name in signals.split():
        process.send_signal(signal.Signals[f"SIG{name}"])
        time.sleep(0.5)
    assert end(process) == (exit_codes.LEFT, f"10 {reason}\n")


def test_a_step_that_cannot_end_is_not_waited_for():
    process = start("""
        with watched(before_leaving=tell, hopeless=lambda: "another rank has ended"):
            exit_signals.enter(Phase.STEPS)
            hang()
    """)
    process.send_signal(signal.SIGTERM)
    assert end(process) == (exit_codes.FAILED, "1 another rank has ended\n")


@pytest.mark.parametrize("noted", ["", "exit_signals._watch._note(signal.SIGUSR1)"], ids=["", "the thread is first"])
def test_after_the_last_step_a_signal_is_obeyed_at_once_and_files_are_removed(noted):
    process = start(f"""
        with watched(before_leaving=tell):
            exit_signals.enter(Phase.AFTER)
            {noted}
            try:
                print("ready", flush=True)
                time.sleep(60)
            except exit_signals.LeaveNow:
                print("cleaned up")
    """)
    process.send_signal(signal.SIGUSR1)
    assert end(process) == (0, "cleaned up\n")


def test_a_signal_of_the_steps_is_obeyed_when_they_are_over():
    process = start("""
        with watched(before_leaving=tell):
            exit_signals.enter(Phase.STEPS)
            print("ready", flush=True)
            while exit_signals.received() is None:
                time.sleep(0.01)
            try:
                exit_signals.enter(Phase.AFTER)
            except exit_signals.LeaveNow:
                print("leaves")
    """)
    process.send_signal(signal.SIGUSR1)
    assert end(process) == (0, "leaves\n")


def test_forked_helpers_outlive_the_signals_that_a_scheduler_sends_to_every_process():
    process = start("""
        import multiprocessing
        def child(end):
            end.send("up")
            time.sleep(0.5)
            end.send(exit_signals.received())
        with watched(before_leaving=tell):
            context = multiprocessing.get_context("fork")
            receiving, sending = context.Pipe(duplex=False)
            forked = context.Process(target=child, args=(sending,))
            forked.start()
            exit_signals.enter(Phase.STEPS)
            assert receiving.recv() == "up"
            for number in (signal.SIGTERM, signal.SIGUSR1):
                os.kill(forked.pid, number)
            print("ready", flush=True)
            print(receiving.recv(), exit_signals.received())
            forked.join()
            print(forked.exitcode)
    """)
    assert end(process) == (0, "None None\n0\n")


def test_without_a_watch_nothing_is_received():
    assert exit_signals.received() is None
    exit_signals.enter(exit_signals.Phase.AFTER)
