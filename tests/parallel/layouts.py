"""Parallel layouts that are compared with one process, and the model shapes that they are compared on."""

import dataclasses

from tests.command_lines import SMALL

# the shape of most tests
LLAMA = (
    f"{SMALL} --group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm --position-embedding-type "
    "rope --disable-bias-linear"
)
UNTIED = "--untie-embeddings-and-output-weights"
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 96 --moe-router-load-balancing-type seq_aux_loss "
    "--moe-aux-loss-coeff 1e-2"
)
SHAPES = {
    "llama": f"{LLAMA} {UNTIED}",
    "deep": f"{LLAMA} {UNTIED} --num-layers 8",
    "tied": LLAMA,
    "six layers": f"{LLAMA} {UNTIED} --num-layers 6",
    "experts": f"{LLAMA} {UNTIED} {EXPERTS}",
    "shared experts": f"{LLAMA} {UNTIED} {EXPERTS} --moe-shared-expert-intermediate-size 64 --moe-z-loss-coeff 1e-3",
    "experts but in the first": f"{LLAMA} {UNTIED} {EXPERTS} --moe-layer-freq [0]+[1]*3",
    "Megatron's defaults": SMALL,
    "q/k norm": (
        f"{LLAMA} --rotary-percent 0.5 --add-attention-bias --qk-layernorm"  # and biases, and half-rotated
    ),
    "window": f"{LLAMA} {UNTIED} --add-qkv-bias --add-mlp-bias --window-size 20,0 --window-attn-skip-freq 2",
}
# q/k norms under tensor parallelism differ by 8e-6 in Megatron-Core itself
TOLERANCE = {"q/k norm": 1e-5}

WORDS = {
    "TP": "--tensor-model-parallel-size",
    "PP": "--pipeline-model-parallel-size",
    "VPP": "--num-virtual-stages-per-pipeline-rank",
    "CP": "--context-parallel-size",
    "EP": "--expert-model-parallel-size",
    "MB": "--micro-batch-size",
    "first": "--decoder-first-pipeline-num-layers",
    "last": "--decoder-last-pipeline-num-layers",
    "ETP": "--expert-tensor-parallel-size",
}
FLAGS = {
    "SP": "--sequence-parallel",
    "DO": "--use-distributed-optimizer",
    # several buckets, where the default would put a model of this size into one
    "overlap": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 30001",
    "reduce": "--overlap-grad-reduce --ddp-bucket-size 30001",
    "unaligned": "--no-align-grad-reduce --no-align-param-gather",
    "alltoall": "--moe-token-dispatcher-type alltoall",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "block": "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
    "distributed": "--distribute-saved-activations",
    "selective": "--recompute-granularity selective --recompute-modules core_attn mlp",
    "norms": "--recompute-granularity selective --recompute-modules layernorm",
    "accounted": "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
}


@dataclasses.dataclass(frozen=True)
class ParallelLayout:
    """A parallel layout on a model shape.

    Attributes:
        name: sizes such as ``TP2`` and ``DP2``, in words of :data:`WORDS`, and :data:`FLAGS`.
        shape: a key of :data:`SHAPES`.
        quick: whether every run of the tests includes it.
    """

    name: str
    shape: str = "llama"
    quick: bool = False

    @property
    def world_size(self) -> int:
        """Number of ranks: the product of TP, PP, CP and DP."""
        size = 1
        for word in self.name.split():
            if word[:2] in ("TP", "PP", "CP", "DP"):
                size *= int(word[2:])
        return size

    @property
    def options(self) -> str:
        """Command-line options; the micro-batch size is 1 if the name has none."""
        words = []
        for word in self.name.split():
            kind = word.rstrip("0123456789")
            if kind in WORDS:
                words += [WORDS[kind], word[len(kind) :]]
            elif kind in FLAGS:
                words.append(FLAGS[kind])
        return " ".join(words if WORDS["MB"] in words else [*words, WORDS["MB"], "1"])

    @property
    def tolerance(self) -> float:
        """Relative tolerance against one process."""
        return TOLERANCE.get(self.shape, 1e-6)

    def __str__(self):
        return self.name if self.shape == "llama" else f"{self.name}, {self.shape}"


LAYOUTS = [
    ParallelLayout("MB1", quick=True),
    ParallelLayout("MB4"),
    ParallelLayout("TP2 MB2"),
    ParallelLayout("TP2 SP MB2", quick=True),
    ParallelLayout("PP2 MB2"),
    ParallelLayout("PP4"),
    ParallelLayout("DP2", quick=True),
    ParallelLayout("DP4"),
    ParallelLayout("TP2 PP2", quick=True),
    ParallelLayout("TP2 DP2 MB2"),
    ParallelLayout("PP2 DP2"),
    ParallelLayout("PP2 VPP2 MB2", quick=True),
    ParallelLayout("TP2 PP2 VPP2"),
    ParallelLayout("PP2 DP2 VPP2 SP TP2"),
    ParallelLayout("TP2 PP2 DP2 SP"),
    # several model chunks of one layer per rank; chunks of two layers
    ParallelLayout("PP4 VPP2", "deep"),
    ParallelLayout("PP2 VPP4", "deep"),
    ParallelLayout("PP2 VPP2", "deep"),
    # uneven stages
    ParallelLayout("PP2 first3", quick=True),
    ParallelLayout("PP4 first1 last1", "deep"),
    ParallelLayout("TP2 PP2 last1 SP"),
    ParallelLayout("PP2 VPP2 accounted", "six layers"),
    # context parallelism
    ParallelLayout("CP2", quick=True),
    ParallelLayout("CP4 MB2"),
    ParallelLayout("CP2 DP2"),
    ParallelLayout("CP2 TP2 SP", quick=True),
    ParallelLayout("CP2 PP2"),
    ParallelLayout("CP2 PP2 VPP2"),
    ParallelLayout("CP2 TP2 PP2"),
    ParallelLayout("CP2 TP2"),
    ParallelLayout("CP2", "window"),
    ParallelLayout("CP4", "window"),
    ParallelLayout("TP2 PP2", "window"),
    # distributed optimizer
    ParallelLayout("DP2 DO"),
    ParallelLayout("DP2 overlap", quick=True),
    ParallelLayout("DP4 overlap"),
    ParallelLayout("DP2 reduce"),
    ParallelLayout("TP2 DP2 DO"),
    ParallelLayout("PP2 DP2 overlap"),
    ParallelLayout("PP2 VPP2 DP2 overlap"),
    ParallelLayout("PP2 VPP2 DP2 overlap unaligned"),
    ParallelLayout("CP2 DP2 overlap"),
    ParallelLayout("TP2 PP2 DP2 SP overlap"),
    # tied embeddings, on one stage or on two
    ParallelLayout("MB4", "tied"),
    ParallelLayout("PP2", "tied", quick=True),
    ParallelLayout("TP2 PP2 SP", "tied"),
    ParallelLayout("PP2 VPP2", "tied"),
    ParallelLayout("CP2 PP2", "tied"),
    ParallelLayout("PP2 DP2 overlap", "tied"),
    # experts
    ParallelLayout("DP2 EP2", "experts", quick=True),
    ParallelLayout("DP4 EP2", "experts"),
    ParallelLayout("DP4 EP4", "experts"),
    ParallelLayout("PP2 DP2 EP2", "experts"),
    ParallelLayout("TP2 DP2 EP2 SP", "experts"),
    ParallelLayout("TP2 SP", "shared experts"),
    ParallelLayout("PP2 VPP2", "experts"),
    ParallelLayout("DP2 EP2 overlap", "shared experts"),
    ParallelLayout("DP2 EP2 full", "experts"),
    ParallelLayout("DP2 EP2 alltoall", "experts"),
    ParallelLayout("TP2 SP ETP1", "experts"),
    ParallelLayout("TP2 DP2 SP EP2 ETP1", "experts"),
    ParallelLayout("CP2 DP2 EP2", "experts"),
    ParallelLayout("PP2 last3", "experts but in the first"),
    # recompute
    ParallelLayout("MB2 full"),
    ParallelLayout("PP2 block"),
    ParallelLayout("TP2 SP selective"),
    ParallelLayout("TP2 PP2 full distributed"),
    ParallelLayout("CP2 PP2 full"),
    ParallelLayout("CP2 selective"),
    ParallelLayout("PP2 VPP2 norms"),
    # other shapes
    ParallelLayout("TP2 PP2 SP", "Megatron's defaults"),
    ParallelLayout("TP2 PP2 SP", "q/k norm", quick=True),
    ParallelLayout("CP2 TP2", "Megatron's defaults"),
    ParallelLayout("CP2 PP2", "q/k norm"),
]
BY_NAME = {str(layout): layout for layout in LAYOUTS}
