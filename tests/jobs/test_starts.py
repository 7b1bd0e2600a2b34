"""Runs as they start on other people's machines: foreign modules beside them, no home, workers that die."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder
from ray_jobs.failures import first_error

ROOT = Path(__file__).parents[2]
UNNAMED_USER = "54321"  # without an entry in /etc/passwd
# Python reads sitecustomize.py at the start of every process, Ray's workers included.
DYING = """
import os, sys

class Dying:
    def find_spec(self, name, path=None, target=None):
        if name == "captioner.steps":
            HOW

if any("default_worker.py" in word for word in sys.orig_argv):
    sys.meta_path.insert(0, Dying())
"""


def captioner(
    *words: object, folder: Path, before: tuple[str, ...] = (), **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a folder, with a Ray of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "XDG_"))}
    environment |= {"PYTHONPATH": str(ROOT), **settings}
    command = [*before, sys.executable, "-P", "-m", "ray_jobs.cli", *map(str, words)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_modules_in_the_current_folder_are_not_imported(tmp_path: Path) -> None:
    images, here = make_folder(tmp_path / "images", 20, width=32), tmp_path / "here"
    here.mkdir()
    for module in ("numpy", "torch", "PIL", "pyarrow", "captioner"):
        (here / f"{module}.py").write_text("raise ImportError('a module of somebody else')")

    done = captioner("caption", images, "out", "--model", "starter", folder=here)

    assert done.returncode == 0, done.stderr
    assert verify(open_table(str(here / "out"))).proven


@pytest.mark.parametrize(
    ("how", "reason"),
    [("os.abort()", "its process crashed or was killed"), ("raise ImportError('no libfoo')", "no libfoo")],
)
def test_workers_that_die_at_their_start_end_the_run_with_the_reason(tmp_path: Path, how: str, reason: str) -> None:
    images = make_folder(tmp_path / "images", 20, width=32)
    (tmp_path / "sitecustomize.py").write_text(DYING.replace("HOW", how))

    done = captioner(
        "caption", images, "out", "--model", "fake", folder=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"
    )

    assert done.returncode == 1
    assert done.stdout == ""
    (error,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert reason in error


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root, who can be anybody")
def test_a_user_without_name_and_home(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", 20, width=32)
    out = tmp_path / "out"
    out.mkdir()
    os.chown(out, int(UNNAMED_USER), int(UNNAMED_USER))
    # Reading everywhere: Python itself may be installed below the home directory of root.
    reading = ("--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search")
    nobody = ("setpriv", "--reuid", UNNAMED_USER, "--regid", UNNAMED_USER, "--clear-groups", *reading, "--")
    nobody = ("env", "-u", "USER", "-u", "LOGNAME", "-u", "USERNAME", "-u", "LNAME", *nobody)

    done = captioner("caption", images, out, "--model", "fake", folder=tmp_path, before=nobody, HOME="/nonexistent")

    assert done.returncode == 0, done.stderr
    assert verify(open_table(str(out))).proven


def test_the_error_that_is_shown_is_the_first_that_is_not_rays_own() -> None:
    text = (
        "ray.exceptions.RaySystemError: System error: x\nTraceback\n  File\nImportError: no libfoo\nKeyError: 'later'"
    )

    assert first_error(text) == "ImportError: no libfoo"
    assert first_error("ray.exceptions.RaySystemError: System error: x\n") == "RaySystemError: System error: x"
    assert first_error("nothing that is an error") == ""
