"""Vocabularies of llama2.c for tests: a tiny one, and any as a `tokenizer.json`."""

import tokenizers as hf

from rlaif_jax.data.llama2c import Llama2cTokenizer

BYTES = [f"<0x{b:02X}>".encode() for b in range(256)]


def llama2c(*pieces: bytes) -> Llama2cTokenizer:
    """A tiny llama2.c vocabulary: earlier pieces merge first, as in the files of its trainer."""
    every = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *BYTES, *pieces]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    return Llama2cTokenizer(tuple(every), tuple(scores), max(map(len, every)))


def to_tokenizer_json(tokenizer: Llama2cTokenizer) -> hf.Tokenizer:
    """Returns the same vocabulary as a `tokenizer.json` of the Llama kind, for folders that `transformers` reads.

    Its ids are the same except in one case: where two different splits of one piece overlap in the text, `run.c` joins
    the left one and a ranked list of merges the one listed first.
    """

    def spelled(piece: bytes) -> str:
        return piece.decode(errors="replace").replace(" ", "▁")

    names = ["<unk>", "<s>", "</s>", *map(spelled, tokenizer.pieces[3:])]
    vocab = {name: i for i, name in reversed(list(enumerate(names)))}
    merges: list[tuple[str, str]] = []
    for i in sorted(range(259, len(names)), key=lambda i: -tokenizer.scores[i]):
        splits = [(names[i][:cut], names[i][cut:]) for cut in range(1, len(names[i]))]
        merges += [(a, b) for a, b in splits if a in vocab and b in vocab]
    backend = hf.Tokenizer(hf.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")])
    backend.decoder = hf.decoders.Sequence(
        [
            hf.decoders.Replace("▁", " "),
            hf.decoders.ByteFallback(),
            hf.decoders.Fuse(),
            hf.decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([hf.AddedToken(name, normalized=False, special=True) for name in names[:3]])
    return backend
