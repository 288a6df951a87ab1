"""Tables to show, the pages of them served and exported, and a real browser to look with."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_harvest.pipelines.viewer.server import open_viewer
from sae_harvest.pipelines.viewer.site import write_site
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from tests.dictionaries import random_sae
from tests.made_tables import HOSTILE, HOSTILE_LATENT, write_tables
from tests.viewer_cases import N, served

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ["--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic"]  # fmt: skip


@pytest.fixture(scope="module")
def living(tmp_path_factory, tiny_store):
    """Tables whose store, SAE and model are real."""
    folder = tmp_path_factory.mktemp("living")
    store = ActivationStore.open(tiny_store)
    sae = random_sae(store, N, 4, RowRule())
    sae.save(folder / "sae")
    return write_tables(
        folder / "features",
        N,
        sae=str(folder / "sae"),
        sae_digest=sae.digest,
        store=store.place,
        store_digest=store.digest,
        site=sae.config.site,
        model=store.plan["model"]["name"],
    )


def playwright():
    """Its entry point; the test is skipped where it is not installed."""
    reason = "browser tests need playwright"
    return pytest.importorskip("playwright.sync_api", reason=reason).sync_playwright


@pytest.fixture(scope="module")
def chromium():
    """Path of a Chromium: CHROMIUM, or by name on the PATH, or where playwright keeps its own."""
    sync_playwright = playwright()
    with sync_playwright() as p:
        named = [os.environ.get("CHROMIUM"), *map(shutil.which, NAMES), p.chromium.executable_path]
    path = next((name for name in named if name and Path(name).exists()), None)
    if path is None:
        pytest.skip("no Chromium on this machine; set CHROMIUM to one")
    return path


@pytest.fixture(scope="module")
def browser(chromium, living):
    # `living` is made first: playwright holds this thread's event loop, and harvesting needs one
    flags = [*FLAGS, "--no-sandbox"] if os.geteuid() == 0 else FLAGS
    with playwright()() as p:
        browser = p.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page on which any script error, refused resource or foreign request fails the test."""
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(f"script error: {error}"))
    page.on("console", lambda m: m.type == "error" and wrong.append(f"{m.type}: {m.text}"))
    page.on("request", lambda r: foreign(r.url) and wrong.append(f"fetched {r.url}"))
    page.wrong = wrong
    yield page
    context.close()
    assert wrong == []


def foreign(url):
    return not url.startswith(("http://127.0.0.1:", "http://localhost:", "file://", "data:"))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = write_tables(tmp_path_factory.mktemp("pages") / "features", N, hostile=True)
    told = pa.table({"latent": [5, HOSTILE_LATENT], "explanation": ["places to drink", HOSTILE[0]]})
    pq.write_table(told, folder / "explanations.parquet")
    return folder


@pytest.fixture(scope="module")
def server(tables):
    with served(open_viewer(tables, allow_sql=True)) as client:
        yield f"http://127.0.0.1:{client.port}/"


@pytest.fixture(scope="module")
def site(tables, tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "out"
    write_site(tables, None, out)
    return f"file://{out}/index.html"


@pytest.fixture(params=["server", "site"])
def base(request):
    """The pages over HTTP, and the exported ones from the disk."""
    return request.getfixturevalue(request.param)
