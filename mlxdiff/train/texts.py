"""Captions that are read anew in each step, because the text encoders are trained along."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from .. import conditioning
from ..description import Description
from ..request import Request
from . import batches
from .folder import Picture


class Reader(nn.Module):
    """A denoiser and the CLIP encoders that are trained with it."""

    def __init__(self, net: nn.Module, encoders: dict[str, nn.Module]):
        super().__init__()
        self.net, self.encoders = net, encoders


class Captions:
    """The captions of a training, as token ids."""

    def __init__(self, model: Description, toks: conditioning.Tokenizers, pictures: list[Picture], clip_skip: int):
        self.model, self.clip_skip = model, clip_skip
        self.texts = [*dict.fromkeys(p.caption for p in pictures), ""]
        self.words = conditioning.tokenize(model.text, toks, self.texts)

    def arguments(self, caption: str, request: Request) -> dict[str, mx.array]:
        """What a step reads of a picture besides its latents: the number of its caption, and sizes."""
        number = mx.array([self.texts.index(caption)])
        args = conditioning.arguments(self.model.text, conditioning.Text(number, None), request, negative=False)
        return {"caption": args.pop("context"), **args}

    @property
    def reads(self) -> batches.Reads:
        """What `arguments` gives."""
        sizes = {k: v.shape[-1:] for k, v in batches.read(self.model, 1).items() if k == "time_ids"}
        return batches.Reads({"caption": (1,), **sizes}, len(self.texts))

    def read(self, reader: Reader, args: dict) -> dict[str, mx.array]:
        """The arguments of the denoiser's `prepare`."""
        plan, args = self.model.text, dict(args)
        numbers, parts = args.pop("caption").tolist(), {}
        for name, words in self.words.items():
            chosen = words._replace(chunks=[words.chunks[i] for i in numbers])
            parts[name] = conditioning.read(plan, reader.encoders[name], chosen, self.clip_skip)
        found = conditioning.join(plan, parts, self.model.net.context)
        args["context"] = mx.concatenate([text.context for text in found])
        if found[0].pooled is not None:
            args["pooled"] = mx.concatenate([text.pooled for text in found])
        return args

    def loss(self, reader: Reader, parts: list[batches.Part]) -> mx.array:
        return batches.loss(reader.net, [part._replace(args=self.read(reader, part.args)) for part in parts])


def tokenizers(model: Description, folder: Path) -> conditioning.Tokenizers:
    return conditioning.load_tokenizers(model.text, folder, t5=False)
