"""What a family is: which configs belong to it, what it reads from them, and its rules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckpt_tools.core.errors import UsageError
from ckpt_tools.core.names import fill
from ckpt_tools.layouts.encodings import ENCODINGS, Encoding
from ckpt_tools.layouts.layout import Layout, Shape, resolve
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


@dataclass(frozen=True)
class Form:
    """Another form of a family's Hugging Face side: quantised, or with other names.

    Attributes:
        name: the name on the command line, such as `fp8`.
        encoding: key of `ckpt_tools.layouts.encodings.ENCODINGS`.
        encoded: templates of the leaves that are written encoded; in a checkpoint that is read, names decide.
        quantization_config: what config.json says of it when the source's config does not.
        lists_plain_modules: readers also need the names of the modules that are not encoded.
        rules: rules of this form where they differ from the family's.
    """

    name: str
    encoding: str
    encoded: tuple[str, ...]
    quantization_config: Mapping[str, Any]
    lists_plain_modules: bool = False
    rules: tuple[Rule, ...] | None = None


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
            template of the names in such a layer. They are there if any name of theirs is, and then wholly.
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

    def layout(
        self, config: Mapping[str, Any], *, form: str | None = None, names: Collection[str] | None = None
    ) -> Layout:
        """The layout for one config.

        Args:
            config: content of config.json.
            form: name of the form of the Hugging Face side, empty for the plain one. None reads it, and which leaves
                are encoded, from `names`; without those it is the plain one.
            names: the names of a checkpoint or of a model, on either side: they decide whether optional layers are
                there. Without them the config does.

        Raises:
            LayoutError: the config is not of this family's form.
            UsageError: the family has no such form.
        """
        shape = self.shape(config) if names is None else self._with_layers_of(self.shape(config), names)
        tied = dict(self.tied) if "tied" in shape.flags else {}
        reads_form = form is None and names is not None
        chosen = self._form_of(names or ()) if reads_form else self._form(form or "")
        extra: dict[str, Any] = {"tied": tied, "dropped": self.dropped}
        if chosen is None:
            return resolve(self.name, self.rules, shape, None, **extra)
        extra |= {"form": chosen.name, "leaf_form": chosen.name if chosen.rules else ""}
        encoding, rules = ENCODINGS[chosen.encoding], chosen.rules or self.rules

        def encoding_of(template: str, name: str) -> Encoding | None:
            if reads_form:
                return encoding if all(part in (names or ()) for part in encoding.part_names(name)) else None
            return encoding if template in chosen.encoded else None

        return resolve(self.name, rules, shape, encoding_of, **extra)

    def quantization_config(self, config: Mapping[str, Any], layout: Layout) -> Mapping[str, Any] | None:
        """What config.json has to say of the form that `layout` has on disk; None for a plain one.

        Args:
            config: of the source; its own description is kept where it is of the same method.
            layout: of the checkpoint that is written.
        """
        form = self._form(layout.form)
        if form is None:
            return None
        described = config.get("quantization_config")
        if isinstance(described, Mapping) and described.get("quant_method") == form.quantization_config["quant_method"]:
            return described
        if not form.lists_plain_modules:
            return form.quantization_config
        plain = [
            leaf.name for leaf in layout.leaves.values() if leaf.encoding is None and leaf.name.endswith(".weight")
        ]
        return {**form.quantization_config, "modules_to_not_convert": [name.removesuffix(".weight") for name in plain]}

    def _with_layers_of(self, shape: Shape, names: Collection[str]) -> Shape:
        """`shape` without its optional layers if none of `names` is in one."""
        prefixes = tuple(
            fill(self.optional_layers[kind], layer=index)
            for index, kind in enumerate(shape.layers)
            if kind in self.optional_layers
        )
        if not prefixes or any(name.startswith(prefixes) for name in names):
            return shape
        return replace(shape, layers=tuple(kind for kind in shape.layers if kind not in self.optional_layers))

    def _form(self, name: str) -> Form | None:
        if not name:
            return None
        for form in self.forms:
            if form.name == name:
                return form
        known = ", ".join(form.name for form in self.forms) or "none"
        raise UsageError(f"{self.title} has no form {name!r}", hint=f"its quantised forms: {known}")

    def _form_of(self, names: Collection[str]) -> Form | None:
        for form in self.forms:
            # The last part (scales) has a name that no plain checkpoint has.
            suffix = ENCODINGS[form.encoding].part_names("")[-1]
            if any(name.endswith(suffix) for name in names):
                return form
        return None
