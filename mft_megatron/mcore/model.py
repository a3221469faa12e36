"""The GPT model of Megatron-Core for one set of arguments: configuration, layer specification, loss per token.

::

    NetworkArguments ─► TransformerConfig ─┐
    norm, attention  ─► layer spec ────────┴─► GPTModel (a stage of this rank) ─► DistributedDataParallel

Called with labels the model yields the negative log-likelihood of every supervised token, fp32 [1, T]; the objective is
not its business.
"""

from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from mft_megatron.arguments import Arguments
from mft_megatron.batch import Batch
from mft_megatron.losses.objective import Slope

from . import platform
from .attention import packing
from .config import dtype_of, transformer_config
from .cross_entropy import FusedOutputLayer, Targets, vocab_parallel_nll
from .initialize import initialize_weights, mark_split_weights
from .layers import block_spec


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding: Megatron pads to a multiple of ``divisible_by · tensor_parallel_size``."""
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


class PackedGPTModel(GPTModel):
    """Megatron-Core's GPT over packed micro-batches, with padded vocabulary rows kept out of the softmax.

    One stage of the pipeline: this rank's, or where stages are interleaved the ``virtual_stage``-th of this rank's.
    """

    def __init__(self, arguments: Arguments, vocab_size: int, virtual_stage: int | None = None):
        network = arguments.network
        config = transformer_config(arguments)
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, network, virtual_stage),
            vocab_size=padded_vocab_size(
                vocab_size, network.make_vocab_size_divisible_by, config.tensor_model_parallel_size
            ),
            max_sequence_length=network.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage),
            share_embeddings_and_output_weights=network.tie_embeddings,
            position_embedding_type=network.position_embedding_type,
            rotary_percent=network.rotary_percent,
            rotary_base=network.rotary_base,
            vp_stage=virtual_stage,
        )
        self.real_vocab_size = vocab_size
        self.fused = arguments.training.cross_entropy_impl == "fused-linear"
        if self.fused and self.post_process:
            # Megatron makes its output layer itself; this one has the same weights, names and hooks
            self.output_layer.__class__ = FusedOutputLayer

    def run(self, batch: Batch, with_loss: bool = True, slope: Callable[[Batch], Slope | None] | None = None) -> Tensor:
        """Forward pass of a micro-batch as one stream of T = B·S tokens.

        Args:
            batch: on this process's device.
            with_loss: or logits.
            slope: what is known of the gradient that the token losses will get, before Megatron scales it. Asked for
                where a backward pass follows and it saves one computation of the logits.

        Returns:
            on the last pipeline stage token losses fp32 [1, T] (or logits [1, T, vocabulary / TP] without loss),
            elsewhere hidden states. Losses of unsupervised tokens have no meaning; fused, they are 0.
        """
        return self(
            input_ids=batch.tokens_BS.view(1, -1),
            position_ids=batch.position_ids_BS.view(1, -1),
            attention_mask=None,
            labels=self._targets(batch, slope) if with_loss else None,
            packed_seq_params=packing(batch),
        )

    def _targets(self, batch: Batch, slope: Callable[[Batch], Slope | None] | None) -> Tensor | Targets:
        """What goes through Megatron's forward pass, untouched by it, as labels."""
        if not self.fused or not self.post_process:
            return batch.labels_BS.view(1, -1)
        known = slope(batch) if slope is not None and torch.is_grad_enabled() else None
        if known is not None:
            known = known.take(batch.supervised_N)
            if self.config.grad_scale_func is not None:
                known = known.times(self.config.grad_scale_func(torch.ones_like(known.linear[:1])))
        return Targets(batch.labels_BS.flatten(), batch.supervised_N, known, self.real_vocab_size)

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor | Targets | None, **others) -> Tensor:
        """Megatron's last step: logits, or losses of logits; here also losses of hidden states."""
        if not isinstance(labels, Targets):
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **others)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, weight=weight, targets=labels)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Negative log-likelihood per token: labels [1, T], logits [T, 1, vocabulary / TP] -> fp32 [1, T]."""
        return vocab_parallel_nll(logits, labels.transpose(0, 1), self.real_vocab_size).transpose(0, 1)


def data_parallel_config(arguments: Arguments) -> DistributedDataParallelConfig:
    """Of Megatron's data parallelism; gradients are summed over ranks, never averaged."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=arguments.precision.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=False,
        use_distributed_optimizer=False,
        average_in_collective=False,
    )


def build_model(arguments: Arguments, vocab_size: int) -> list[DistributedDataParallel]:
    """This rank's chunks of the model, one for each of its stages, wrapped for data parallelism; their weights come
    from the seed, or hold nothing yet where ``--load`` is about to fill them all.

    Gradients are summed over data-parallel ranks and micro-batches, never averaged.
    """
    count = arguments.distributed.num_virtual_stages_per_pipeline_rank
    return [_build_chunk(arguments, vocab_size, stage) for stage in ([None] if count is None else range(count))]


def _build_chunk(arguments: Arguments, vocab_size: int, virtual_stage: int | None) -> DistributedDataParallel:
    model = PackedGPTModel(arguments, vocab_size, virtual_stage).to(platform.device(), dtype_of(arguments))
    mark_split_weights(model)
    if arguments.resume is None:
        initialize_weights(model, arguments.initialization.seed, arguments.initialization.init_method_std)
    return DistributedDataParallel(
        config=model.config,
        ddp_config=data_parallel_config(arguments),
        module=model,
    )
