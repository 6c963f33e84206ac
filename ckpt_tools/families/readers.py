"""What each reader cannot read, as data: `ckpt consolidate --for` then writes what all the named readers accept, or
refuses with the reason. The reader matrix (tests/readers) takes its limits from here and proves each on the reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_tools.core.configs import config_errors
from ckpt_tools.core.errors import UsageError
from ckpt_tools.core.names import nearest

Config = Mapping[str, Any]

READERS = {
    "transformers4": "transformers 4",
    "transformers5": "transformers 5",
    "vllm": "vLLM",
    "sglang": "SGLang",
}
"""Names on the command line, with those in documentation."""


@dataclass(frozen=True)
class Limit:
    """Checkpoints that a reader misreads or refuses, whoever wrote them.

    Attributes:
        reader: key of `READERS`.
        model_types: `model_type` values of config.json that it concerns.
        reason: a sentence without its full stop.
        when: whether a config is concerned.
        form: the quantised form that it concerns; empty for all forms.
        instead: config fields of a checkpoint with the same values that this reader, and every other, accepts.
        error: words of the reader's refusal; empty where it answers wrongly without one.
    """

    reader: str
    model_types: tuple[str, ...]
    reason: str
    when: Callable[[Config], bool]
    form: str = ""
    instead: Mapping[str, Any] | None = None
    error: str = ""


def _always(_config: Config) -> bool:
    return True


def _is_tied(config: Config) -> bool:
    return bool(config.get("tie_word_embeddings"))


def _has_dense_layers(config: Config) -> bool:
    return bool(config.get("mlp_only_layers")) or (config.get("decoder_sparse_step") or 1) > 1


def _has_mlp_bias(config: Config) -> bool:
    return bool(config.get("mlp_bias"))


def _derived_head_dim(config: Config) -> int:
    return int((config.get("hidden_size") or 0) // (config.get("num_attention_heads") or 1))


def _has_own_head_dim(config: Config) -> bool:
    return (config.get("head_dim") or _derived_head_dim(config)) != _derived_head_dim(config)


def _has_narrow_heads(config: Config) -> bool:
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 1
    return bool(heads * (config.get("head_dim") or _derived_head_dim(config)) % 128)


LIMITS = (
    *(
        Limit(
            "transformers4",
            model_types,
            f"transformers 4 has no class for {title}",
            _always,
            error="does not recognize this architecture",
        )
        for title, model_types in (
            ("Nemotron-H", ("nemotron_h",)),
            ("MiniMax-M2", ("minimax_m2",)),
            ("Qwen3.5", ("qwen3_5_moe_text", "qwen3_5_text")),
        )
    ),
    Limit(
        "sglang",
        ("qwen3_moe",),
        "SGLang ignores `mlp_only_layers` and `decoder_sparse_step`",
        _has_dense_layers,
    ),
    Limit(
        "sglang",
        ("qwen3_moe",),
        "SGLang's Qwen3-MoE ignores `tie_word_embeddings`",
        _is_tied,
        instead={"tie_word_embeddings": False},
    ),
    Limit(
        "sglang",
        ("qwen3_moe",),
        "SGLang takes FP8 keys and values in whole blocks of 128 rows only",
        _has_narrow_heads,
        form="fp8",
        error="is not divisible by weight quantization block_n = 128",
    ),
    Limit("sglang", ("mixtral",), "SGLang's Mixtral ignores `head_dim`", _has_own_head_dim),
    Limit("sglang", ("llama",), "SGLang's Llama ignores `mlp_bias`", _has_mlp_bias),
)


def parse_readers(text: str) -> tuple[str, ...]:
    """The readers that `text`, such as `vllm,sglang`, names.

    Raises:
        UsageError: a name is not one of `READERS`.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in READERS:
            near = nearest(name, READERS)
            known = f"the readers are {', '.join(READERS)}"
            raise UsageError(f"no reader {name!r}", hint=f"did you mean {near}? {known}" if near else known)
    if not names:
        raise UsageError("no reader is named", hint=f"the readers are {', '.join(READERS)}")
    return names


@config_errors()
def limits(config: Config, readers: Iterable[str], form: str = "") -> list[Limit]:
    """The limits of `readers` that a checkpoint of this config in this quantised form (empty: plain) runs into."""
    asked = set(readers)
    return [
        limit
        for limit in LIMITS
        if limit.reader in asked
        and config.get("model_type") in limit.model_types
        and limit.form in ("", form)
        and limit.when(config)
    ]


def config_for(config: Config, readers: Iterable[str], form: str = "") -> Config:
    """The config of a checkpoint with the same values that all of `readers` accept; `config` itself where they do.

    Args:
        config: of the source.
        readers: keys of `READERS`.
        form: quantised form that is to be written, empty for plain tensors.

    Raises:
        UsageError: there is none; every reason is given.
    """
    found = limits(config, readers, form)
    if refused := [limit for limit in found if limit.instead is None]:
        reasons = "\n".join(f"  {limit.reader}: {limit.reason}" for limit in refused)
        raise UsageError(
            f"no Hugging Face repository of this model is read correctly by all of the named readers:\n{reasons}",
            hint="leave these readers out of --for",
        )
    return {**config, **{name: value for limit in found for name, value in (limit.instead or {}).items()}}
