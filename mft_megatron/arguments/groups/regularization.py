"""Dropout, weight decay, clipping and Adam's constants."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class RegularizationArguments:
    """Megatron's defaults: dropout 0.1 is on unless you turn it off."""

    attention_dropout: float = option(0.1, "Dropout of attention weights.", at_least=0, below=1)
    hidden_dropout: float = option(0.1, "Dropout of hidden states.", at_least=0, below=1)
    weight_decay: float = option(0.01, "Weight decay; biases and norms have none.", at_least=0)
    start_weight_decay: float | None = option(
        None, "Weight decay of the first step, with --weight-decay-incr-style.", at_least=0
    )
    end_weight_decay: float | None = option(
        None, "Weight decay after --train-iters steps, with --weight-decay-incr-style.", at_least=0
    )
    weight_decay_incr_style: str = option(
        "constant",
        "How weight decay grows over the --train-iters optimizer steps: not at all, or from --start-weight-decay to "
        "--end-weight-decay.",
        choices=("constant", "linear", "cosine"),
    )
    apply_wd_to_qk_layernorm: bool = option(False, "Also apply weight decay to the norms of --qk-layernorm.")
    clip_grad: float = option(1.0, "Clip gradients to this global norm; 0 disables it.", at_least=0)
    adam_beta1: float = option(0.9, "First coefficient of Adam's running averages.", at_least=0, below=1)
    adam_beta2: float = option(0.999, "Second coefficient of Adam's running averages.", at_least=0, below=1)
    adam_eps: float = option(1e-8, "Term that keeps Adam's denominator from zero.", above=0)
    sgd_momentum: float = option(0.9, "Momentum of --optimizer sgd.", at_least=0, below=1)
