"""What every command line shares. References: the words that are known; argparse's exit code of wrong usage, 2."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlxdiff import __version__, console, dialects, store
from mlxdiff.__main__ import main
from mlxdiff.console import Parser, install
from mlxdiff.errors import Error, did_you_mean, near
from mlxdiff.request import Request
from tests.test_imports import ROOT


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("eulr", ["ddim", "euler"], "euler"),
        ("SDXL", ["sd15", "sdxl"], "sdxl"),
        ("dpm++ 2m", ["DPM++ 2M", "euler"], "DPM++ 2M"),
        ("lighthouse", ["convert", "generate"], ""),
        ("", ["euler"], ""),
    ],
)
def test_the_nearest_word_whatever_its_case(word, known, meant):
    assert near(word, known) == meant
    assert did_you_mean(word, known) == (f"Did you mean {meant}? " if meant else "")


def typed(*words: str) -> Parser:
    p = Parser(prog="prog")
    p.add_argument("--steps", type=int)
    p.add_argument("-q", "--quantize", type=int)
    below = p.add_subparsers().add_parser("draw")
    below.add_argument("--seed", type=int)
    return p.parse_args(words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--stpes"], "prog: There is no flag --stpes. Did you mean --steps? See prog --help."),
        (["--stpes=3"], "prog: There is no flag --stpes. Did you mean --steps? See prog --help."),
        (["--STEPS"], "prog: There is no flag --STEPS. Did you mean --steps? See prog --help."),
        (["--step=3"], "prog: There is no flag --step. Did you mean --steps? See prog --help."),  # not taken for it
        (["--colour"], "prog: There is no flag --colour. See prog --help."),
        (["draw", "--sede", "3"], "prog draw: There is no flag --sede. Did you mean --seed? See prog draw --help."),
        (
            ["--num-inference-steps=3"],
            "prog: There is no flag --num-inference-steps. Did you mean --steps? See prog --help.",
        ),
        (["--quan"], "prog: There is no flag --quan. Did you mean --quantize? See prog --help."),
        (["--guidance-scale"], "prog: There is no flag --guidance-scale. See prog --help."),  # it has no --guidance
        (["--device"], "prog: There is no flag --device. Leave it out: MLX chooses the device. See prog --help."),
        (["--size"], "prog: There is no flag --size. Give -W and -H. See prog --help."),
        (["draw", "more"], "prog draw: 'more' is not expected here. See prog draw --help."),
    ],
)
def test_a_misspelt_flag_is_one_line_that_names_the_nearest(capsys, words, says):
    with pytest.raises(SystemExit) as e:
        typed(*words)
    assert e.value.code == 2
    assert capsys.readouterr().err == says + "\n"


@pytest.mark.parametrize("message", ["It cannot be", "It cannot be.", "Can it be?"])
def test_wrong_usage_ends_with_one_stop(capsys, message):
    with pytest.raises(SystemExit):
        Parser(prog="prog").error(message)
    stop = "" if message.endswith("?") else "."
    assert capsys.readouterr().err == f"prog: {message.rstrip('.')}{stop} See prog --help.\n"


def test_flags_that_are_known_are_taken():
    assert vars(typed("--steps", "3", "-q4")) == {"steps": 3, "quantize": 4}
    assert typed("draw", "--seed", "5").seed == 5


def test_misspelt_names_of_settings_are_met_with_the_nearest():
    with pytest.raises(Error, match=r"no sampler 'eulr'\. Did you mean euler\? Use one of euler, "):
        dialects.sampler("eulr")
    with pytest.raises(Error, match=r"Did you mean DPM\+\+ 2M SDE\? Use one of euler, "):
        dialects.sampler("dpm++ 2m sd")
    with pytest.raises(Error, match=r"'SDXL'\. Did you mean sdxl\? Give a name that `mlxdiff models` "):
        store.check_name("SDXL")
    with pytest.raises(Error, match=r"Did you mean flux2-klein, flux2-klein-9b or flux2-klein-base\? Give a name "):
        store.check_name("flux3-klein")  # three at most: the whole list is a command of its own
    full = Request("x", seed=1, steps=1, guidance=1.0, width=8, height=8, sampler="euler", clip_skip=1)
    with pytest.raises(Error, match=r"'Karas' is not known\. Did you mean karras\? Use one of leading, "):
        Request(**vars(full) | {"schedule": "Karas"}).check(8)


def test_in_a_checkout_the_checkout_is_installed_once_more():
    assert install("studio") == f'pip install -e "{ROOT}[studio]"'


def test_elsewhere_what_was_installed_is_named(tmp_path, monkeypatch):
    """Reference: the file in which pip notes where a package came from (PEP 610)."""
    monkeypatch.setattr(console, "__file__", str(tmp_path / "site-packages" / "mlxdiff" / "console.py"))
    folder, wheel = tmp_path / "my code", tmp_path / "mlxdiff-0.1.0-py3-none-any.whl"
    folder.mkdir()
    wheel.touch()
    noted = {}

    def distribution(name: str) -> SimpleNamespace:
        if noted is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return SimpleNamespace(read_text=lambda file: json.dumps(noted) if noted else None)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert install("studio") == 'pip install "mlxdiff[studio]"'
    for file in (folder, wheel):
        noted = {"url": file.as_uri(), "dir_info": {}}
        assert install("studio") == f'pip install "{file}[studio]"'
    noted = {"url": (tmp_path / "gone").as_uri(), "dir_info": {}}
    assert install("studio") == 'pip install "mlxdiff[studio]"'
    noted = {"url": "https://example.org/mlxdiff", "vcs_info": {"vcs": "git", "commit_id": "0"}}
    assert install("studio") == 'pip install "mlxdiff[studio] @ git+https://example.org/mlxdiff"'
    noted = None
    assert install("studio") == 'pip install "mlxdiff[studio]"'


@pytest.mark.parametrize("kind", ["closed", "full"])
@pytest.mark.parametrize("words", [[], ["--version"], ["help"], ["generate", "--help"], ["models", "-h"]])
def test_a_text_that_cannot_be_written_is_no_traceback(kind, words, capsys, monkeypatch):
    """Standard output is a pipe that nobody reads, as in `mlxdiff --help | true`, or on a full disk. Python, which
    writes at exit what is left, has nothing to say either."""
    if kind == "full" and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    reader, handle = os.pipe()
    os.close(reader)
    if kind == "full":
        os.close(handle)
        handle = os.open("/dev/full", os.O_WRONLY)
    with open(handle, "w") as out:  # closing it is what Python does at exit
        monkeypatch.setattr(sys, "stdout", out)
        try:
            code = main(words)
        except SystemExit as e:  # as argparse ends
            code = e.code
    assert code == 1
    full = "Standard output cannot be written: No space left on device. Lead it to another place.\n"
    assert capsys.readouterr().err.partition(": ")[2] == (full if kind == "full" else "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_process_lets_it_tidy_up(number, monkeypatch):
    before, tidied = signal.signal(number, signal.SIG_DFL), []

    def body():
        try:
            return console.run("inner", lambda: signal.raise_signal(number))
        finally:
            tidied.append(signal.getsignal(number))

    try:
        with pytest.raises(SystemExit) as ended:
            console.run("outer", body)
        assert ended.value.code == 128 + number
        assert tidied == [signal.SIG_DFL]  # a second one need not wait
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)  # by nohup
        assert console.run("outer", lambda: signal.raise_signal(number) or 0) == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_help_in_a_locale_without_its_letters(capsys, monkeypatch):
    with open(os.devnull, "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as ended:
            main(["score", "--help"])
    assert ended.value.code == 0


_COMMANDS = (
    "generate x",
    "convert x",
    "train storybook -o x",
    "score x",
    "upscale x",
    "detect x canny",
    "bench",
    "tune",
)


@pytest.mark.parametrize("words", [*(f"mlxdiff.{command}".split() for command in _COMMANDS), ["mlxdiff", "models"]])
def test_ctrl_c_while_modules_load_is_quiet(tmp_path, words):
    """numpy is the one that takes long, here: it sends what Ctrl-C sends, and then loads on for a minute."""
    (tmp_path / "numpy.py").write_text("import os, time; os.kill(os.getpid(), 2); time.sleep(60)")
    assert python(tmp_path, "-m", *words) == (console.INTERRUPTED, "", "")


def test_ctrl_c_while_a_command_that_is_done_leaves_is_quiet(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import atexit, os; atexit.register(os.kill, os.getpid(), 2)")
    assert python(tmp_path, "-m", "mlxdiff", "--version") == (console.INTERRUPTED, f"mlxdiff {__version__}\n", "")


def test_a_program_that_uses_mlxdiff_keeps_its_own_ctrl_c(tmp_path):
    """Also one that calls a command, and within a command it is heard as usual."""
    (tmp_path / "own.py").write_text(
        "from signal import SIGINT, default_int_handler, getsignal, raise_signal\n"
        "from mlxdiff import console\n"
        "from mlxdiff.__main__ import main\n"
        "main(['--version'])\n"
        "assert console.run('a', lambda: raise_signal(SIGINT)) == 130\n"
        "assert getsignal(SIGINT) is default_int_handler\n"
    )
    code, _, err = python(tmp_path, "-m", "own")
    assert (code, err) == (0, "a: stopped.\n")


def python(first: Path, *words: str) -> tuple[int, str, str]:
    """How a process ends, and what it says. first: a folder from which modules are loaded before all others."""
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731 (background jobs ignore it)
    env = os.environ | {"PYTHONPATH": f"{first}{os.pathsep}{ROOT}"}
    told = {"capture_output": True, "text": True, "timeout": 50, "env": env, "cwd": first, "preexec_fn": heard}
    made = subprocess.run([sys.executable, *words], **told)
    return made.returncode, made.stdout, made.stderr
