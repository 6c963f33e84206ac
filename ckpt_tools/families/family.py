"""What a family is: which configs belong to it, what it reads from them, and its rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_tools.layouts.layout import Layout, Shape, resolve
from ckpt_tools.layouts.rules import Rule

LAYOUT_VERSION = 1
"""Raised when a native name, shape or order of any family changes; recorded in every manifest."""


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
        tied: names absent from disk when `tie_word_embeddings` is set, with the name they share.
        dropped: templates of names that are on disk in some repositories and hold no weights.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    architecture: str
    shape: Callable[[Mapping[str, Any]], Shape]
    rules: tuple[Rule, ...]
    tied: tuple[tuple[str, str], ...] = (("lm_head.weight", "model.embed_tokens.weight"),)
    dropped: tuple[str, ...] = ()

    def layout(self, config: Mapping[str, Any]) -> Layout:
        """The layout for one config; raises `LayoutError` when the config is not of this family's form."""
        shape = self.shape(config)
        tied = dict(self.tied) if "tied" in shape.flags else {}
        return resolve(self.name, self.rules, shape, tied=tied, dropped=self.dropped)
