"""Builds the wheel and checks that it works without the repository: files, tools, a run with its page, the annotation page.

    python .ci/wheel.py

The package is installed into an empty environment, with what it says that it depends on and the extra of the annotation page.
That each import is of a listed library is checked by tests/test_imports.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
import venv
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rlaif_jax"
COMMAND = "rlaif-jax"

TINY_MODEL = """
import dataclasses, sys
from pathlib import Path
import jax, rlaif_jax
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.hf.files import save_model

place = Path(rlaif_jax.__file__).resolve()
assert place.is_relative_to(Path(sys.prefix).resolve()), f"{place} is not that of the wheel"
tokenizer = word_level_tokenizer(("user", "assistant", *"abcdefgh"))
template = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
tokenizer = dataclasses.replace(tokenizer, settings={**tokenizer.settings, "chat_template": template})
model = CausalLM(small_decoder(tokenizer.vocab_size, num_layers=1, width=16, num_heads=2, context_length=32))
save_model(sys.argv[1], model, model.init(jax.random.key(0)), tokenizer)
"""


def main() -> None:
    """Runs all checks; the first that fails ends the script with a message and status 1."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        files = check_files(wheel)
        bin_folder = install(wheel, folder / "environment")
        outside = folder / "outside"
        outside.mkdir()
        tools = check_help(bin_folder, outside)
        check_run(bin_folder, outside)
        check_annotation_page(bin_folder, outside)
        seconds = time.monotonic() - started
        print(f"{wheel.name}: {files} files, {len(tools)} tools, a run, the annotation page: {seconds:.0f} s")


def build(folder: Path) -> Path:
    """Returns the wheel of what git knows of the work tree; left-overs of earlier builds do not get into it."""
    names = call(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # a file that is deleted and not yet committed is listed, too
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    call([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), "./source"], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_files(wheel: Path) -> int:
    """Returns the number of the package's files; ends the script if the wheel lacks one or has a file too many."""
    wanted = {str(path.relative_to(wheel.parent / "source")) for path in (wheel.parent / "source" / PACKAGE).rglob("*")}
    wanted = {name for name in wanted if (wheel.parent / "source" / name).is_file()}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    require(f"{PACKAGE}/py.typed" in wanted, f"the repository has no {PACKAGE}/py.typed")
    require(
        found == wanted,
        f"{wheel.name} lacks {sorted(wanted - found)} and has besides {sorted(found - wanted)}: see package-data and "
        "packages.find in pyproject.toml",
    )
    return len(found)


def install(wheel: Path, environment: Path) -> Path:
    """Installs the wheel and what it depends on into an empty environment; returns its bin folder."""
    venv.create(environment, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
    # Not compiled: of what is installed, few modules are imported.
    call([*pip, "install", "--quiet", "--no-compile", f"{wheel}[ui]"], wheel.parent)
    return environment / "bin"


def check_help(bin_folder: Path, outside: Path) -> list[str]:
    """Returns the names of the tools; ends the script if the help of one cannot be shown."""
    shown = call([str(bin_folder / COMMAND), "--help"], outside)
    require(
        shown == call([str(bin_folder / "python"), "-m", PACKAGE, "--help"], outside),
        f"{COMMAND} and python -m {PACKAGE} have different helps",
    )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    said = call([str(bin_folder / COMMAND), "--version"], outside)
    require(said == f"{COMMAND} {version}\n", f"{COMMAND} --version says {said!r}; pyproject.toml has {version}")
    tools = re.findall(r"^  ([a-z][a-z-]*)  ", shown, re.MULTILINE)
    require(len(tools) >= 5, f"{COMMAND} --help lists only the tools {tools}")
    with ThreadPoolExecutor(2) as pool:
        helps = pool.map(lambda tool: call([str(bin_folder / COMMAND), tool, "--help"], outside), tools)
        for tool, text in zip(tools, helps):
            require("usage:" in text and "--" in text, f"{COMMAND} {tool} --help shows no options: {text[:200]!r}")
    return tools


def check_run(bin_folder: Path, outside: Path) -> None:
    """Trains a tiny model on chats and lets it answer; ends the script if the run, its page or the answer is not whole."""
    call([str(bin_folder / "python"), "-c", TINY_MODEL, "start"], outside)
    chats = [[("user", f"{a} {b}"), ("assistant", f"{b} {a}")] for a in "abcd" for b in "efgh"]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    (outside / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--fit.updates", "2", "--fit.batch-size", "2", "--check-every", "1"]
    tool = str(bin_folder / COMMAND)
    call([tool, "sft", "--model", "start", "--data", "chats.jsonl", "--out", "run", *settings], outside)
    page = (outside / "run" / "report.html").read_text()
    require("</html>" in page and "<svg" in page and "Perplexity" in page, "the page of a run is not whole")
    require(list((outside / "run" / "tensorboard" / "sft").iterdir()) != [], "a run has no TensorBoard events")
    asked = ["--model", "run/model", "--template", "chat", "--prompt", "a e", "--max-new-tokens", "4"]
    call([tool, "generate", *asked, "--out", "answers.jsonl"], outside)
    (answer,) = map(json.loads, (outside / "answers.jsonl").read_text().splitlines())
    require(answer["prompt"] == "a e" and len(answer["answers"]) == 1, f"generate has written {answer}")


def check_annotation_page(bin_folder: Path, outside: Path) -> None:
    """Serves the annotation page and fetches it and what it loads; ends the script where that fails."""
    task = {"kind": "compare", "prompt": "Which is shorter?", "answers": ["One.", "One, and more."]}
    (outside / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    command = [str(bin_folder / COMMAND), "annotate", "--store", "store.sqlite", "--items", "tasks.jsonl"]
    with subprocess.Popen(command, cwd=outside, env=environment(), stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = next((line.split()[-1] for line in server.stdout if "http://" in line), None)
            require(address is not None, "the annotation page was not served")
            opened = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
            fetch = lambda url: opened.open(url, timeout=30).read().decode()
            fetch(str(address))  # its cookie lets this session in
            pages = [fetch(str(address).split("/?")[0] + path) for path in ("/", "/progress", "/adjudicate")]
            loaded = sorted({path for page in pages for path in re.findall(r'(?:src|href)="(/static/[^"]+)"', page)})
            require(len(loaded) >= 5, f"the annotation pages load only {loaded}")
            for path in loaded:
                require(fetch(str(address).split("/?")[0] + path) != "", f"the annotation page's {path} is empty")
        finally:
            server.terminate()


def environment() -> dict[str, str]:
    """Returns the environment variables of an installed package: none leads to the repository or to another Python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "JAX_PLATFORMS": "cpu"}


def call(command: Sequence[str], folder: Path) -> str:
    """Returns the standard output of a command that is run in `folder`; ends the script if the command fails."""
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    require(done.returncode == 0, f"{' '.join(command)[:200]} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def require(condition: bool, message: str) -> None:
    """Ends the script with a message and status 1 unless `condition` holds."""
    if not condition:
        sys.exit(f"wheel: {message}")


if __name__ == "__main__":
    main()
