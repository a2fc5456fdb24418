"""A small byte-level BPE tokenizer in Llama 3's form, with ids that fit the tiny model."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|eot_id|>",
)

_TEXT = """The quick brown fox jumps over the lazy dog. Hello there, how are you doing today?
I am fine, thank you; and what about the weather? It is the speech of the model, said the other.
We say what we hear and we hear what they say, over and over, in and out, all the time."""


def build_tokenizer(*, vocab_size: int = 512) -> Tokenizer:
    """Returns a byte-level BPE tokenizer with at most `vocab_size` ids, special tokens last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 384) - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    begin = tokenizer.token_to_id(SPECIAL_TOKENS[0])
    # As published: only the begin token is added.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL_TOKENS[0]} $A", special_tokens=[(SPECIAL_TOKENS[0], begin)]
    )
    return tokenizer


def write_tokenizer(path: Path, *, vocab_size: int = 512) -> Path:
    """Returns `path` after writing the tokenizer there as a `tokenizer.json`."""
    build_tokenizer(vocab_size=vocab_size).save(str(path))
    return path
