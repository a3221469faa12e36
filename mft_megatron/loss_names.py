"""The names of ``--mft-loss`` and ``--task-balance`` (docs/LOSSES.md), for rooms that may not import :mod:`.losses`.

A test compares them with the tables of :mod:`.losses`, which implement them.
"""

LOSSES = ("token", "sample", "task-token", "task-sample", "focal-sample", "focal-task")
# Losses with task weights w_i, from --task-weights or a balancer.
WEIGHTED = ("task-token", "task-sample")
# --mft-normalization of a run that fine-tunes with task weights, where it is not given (docs/LOSSES.md §2.3).
FINE_TUNING_NORMALIZATION = "epoch"
FOCAL = ("focal-sample", "focal-task")
# "static" is no balancer: the weights are those of --task-weights.
BALANCERS = ("static", "self-paced", "famo", "coba")
