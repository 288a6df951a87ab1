// Search: one box, with results by token, text, explanation and number.
"use strict";

(function (SAE) {
  const { h } = SAE;

  /** The search box, here or in the bar. */
  SAE.searchForm = function ({ big = false, value = "" } = {}) {
    const kinds = SAE.info && SAE.info.explanations ? "token, text, explanation or number"
      : "token, text or number";
    const input = h("input", { type: "search", name: "q", value, maxlength: 200,
      placeholder: big ? `Search by ${kinds}` : "Search", "aria-label": `search by ${kinds}`,
      autocomplete: "off", spellcheck: "false" });
    return h("form.search" + (big ? ".big" : ""), { role: "search", onsubmit: (event) => {
      event.preventDefault();
      const q = input.value.trim();
      if (/^#?\d+$/.test(q) && Number(q.replace("#", "")) < SAE.info.n_latents && q[0] === "#") {
        SAE.open("latent/" + q.slice(1));
      } else if (q) SAE.open("search?q=" + encodeURIComponent(q));
    } }, input, h("kbd", { "aria-hidden": "true" }, "/"));
  };

  SAE.pages.search = async function (main) {
    const q = SAE.params.get("q") || "";
    document.title = `${q} · search`;
    const results = h("div.results", null, SAE.empty("searching …"));
    SAE.replace(main, h("h1", null, "Search"), SAE.searchForm({ big: true, value: q }), results);
    let found;
    try {
      found = await SAE.source.search(q);
    } catch (error) {
      SAE.replace(results, SAE.problem(error.message));
      return;
    }
    SAE.walk = found.texts.map((t) => t.latent);
    SAE.walkAddress = location.hash;
    SAE.replace(results,
      found.latent === null ? null : h("section.card", null, h("p", null,
        h("a.button.strong", { href: SAE.link("latent/" + found.latent) },
          `Open latent ${found.latent}`))),
      explanations(found.explanations),
      found.tokens.rows.length ? [tokens(found), texts(found)] : [texts(found), tokens(found)]);
    const open = results.querySelector("a.button.strong");
    if (open) open.focus();
  };

  function explanations(rows) {
    if (!rows) return null;
    return h("section.card", null, h("h2", null, "In explanations"), rows.length
      ? h("ul.found", null, rows.map((r) => h("li", null, SAE.latentLink(r.latent),
        h("span", { dir: "auto" }, SAE.visible(r.explanation)))))
      : SAE.empty("No explanation has all of these words."));
  }

  const NUMBERS = [
    ["lift", "lift", (x) => `× ${SAE.fixed(x)}`,
      "how many times more often it fires on this token than on any token"],
    ["share", "of its firings", SAE.percent, "share of the latent's firings that are on this token"],
    ["count", "rows", SAE.whole, "number of rows with this token on which it fires"],
    ["mean", "mean", SAE.fixed, "its mean activation on this token"],
  ];

  /** The latents of a token: the most specific first, or sorted by the heading clicked. */
  function tokens({ tokens: { exact, rows } }) {
    const title = exact || !rows.length ? "Latents that fire on this token" : "Latents that fire on a token with this beginning";
    const section = h("section.card", null, h("h2", null, title));
    if (!rows.length) {
      return SAE.add(section, [SAE.empty("No latent has this token among the 100 tokens that it fires on most.")]);
    }
    const note = h("p.muted"), table = h("div");
    let sorted = null, falling = true;

    function draw() {
      const order = sorted === null ? rows : [...rows].sort((a, b) =>
        (falling ? -1 : 1) * (a[sorted] - b[sorted]) || a.latent - b.latent);
      SAE.replace(note, sorted === null
        ? "The most specific first: a large share of their firings, and strong ones, are on the token. "
        : [`Sorted by ${NUMBERS.find(([key]) => key === sorted)[1]}. `, h("button.plain", { type: "button",
          onclick: () => { sorted = null; draw(); } }, "most specific first")]);
      const head = ([key, name, , hint]) => {
        const now = key === sorted ? (falling ? "descending" : "ascending") : null;
        return h("th.num", { scope: "col", "aria-sort": now, title: hint },
          h("button", { type: "button", onclick: () => {
            falling = sorted === key ? !falling : true;
            sorted = key;
            draw();
          } }, name, h("span.arrow", null, now ? (falling ? " ↓" : " ↑") : "")));
      };
      SAE.replace(table, h("table.latents.stack", null, h("thead", null, h("tr", null,
        h("th", null, "latent"), h("th", null, "token"), NUMBERS.map(head),
        h("th", null, "fires most on"))),
      h("tbody", null, order.map((r) => h("tr", null, h("td", null, SAE.latentLink(r.latent)),
        h("td", null, SAE.tokens(r.texts, 3)),
        NUMBERS.map(([key, name, format]) => h("td.num", { "data-name": name }, format(r[key]))),
        h("td", { "data-name": "fires most on" }, SAE.named(r, 4)))))));
    }

    draw();
    return SAE.add(section, [note, table]);
  }

  function texts({ texts: rows, words }) {
    return h("section.card", null,
      h("h2", null, "Latents that fire in contexts with this text"),
      words ? h("p.muted", null, "This export searches only the latents that fire most on " +
        "each of the words; the server searches all latents.") : null,
      rows.length
        ? h("div.contexts", null, rows.map((r) => h("div.hit", null,
          h("div.row", null, SAE.latentLink(r.latent), SAE.named(r, 3),
            h("span.muted", null, r.n_peak
              ? `fires on the text in ${SAE.whole(r.n_peak)} of ${SAE.whole(r.n)} contexts`
              : `fires beside the text in ${SAE.whole(r.n)} context${r.n === 1 ? "" : "s"}`)),
          SAE.context(r.context, r.max, { title: r.title }, { full: !r.n_peak }))))
        : SAE.empty("No context of any latent contains this text."));
  }
})(window.SAE);
