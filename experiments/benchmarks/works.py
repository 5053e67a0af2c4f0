"""Defines the sizes that steps are timed on. Imports no JAX, so that any environment can read them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Work:
    """One size of the benchmark.

    Attributes:
        layers, width, heads, hidden, vocab: the shape of the model; `hidden` is the width of its SwiGLU.
        batch: sequences of a step.
        prompt, response: tokens of a prompt and of an answer.
        warmup, steps: untimed and timed steps.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    vocab: int
    batch: int
    prompt: int
    response: int
    warmup: int
    steps: int


WORKS = {
    "S": Work(
        layers=4, width=256, heads=8, hidden=1024, vocab=4096, batch=64, prompt=32, response=64, warmup=2, steps=6
    ),
    "M": Work(
        layers=12, width=768, heads=12, hidden=2048, vocab=32000, batch=8, prompt=64, response=64, warmup=1, steps=3
    ),
    "V": Work(
        layers=2, width=128, heads=4, hidden=256, vocab=152_000, batch=32, prompt=16, response=32, warmup=1, steps=3
    ),
    # To try the code, not the machine.
    "tiny": Work(layers=1, width=16, heads=2, hidden=32, vocab=64, batch=64, prompt=4, response=8, warmup=1, steps=2),
}
