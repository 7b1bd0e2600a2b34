"""Settings: a YAML file overlaid with flags, and one line for what is wrong with either."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from pydantic import ValidationError

from captioner.config import (
    CaptionConfig,
    CheckTableConfig,
    ExportTextsConfig,
    MakeAltTextConfig,
    Settings,
    TrainConfig,
    command_line,
    load_config,
    settings_of,
)
from captioner.errors import UsageError


def load(tmp_path: Path, yaml: str, flags: dict[str, dict[str, object]] | None = None) -> CaptionConfig:
    file = tmp_path / "run.yaml"
    file.write_text(yaml, encoding="utf-8")
    return load_config(CaptionConfig, str(file), flags or {})


def test_without_file_and_flags_everything_has_its_default() -> None:
    assert load_config(CaptionConfig, None, {}) == CaptionConfig()


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    yaml = "model:\n  name: from-file\n  num_beams: 3\nsource:\n  include: ['*.jpg']\n"

    config = load(tmp_path, yaml, {"model": {"name": "from-flag"}})

    assert config.model.name == "from-flag"
    assert config.model.num_beams == 3
    assert config.source.include == ["*.jpg"]
    assert config.model.max_new_tokens == CaptionConfig().model.max_new_tokens


@pytest.mark.parametrize("yaml", ["", "# nothing\n", "model:\n  # name: x\n", "source: {}\n"])
def test_a_file_may_be_empty_or_commented_out(tmp_path: Path, yaml: str) -> None:
    assert load(tmp_path, yaml) == CaptionConfig()


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("modle:\n  name: x\n", "unknown key 'modle'; did you mean 'model'?"),
        ("model:\n  nmae: x\n", "unknown key 'model.nmae'; did you mean 'model.name'?"),
        ("batch_size: 8\n", "unknown key 'batch_size'; did you mean 'model.batch_size'?"),
        ("source:\n  rows_per_file: 8\n", "unknown key 'source.rows_per_file'; did you mean 'output.rows_per_file'?"),
        ("weather: mild\n", "unknown key 'weather'; known keys: source, model, cluster, output"),
        ("1: 2\n", "unknown key '1'; known keys: source, model, cluster, output"),
        ("model: starter\n", "'model' holds 'starter', but must hold keys: name, revision, "),
        (
            "model:\n  dtype: float8\n",
            "model.dtype is 'float8', but should be 'auto', 'float32', 'bfloat16' or 'float16'",
        ),
        ("model:\n  batch_size: [8]\n", "model.batch_size is [8], but should be a valid integer or 'auto'"),
        ("model:\n  batch_size: 0\n", "model.batch_size is 0, but should be greater than or equal to 1 or 'auto'"),
        ("cluster:\n  num_workers: true\n", "cluster.num_workers is 'true', but should be a number, auto, or MIN:MAX"),
        ("source:\n  limit: no\n", "source.limit is 'false', but should be a valid integer"),
        ("output:\n  max_failed: 1.5\n", "output.max_failed is 1.5, but should be less than or equal to 1"),
        (
            "cluster:\n  gpus_per_worker: 1.5\n",
            "cluster.gpus_per_worker is 1.5, but should be a whole number",
        ),
        ("cluster:\n  gpus_per_worker: .inf\n", "cluster.gpus_per_worker is inf, but should be a finite number"),
        ("source:\n  include: '*.jpg'\n", "source.include is '*.jpg', but should be a valid list"),
        ("- a\n", "must hold keys at the top level, not a list"),
        ("a: [\n", "cannot be read as YAML"),
        ("model: {name: a}\nsource: {}\nmodel: {seed: 1}\n", "the key 'model' occurs twice, in lines 1 and 3"),
        ("model:\n  name: a\n  'name': b\n", "the key 'name' occurs twice, in lines 2 and 3"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_file_key_and_value(tmp_path: Path, yaml: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, yaml)

    assert str(caught.value).startswith(f"--config {tmp_path / 'run.yaml'}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_merged_key_may_be_given_again(tmp_path: Path) -> None:
    yaml = "model: &base {name: a, seed: 1}\ncheck:\n  seed: 3\n"

    config = load(tmp_path, yaml.replace("check:", "check:\n  <<: {seed: 2, sample: 7}"))

    assert (config.model.seed, config.check.seed, config.check.sample) == (1, 3, 7)


@pytest.mark.parametrize("kind", [CaptionConfig, TrainConfig, CheckTableConfig, MakeAltTextConfig, ExportTextsConfig])
def test_only_settings_that_are_on_or_off_take_true(kind: type[Settings]) -> None:
    taken = []
    for setting in settings_of(kind):
        with contextlib.suppress(ValidationError):
            kind.model_validate({setting.group: {setting.field: True}})
            taken.append(setting)

    assert taken == [setting for setting in settings_of(kind) if setting.info.annotation is bool]


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match=r"--config nowhere.yaml: no such file"):
        load_config(CaptionConfig, "nowhere.yaml", {})


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(UsageError, match="cannot be read as YAML"):
        load_config(CaptionConfig, str(tmp_path / "run.yaml"), {})


def test_a_wrong_flag_is_told_as_a_flag_even_beside_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, "model:\n  name: x\n", {"model": {"batch_size": "many"}})

    assert str(caught.value) == "--batch-size 'many': should be a valid integer or 'auto'"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        CaptionConfig().model.name = "other"  # type: ignore[misc]


def test_every_setting_is_described_and_no_flag_has_two_meanings() -> None:
    settings = list(settings_of(CaptionConfig))
    flags = [setting.flag for setting in settings if not setting.argument]

    assert [setting.field for setting in settings if not setting.info.description] == []
    assert len(flags) == len(set(flags))
    assert [setting.argument for setting in settings if setting.argument] == ["SOURCE", "OUT"]


def test_comma_lists_may_be_text_or_lists(tmp_path: Path) -> None:
    as_text = load(tmp_path, "source:\n  keep_columns: a, b\n")
    as_list = load(tmp_path, "source:\n  keep_columns: [a, b]\n")

    assert as_text.source.keep_columns == as_list.source.keep_columns == ["a", "b"]


def test_command_line_of_the_defaults_has_no_flags() -> None:
    assert command_line(CaptionConfig()) == ["", ""]


@pytest.mark.parametrize("value", ["x", "0", "-1", "8:1", "0:4", "1:2:3", "1:", 1.5])
def test_a_pool_of_workers_is_explained_in_one_line(value: object) -> None:
    with pytest.raises(UsageError, match=r"a number, auto, or MIN:MAX with 1 <= MIN <= MAX$|a valid"):
        load_config(CaptionConfig, None, {"cluster": {"num_workers": value}})


@pytest.mark.parametrize(("value", "size"), [("auto", "auto"), ("4", 4), (4, 4), ("1:8", "1:8"), ("3:3", "3:3")])
def test_a_pool_of_workers_is_a_number_or_a_range(value: object, size: object) -> None:
    assert load_config(CaptionConfig, None, {"cluster": {"num_workers": value}}).cluster.num_workers == size
