"""Pages of the viewer in a real browser, over HTTP and, exported, from the disk."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("starlette", reason="the viewer's server is an extra: .[viewer]")
pytest.importorskip("uvicorn", reason="the viewer's server is an extra: .[viewer]")

from sae_harvest.common.errors import RunError
from sae_harvest.pipelines.viewer.site import write_site
from tests.made_tables import (
    HOSTILE_LATENT,
    STRATA,
)
from tests.viewer_cases import N, go, texts

CONTEXTS = sum(n for _, n in STRATA)
pytest_plugins = ("tests.viewer_fixtures",)
pytestmark = pytest.mark.slow


# ---- the start page and its list


def test_the_start_page_lists_sorts_and_filters(page, base, tables):
    go(page, base)
    assert page.title() == f"{tables.parent.name}/features · latents"
    page.wait_for_selector("table.latents")
    assert texts(page, ".figure b")[:2] == [str(N), "1"]
    assert page.locator("tbody tr").count() == N - 1
    assert page.locator(".plots svg").count() == 6
    for plot in page.locator(".plots .plot").all():  # what the height and the width are of
        assert re.search(r"↑ (0 to \d+ latents|highest activation)", plot.inner_text())
    density = page.locator("figure:has-text('Density, share of rows')").inner_text()
    assert "log scale" in density
    assert density.count("%") == 3
    page.get_by_role("button", name="max", exact=True).click()
    page.wait_for_selector("th[aria-sort=descending] >> text=max")
    values = [float(v) for v in texts(page, "tbody tr td:nth-child(4)")]
    assert values == sorted(values, reverse=True)
    page.get_by_role("button", name=re.compile("^max")).click()
    page.wait_for_selector("th[aria-sort=ascending]")
    values = [float(v) for v in texts(page, "tbody tr td:nth-child(4)")]
    assert values == sorted(values)

    page.get_by_label("add a filter").select_option("max")
    page.get_by_label("lowest max").fill("10")
    page.get_by_label("lowest max").press("Enter")
    page.wait_for_selector(f".pager:not(:has-text('of {N - 1}'))")
    values = [float(v) for v in texts(page, "tbody tr td:nth-child(4)")]
    assert values
    assert min(values) >= 10
    page.get_by_label("token filter").fill("river")
    page.wait_for_selector("tbody tr td:has-text('river')")
    page.locator("td.what", has_not_text="river").first.wait_for(state="detached")
    assert all("river" in what for what in texts(page, "td.what"))
    address = page.url
    go(page, base, address.split("#/")[1])  # the address holds all of it
    page.wait_for_selector("table.latents")
    assert page.get_by_label("token filter").input_value() == "river"
    assert all("river" in what for what in texts(page, "td.what"))


def test_a_bar_of_a_plot_filters_the_list_and_a_point_opens_its_latent(page, base):
    go(page, base)
    page.wait_for_selector("table.latents")
    bar = page.locator("figure:has-text('Kurtosis') .bar.pick").first
    bar.click()
    page.wait_for_selector(".filter:has-text('kurtosis')")
    page.locator(f"tbody tr:nth-child({N - 1})").wait_for(state="detached")
    assert 0 < page.locator("tbody tr").count() < N - 1
    page.locator("canvas").scroll_into_view_if_needed()
    box = page.locator("canvas").bounding_box()
    for at in range(0, 100, 2):  # somewhere on the diagonals there is a point
        x = box["x"] + box["width"] * at / 100
        page.mouse.move(x, box["y"] + box["height"] / 2)
        if page.locator("#tip").is_visible():
            break
    latent = re.findall(r"latent (\d+)", page.locator("#tip").inner_text())[0]
    page.mouse.click(x, box["y"] + box["height"] / 2)
    page.wait_for_selector(f"h1:has-text('Latent {latent}')")


# ---- a latent's page


def test_a_latent_shows_its_contexts_with_heat_and_values(page, base):
    go(page, base, "latent/5")
    assert page.locator("h1").inner_text() == "Latent 5"
    assert texts(page, ".explanation") == ["places to drink"]
    assert page.locator(".context").count() == CONTEXTS - 6  # all that fire
    values = [float(v) for v in texts(page, ".stratum:first-child .value")]
    assert values == sorted(values, reverse=True)
    peaks = page.locator(".stratum:first-child .t.peak")
    assert set(peaks.all_inner_texts()) == {"café"}
    colours = peaks.evaluate_all("all => all.map((e) => getComputedStyle(e).backgroundColor)")
    assert len(set(colours)) > 3  # ten contexts from the maximum down to half of it
    peaks.first.hover()
    tip = page.locator("#tip").inner_text()
    assert "“ café”" in tip
    assert "100 % of the maximum" in tip
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()
    page.get_by_role("button", name="Silent").click()
    assert page.locator(".context").count() == 6
    assert "it does not fire" in page.locator(".contexts").inner_text()
    assert page.locator(".contexts .t.peak[class*=' h']").count() == 0
    assert page.locator(".logits li").count() > 10
    assert texts(page, ".near li a.latent")[:2] == ["6", "7"]


def test_a_context_opens_and_links_its_document(page, base):
    go(page, base, "latent/5")
    row = page.locator(".context").first
    row.focus()
    page.keyboard.press("Enter")
    assert row.locator(".detail").is_visible()
    assert "row" in row.locator(".detail").inner_text()
    links = page.locator(".source a")
    assert links.count() > 0
    for href in links.evaluate_all("all => all.map((e) => e.href)"):
        assert href.startswith("https://example.org/")
    assert links.first.get_attribute("rel") == "noopener noreferrer"
    page.get_by_role("button", name="Full").click()
    assert page.locator(".text.cut").count() == 0


def test_heat_can_be_read_in_light_and_in_dark(browser, site):
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        go(page, site, "latent/5")
        for level in range(1, 10):
            ink, ground = page.locator(f".legend .h{level}").evaluate(
                """(e) => {
                    const style = getComputedStyle(e), c = document.createElement("canvas");
                    const p = c.getContext("2d", {willReadFrequently: true});
                    return [style.color, style.backgroundColor].map((colour) => {
                        p.fillStyle = colour; p.fillRect(0, 0, 1, 1);
                        return [...p.getImageData(0, 0, 1, 1).data];
                    });
                }"""
            )
            assert contrast(ink, ground) >= 4.5, (scheme, level)
        context.close()


def contrast(ink, ground):
    """WCAG's contrast ratio."""

    def luminance(colour):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (v / 255 for v in colour[:3])
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(ink), luminance(ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_dead_latent_and_one_that_does_not_exist_are_said(page, base):
    go(page, base, f"latent/{N - 1}")
    assert "fired on no row" in page.locator("main").inner_text()
    if base.startswith("file"):
        go(page, base, f"latent/{N}")
        assert f"There is no latent {N}" in page.locator("[role=alert]").inner_text()
    go(page, base, "nothing")
    assert "no such page" in page.locator("[role=alert]").inner_text()


# ---- hostile text


def test_hostile_text_is_shown_harmlessly(page, base):
    go(page, base, f"latent/{HOSTILE_LATENT}")
    page.get_by_role("button", name="Full").click()
    shown = page.locator(".contexts").inner_text()
    assert "<script>window.hacked = 1</script>" in shown
    assert "<img src=x onerror='window.hacked = 1'>" in shown
    assert "</style><style>body{display:none}" in shown
    assert "⟨RLO⟩detrevni si siht⟨PDF⟩" in shown
    assert "a␀b␛[31mred␇" in shown
    assert "مرحبا بالعالم" in shown
    assert "👩‍👩‍👧‍👦 🇪🇺" in shown
    assert "\u202e" not in shown
    assert "\x00" not in shown
    assert page.locator("main script, main img, main style").count() == 0
    assert page.evaluate("() => window.hacked") is None
    # a title that is markup, with an address that is a script: text, not a link
    row = page.locator(".context:has(.source:has-text('<script>'))").first
    row.click()
    assert "<script>" in row.locator(".detail").inner_text()
    assert row.locator("a").count() == 0
    assert page.locator("a[href^=javascript]").count() == 0
    go(page, base, "search?q=%3Cscript%3Ewindow.hacked%20%3D%201")
    assert page.evaluate("() => window.hacked") is None
    page.wait_for_selector(".hit")
    assert f"{HOSTILE_LATENT}" in texts(page, ".hit .row a.latent")


# ---- search and keys


def test_search_by_token_text_and_number(page, base):
    go(page, base)
    page.keyboard.press("/")
    page.keyboard.type("court")
    page.keyboard.press("Enter")
    page.wait_for_selector(".hit")
    assert texts(page, "table.latents tbody a.latent") != []
    assert {"court"} == {t.strip("·\n ") for t in texts(page, "tbody td:nth-child(2) .token")}
    assert page.locator(".hit").first.locator(".t.peak").inner_text() == "court"
    assert "fires on the text" in page.locator(".hit").first.inner_text()
    page.get_by_role("button", name="rows").click()
    page.wait_for_selector("th[aria-sort=descending] >> text=rows")
    rows = [int(t.replace(",", "")) for t in texts(page, "tbody td:nth-child(5)")]
    assert len(rows) > 1
    assert rows == sorted(rows, reverse=True)
    page.get_by_role("button", name="rows").click()
    page.wait_for_selector("th[aria-sort=ascending] >> text=rows")
    assert texts(page, "tbody td:nth-child(5)") == [f"{n:,}" for n in sorted(rows)]
    page.get_by_role("button", name="most specific first").click()
    assert page.locator("th[aria-sort]").count() == 0
    go(page, base, "search?q=the%20court%20of")
    page.wait_for_selector(".hit, .empty >> nth=1")
    for hit in page.locator(".hit .text").all_text_contents():
        assert "the court of" in hit
    go(page, base, "search?q=17")
    page.get_by_role("link", name="Open latent 17").click()
    page.wait_for_selector("h1:has-text('Latent 17')")
    go(page, base, "search?q=zzzz")
    assert "No context" in page.locator(".results").inner_text()


def test_keys_walk_the_list_and_latents(page, base):
    go(page, base, "?sort=max&desc=1")
    page.wait_for_selector("table.latents")
    order = [int(t) for t in texts(page, "tbody a.latent")]
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"h1:has-text('Latent {order[1]}')")
    page.keyboard.press("j")
    page.wait_for_selector(f"h1:has-text('Latent {order[2]}')")
    page.keyboard.press("k")
    page.keyboard.press("k")
    page.wait_for_selector(f"h1:has-text('Latent {order[0]}')")
    page.keyboard.press("u")
    page.wait_for_selector("table.latents")
    assert "sort=max" in page.url
    page.keyboard.press("?")
    assert page.locator("dialog").is_visible()
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    go(page, base, "latent/3")
    page.keyboard.press("j")
    page.wait_for_selector("h1:has-text('Latent 4')")
    page.keyboard.press("t")
    assert page.locator("html").get_attribute("data-theme") in ("dark", "light")
    page.keyboard.press("/")
    page.keyboard.type("jk?")  # keys typed into a field are text
    assert page.locator(".search input").input_value() == "jk?"


def test_an_export_is_not_written_over_something_else(tables, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="holds something already"):
        write_site(tables, None, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
