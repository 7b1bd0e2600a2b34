"""The table and the JSON file that `benchmarks.gpu` writes: machine, steps, figures beside what is aimed at."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# What is aimed at on an H100 with the git-base shape.
TARGETS = {
    ("engine", "greedy_vs_generate"): ">= 6",
    ("engine", "greedy_ms"): "<= 42",
    ("engine", "beam3_vs_generate"): ">= 8",
    ("engine", "beam3_ms"): "<= 65",
    ("engine", "encode_teraflops"): ">= 470",
    ("engine", "caption_of_engine"): ">= 0.95",
    ("job", "of_engine"): ">= 0.9",
    ("job", "first_image_seconds"): "<= 18",
    ("hf_loader", "ours_over_it"): ">= 6",
    ("families", "smolvlm_ratio"): ">= 2",
    ("families", "qwen2_5_vl_ratio"): ">= 2",
    ("families", "smolvlm_waiting"): "<= 0.05",
    ("families", "qwen2_5_vl_waiting"): "<= 0.05",
    ("train_job", "first_step_seconds"): "<= 25",
    ("train_job", "of_step"): ">= 0.9",
    **{("train_step", f"ratio: {kind}: samples_per_second"): ">= 3" for kind in ("fp16", "bf16")},
    **{("train_step", f"ratio: {kind}: peak_memory_gb"): "<= 0.4" for kind in ("fp16", "bf16")},
}


def write_results(options: argparse.Namespace, machine: dict[str, str], results: dict[str, dict[str, Any]]) -> None:
    figures = {name: flat(result.get("figures", {})) for name, result in results.items()}
    ratios = compare_steps(figures)
    figures = {name: measured | ratios.get(name, {}) for name, measured in figures.items()}
    record = {"form": options.form, "machine": machine, "steps": results, "ratios": ratios}
    (options.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "gpu.md").write_text(table(options.form, machine, results, figures))


def compare_steps(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Ratios of figures of different steps, where both were measured."""
    rates = {name: measured.get("images_per_second") for name, measured in figures.items()}
    rates["engine"] = figures.get("engine", {}).get("greedy_images_per_second")
    rates["train_job"] = figures.get("train_job", {}).get("samples_per_second")
    rates["step"] = figures.get("train_step", {}).get("ours: bf16: samples_per_second")
    ratios: dict[str, dict[str, float]] = {}
    for step, label, upper, lower in (
        ("job", "of_engine", "job", "engine"),
        ("two_workers", "of_engine", "two_workers", "engine"),
        ("hf_loader", "ours_over_it", "job", "hf_loader"),
        ("ray_naive", "ours_over_it", "job", "ray_naive"),
        ("train_job", "of_step", "train_job", "step"),
    ):
        above, below = rates.get(upper), rates.get(lower)
        if above and below:
            ratios[step] = {label: round(above / below, 3)}
    return ratios


def flat(figures: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Figures with the names of the objects that they are in."""
    flattened: dict[str, Any] = {}
    for name, value in figures.items():
        flattened |= flat(value, f"{prefix}{name}: ") if isinstance(value, dict) else {prefix + name: value}
    return flattened


def table(
    form: str, machine: dict[str, str], results: dict[str, dict[str, Any]], figures: dict[str, dict[str, Any]]
) -> str:
    """The results as Markdown."""
    lines = [f"# benchmarks/gpu.sh, {form}", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += [summary(name, result) for name, result in results.items()]
    lines += ["", "| step | figure | value | target |", "|---|---|---|---|"]
    for step, measured in figures.items():
        for name, value in measured.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(f"| {step} | {name} | {shown} | {TARGETS.get((step, name), '')} |")
    return "\n".join(lines) + "\n"


def summary(name: str, result: dict[str, Any]) -> str:
    seconds = f"{result['seconds']:.1f} s" if "seconds" in result else "-"
    return f"- {name:<15}{result['status']:<22}{seconds:>8}  {result.get('message', '')}".rstrip()


def describe_machine() -> dict[str, str]:
    machine = {"date": datetime.now(UTC).date().isoformat(), "card, driver, memory": "; ".join(nvidia_smi()) or "none"}
    machine |= {"CPUs": str(available_cpus()), "python": platform.python_version()}
    for package in ("captioner", "torch", "transformers", "ray", "pyarrow", "pillow"):
        try:
            machine[package] = version(package)
        except PackageNotFoundError:
            machine[package] = "not installed"
    return machine


def nvidia_smi() -> list[str]:
    """Name, driver and memory of each card that CUDA_VISIBLE_DEVICES leaves visible; [] where there is none.

    A part of a card (MIG) counts as a card, and has its id alone.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index,uuid,name,driver_version,memory.total", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:  # a driver that cannot be reached is said on standard output
        return []
    cards = [line.split(", ", 2) for line in result.stdout.splitlines()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [card for _, _, card in cards]
    ids = [each.strip() for each in visible.split(",") if each.strip()]
    parts = [each for each in ids if each.startswith("MIG-")]
    return parts + [card for index, uuid, card in cards if any(index == each or uuid.startswith(each) for each in ids)]


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
