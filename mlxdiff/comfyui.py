"""Reads the settings of a picture from the graph that ComfyUI writes into it: nodes by their ids, each with its inputs,
which are values or links ([id, output]). It reads the sampler and what leads to it, for a picture drawn from words.
Nodes that change a picture in other ways are left out."""

import json
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
    samplers = [n for n in nodes.values() if "KSampler" in str(n.get("class_type")) and "positive" in _inputs(n)]
    if not samplers:
        raise ValueError("their graph has no KSampler with a prompt")
    # Of two passes, the first begins with no other's latents.
    ids = {id(sampler) for sampler in samplers}
    first = [s for s in samplers if not any(id(above) in ids for above in _above(nodes, s, "latent_image"))]
    sampler = (first or samplers)[0]
    held = _inputs(sampler)
    settings = {
        "prompt": _first(nodes, sampler, "positive", _TEXTS, str) or "",
        "negative": _first(nodes, sampler, "negative", _TEXTS, str) or None,
        "seed": _value(nodes, held, ("seed", "noise_seed"), _SEEDS, int),
        "steps": _value(nodes, held, ("steps",), ("value",), int),
        "guidance": _first(nodes, sampler, "positive", ("guidance",), float),
        "width": _first(nodes, sampler, "latent_image", ("width",), int),
        "height": _first(nodes, sampler, "latent_image", ("height",), int),
        "noise": "torch",
        "schedule": SCHEDULES.get(str(held.get("scheduler"))),
        "loras": _loras(nodes, sampler),
    }
    if settings["guidance"] is None:
        settings["guidance"] = _value(nodes, held, ("cfg",), ("value",), float)
    try:
        settings["sampler"] = dialects.sampler(held.get("sampler_name"))[0]
    except Error:
        settings["sampler"] = None
    return settings, _first(nodes, sampler, "model", ("ckpt_name", "unet_name"), str)


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
    waiting, seen = [_linked(nodes, _inputs(node).get(name))], set()
    while waiting:
        node = waiting.pop(0)
        if node is not None and id(node) not in seen and node.get("class_type") != _NOTHING:
            seen.add(id(node))
            yield node
            follow = name if name in _inputs(node) else None  # of a node with a positive and a negative side, one
            waiting += [_linked(nodes, v) for k, v in _inputs(node).items() if follow in (None, k)]


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


def _loras(nodes: dict[str, dict], sampler: dict) -> tuple[str, ...] | None:
    """The first in the graph first."""
    found = [_inputs(above) for above in _above(nodes, sampler, "model")]
    named = [(held.get("lora_name"), held.get("strength_model")) for held in reversed(found)]
    return tuple(f"{name}:{scale:g}" for name, scale in named if fits(name, str) and fits(scale, float)) or None
