"""Models that are not on this machine yet: from the Hugging Face hub, or from any store `captioner.files` opens."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType

from captioner.errors import ModelError, UsageError
from captioner.files import open_filesystem
from captioner.models.cache import cache_dir
from captioner.models.weights import weight_files

# Nothing that could run: no pickles, no Python.
HUB_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def from_hub(name: str, revision: str | None, announce: Callable[[str], None]) -> tuple[Path, str]:
    """The snapshot of a hub id in Hugging Face's own cache, and its commit. Nothing is asked when HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    offline = constants.HF_HUB_OFFLINE
    wanted = revision if offline or _COMMIT.fullmatch(revision or "") else _commit_of(name, revision)
    try:
        cached = Path(snapshot_download(name, revision=wanted, local_files_only=True))
        if offline or _is_whole(cached):
            return cached, cached.name
    except LocalEntryNotFoundError:
        if offline:
            raise ModelError(
                f"--model {name}: neither a directory here nor in the Hugging Face cache, and HF_HUB_OFFLINE=1 forbids"
                " downloading it; download it first, or give its directory"
            ) from None
    except HFValidationError as error:
        raise ModelError(f"--model {name}: no such directory, and not a hub id: {_line(error)}") from None
    announce(f"downloading {name} at {wanted} from {constants.ENDPOINT}")
    try:
        directory = snapshot_download(name, revision=wanted, allow_patterns=list(HUB_PATTERNS))
    except Exception as error:  # whatever the HTTP client of the day raises: no download, no model
        raise ModelError(f"--model {name}: the download stopped: {_line(error)}; the same command resumes it") from None
    return Path(directory), str(wanted)


def _commit_of(name: str, revision: str | None) -> str:
    """The commit a branch or tag (None: the main branch) points to."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(HfApi().model_info(name, revision=revision, timeout=20).sha)
    except GatedRepoError:
        raise ModelError(
            f"--model {name}: its owner grants access one by one; ask on the hub, then set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"--model {name}: no such directory, and no such model on the hub (a private one needs HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"--revision {revision}: {name} has no such branch, tag or commit") from None
    except Exception as error:  # no network, as any HTTP client says it
        raise ModelError(
            f"--model {name}: no such directory, and the hub does not answer ({_line(error)}); HF_HUB_OFFLINE=1 takes"
            " what was downloaded before"
        ) from None


def _is_whole(directory: Path) -> bool:
    try:
        return bool(weight_files(directory)) and (directory / "config.json").is_file()
    except ModelError:
        return False


def from_uri(uri: str, announce: Callable[[str], None]) -> Path:
    """A copy of a model directory of a store in the user's cache; made anew when a file there changes."""
    try:
        filesystem, root = open_filesystem(uri)
        infos = sorted(filesystem.get_file_info(FileSelector(root)), key=lambda info: info.path)
    except (OSError, UsageError) as error:
        raise ModelError(f"--model {uri}: cannot be listed: {_line(error)}") from None
    files = [info for info in infos if info.type == FileType.File and _is_allowed(info.base_name)]
    if not files:
        raise ModelError(f"--model {uri}: holds no model; give the directory with config.json and the weights")
    state = repr((uri, [(info.base_name, info.size, info.mtime_ns) for info in files]))
    target = cache_dir() / "models" / hashlib.sha256(state.encode()).hexdigest()[:32]
    if not target.is_dir():
        announce(f"downloading {uri} ({sum(info.size or 0 for info in files) / 1e6:,.0f} MB) to {target}")
        _copy(uri, filesystem, files, target)
    return target


def _copy(uri: str, filesystem: FileSystem, files: list[FileInfo], target: Path) -> None:
    """All files or none: `target` appears by a rename, so a killed copy leaves nothing that looks whole."""
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=target.parent, prefix=".part-")
        for info in files:
            with (
                filesystem.open_input_stream(info.path) as source,
                (Path(temporary) / info.base_name).open("wb") as out,
            ):
                shutil.copyfileobj(source, out, 1 << 22)
        os.rename(temporary, target)
    except OSError as error:
        if not target.is_dir():  # else another process was first with the same files
            raise ModelError(f"--model {uri}: cannot be copied to {target}: {_line(error)}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _is_allowed(name: str) -> bool:
    return any(name.endswith(pattern.removeprefix("*")) for pattern in HUB_PATTERNS)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
