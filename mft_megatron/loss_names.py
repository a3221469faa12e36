"""Names of ``--mft-loss``, for the options and for the rooms that act on them (docs/LOSSES.md)."""

LOSSES = ("token", "sample", "task-token", "task-sample", "focal-sample", "focal-task")
# those whose tasks have weights w_i, from --task-weights or a balancer
WEIGHTED = ("task-token", "task-sample")
FOCAL = ("focal-sample", "focal-task")
