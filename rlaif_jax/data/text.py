"""Texts and comparisons as arrays to learn from, and spans of characters as spans of tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlaif_jax.config import require
from rlaif_jax.data.prompts import padded
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.types import Rollout

CONTEXT = 8  # tokens before a token that are decoded with it
Segments = Sequence[tuple[str, float]]  # a text in parts, each with the weight of its tokens in the loss


def text_arrays(
    tokenizer: Tokenizer, examples: Iterable[Segments], *, length: int, end_weight: float = 1.0, add_bos: bool = False
) -> dict[str, np.ndarray]:
    """Encodes texts, one a row, each closed by the stop token where the tokenizer has one.

    Args:
        tokenizer: encodes each part by itself.
        examples: B texts in parts, each part with the weight of its tokens in the loss.
        length: columns of the arrays.
        end_weight: weight of the stop token in the loss.
        add_bos: put BOS before each text, with weight 0; as `prompt_batches` does for the policy's prompts.

    Returns:
        `tokens` int32, `mask` bool and `weights` float32, each [B, length], right padded.

    Raises:
        UserError: an example is longer than `length`.
    """
    sequences, values = _encoded(tokenizer, examples, length, end_weight, add_bos)
    tokens, mask = padded(sequences, length, tokenizer.pad_id, "right")
    weights = np.zeros(tokens.shape, np.float32)
    for row, of_row in zip(weights, values):
        row[: len(of_row)] = of_row
    return {"tokens": tokens, "mask": mask, "weights": weights}


def packed_text_arrays(
    tokenizer: Tokenizer, examples: Iterable[Segments], *, length: int, end_weight: float = 1.0, add_bos: bool = False
) -> dict[str, np.ndarray]:
    """Encodes texts and packs several into each row, so that little padding is computed.

    Each text goes into the row where it leaves the least space (best fit, in the order of the texts).

    Args:
        tokenizer: as `text_arrays` takes it.
        examples: as `text_arrays` takes them.
        length: columns of a row.
        end_weight: weight of the stop token in the loss.
        add_bos: put BOS before each text, with weight 0; as `prompt_batches` does for the policy's prompts.

    Returns:
        Arrays [R, length] of R rows: `tokens` int32; `segments` int32, the number of a column's text within its row, from
        1, 0 where the row is empty; `positions` int32, of a token within its text; `weights` float32.

    Raises:
        UserError: an example is longer than `length`.
    """
    sequences, values = _encoded(tokenizer, examples, length, end_weight, add_bos)
    return packed_sequences(sequences, values, length=length, pad_id=tokenizer.pad_id)


def packed_sequences(
    sequences: Sequence[Sequence[int]], values: Sequence[Sequence[float]], *, length: int, pad_id: int
) -> dict[str, np.ndarray]:
    """Packs sequences of tokens into rows; returns the arrays that `packed_text_arrays` describes.

    Args:
        sequences: token ids, at most `length` each.
        values: the weight of each token in the loss.
        length: columns of a row.
        pad_id: the token of empty columns.
    """
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the number of their free columns
    for i, sequence in enumerate(sequences):
        need = len(sequence)
        space = next((space for space in range(need, length + 1) if by_space[space]), length)
        if by_space[space]:
            row = by_space[space].pop()
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(i)
        by_space[space - need].append(row)
    tokens = np.full((len(rows), length), pad_id, np.int32)
    segments, positions = np.zeros((2, *tokens.shape), np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for row, texts in enumerate(rows):
        start = 0
        for number, i in enumerate(texts, start=1):
            columns = slice(start, start + len(sequences[i]))
            tokens[row, columns], weights[row, columns] = sequences[i], values[i]
            segments[row, columns], positions[row, columns] = number, np.arange(len(sequences[i]))
            start = columns.stop
    return {"tokens": tokens, "segments": segments, "positions": positions, "weights": weights}


def _encoded(
    tokenizer: Tokenizer, examples: Iterable[Segments], length: int, end_weight: float, add_bos: bool
) -> tuple[list[list[int]], list[list[float]]]:
    """Returns the tokens of each text, with the stop token where the tokenizer has one, and their weights.

    Args:
        tokenizer: encodes each part by itself.
        examples: the texts in parts.
        length: the greatest number of tokens.
        end_weight: weight of the stop token.
        add_bos: whether BOS, with weight 0, is before each text.

    Raises:
        UserError: an example is longer than `length`.
    """
    encode = functools.cache(tokenizer.encode)  # parts are often single words, which come again
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    bos = tokenizer.encode("", add_bos=True) if add_bos else []
    sequences: list[list[int]] = []
    weights: list[list[float]] = []
    for i, segments in enumerate(examples):
        parts = [encode(text) for text, _ in segments]
        own = [token for part in parts for token in part]
        start = [] if own[:1] == bos else bos
        sequences.append([*start, *own, *end])
        values = [w for part, (_, w) in zip(parts, segments) for _ in part]
        weights.append([0.0] * len(start) + values + [end_weight] * len(end))
        require(
            len(sequences[-1]) <= length,
            f"example {i} has {len(sequences[-1])} tokens, more than {length}: {segments[0][0][:60]!r}",
        )
    return sequences, weights


def pair_arrays(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    first: Sequence[str | Sequence[int]],
    second: Sequence[str | Sequence[int]],
    probability: np.ndarray,
    valid: np.ndarray,
    *,
    length: int,
    finished: tuple[np.ndarray, np.ndarray] | None = None,
    add_bos: bool = False,
) -> dict[str, np.ndarray]:
    """Encodes comparisons for a reward model.

    A reward model learns from the tokens that it will score. Answers that a policy has drawn are therefore given as their
    tokens (`answer_ids`): their text, decoded and encoded again, often has others.

    Args:
        tokenizer: encodes prompts and answers.
        prompts: B prompts.
        first: B answers: texts, or the tokens of drawn answers, with the stop token where they came to it.
        second: B other answers.
        probability: [B], that the first answer is better.
        valid: [B] bool; where false the pair has weight 0.
        length: columns of the arrays.
        finished: whether the first and the second texts ([B] bool each) came to their stop token; None means all did.
            A cut answer gets no stop token, as in a rollout. Answers that are given as tokens have theirs.
        add_bos: put BOS before each prompt, as `prompt_batches` does for the policy.

    Returns:
        `tokens1`, `mask1`, `tokens2`, `mask2` [B, length], left padded; `probability` and `weight` [B] float32.

    Raises:
        UserError: a pair is longer than `length`.
    """
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    arrays: dict[str, np.ndarray] = {}
    ended = finished or (np.ones(len(prompts), bool),) * 2
    heads = [tokenizer.encode(prompt, add_bos=add_bos) for prompt in prompts]
    for name, answers, stops in (("1", first, ended[0]), ("2", second, ended[1])):
        rows = [
            head + ([*tokenizer.encode(answer), *(end if stop else [])] if isinstance(answer, str) else list(answer))
            for head, answer, stop in zip(heads, answers, stops)
        ]
        for i, row in enumerate(rows):
            require(len(row) <= length, f"pair {i}: prompt and answer have {len(row)} tokens, more than {length}")
        arrays["tokens" + name], arrays["mask" + name] = padded(rows, length, tokenizer.pad_id, "left")
    return arrays | {"probability": np.asarray(probability, np.float32), "weight": np.asarray(valid, np.float32)}


def answer_ids(rollout: Rollout) -> list[list[int]]:
    """Returns the tokens of the B answers of a rollout, with the stop token of those that came to it."""
    tokens, mask = np.asarray(rollout.responses), np.asarray(rollout.response_mask)
    return [row[real].tolist() for row, real in zip(tokens, mask)]


def held_out_mask(names: Sequence[str], share: float, seed: int) -> np.ndarray:
    """Returns which of N examples are held out [N] bool: all examples of a name, or none.

    Args:
        names: of the N examples, such as their prompts.
        share: of the different names, rounded; at least one name is on either side.
        seed: of the choice, which depends on the set of names alone, not on their order.

    Raises:
        UserError: the share is outside (0, 1), or there are fewer than two names.
    """
    require(0 < share < 1, f"the held-out share must lie between 0 and 1, not {share}")
    different = sorted(set(names))
    require(len(different) > 1, f"nothing can be held out: all examples are of {len(different)} prompt or conversation")
    count = min(max(round(share * len(different)), 1), len(different) - 1)
    chosen = {different[i] for i in np.random.default_rng(seed).permutation(len(different))[:count]}
    return np.array([name in chosen for name in names])


def token_spans(
    tokenizer: Tokenizer, ids: Sequence[int], spans: Iterable[tuple[int, int]], *, text: str | None = None
) -> list[tuple[int, int]]:
    """Returns the spans of the tokens `ids` that spans of characters touch.

    Blanks at either end of a token count only for a span of nothing but blanks: of the tokens "a" and " b", the span
    "a " touches the first alone. Special tokens have no text; a character of several byte tokens touches them all.

    Args:
        tokenizer: decodes the tokens.
        ids: tokens.
        spans: (start, end) in characters of `text`, end exclusive.
        text: a part of the tokens' text, such as an answer without the blanks around it; None is the whole text.

    Returns:
        (start, end) in tokens for each span, end exclusive.

    Raises:
        UserError: `text` is not in the tokens' text, or a span does not lie in `text`.
    """
    whole = tokenizer.decode(ids)
    offset = 0 if text is None else whole.find(text)
    require(offset >= 0, f"these spans are of another text: {str(text)[:60]!r} is not in {whole[:60]!r}")
    length = len(whole if text is None else text)
    ends = _token_ends(tokenizer, ids, whole)
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


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Returns the text of each token; together they are the text of all.

    Of a character that several tokens make up, the last one has it and the others have "", as have special tokens that the
    text does not show.

    Args:
        tokenizer: decodes the tokens.
        ids: the tokens.
    """
    whole = tokenizer.decode(ids)
    ends = _token_ends(tokenizer, ids, whole)
    return [whole[start:end] for start, end in zip([0, *ends], ends)]


def _token_ends(tokenizer: Tokenizer, ids: Sequence[int], whole: str) -> list[int]:
    """Returns where the text of each token ends in the whole text.

    It is where the decoded tokens up to it and the whole text differ: a token of some of a character's bytes decodes to a
    replacement character, and some tokenizers mend blanks at the end.
    """
    ends = _shared_ends(tokenizer, ids, whole)
    return [*np.maximum.accumulate(ends)[:-1].tolist(), len(whole)] if ends else []


def _shared_ends(tokenizer: Tokenizer, ids: Sequence[int], whole: str) -> list[int]:
    """Returns, for each token, how many characters the text up to it shares with the whole text.

    A token is decoded with few tokens before it, from an anchor on up to which all text is settled.

    Args:
        tokenizer: decodes the tokens.
        ids: the tokens.
        whole: their text.
    """
    ends: list[int] = []
    first = anchor = base = 0  # decoding begins at `first`; ids[:anchor] are the text whole[:base]
    before = ""
    for i in range(len(ids)):
        text = tokenizer.decode(ids[first : i + 1])
        if not text.startswith(before):  # the tokenizer writes earlier text in another way now
            first = anchor = base = 0
            before, text = "", tokenizer.decode(ids[: i + 1])
        rest = text[len(before) :]
        ends.append(base + shared_prefix(whole[base : base + len(rest)], rest))
        if i - anchor >= 2 * CONTEXT and ends[-1] == base + len(rest) and not rest.endswith("\ufffd"):
            near = tokenizer.decode(ids[i + 1 - CONTEXT : i + 1])
            if near.strip() and whole[: ends[-1]].endswith(near):
                first, anchor, base, before = i + 1 - CONTEXT, i + 1, ends[-1], near
    return ends


def shared_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Returns the number of characters, or of tokens, that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
