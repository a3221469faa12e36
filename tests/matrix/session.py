"""Run commands of the project one after the other, forked from one process that imports Megatron-Core once.

A test in another process thus chooses the release, by ``PYTHONPATH``. The command line is a JSON list of jobs: script,
number of ranks or ``null``, and words. Prints where Megatron-Core was imported from; ends with a line and exit code 1
if a job fails.
"""

import json
import sys

from tests.ranks import run_forked


def main():
    """Run the jobs of the command line."""
    import megatron.core

    print(megatron.core.__file__)
    for script, world_size, words in json.loads(sys.argv[1]):
        process = run_forked(script, *words, world_size=world_size)
        if process.returncode:
            sys.exit(f"{script} {' '.join(words)} on {world_size} ranks: {process.stdout}{process.stderr}")


if __name__ == "__main__":
    main()
