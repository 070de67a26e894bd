"""The Hugging Face hub: its client, and the networks that are published there and may not be in this installation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jfbfast import checks
from jfbfast.models.checkpoint import CheckpointError
from jfbfast.models.directory import WEIGHTS_FILE

ORGANISATION = "jfbfast"
REVISION = "weights-1"  # the repositories' tag with the files below; if one of these changes, there is a new tag
SHA256 = {
    "gaussian5-sigma1": "bf8fec072b9ba21f28a20424b8e2ef4150fd778742e51bf6b55f57b525e5bc08",
    "gaussian5-sigma5": "7183a26118d411c84439441c94632926860292227e03b0e5d6959bf75261cb08",
    "plug-and-play": "c9294564edadc6f7edffffb3cd77966d28cc2d38be6c60804757fbee94264c98",
    "universal": "f6cd245b59fb4d35586ee8d91710f83e61f4334baab324a003946c30261781c0",
}


def client() -> Any:
    """Import huggingface_hub, which only the hub needs."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        told = f"{error.name} is not installed, and the Hugging Face hub needs it: pip install 'jfbfast[hub]'"
        raise ModuleNotFoundError(told, name=error.name) from error
    return huggingface_hub


def fetched(name: str, options: Mapping[str, Any]) -> Path:
    """The file of a network in `SHA256`, from the cache of huggingface_hub; it is downloaded if it is not there.

    Args:
        name: of the network.
        options: token, cache_dir, force_download and local_files_only, as in huggingface_hub's hf_hub_download.

    Raises:
        CheckpointError: huggingface_hub is missing, the hub does not give the file, or the file is another one.
    """
    repo_id, revision = f"{ORGANISATION}/{name}", options.get("revision") or REVISION
    address = f"https://huggingface.co/{repo_id}/resolve/{REVISION}/{WEIGHTS_FILE}"
    by_hand = f"download {address} and pass the file's path"
    try:
        hub = client()
    except ModuleNotFoundError as error:
        told = f"{name} is not in this installation; to fetch it, pip install 'jfbfast[hub]'; or {by_hand}"
        raise CheckpointError(told) from error
    where = {**options, "revision": revision}
    try:
        file = hub.try_to_load_from_cache(repo_id, WEIGHTS_FILE, options.get("cache_dir"), revision)
        if not isinstance(file, str) or options.get("force_download"):
            file = hub.hf_hub_download(repo_id, WEIGHTS_FILE, **where)
    except (OSError, ValueError) as error:  # huggingface_hub's errors derive from these
        told = f"{name} is not in this installation, and the hub does not give it ({checks.one_line(error)})"
        raise CheckpointError(f"{told}; {by_hand}") from error
    found = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    if found != SHA256[name]:
        told = f"its SHA-256 is {found}, and that of {name} is {SHA256[name]}"
        raise CheckpointError(f"{file}: {told}; delete it, and it is fetched again")
    return Path(file)
