"""Files from the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dt.errors import UserError, reason


def downloaded(identifier: str, kind: Literal["model", "dataset"], patterns: Sequence[str], otherwise: str) -> Path:
    """The folder that holds those files of a repository of the hub, from its cache if they are there already.

    Raises UserError, ending in `otherwise` (what else the user can give), when they are neither cached nor reachable.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(identifier, repo_type=kind, allow_patterns=list(patterns)))
    except Exception as error:  # the client raises its HTTP library's errors, its own, OSError and ValueError
        raise UserError(
            f"cannot get the {kind} {identifier!r} from the Hugging Face hub ({reason(error)}): "
            f"check its name and the network, or {otherwise}"
        ) from error
