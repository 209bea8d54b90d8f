"""A T5 vocabulary made on the spot, by sentencepiece's own trainer with T5's settings: <pad>, </s>, <unk>, no begin."""

import io
import random
from pathlib import Path

import sentencepiece

from .clip_vocab import WORDS


def write(folder: Path, size: int = 220) -> None:
    """spiece.model, as Google publishes it."""
    draw = random.Random(size)
    text = (" ".join(draw.choices(WORDS, k=12)) for _ in range(400))
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_writer=made, vocab_size=size, hard_vocab_limit=False, character_coverage=0.98,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(made.getvalue())
