"""Prompt to what the denoiser is conditioned on. One function turns a prompt and its negative into embeddings for any
mix of text encoders; what differs by family (which layer, pooled vector, size ids) is a row of `PLANS`."""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .models.layers import sinusoids
from .request import Request
from .tokenizers import ClipTokenizer


@dataclass(frozen=True)
class Plan:
    encoders: tuple[tuple[str, str], ...]  # (text encoder, its tokenizer) in the order they are concatenated
    final_norm: bool  # whether a layer below the last still passes the final norm
    pooled: str | None  # which encoder gives the pooled vector
    scores: tuple[float, float] | None = None  # refiner: aesthetic score of the prompt and of the negative prompt


_CLIP = ("text_encoder", "tokenizer")
_BIG = ("text_encoder_2", "tokenizer_2")
PLANS = {
    "sd1": Plan((_CLIP,), final_norm=True, pooled=None),
    "sd2": Plan((_CLIP,), final_norm=True, pooled=None),
    "sdxl": Plan((_CLIP, _BIG), final_norm=False, pooled="text_encoder_2"),
    "sdxl-refiner": Plan((_BIG,), final_norm=False, pooled="text_encoder_2", scores=(6.0, 2.5)),
}


class Text(NamedTuple):
    context: mx.array  # (1, 77 * chunks, d)
    pooled: mx.array | None  # (1, p)


def encode(
    plan: Plan,
    encoders: dict[str, nn.Module],
    tokenizers: dict[str, ClipTokenizer],
    prompts: list[str],
    clip_skip: int,
) -> list[Text]:
    """Embeddings of several prompts, all brought to the same number of chunks so that they can share a batch."""
    contexts: list[list[mx.array]] = [[] for _ in prompts]
    pooled: list[mx.array | None] = [None] * len(prompts)
    chunks = {tok: [tokenizers[tok].encode(p) for p in prompts] for _, tok in plan.encoders}
    longest = max(len(c) for by_prompt in chunks.values() for c in by_prompt)
    for enc, tok in plan.encoders:
        (empty,) = tokenizers[tok].encode("")
        for i, own in enumerate(chunks[tok]):
            padded = own + [empty] * (longest - len(own))
            states, first = _read(encoders[enc], padded, empty, clip_skip, plan.final_norm)
            contexts[i].append(states)
            if enc == plan.pooled:
                pooled[i] = first
    return [Text(mx.concatenate(c, axis=-1), p) for c, p in zip(contexts, pooled, strict=True)]


def _read(encoder: nn.Module, chunks: list, empty: tuple, clip_skip: int, final_norm: bool):
    """(1, 77 * chunks, d) of the wanted layer, and the pooled vector of the first chunk."""
    ids = mx.array([c[0] for c in chunks], mx.int32)
    weights = mx.array([c[1] for c in chunks])
    out = encoder(ids)
    states = _layer(encoder, out, clip_skip, final_norm)  # (chunks, 77, d)
    if any(w != 1 for c in chunks for w in c[1]):
        # ComfyUI's reading of (word:1.3): away from the embedding of the empty prompt, token by token.
        base = _layer(encoder, encoder(mx.array([empty[0]], mx.int32)), clip_skip, final_norm)
        states = base + (states - base) * weights[..., None].astype(states.dtype)
    return states.reshape(1, -1, states.shape[-1]), out.pooled[:1]


def _layer(encoder: nn.Module, out, clip_skip: int, final_norm: bool) -> mx.array:
    if not final_norm:
        return out.states[-clip_skip]
    return out.last if clip_skip == 1 else encoder.final_layer_norm(out.states[-clip_skip])


def arguments(plan: Plan, text: Text, request: Request, negative: bool) -> dict[str, mx.array]:
    """What `prepare` of the network takes, for one prompt."""
    args = {"context": text.context}
    if plan.pooled is not None:
        size = [request.height, request.width, 0, 0]  # the size asked for, uncropped
        tail = [request.height, request.width] if plan.scores is None else [plan.scores[negative]]
        args |= {"pooled": text.pooled, "time_ids": mx.array([size + tail], mx.float32)}
    return args


def guidance_embedding(guidance: float, width: int) -> mx.array:
    """What a consistency model takes in place of a second pass (Luo et al. 2023): a sinusoid of w = guidance - 1."""
    return sinusoids(mx.array([1000.0 * (guidance - 1.0)]), width, flip_sin_to_cos=False, freq_shift=1)
