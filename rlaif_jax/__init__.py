"""Reinforcement learning from AI feedback on language models, in JAX."""


def __getattr__(name: str) -> str:
    """Returns `__version__`, that of the installed package, which comes from pyproject.toml."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version  # here, because it takes longer than all else that the package's import does

    return version("rlaif-jax")
