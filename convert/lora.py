"""LoRA files and their relatives: every public spelling of a layer's name, and every public kind of change, to changes
of our parameters. A name is never taken apart: all spellings of all layers of the model are listed and looked up."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import description
from ..adapters import UNNAMED, Adapter, Change, Rows
from ..description import Description
from ..errors import Error
from ..families import MODELS
from ..models import build
from ..recipe import Recipe
from . import rules, source
from .registry import MODULES

# The end of a key -> what its tensor is: kohya's, peft's, diffusers' old and new, LyCORIS'. Those of LoHa and LoKr keep
# their names.
_ENDS = {
    "down": r"\.lora(_down|_A|\.down|_linear_layer\.down)(\.default)?\.weight",
    "up": r"\.lora(_up|_B|\.up|_linear_layer\.up)(\.default)?\.weight",
    "bias": r"\.(lora_B(\.default)?\.bias|diff_b|b_norm)",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "columns": r"\.dora_scale",
    "magnitude": r"\.lora_magnitude_vector(\.default)?(\.weight)?",
    "diff": r"\.(diff|w_norm)",
    "value": r"\.scale|(?<=_norm)\.weight",  # replaces the scale of a norm, in control LoRAs of Black Forest Labs
    **{n: rf"\.{n}(\.default)?" for n in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{f"lokr_{n}": rf"\.lokr_{n}(\.default)?" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
_ENDS = {kind: re.compile(rf"({pattern})$") for kind, pattern in _ENDS.items()}
# XLabs numbers the two streams of a block; diffusers once kept LoRA in attention processors.
_SPELLING: list[rules.Row] = [
    (r"^(base_model\.model\.|model\.(?=diffusion_model\.))", ""),
    (r"\.processor\.(qkv|proj)_lora1\.", r".img_attn.\1.lora."),
    (r"\.processor\.(qkv|proj)_lora2\.", r".txt_attn.\1.lora."),
    (r"\.processor\.qkv_lora\.", r".qkv.lora."),
    (r"\.processor\.proj_lora\.", r".linear2.lora."),
    (r"\.processor\.to_out_lora\.", ".to_out.0.lora."),
    (r"\.processor\.to_([qkv])_lora\.", r".to_\1.lora."),
    (r"(?<![a-z_])sformer_blocks\.", "transformer_blocks."),  # so cut in some files for FLUX.2
]
# What ComfyUI calls text encoders: the first and the second of a network.
_COMFY = {"clip": (("clip_l", "clip_h"), ("clip_g",)), "t5": (("t5xxl",),), "qwen3": (("qwen3_4b", "qwen3_8b"),)}
_AGAIN = "Use another copy of it."
_WORDS = 8  # that are shown of a header
_TRIGGER = "modelspec.trigger_phrase"
_MOST = 1e6  # of an alpha and of a rank; real ones have up to four digits


@dataclass(frozen=True)
class _Rows:
    """Rows of one of our parameters, and which of the equal parts of the stored tensor goes there."""

    parameter: str
    shape: tuple[int, ...]
    first: int
    part: int
    parts: int


@dataclass(frozen=True)
class _Place:
    """A layer of the model by one of its names: where its weight and its bias go."""

    component: str
    weight: tuple[_Rows, ...]
    bias: tuple[_Rows, ...]


class NoPlace(Error):
    """Tensors have no place in a model."""


class _File(NamedTuple):
    """What a file holds, and what each of its keys says: `_split`, which is slow, is done once for all models."""

    held: source.Weights
    keys: dict[str, tuple[str, str | None]]


def _open(path: Path) -> _File:
    held = source.read(path)
    return _File(held, {key: _split(key) for key in held.tensors})


def read(path: Path, model: Description) -> Adapter:
    """The changes that a file makes to a model. Raises unless every tensor of the file has a place in it."""
    return _read(path, _open(path), model)


def _read(path: Path, file: _File, model: Description) -> Adapter:
    places = _places(model)
    stored: dict[str, dict[str, source.Tensor]] = {}  # layer -> what is stored of it
    strange = []
    for key, tensor in file.held.tensors.items():
        name, kind = file.keys[key]
        if name not in places:
            strange.append(key)
        elif not tensor.floating:
            raise Error(f"{key!r} in {path} is {tensor.dtype}, where a floating-point type is needed.", _AGAIN)
        elif kind in stored.setdefault(name, {}):
            raise Error(f"{path} holds two tensors for {kind!r} of {name!r}.", _AGAIN)
        else:
            stored[name][kind] = tensor
    if strange or not stored:
        raise _no_place(path, model, strange, file.keys)
    alphas = _Alphas(path, file.held.metadata)
    changes: dict[str, dict[str, list[Change]]] = {}
    layers: dict[str, int] = {}
    ranks = set()
    moves = False
    wider = {} if model.wider is None else {model.family.first: model.wider[1]}
    for name, tensors in stored.items():
        place, layer = places[name], _Layer(path, name, tensors)
        layers[place.component] = layers.get(place.component, 0) + 1
        ranks |= {tensors["down"].shape[0]} if "down" in tensors else set()
        for rows, change in layer.changes(place, alphas, wider):
            changes.setdefault(place.component, {}).setdefault(rows.parameter, []).append(change)
        moves |= layer.moves
    if not moves:
        raise Error(f"{path} changes nothing: all of its numbers are 0.", _AGAIN)
    numbers = sum(math.prod(t.shape) for tensors in stored.values() for t in tensors.values())
    phrase = file.held.metadata.get(_TRIGGER)
    words = (phrase,) if phrase else ()
    return Adapter(_called(path), changes, layers, tuple(sorted(ranks)), numbers * mx.float32.size, words)


def _called(path: Path) -> str:
    """The file's name or, where every file has the same, its folder's."""
    if path.name not in UNNAMED:
        return path.stem
    folder = path.absolute().parent
    return folder.parents[1].name.rpartition("--")[2] if folder.parent.name == "snapshots" else folder.name  # the hub's


def recognise(path: Path) -> bool:
    """Whether a file is of this kind, from its names."""
    return path.is_file() and any(_split(key)[1] not in (None, "value", "alpha") for key in source.read(path).tensors)


def describe(path: Path) -> dict:
    """What a file is: the named models that it fits, what it changes in them, and the words that it was trained on."""
    fits, adapter, wrong, file = [], None, None, _open(path)
    for name in MODELS:
        try:
            adapter = _read(path, file, description.published(name, Recipe("float32", None)))
        except Error as e:
            wrong = e if wrong is None or isinstance(wrong, NoPlace) else wrong
        else:
            fits.append(name)
    if adapter is None:
        raise wrong
    return {"path": str(path), "fits": fits, "layers": adapter.layers, "ranks": adapter.ranks, "words": _words(path)}


def _words(path: Path) -> list[str]:
    """The words that a trainer noted in the header: the trigger phrase, or the most frequent tags."""
    notes = source.read(path).metadata
    if _TRIGGER in notes:
        return [notes[_TRIGGER]]
    try:
        folders = json.loads(notes.get("ss_tag_frequency", "{}"))
        counts = [(n, tag) for tags in folders.values() for tag, n in tags.items() if isinstance(n, int)]
    except (ValueError, RecursionError, AttributeError):
        return []
    return [tag.strip() for _, tag in sorted(counts, key=lambda pair: -pair[0])[:_WORDS]]


def _split(key: str) -> tuple[str, str | None]:
    """A key's layer, in the spelling that `_places` lists, and what its tensor is."""
    (key,) = rules.rename(key, _SPELLING)
    return next(((key[: m.start()], kind) for kind, end in _ENDS.items() if (m := end.search(key))), (key, None))


# ---- the names of a model's layers


def layers(component: str, config: build.Config) -> dict[str, Rows]:
    """The layers of a network that multiply, by their names in diffusers and transformers. Where our layer is several
    of theirs in one, each is some of its rows."""
    module, places = MODULES[build.name_of(config)], _layers(component, config)
    pointwise = module.pointwise(config) if hasattr(module, "pointwise") else ()
    others = module.layers(config) if hasattr(module, "layers") else []
    ours = [name for name in places if name not in others]
    found = {}
    for name in others if any(re.search(module.ORIGINAL, f"{n}.") for n in ours) else ours:
        (rows, *more) = places[name].weight if name in places and places[name].weight else (None,)
        if rows is not None and not more and rows.parts == 1 and len(rows.shape) in (2, 4):
            kernel = rows.shape[1:3] if len(rows.shape) == 4 else None
            kernel = (1, 1) if name.rpartition(".")[2] in pointwise else kernel
            (name,) = rules.rename(name, getattr(module, "PUBLISHED", []))
            found[name] = Rows(rows.parameter.rpartition(".")[0], rows.first, rows.shape[0], kernel)
    return found


def _places(model: Description) -> dict[str, _Place]:
    """Every spelling of every layer."""
    places: dict[str, _Place] = {}
    encoders = [*model.text.encoders]
    for component, config in model.components.items():
        if component == "vae":
            continue
        dotted, scored = [f"{component}."], []
        if component == model.family.denoiser:
            dotted += ["", "unet.", "transformer.", "diffusion_model."]
            scored += ["lora_unet_", "lora_transformer_", "lycoris_"]
        else:
            n, network = encoders.index(component) + 1, model.text.encoders[component]
            scored += [f"lora_te{n}_", *["lora_te_"] * (n == 1), *["lora_te3_"] * (network == "t5")]
            before = [name for name in encoders[: n - 1] if model.text.encoders[name] == network]
            dotted += [f"text_encoders.{name}.transformer." for name in _COMFY[network][len(before)]]
            inside = "model" if network == "qwen3" else "text_model"
            dotted += [f"{prefix}{inside}." for prefix in dotted]
            scored += [f"{prefix}{inside}_" for prefix in scored]
        for name, place in _layers(component, config).items():
            places |= {f"{prefix}{name}": place for prefix in dotted}
            places |= {f"{prefix}{name.replace('.', '_')}": place for prefix in scored}
    return places


@cache
def _layers(component: str, config: build.Config) -> dict[str, _Place]:
    """The layers of a network by our names and by those of other layouts."""
    module = MODULES[build.name_of(config)]
    shapes = {name: tuple(v.shape) for name, v in tree_flatten(build.build(config).parameters())}
    ours = [name.rpartition(".")[0] for name in shapes if name.endswith((".weight", ".scale"))]
    others = module.layers(config) if hasattr(module, "layers") else []
    table = module.table([f"{name}.weight" for name in others], config)
    pieces: dict[str, int] = {}  # parameter -> how many pieces other layouts have of it

    def targets(name: str, leaf: str) -> list[tuple[str, int, int, int]]:
        to = [rules.target(t) for t in rules.rename(f"{name}.{leaf}", table)]
        return [(t, n, i, len(to)) for i, (t, n, _) in enumerate(to) if t in shapes]

    found = {name: {leaf: targets(name, leaf) for leaf in ("weight", "bias")} for name in others}
    for to in (t for leaves in found.values() for ts in leaves.values() for t in ts):
        pieces[to[0]] = max(pieces.get(to[0], 1), to[1] + 1)

    def rows(parameter: str, n: int, part: int, parts: int) -> _Rows:
        """The n-th piece. All but the last have as many rows as the layer has columns."""
        shape = shapes[parameter]
        if pieces.get(parameter, 1) == 1:
            return _Rows(parameter, shape, 0, part, parts)
        size = shapes[f"{parameter.rpartition('.')[0]}.weight"][1]
        last = n == pieces[parameter] - 1
        return _Rows(parameter, (shape[0] - n * size if last else size, *shape[1:]), n * size, part, parts)

    layers = {}
    for name in ours:
        weight = f"{name}.weight" if f"{name}.weight" in shapes else f"{name}.scale"
        whole = [(_Rows(p, shapes[p], 0, 0, 1),) if p in shapes else () for p in (weight, f"{name}.bias")]
        layers[name] = _Place(component, *whole)
    for name, to in found.items():
        if to["weight"]:
            layers[name] = _Place(component, *(tuple(rows(*t) for t in to[leaf]) for leaf in ("weight", "bias")))
    return layers


def _no_place(path: Path, model: Description, strange: list[str], keys: dict[str, tuple[str, str | None]]) -> NoPlace:
    """The error for keys without a place. It names the family in which most of the keys have one."""
    what = f"{len(strange)} of the {len(keys)} tensors of {path} have no place in {model.name}"
    example = f" (such as {strange[0]!r})" if strange else ""
    fits = {}
    for name, row in MODELS.items():
        if row.family is not model.family and row.family.title not in fits:
            places = _places(description.published(name, Recipe("float32", None)))
            fits[row.family.title] = sum(name in places for name, _ in keys.values())
    best = max(fits, key=fits.get, default=None)
    if best is not None and fits[best] > len(keys) - len(strange):
        return NoPlace(f"{what}{example}.", f"It seems to be made for {best}: use it with such a model.")
    return NoPlace(f"{what}{example}.", "Use a LoRA that was made for this family of models.")


# ---- what is stored of one layer


class _Alphas:
    """What a file says of its scales beside its tensors: peft's settings, in the header or in a file beside it."""

    def __init__(self, path: Path, metadata: dict[str, str]):
        beside = path.parent / "adapter_config.json"
        text = metadata.get("lora_adapter_metadata")
        try:
            values = json.loads(text) if text is not None else {}
        except (ValueError, RecursionError):
            raise Error(f"The header of {path} has a lora_adapter_metadata that is not JSON.", _AGAIN) from None
        if text is None and beside.is_file():
            values = source.read_json(beside)
        self.path, self.values = path, values if isinstance(values, dict) else {}

    def scale(self, name: str, rank: int | None) -> float:
        """The factor of a layer that stores no alpha. rank: None if no tensor shows it."""
        component, _, rest = name.partition(".")
        own = f"{component}.lora_alpha" in self.values  # diffusers keeps the settings of several networks
        prefix, layer = (f"{component}.", rest) if own else ("", name)
        alpha = self._number(prefix, "lora_alpha" if f"{prefix}lora_alpha" in self.values else "alpha", layer)
        rank = self._number(prefix, "r", layer) if rank is None else rank
        if alpha is None or rank is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.values.get(f"{prefix}use_rslora") is True else rank)

    def _number(self, prefix: str, key: str, layer: str) -> float | None:
        value = self.values.get(f"{prefix}{key}")
        patterns = self.values.get(f"{prefix}{'rank' if key == 'r' else 'alpha'}_pattern")
        names = layer.split(".")
        for i in range(len(names)) if isinstance(patterns, dict) else ():  # the last names of the layer, longest first
            if (pattern := ".".join(names[i:])) in patterns:
                value = patterns[pattern]
                break
        if value is not None and (type(value) not in (int, float) or not 0 < abs(value) <= _MOST):
            raise Error(f"{self.path}: its settings say {key} {value!r:.40}, which cannot be.", _AGAIN)
        return value


class _Layer:
    """What a file stores of one layer."""

    def __init__(self, path: Path, name: str, tensors: dict[str, source.Tensor]):
        self.path, self.name, self.shapes = path, name, {kind: t.shape for kind, t in tensors.items()}
        for kind, shape in self.shapes.items():
            if 0 in shape or (shape == () and kind != "alpha"):
                raise self.wrong(f"has {kind} of shape {shape}, which holds nothing to apply")
        if math.prod(self.shapes.get("alpha", ())) != 1:
            raise self.wrong(f"has an alpha of shape {self.shapes['alpha']}, which is no number")
        self.values = {kind: self._sound(kind, t) for kind, t in tensors.items()}

    def _sound(self, kind: str, tensor: source.Tensor) -> mx.array:
        value = tensor.read().astype(mx.float32)
        if not mx.isfinite(value).all().item():
            raise Error(f"{tensor.name!r} in {self.path} has numbers that are NaN or infinite.", _AGAIN)
        return value

    @property
    def moves(self) -> bool:
        """Whether it changes anything."""
        last = [k for k in self.values if k not in ("alpha", "down", "mid", "columns", "magnitude", "value")]
        pairs = [k for k in last if not k.startswith("hada") or k in ("hada_w1_b", "hada_w2_b")]
        if "alpha" in self.values and self.values["alpha"].item() == 0:
            pairs = [k for k in pairs if k in ("bias", "diff")]
        return "value" in self.values or any(bool((self.values[k] != 0).any().item()) for k in pairs)

    def wrong(self, what: str) -> Error:
        return Error(f"{self.path}: {self.name} {what}.", _AGAIN)

    def changes(self, place: _Place, alphas: _Alphas, wider: dict[str, int]) -> Iterator[tuple[_Rows, Change]]:
        """wider: how many columns a change may make of a parameter's."""
        left = set(self.values)
        if "value" in left:
            yield from self._spread(place.weight, lambda: self.values["value"], replaces=True)
            left.discard("value")
        if "bias" in left:
            if not place.bias:
                raise self.wrong("has a change of its bias, but in this model it has no bias")
            yield from self._spread(place.bias, lambda: self.values["bias"])
            left.discard("bias")
        if left:
            yield from self._weight(place.weight, left, alphas, wider)

    def _weight(
        self, places: tuple[_Rows, ...], left: set[str], alphas: _Alphas, wider: dict[str, int]
    ) -> Iterator[tuple[_Rows, Change]]:
        magnitude = next((k for k in ("columns", "magnitude") if k in left), None)
        if {"down", "up"} <= left:
            used = {"down", "up", "mid"}
            changes = self._pair(places, self._scale(left, self.values["down"].shape[0], alphas), magnitude, wider)
        else:
            used, product = self._product(left, alphas)
            changes = self._spread(places, product, magnitude)
        if rest := left - used - {"alpha", magnitude}:
            raise self.wrong(f"also has {', '.join(sorted(rest))}, which do not belong together")
        yield from changes

    def _product(self, left: set[str], alphas: _Alphas) -> tuple[set[str], Callable[[], mx.array]]:
        """Which tensors are multiplied to make a change of full rank, and what makes it."""
        if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= left:
            return self._hadamard(left, alphas)
        if any(k.startswith("lokr") for k in left):
            return self._kronecker(left, alphas)
        if "diff" in left:
            return {"diff"}, lambda: self.values["diff"]
        raise self.wrong(f"lacks the other half of {', '.join(sorted(left))}")

    def _pair(
        self, places: tuple[_Rows, ...], scale: float, magnitude: str | None, wider: dict[str, int]
    ) -> Iterator[tuple[_Rows, Change]]:
        """LoRA and LoCon: up @ down, kept as two where both and the layer are linear."""
        linear = "mid" not in self.values and all(len(rows.shape) == 2 for rows in places)
        down, up = (
            x.reshape(*x.shape[:2]) if math.prod(x.shape[2:]) == 1 else x for x in map(self.values.get, ("down", "up"))
        )
        if linear and down.ndim == up.ndim == 2:
            self._agree(up.shape[1] == down.shape[0], "down", "up")
            yield from self._low(places, down, scale * up, magnitude, wider)
        else:
            yield from self._spread(places, lambda: scale * self._convolved(), magnitude)

    def _hadamard(self, left: set[str], alphas: _Alphas) -> tuple[set[str], Callable[[], mx.array]]:
        """LoHa: two products of low rank, multiplied number by number."""
        scale = self._scale(left, self.values["hada_w1_b"].shape[0], alphas)
        factors = [(f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2)]

        def product() -> mx.array:
            one, two = (self._tucker(*names) for names in factors)
            self._agree(one.shape == two.shape, "hada_w1_a", "hada_w2_a")
            return scale * one * two

        return {name for names in factors for name in names}, product

    def _kronecker(self, left: set[str], alphas: _Alphas) -> tuple[set[str], Callable[[], mx.array]]:
        """LoKr: a Kronecker product, whose factors are stored whole or as products of low rank."""
        used, factors, ranks = set(), [], []
        for n in ("1", "2"):
            whole, a, b, core = f"lokr_w{n}", f"lokr_w{n}_a", f"lokr_w{n}_b", f"lokr_t{n}"
            if whole in left:
                used.add(whole)
                factors.append(lambda whole=whole: self.values[whole])
            elif {a, b} <= left:
                used |= {a, b, core}
                factors.append(partial(self._tucker, a, b, core))
                ranks.append(self.values[b].shape[0])
            else:
                raise self.wrong(f"lacks {whole}")
        whole = not ranks and "alpha" in left  # LyCORIS stores an alpha for whole factors too, and ignores it
        scale = 1.0 if whole else self._scale(left, ranks[-1] if ranks else None, alphas)

        def product() -> mx.array:
            one, two = (make() for make in factors)
            if max(one.shape) * max(two.shape) >= 2**31:  # which MLX cannot make
                raise self.wrong("has factors whose product is too large")
            return scale * mx.kron(one.reshape(*one.shape, *[1] * (two.ndim - one.ndim)), two)

        return used, product

    def _scale(self, left: set[str], rank: int | None, alphas: _Alphas) -> float:
        if "alpha" not in left:
            return alphas.scale(self.name, rank)
        alpha = self.values["alpha"].item()
        if abs(alpha) > _MOST:
            raise self.wrong(f"has an alpha of {alpha:g}, which cannot be")
        return alpha / rank

    def _agree(self, fits: bool, *kinds: str) -> None:
        if not fits:
            raise self.wrong(" and ".join(f"has {k} of shape {self.shapes[k]}" for k in kinds) + ", which do not fit")

    def _convolved(self) -> mx.array:
        """The change of a convolution, (out, in, h, w)."""
        down, up = self.values["down"], self.values["up"]
        mid = self.values.get("mid")
        fits = down.ndim == up.ndim == 4 and up.shape[2:] == (1, 1)
        if mid is None:
            self._agree(fits and up.shape[1] == down.shape[0], "down", "up")
            return mx.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
        fits = fits and mid.ndim == 4 and down.shape[2:] == (1, 1)
        self._agree(fits and mid.shape[:2] == (up.shape[1], down.shape[0]), "down", "up", "mid")
        return mx.einsum("oa,abhw,bi->oihw", up[:, :, 0, 0], mid, down[:, :, 0, 0])

    def _tucker(self, a: str, b: str, t: str) -> mx.array:
        """a @ b, or with a core t (r, r, h, w): LoHa's and LoKr's forms of a convolution."""
        left, right = self.values[a], self.values[b]
        if t not in self.values:
            flat = right.reshape(right.shape[0], -1) if right.ndim > 1 else right
            self._agree(left.ndim == 2 and flat.ndim == 2 and left.shape[1] == flat.shape[0], a, b)
            return left @ flat if right.ndim == 2 else (left @ flat).reshape(left.shape[0], *right.shape[1:])
        middle = self.values[t]
        fits = left.ndim == right.ndim == 2 and middle.ndim == 4
        self._agree(fits, a, b, t)
        if t == "lokr_t2" or left.shape[0] == middle.shape[1]:  # a (r, out), b (r, in)
            self._agree(middle.shape[:2] == (left.shape[0], right.shape[0]), a, b, t)
            return mx.einsum("ijhw,jq,ip->pqhw", middle, right, left)
        raise self.wrong(f"has {a} of shape {self.shapes[a]}, which does not fit {t} {self.shapes[t]}")

    def _low(
        self, places, down: mx.array, up: mx.array, magnitude: str | None, wider: dict[str, int]
    ) -> Iterator[tuple[_Rows, Change]]:
        for rows in places:
            cut, columns = self._part(up, rows, (up.shape[0], down.shape[1])), down.shape[1]
            widens = columns if columns == wider.get(rows.parameter) and magnitude is None else 0
            if (cut.shape[0], columns) != (rows.shape[0], widens or rows.shape[1]):
                raise self._misfit((up.shape[0] // rows.parts, columns), rows)
            change = self._magnitude(magnitude, rows)
            yield rows, Change(rows.first, rows.shape[0], (down, cut), magnitude=change, widens=widens)

    def _spread(
        self, places, make: Callable[[], mx.array], magnitude: str | None = None, replaces: bool = False
    ) -> Iterator[tuple[_Rows, Change]]:
        """make: gives the stored change. It is called once here, which computes nothing, for the sake of its shape."""
        whole = make()
        for rows in places:
            cut = self._fitted(whole, rows)
            if cut is None:
                raise self._misfit(self._part(whole, rows, whole.shape).shape, rows)
            lengths = self._magnitude(magnitude, rows)
            full = partial(lambda rows: self._fitted(make(), rows), rows)
            yield rows, Change(rows.first, rows.shape[0], full=full, magnitude=lengths, replaces=replaces)

    def _fitted(self, value: mx.array, rows: _Rows) -> mx.array | None:
        """A stored change in the shape of our rows; None if it has another size."""
        cut = self._part(value, rows, value.shape)
        if cut.ndim == 2 and len(rows.shape) == 4 and cut.size == math.prod(rows.shape):
            o, h, w, i = rows.shape
            cut = cut.reshape(o, i, h, w)  # LoHa and LoKr may store a flat kernel
        return rules.fit(cut, rows.shape)

    def _part(self, value: mx.array, rows: _Rows, shape: tuple[int, ...]) -> mx.array:
        if rows.parts == 1:
            return value
        if value.shape[0] % rows.parts:
            raise self._misfit(shape, rows)
        size = value.shape[0] // rows.parts
        return value[rows.part * size : (rows.part + 1) * size]

    def _magnitude(self, kind: str | None, rows: _Rows) -> mx.array | None:
        """DoRA's lengths, ready to multiply our rows. LyCORIS may store one for each column instead."""
        if kind is None:
            return None
        value, ones = self.values[kind], [1] * (len(rows.shape) - 1)
        by_rows = kind == "magnitude" or value.shape[0] == rows.shape[0] * rows.parts
        if by_rows and value.size == rows.shape[0] * rows.parts:
            return self._part(value.reshape(-1), rows, value.shape).reshape(-1, *ones)
        if not by_rows and value.size == rows.shape[-1] and rows.parts == 1:
            return value.reshape(1, *ones[1:], -1)
        raise self._misfit(value.shape, rows)

    def _misfit(self, shape: tuple[int, ...], rows: _Rows) -> Error:
        return Error(
            f"{self.path}: {self.name} has a change of shape {tuple(shape)}; {rows.parameter} takes {rows.shape}.",
            "Use a LoRA that was made for this family of models.",
        )
