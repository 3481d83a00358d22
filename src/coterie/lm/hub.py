"""Base models from the Hugging Face hub: what its cache holds whole is used without a look at the network.

So a base stays the same until `coterie models pull` is asked for a model that is not there, and a run starts offline.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from coterie.errors import BaseModelError
from coterie.lm.catalog import CATALOG
from coterie.lm.directory import check_model_directory

# The root of a repository only: subdirectories hold other formats. consolidated.* is a second copy of the weights.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_UNWANTED = ["*/*", "consolidated*"]


def from_hub(repo_id: str, *, allow_download: bool, report: Callable[[str], None]) -> Path:
    """The directory of a hub model in the hub's cache, downloaded first where it is missing or not whole.

    Raises:
        BaseModelError: not in the cache while downloads are off (`allow_download`, HF_HUB_OFFLINE), no such model, no
            right to it, no network, or a repository without config, safetensors weights or tokenizer.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    otherwise = f"set base.model to a local directory or to one of: {', '.join(CATALOG)}"
    to_run = f"run `coterie models pull {repo_id}` with network access, or {otherwise}"
    try:
        return _snapshot(repo_id, local=True)
    except (LocalEntryNotFoundError, BaseModelError) as error:
        why = None if allow_download else "downloads are off for this call"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set"
        if why is not None:
            found = f"unusable ({error})" if isinstance(error, BaseModelError) else "missing"
            raise BaseModelError(
                f"base model {repo_id!r} is not a local directory, in the hub cache it is {found}, and {why}: {to_run}"
            ) from error
    report(f"downloading {repo_id} from the hub")
    try:
        return _snapshot(repo_id, local=False)
    except BaseModelError:
        raise
    except GatedRepoError as error:
        raise BaseModelError(
            f"base model {repo_id!r}: its terms must be accepted on the hub first; do so and run `hf auth login`, "
            f"or {otherwise}"
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseModelError(
            f"base model {repo_id!r} is neither a local directory nor a public model on the hub; check the spelling, "
            f"run `hf auth login` if it is private, or {otherwise}"
        ) from error
    except Exception as error:  # the hub's transport raises errors of whichever HTTP library it was built on
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseModelError(f"cannot download base model {repo_id!r} from the hub: {reason}; {to_run}") from error


def _snapshot(repo_id: str, *, local: bool) -> Path:
    from huggingface_hub import snapshot_download

    path = snapshot_download(repo_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=local)
    check_model_directory(Path(path))
    return Path(path)
