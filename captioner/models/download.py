"""Download models from the Hugging Face hub, or from any store that `captioner.files` opens."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, FSSpecHandler, PyFileSystem

from captioner.errors import ModelError, UsageError
from captioner.files import cache_dir, open_filesystem
from captioner.models.adapters import CONFIG_FILE
from captioner.models.weights import TRAINING_IMAGES, weight_files

# Files that cannot run code: no pickles, no Python. The last lists the images that `captioner train` has trained on.
HUB_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", TRAINING_IMAGES)
# Mistral's own format of weights, beside the same weights in the files that are loaded.
OTHER_FORMAT = "consolidated*.safetensors"


def download_from_hub(name: str, revision: str | None, notify: Callable[[str], None]) -> tuple[Path, str]:
    """Return the snapshot of a hub id in Hugging Face's cache, and its commit.

    With HF_HUB_OFFLINE=1 only the cache is read.
    """
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return _from_hub_cache(name, revision)
    commit = _commit_of(name, revision)
    if not _has_weights(_cached(name, commit)):
        notify(f"downloading {name} at {commit} from {constants.ENDPOINT}")
    try:
        # By the branch's name instead of the commit, so that the cache can resolve the branch offline too.
        directory = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(HUB_PATTERNS), ignore_patterns=["*/*", OTHER_FORMAT]
            )
        )
    except Exception as error:  # which exceptions the client raises depends on its version
        raise ModelError(
            f"--model {name}: the download failed: {_one_line(error)}; the same command resumes it"
        ) from None
    return directory, directory.name


def why_unreachable(name: str) -> str:
    """Return why a hub id can neither be read from Hugging Face's cache nor be downloaded now; "" where it can."""
    from huggingface_hub import constants

    try:
        if not _has_weights(_cached(name, None)):
            (_from_hub_cache if constants.HF_HUB_OFFLINE else _commit_of)(name, None)
    except ModelError as error:
        return str(error)
    return ""


def _from_hub_cache(name: str, revision: str | None) -> tuple[Path, str]:
    directory = _cached(name, revision)
    if directory is None:
        raise ModelError(
            f"--model {name}: neither a directory here nor in the Hugging Face cache, and HF_HUB_OFFLINE=1 forbids"
            " downloading it; download it first, or give its directory"
        )
    return directory, directory.name


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    files = [try_to_load_from_cache(name, file, revision=revision) for file in ("config.json", CONFIG_FILE)]
    return next((Path(file).parent for file in files if isinstance(file, str)), None)


def _has_weights(directory: Path | None) -> bool:
    try:
        return directory is not None and bool(weight_files(directory))
    except ModelError:
        return False


def _commit_of(name: str, revision: str | None) -> str:
    """Return the commit of a branch or tag; of the main branch for None."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(HfApi().model_info(name, revision=revision, timeout=max(20, constants.HF_HUB_ETAG_TIMEOUT)).sha)
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
    except Exception as error:  # no network: which exception depends on the HTTP client
        raise ModelError(
            f"--model {name}: no such directory, and the hub does not answer ({_one_line(error)});"
            " HF_HUB_OFFLINE=1 uses an earlier download"
        ) from None


def download_from_uri(uri: str, notify: Callable[[str], None]) -> Path:
    """Return a copy, in the user's cache, of a model directory in a store; it is copied again when a file changes."""
    try:
        filesystem, root = open_filesystem(uri)
        infos = sorted(filesystem.get_file_info(FileSelector(root)), key=lambda info: info.path)
    except (OSError, UsageError) as error:
        raise ModelError(f"--model {uri}: cannot be listed: {_one_line(error)}") from None
    files = [info for info in infos if info.type == FileType.File and _is_allowed(info.base_name)]
    if not files:
        raise ModelError(f"--model {uri}: holds no model; give the directory with config.json and the weights")
    state = repr((uri, [(info.base_name, info.size, _version(filesystem, info)) for info in files]))
    target = cache_dir() / "models" / hashlib.sha256(state.encode()).hexdigest()[:32]
    if not os.path.isdir(target):
        notify(f"downloading {uri} ({sum(info.size or 0 for info in files) / 1e6:,.0f} MB) to {target}")
        _copy(uri, filesystem, files, target)
    return target


def _version(filesystem: FileSystem, info: FileInfo) -> object:
    """Return a value that changes with the file: fsspec's key (an ETag), as it gives Arrow no modification time."""
    if isinstance(filesystem, PyFileSystem) and isinstance(filesystem.handler, FSSpecHandler):
        return filesystem.handler.fs.ukey(info.path)
    return info.mtime_ns


def _copy(uri: str, filesystem: FileSystem, files: list[FileInfo], target: Path) -> None:
    """Copy all files or none: `target` is created by a rename, so an interrupted copy is never taken for complete."""
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
        if not os.path.isdir(target):  # otherwise another process has copied the same files
            raise ModelError(f"--model {uri}: cannot be copied to {target}: {_one_line(error)}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _is_allowed(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in HUB_PATTERNS) and not fnmatchcase(name, OTHER_FORMAT)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
