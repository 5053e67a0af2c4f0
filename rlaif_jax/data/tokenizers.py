"""Text to token ids and back: three kinds of tokenizer behind one small interface.

========================  ====================================================  ===========================
kind                      read from                                             saved as
========================  ====================================================  ===========================
`HuggingFaceTokenizer`    `tokenizer.json`, `vocab.json + merges.txt`, `*.gguf`  `tokenizer.json` (+ config)
`SentencePieceTokenizer`  `*.model`                                             `tokenizer.model`
`Llama2cTokenizer`        llama2.c's `tok*.bin`                                 `tokenizer.bin`
========================  ====================================================  ===========================

All are immutable. `load_tokenizer(folder_or_file)` finds out which kind it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import tokenizers as hf

from rlaif_jax.config import UserError
from rlaif_jax.data import hub, tokenizer_files
from rlaif_jax.data.gguf.tokenizer import read_gguf_tokenizer
from rlaif_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from rlaif_jax.data.llama2c import Llama2cTokenizer
from rlaif_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rlaif_jax.files import it_is


class Tokenizer(Protocol):
    """The interface of a tokenizer that the rest of the project uses."""

    @property
    def vocab_size(self) -> int:
        """Returns the largest id + 1."""

    @property
    def pad_id(self) -> int:
        """Returns an id that a model can look up: the padding token, else <unk>, else EOS, else 0.

        Masks must never be made by comparing with it.
        """

    @property
    def bos_id(self) -> int | None:
        """Returns the id of the token that begins a text; None where the vocabulary has none."""

    @property
    def eos_id(self) -> int | None:
        """Returns the id of the token that is written at the end of texts; None without such a token."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Returns the ids that end an answer: `eos_id` first, then each other that the model's files declare."""

    @property
    def fingerprint(self) -> str:
        """Returns a hash of the vocabulary: where two are equal, every id is the same token in both."""

    def encode(self, text: str, *, add_bos: bool = False, continues: bool = False) -> list[int]:
        """Returns the ids of `text`, without any special token except the BOS that `add_bos` puts first.

        A text that begins with its BOS already, as chat templates write it, gets no second one. Some vocabularies put a
        blank before a text; before one that `continues` another they put none.

        Raises:
            UserError: `add_bos` and the vocabulary has no BOS token, or the text holds half of a surrogate pair.
        """

    def quote(self, text: str) -> str:
        """Returns `text` so that `encode` takes special tokens that it spells for text.

        It is for data within a question, such as the answer that a judge reads.
        """

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of token ids.

        The token for what the vocabulary lacks (<unk>) is no special token: it is in the place of a word.
        Models whose embedding is padded beyond the tokenizer's vocabulary can sample ids outside it: they have no text.

        Args:
            ids: a list or one-dimensional array.
            skip_special: leave special tokens such as EOS out of the text.
        """

    def token_id(self, token: str) -> int:
        """Returns the id of the one token that `token` becomes in the middle of a text.

        A space counts: `" yes"` is another token than `"yes"` (the world's words have no spaces).
        A special token is named as it is spelled (`"</s>"`).

        Raises:
            UserError: `token` is not one token of the vocabulary.
        """

    def stopping_at_bos(self) -> Tokenizer:
        """Returns the same tokenizer for a model whose texts end where the next begins.

        Raises:
            UserError: the vocabulary has no BOS token.
        """

    def save(self, folder: tokenizer_files.PathLike) -> None:
        """Writes into `folder` (made if missing) what `load_tokenizer` needs to give the same tokenizer back.

        Raises:
            UserError: the folder is not writable, or holds another kind that would be found first.
        """


def load_tokenizer(folder_or_file: tokenizer_files.PathLike) -> Tokenizer:
    """Reads the tokenizer of a folder (a model's, or what `save` wrote), of one file, or from the hub.

    Args:
        folder_or_file: a folder, searched for `tokenizer_files.FILE_NAMES` in that order; a `tokenizer.json`,
            `*vocab.json` (with `*merges.txt` in its folder), `*.gguf`, `*.model` or `*.bin`; or, where there is no such
            path, a hub id, as `load_model` takes it. An adapter's folder without a tokenizer gives that of its base.

    Raises:
        UserError: nothing there, no tokenizer in it (lists what was looked for), an unreadable file, or an end token that
            is in no vocabulary.
    """
    for number, path in enumerate(hub.layers(str(folder_or_file), hub.TOKENIZER_FILES, "tokenizer")):
        if number and path.suffix == ".bin":  # a llama2.c model: its tokenizer is next to it
            path = path.parent
        if path.is_file() or tokenizer_files.has_tokenizer(path):
            break
    if path.is_dir():
        path = tokenizer_files.find(path)
    if path.name.endswith("vocab.json"):
        return HuggingFaceTokenizer.read_pair(path, tokenizer_files.merges_of(path))
    if path.suffix == ".json":
        return HuggingFaceTokenizer.read(path)
    if path.suffix == ".gguf":
        return read_gguf_tokenizer(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer.read(path)
    if path.suffix == ".bin":
        return Llama2cTokenizer.read(path)
    raise UserError(
        f"{path} is not a tokenizer file: expected tokenizer.json, vocab.json, *.model, *.gguf or *.bin{it_is(path)}"
    )


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """Raises UserError for a tokenizer that knows more ids than the model has embeddings.

    A smaller tokenizer is fine: many models pad their embedding to a round number.

    Args:
        tokenizer: the tokenizer.
        vocab_size: the number of the model's embeddings.
        where: begins the message, such as the model's folder.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{where}: this tokenizer is of another vocabulary: it has {tokenizer.vocab_size} ids, "
            f"the model only {vocab_size}; use the tokenizer that the model was trained with"
        )


WORD_SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")  # the first ids of `word_level_tokenizer`


def word_level_tokenizer(words: Sequence[str]) -> HuggingFaceTokenizer:
    """Returns a tokenizer with one id for each word between white space: that of the synthetic world.

    Ids 0 to 3 are `WORD_SPECIALS`, then come `words` in their order. Any other word is `<unk>`.

    Raises:
        UserError: a word that is empty, holds white space, or is in the vocabulary already.
    """
    ids = {token: i for i, token in enumerate(WORD_SPECIALS)}
    for i, word in enumerate(words):
        if not isinstance(word, str) or not word or word.split() != [word]:
            raise UserError(f"word {i} of the vocabulary is {word!r}: it should be a string without white space")
        if word in ids:
            raise UserError(f"word {i} of the vocabulary is {word!r}, which is in it already")
        ids[word] = len(ids)
    backend = hf.Tokenizer(hf.models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    # <unk> is not special: it replaces a word of the text, so `decode` keeps it.
    backend.add_special_tokens([hf.AddedToken(t, normalized=False, special=True) for t in WORD_SPECIALS[:3]])
    settings = {f"{token[1:-1]}_token": token for token in WORD_SPECIALS}
    return HuggingFaceTokenizer(backend, pad_id=0, bos_id=1, eos_id=2, settings=settings)
