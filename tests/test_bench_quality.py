"""`bench --quality`, `--report` and `--table`. References: the built-in model's pictures, drawn again one by one; texts
that would format a page, which must not."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mlxdiff
from mlxdiff.bench import __main__ as bench
from mlxdiff.bench import machine, quality, report
from mlxdiff.bench.quality import Setting
from mlxdiff.errors import Error
from mlxdiff.score import measure
from mlxdiff.train import judge
from mlxdiff.train.measure import SEED, scenes
from tests.usage import refused

ROOT = Path(__file__).parent.parent
KNOWN = ["euler", "heun", "dpmpp_2m", "ddim"]


# ---- quality


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict:
    """Two prompts of the built-in model at few pixels, once in two steps and once in one."""
    out, patch = io.StringIO(), pytest.MonkeyPatch()
    patch.setenv("MLXDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setattr("sys.stdout", out)
    typed = ["--quality", "--over", "steps=1,2", "--prompts", "2", "-W", "64", "-H", "64", "--json"]
    code = bench.main(typed)
    patch.undo()
    assert code == 0
    return json.loads(out.getvalue())


def test_the_slowest_is_first_and_the_distance_to_it_is_that_of_the_pictures(facts):
    first, second = facts["rows"]
    assert (first["steps"], second["steps"]) == (2, 1)
    assert first["db"] is None
    pipe, how = mlxdiff.load("storybook"), {"width": 64, "height": 64, "sampler": first["sampler"]}
    drawn = {
        steps: np.stack(
            [np.asarray(pipe(p, seed=SEED + k, steps=steps, **how).image) for k, p in enumerate(facts["prompts"])]
        )
        for steps in (1, 2)
    }
    off = np.square(drawn[1].astype(float) - drawn[2]).mean()
    assert second["db"] == pytest.approx(10 * np.log10(255**2 / off), abs=1e-3)
    small = [np.stack([measure.for_judge(quality.Image.fromarray(x)) for x in drawn[steps]]) for steps in (2, 1)]
    right = [judge.read(judge.load(judge.shipped()), x) == judge.labels(scenes(2)) for x in small]
    for row, seen in zip(facts["rows"], right, strict=True):
        assert row["score"]["value"] == pytest.approx(100 * seen.mean())
    assert first["below"]["value"] == 0
    assert all(row["seconds"]["median"] > 0 and row["peak_bytes"] > 10**6 for row in facts["rows"])


def test_the_table_has_every_row(facts):
    text = quality.table(facts)
    assert len([line for line in text.splitlines() if "dpmpp_2m" in line]) == 2
    assert "2 prompts are few" in text
    assert "--prompts 100" in text
    assert text.count("  *") == 1
    assert max(map(len, text.splitlines())) <= 120
    bare = facts | {"score": None, "fastest_as_good": None, "rows": [r | {"score": None} for r in facts["rows"]]}
    assert "CLIP is not here" in quality.table(bare)


def test_by_default_each_setting_changes_alone_and_the_slowest_is_first():
    todo = quality.settings(15, "dpmpp_2m", KNOWN, bits=(8, 4))
    assert todo[0] == Setting(30, "dpmpp_2m", None)
    base = Setting(15, "dpmpp_2m", None)
    assert base in todo
    assert all(sum(a != b for a, b in zip(setting, base, strict=True)) <= 1 for setting in todo)
    assert {s.steps for s in todo} == {30, 15, 8, 4}
    assert {s.sampler for s in todo} == {"dpmpp_2m", "euler"}
    assert {s.bits for s in todo} == {None, 8, 4}
    assert quality.settings(1, "euler", ["euler"])[0].steps == 2  # a model of one step


def test_over_gives_all_combinations():
    todo = quality.settings(15, "ddim", KNOWN, ["steps=4,8", "bits=none,4", "sampler=heun,ddim"])
    assert len(todo) == len(set(todo)) == 8
    assert todo[0] == Setting(8, "heun", None)  # which calls the network twice a step
    assert todo[1:3] == [Setting(8, "heun", 4), Setting(8, "ddim", None)]


def test_reused_steps_are_compared_with_all_of_them():
    todo = quality.settings(15, "ddim", KNOWN, ["reuse=0.1,0,0.3"])
    assert todo == [Setting(15, "ddim", None, reuse) for reuse in (0.0, 0.1, 0.3)]
    for over, why in ((["reuse=2"], "from 0 to 1; '2'"), (["reuse=nan"], "from 0 to 1"), (["reuse=a"], "from 0 to 1")):
        with pytest.raises(Error, match=why):
            quality.settings(15, "ddim", KNOWN, over)
    with pytest.raises(Error, match="heun computes some steps twice"):
        quality.settings(15, "ddim", KNOWN, ["reuse=0,0.1", "sampler=heun"])


def test_the_part_of_the_steps_that_was_saved():
    """Reference: the same pictures, drawn one by one, and what each says of its steps."""
    pipe, question = mlxdiff.load("storybook"), quality.asked("storybook", "1")
    todo, size = [Setting(8, "dpmpp_2m", None, reuse) for reuse in (0.0, 1.0)], {"width": 64, "height": 64}
    rows = quality.compare(lambda bits: pipe, todo, question, quality.Scorer(question, None), lambda done: None, **size)
    saved = [pipe(question.prompts[0], seed=SEED, steps=8, reuse=reuse, **size).reused / 8 for reuse in (0.0, 1.0)]
    assert saved[1] > saved[0] == 0
    assert [row["reused"] for row in rows] == saved


def test_the_fastest_that_is_as_good():
    def row(low, seconds):
        return {"below": {"low": low}, "seconds": {"median": seconds}}

    assert quality.fastest_as_good([row(0, 3), row(-1, 2), row(0.1, 1)]) == 1  # the last is measurably worse
    assert quality.fastest_as_good([{"below": None}]) is None


def test_every_model_is_asked_for_something(tmp_path):
    assert quality.asked("sdxl", None).prompts == list(quality.PROMPTS)
    file = tmp_path / "prompts.txt"
    file.write_text("a red house at night\n\n  a dog\n")
    found = quality.asked("storybook", str(file))
    assert found.prompts == ["a red house at night", "a dog"]
    assert found.labels[1].tolist() == [-1] * 6
    assert quality.asked("storybook", "3").labels.min() >= 0


# ---- what users send


@pytest.fixture(scope="module")
def sent(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("sent") / "new" / "report.json"
    patch = pytest.MonkeyPatch()
    patch.setenv("MLX_MAX_OPS_PER_BUFFER", "40")
    patch.setenv("USER", "somebody")
    patch.setenv("MLXDIFF_CACHE", str(file.parent.parent / "cache"))  # where nothing was tuned
    typed = ["--steps", "1", "--repeat", "1", "-W", "64", "-H", "64", "--report", str(file), "--note", "a shared | one"]
    code = bench.main(typed)
    patch.undo()
    assert code == 0
    return file


def test_a_report_holds_the_figures_and_nothing_personal(sent):
    made = report.read(sent)
    assert (made.model, made.width, made.steps, made.batch) == ("storybook", 64, 1, 2)
    assert 0 < made.seconds_per_step <= made.seconds
    assert made.peak_bytes > 10**6
    assert made.tuning == ("MLX_MAX_OPS_PER_BUFFER=40",)
    text = sent.read_text()
    for word in ("somebody", os.uname().nodename, str(Path.home()), str(ROOT), str(sent.parent)):
        assert word not in text or len(word) < 3, word
    assert [p.name for p in sent.parent.iterdir()] == [sent.name]


def test_the_choices_of_tune_are_sent(monkeypatch):
    monkeypatch.setattr(machine.ways, "_measured", {"unfold": {(512, 4096): True}, "wider": {(72,): False}})
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    assert machine.facts()["tuning"] == {"unfold": "on", "wider": "off", "MLX_ENABLE_TF32": "0"}


def test_what_is_pasted_is_a_row_and_the_same_json(sent):
    made = report.read(sent)
    text = report.pasted(made)
    assert json.loads(text.partition("```json")[2].partition("```")[0]) == json.loads(sent.read_text())
    (row,) = (line for line in text.splitlines() if "storybook" in line and line.startswith("|"))
    assert "a shared \\| one" in row
    assert row.replace("\\|", "").count("|") == len(report.HEAD) + 1


def test_no_report_is_overwritten(sent, capsys):
    before = sent.read_bytes()
    assert bench.main(["--report", str(sent)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert sent.read_bytes() == before


@pytest.mark.parametrize(
    ("asked", "random", "public"),
    [
        ("sdxl", False, "sdxl"),
        ("sdxl", True, "sdxl (random weights)"),
        ("some-org/some-repo", False, "some-org/some-repo"),
        ("{tmp}/anna/private.safetensors", False, "a model of sd1"),
    ],
)
def test_the_name_of_a_file_is_its_owner_s(asked, random, public, tmp_path):
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "private.safetensors").write_bytes(b"")
    assert report.public_name(asked.format(tmp=tmp_path), "sd1", random) == public


def test_the_commit_is_known_in_a_checkout_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    assert machine.commit() is None
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / ".git").mkdir()
    assert machine.commit() is None  # of no repository


# ---- tables of files from anywhere


def test_a_table_puts_macs_first_and_says_if_there_are_none(sent):
    made = report.read(sent)
    mac = replace(made, system="macOS 15.5", chip="Apple M3")
    text = report.table([made, mac])
    assert text.splitlines()[2].startswith("| Apple M3, ")
    assert "No figures of a Mac" not in text
    assert report.table([made]).endswith("writes them.")
    assert "No figures of a Mac" in report.table([])


HOSTILE = (
    "<img src=x onerror=alert(1)>", "[a](http://b.example)", "![a](b)", "@someone", "a | b", "`x`", "**b**", "# h",
    "www.b.example", "http://b.example", "a&lt;b", "\\", "~~x~~", "user@b.example",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_formats_no_page(sent, text):
    """Read back by the rules of Markdown: what is escaped, and the entities, give the text itself; nothing else in it
    has a meaning."""
    import html
    import re

    made = report.escaped(text)
    assert html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", made)) == html.unescape(text) or "&" in text
    rest = re.sub(r"\\.|&#\d+;", "", made)
    assert not set(rest) & set("`*_{}[]<>()#!|~&@\\")
    assert "://" not in rest
    assert "www." not in rest
    row = report.table([replace(report.read(sent), chip=text)]).splitlines()[2]
    assert re.sub(r"\\.", "", row).count("|") == len(report.HEAD) + 1


BAD = {
    "another format": {"format": 2},
    "a format that is true": {"format": True},
    "a number as text": {"seconds": "3"},
    "no number": {"seconds": float("nan")},
    "endless": {"seconds": float("inf")},
    "negative": {"steps": -1},
    "zero": {"width": 0},
    "too large": {"memory_bytes": 2**60},
    "true for a number": {"steps": True},
    "a long text": {"chip": "x" * 81},
    "control characters": {"chip": "\x1b[31m"},
    "two lines": {"note": "a\nb"},
    "no such bits": {"bits": 7},
    "a list for text": {"chip": ["x"]},
    "much tuning": {"tuning": ["x"] * 21},
    "an unknown field": {"host": "x"},
    "a device of elsewhere": {"device": "tpu"},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_report_is_refused_in_one_line(name, sent, tmp_path, capsys):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(json.loads(sent.read_text()) | BAD[name]))
    assert bench.main(["--table", str(sent), str(file)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "bad.json" in err
    assert "\x1b" not in err


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"format": 1}', "\0"])
def test_what_is_no_report_is_refused(text, tmp_path, capsys):
    file = tmp_path / "bad.json"
    file.write_text(text)
    assert bench.main(["--table", str(file)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_readme_s_table_is_made_of_the_reports_here(capsys):
    """As its comment says: by `mlxdiff bench --table tests/data/reports/*.json`."""
    files = sorted((ROOT / "tests" / "data" / "reports").glob("*.json"))
    assert bench.main(["--table", *map(str, files)]) == 0
    made = capsys.readouterr().out.strip()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.partition("<!-- bench: begin -->\n")[2].partition("\n<!-- bench: end -->")[0] == made


# ---- what is typed

TYPED = {
    "steps with quality": (["--quality", "--steps", "3"], "--over steps=4,8"),
    "batch with a report": (["--report", "--against", "torch"], "--against"),
    "over alone": (["--over", "steps=1"], "--quality"),
    "note alone": (["--note", "x"], "--report"),
    "a long note": (["--report", "--note", "x" * 81], "--note"),
    "nothing to vary": (["--quality", "--over", "seed=1"], "'seed=1' cannot be varied"),
    "twice": (["--quality", "--over", "steps=1", "steps=2"], "given twice"),
    "no steps": (["--quality", "--over", "steps=0"], "Steps must be a whole number"),
    "no such sampler": (["--quality", "--over", "sampler=eulr"], "Did you mean euler?"),
    "no such bits": (["--quality", "--over", "bits=7"], "no quantization '7'"),
    "no prompts": (["--quality", "--prompts", "0"], "--prompts FILE"),
    "too many prompts of its own": (["--quality", "sdxl", "--prompts", "9"], "1 to 8 prompts"),
    "prompts absent": (["--quality", "--prompts", "absent.txt"], "absent.txt"),
    "no such model": (["--quality", "storybok"], "storybok"),
    "two things": (["--quality", "--table", "x"], "not allowed with"),
    "no table": (["--table", "absent.json"], "absent.json"),
}


@pytest.mark.parametrize("name", TYPED)
def test_bad_usage_is_one_line(name, capsys):
    typed, says = TYPED[name]
    err = refused(bench.main, typed, capsys)
    assert says in err


def test_too_many_settings():
    with pytest.raises(Error, match="more than 100"):
        quality.settings(1, "euler", KNOWN, ["steps=" + ",".join(map(str, range(1, 102)))])


def test_too_many_pictures_and_prompts_of_nothing(tmp_path, capsys):
    assert bench.main(["--quality", "--prompts", "1000"]) == 1
    assert "more than 2,000 pictures" in capsys.readouterr().err
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\n")
    assert bench.main(["--quality", "--prompts", str(file)]) == 1
    assert "No prompt has a word that the judge knows" in capsys.readouterr().err


def test_ctrl_c_while_drawing_is_one_line(monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(quality, "draw", stopped)
    assert bench.main(["--quality", "--prompts", "1"]) == 130
    assert capsys.readouterr().err == "mlxdiff bench: stopped.\n"
