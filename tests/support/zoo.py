"""Every head of transformers in miniature: tiny configurations of every model of a mapping.

A default configuration is shrunk by the names of its numbers: what is called ``hidden_size`` is
32 everywhere. What a model needs besides stands in ``SPECIAL``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 96, 32, 4, 2, 8, 2


def _all(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


TINY: dict[str, Any] = {
    **_all(
        VOCAB,
        """
        vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size
        task_type_vocab_size pronunciation_vocab_size shape_vocab_size
        """,
    ),
    **_all(
        HIDDEN,
        """
        hidden_size d_model n_embd dim_model dim emb_dim embedding_size word_embed_proj_dim
        hidden_dim backbone_hidden_size attention_hidden_size lru_width embed_dim
        input_embedding_size output_embedding_size embedding_dim ffn_hidden_size
        moe_intermediate_size intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim
        shared_expert_intermediate_size shared_intermediate_size n_inner dff dim_ff
        expert_ffn_hidden_size intermediate_size_mlp moe_shared_expert_intermediate_size
        shared_experts_intermediate_size dense_intermediate_size router_hidden_size
        feed_forward_size block_ffn_dim d_inner mamba_d_ssm output_dim out_hidden_size
        projection_dim
        """,
    ),
    **_all(
        HEADS,
        """
        num_attention_heads n_head n_heads num_heads decoder_attention_heads
        encoder_attention_heads attention_heads num_encoder_attention_heads
        num_decoder_attention_heads swa_num_attention_heads linear_num_heads
        """,
    ),
    **_all(
        KV_HEADS,
        """
        num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads
        linear_num_value_heads num_query_groups
        """,
    ),
    **_all(
        HEAD_DIM,
        """
        head_dim dim_head kv_channels attention_head_dim swa_head_dim d_head linear_head_dim
        linear_key_head_dim linear_value_head_dim v_head_dim qk_nope_head_dim
        attention_head_size query_pre_attn_scalar d_kv global_head_dim
        """,
    ),
    "qk_rope_head_dim": HEAD_DIM,
    "qk_head_dim": 2 * HEAD_DIM,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "rotary_dim": 4,
    **_all(
        LAYERS,
        """
        num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
        attention_layers num_encoder_layers num_decoder_layers depth num_blocks
        """,
    ),
    **_all(
        4,
        """
        num_experts num_local_experts n_routed_experts moe_num_experts num_moe_experts
        """,
    ),
    **_all(
        1,
        """
        num_experts_per_tok moe_topk num_experts_per_token moe_k n_group topk_group top_k
        num_expert_group num_shared_experts n_shared_experts first_k_dense_replace
        moe_num_shared_experts num_dense_layers
        """,
    ),
    **_all(
        64,
        """
        max_position_embeddings n_positions max_seq_len n_ctx context_length model_max_length
        max_target_positions max_source_positions
        """,
    ),
    **_all(
        8,
        """
        sliding_window sliding_window_size window_size local_attention attention_window_size
        block_size
        """,
    ),
    "max_window_layers": 1,
    "attention_window": 8,
    "type_vocab_size": 2,
    "index_head_dim": HEAD_DIM,
    "index_n_heads": 2,
    "index_topk": 8,
    "mamba_d_state": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "n_mamba_heads": 2,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_headdim": 16,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "n_groups": 1,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "mask_token_id": 3,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    **_all(
        VOCAB - 1,
        """
        image_token_id video_token_id audio_token_id image_token_index video_token_index
        audio_token_index boi_token_id eoi_token_id boa_token_id eoa_token_id boi_token_index
        eoi_token_index eoa_token_index vision_start_token_id vision_end_token_id
        vision_token_id eod_token_id image_start_token_id image_end_token_id
        """,
    ),
    # What a silent mistake would hide in.
    "final_logit_softcapping": 2.0,
    "logits_soft_cap": 2.0,
    "output_logit_soft_cap": 2.0,
    "logits_scaling": 3.0,
    "logit_scale": 0.4,
    "lm_head_multiplier": 0.4,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "initializer_factor": 0.3,
    # Reruns must be equal.
    **_all(
        0.0,
        """
        attention_dropout dropout hidden_dropout_prob attention_probs_dropout_prob
        hidden_dropout activation_dropout resid_pdrop embd_pdrop attn_pdrop decoder_layerdrop
        encoder_layerdrop layerdrop emb_pdrop embedding_dropout resid_dropout embed_dropout
        residual_dropout dropout_p classifier_dropout attn_dropout dropout_rate
        router_jitter_noise input_jitter_noise lsh_attention_probs_dropout_prob mlp_dropout
        ffn_dropout local_attention_probs_dropout_prob mask_time_prob mask_feature_prob
        hidden_act_dropout
        """,
    ),
}  # fmt: skip
"""Name of a number in a configuration -> its value in miniature, where the model has it."""

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
"""Rotary positions in three dimensions, of heads of ``HEAD_DIM``."""

SPECIAL: dict[str, dict[str, Any]] = {
    **{
        name: {"text_config.rope_parameters": MROPE}
        for name in (
            "Glm46VForConditionalGeneration",
            "Glm4vForConditionalGeneration",
            "GlmOcrForConditionalGeneration",
            "PaddleOCRVLForConditionalGeneration",
            "Qwen2VLForConditionalGeneration",
            "Qwen2_5OmniThinkerForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
        )
    },
    "XmodForMaskedLM": {"default_language": "en_XX"},
    "EsmForMaskedLM": {"vocab_size": VOCAB, "mask_token_id": 3, "pad_token_id": 0},
    "Mistral4ForCausalLM": {"qk_rope_head_dim": HEAD_DIM, "head_dim": 2 * HEAD_DIM},
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"]},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "NemotronHForCausalLM": {"layers_block_type": ["mamba", "attention"]},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "MptForCausalLM": {"attn_pdrop": 0, "attn_config.attn_pdrop": 0},
    "NemotronForCausalLM": {"num_key_value_heads": KV_HEADS},
    "Dots1ForCausalLM": {
        "n_routed_experts": 4,
        "moe_intermediate_size": HIDDEN,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
    },
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "DbrxForCausalLM": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 1},
    "LongcatFlashForCausalLM": {"moe_topk": 2},
    "Zamba2ForCausalLM": {
        "n_mamba_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "Gemma4AssistantForCausalLM": {
        "text_config.hidden_size_per_layer_input": 0,
        "text_config.vocab_size_per_layer_input": 0,
    },
    "xLSTMForCausalLM": {"qk_dim_factor": 0.5, "chunk_size": 16},
    "CohereCompassForCausalLM": {"layer_types": ["sliding_attention", "full_attention"]},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "ReformerModelWithLMHead": {
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
    },
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZambaForCausalLM": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
}
"""Name of a model class -> what its configuration needs besides, by dotted name."""


class Entry(NamedTuple):
    """One model: which mapping lists it, its type, and its classes."""

    mapping: str
    model_type: str
    config_class: Any
    model_class: Any


class UnbuildableError(Exception):
    """A model that cannot be built in miniature, and why."""


MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING",
    "vision": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
}


def entries(mapping: str) -> Iterator[Entry]:
    """Every model class of a mapping, once."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    found: dict[str, Entry] = {}
    for config_class, model_class in getattr(auto, MAPPINGS[mapping]).items():
        classes = model_class if isinstance(model_class, tuple) else (model_class,)
        for one in classes:
            own = getattr(one, "config_class", None) is config_class
            if own or one.__name__ not in found:
                found[one.__name__] = Entry(mapping, config_class.model_type, config_class, one)
    yield from (found[name] for name in sorted(found))


def tiny_config(entry: Entry) -> Any:
    """The entry's configuration in miniature."""
    special = SPECIAL.get(entry.model_class.__name__, {})
    # Some are listed under the configuration of a larger model that they are the text part of.
    config_class = getattr(entry.model_class, "config_class", None) or entry.config_class
    return config_class(**_tiny_arguments(config_class, special))


def _tiny_arguments(config_class: Any, special: dict[str, Any]) -> dict[str, Any]:
    try:
        default = config_class()
    except Exception:  # a configuration without defaults is given everything
        default = None
    arguments: dict[str, Any] = {}
    subs = getattr(config_class, "sub_configs", {})
    for name in vars(default) if default is not None else TINY:
        try:
            value = getattr(default, name, 0)
        except Exception:  # a number that differs from layer to layer
            continue
        if name in subs or name.startswith("_"):
            continue
        if name in TINY and not isinstance(value, (list, dict, bool)):
            if value is not None or name in ("head_dim",):
                arguments[name] = TINY[name]
        elif isinstance(value, list) and len(value) > LAYERS and name.endswith(("types", "type")):
            arguments[name] = _some(value)
    for name, sub_class in subs.items():
        inner = {k.partition(".")[2]: v for k, v in special.items() if k.startswith(name + ".")}
        if sub_class.__name__ == "AutoConfig":
            sub = getattr(default, name, None)
            if sub is None:
                continue
            sub_class = type(sub)
            arguments[name] = {
                "model_type": sub_class.model_type, **_tiny_arguments(sub_class, inner)
            }  # fmt: skip
        else:
            arguments[name] = _tiny_arguments(sub_class, inner)
    if "kv_lora_rank" in arguments and "num_key_value_heads" in arguments:
        arguments["num_key_value_heads"] = HEADS
    arguments.update({k: v for k, v in special.items() if "." not in k})
    return {k: v for k, v in arguments.items() if v is not _ABSENT}


_ABSENT = object()
"""As a special value: leave the argument out."""


def _some(kinds: list[Any]) -> list[Any]:
    """One of each kind of layer, at least ``LAYERS``."""
    different = list(dict.fromkeys(kinds)) if all(isinstance(k, str) for k in kinds) else kinds
    return (different * LAYERS)[: max(LAYERS, 0)]


def build(entry: Entry, *, seed: int = 0) -> nn.Module:
    """The model in miniature, in evaluation mode, with weights that make no two tokens alike."""
    torch.manual_seed(seed)
    try:
        model = entry.model_class(tiny_config(entry))
    except Exception as error:
        raise UnbuildableError(
            f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        ) from error
    # Grouped matmuls have no float64, which gradients are judged by; loops over experts do.
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("eager")
    return model.eval()


def inputs(entry: Entry, model: nn.Module) -> dict[str, Any]:
    """Arguments of a forward: token ids, and what else the model asks for; no labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCAB - 2, (2, 16), generator=generator)
    arguments = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        arguments["decoder_input_ids"] = torch.randint(4, VOCAB - 2, (2, 12), generator=generator)
    if entry.model_type == "blt":
        arguments["use_cache"] = False
    return arguments
