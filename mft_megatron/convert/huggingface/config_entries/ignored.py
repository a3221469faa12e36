"""Entries of ``config.json`` that do not change what a model computes."""

# Names, versions, how to train or to generate. Dropout and the losses that balance experts are options of a run.
IRRELEVANT = frozenset(
    """
    architectures model_type _name_or_path name_or_path transformers_version torch_dtype dtype use_cache
    initializer_range attention_dropout attention_probs_dropout_prob hidden_dropout hidden_dropout_prob
    residual_dropout embedding_dropout classifier_dropout bos_token_id eos_token_id pad_token_id sep_token_id
    unk_token_id decoder_start_token_id tokenizer_class pretraining_tp torchscript use_bfloat16 tf_legacy_loss
    return_dict return_dict_in_generate output_attentions output_hidden_states output_scores output_router_logits
    router_aux_loss_coef router_jitter_noise gradient_checkpointing _attn_implementation
    _attn_implementation_autoset attn_implementation _flash_attn_2_enabled keys_to_ignore_at_inference id2label
    label2id num_labels problem_type finetuning_task task_specific_params prefix is_decoder bad_words_ids
    begin_suppress_tokens suppress_tokens forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty
    remove_invalid_values max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    num_return_sequences diversity_penalty length_penalty repetition_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size temperature top_k top_p typical_p unsloth_version unsloth_fixed
    """.split()
)
# Features that old configurations list; those that are off change nothing.
MAY_BE_OFF = frozenset(
    "is_encoder_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder chunk_size_feed_forward "
    "pruned_heads".split()
)
