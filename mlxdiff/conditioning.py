"""Prompt to what the denoiser is conditioned on: tokenize, read by one text encoder after the other, join. What differs
by family (which layer, pooled vector, size ids, T5) is a row of `PLANS`."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .models.layers import sinusoids
from .request import Request
from .tokenizers import Chunk, ClipTokenizer, T5Tokenizer


@dataclass(frozen=True)
class Plan:
    encoders: tuple[tuple[str, str], ...]  # CLIP: (text encoder, its tokenizer), in the order they are concatenated
    final_norm: bool  # whether a layer below the last still passes the final norm
    pooled: tuple[str, ...]  # which encoders give the pooled vector, in the order they are concatenated
    sizes: bool = False  # SDXL: whether the network is told the picture's size
    scores: tuple[float, float] | None = None  # refiner: aesthetic score of the prompt and of the negative prompt
    t5: tuple[str, str] | None = None  # T5 and its tokenizer
    tokens: int = 0  # T5's, padding included; no mask: the networks were trained to see the padding
    clip_read: bool = True  # FLUX: False, its network reads T5 alone

    @property
    def needs(self) -> tuple[str, ...]:
        """The encoders without which there is no picture. SD3 was trained to do without T5."""
        clip = tuple(enc for enc, _ in self.encoders)
        return clip if self.clip_read else (*clip, self.t5[0])


_CLIP = ("text_encoder", "tokenizer")
_BIG = ("text_encoder_2", "tokenizer_2")
_FLUX = Plan((_CLIP,), final_norm=True, pooled=("text_encoder",), t5=_BIG, tokens=512, clip_read=False)
PLANS = {
    "sd1": Plan((_CLIP,), final_norm=True, pooled=()),
    "sd2": Plan((_CLIP,), final_norm=True, pooled=()),
    "sdxl": Plan((_CLIP, _BIG), final_norm=False, pooled=("text_encoder_2",), sizes=True),
    "sdxl-refiner": Plan((_BIG,), final_norm=False, pooled=("text_encoder_2",), sizes=True, scores=(6.0, 2.5)),
    "sd3": Plan(
        (_CLIP, _BIG),
        final_norm=False,
        pooled=("text_encoder", "text_encoder_2"),
        t5=("text_encoder_3", "tokenizer_3"),
        tokens=256,
    ),
    "flux": _FLUX,
    "flux-schnell": replace(_FLUX, tokens=256),
}


def plan(family: str, variant: str) -> Plan:
    """A variant's own row, else its family's."""
    return PLANS.get(f"{family}-{variant}", PLANS[family])


class Words(NamedTuple):
    """What one text encoder is to read."""

    chunks: list[list[Chunk]]  # of each prompt
    empty: Chunk  # of no prompt


class Text(NamedTuple):
    context: mx.array  # (1, N, d)
    pooled: mx.array | None  # (1, p)


def tokenize(
    plan: Plan, tokenizers: dict[str, ClipTokenizer | T5Tokenizer], prompts: list[str], t5: bool
) -> dict[str, Words]:
    """Words of several prompts, all brought to the same length so that they can share a batch. t5: whether it reads."""
    words = {}
    chunks = {tok: [tokenizers[tok].encode(p) for p in prompts] for _, tok in plan.encoders}
    longest = max(len(c) for by_prompt in chunks.values() for c in by_prompt)
    for enc, tok in plan.encoders:
        (empty,) = tokenizers[tok].encode("")
        words[enc] = Words([own + [empty] * (longest - len(own)) for own in chunks[tok]], empty)
    if t5:
        enc, tok = plan.t5
        length = max(len(tokenizers[tok].encode(p, plan.tokens).ids) for p in prompts)
        words[enc] = Words([[tokenizers[tok].encode(p, length)] for p in prompts], tokenizers[tok].encode("", length))
    return words


def read(plan: Plan, encoder: nn.Module, is_t5: bool, words: Words, clip_skip: int) -> list[Text]:
    """One text encoder's share of every prompt: (1, N, d) of the wanted layer, the pooled vector of the first chunk."""

    def states_of(chunks: list[Chunk]) -> tuple[mx.array, mx.array | None]:
        out = encoder(mx.array([c.ids for c in chunks], mx.int32))
        return (out, None) if is_t5 else (_layer(encoder, out, clip_skip, plan.final_norm), out.pooled[:1])

    texts = []
    for chunks in words.chunks:
        states, pooled = states_of(chunks)  # (chunks, N, d)
        if any(w != 1 for c in chunks for w in c.weights):
            # ComfyUI's reading of (word:1.3): away from the embedding of the empty prompt, token by token.
            base, _ = states_of([words.empty])
            weights = mx.array([c.weights for c in chunks])
            states = base + (states - base) * weights[..., None].astype(states.dtype)
        texts.append(Text(states.reshape(1, -1, states.shape[-1]), pooled))
    return texts


def _layer(encoder: nn.Module, out, clip_skip: int, final_norm: bool) -> mx.array:
    if not final_norm:
        return out.states[-clip_skip]
    return out.last if clip_skip == 1 else encoder.final_layer_norm(out.states[-clip_skip])


def join(plan: Plan, parts: dict[str, list[Text]], width: int) -> list[Text]:
    """The encoders' shares put together, prompt by prompt. width: of the text that the denoiser reads."""
    texts = []
    for i in range(len(parts[plan.encoders[0][0]])):
        own = {enc: by_prompt[i] for enc, by_prompt in parts.items()}
        pooled = [own[enc].pooled for enc in plan.pooled]
        context = mx.concatenate([own[enc].context for enc, _ in plan.encoders], axis=-1)
        if plan.t5 is not None:
            t5 = own[plan.t5[0]].context if plan.t5[0] in own else mx.zeros((1, plan.tokens, width), context.dtype)
            if plan.clip_read:
                context = context[..., :width]  # as the reference: a negative padding cuts
                context = mx.pad(context, [(0, 0), (0, 0), (0, width - context.shape[-1])])
                context = mx.concatenate([context, t5], axis=1)
            else:
                context = t5
        texts.append(Text(context, mx.concatenate(pooled, axis=-1) if pooled else None))
    return texts


def arguments(plan: Plan, text: Text, request: Request, negative: bool) -> dict[str, mx.array]:
    """What `prepare` of the network takes, for one prompt."""
    args = {"context": text.context}
    if text.pooled is not None:
        args["pooled"] = text.pooled
    if plan.sizes:
        size = [request.height, request.width, 0, 0]  # the size asked for, uncropped
        tail = [request.height, request.width] if plan.scores is None else [plan.scores[negative]]
        args["time_ids"] = mx.array([size + tail], mx.float32)
    return args


def guidance_embedding(guidance: float, width: int) -> mx.array:
    """What a consistency model takes in place of a second pass (Luo et al. 2023): a sinusoid of w = guidance - 1."""
    return sinusoids(mx.array([1000.0 * (guidance - 1.0)]), width, flip_sin_to_cos=False, freq_shift=1)
