"""config.json, key by key: refused where it says maths that xrl does not compute, never ignored. Torch-free.

A key decides the maths and is read, is supported with one value only, or is known to change nothing. Any other is
refused by its name, because nobody here can tell what it does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xrl.config import SettingsError
from xrl.config.printable import shortened
from xrl.models.families import FAMILIES, Family, architecture_of
from xrl.models.parts import ExpertShape
from xrl.models.shape import ModelShape, model_shape, rope_settings, with_defaults

# Without these there is no shape.
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
# Larger ones are of no model, and of no tensor.
_LARGEST_SIZE = 2**31 - 1
_LARGEST = {"num_hidden_layers": 10_000, "num_experts": 100_000, "n_routed_experts": 100_000}
# What transformers takes for the number format of weights, by its own word.
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_MAY_BE_ZERO = ("first_k_dense_replace", "n_shared_experts")
_NUMBERS = ("rms_norm_eps", "rope_theta")
_SWITCHES = ("tie_word_embeddings",)

# What every family is read by, besides its own keys.
_READ = {*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", *_NUMBERS, *_SWITCHES} | {
    "architectures",
    "model_type",
    "rope_parameters",
    "rope_scaling",
    "layer_types",
    "quantization_config",
}

# Supported with this value only, where a family does not read the key.
_NEEDED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0,
    "hidden_dropout": 0,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "partial_rotary_factor": 1,
    # Written by trainers and read by nobody, but each names maths.
    "use_mrope": False,
    "rope_interleaved": False,
    "is_llama_config": True,
    "activation": "swiglu",
}

# Without effect on the maths.
_HARMLESS = frozenset(
    {
        # Bookkeeping.
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation",
        "_flash_attn_2_enabled",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "dtype",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "is_decoder",
        "label2id",
        "max_sequence_length",
        "model_max_length",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "prefix",
        "problem_type",
        "pruned_heads",
        "return_dict",
        "return_dict_in_generate",
        "task_specific_params",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        "use_reentrant_checkpointing",
        # Of pretraining: initialisation, its losses, how its matrices were cut.
        "aux_loss_alpha",
        "ep_size",
        "neftune_noise_alpha",
        "initializer_range",
        "output_router_logits",
        "pretraining_tp",
        "router_aux_loss_coef",
        "seq_aux",
        # Special tokens: the tokenizer and generation_config.json have them.
        "begin_suppress_tokens",
        "bos_token_id",
        "decoder_start_token_id",
        "eos_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "suppress_tokens",
        "unk_token_id",
        # Of generation: ours has flags.
        "bad_words_ids",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_p",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "remove_invalid_values",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)

_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# rope_type -> the further keys that it reads.
_ROPE_TYPES: dict[str, set[str]] = {
    "default": set(),
    # Stretches only what lies beyond max_position_embeddings, where no sequence of ours gets to.
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def checked_shape(config: Mapping[str, Any], file: Path) -> ModelShape:
    """The shape `config` describes, once every key of it is understood.

    Args:
        file: where `config` stands, for messages.

    Raises:
        SettingsError: an architecture or a key that changes the maths in a way we do not compute, or a value that
            cannot be.
    """
    for problem in _problems(config):
        raise SettingsError(f"{file}: {problem}")
    return model_shape(config)


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong, as ends of a sentence; the first ones stand for all that follow from them."""
    architecture = architecture_of(config)
    family = FAMILIES.get(architecture) if architecture is not None else None
    if family is None:
        yield f"architecture {architecture or 'none'} is not supported, the known ones are: {', '.join(FAMILIES)}"
        return
    yield from _wrong_types(config, family)
    yield from _wrong_values(config, family)
    yield from _unknown_keys(config, family)
    yield from _wrong_rope(with_defaults(config))
    yield from _wrong_relations(config, model_shape(config))


def _wrong_types(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    kinds: dict[str, type] = {name: type(default) for name, default in family.defaults.items()}
    kinds |= dict.fromkeys((*_SIZES, *_OPTIONAL_SIZES), int) | dict.fromkeys(_NUMBERS, float)
    kinds |= dict.fromkeys((*_SWITCHES, *family.switches), bool)
    for name in ("dtype", "torch_dtype"):
        if config.get(name) not in (None, *_DTYPES):
            yield f"{name} must be one of {', '.join(_DTYPES)}, found {_json(config[name])}"
    spellings = {name: name for name in kinds} | dict(family.aliases)
    for spelling, name in spellings.items():
        value = config.get(spelling)
        if value is None and spelling not in _SIZES:
            continue
        smallest, largest = 0 if name in _MAY_BE_ZERO else 1, _LARGEST.get(name, _LARGEST_SIZE)
        if not _is_a(kinds[name], value, smallest, largest):
            whole = f"a whole number >= {smallest}"
            if isinstance(value, int) and value > largest:
                whole += f" and <= {largest}"
            needed = {int: whole, float: "a number > 0", bool: "true or false"}[kinds[name]]
            yield f"{spelling} must be {needed}, found {_json(value)}"


def _is_a(kind: type, value: Any, smallest: int = 1, largest: int = _LARGEST_SIZE) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and smallest <= value <= largest
    return isinstance(value, int | float) and 0 < value <= sys.float_info.max


def _json(value: Any) -> str:
    return shortened(json.dumps(value), 60)


def _wrong_values(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    architecture = architecture_of(config)
    model_type = config.get("model_type")
    if model_type not in (None, family.model_type):
        yield f"model_type {model_type!r} does not fit architecture {architecture}, which needs {family.model_type!r}"
    elsewhere = {name: needed for name, needed in _NEEDED.items() if name not in family.read}
    for name, needed in (elsewhere | dict(family.needed)).items():
        value = config.get(name)
        if value is not None and value != needed:
            yield f"{name} is {_json(value)}, but only {json.dumps(needed)} is supported for {architecture}"
    for spelling, name in family.aliases.items():
        if None not in (config.get(spelling), config.get(name)) and config[spelling] != config[name]:
            yield f"{spelling} and {name} differ, but mean the same: leave one of the two out"
    given = {family.aliases.get(name, name): value for name, value in config.items()}
    if len({given.get(name) or False for name in family.equal}) > 1:
        yield f"{' and '.join(family.equal)} differ, but only equal ones are supported for {architecture}"
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
        yield f"layer_types must be a list or null, found {_json(layer_types)}"
        return
    other = sorted({str(kind) for kind in layer_types} - {"full_attention"})
    if other:
        yield f"layer_types has {other[0]!r}, but only 'full_attention' is supported"
    if config.get("quantization_config"):
        yield "quantization_config is set, but only unquantised weights are trained"


def _unknown_keys(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    known = _READ | _HARMLESS | _NEEDED.keys() | family.read | family.needed.keys() | family.harmless
    for name, value in config.items():
        if name not in known and value is not None:
            yield (
                f"{name} is {_json(value)}, which xrl does not know for {architecture_of(config)} and "
                f"which may change the maths: take the key out if it does not"
            )


def _wrong_rope(config: Mapping[str, Any]) -> Iterator[str]:
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name) or {}
        if not isinstance(rope, dict):
            yield f"{name} must be an object or null, found {_json(rope)}"
            continue
        yield from (f"{name}{problem}" for problem in _rope_problems(rope))
    both = [rope_settings({**config, other: None}) for other in ("rope_scaling", "rope_parameters")]
    if config.get("rope_scaling") and config.get("rope_parameters") and both[0] != both[1]:
        yield "rope_scaling and rope_parameters differ, but mean the same: leave one of the two out"
    theta, inner = config.get("rope_theta"), rope_settings(config)["rope_theta"]
    if theta is not None and theta != inner:
        yield f"rope_theta is {theta}, but the one in rope_parameters is {inner}: leave one of the two out"


def _rope_problems(rope: Mapping[str, Any]) -> Iterator[str]:
    if any(isinstance(value, dict) for value in rope.values()):
        yield " differs from layer to layer, but only one setting for all is supported"
        return
    kind = rope.get("rope_type") or rope.get("type") or "default"
    further = _ROPE_TYPES.get(kind) if isinstance(kind, str) else None
    if further is None:
        yield f" has type {kind!r}, but only {', '.join(map(repr, _ROPE_TYPES))} are supported"
        return
    for name, value in rope.items():
        if name not in _ROPE_KEYS | further and value is not None:
            yield f" has the key {name}, which xrl does not know for type {kind!r}"
    for name in sorted(further | {"rope_theta"}):
        value = rope.get(name)
        optional = name in ("rope_theta", "original_max_position_embeddings")
        if not (value is None and optional) and not _is_a(float, value):
            yield f".{name} must be a number > 0, found {_json(value)}"
    if rope.get("partial_rotary_factor", 1) != 1:
        yield " has a partial_rotary_factor, but only rotation of whole heads is supported"


def _wrong_relations(config: Mapping[str, Any], shape: ModelShape) -> Iterator[str]:
    if shape.num_heads % shape.num_kv_heads:
        yield (f"num_attention_heads {shape.num_heads} must be a multiple of num_key_value_heads {shape.num_kv_heads}")
    if shape.head_dim % 2:
        yield f"head_dim must be even to be rotated, found {shape.head_dim}"
    scaling = shape.rope_scaling
    if scaling is not None and scaling.low_freq_factor >= scaling.high_freq_factor:
        yield (
            f"low_freq_factor {scaling.low_freq_factor:g} of the rotary scaling must be smaller than "
            f"high_freq_factor {scaling.high_freq_factor:g}"
        )
    if shape.experts is not None:
        yield from _wrong_experts(shape.experts, shape.num_layers)


def _wrong_experts(experts: ExpertShape, num_layers: int) -> Iterator[str]:
    if experts.experts_per_token > experts.num_experts:
        yield f"num_experts_per_tok {experts.experts_per_token} is more than the {experts.num_experts} experts"
    if experts.experts_per_token == 1 and experts.normalize_top_k:
        yield "num_experts_per_tok 1 with normalised weights leaves the router nothing to learn: at least 2 are needed"
    if experts.first_dense_layers >= num_layers:
        yield f"first_k_dense_replace {experts.first_dense_layers} leaves none of the {num_layers} layers with experts"
    if experts.num_groups == 1:
        return
    if experts.num_experts % experts.num_groups or experts.groups_per_token > experts.num_groups:
        yield (
            f"{experts.num_experts} experts do not form n_group = {experts.num_groups} groups "
            f"with topk_group = {experts.groups_per_token} of them in use"
        )
    # DeepSeek rates a group by its two best experts, megatron-core by as many as a token takes from it.
    if experts.experts_per_token != 2 * experts.groups_per_token:
        yield (
            f"num_experts_per_tok {experts.experts_per_token} must be twice topk_group {experts.groups_per_token}: "
            f"other choices of groups are not supported"
        )
