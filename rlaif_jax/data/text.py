"""Texts as arrays to learn from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from rlaif_jax.config import require
from rlaif_jax.data.prompts import padded
from rlaif_jax.data.tokenizers import Tokenizer

Segments = Sequence[tuple[str, float]]  # a text in parts, each with the weight of its tokens in the loss


def text_arrays(
    tokenizer: Tokenizer, examples: Iterable[Segments], *, length: int, end_weight: float = 1.0
) -> dict[str, np.ndarray]:
    """Texts to learn -> `tokens` int32, `mask` bool, `weights` float32, each [B, length], right padded.

    The stop token (where the tokenizer has one) is put at the end and learned with `end_weight`. Raises UserError for
    an example longer than `length`.
    """
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    sequences: list[list[int]] = []
    rows: list[list[float]] = []
    for i, segments in enumerate(examples):
        parts = [tokenizer.encode(text) for text, _ in segments]
        sequences.append([token for part in parts for token in part] + end)
        rows.append([w for part, (_, w) in zip(parts, segments) for _ in part] + [end_weight] * len(end))
        require(
            len(sequences[-1]) <= length,
            f"example {i} has {len(sequences[-1])} tokens, more than {length}: {segments[0][0][:60]!r}",
        )
    tokens, mask = padded(sequences, length, tokenizer.pad_id, "right")
    weights = np.zeros(tokens.shape, np.float32)
    for row, values in zip(weights, rows):
        row[: len(values)] = values
    return {"tokens": tokens, "mask": mask, "weights": weights}


def pair_arrays(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    probability: np.ndarray,
    valid: np.ndarray,
    *,
    length: int,
    finished: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Comparisons -> `tokens1, mask1, tokens2, mask2` [B, length], `probability`, `weight` [B], for a reward model.

    probability [B] that the first answer is better; where `valid` is false the pair weighs nothing. finished: whether
    the first and second answers [B] came to their stop token (None: all did); a cut answer gets none, as in a rollout.
    Raises UserError for a pair longer than `length`.
    """
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    arrays: dict[str, np.ndarray] = {}
    ended = finished or (np.ones(len(prompts), bool),) * 2
    for name, answers, stops in (("1", first, ended[0]), ("2", second, ended[1])):
        rows = [
            tokenizer.encode(prompt) + tokenizer.encode(answer) + (end if stop else [])
            for prompt, answer, stop in zip(prompts, answers, stops)
        ]
        for i, row in enumerate(rows):
            require(len(row) <= length, f"pair {i}: prompt and answer have {len(row)} tokens, more than {length}")
        arrays["tokens" + name], arrays["mask" + name] = padded(rows, length, tokenizer.pad_id, "left")
    return arrays | {"probability": np.asarray(probability, np.float32), "weight": np.asarray(valid, np.float32)}


def token_spans(
    tokenizer: Tokenizer, ids: Sequence[int], spans: Iterable[tuple[int, int]], *, text: str | None = None
) -> list[tuple[int, int]]:
    """Spans of characters -> the spans of the tokens `ids` that they touch; (start, end), end exclusive.

    text: what the characters number, a part of the tokens' text, such as an answer without the blanks around it; None:
    the tokens' whole text. A token's own blanks at either side do not count: "b" of " b" is that token, the blank
    before it is not, unless nothing but blanks is marked. Special tokens have no text; a character of several byte
    tokens touches them all.

    Raises:
        UserError: `text` is not what the tokens say, or a span does not lie in it.
    """
    whole = tokenizer.decode(ids)
    offset = 0 if text is None else whole.find(text)
    require(offset >= 0, f"these spans are of another text: {str(text)[:60]!r} is not in {whole[:60]!r}")
    length = len(whole if text is None else text)
    # Where each token's text ends: what the tokens up to it say and the whole text says, too. (A token of some of a
    # character's bytes decodes to a replacement character, some tokenizers mend blanks at the end.)
    ends = [_shared(whole, tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    ends = [*np.maximum.accumulate(ends)[:-1].tolist(), len(whole)] if ends else []
    starts = [0, *ends[:-1]]
    for i in range(len(ids)):
        if ends[i] == starts[i] and ends[i] < len(whole) and tokenizer.decode(ids[i : i + 1]):
            ends[i] += 1  # the first bytes of a character
    bare = []
    for start, end in zip(starts, ends):
        part = whole[start:end]
        bare.append((start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())))

    def touched(start: int, end: int, places: Sequence[tuple[int, int]]) -> list[int]:
        return [i for i, (first, behind) in enumerate(places) if first < end and start < behind and first < behind]

    found = []
    for start, end in spans:
        require(0 <= start < end <= length, f"span {start} .. {end} does not lie in the text of {length} characters")
        place = start + offset, end + offset
        hits = touched(*place, bare) or touched(*place, list(zip(starts, ends)))
        found.append((hits[0], hits[-1] + 1))
    return found


def _shared(first: str, second: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
