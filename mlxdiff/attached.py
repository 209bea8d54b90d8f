"""What a request names beside its model: LoRAs, taught words, and the pictures and networks that guide it. They are
found, read once, and compared with the fingerprints of a replay."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from PIL.Image import Image

from . import conditioning, detect, dialects, foreign, images, memory
from .adapters import Adapter, Word
from .description import Description
from .dialects import embedding, lora
from .errors import Error
from .guides import MASKED, Guide
from .models.build import Config
from .models.controlnet import ALIASES, INPAINT
from .references import References
from .request import Request

Names = Sequence[str]
Progress = Callable[[str, int, int], None]


class Attached:
    """Those of one model. loras, embeddings: of requests that do not say."""

    def __init__(self, folder: Path, model: Description, offline: bool):
        self.folder, self.model, self.offline = folder, model, offline
        self.loras: tuple[str, ...] = ()
        self.embeddings: tuple[str, ...] = ()
        self.lora_dir: Path | None = None  # where their names are looked up, in place of MLXDIFF_LORAS
        self.progress: Progress | None = None  # is told of the download of a network that guides
        self.references = References(model, offline)
        self._opened: dict[tuple, tuple] = {}  # name -> its file's time and size, then what it holds
        # Of the last request's guides, by their fingerprints and what was made of them.
        self._pictures: dict[tuple[str, str | None], Image] = {}
        self._networks: dict[Path, nn.Module] = {}  # those that guide

    def resolve(self, request: Request) -> Request:
        """The request with the LoRAs that its prompt names and those that the model was loaded with, and with the
        fingerprints of all files."""
        request, loras = settled(request, self.loras, self.model, self.lora_dir)
        words = tuple(self.embeddings if request.embeddings is None else request.embeddings)
        taught = [self._word(*embedding(text)) for text in words]
        if taught:  # a word that cannot be taught is refused here, not in the run
            toks = conditioning.load_tokenizers(self.model.text, self.folder, t5=False)
            conditioning.teach_tokenizers(toks, [word for word, _ in taught], self.model.components)
        lora_hashes = tuple(self._lora(name)[1] for name, _ in loras)
        embedding_hashes = tuple(found for _, found in taught)
        _same("LoRA", "loras", request.lora_hashes, lora_hashes)
        _same("embedding", "embeddings", request.embedding_hashes, embedding_hashes)
        request.check_guides()
        pictures = {}
        controls = tuple(self._guide(guide, "control", pictures) for guide in request.controls)
        references = tuple(self._guide(guide, "reference", pictures) for guide in request.references)
        self._pictures = pictures
        used = {self._key(name) for name, _ in loras} | {embedding(text) for text in words}
        self._opened = {key: held for key, held in self._opened.items() if key in used or key[0] == "control"}
        return replace(
            request,
            controls=controls,
            references=references,
            loras=tuple(f"{name}:{scale:g}" for name, scale in loras),
            lora_hashes=lora_hashes,
            embeddings=words,
            embedding_hashes=embedding_hashes,
        )

    def adapters(self, request: Request) -> list[tuple[Adapter, float]]:
        """The LoRAs of a resolved request, with their scales."""
        return [(self._lora(name)[0], scale) for name, scale in map(lora, request.loras or ())]

    def notes(self, request: Request) -> list[str]:
        """For people: what the named LoRAs of a resolved request were made for, and which of its settings differ."""
        from .store import adapters as store

        notes = []
        for name, _ in map(lora, request.loras or ()):
            row = store.published(name, self.model, self.lora_dir)
            if row is not None and row.wants:
                wants = ", ".join(f"{key} {_short(value)}" for key, value in row.wants.items())
                others = [k for k, v in row.wants.items() if getattr(request, k) != v]
                differs = ", ".join(f"{key} {_short(getattr(request, key))}" for key in others)
                notes.append(f"{name} was made for {wants}." + (f" This picture has {differs}." if others else ""))
        return notes

    def words(self, request: Request) -> list[Word]:
        """The taught words of a resolved request."""
        return [self._word(*embedding(text))[0] for text in request.embeddings or ()]

    def taught(self, request: Request) -> list[str]:
        """What these words are called, and those that the LoRAs were trained on."""
        learned = [word for adapter, _ in self.adapters(request) for word in adapter.words]
        return [word.word for word in self.words(request)] + learned

    def _guide(self, guide: Guide, what: str, pictures: dict[tuple, Image]) -> Guide:
        """A guide with its fingerprints. Its picture goes into `pictures`."""
        _check_picture(guide, what, self.model)
        picture = None if guide.masked else images.read(guide.image)
        found, network = picture and images.fingerprint(picture), None
        if what == "reference":
            network = self.references.reader(guide, self.progress).hash
        elif guide.model is not None:
            _, config, network = self.control(guide)
            guide = replace(guide, mode=self._mode(guide, config.modes))
            _check_masked(guide, self.model, config)
        for wanted, given, which in ((guide.hash, found, "picture"), (guide.model_hash, network, "network")):
            if wanted not in (None, given):
                problem = f"The {which} of {what} {guide} is not the one that these settings name."
                raise Error(problem, f"Give that one as `{what}s=[...]`.")
        key = found, guide.detect
        if picture is not None:
            pictures[key] = self._pictures[key] if key in self._pictures else self._made(guide, picture)
        return replace(guide, hash=found, model_hash=network)

    def _mode(self, guide: Guide, modes: tuple[str, ...]) -> str | None:
        """The kind of picture that a guide shows. Raises unless its network needs to be told and knows it."""
        from .store import guides as store

        row = store.row(guide.model, self.model, "control")
        mode = row.mode if guide.mode is None and row is not None else guide.mode
        mode = ALIASES.get(mode, mode) if mode not in modes else mode
        if mode is not None and not modes:
            raise Error(f"{guide.model} reads one kind of picture; {mode!r} was given.", "Leave the kind out.")
        if modes and mode not in modes:
            problem = "no kind was given" if mode is None else f"{mode!r} was given"
            first = f"`controls=[('{guide.model}:{modes[0]}', PICTURE)]`"
            raise Error(
                f"{guide.model} must be told which kind of picture it reads; {problem}.",
                f"Name one of {', '.join(modes)}: {first}.",
            )
        return mode

    def picture(self, guide: Guide) -> Image | None:
        """The picture of a resolved guide; None if it is the masked start image."""
        if guide.masked:
            return None
        key = guide.hash, guide.detect
        return self._pictures[key] if key in self._pictures else self._made(guide, images.read(guide.image))

    def _made(self, guide: Guide, picture: Image) -> Image:
        """The picture, or the control picture that is made of it."""
        if guide.detect is None:
            return picture
        return detect.run(guide.detect, picture, offline=self.offline, progress=self.progress)

    def control(self, guide: Guide) -> tuple[Path, Config, str]:
        """Where a control's network is, its Config and its fingerprint. The Config is read once, and again if a file
        has changed."""
        from .store import guides as store

        path = store.control_folder(guide.model, self.model, self.offline, self.progress)
        files = sorted(path.glob("*")) if path.is_dir() else [path]
        stamp = [(f.name, foreign.stamp(f)) for f in files if f.is_file()]
        key = ("control", str(guide.model))
        if self._opened.get(key, (None,))[0] != stamp:
            self._networks.pop(path, None)
            self._opened[key] = stamp, (path, *store.control(path, self.model))
        return self._opened[key][1]

    def encoded(self, request: Request) -> list[tuple[Image | None, Config, str | None]]:
        """Of the controls whose networks read latents: the picture, the network's Config, the kind of picture."""
        named = [(guide, self.control(guide)[1]) for guide in request.controls if guide.model is not None]
        return [(self.picture(guide), config, guide.mode) for guide, config in named if config.reads_latents]

    def check_size(self, request: Request) -> None:
        """Raise unless the networks that guide can read pictures of a resolved request's size."""
        for guide in request.controls:
            n = 1 if guide.model is None else self.control(guide)[1].multiple
            if request.width % n or request.height % n:
                w, h = (max(n, edge // n * n) for edge in (request.width, request.height))
                problem = f"{guide.model} reads edges in multiples of {n}; the picture has"
                raise Error(f"{problem} {request.width}x{request.height}.", f"Use {w}x{h}.")

    def networks(self, request: Request) -> list[Path]:
        """Where the networks are that a resolved request's controls need and that are not open. Others are closed."""
        needed = [self.control(guide)[0] for guide in request.controls if guide.model is not None]
        self._networks = {path: net for path, net in self._networks.items() if path in needed}
        return [path for path in dict.fromkeys(needed) if path not in self._networks]

    def open(self, path: Path) -> None:
        """Read a network that guides."""
        from .store import guides as store

        self._networks[path] = network = store.control_network(path, self.model)
        mx.eval(network.parameters())

    def network(self, guide: Guide) -> nn.Module:
        """The open network of a control."""
        return self._networks[self.control(guide)[0]]

    def together(self, controls: Sequence[Guide]) -> list[list[Guide]]:
        """The controls, those together that one network reads at once: a union's, if they guide in the same steps."""
        groups: dict[tuple, list[Guide]] = {}
        for i, guide in enumerate(guide for guide in controls if guide.model is not None):
            path, config, _ = self.control(guide)
            joins = config.modes and not config.reads_latents
            groups.setdefault((path, guide.interval) if joins else (i,), []).append(guide)
        return list(groups.values())

    def release(self) -> None:
        """Close the networks that guide."""
        self._networks = {}
        mx.clear_cache()

    def _lora(self, name: str) -> tuple[Adapter, str]:
        """A LoRA and its fingerprint."""
        from .store import adapters as store

        return self._once(store.lora, "LoRA", *self._key(name))

    def _key(self, name: str) -> tuple[str, str | None]:
        """A LoRA, and the name that it has in place of its file's."""
        from .store import adapters as store

        return name, None if store.published(name, self.model, self.lora_dir) is None else name

    def _word(self, name: str, word: str | None) -> tuple[Word, str]:
        """A taught word and its fingerprint."""
        from .store import adapters as store

        return self._once(store.embedding, "embedding", name, word)

    def _once(self, read: Callable, what: str, name: str, *more) -> tuple:
        """What `read` makes of a file, which is read once, and again if it has changed."""
        from .store import adapters as store

        place = {"offline": self.offline, "folder": self.lora_dir, "progress": self.progress}
        path, key = store.find(name, what, self.model, **place), (name, *more)
        stamp = foreign.stamp(path)
        if self._opened.get(key, (None,))[0] != stamp:
            self._opened[key] = stamp, read(path, self.model, *more)
        return self._opened[key][1]


def _same(what: str, setting: str, wanted: Names, found: Names) -> None:
    if wanted and tuple(wanted) != tuple(found):
        raise Error(f"The {what} files are not those of these settings.", f"Give those files as `{setting}=[FILE]`.")


def readers(request: Request | None, model: Description) -> tuple[memory.Reader, ...]:
    """The networks that read a request's references, for the memory estimate: by their Configs; of those that are not
    here, by their bytes in 16 bits, if these are known. Raises for one that is here and does not fit."""
    from .store import guides as store

    found, references = [], References(model, offline=True)
    for guide in () if request is None else request.references:
        _check_picture(guide, "reference", model)
        references.check(guide)
        if isinstance(store.locate(guide.model, model, "reference"), Path):
            found.append(references.reader(guide).workload)
        elif (row := store.row(guide.model, model, "reference")) is not None:
            found.append(memory.Reader(int((row.size + row.encoder) * 1e9), row.tokens))
    return tuple(found)


def beside(request: Request | None, model: Description) -> tuple[Config | int, ...]:
    """The networks that guide a request, for the memory estimate, by their Configs; of those that are not here, the
    bytes that they take in 16 bits, if that is known. Raises for one that is here and does not fit."""
    from .store import guides as store

    found = []
    for guide in () if request is None else request.controls:
        _check_picture(guide, "control", model)
        if guide.model is None:
            continue
        path = store.locate(guide.model, model, "control")
        config = store.control(path, model)[0] if isinstance(path, Path) else None
        _check_masked(guide, model, config)
        if config is not None:
            found.append(config)
        elif (row := store.row(guide.model, model, "control")) is not None:
            found.append(int(row.size * 1e9))
    return tuple(found)


def _check_picture(guide: Guide, what: str, model: Description) -> None:
    """Raise if the only word of a guide names a network."""
    from .store import guides as store

    if guide.model is not None or not isinstance(guide.image, str):
        return
    if (row := store.row(guide.image, model, what)) is not None:
        shown = repr(MASKED) if row.masked else "PICTURE"
        problem = f"{guide.image} is a network, and the picture that it should read is missing."
        raise Error(problem, f"Give both: `{what}s=[({guide.image!r}, {shown})]`.")


def _check_masked(guide: Guide, model: Description, config: Config | None) -> None:
    """Raise if a network that was made to inpaint is not shown the masked start image, or if another one is. config:
    None if it is not here yet; then its name may show it."""
    from .store import guides as store

    row = store.row(guide.model, model, "control")
    if row is None and config is None:
        return
    if row is not None:
        reads = needs = row.masked
    else:
        kind = ALIASES.get(guide.mode, guide.mode)
        reads, needs = config.hole is not None and (not config.modes or kind == INPAINT), config.reads_mask
    if guide.masked and not reads:
        raise Error(f"{guide.model} was not made to inpaint: it reads no mask.", "Give it a picture of its own.")
    if needs and not guide.masked:
        problem = f"{guide.model} was made to inpaint: it reads the start image and the mask, and no other picture."
        raise Error(problem, f"Give it as `controls=[({str(guide.model)!r}, '{MASKED}')]`.")


def settled(
    request: Request, loaded: Names, model: Description, folder: Path | None
) -> tuple[Request, list[tuple[str, float]]]:
    """The LoRAs of a request, with their scales, and the request with the settings that a published one brings, where
    it has no others, and without LoRAs in its prompt. loaded: those of requests that do not say. Raises for one that
    does not fit the model, as far as no file shows it: this reads none."""
    from .store import adapters as store

    request.check_adapters()
    prompt, named = dialects.loras(request.prompt) if isinstance(request.prompt, str) else (request.prompt, [])
    loras = [*map(lora, [*(loaded if request.loras is None else request.loras), *named])]
    names = [name for name, _ in loras]
    if len(set(names)) < len(names):
        again = next(name for i, name in enumerate(names) if name in names[:i])
        raise Error(f"The LoRA {again} is named twice.", "Name it once, with the scale that it should have.")
    for name in names:
        store.check(name, "LoRA", model, folder)
    rows = [store.published(name, model, folder) for name in names]
    scales = [store.scale(row, scale) for row, (_, scale) in zip(rows, loras, strict=True)]
    wants = next((row.wants for row in rows if row is not None and row.wants), {})
    if request.sampler is not None:
        wants.pop("schedule", None)  # that one belongs to its sampler
    open_ones = {key: value for key, value in wants.items() if getattr(request, key) is None}
    return replace(request, prompt=prompt, **open_ones), [*zip(names, scales, strict=True)]


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def changes(
    loras: Names, request: Request | None, model: Description, folder: Path | None
) -> tuple[Adapter | int, ...]:
    """The LoRAs of a request, for the memory estimate; of those that are not here, the bytes that they take in 16 bits,
    if that is known. Raises for one that is here and does not fit."""
    from .store import adapters as store

    found = []
    for name, _ in settled(Request("") if request is None else request, loras, model, folder)[1]:
        if (path := store.here(name, folder)) is not None:
            found.append(store.lora(path, model)[0])
        elif (row := store.named(name, model)) is not None:
            found.append(int(row.size * 1e9))
    return tuple(found)


def under(loras: Names, request: Request | None, model: Description, folder: Path | None) -> Description:
    """A model as LoRAs make it. If one is not here yet, the model counts as one that reads a control picture where the
    request has one for it."""
    from .store import adapters as store

    asked = Request("") if request is None else request
    if model.wider is None or all(guide.model is not None for guide in asked.controls):
        return model
    names = [name for name, _ in settled(asked, loras, model, folder)[1]]
    here = [path for name in names if (path := store.here(name, folder)) is not None]
    absent = len(here) < len(names)
    return model.widened() if absent or any(store.lora(path, model)[0].inputs for path in here) else model


def check(embeddings: Names, request: Request | None, model: Description, folder: Path | None) -> None:
    """Raise for a file that does not fit a model. Only files that are here are read: a model may be fetched after
    this."""
    from .store import adapters as store

    asked = Request("") if request is None else request
    for guide in asked.controls:
        if guide.detect is not None:
            detect.check(guide.detect)
    for name, word in map(embedding, [*(embeddings if asked.embeddings is None else asked.embeddings)]):
        store.check(name, "embedding", model, folder)
        if (path := store.here(name, folder)) is not None:
            store.embedding(path, model, word)
