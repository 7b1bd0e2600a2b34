"""From a value of --model to a ModelRef. Imports neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import captioner.starter
from captioner.config import ModelConfig, check_endpoint_settings
from captioner.console.phases import phase
from captioner.data import PixelSpec, Question
from captioner.errors import ModelError
from captioner.files import is_uri, local_path, shown
from captioner.models import adapters, weights
from captioner.models.families import FAMILIES, family_of
from captioner.models.pixel_spec import read_pixel_spec
from captioner.models.quantized import check_quantize
from captioner.models.questions import read_questions, with_questions
from captioner.models.ref import ModelRef
from captioner.models.seeds import check_sampling, sampling_settings

STARTER, FAKE = "starter", "fake"
FAKE_SPEC = PixelSpec(height=32, width=32)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(config: ModelConfig, dtype: str | None = None, notify: Callable[[str], None] = print) -> ModelRef:
    """Find the model that `config` names, download it if needed, and return what its files say without loading it.

    `dtype`: the meaning of `config.dtype` "auto". `notify`: called with a line before a download starts, while it and
    hashing take long, and where a model's type is not one of FAMILIES. Raises ModelError where there is no such model
    or it cannot be used.
    """
    servers = "asking the model servers"
    config, questions = read_questions(config)
    with phase(servers if config.endpoint else f"reading the files of model {shown(config.name)}", notify):
        return with_questions(_resolve(config, dtype, notify, questions), config, questions)


def _resolve(
    config: ModelConfig, dtype: str | None, notify: Callable[[str], None], questions: Sequence[Question]
) -> ModelRef:
    check_sampling(config)
    if config.endpoint:
        from captioner.models.endpoint.probing import resolve_endpoint

        return resolve_endpoint(config, notify, questions)
    check_endpoint_settings(config)
    check_quantize(config)
    settings: dict[str, Any] = {
        "name": config.name,
        "dtype": (dtype or "float32") if config.dtype == "auto" else config.dtype,
        **sampling_settings(config),
        "num_beams": config.num_beams,
        "max_new_tokens": config.max_new_tokens,
        "prompt": config.prompt or None,
        "quantize": config.quantize,
    }
    if config.name == FAKE:
        ref = ModelRef(
            path="", family=FAKE, sha256=_sha256(FAKE), settings_sha256=_sha256(""), spec=FAKE_SPEC, **settings
        )
    else:
        directory, revision = locate(config.name, config.revision, notify)
        adapter = directory if adapters.is_adapter(directory) else None
        if adapter is not None:
            directory = _base_of(adapter, notify)
        ref = _describe(directory, adapter, revision, settings, config.preprocess, notify)
        check_quantize(config, ref.family, adapter is not None)
    return dataclasses.replace(ref, spec=dataclasses.replace(ref.spec, preprocess=config.preprocess))


def locate(name: str, revision: str | None, notify: Callable[[str], None]) -> tuple[Path, str | None]:
    """Return the local directory of a model, and its commit where it is from the hub."""
    if not name.strip():
        raise ModelError("no model given; add --model starter|DIR|HUB_ID|URI")
    on_hub = is_hub_id(name)
    if revision is not None and not on_hub:
        raise ModelError(f"--revision {revision}: only hub ids have revisions, but --model is {name}; leave it out")
    if name == STARTER:
        return Path(captioner.starter.__file__).parent / "model", None
    if is_uri(name):
        from captioner.models.download import download_from_uri

        return download_from_uri(name, notify), None
    path = Path(local_path(name))
    if path.is_dir():
        return path, None
    if path.exists():
        raise ModelError(f"--model {name}: is a file; give the directory that holds config.json and the weights")
    if on_hub:
        from captioner.models.download import download_from_hub

        return download_from_hub(name, revision, notify)
    raise ModelError(
        f"--model {name}: no such directory; use starter, a model directory, a hub id (owner/name) or a URI"
    )


def is_hub_id(name: str) -> bool:
    """Return whether `name` has the form owner/name and is not a local path."""
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith((".", "~")) and not Path(local_path(name)).exists()


def ensure_local(ref: ModelRef) -> ModelRef:
    """Return `ref` with the model's directory on this machine, which may not be the machine that resolved it.

    Downloads the model if needed. Raises ModelError where that is not possible, or where the directory holds other
    weights or settings than `ref`.
    """
    local = find_local(ref)
    adapter = None if local.adapter is None else Path(local.adapter)
    if adapters.hashes(Path(local.path), adapter) != (ref.sha256, ref.settings_sha256):
        raise ModelError(
            f"{adapter or local.path}: not the files that the run started with; restore them, or start again"
        )
    return local


def find_local(ref: ModelRef) -> ModelRef:
    """Return `ensure_local` of `ref` without comparing the files, which takes long where weights are large."""
    path = Path(ref.adapter or ref.path)  # what ref.name means
    downloadable = ref.name == STARTER or ref.revision is not None or is_uri(ref.name)
    if not path.is_dir() and not downloadable:
        raise ModelError(
            f"{path}: not on machine {platform.node()}; put the model on a disk all machines share, or give a hub"
            " id or URI"
        )
    if ref.name == STARTER or not path.is_dir():
        path, _ = locate(ref.name, ref.revision, print)
    adapter = path if ref.adapter else None
    if adapter is not None:
        path = Path(ref.path) if Path(ref.path).is_dir() else _base_of(adapter, print)
    return dataclasses.replace(ref, path=str(path), adapter=None if adapter is None else str(adapter))


def _base_of(adapter: Path, notify: Callable[[str], None]) -> Path:
    """Return the directory of an adapter's base model. peft may write a revision beside a local directory too."""
    return adapters.locate_base(
        adapter, lambda name, of_hub: locate(name, of_hub if is_hub_id(name) else None, notify)[0]
    )


def _describe(
    directory: Path,
    adapter: Path | None,
    revision: str | None,
    settings: dict[str, Any],
    preprocess: str,
    notify: Callable[[str], None],
) -> ModelRef:
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ModelError(f"{directory}: no config.json; give the directory that save_pretrained wrote")
    config = weights.read_json(config_file)
    weights.check_not_quantised(config_file, config)
    weights.read_json(directory / "generation_config.json")  # where it cannot be read, transformers takes defaults
    family = _family(config_file, config, notify)
    max_positions = _max_positions(family, config)
    settings = settings | {"prompt": _prompt(directory, family, settings["prompt"])}
    _check_length(directory, max_positions, settings["max_new_tokens"])
    if not any((directory / name).is_file() for name in weights.VOCABULARY_FILES):
        raise ModelError(
            f"{directory}: no tokenizer ({', '.join(weights.VOCABULARY_FILES)}); save the model's processor or"
            " tokenizer there with save_pretrained"
        )
    for file in weights.weight_files(directory) + ([] if adapter is None else [adapter / adapters.WEIGHTS_FILE]):
        weights.check_header(file)
    sha256, settings_sha256 = adapters.hashes(directory, adapter)
    return ModelRef(
        path=str(directory),
        family=family,
        sha256=sha256,
        settings_sha256=settings_sha256,
        spec=_pixel_spec(directory, family, config, preprocess),
        max_positions=max_positions,
        revision=revision,
        training_run_id=_training_run_id(adapter or directory),
        adapter=None if adapter is None else str(adapter),
        **settings,
    )


def _family(config_file: Path, config: dict[str, Any], notify: Callable[[str], None]) -> str:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        from captioner.models.unlisted import why_unsupported  # imports transformers

        reason = why_unsupported(config_file.parent, config)
        if reason is not None:
            raise ModelError(
                f"{config_file}: model_type {model_type!r} is not supported: {reason}; supported: {', '.join(FAMILIES)}"
            )
        notify(f"model_type {model_type} is not tested; used through its chat template")
    vision = config.get("vision_config")
    if model_type == "florence2" and isinstance(vision, dict) and vision.get("model_type") == "davit":
        raise ModelError(
            f"{config_file}: a Florence-2 that needs the directory's own code, which is never run; use the same model"
            " from florence-community on the hub"
        )
    return str(model_type)


def _max_positions(family: str, config: dict[str, Any]) -> int | None:
    """Return the number of the decoder's text positions; None where its configuration does not limit them."""
    name = family_of(family).text
    section = config if name == "." else config.get(name)
    section = section if isinstance(section, dict) else {}
    positions = section.get("max_position_embeddings", section.get("n_positions"))
    return positions if isinstance(positions, int) else None


def _prompt(directory: Path, name: str, prompt: str | None) -> str | None:
    """Return the given prompt, or the default of a family that needs one."""
    family = family_of(name)
    if prompt is None:
        return family.default_prompt
    if family.prompt == "none":
        raise ModelError(f"--prompt {prompt!r}: {directory} is a {name} model, which takes no prompt")
    if family.prompt == "task" and prompt.startswith("<") and prompt not in family.tasks:
        raise ModelError(f"--prompt {prompt!r}: not a caption task of {name}; use {', '.join(family.tasks)}")
    return prompt


def _check_length(directory: Path, positions: int | None, limit: int) -> None:
    if positions is not None and limit >= positions:
        raise ModelError(
            f"--max-new-tokens {limit}: {directory} has {positions} text positions, one of them for the start token;"
            f" use {positions - 1} or fewer"
        )


def _pixel_spec(directory: Path, family: str, config: dict[str, Any], preprocess: str) -> PixelSpec:
    encoder = config.get("encoder" if family == "vision-encoder-decoder" else "vision_config")
    encoder = encoder if isinstance(encoder, dict) else {}
    vision = str(encoder.get("model_type")) if family == "vision-encoder-decoder" else ""
    spec = read_pixel_spec(directory, family, vision, preprocess)
    side = encoder.get("image_size")
    has_fixed_size = not spec.variable_size and vision != "swin" and isinstance(side, int)
    if has_fixed_size and (spec.height, spec.width) != (side, side):
        raise ModelError(
            f"{directory}: its image processor makes {spec.width}x{spec.height} pixels, its model wants"
            f" {side}x{side} (image_size in config.json); save the right processor into it"
        )
    return spec


def _training_run_id(directory: Path) -> str | None:
    record = weights.read_json(directory / "training_run.json")
    run_id = record.get("training_run_id", record.get("run_id"))
    return None if run_id is None else str(run_id)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
