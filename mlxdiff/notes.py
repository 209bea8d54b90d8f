"""What the command line says of a run before it draws: the files that change it, and settings that do nothing."""

from collections.abc import Iterator

from . import builtin, foreign
from .families.base import SECOND_PASS
from .guides import steps_on
from .pipeline import Pipeline
from .recipe import WHOLE
from .request import Request


def of_run(pipe: Pipeline, request: Request) -> Iterator[str]:
    """What holds for all pictures of a run. request: resolved, one of them."""
    small = builtin.size_notice(pipe.name, request.width, request.height, pipe.description.defaults.size)
    if small:
        yield small
    bits = pipe.description.recipe.text_bits
    if bits not in (None, WHOLE) and (pipe.description.text.t5 is None or pipe.description.reads_t5(request)):
        reader = "T5" if pipe.description.text.t5 is not None else "Qwen3"
        yield f"{reader} is in {bits}{' bits' * isinstance(bits, int)}. --text-bits {WHOLE} keeps all bits."
    for adapter, scale in pipe.attached.adapters(request):
        yield f"{adapter}, scale {scale:g}"
    yield from pipe.attached.notes(request)
    guided = [("control", guide) for guide in request.controls]
    for what, guide in guided + [("reference", guide) for guide in request.references]:
        steps = pipe.description.taken(request)
        on = steps_on(guide.interval, steps)
        span = "" if len(on) == steps else f", in steps {on.start + 1} to {on.stop} of {steps}"
        yield f"{what} {guide}: scale {guide.scale:g}{span}"
    for word in pipe.attached.words(request):
        n = max(map(len, word.vectors.values()))
        yield f"{word.word}: {n} token{'s' * (n > 1)}, for {', '.join(word.vectors)}"


def of_prompt(pipe: Pipeline, request: Request) -> Iterator[str]:
    """What holds for a prompt."""
    if request.negative and pipe.description.passes(request) == 1:
        second = pipe.description.guidance == SECOND_PASS
        why = "Without guidance above 1" if second else f"As {pipe.name} draws in one pass,"
        yield f"{why} a negative prompt does nothing."
    for adapter, _ in pipe.attached.adapters(request):
        if adapter.words and not any(word.lower() in request.prompt.lower() for word in adapter.words):
            word = foreign.shown(adapter.words[0], 60)
            yield f"{adapter.name} was trained with the word {word}: put it into the prompt."
    unknown = builtin.notice(pipe.name, request.prompt, pipe.attached.taught(request))
    if unknown:
        yield f"{unknown} `mlxdiff models {pipe.name}` lists the words that it knows."
