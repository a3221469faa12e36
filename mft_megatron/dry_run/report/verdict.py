"""Whether a rank fits a GPU: its peak, and an allowance for what a dry run cannot know."""

import dataclasses

from mft_megatron.dry_run.rank_report import RankReport

GIB = 2**30
# Bytes of CUDA's context, of NCCL's communicators and of the workspaces of cuBLAS and cuDNN.
FIXED_ALLOWANCE = 2 * GIB
# Part of the peak that torch's allocator holds and cannot use, because the free space is in pieces.
FRAGMENTATION = 0.05
UNKNOWN = (
    f"allowance: {FIXED_ALLOWANCE / GIB:g} GiB for CUDA's context, NCCL and the workspaces of cuBLAS and attention "
    f"kernels, and {FRAGMENTATION:.0%} of the peak for fragmentation; both are assumptions, not measured",
    "not known: time, host waits inside libraries, and tensors that kernels allocate without torch",
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Memory of a rank beside that of a GPU.

    Attributes:
        peak: bytes of torch's allocator at the peak of steps, evaluation and save.
        when: what reaches it: "step 1", …, "evaluation" or "save".
        allowance: bytes beyond it.
        gpu: bytes of the GPU.
        fits: "yes", "no" where the peak alone is more than the GPU has, or "maybe" where the allowance is.
    """

    peak: int
    when: str
    allowance: int
    gpu: int

    @property
    def fits(self) -> str:
        """Whether the rank fits, in a word."""
        if self.peak > self.gpu:
            return "no"
        return "yes" if self.peak + self.allowance <= self.gpu else "maybe"

    @property
    def free(self) -> int:
        """Bytes that are left, below 0 where they are missing."""
        return self.gpu - self.peak - self.allowance


def verdict(report: RankReport, gpu: int) -> Verdict:
    """Compare a rank with a GPU of ``gpu`` bytes."""
    peaks = {f"step {step.number}": step.memory.peak for step in report.steps}
    for name, memory in (
        ("the longest rows", report.longest),
        ("evaluation", report.evaluation),
        ("save", report.save),
    ):
        if memory is not None:
            peaks[name] = memory.peak
    when = max(peaks, key=lambda name: peaks[name])
    return Verdict(peaks[when], when, FIXED_ALLOWANCE + int(FRAGMENTATION * peaks[when]), gpu)
