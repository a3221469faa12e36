"""Megatron-Core's GPT model for one set of arguments: configuration, layer specification, loss per token.

::

    NetworkArguments ─► TransformerConfig ─┐
    norm, attention  ─► layer spec ────────┴─► GPTModel (a stage of this rank) ─► DistributedDataParallel

With labels the model returns the negative log-likelihood of every supervised token, fp32 [1, T]; the objective is
computed elsewhere. B: rows, S: tokens per row, T = B·S, N: supervised tokens.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from mft_megatron.arguments.table import Arguments
from mft_megatron.losses.objective import Slope
from mft_megatron.mcore.adapters.lora import add_adapters
from mft_megatron.mcore.attention.agreement import agree
from mft_megatron.mcore.attention.backends import shape_of
from mft_megatron.mcore.attention.packed_attention import PackedStream
from mft_megatron.mcore.kernels import mixed_products
from mft_megatron.mcore.kernels.rotary import Rotation
from mft_megatron.mcore.moe.experts import mark_expert_weights, rows_of_tokens
from mft_megatron.mcore.output_layer.cross_entropy import FusedOutputLayer, Targets, vocab_parallel_nll
from mft_megatron.mcore.parallel.data_parallel import wrap
from mft_megatron.mcore.parallel.device_batch import DeviceBatch
from mft_megatron.mcore.platform import devices, environment
from mft_megatron.mcore.platform.megatron_fixes import become, sum_weight_gradients_without_apex

from .compiler import choose_compiler
from .config import dtype_of, transformer_config
from .embedding import ScaledEmbedding
from .initialize import initialize_adapters, initialize_weights, mark_split_weights
from .layer_spec import block_spec
from .rope_frequencies import inverse_frequencies
from .rotary import RotaryByPosition


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """Compute the rows of the embedding: Megatron pads to a multiple of ``divisible_by · tensor_parallel_size``."""
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


class PackedGPTModel(GPTModel):
    """Megatron-Core's GPT over packed micro-batches, with padded vocabulary rows kept out of the softmax.

    An instance is one stage of the pipeline.
    """

    def __init__(self, arguments: Arguments, vocab_size: int, virtual_stage: int | None = None):
        """Build this rank's stage.

        Args:
            arguments: complete and checked.
            vocab_size: tokens of the vocabulary, without padding.
            virtual_stage: which of this rank's stages, where stages are interleaved.
        """
        network = arguments.network
        config = transformer_config(arguments)
        # the user's, or those of another model in this process
        environment.set_aside_attention(os.environ)
        if config.gradient_accumulation_fusion and not mixed_products.takes_apex():
            sum_weight_gradients_without_apex(mixed_products.add_weight_gradient)
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, arguments, virtual_stage),
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
            seq_len_interpolation_factor=network.rotary_seq_len_interpolation_factor,
            vp_stage=virtual_stage,
        )
        self.real_vocab_size = vocab_size
        self.has_adapters = arguments.adapters is not None
        if network.position_embedding_type == "rope":
            become(self.rotary_pos_emb, RotaryByPosition)
            if network.scaling is not None:
                rotated = int(network.kv_channels * network.rotary_percent)
                self.rotary_pos_emb.inv_freq = inverse_frequencies(rotated, network.rotary_base, network.scaling)
        if network.scale_embeddings_by_hidden_size and self.pre_process:
            become(self.embedding.word_embeddings, ScaledEmbedding)
        self.fused = arguments.training.cross_entropy_impl == "fused-linear"
        if self.fused and self.post_process:
            become(self.output_layer, FusedOutputLayer)

    def run(
        self, batch: DeviceBatch, with_loss: bool = True, slope: Callable[[DeviceBatch], Slope | None] | None = None
    ) -> Tensor:
        """Run the forward pass of a micro-batch as one stream of T = B·S tokens.

        Args:
            batch: on this process's device, with its context-parallel shard.
            with_loss: compute token losses; otherwise logits.
            slope: gives the gradient that the token losses will receive, before Megatron scales it, if it is known. It
                is called where a backward pass follows and saves one computation of the logits.

        Returns:
            on the last pipeline stage token losses fp32 [1, T], 0 for tokens of other context-parallel ranks (without
            loss the logits of this rank's tokens [1, T / CP, vocabulary / TP]); on other stages hidden states. Losses
            of unsupervised tokens are undefined; with the fused cross entropy they are 0.
        """
        shard = batch.shard
        positions = shard.take(batch.position_ids_BS)
        output = self(
            input_ids=shard.take(batch.tokens_BS)[None] if self.pre_process else None,
            position_ids=positions[None],
            attention_mask=None,
            labels=self._targets(batch, slope) if with_loss else None,
            packed_seq_params=PackedStream(shard=shard, rotation=self._rotation(positions)),
            padding_mask=self._rows(batch),
        )
        if not self.post_process or not with_loss:
            return output
        return shard.scatter(output[0], batch.tokens_BS.numel())[None]

    def _rotation(self, positions: Tensor) -> Rotation | None:
        """Rotation by the positions of tokens, int32 [T]; ``None`` without rotary embedding."""
        if self.position_embedding_type != "rope":
            return None
        return self.rotary_pos_emb.rotation(positions)

    def _rows(self, batch: DeviceBatch) -> Tensor | None:
        """Row of each token, for experts' routers; Megatron passes it on as a padding mask."""
        if self.config.num_moe_experts is None:
            return None
        return rows_of_tokens(batch, self.config.sequence_parallel)

    def _preprocess(self, *, padding_mask: Tensor | None = None, **others: Any) -> tuple:
        """Run Megatron's first step without the mask, which it would split for sequence parallelism on one stage."""
        decoder_input, *prepared, _ = super()._preprocess(**others)
        if decoder_input is not None and self.has_adapters and torch.is_grad_enabled():
            # nothing before the first adapter is trained, and a recomputed layer has gradients only if its input has
            decoder_input.requires_grad_()
        return decoder_input, *prepared, padding_mask

    def _targets(
        self, batch: DeviceBatch, slope: Callable[[DeviceBatch], Slope | None] | None
    ) -> Tensor | Targets | None:
        """Labels, or the targets of the fused cross entropy; Megatron's forward pass passes either through.

        ``None`` on stages without output layer.
        """
        if not self.fused or not self.post_process:
            return batch.shard.take(batch.labels_BS)[None].long() if self.post_process else None
        known = slope(batch) if slope is not None and torch.is_grad_enabled() else None
        if known is not None:
            known = known.take(batch.shard.supervised_indices())
            if self.config.grad_scale_func is not None:
                known = known.times(self.config.grad_scale_func(torch.ones_like(known.linear[:1])))
        labels_T = batch.shard.take(batch.labels_BS)
        return Targets(labels_T, batch.shard.supervised_N, known, self.real_vocab_size)

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor | Targets | None, **others: Any) -> Tensor:
        """Run Megatron's last step, which gives logits or losses; with the fused cross entropy compute losses here."""
        if not isinstance(labels, Targets):
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **others)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, weight=weight, targets=labels)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Compute the negative log-likelihood of each token; called by Megatron.

        Args:
            labels: int64 [1, T].
            logits: [T, 1, vocabulary / TP].

        Returns:
            fp32 [1, T].
        """
        return vocab_parallel_nll(logits, labels.transpose(0, 1), self.real_vocab_size).transpose(0, 1)


def build_model(arguments: Arguments, vocab_size: int) -> list[DistributedDataParallel]:
    """Build this rank's chunks of the model, one for each of its stages, wrapped for data parallelism.

    Weights are initialised from the seed, or uninitialised where ``--load`` is about to fill them. Gradients are summed
    over data-parallel ranks and micro-batches, never averaged.
    """
    choose_compiler(arguments)
    config = transformer_config(arguments)
    agree(arguments.training.attention_backend, shape_of(config, config.attention_dropout))
    count = arguments.distributed.num_virtual_stages_per_pipeline_rank
    stages: Sequence[int | None] = [None] if count is None else range(count)
    return wrap(arguments, [_build_chunk(arguments, vocab_size, stage) for stage in stages])


def _build_chunk(arguments: Arguments, vocab_size: int, virtual_stage: int | None) -> PackedGPTModel:
    model = PackedGPTModel(arguments, vocab_size, virtual_stage).to(devices.device(), dtype_of(arguments))
    mark_split_weights(model)
    mark_expert_weights(model)
    # weights of a simulated GPU have no content
    has_content = devices.device().type != "meta"
    if arguments.adapters is not None:
        add_adapters(model, arguments.adapters)
        if has_content:
            initialize_adapters(model, arguments.initialization.seed)
    if arguments.resume is None and has_content:
        how = arguments.initialization
        initialize_weights(
            model, how.seed, how.init_method_std, how.embedding_init_method_std, how.init_method_xavier_uniform
        )
    return model
