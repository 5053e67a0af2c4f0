"""Eight fake CPU devices and a compilation cache, set before jax is imported anywhere."""

import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # twice as quick to compile; XLA aborts on a flag that it no longer knows
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".cache" / "xla-tests")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["RLAIF_JAX_CACHE"] = str(Path(__file__).parent.parent / ".cache" / "rlaif_jax")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("folder/file")`: the path of a real data file, or a skip where this machine has none."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"needs the real data file {name}, which is not part of this repository")
        return path

    return find


@pytest.fixture(scope="module")
def browser():
    """A Chromium, or a skip."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="drives the page with playwright (requirements-dev.txt)"
    )
    with playwright.sync_playwright() as driver:
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if path is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("needs Chromium: install it, or run `playwright install chromium`")
        found = driver.chromium.launch(executable_path=path)
        yield found
        found.close()


@pytest.fixture(scope="module", autouse=True)
def wandb_is_closed():
    """After a file whose tests used W&B, its threads and its process end: the next file has its worker for itself."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


MOST_REGIONS = 20_000


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten():
    """After a file, the programs of a process that has many are freed: with too many XLA crashes.

    Linux allows a process 65,530 mapped regions (vm.max_map_count), and the programs of a whole run take up to 6,000.
    """
    yield
    regions = Path("/proc/self/maps")
    if "jax" in sys.modules and regions.exists() and len(regions.read_bytes().splitlines()) > MOST_REGIONS:
        sys.modules["jax"].clear_caches()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first, so that no worker is left alone with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
