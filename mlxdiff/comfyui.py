"""Reads the settings of a picture from the graph that ComfyUI writes into it: nodes by their ids, each with its inputs,
which are values or links ([id, output]). It reads the sampler and what leads to it, for a picture drawn from words.
Nodes that change a picture in other ways are left out."""

import json
from collections import deque
from collections.abc import Iterator

from . import dialects
from .errors import Error
from .foreign import fits

SCHEDULES = {"normal": "linspace", "karras": "karras", "exponential": "exponential", "sgm_uniform": "sgm_uniform"}
SCHEDULES |= {"simple": "simple", "beta": "beta"}
_TEXTS = ("text", "text_g", "t5xxl", "text_l", "clip_l", "string", "value")  # inputs of nodes that hold a prompt
_NOTHING = "ConditioningZeroOut"  # its text counts for nothing
_SEEDS = ("seed", "noise_seed", "value")


def parse(text: str) -> tuple[dict, str | None]:
    """Settings with the field names of `Request`, and the name of the model's file. A sampler or schedule that is not
    ours becomes None. Raises ValueError."""
    nodes = _nodes(text)
    samplers = [
        n for n in nodes.values() if _inputs(n).keys() & {"positive", "guider"} and "latent_image" in _inputs(n)
    ]
    if not samplers:
        raise ValueError("their graph has no sampler with a prompt")
    later = _below(nodes, samplers, "latent_image")  # of two passes, the first begins with no other's latents
    sampler = next((s for s in samplers if id(s) not in later), samplers[0])
    read = _of_guider if "guider" in _inputs(sampler) else _of_sampler
    settings, model = read(nodes, sampler)
    settings |= {name: _first(nodes, sampler, "latent_image", (name,), int) for name in ("width", "height")}
    settings["schedule"] = SCHEDULES.get(str(settings["schedule"]))
    try:
        settings["sampler"] = dialects.sampler(settings["sampler"])[0]
    except Error:
        settings["sampler"] = None
    return settings | {"noise": "torch"}, model


def _of_sampler(nodes: dict[str, dict], sampler: dict) -> tuple[dict, str | None]:
    """A KSampler, which has all settings as inputs."""
    held = _inputs(sampler)
    settings = {
        "seed": _value(nodes, held, ("seed", "noise_seed"), _SEEDS, int),
        "steps": _value(nodes, held, ("steps",), ("value",), int),
        "sampler": held.get("sampler_name"),
        "schedule": held.get("scheduler"),
    }
    return settings | _prompts(nodes, sampler, "positive"), _model(nodes, sampler)


def _of_guider(nodes: dict[str, dict], sampler: dict) -> tuple[dict, str | None]:
    """A SamplerCustomAdvanced, which has a node for each: noise, guider, sampler, sigmas."""
    guider = _linked(nodes, _inputs(sampler)["guider"]) or {}
    settings = {
        "seed": _first(nodes, sampler, "noise", _SEEDS, int),
        "steps": _first(nodes, sampler, "sigmas", ("steps",), int),
        "sampler": _first(nodes, sampler, "sampler", ("sampler_name",), str),
        "schedule": _first(nodes, sampler, "sigmas", ("scheduler",), str),
    }
    positive = "conditioning" if "conditioning" in _inputs(guider) else "positive"
    return settings | _prompts(nodes, guider, positive), _model(nodes, guider)


def _prompts(nodes: dict[str, dict], node: dict, positive: str) -> dict:
    """What a node is told to draw, how strongly, and its LoRAs."""
    guidance = _first(nodes, node, positive, ("guidance",), float)
    return {
        "prompt": _first(nodes, node, positive, _TEXTS, str) or "",
        "negative": _first(nodes, node, "negative", _TEXTS, str) or None,
        "guidance": _value(nodes, _inputs(node), ("cfg",), ("value",), float) if guidance is None else guidance,
        "loras": _loras(nodes, node),
    }


def _model(nodes: dict[str, dict], node: dict) -> str | None:
    return _first(nodes, node, "model", ("ckpt_name", "unet_name"), str)


def _nodes(text: str) -> dict[str, dict]:
    try:
        graph = json.loads(text)
    except RecursionError:
        raise ValueError("they are nested too deeply") from None
    if not isinstance(graph, dict) or not all(isinstance(node, dict) for node in graph.values()):
        raise ValueError("they are no graph of ComfyUI")
    return graph


def _inputs(node: dict) -> dict:
    inputs = node.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def _linked(nodes: dict[str, dict], value: object) -> dict | None:
    """The node that an input is linked to."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int):
        return nodes.get(str(value[0]))
    return None


def _above(nodes: dict[str, dict], node: dict, name: str) -> Iterator[dict]:
    """The nodes that lead to an input of a node, nearest first. A graph of others may have circles."""
    waiting, seen = deque([_linked(nodes, _inputs(node).get(name))]), set()
    while waiting:
        node = waiting.popleft()
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            if node.get("class_type") != _NOTHING:
                yield node
                waiting += _next(nodes, node, name)


def _next(nodes: dict[str, dict], node: dict, name: str) -> list[dict | None]:
    """The nodes that lead to a node, on the way to an input of this name: of a node that has a positive and a negative
    side, only one side."""
    held = _inputs(node)
    return [_linked(nodes, value) for value in ([held[name]] if name in held else held.values())]


def _below(nodes: dict[str, dict], first: list[dict], name: str) -> set[int]:
    """The ids of the nodes that some of these lead to, on the way to an input of this name. Each link is followed once,
    however many nodes a graph has."""
    leads: dict[int, list[dict]] = {}
    for node in nodes.values():
        for above in _next(nodes, node, name) if node.get("class_type") != _NOTHING else ():
            leads.setdefault(id(above), []).append(node)
    waiting, found = list(first), set()
    while waiting:
        for node in leads.pop(id(waiting.pop()), ()):
            found.add(id(node))
            waiting.append(node)
    return found


def _first(nodes: dict[str, dict], node: dict, name: str, inputs: tuple[str, ...], kind: type):
    """The nearest value of one of these inputs among the nodes that lead to an input."""
    for above in _above(nodes, node, name):
        for key in inputs:
            if fits(_inputs(above).get(key), kind):
                return _inputs(above)[key]
    return None


def _value(nodes: dict[str, dict], held: dict, names: tuple[str, ...], linked: tuple[str, ...], kind: type):
    """An input's value, or that of the node that it is linked to."""
    for name in names:
        above = _linked(nodes, held.get(name))
        values = [held.get(name)] if above is None else [_inputs(above).get(key) for key in linked]
        for value in values:
            if fits(value, kind):
                return value
    return None


def _loras(nodes: dict[str, dict], node: dict) -> tuple[str, ...] | None:
    """The first in the graph first."""
    found = [_inputs(above) for above in _above(nodes, node, "model")]
    named = [(held.get("lora_name"), held.get("strength_model")) for held in reversed(found)]
    return tuple(f"{name}:{scale:g}" for name, scale in named if fits(name, str) and fits(scale, float)) or None
