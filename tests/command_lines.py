"""Words of the command line of ``pretrain_mft.py`` that many tests share."""

# four layers of the smallest model that parallel layouts can split
SMALL = "--num-layers 4 --hidden-size 64 --num-attention-heads 4"
# a run of it that needs no data on disk as long as nothing is trained
SHORT_RUN = f"{SMALL} --data-path data --seq-length 128 --micro-batch-size 2 --train-iters 10 --lr 1e-3"
