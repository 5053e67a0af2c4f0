"""The tool `python -m rlaif_jax report`: writes the page of a run again, or a page that compares runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from rlaif_jax.config import require
from rlaif_jax.report.compare import write_comparison
from rlaif_jax.report.report import write_report
from rlaif_jax.tools.runs import run_settings


@dataclasses.dataclass(frozen=True)
class PagesConfig:
    """All settings.

    Attributes:
        runs: the folders of runs; one: its page RUN/report.html is written again; several: they are compared.
        out: the file of the comparison.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    out: Path | None = None


def help_text() -> str:
    """Returns the description of --help: what the tool does, and examples."""
    return (
        "Writes the page of a run again, or one page that compares several runs.\n\n"
        "  python -m rlaif_jax report runs/rlaif\n"
        "  python -m rlaif_jax report runs/a runs/b runs/c --out compare.html"
    )


def main(config: PagesConfig) -> None:
    """Writes the page and prints its path.

    Raises:
        UserError: no run, a folder that is not a run's, a file of a run that is damaged, or no room for the page.
    """
    require(bool(config.runs), "no run: give the folder of a run, or of several to compare")
    for folder in config.runs:
        run_settings(folder)
    if len(config.runs) == 1:
        require(
            config.out is None,
            f"--out is the file of a comparison; the page of one run is {config.runs[0] / 'report.html'}",
        )
        print(write_report(config.runs[0]))
        return
    require(config.out is not None, "no file for the comparison: give --out, such as --out compare.html")
    assert config.out is not None
    require(not config.out.is_dir(), f"{config.out} is a folder; --out is a file, such as compare.html")
    require(
        config.out.suffix in (".html", ".htm") or not config.out.exists(),
        f"{config.out} is there and is no page, which ends in .html: name another file by --out",
    )
    print(write_comparison(config.runs, config.out))
