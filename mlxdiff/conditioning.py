"""From a prompt to the conditions of the denoiser: tokenize it, read it with one text encoder after the other, join the
results. The differences between families (which layer, pooled vector, size ids, T5) are in their TextPlan."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from . import tokenizers
from .adapters import Word
from .description import Description
from .errors import Error
from .families.base import EMBEDDED, INPUT, PROMPT, TextPlan, tokenizer_of
from .guides import Guide
from .models.clip import CLIPText
from .models.controlnet import Guiding
from .models.layers import Shown, Span, sinusoids
from .models.qwen3 import Qwen3
from .models.t5 import T5Encoder
from .request import Request
from .tokenizers import Chunk, ClipTokenizer, QwenTokenizer, T5Tokenizer

Layers = list[tuple[mx.array, mx.array]]  # keys and values (1, n, c) for each of a denoiser's layers, as in the file
Tokenizers = dict[str, ClipTokenizer | T5Tokenizer | QwenTokenizer]  # text encoder -> its tokenizer


class Words(NamedTuple):
    """The input of one text encoder."""

    chunks: list[list[Chunk]]  # the chunks of each prompt
    empty: Chunk | None  # the chunk of an empty prompt; None for an encoder without weights


class Sides(NamedTuple):
    """What an IP-Adapter gives to the pass of the prompt, and to that of the negative prompt if there is one."""

    prompt: Layers
    negative: Layers | None


class Picture(NamedTuple):
    """What the denoiser reads of the pictures of an IP-Adapter, and when."""

    prompt: Shown
    negative: Shown | None
    span: Span


class Text(NamedTuple):
    context: mx.array  # (1, N, d)
    pooled: mx.array | None  # (1, p)


def load_tokenizers(text_plan: TextPlan, folder: Path, t5: bool) -> Tokenizers:
    """The tokenizers of a model folder. t5: whether T5 reads the prompt too."""
    read = {enc: network for enc, network in text_plan.encoders.items() if t5 or network != "t5"}
    return {enc: tokenizers.LOAD[network](folder / tokenizer_of(enc)) for enc, network in read.items()}


def teach_tokenizers(toks: Tokenizers, words: list[Word], components: dict) -> None:
    """Let tokenizers read taught words. Their ids follow those of the text encoder's own embeddings."""
    for enc in {enc for word in words for enc in word.vectors}:
        first = components[enc].vocab
        for word in words:
            n = len(word.vectors[enc])
            toks[enc].teach(word.word, [*range(first, first + n)])
            first += n


def teach(encoder: nn.Module, name: str, words: list[Word]) -> None:
    """Give a text encoder the embeddings of taught words, in the same order."""
    vectors = [word.vectors[name] for word in words if name in word.vectors]
    if vectors:
        embedding = encoder.embeddings.token_embedding
        embedding.weight = mx.concatenate([embedding.weight, *(v.astype(embedding.weight.dtype) for v in vectors)])


def tokenize(text_plan: TextPlan, toks: Tokenizers, prompts: list[str]) -> dict[str, Words]:
    """The Words of several prompts. If padding is read, all are padded to the same length: they can share a batch."""
    words = {}
    chunks = {enc: [toks[enc].encode(p) for p in prompts] for enc in text_plan.clip}
    longest = max((len(c) for by_prompt in chunks.values() for c in by_prompt), default=0)
    for enc, by_prompt in chunks.items():
        (empty,) = toks[enc].encode("")
        words[enc] = Words([c + [empty] * (longest - len(c)) for c in by_prompt], empty)
    if text_plan.t5 in toks:
        t5 = toks[text_plan.t5]
        length = max(len(t5.encode(p, text_plan.t5_tokens).ids) for p in prompts)
        words[text_plan.t5] = Words([[t5.encode(p, length)] for p in prompts], t5.encode("", length))
    if text_plan.qwen in toks:
        qwen, around = toks[text_plan.qwen], tuple(text_plan.template.split(PROMPT))
        length = text_plan.qwen_tokens if text_plan.qwen_padded else 0
        if text_plan.qwen_padded:
            length = max(len(qwen.encode(p, around, length).ids) for p in prompts)
        words[text_plan.qwen] = Words([[qwen.encode(p, around, length)] for p in prompts], None)
    return words


def read(text_plan: TextPlan, encoder: nn.Module, words: Words, clip_skip: int) -> list[Text]:
    """Encode every prompt with one text encoder: the chosen layer (1, N, d), and the pooled vector of the first
    chunk."""

    def states_of(chunks: list[Chunk]) -> tuple[mx.array, mx.array | None]:
        ids = mx.array(_known_ids(encoder, chunks), mx.int32)
        if isinstance(encoder, Qwen3):
            mask = [[i < c.visible for i in range(len(c.ids))] for c in chunks]
            return encoder(ids, mx.array(mask)), None
        out = encoder(ids)
        if isinstance(encoder, T5Encoder):
            return out, None
        return _layer(encoder, out, clip_skip, text_plan.final_norm), out.pooled[:1]

    texts = []
    for chunks in words.chunks:
        states, pooled = states_of(chunks)  # (chunks, N, d)
        if any(w != 1 for c in chunks for w in c.weights):
            # As in ComfyUI, a weight moves each token away from the embedding of the empty prompt.
            base, _ = states_of([words.empty])
            weights = mx.array([c.weights for c in chunks])
            states = base + (states - base) * weights[..., None].astype(states.dtype)
        texts.append(Text(states.reshape(1, -1, states.shape[-1]), pooled))
    return texts


def _known_ids(encoder: nn.Module, chunks: list[Chunk]) -> list[list[int]]:
    """The token ids of chunks. Raises for one that the embedding does not have: MLX would read memory beyond it."""
    ids = [c.ids for c in chunks]
    known = encoder.embeddings.words if isinstance(encoder, CLIPText) else encoder.config.vocab
    largest, longest = max(max(i) for i in ids), max(len(i) for i in ids)
    fix = "The tokenizer does not belong to this model: convert the checkpoint again."
    if largest >= known:
        raise Error(f"The tokenizer gives the id {largest}; the text encoder knows ids below {known}.", fix)
    positions = getattr(encoder.config, "positions", longest)
    if longest > positions:
        raise Error(f"The tokenizer makes chunks of {longest} tokens; the text encoder knows {positions}.", fix)
    return ids


def _layer(encoder: nn.Module, out, clip_skip: int, final_norm: bool) -> mx.array:
    if not final_norm:
        return out.states[-clip_skip]
    return out.last if clip_skip == 1 else encoder.final_layer_norm(out.states[-clip_skip])


def join(text_plan: TextPlan, parts: dict[str, list[Text]], width: int) -> list[Text]:
    """Join the encoders' results, prompt by prompt. width: the width of the text that the denoiser reads."""
    texts = []
    for shares in zip(*parts.values(), strict=True):
        by = dict(zip(parts, shares, strict=True))
        pooled = [by[enc].pooled for enc in text_plan.pooled]
        contexts = []
        if text_plan.clip and text_plan.clip_read:
            contexts.append(mx.concatenate([by[enc].context for enc in text_plan.clip], axis=-1))
        if text_plan.t5 is not None:
            contexts = [_widened(c, width) for c in contexts]
            left_out = mx.zeros((1, text_plan.t5_tokens, width), shares[0].context.dtype)
            contexts.append(by[text_plan.t5].context if text_plan.t5 in by else left_out)
        if text_plan.qwen is not None:
            contexts.append(by[text_plan.qwen].context)
        context = contexts[0] if len(contexts) == 1 else mx.concatenate(contexts, axis=1)
        texts.append(Text(context, mx.concatenate(pooled, axis=-1) if pooled else None))
    return texts


def _widened(context: mx.array, width: int) -> mx.array:
    """The context padded with zeros to a width, or cut to it, like the reference's negative padding."""
    context = context[..., :width]
    return mx.pad(context, [(0, 0), (0, 0), (0, width - context.shape[-1])])


def longer(context: mx.array, length: int) -> mx.array:
    """The context padded with zeros to a length."""
    return mx.pad(context, [(0, 0), (0, length - context.shape[1]), (0, 0)])


def arguments(text_plan: TextPlan, text: Text, request: Request, negative: bool) -> dict[str, mx.array]:
    """The arguments of the network's `prepare` for one prompt."""
    args = {"context": text.context}
    if text.pooled is not None:
        args["pooled"] = text.pooled
    if text_plan.sizes:
        size = [request.height, request.width, 0, 0]  # the requested size, without a crop
        tail = [request.height, request.width] if text_plan.scores is None else [text_plan.scores[negative]]
        args["time_ids"] = mx.array([size + tail], mx.float32)
    return args


def guidance_embedding(guidance: float, width: int) -> mx.array:
    """The input that replaces a second pass in a consistency model (Luo et al. 2023): sinusoids of w = guidance - 1."""
    return sinusoids(mx.array([1000.0 * (guidance - 1.0)]), width, flip_sin_to_cos=False, freq_shift=1)


def prepare(
    model: Description,
    net: nn.Module,
    request: Request,
    ts: list[float],
    texts: list[Text],
    both: bool,
    references: Sequence[mx.array] = (),
    pictures: Sequence[Picture] = (),
    **fixed,
) -> dict[str, dict]:
    """A denoiser's arguments besides x and t, under the names of `guidance.denoiser`'s parameters. both: whether the
    two passes of a guided run share a batch, if their texts have the same length or the network is told their lengths.
    references: the latents of pictures to edit, the same for all passes. pictures: what IP-Adapters give. fixed: what
    else its `prepare` takes, the same for all passes."""
    sides = [arguments(model.text, text, request, negative=len(texts) == 2 and i == 0) for i, text in enumerate(texts)]
    if pictures:
        for side, which in zip(reversed(sides), ("prompt", "negative"), strict=False):
            side["pictures"] = [getattr(picture, which) for picture in pictures]
        fixed["spans"] = [picture.span for picture in pictures]
    if model.guidance == EMBEDDED:
        sides[0]["guidance_embedding"] = guidance_embedding(request.guidance, model.net.time_cond)
    if model.flow:
        fixed["size"] = model.latent_size(request)
    if model.guidance == INPUT:
        fixed["guidance"] = request.guidance
    if references:
        fixed["references"] = references
    lengths = model.text.qwen is not None and not model.text.qwen_padded

    def prepared(*sides: dict) -> dict:
        own = [side["context"].shape[1] for side in sides]
        longest = max(own)

        def joined(*values: mx.array) -> mx.array:
            return mx.concatenate([mx.repeat(value, request.count, axis=0) for value in values])

        def batch(name: str) -> mx.array | list:
            values = [longer(side[name], longest) if name == "context" else side[name] for side in sides]
            return tree_map(joined, *values)

        told = {"lengths": tuple(n for n in own for _ in range(request.count))} if lengths else {}
        return net.prepare(ts, **{name: batch(name) for name in sides[0]}, **fixed, **told)

    conds = {"cond": prepared(sides[-1])}
    both = both and (lengths or len({side["context"].shape[1] for side in sides}) == 1)
    if len(sides) == 2:
        conds |= {"both": prepared(*sides)} if both else {"uncond": prepared(sides[0])}
    return conds


def control(
    model: Description,
    net: nn.Module,
    guides: list[Guide],
    request: Request,
    pictures: list[mx.array],
    ts: list[float],
    texts: list[Text],
    sides: dict[str, dict],
    times: tuple[float, float],
    base: nn.Module,
) -> dict:
    """What a control adds to each of the conditions that `prepare` made, as its network says. guides: one, or several
    of a union. pictures: theirs, (1, H, W, 3) in [0, 1] each, or latents where the network reads them. sides: the
    conditions. times: it is on from the first down to the second. base: the denoiser."""

    def prepared(alone: bool = False, **fixed) -> dict[str, dict]:
        return prepare(model, net, request, ts, texts[-1:] if alone else texts, "both" in sides, **fixed)

    modes = net.config.modes
    return net.controls(
        Guiding(
            pictures,
            tasks=[modes.index(guide.mode) for guide in guides] if modes else [],
            scales=[guide.scale for guide in guides],
            times=times,
            guess=request.guess,
            guidance=None if model.guidance == INPUT else request.guidance,
            sides=sides,
            prepared=prepared,
            base=base,
            vae=model.components["vae"],
        )
    )
