"""The tokenizer of a model, found where the auto classes find the model: directory, native checkpoint or Hub."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from automodel.sources import locate, without_hub_options


class NeMoAutoTokenizer:
    """transformers' `AutoTokenizer` that also finds the tokenizer of a native checkpoint (in its `hf/` folder)."""

    def __init__(self) -> None:
        raise TypeError("NeMoAutoTokenizer is not instantiated; call NeMoAutoTokenizer.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *inputs: object,
        revision: str | None = None,
        **kwargs: object,
    ) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to a model.

        Args:
            pretrained_model_name_or_path: directory of a repository or a native checkpoint, or `org/name` on the Hub.
            inputs: as `AutoTokenizer.from_pretrained` takes them.
            revision: branch, tag or commit on the Hub.
            kwargs: as `AutoTokenizer.from_pretrained` takes them (`use_fast`, `trust_remote_code`, `token`, ...).

        Raises:
            NotFoundError: there is no such directory or repository.
        """
        location = locate(pretrained_model_name_or_path, revision=revision, options=kwargs, weights=False)
        return AutoTokenizer.from_pretrained(location.side_root, *inputs, **without_hub_options(kwargs))
