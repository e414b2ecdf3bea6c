"""Keys that a configuration may have: those without effect, and those that change a model."""

from typing import Any

WITHOUT_EFFECT = (
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "auto_map",
    "use_cache", "initializer_range", "tokenizer_class", "prefix", "return_dict",
    "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "id2label",
    "label2id", "num_labels", "problem_type", "task_specific_params", "torchscript",
    "name_or_path", "_name_or_path", "is_llama_config", "transformers.js_config",
    "cache_implementation", "finetuning_task", "is_decoder", "tf_legacy_loss",
    # Old configs carry the defaults of text generation.
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature",
    "num_beam_groups", "diversity_penalty", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids",
    "badwordsids", "encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "max_new_tokens",
    # Training, and tools that wrote the file.
    "pretraining_tp", "internal_version", "layerdrop", "use_liger_kernel", "torch_compile",
    "ignore_index", "neftune_noise_alpha", "model_name", "base_model", "license", "language",
    "tags", "datasets", "library_name", "pipeline_tag", "_commit_hash", "_from_auto",
    "trust_remote_code", "ddp_find_unused_parameters", "seed", "padding_side",
    # How long a text the tokenizer or the trainer cut: `max_position_embeddings` is the context.
    "max_sequence_length", "max_seq_length", "max_seq_len", "model_max_length", "seq_length",
)  # fmt: skip
"""Keys that any config.json may have and that do not change inference."""

PATTERNS_WITHOUT_EFFECT = (
    "*dropout*", "*_pdrop", "*token_id", "*token_ids", "*loss*", "*flash_attn*",
    "*flash_attention*", "*attn_implementation*", "*gradient_checkpointing*", "*init_std*",
    "init_method*", "initializer_*", "summary_*", "unsloth*", "mergekit*", "*wandb*",
)  # fmt: skip
"""The same, as patterns (fnmatch)."""

CHANGES: dict[str, tuple[Any, ...]] = {
    # Whose key and value a query sees, and how much.
    "sliding_window": (), "use_sliding_window": (False,), "max_window_layers": (),
    "sliding_window_pattern": (), "_sliding_window_pattern": (), "layer_types": ("full_attention",),
    "attention_chunk_size": (), "attention_bias": (False,), "mlp_bias": (False,),
    "qkv_bias": (False,), "use_bias": (False,), "attn_logit_softcapping": (),
    "final_logit_softcapping": (), "query_pre_attn_scalar": (), "attention_multiplier": (),
    "attn_temperature_tuning": (False,), "attention_sink": (False,), "clip_qkv": (),
    "use_qk_norm": (False,), "qk_norm": (False,), "qk_layernorm": (False,),
    "use_bidirectional_attention": (False,), "is_causal": (True,), "use_mla": (False,),
    "q_lora_rank": (), "kv_lora_rank": (), "qk_rope_head_dim": (), "v_head_dim": (),
    "num_kv_shared_layers": (0,),
    # Positions.
    "partial_rotary_factor": (1,), "rotary_pct": (1,), "rotary_dim": (), "rotary_emb_base": (),
    "rope_interleaved": (False,), "rope_interleave": (False,), "rope_local_base_freq": (),
    "rope_ratio": (1,), "no_rope_layers": (1,), "no_rope_layer_interval": (),
    "alibi": (False,), "use_alibi": (False,), "use_rope": (True,),
    # Residual stream and logits.
    "residual_multiplier": (1,), "embedding_multiplier": (1,), "logits_scaling": (1,),
    "logit_scale": (1,), "scale_emb": (1,), "scale_depth": (), "dim_model_base": (),
    "use_parallel_residual": (False,), "parallel_attn": (False,), "parallel_residual": (False,),
    # Experts and other kinds of layers.
    "num_experts": (0,), "num_local_experts": (0,), "n_routed_experts": (0,),
    "n_shared_experts": (0,), "layers_block_type": (), "block_types": (),
    "cross_attention_layers": (), "num_nextn_predict_layers": (0,),
    # What transformers' base configuration once had.
    "is_encoder_decoder": (False,), "add_cross_attention": (False,), "use_bfloat16": (False,),
    "tie_encoder_decoder": (False,), "cross_attention_hidden_size": (), "pruned_heads": ({},),
    # The same in a GGUF header, after the architecture's name.
    "attention.sliding_window": (), "attention.scale": (), "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,), "residual_scale": (1,), "embedding_scale": (1,),
    "expert_count": (0,), "expert_used_count": (0,), "rope.scaling.yarn_log_multiplier": (0,),
}  # fmt: skip
"""Keys that change a model, each with the values at which it does not."""
