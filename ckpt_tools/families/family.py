"""What a family is: which configs belong to it, what it reads from them, and its rules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckpt_tools.core.configs import MAX_TENSORS, check_counts, config_errors
from ckpt_tools.core.errors import LayoutError, UsageError, listed
from ckpt_tools.core.names import fill
from ckpt_tools.families.dialects.dialect import Dialect
from ckpt_tools.layouts.encodings import ENCODINGS, Encoding
from ckpt_tools.layouts.layout import BUFFER, Layout, LeafTensor, Shape, resolve
from ckpt_tools.layouts.rules import Rule

LAYOUT_VERSION = 1
"""Raised when a native name, shape or order of any family changes; recorded in every manifest."""


FP8_BLOCKS: Mapping[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
"""`quantization_config` of the FP8 releases of DeepSeek and Qwen."""

FP8_CHANNELS: Mapping[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": {
                "dynamic": True,
                "num_bits": 8,
                "strategy": "token",
                "symmetric": True,
                "type": "float",
            },
            "targets": ["Linear"],
            "weights": {"dynamic": False, "num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"},
        }
    },
    "format": "float-quantized",
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
"""`quantization_config` of llm-compressor's `FP8_DYNAMIC` releases: a scale a row, activations scaled as they come."""


@dataclass(frozen=True)
class Form:
    """Another form of a family's Hugging Face side: quantised, or with other names.

    Attributes:
        name: the name on the command line, such as `fp8`.
        encoding: key of `ckpt_tools.layouts.encodings.ENCODINGS`.
        encoded: templates of the leaves that are written encoded, none for a form that is only read; in a checkpoint
            that is read, names decide.
        quantization_config: what config.json says of it when the source's config does not.
        plain_modules: key under which readers also need the names of the modules that are not encoded.
        rules: rules of this form where they differ from the family's.
    """

    name: str
    encoding: str
    encoded: tuple[str, ...]
    quantization_config: Mapping[str, Any]
    plain_modules: str | None = None
    rules: tuple[Rule, ...] | None = None

    def description_in(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The config's own description of quantised tensors where it is one of this form, else None."""
        described = config.get("quantization_config")
        fits = isinstance(described, Mapping) and all(
            described.get(key) == value for key, value in self.quantization_config.items()
        )
        return described if fits else None

    def encoding_for(self, config: Mapping[str, Any]) -> Encoding:
        """The encoding, with scales that are powers of two where the config says that the form has such."""
        scales = (self.description_in(config) or {}).get("scale_fmt")
        return ENCODINGS["fp8-ue8m0" if self.encoding == "fp8" and scales == "ue8m0" else self.encoding]


def fp8_forms(*matrices: str, lists_plain_modules: bool = True) -> tuple[Form, ...]:
    """The published FP8 forms of a family whose `matrices` are encoded.

    Args:
        matrices: templates of the leaves.
        lists_plain_modules: whether releases in blocks name the modules that they leave as they are.
    """
    return (
        Form("fp8", "fp8", matrices, FP8_BLOCKS, "modules_to_not_convert" if lists_plain_modules else None),
        Form("fp8-channel", "fp8-channel", matrices, FP8_CHANNELS, "ignore"),
        # Read only: modelopt, AutoFP8 and compressed-tensors describe it each in their own way.
        Form("fp8-tensor", "fp8-tensor", (), {}),
    )


@dataclass(frozen=True)
class Family:
    """One model family, as data.

    Attributes:
        name: the name on the command line.
        title: the name in documentation.
        model_types: `model_type` values of config.json that belong to it.
        architecture: the transformers class that loads the Hugging Face side.
        shape: reads sizes, kinds of layers and flags from a config.
        rules: one for each native tensor.
        data_only: it has no native model and trains through transformers' class: its native names are those that
            transformers 5 holds in memory. transformers 4 mostly holds the names of the files.
        tied: names absent from disk when `tie_word_embeddings` is set, with the name they share.
        dropped: templates of names that are on disk in some repositories and hold no weights.
        forms: other forms of the Hugging Face side.
        optional_layers: kinds of layers that many repositories leave out whatever their config says, with the
            template of the names in such a layer. They are there if any name of theirs is, and then wholly. A flag
            of the same name says so to rules outside of layers.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    architecture: str
    shape: Callable[[Mapping[str, Any]], Shape]
    rules: tuple[Rule, ...]
    data_only: bool = False
    tied: tuple[tuple[str, str], ...] = (("lm_head.weight", "model.embed_tokens.weight"),)
    dropped: tuple[str, ...] = ()
    forms: tuple[Form, ...] = ()
    optional_layers: Mapping[str, str] = field(default_factory=dict)

    @config_errors()
    def layout(
        self,
        config: Mapping[str, Any],
        *,
        form: str | None = None,
        names: Collection[str] | None = None,
        dialect: Dialect | None = None,
    ) -> Layout:
        """The layout for one config.

        Args:
            config: content of config.json.
            form: name of the form of the Hugging Face side, empty for the plain one. None reads it, and which leaves
                are encoded, from `names`; without those it is the plain one.
            names: the names of a checkpoint or of a model, on either side: they decide whether optional layers are
                there. Without them the config does.
            dialect: whose tensors the native side has; None for ours.

        Raises:
            LayoutError: the config is not of this family's form, or of a model that the dialect has no names for.
            UsageError: the family has no such form, or the dialect does not know the family.
        """
        check_counts(config)
        shape = _bounded(self.shape(config))
        if names is not None:
            layers = {**self.optional_layers, **(dialect.optional_layers if dialect else {})}
            shape = self._with_layers_of(shape, names, layers)
        reads_form = form is None and names is not None
        chosen = self._form_of(config, names or ()) if reads_form else self._form(form or "")
        own = (chosen and chosen.rules) or self.rules
        if dialect is None:
            return self._layout(config, shape, chosen, own, reads_form, names)
        rules = dialect.rules_of(self.name, own)
        if rules is None:
            raise UsageError(f"{dialect.title} has no names for {self.title}", hint=f"see `ckpt families {self.name}`")
        spoken = self._layout(config, shape, chosen, rules, reads_form, names)
        lacking = self._layout(config, shape, chosen, dialect.unsaid(own, rules), reads_form, names)
        return _spoken(spoken, lacking.leaves, dialect)

    def _layout(
        self,
        config: Mapping[str, Any],
        shape: Shape,
        chosen: Form | None,
        rules: tuple[Rule, ...],
        reads_form: bool,
        names: Collection[str] | None,
    ) -> Layout:
        """The layout of `rules`, the family's or a dialect's, for the form chosen."""
        tied = dict(self.tied) if "tied" in shape.flags else {}
        dropped = dict.fromkeys(self.dropped, BUFFER)
        extra: dict[str, Any] = {"tied": tied, "native_tied": tied, "dropped": dropped}
        if chosen is None:
            return resolve(self.name, rules, shape, None, **extra)
        extra |= {"form": chosen.name, "leaf_form": chosen.name if chosen.rules else ""}
        encoding = chosen.encoding_for(config)

        def encoding_of(template: str, name: str) -> Encoding | None:
            if reads_form:
                return encoding if all(part in (names or ()) for part in encoding.part_names(name)) else None
            return encoding if template in chosen.encoded else None

        found = resolve(self.name, rules, shape, encoding_of, **extra)
        return replace(found, beside=frozenset(_beside(found, encoding, names or ())))

    def check_written(self, form: str) -> None:
        """Raises `UsageError` when repositories of a form are not written, only read."""
        found = self._form(form)
        if found is not None and not found.encoded:
            raise UsageError(f"{form} is read, not written", hint="write fp8 or fp8-channel instead")

    @config_errors()
    def quantization_config(self, config: Mapping[str, Any], layout: Layout) -> Mapping[str, Any] | None:
        """What config.json has to say of the form that `layout` has on disk; None for a plain one.

        Args:
            config: of the source; its own description is kept where it is of the same form.
            layout: of the checkpoint that is written.
        """
        form = self._form(layout.form)
        if form is None:
            return None
        found = dict(form.description_in(config) or form.quantization_config)
        modules = {leaf.name.removesuffix(".weight"): leaf.encoding for leaf in layout.leaves.values()}
        encoded = {name for name, encoding in modules.items() if encoding}
        if form.plain_modules is not None and (
            form.plain_modules not in found or encoded & {*found[form.plain_modules]}
        ):
            leaves = (leaf.name for leaf in layout.leaves.values() if leaf.encoding is None)
            plain = [name for name in (*leaves, *layout.tied) if name.endswith(".weight")]
            found[form.plain_modules] = [name.removesuffix(".weight") for name in plain]
        return found

    def _with_layers_of(self, shape: Shape, names: Collection[str], optional: Mapping[str, str]) -> Shape:
        """`shape` without its optional layers if none of `names` is in one, given the templates of such names."""
        there = tuple(kind for kind in shape.layers if not set(kind.split("+")) & self.optional_layers.keys())
        prefixes = tuple(
            fill(template, layer=index, predict=index - len(there))
            for index, kind in enumerate(shape.layers)
            for word, template in optional.items()
            if word in kind.split("+")
        )
        if not prefixes or any(name.startswith(prefixes) for name in names):
            return shape
        return replace(shape, layers=there, flags=shape.flags - self.optional_layers.keys())

    def _form(self, name: str) -> Form | None:
        if not name:
            return None
        for form in self.forms:
            if form.name == name:
                return form
        known = ", ".join(form.name for form in self.forms if form.encoded) or "none"
        raise UsageError(f"{self.title} has no form {name!r}", hint=f"its quantised forms: {known}")

    def _form_of(self, config: Mapping[str, Any], names: Collection[str]) -> Form | None:
        by_rows = "channel" in _strategies(config)
        for form in self.forms:
            # The last part (scales) has a name that no plain checkpoint has.
            suffix = ENCODINGS[form.encoding].part_names("")[-1]
            if any(name.endswith(suffix) for name in names) and (by_rows or form.name != "fp8-channel"):
                return form
        return None


def _bounded(shape: Shape) -> Shape:
    """The shape, if its sizes can be those of tensors.

    Raises:
        LayoutError: they cannot.
    """
    for name, size in shape.sizes.items():
        if type(size) is not int or not 0 <= size < 1 << 48:
            raise LayoutError(f"config.json gives a model whose {name.replace('_', ' ')} is {str(size)[:40]}")
    if len(shape.layers) * max(1, shape.experts) > MAX_TENSORS:
        raise LayoutError(f"config.json: {len(shape.layers):,} layers of {shape.experts:,} experts are no model")
    return shape


def _spoken(spoken: Layout, lacking: Mapping[str, LeafTensor], dialect: Dialect) -> Layout:
    """The layout of a dialect's tensors, with the leaves that they lack."""
    lent = {name: dialect.lender(name) for name in lacking}
    unknown = [name for name, lender in lent.items() if lender is None]
    if unknown:
        raise LayoutError(
            f"{dialect.title} has no names for {len(unknown):,} tensors of such a {spoken.family} model:\n"
            + listed(unknown),
            hint="config.json belongs to another model, or names are given by another --dialect",
        )
    return replace(
        spoken,
        dialect=dialect.name,
        leaves={**spoken.leaves, **lacking},
        lent={name: spoken.tied.get(lender, lender) for name, lender in lent.items() if lender},
        native_tied=dict(dialect.tied or spoken.tied) if spoken.tied else {},
        dropped={**spoken.dropped, **dialect.dropped},
    )


def _strategies(config: Mapping[str, Any]) -> set[object]:
    """How compressed-tensors says that the weights are scaled: `tensor`, `channel`, `block`, ..."""
    described = config.get("quantization_config") or config.get("compression_config")
    groups = described.get("config_groups") if isinstance(described, Mapping) else None
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    return {entry.get("strategy") for entry in weights if isinstance(entry, Mapping)}


def _beside(layout: Layout, encoding: Encoding, names: Collection[str]) -> Iterator[str]:
    """Those of the names that are scales beside encoded leaves: of activations, and of the cache of keys and values."""
    endings = tuple(f".{name}" for name in encoding.beside)
    scales = [name for name in names if name.endswith(endings)] if endings else []
    if scales:
        modules = {name.rpartition(".")[0] for name, leaf in layout.leaves.items() if leaf.encoding}
        modules |= {module.rpartition(".")[0] for module in modules}
        yield from (name for name in scales if name.rpartition(".")[0] in modules)
