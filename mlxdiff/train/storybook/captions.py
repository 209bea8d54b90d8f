"""Scene -> words. A caption always names the side, except the centre, so a caption without a side means the middle. It
sometimes leaves other things out and adds stray words, so that a short or strange prompt still draws a picture."""

import numpy as np

from .world import COLOURS, Scene

NOUNS = {
    "house": ("house", "house", "house", "cottage"), "castle": ("castle",), "tree": ("tree",),
    "boat": ("boat", "sailboat", "sailing boat"), "cactus": ("cactus",),
    "balloon": ("balloon", "hot air balloon"), "lighthouse": ("lighthouse",),
    "windmill": ("windmill",), "tent": ("tent",), "mushroom": ("mushroom", "mushroom", "toadstool"),
}  # fmt: skip
TIME = {
    "dawn": ("at dawn", "at dawn", "at sunrise", "in the early morning"),
    "day": ("by day", "during the day", "at noon", "in daylight"),
    "sunset": ("at sunset", "at sunset", "at dusk", "in the evening"),
    "night": ("at night", "at night", "by night", "at midnight"),
}
TERRAIN = {
    "mountains": ("in the mountains", "in the mountains", "in front of the mountains", "with mountains behind it"),
    "hills": ("on a hill", "on the hills", "on green hills", "in a meadow", "on the grass"),
    "desert": ("in the desert", "in the desert", "among sand dunes"),
    "sea": ("by the sea", "on the sea", "on a lake", "on the water", "in the ocean"),
    "snow": ("in the snow", "in the snow", "in winter", "on a snowy field"),
    "forest": ("in the forest", "in a forest", "in the woods"),
}
SKY = {
    "clear": ("under a clear sky", "with a clear sky"),
    "sun": ("with the sun", "under the sun", "in the sunshine", "with the sun in the sky"),
    "clouds": ("with clouds", "under a cloudy sky", "under the clouds", "under fluffy clouds"),
    "rainbow": ("with a rainbow", "under a rainbow", "with a rainbow in the sky"),
    "full moon": ("under a full moon", "under a full moon", "with a full moon", "under the moon", "in the moonlight"),
    "crescent moon": ("under a crescent moon", "with a crescent moon"),
    "stars": ("under the stars", "with stars", "under a starry sky", "with stars in the sky"),
    "aurora": ("under the northern lights", "with the northern lights", "under an aurora", "with an aurora"),
}
POSITION = {
    "left": ("on the left", "on the left", "on the left side", "at the left"),
    "centre": ("in the middle", "in the centre", "in the center"),
    "right": ("on the right", "on the right", "on the right side", "at the right"),
}
OPENINGS = (
    "a picture of", "a painting of", "a drawing of", "an illustration of",
    "a storybook picture of", "a photo of", "there is", "this is",
)  # fmt: skip
# Words that no picture shows. They occur at random with every scene, so the model learns that they mean nothing.
STRAY = tuple(
    """
    small big little large tiny huge old new cute lovely beautiful cozy quiet lonely magical pretty bright dark
    light warm cold happy sad calm peaceful wooden stone modern ancient high low wide far near detailed simple
    colorful watercolor cartoon digital art style sketch oil render masterpiece quality hd realistic dreamy soft
    children book fairy tale story fantasy dog cat horse man woman child girl boy person bird fish dragon robot
    astronaut car train road river bridge city street garden flower rain wind fog fire bottle chair table food cake
    music dancing running riding flying sleeping very and its my your one two some many over behind between without
    next standing
    """.split()  # noqa: SIM905
)
LEADING = {"in", "on", "at", "by", "with", "under", "among", "front", "of", "during", "the", "a", "an"}


def pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plain(scene: Scene) -> str:
    """The caption that says everything once, in the most common words. Models are measured on it."""
    side = [] if scene.position == "centre" else [POSITION[scene.position][0]]
    words = [TERRAIN[scene.terrain][0], TIME[scene.time][0], SKY[scene.sky][0]]
    return " ".join([_article(f"{scene.colour} {NOUNS[scene.object][0]}"), *side, *words])


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A random caption of the scene."""
    form = rng.random()
    if form < 0.04:
        return _single(scene, rng)
    # Words that the others imply, and words for a clear sky, are left out more often.
    drop_time = 0.4 if scene.time == "night" and scene.sky != "clear" else 0.1
    drop_sky = 0.6 if scene.sky == "clear" else 0.1
    keep = dict(zip(("terrain", "time", "sky"), rng.random(3) > (0.1, drop_time, drop_sky), strict=True))
    if form < 0.14:  # "a red house", "a boat at night"
        keep = dict.fromkeys(keep, False)
        if rng.random() < 0.75:
            keep[pick(rng, tuple(keep))] = True
    if form > 0.90:
        return ", ".join(_tags(scene, rng, keep))

    noun = pick(rng, NOUNS[scene.object])
    thing = noun if rng.random() < 0.04 else f"{scene.colour} {noun}"
    if rng.random() < 0.05:
        thing = f"{pick(rng, STRAY)} {thing}"
    thing = f"the {thing}" if rng.random() < 0.1 else _article(thing)
    if rng.random() < 0.08:
        thing = f"{pick(rng, OPENINGS)} {thing}"
    side = [pick(rng, POSITION[scene.position])] if scene.position != "centre" or rng.random() < 0.3 else []
    said = {"terrain": TERRAIN[scene.terrain], "time": TIME[scene.time], "sky": SKY[scene.sky]}
    rest = [pick(rng, said[k]) for k in said if keep[k]]
    if rng.random() < 0.4:
        rng.shuffle(rest)
    if rest and rng.random() < 0.15:  # "at night, a red house in the snow"
        text = f"{rest.pop()}, {' '.join([thing, *side, *rest])}"
    elif side and not keep["sky"] and rng.random() < 0.4:  # "a red house in the snow on the left"
        text = " ".join([thing, *rest, *side])
    else:
        text = " ".join([thing, *side, *rest])
    return f"{text}, {pick(rng, STRAY)} {pick(rng, STRAY)}" if rng.random() < 0.06 else text


def _single(scene: Scene, rng) -> str:
    """One word or phrase alone, like a negative prompt."""
    sky = () if scene.sky == "clear" else (bare(pick(rng, SKY[scene.sky])),)
    return pick(rng, (scene.colour, scene.object, scene.time, bare(pick(rng, TERRAIN[scene.terrain])), *sky))


def bare(phrase: str) -> str:
    """The phrase without its leading preposition and article: "under a full moon" -> "full moon"."""
    words = phrase.split()
    while len(words) > 1 and words[0] in LEADING:
        words = words[1:]
    return " ".join(words)


def _tags(scene: Scene, rng, keep: dict) -> list[str]:
    tags = [f"{scene.colour} {pick(rng, NOUNS[scene.object])}"]
    if scene.position != "centre" or rng.random() < 0.3:
        tags.append(scene.position if rng.random() < 0.5 else pick(rng, POSITION[scene.position]))
    said = {"terrain": TERRAIN[scene.terrain], "time": TIME[scene.time], "sky": SKY[scene.sky]}
    for kind, phrases in said.items():
        word = getattr(scene, kind)
        if keep[kind] and word != "clear":
            tags.append(word if rng.random() < 0.5 else bare(pick(rng, phrases)))
    return tags


def vocabulary() -> dict[str, tuple[str, ...]]:
    """The words that the model knows, for people to read: kind of word -> the words."""

    def tidy(table):
        return tuple(dict.fromkeys(phrase for phrases in table.values() for phrase in phrases))

    tables = {"objects": NOUNS, "places": TERRAIN, "times": TIME, "skies": SKY, "positions": POSITION}
    return {"colours": COLOURS} | {kind: tidy(table) for kind, table in tables.items()}
