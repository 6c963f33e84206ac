"""Checkpoints on plain web servers, which list files as pages of links or not at all, and may not know byte ranges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ckpt_tools.core.errors import NotFoundError
from ckpt_tools.formats.dcp.description import parse
from ckpt_tools.formats.dcp.metadata import METADATA_FILE
from ckpt_tools.formats.documents import parse_json_object
from ckpt_tools.formats.hf import INDEX, SINGLE
from ckpt_tools.formats.remote import RemoteFiles, Version, in_parallel, no_ranges, version_of

_TOKENIZER: Final = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json", "config.json"),
)
_USUAL: Final = (
    *(INDEX, SINGLE, METADATA_FILE, "ckpt-manifest.json", "README.md", "LICENSE"),
    *_TOKENIZER,
    *(f"hf/{name}" for name in _TOKENIZER),
)
_NO_PAGE: Final = frozenset({400, 401, 403, 404, 405, 410})


class WebFiles(RemoteFiles):
    """The files of a checkpoint on a web server; sizes and versions take a request a file."""

    def changed(self, files: Sequence[str]) -> list[str]:
        now = self._versions(files)
        return [file for file in files if now.get(file) != self.versions[file]]

    def _range(self, file: str, begin: int, end: int) -> bytes:
        if begin == end:
            return b""
        try:
            # Unlike cat_file, never takes the whole file of a server that does not know ranges.
            return bytes(self._filesystem.open(self._name(file), size=end)._fetch_range(begin, end))
        except ValueError as error:
            raise no_ranges(f"{self.url}/{file}") from error

    def _list(self) -> dict[str, Version]:
        """What the pages of links list; where there are none, the usual files and those that they name."""
        pages = self._patiently("", lambda: self._links(f"{self._path}/"))
        names = self._relative(pages)
        if any(name.endswith(".safetensors") or name == METADATA_FILE for name in names):
            for folder in (page for page in pages if page.endswith("/hf/")):
                names |= self._relative(self._links(folder))
            return self._kept(self._versions([name for name in names if not name.endswith("/") and "?" not in name]))
        found = self._versions(_USUAL)
        return self._kept(found | self._versions(self._named(found)))

    def _links(self, page: str) -> list[str]:
        try:
            return [str(link) for link in self._filesystem.ls(page, detail=False)]
        except FileNotFoundError:
            return []
        except Exception as error:
            if getattr(error, "status", None) in _NO_PAGE:
                return []
            raise

    def _named(self, found: dict[str, Version]) -> list[str]:
        """Files that the index or the description of a checkpoint names."""
        if METADATA_FILE in found:
            described = parse(self.fetch(METADATA_FILE, 0, found[METADATA_FILE].size), f"{self.url}/{METADATA_FILE}")
            return sorted({place.file for place in described.locations.values()})
        if INDEX in found:
            files = parse_json_object(self.fetch(INDEX, 0, found[INDEX].size), f"{self.url}/{INDEX}").get("weight_map")
            return sorted({file for file in files.values() if isinstance(file, str)}) if isinstance(files, dict) else []
        return []

    def _versions(self, files: Sequence[str]) -> dict[str, Version]:
        """Versions of those of the files that exist."""

        def ask(file: str) -> Version | None:
            try:
                return self._patiently(file, lambda: version_of(self._filesystem.info(self._name(file))))
            except NotFoundError:
                return None

        found = zip(files, in_parallel(ask, files), strict=True)
        return {file: version for file, version in found if version is not None}
