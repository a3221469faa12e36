"""Exit codes of commands: docs/RELIABILITY.md says which of them a scheduler should start again."""

FINISHED = 0
# a Python traceback: a fault of the program
FAILED = 1
# an option, a file or data that the user has to correct
BAD_INPUT = 2
# the run was saved and left before its last step: a signal, --exit-duration-in-mins, --exit-interval
LEFT = 10
# losses or gradients that training cannot go on from
DIVERGED = 11
# no progress for --stall-timeout
STALLED = 12
# no whole checkpoint to continue from, or the one that was asked for is damaged
DAMAGED = 13
# restarted several times without a completed new step
NO_PROGRESS = 14
# checkpoints cannot be written: the disk is full, fails or is read-only
STORAGE = 15
# another run owns the run folder
OWNED = 16
# what a shell returns for processes that SIGINT and SIGPIPE end
INTERRUPTED = 130
READER_GONE = 141

# outcomes by code, as outcome.json, logs and docs name them
NAMES = {
    FINISHED: "finished",
    FAILED: "failed",
    BAD_INPUT: "bad input",
    LEFT: "left",
    DIVERGED: "diverged",
    STALLED: "stalled",
    DAMAGED: "damaged",
    NO_PROGRESS: "no progress",
    STORAGE: "storage",
    OWNED: "owned",
    INTERRUPTED: "interrupted",
    READER_GONE: "reader gone",
}
