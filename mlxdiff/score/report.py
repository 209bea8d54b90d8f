"""The figures of a score as a text table."""

from .. import foreign
from ..store import clip as store
from .folder import Skipped

_WIDTH = 118


def table(facts: dict, skipped: dict[str, Skipped]) -> str:
    lines = [_head(facts), ""]
    lines.append(f"{'':24}{'value':>9}   {'95 % interval':18}{'by chance':>10}")
    score, words = facts["clip_score"], facts["storybook"]
    if score is not None:
        lines.append(_row("CLIP score", score, ".2f", f"{score['n']} pictures, {score['prompts']} prompts"))
    if words is not None:
        lines.append(_row("words the judge sees", words["words"], ".1%", f"{words['words']['n']} words"))
        lines.append(_row("pictures without a miss", words["all"], ".1%", f"{words['all']['n']} pictures"))
        for kind, row in words["kinds"].items():
            lines.append(_row(f"  {kind}", row, ".1%"))
    for name, title in (("cmmd", "CMMD"), ("frechet", "Fréchet, of CLIP"), ("judge", "Fréchet, of the judge")):
        if name in facts["distances"]:
            row = facts["distances"][name]
            lines.append(_row(title, row, ".3f" if row["value"] < 100 else ".1f", f"{row['n'][0]} and {row['n'][1]}"))
    if score is not None and score["n"] > 3:
        lowest = sorted(score["each"], key=lambda each: each["score"])[:3]
        lines += ["", "least like their prompts: " + ", ".join(f"{e['picture']} {e['score']:.1f}" for e in lowest)]
    lines += ["", *(f"- {note}" for note in [*notes(facts, skipped), *facts["warnings"]])]
    return foreign.lines(lines).rstrip()


def _head(facts: dict) -> str:
    other = "" if facts["against"] is None else f", against {facts['against']:,}"
    how = "without CLIP" if facts["clip"] is None else f"by {facts['clip']['model']}"
    return f"{facts['pictures']:,} pictures{other}, {how}, {facts['seconds']:.1f} s"


def _row(title: str, row: dict, style: str, of: str = "") -> str:
    span = f"{row['low']:{style}} - {row['high']:{style}}"
    chance = f"{row['chance']:{style}}" if "chance" in row else ""
    return f"{title:24}{row['value']:>9{style}}   {span:18}{chance:>10}   {of}"


def notes(facts: dict, skipped: dict[str, Skipped]) -> list[str]:
    said = []
    for what, where in (("pictures", ""), ("against", " of the second folder")):
        for why, n in facts["skipped"].get(what, {}).items():
            said.append(f"Left out{where}: {n:,} {why}, such as {skipped[what].example[why]}.")
    without = facts["without_prompt"]
    if without and facts["clip"] is not None:
        few = "No picture" if without == facts["pictures"] else f"{facts['pictures'] - without:,} of the pictures"
        said.append(f"{few} carries a prompt for the CLIP score; `--prompts FILE` gives them.")
    if facts["clip_score"] is not None and facts["clip_score"]["cut"]:
        said.append(f"{facts['clip_score']['cut']:,} prompts are longer than CLIP reads, and their ends were left out.")
    if facts["clip"] is None:
        row = store.NAMES[store.DEFAULT]
        said.append(f"`--clip {store.DEFAULT}` adds CLIP's scores; it fetches {row.repo} ({row.download:.1f} GB) once.")
    if facts["distances"]:
        said.append("By chance: of two sets of these sizes drawn from all these pictures together, 95 % are closer.")
    return said
