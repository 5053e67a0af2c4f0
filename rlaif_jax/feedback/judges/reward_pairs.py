"""Comparisons as the tokens that a reward model learns from, in rows of similar length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlaif_jax.config import UserError, require
from rlaif_jax.data.conversations import prompt_turns
from rlaif_jax.data.prompts import padded
from rlaif_jax.data.rendering import answer_tokens
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.feedback.records.comparisons import Comparison, Comparisons

BUCKETS = 4  # lengths of rows, each a compiled program
ROUND = 16  # lengths of rows are multiples of it


class Pairs(NamedTuple):
    """Tokenized comparisons.

    Attributes:
        ids: the tokens of prompt and answer with the stop token, of the first and of the second answer.
        lengths: [n, 2], tokens of the two answers.
        probability: [n] float64, of the first answer being better.
        degree: [n], by how much the better answer is better.
        weight: [n].
        conversation: of each pair, what its prompt begins with.
    """

    ids: list[tuple[list[int], list[int]]]
    lengths: np.ndarray
    probability: np.ndarray
    degree: np.ndarray
    weight: np.ndarray
    conversation: list[str]

    def chosen(self, which: Sequence[int] | np.ndarray) -> Pairs:
        """Returns the pairs of these numbers."""
        return Pairs(
            [self.ids[i] for i in which],
            self.lengths[which],
            self.probability[which],
            self.degree[which],
            self.weight[which],
            [self.conversation[i] for i in which],
        )


def conversation_of(prompt: str) -> str:
    """Returns what a conversation begins with: its system message and the first turn of the user.

    Prompts that are earlier and later parts of one conversation begin alike, and belong to one side of a split.
    """
    turns = prompt_turns(prompt)
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns) - 1)
    return "\n\n".join(turn.text for turn in turns[: first + 1])


def tokenize(
    found: Comparisons, tokenizer: Tokenizer, *, max_length: int, add_bos: bool, unused: Counter[str]
) -> Pairs:
    """Returns the pairs whose tokens fit.

    Args:
        found: the comparisons.
        tokenizer: of the policy.
        max_length: tokens of prompt and answer.
        add_bos: put BOS before each prompt.
        unused: gets the number of pairs that are left out, by reason.

    Raises:
        UserError: no pair is left.
    """
    kept: list[Comparison] = []
    ids: list[tuple[list[int], list[int]]] = []
    lengths: list[tuple[int, int]] = []
    for pair in found.pairs:
        try:
            first, second = (answer_tokens(tokenizer, pair.prompt, a, add_bos=add_bos) for a in pair.answers)
        except UserError as error:
            unused[f"pair: {error}"] += 1
            continue
        if max(len(first[0]), len(second[0])) > max_length:
            unused[f"pair of more than max_length = {max_length} tokens"] += 1
        elif first[0] == second[0]:
            unused["pair of two answers with the same tokens"] += 1
        else:
            kept.append(pair)
            ids.append((first[0], second[0]))
            lengths.append((first[1], second[1]))
    reasons = "; ".join(f"{count} x {reason}" for reason, count in unused.most_common(3))
    require(bool(kept), f"no comparison of two answers is left{reasons and f' ({reasons})'}")
    return Pairs(
        ids,
        np.array(lengths),
        np.array([pair.probability for pair in kept]),
        np.array([pair.degree for pair in kept]),
        np.array([pair.weight for pair in kept]),
        [conversation_of(pair.prompt) for pair in kept],
    )


def bucket_widths(lengths: np.ndarray) -> list[int]:
    """Returns at most `BUCKETS` lengths of rows, each for about as many of N texts of `lengths` [N]."""
    cuts = np.quantile(lengths, np.arange(1, BUCKETS + 1) / BUCKETS, method="higher")
    return sorted({-(-int(cut) // ROUND) * ROUND for cut in cuts})


def training_buckets(pairs: Pairs, pad_id: int, margin: float) -> tuple[list[dict[str, np.ndarray]], float]:
    """Returns (arrays of `reward_step` by the length of their rows, share of columns that hold a token).

    Args:
        pairs: N pairs.
        pad_id: the token of empty columns.
        margin: the margin of the largest degree.
    """
    longest = np.array([max(map(len, ids)) for ids in pairs.ids])
    widths = bucket_widths(longest)
    bucket = np.searchsorted(widths, longest)
    made: list[dict[str, np.ndarray]] = []
    for number, width in enumerate(widths):
        part = pairs.chosen(np.flatnonzero(bucket == number))
        arrays: dict[str, np.ndarray] = {}
        for side in (0, 1):
            tokens, mask = padded([ids[side] for ids in part.ids], width, pad_id, "left")
            arrays |= {f"tokens{side + 1}": tokens, f"mask{side + 1}": mask}
        for name, values in (
            ("probability", part.probability), ("weight", part.weight), ("margin", margin * part.degree)
        ):  # fmt: skip
            arrays[name] = values.astype(np.float32)
        made.append(arrays)
    filled = sum(int(arrays[name].sum()) for arrays in made for name in ("mask1", "mask2"))
    return made, filled / sum(2 * arrays["mask1"].size for arrays in made)
