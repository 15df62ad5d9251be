"""Fetch a model from the Hugging Face hub: safetensors, config and tokenizer, never pickle.

Each failure has its own message: hub unreachable, no such repository, licence not accepted, no safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.marker import CARD
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import disk_errors
from nirvana_deploy.model.families import family_of
from nirvana_deploy.model.text.source_card import LEGAL_KINDS

ALLOWED_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    CARD,
    *(f"{kind}*" for kind in LEGAL_KINDS),
)
"""Patterns of downloaded files. They match in subfolders (``original/``) too, which are left out."""
_IGNORED_FILES = ("*/*", "consolidated*.safetensors")

_ANSWER_TIMEOUT_S = 5.0
"""Limit for each step of the hub's first answer; huggingface_hub itself has none."""

# Connection and time-out errors come from huggingface_hub's HTTP library, which changed from one major
# version to the next. HfHubHTTPError derives from that library's root error and from OSError.
NETWORK_ERRORS: tuple[type[Exception], ...] = HfHubHTTPError.__bases__


class HubUnreachableError(NirvanaError):
    """No usable answer from the hub, and no copy of the model on this machine."""


def hub_snapshot(hub_id: str, *, progress: Progress = SILENT) -> tuple[Path, str | None]:
    """Download a model, or find it in huggingface_hub's cache; return its folder and licence.

    The licence is None if the model card names none or the hub is unreachable. Raises HubUnreachableError
    without an answer and a complete copy, NirvanaError for other failures.
    """
    try:
        info = HfApi().model_info(hub_id, timeout=_ANSWER_TIMEOUT_S)
    except HFValidationError:
        raise NirvanaError(
            f"{hub_id!r} is neither a folder on this machine nor a hub id of the form 'owner/name'."
        ) from None
    except GatedRepoError:
        raise _gated(hub_id) from None
    except RepositoryNotFoundError:
        raise NirvanaError(
            f"The hub has no public model {hub_id!r}, and there is no folder of that name here.",
            hint="Check the spelling at https://huggingface.co/models; for a private model: hf auth login",
        ) from None
    except NETWORK_ERRORS as error:
        return _cached_snapshot(hub_id, error), None
    _check_downloadable(hub_id, info)
    return _download(hub_id, info, progress), _licence_of(info)


def _check_downloadable(hub_id: str, info: ModelInfo) -> None:
    """Refuse an unusable model before gigabytes are downloaded."""
    if info.config and info.config.get("model_type"):
        family_of(info.config)
    names = [file.rfilename for file in info.siblings or []]
    if not any(name.endswith(".safetensors") and "/" not in name for name in names):
        raise NirvanaError(
            f"The hub model {hub_id!r} has no *.safetensors; it has: {', '.join(names[:8]) or 'no files'}.",
            hint="Choose a repository with *.safetensors, or pass a .gguf file that you downloaded.",
        )


def _download(hub_id: str, info: ModelInfo, progress: Progress) -> Path:
    progress.note(f"Downloading {hub_id} (revision {(info.sha or 'main')[:12]}) from the hub")
    try:
        with (
            disk_errors(Path(constants.HF_HUB_CACHE), elsewhere="set HF_HOME to another folder"),
            _hub_bars(shown=progress is not SILENT),
        ):
            # by branch, not by commit: only then can it be found again when the hub cannot be reached
            folder = snapshot_download(
                hub_id,
                allow_patterns=list(ALLOWED_FILES),
                ignore_patterns=list(_IGNORED_FILES),
                etag_timeout=_ANSWER_TIMEOUT_S,
            )
    except GatedRepoError:
        raise _gated(hub_id) from None
    except NETWORK_ERRORS as error:
        raise HubUnreachableError(
            f"The download of {hub_id!r} broke off: {_first_line(error)}.",
            hint="Run the same command again: what has arrived is kept.",
        ) from error
    return Path(folder)


def _cached_snapshot(hub_id: str, error: Exception) -> Path:
    """Return the copy of an earlier download; raise HubUnreachableError with the cause if none exists."""
    try:
        return Path(
            snapshot_download(
                hub_id,
                allow_patterns=list(ALLOWED_FILES),
                ignore_patterns=list(_IGNORED_FILES),
                local_files_only=True,
            )
        )
    except FileNotFoundError:
        pass
    if constants.HF_HUB_OFFLINE:
        raise HubUnreachableError(
            f"HF_HUB_OFFLINE is set, and {hub_id!r} has not been downloaded to this machine before.",
            hint="Unset HF_HUB_OFFLINE, or pass a local folder or .gguf file.",
        ) from error
    raise HubUnreachableError(
        f"The hub cannot be reached at {constants.ENDPOINT} ({_first_line(error)}), "
        f"and {hub_id!r} has not been downloaded to this machine before.",
        hint="Check the connection (proxy: HTTPS_PROXY), or pass a local folder or .gguf file.",
    ) from error


def _gated(hub_id: str) -> NirvanaError:
    return NirvanaError(
        f"The hub model {hub_id!r} is gated: its licence must be accepted by a logged-in user.",
        hint=f"Accept the licence at https://huggingface.co/{hub_id}, then: hf auth login",
    )


def _licence_of(info: ModelInfo) -> str | None:
    """``license`` of the model card, or ``license_name`` if that is "other"."""
    licence = getattr(info.card_data, "license", None)
    if licence == "other":
        licence = getattr(info.card_data, "license_name", None) or licence
    return str(licence) if licence else None


@contextmanager
def _hub_bars(*, shown: bool) -> Iterator[None]:
    """Show or hide huggingface_hub's progress bars, then restore the setting."""
    hide = not shown and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
