"""The adapter files that a request names, LoRAs and taught words: found, read once, and held against the fingerprints
of a replay."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from . import conditioning, dialects
from .adapters import Adapter, Word
from .description import Description
from .errors import Error
from .request import Request, embedding, lora

Names = Sequence[str]


class Attached:
    """Those of one model. loras, embeddings: of requests that do not say."""

    def __init__(self, folder: Path, model: Description, offline: bool):
        self.folder, self.model, self.offline = folder, model, offline
        self.loras: tuple[str, ...] = ()
        self.embeddings: tuple[str, ...] = ()
        self._opened: dict[tuple, tuple] = {}  # name -> its file's time and size, then what it holds

    def resolve(self, request: Request) -> Request:
        """The request with the LoRAs that its prompt names and those that the model was loaded with, and with the
        fingerprints of all files."""
        request.check_adapters()
        prompt, named = dialects.loras(request.prompt) if isinstance(request.prompt, str) else (request.prompt, [])
        loras = [*map(lora, [*(self.loras if request.loras is None else request.loras), *named])]
        names = [name for name, _ in loras]
        if len(set(names)) < len(names):
            again = next(name for i, name in enumerate(names) if name in names[:i])
            raise Error(f"The LoRA {again} is named twice.", "Name it once, with the scale that it should have.")
        words = tuple(self.embeddings if request.embeddings is None else request.embeddings)
        taught = [self._word(*embedding(text)) for text in words]
        if taught:  # a word that cannot be taught is refused here, not in the run
            toks = conditioning.load_tokenizers(self.model.text, self.folder, t5=False)
            conditioning.teach_tokenizers(toks, [word for word, _ in taught], self.model.components)
        lora_hashes = tuple(self._lora(name)[1] for name, _ in loras)
        embedding_hashes = tuple(found for _, found in taught)
        _same("LoRA", "loras", request.lora_hashes, lora_hashes)
        _same("embedding", "embeddings", request.embedding_hashes, embedding_hashes)
        return replace(
            request,
            prompt=prompt,
            loras=tuple(f"{name}:{scale:g}" for name, scale in loras),
            lora_hashes=lora_hashes,
            embeddings=words,
            embedding_hashes=embedding_hashes,
        )

    def adapters(self, request: Request) -> list[tuple[Adapter, float]]:
        """The LoRAs of a resolved request, with their scales."""
        return [(self._lora(name)[0], scale) for name, scale in map(lora, request.loras or ())]

    def words(self, request: Request) -> list[Word]:
        """The taught words of a resolved request."""
        return [self._word(*embedding(text))[0] for text in request.embeddings or ()]

    def taught(self, request: Request) -> list[str]:
        """What these words are called."""
        return [word.word for word in self.words(request)]

    def _lora(self, name: str) -> tuple[Adapter, str]:
        """A LoRA and its fingerprint."""
        from . import store

        return self._once(store.lora, name, "LoRA")

    def _word(self, name: str, word: str | None) -> tuple[Word, str]:
        """A taught word and its fingerprint."""
        from . import store

        return self._once(store.embedding, name, "embedding", word)

    def _once(self, read: Callable, name: str, what: str, *more) -> tuple:
        """What `read` makes of a file, which is read once, and again if it has changed."""
        from . import store

        path, key = store.adapter_file(name, what, offline=self.offline), (name, *more)
        stamp = path.stat().st_mtime_ns, path.stat().st_size
        if self._opened.get(key, (None,))[0] != stamp:
            self._opened[key] = stamp, read(path, self.model, *more)
        return self._opened[key][1]


def _same(what: str, setting: str, wanted: Names, found: Names) -> None:
    if wanted and tuple(wanted) != tuple(found):
        raise Error(f"The {what} files are not those of these settings.", f"Give those files as `{setting}=[FILE]`.")


def check(loras: Names, embeddings: Names, request: Request | None, model: Description) -> None:
    """Raise for a file that does not fit a model. Only files that are here are read: a model may be fetched after
    this."""
    from . import store

    asked = Request("") if request is None else request
    for name, _ in map(lora, [*loras, *(asked.loras or ())]):
        if store.local(name) is not None:
            store.lora(store.adapter_file(name, "LoRA", offline=True), model)
    for name, word in map(embedding, [*embeddings, *(asked.embeddings or ())]):
        if store.local(name) is not None:
            store.embedding(store.adapter_file(name, "embedding", offline=True), model, word)
