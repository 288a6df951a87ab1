"""Pages of the viewer that need its server, or two SAEs, or a phone, in a real browser."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("starlette", reason="the viewer's server is an extra: .[viewer]")
pytest.importorskip("uvicorn", reason="the viewer's server is an extra: .[viewer]")

from sae_harvest.pipelines.viewer import models
from sae_harvest.pipelines.viewer.server import open_viewer
from sae_harvest.pipelines.viewer.site import write_site
from tests.made_tables import STRATA, write_sae, write_tables
from tests.viewer_cases import Writer, command, go, served, texts

CONTEXTS = sum(n for _, n in STRATA)
pytest_plugins = ("tests.viewer_fixtures",)
pytestmark = pytest.mark.slow


def test_an_export_says_what_needs_the_server(page, site):
    for path, what in (("live", "Live text"), ("steer", "Steering"), ("notes", "Keeping notes"),
                       ("sql", "SQL")):  # fmt: skip
        go(page, site, path)
        assert f"{what} needs the model and a server" in page.locator("main").inner_text()
    go(page, site, "latent/3")
    assert "Notes need the server" in page.locator(".notes").inner_text()


def test_live_text_and_steering_in_the_browser(page, living):
    with served(open_viewer(living)) as client:
        base = f"http://127.0.0.1:{client.port}/"
        go(page, base, "live")
        page.get_by_label("text", exact=True).fill("the cat <b>sees</b> the bridge")
        page.get_by_role("button", name="Show latents").click()
        page.wait_for_selector(".livetext .t")
        assert page.locator(".livetext").inner_text() == "the cat <b>sees</b> the bridge"
        first = page.locator(".livetext .t[class*=' h']").first
        first.click()
        listed = page.locator(".firing").first.locator("li")
        assert 1 <= listed.count() <= 4  # k of the SAE
        latent = listed.first.locator("a.latent").inner_text()
        listed.first.get_by_role("button", name="heat").click()
        page.wait_for_selector(f".chosen a.latent:has-text('{latent}')")
        first.hover()
        assert "of the maximum" in page.locator("#tip").inner_text()
        page.get_by_label("text", exact=True).fill("")
        page.get_by_role("button", name="Show latents").click()
        page.wait_for_selector("[role=alert]:has-text('Type a text')")
        page.wrong[:] = [w for w in page.wrong if "400" not in w]  # the browser notes refusals

        go(page, base, "steer?latent=3")
        page.get_by_label("prompt").fill("the cat")
        page.get_by_label("strengths").fill("0, 40")
        page.get_by_label("tokens", exact=True).fill("6")
        page.get_by_role("button", name="Generate").click()
        page.wait_for_selector(".steered .card:nth-child(3) .made", timeout=60_000)
        assert texts(page, ".steered h2") == ["plain", "0 × max", "40 × max"]
        outputs = texts(page, ".output")
        assert all(text.startswith("the cat") for text in outputs)
        assert outputs[2] != outputs[0]


def test_steering_is_shown_as_it_is_written_and_stops_when_asked_to(page, tables, monkeypatch):
    writer = Writer()
    monkeypatch.setattr(models, "generate", writer)
    with served(open_viewer(tables, open_model=lambda path, device: None)) as client:
        base = f"http://127.0.0.1:{client.port}/"
        go(page, base, "steer?latent=3")
        stop = page.get_by_role("button", name="Stop")
        assert stop.is_hidden()
        page.get_by_label("tokens", exact=True).fill("200")
        page.get_by_role("button", name="Generate").click()
        for n in (1, 2):
            writer.go.release()
            made = page.locator(".made", has_text=re.compile(f"^( word){{{n}}}$"))
            made.wait_for()
        stop.click()
        page.wait_for_selector(".output:has-text('(stopped)') >> nth=3")
        assert stop.is_hidden()
        released(page, writer, 1)

        writer.begun.clear()
        page.get_by_role("button", name="Generate").click()
        assert writer.begun.wait(30)
        go(page, base, "notes")  # leaving the page stops it as well
        released(page, writer, 2)
        assert max(map(len, writer.ended)) < 200 * len(" word")


def released(page, writer, ended):
    """Let the writer write until so many of its texts have ended."""
    for _ in range(300):
        writer.go.release()
        page.wait_for_timeout(50)
        if len(writer.ended) == ended:
            return
    pytest.fail(f"{len(writer.ended)} texts ended, not {ended}")


def test_notes_survive_a_restart(browser, tmp_path):
    features = write_tables(tmp_path / "features", 8)
    for round_ in range(2):
        with command(["--features", str(features)]) as (_, port, _, _):
            context = browser.new_context()
            page = context.new_page()
            base = f"http://127.0.0.1:{port}/"
            go(page, base, "latent/3")
            if round_ == 0:
                page.get_by_label("note", exact=True).fill("fires on <b>banks</b>\nof rivers")
                page.get_by_label("tags").fill("water, money, water")
                page.wait_for_selector("[role=status]:has-text('saved')")
            else:  # the first server was killed
                note = page.get_by_label("note", exact=True).input_value()
                assert note == "fires on <b>banks</b>\nof rivers"
                assert page.get_by_label("tags").input_value() == "money, water"
                go(page, base, "notes")
                assert "fires on <b>banks</b>" in page.locator(".note").inner_text()
                page.locator("a.tag:has-text('water')").click()
                page.wait_for_selector("table.latents")
                assert texts(page, "tbody a.latent") == ["3"]
            context.close()


def test_sql_is_asked_from_its_page(page, server):
    go(page, server, "sql")
    page.get_by_label("query").fill("SELECT latent, '<b>x</b>' AS t FROM latents WHERE latent < 2")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("table.sql")
    assert texts(page, "table.sql td") == ["0", "<b>x</b>", "1", "<b>x</b>"]
    page.get_by_label("query").fill("DROP VIEW latents")
    page.get_by_role("button", name="Run").click()
    page.wait_for_selector("[role=alert]:has-text('A query must be one SELECT')")
    page.wrong[:] = [w for w in page.wrong if "400" not in w]


@pytest.mark.parametrize("kind", ["server", "site"])
def test_two_saes_are_compared(page, tmp_path, kind):
    folders = []
    for name, n, seed in (("a", 40, 0), ("b", 24, 1)):
        folder = tmp_path / f"sae-{name}"
        sae = write_sae(folder, n, seed=seed)
        made = write_tables(tmp_path / name, n, seed=seed, sae=str(folder), sae_digest=sae.digest)
        folders.append(made)
    if kind == "site":
        write_site(*folders, tmp_path / "out")
        walk_comparison(page, f"file://{tmp_path}/out/index.html")
    else:
        with served(open_viewer(*folders)) as client:
            walk_comparison(page, f"http://127.0.0.1:{client.port}/")


def walk_comparison(page, base):
    go(page, base, "compare?desc=1")
    page.wait_for_selector("table.latents")
    cosines = [float(t) for t in texts(page, "td.cosine")]
    assert len(cosines) == 40
    assert cosines == sorted(cosines, reverse=True)
    first = page.locator("tbody tr").first
    ours, theirs = first.locator("a.latent").all_inner_texts()
    first.locator("a.latent").first.click()
    page.wait_for_selector(f"h1:has-text('Latent {ours}')")
    nearest = page.locator(".card:has-text('Nearest in') a.latent")
    assert nearest.inner_text() == theirs
    nearest.click()
    page.wait_for_selector(f"h1:has-text('Latent {theirs}')")
    assert "#/b/latent/" in page.url
    assert page.locator(".context").count() == CONTEXTS - 6
    go(page, base, "b/")
    page.wait_for_selector("table.latents")
    assert page.locator(".figure b").first.inner_text() == "24"


@pytest.mark.parametrize("path", ["", "latent/3", "search?q=court", "live", "steer?latent=3",
                                  "notes", "sql"])  # fmt: skip
def test_pages_fit_a_phone(browser, server, path):
    context = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True,
                                  has_touch=True)  # fmt: skip
    page = context.new_page()
    go(page, server, path)
    page.wait_for_timeout(300)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    for cell in page.locator("table.stack tbody tr:first-child td").all():
        assert cell.is_visible()  # no column is left out, and none is beyond the edge
        box = cell.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    if path.startswith("latent"):
        contexts = page.locator("section.main").bounding_box()
        statistics = page.locator(".stats").bounding_box()
        assert contexts["y"] < statistics["y"] < contexts["y"] + 3000
        page.get_by_role("button", name="5 more").click()
        assert page.locator(".context").count() == 10
    context.close()
