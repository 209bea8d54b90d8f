"""Scores of pictures without CLIP. References: closed forms for the distances, renders whose words are known for the
judge, folders of hostile files. CLIP itself is tried in parity/test_score.py."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mlxdiff import images
from mlxdiff.errors import Error
from mlxdiff.request import Request
from mlxdiff.score import __main__ as command
from mlxdiff.score import distances, folder, measure, report
from mlxdiff.score.folder import BROKEN, LARGE, OTHER, Skipped
from mlxdiff.train import judge
from mlxdiff.train import storybook as sb
from mlxdiff.train.measure import renders, scenes
from tests.usage import refused

SETTINGS = {"steps": 4, "guidance": 4.0, "width": 128, "height": 128, "sampler": "ddim", "schedule": "leading"}
RNG = np.random.default_rng(0)


# ---- distances


@pytest.mark.parametrize("n", [5, 60])
def test_frechet_of_gaussians_is_the_closed_form(n):
    """Sets whose means and covariances are exact: 3 along one axis, and stretched 2, 1 and 1 times. n: fewer pictures
    than features, and more."""
    rng, d = np.random.default_rng(n), 8 if n < 8 else 3
    x = rng.standard_normal((n, d))
    x = x - x.mean(0)
    y = x * 2 + np.eye(d)[0] * 3
    # for covariances c and 4 c: tr(c + 4 c - 2 * 2 c) = tr c
    want = 9 + np.trace(np.cov(x.T))
    assert distances.frechet(x, y) == pytest.approx(want, rel=1e-9)
    assert distances.frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_of_covariances_that_do_not_commute():
    x, y = RNG.standard_normal((50, 4)) @ RNG.standard_normal((4, 4)), RNG.standard_normal((40, 4))
    product = np.linalg.eigvals(np.cov(x.T) @ np.cov(y.T))
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T)) - 2 * np.sqrt(product).sum()
    assert distances.frechet(x, y) == pytest.approx(want, rel=1e-9)


def test_cmmd_is_the_mean_of_its_kernels(monkeypatch):
    """Against the definition, pair by pair, in blocks that do not divide the sets."""
    monkeypatch.setattr(distances, "_BLOCK", 7)
    x, y = distances.unit(RNG.standard_normal((20, 5))), distances.unit(RNG.standard_normal((13, 5)))

    def kernel(a, b):
        return np.mean([np.exp(-np.square(u - v).sum() / 200) for u in a for v in b])

    want = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert distances.cmmd(x, y).value == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("distance", [distances.cmmd, distances.frechet_distance])
def test_chance_and_difference_are_told_apart(distance):
    """Of 20 pairs from one source, about 1 is above what chance gives; 5 or more would happen once in 400 tries.
    Pairs from two sources are above it."""

    def draw(seed, shift):
        return distances.unit(np.random.default_rng(seed).standard_normal((40, 6)) + shift)

    same = [distance(draw(s, 1), draw(s + 100, 1), seed=s) for s in range(20)]
    assert sum(d.value > d.chance for d in same) < 5
    other = [distance(draw(s, 1), draw(s + 100, 0), seed=s) for s in range(3)]
    assert all(d.value > d.chance and d.interval.low <= d.value <= d.interval.high for d in other)


def test_an_interval_holds_the_mean_as_often_as_it_says():
    """Means of 50 numbers, 100 times; a right 95 % interval misses at least 14 of 100 once in 10,000 tries."""
    hits = 0
    for seed in range(100):
        values = np.random.default_rng(seed).standard_normal(50)
        low, high = distances.mean_interval(values, np.arange(50), seed=seed)
        hits += low < 0 < high
    assert hits > 86


def test_of_cases_without_exception_a_part_may_be_exceptions():
    """The rule of three; a bootstrap alone would be sure."""
    assert distances.mean_interval(np.ones(12), np.arange(12), 1.0) == (0.75, 1.0)
    assert distances.mean_interval(np.zeros(60), np.arange(60), 100.0) == (0.0, 5.0)
    assert distances.mean_interval(np.ones(2), np.arange(2), 1.0) == (0.0, 1.0)
    assert distances.mean_interval(np.ones(12), np.arange(12)) == (1.0, 1.0)


def test_pictures_of_one_prompt_are_not_counted_as_independent():
    """Ten prompts, each picture twenty times: the interval is as wide as that of ten values."""
    values = np.random.default_rng(3).standard_normal(10)
    ten = distances.mean_interval(values, np.arange(10))
    many = distances.mean_interval(values.repeat(20), np.arange(10).repeat(20))
    alone = distances.mean_interval(values.repeat(20), np.arange(200))
    assert np.ptp(many) == pytest.approx(np.ptp(ten), rel=1e-9)
    assert np.ptp(alone) < 0.5 * np.ptp(many)


# ---- the judge, for the built-in model's pictures


def test_what_a_prompt_asks_for():
    assert judge.asked([sb.plain(s) for s in scenes(200)])[:, :5].min() >= 0
    rng, words = np.random.default_rng(1), [*judge.WORDS.values()]
    for scene in scenes(200):  # a caption leaves words out and never says a wrong one
        (row,), (truth,) = judge.asked([sb.caption(scene, rng)]), judge.labels([scene])
        assert all(a in (-1, b) for a, b in zip(row, truth, strict=True))
    row = judge.asked(["a red lighthouse and a blue house on green hills, at sunset"])[0]
    said = [None if i < 0 else kind[i] for i, kind in zip(row, words, strict=True)]
    assert said == ["sunset", "hills", None, None, None, None]  # two things, two colours


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Renders as if the built-in model had drawn them; the first four carry a prompt for something else."""
    place = tmp_path_factory.mktemp("story")
    chosen = scenes(12)
    for i, (scene, pixels) in enumerate(zip(chosen, renders(chosen), strict=True)):
        prompt = sb.plain(chosen[i]) if i >= 4 else sb.plain(SimpleNamespace(**vars(scene) | {"colour": wrong(scene)}))
        request = Request(prompt, seed=i, **SETTINGS)
        images.save(Image.fromarray(pixels), place / f"{i:02}.png", request, "storybook", "float32")
    return place


def wrong(scene):
    return sb.COLOURS[(sb.COLOURS.index(scene.colour) + 1) % len(sb.COLOURS)]


@pytest.fixture(autouse=True)
def _no_clip(monkeypatch):
    """No CLIP is on this machine."""
    monkeypatch.setattr(command.store, "here", lambda name: None)


def scored(capsys, *args):
    assert command.main([*map(str, args), "--json", "--offline"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_judge_joins_by_itself_and_sees_a_wrong_word(story, capsys):
    found = scored(capsys, story, "--against", story)
    assert (found["pictures"], found["clip"], found["clip_score"]) == (12, None, None)
    kinds = found["storybook"]["kinds"]
    assert kinds["colour"]["value"] == pytest.approx(8 / 12)  # the judge reads renders
    assert kinds["object"]["value"] == 1
    assert found["storybook"]["all"]["value"] == pytest.approx(8 / 12)
    assert found["storybook"]["all"]["low"] < 8 / 12 < found["storybook"]["all"]["high"]
    assert found["distances"]["judge"]["value"] == pytest.approx(0, abs=1e-6)
    said = " ".join(found["warnings"])
    assert "rest on 12 pictures, fewer than 30" in said
    assert "12 pictures to learn a 128 x 128 covariance" in said
    assert "shows no difference" in said


@pytest.mark.parametrize(("without", "says"), [(5, "No picture carries"), (2, "3 of the pictures carries"), (0, "")])
def test_pictures_without_a_prompt_are_counted(without, says):
    facts = {"pictures": 5, "without_prompt": without, "skipped": {}, "clip": {}, "clip_score": None, "distances": {}}
    said = report.notes(facts, {})
    assert len(said) == bool(without)
    assert "".join(said).startswith(says)


def test_the_table_of_the_judge(story, capsys):
    assert command.main([str(story), "--against", str(story), "--offline"]) == 0
    out = capsys.readouterr().out
    assert "12 pictures, against 12, without CLIP" in out
    assert "openai/clip-vit-large-patch14 (1.7 GB)" in out
    for kind in judge.WORDS:
        assert f"  {kind} " in out


def test_other_pictures_need_clip_and_are_told_what_to_fetch(tmp_path, story, capsys):
    for file in story.iterdir():
        os.link(file, tmp_path / file.name)
    Image.new("RGB", (9, 9)).save(tmp_path / "plain.png")
    for args, says in ((["--offline"], "openai/clip-vit-large-patch14 (1.7 GB)"), (["--clip", "none"], "--clip")):
        assert command.main([str(tmp_path), *args]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert says in err
        assert len(err.splitlines()) == 1


# ---- folders of anything


def test_hostile_files_are_counted_and_the_rest_is_read(story, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(folder, "MOST_PIXELS", 256 * 256)
    for file in [*story.iterdir()][:3]:
        os.link(file, tmp_path / file.name)
    (tmp_path / "cut.png").write_bytes((story / "05.png").read_bytes()[:3000])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.gif").write_bytes(b"")
    (tmp_path / "folder.webp").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    Image.new("RGB", (257, 256)).save(tmp_path / "large.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "pickle.pt").write_bytes(b"x")
    (tmp_path / "._00.png").write_text("x")
    skipped = Skipped()
    paths = folder.files(tmp_path, skipped)
    read = [picture for picture in folder.read(paths, None, skipped) if picture is not None]
    assert len(read) == 3
    assert all(picture.prompt for picture in read)
    assert skipped.counts == {OTHER: 2, BROKEN: 6, LARGE: 1}
    assert "257 x 256" in skipped.example[LARGE]


def test_a_name_reaches_no_terminal_raw(story, tmp_path, capsys):
    os.link(story / "05.png", tmp_path / "05.png")
    (tmp_path / "\x1b[31mred\nwords the judge sees 100 %.txt").write_text("x")
    assert command.main([str(tmp_path), "--offline"]) == 0
    out = capsys.readouterr().out
    assert "red words the judge sees 100 %.txt" in out
    assert "\x1b" not in out


def test_thousands_of_files_are_read_one_at_a_time(tmp_path, monkeypatch):
    """Reading is lazy, so that no more than a batch is in memory; a folder beyond all sense is refused."""
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    for i in range(1, 300):
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    paths, opened, read = folder.files(tmp_path, Skipped()), [], images.read
    monkeypatch.setattr(images, "read", lambda path: opened.append(path) or read(path))
    rows = folder.read(paths, {}, Skipped())
    next(rows), next(rows)
    assert len(paths) == 300
    assert len(opened) == 2
    monkeypatch.setattr(folder, "MOST", 299)
    with pytest.raises(Error, match="more than 299 files"):
        folder.files(tmp_path, Skipped())


BAD = {
    "no folder": (["absent"], "There is no folder"),
    "a file": (["a.png"], "There is no folder"),
    "nothing in it": (["empty"], "holds no pictures"),
    "none can be read": (["broken"], "None of 1 pictures"),
    "no such CLIP": (["one", "--clip", "vit-xl"], "Did you mean vit-l?"),
    "a CLIP that is a file": (["one", "--clip", "a.png"], "is not a folder"),
    "prompts of other pictures": (["one", "--prompts", "other.json"], "names 'b.png'"),
    "too many prompts": (["one", "--prompts", "two.txt"], "has 2 lines, and there are 1"),
    "prompts that are numbers": (["one", "--prompts", "numbers.json"], "does not hold a name and a prompt"),
    "prompts that are broken": (["one", "--prompts", "broken.json"], "is not valid JSON"),
    "no prompts": (["one", "--prompts", "absent.txt"], "cannot be read"),
    "a flag of elsewhere": (["one", "--agains", "x"], "--against"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_is_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # a name that means no CLIP is refused before the network
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    for place in ("empty", "broken", "one"):
        (tmp_path / place).mkdir()
    Image.new("RGB", (9, 9)).save("a.png")
    Image.new("RGB", (9, 9)).save("one/a.png")
    (tmp_path / "broken" / "x.png").write_bytes(b"\x89PNG")
    for file, text in {
        "other.json": '{"b.png": "x"}',
        "two.txt": "x\ny\n",
        "numbers.json": '{"a.png": 3}',
        "broken.json": "{",
    }.items():
        (tmp_path / file).write_text(text)
    typed, says = BAD[name]
    if name == "none can be read":
        monkeypatch.setattr(command, "clip_folder", lambda *_: None)
    err = refused(command.main, [*typed, "--offline"], capsys)
    assert says in err


def test_ctrl_c_is_one_line(story, capsys, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "for_judge", stopped)
    assert command.main([str(story), "--offline"]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", "mlxdiff score: stopped.\n")
