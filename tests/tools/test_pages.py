"""`python -m rlaif_jax report`: the page of one run written again, several runs compared."""

import re
from pathlib import Path

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.tools.pages import PagesConfig, main
from tests.report.pages import finished_run


@pytest.fixture
def runs(tmp_path):
    return finished_run(tmp_path / "a"), finished_run(tmp_path / "b")


def test_one_run_gets_its_page_again(runs, capsys):
    main(PagesConfig(runs[:1]))
    assert capsys.readouterr().out == f"{runs[0] / 'report.html'}\n"
    assert "8.91" in (runs[0] / "report.html").read_text() and not (runs[1] / "report.html").exists()


def test_several_runs_are_compared_and_stay_as_they_are(runs, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    main(PagesConfig(runs, tmp_path / "compare.html"))
    assert capsys.readouterr().out == f"{tmp_path / 'compare.html'}\n"
    assert "2 runs compared" in (tmp_path / "compare.html").read_text()
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "compare.html"])


BAD = {
    "no run": ((), None, "no run: give the folder of a run"),
    "no such folder": (("a", "none"), "out.html", "HERE/none: there is no such folder"),
    "no run's folder": (("model",), None, "HERE/model is not the folder of a run"),
    "a file of one": (
        ("a",),
        "out.html",
        "--out is the file of a comparison; the page of one run is HERE/a/report.html",
    ),
    "no file": (("a", "b"), None, "no file for the comparison: give --out"),
    "a folder": (("a", "b"), "model", "HERE/model is a folder; --out is a file"),
    "a file of a run": (("a", "b"), "a/config.json", "HERE/a/config.json is there and is no page, which ends in .html"),
    "in no folder": (("a", "b"), "none/out.html", "cannot write HERE/none/out.html"),
    "twice": (("a", "a"), "out.html", "HERE/a is given twice"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_shown_is_one_line(bad, runs, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    names, out, message = BAD[bad]
    folders = tuple(tmp_path / name for name in names)
    with pytest.raises(UserError, match=re.escape(message.replace("HERE", str(tmp_path)))) as error:
        main(PagesConfig(folders, Path(tmp_path / out) if out else None))
    assert "\n" not in str(error.value) and not (tmp_path / "out.html").exists()
    assert not (tmp_path / "model/report.html").exists()
