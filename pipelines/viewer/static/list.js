// The list of latents, with sorting and filters, which the address holds.
"use strict";

(function (SAE) {
  const { h } = SAE;
  const PAGE = 50;
  const COLUMNS = [
    ["latent", "latent", null],
    [null, "fires most on", null],
    ["density", "density", SAE.percent],
    ["max", "max", SAE.fixed],
    ["mean", "mean", SAE.fixed],
    ["token_entropy_bits", "entropy", SAE.fixed],
    ["n_tokens", "tokens", SAE.whole],
    ["kurtosis", "kurtosis", SAE.fixed],
    ["bimodality", "bimodality", SAE.fixed],
    ["encoder_decoder_cosine", "enc·dec", SAE.fixed],
  ];
  const RANGES = ["density", "context_density", "n_fire", "max", "mean", "token_entropy_bits",
    "n_tokens", "kurtosis", "bimodality", "encoder_decoder_cosine"];

  SAE.readable = (name) => name.replaceAll("_", " ").replace("encoder decoder", "encoder–decoder")
    .replace(" bits", " (bits)");

  /** The list with its filters. `columns` says what each column means. */
  SAE.list = function (columns) {
    const params = SAE.params;
    const filters = h("div.filters"), table = h("div.tablebox"), foot = h("div.pager");
    const section = h("section.list", { "aria-label": "Latents" }, filters, table, foot);
    let asked = 0;

    function changed(key, value, keepPage) {
      if (value === null || value === "") params.delete(key); else params.set(key, value);
      if (!keepPage) params.delete("offset");
      SAE.keepParams(params);
      load();
    }

    function sort(key) {
      const falling = params.get("sort") === key && params.get("desc") === "1";
      const first = params.get("sort") !== key;
      params.set("sort", key);
      // a first click sorts numbers from the highest, latents from the first
      params.set("desc", (first ? key !== "latent" : !falling) ? "1" : "0");
      changed("offset", null);
    }

    function range(name) {
      const [low, high] = (params.get(name) || "..").split("..");
      const input = (at, value, label) => h("input.number", {
        type: "text", inputmode: "decimal", value: value || "", placeholder: at,
        "aria-label": `${label} ${SAE.readable(name)}`,
        onchange: () => {
          const [from, to] = [inputs[0].value.trim(), inputs[1].value.trim()];
          changed(name, from || to ? `${from}..${to}` : "..");
        },
      });
      const inputs = [input("from", low, "lowest"), input("to", high, "highest")];
      return h("span.filter", { title: columns[name] || "" }, SAE.readable(name), inputs[0], "–",
        inputs[1], h("button.close", { type: "button", "aria-label": `remove the filter by ${name}`,
          onclick: () => { changed(name, null); drawFilters(); } }, "×"));
    }

    function drawFilters() {
      const token = h("input", { type: "search", placeholder: "fires on a token with …",
        value: params.get("fires_on") || "", "aria-label": "token filter",
        oninput: SAE.later(() => changed("fires_on", token.value), 250) });
      const more = h("select", { "aria-label": "add a filter", onchange: () => {
        if (more.value) { changed(more.value, ".."); drawFilters(); }
      } }, h("option", { value: "" }, "+ filter"),
      RANGES.filter((n) => !params.has(n)).map((n) => h("option", { value: n }, SAE.readable(n))));
      const dead = h("label.check", null, h("input", { type: "checkbox",
        checked: params.get("dead") === "1",
        onchange: (e) => changed("dead", e.target.checked ? "1" : null) }), "with dead latents");
      const tag = params.get("tag");
      SAE.replace(filters, token, RANGES.filter((n) => params.has(n)).map(range), more, dead,
        tag ? h("span.filter", null, `tag ${tag}`, h("button.close", { type: "button",
          "aria-label": "remove the filter by tag",
          onclick: () => { changed("tag", null); drawFilters(); } }, "×")) : null);
    }

    async function load() {
      const mine = ++asked;
      let answer;
      try {
        const wanted = new URLSearchParams(params);
        for (const name of RANGES) if (wanted.get(name) === "..") wanted.delete(name);
        answer = await SAE.source.latents(wanted);
      } catch (error) {
        if (mine === asked) SAE.replace(table, SAE.problem(error.message));
        return;
      }
      if (mine === asked) draw(answer);
    }

    function draw(answer) {
      SAE.walk = answer.rows.map((row) => row.latent);
      SAE.walkAddress = location.hash;
      const sorted = params.get("sort") || "latent", falling = params.get("desc") === "1";
      const head = h("tr", null, COLUMNS.map(([key, name, format]) => {
        const order = key === sorted ? (falling ? "descending" : "ascending") : null;
        const th = h("th" + (format ? ".num" : ""),
          { scope: "col", "aria-sort": order, title: columns[key] || "" });
        return SAE.add(th, key
          ? h("button", { type: "button", onclick: () => sort(key) }, name,
            h("span.arrow", null, order ? (falling ? " ↓" : " ↑") : ""))
          : name);
      }));
      const rows = answer.rows.map((row) => {
        const tr = h("tr", { tabindex: 0, "data-latent": row.latent,
          onclick: (e) => { if (!e.target.closest("a")) SAE.open("latent/" + row.latent); },
          onkeydown: (e) => { if (e.key === "Enter") SAE.open("latent/" + row.latent); } });
        return SAE.add(tr, COLUMNS.map(([key, name, format]) => {
          if (key === "latent") return h("td", null, SAE.latentLink(row.latent));
          if (key === null) {
            return h("td.what", null, row.dead ? h("span.dead", null, "dead") : SAE.named(row));
          }
          return h("td.num", { "data-name": name }, format(row[key]));
        }));
      });
      SAE.replace(table, rows.length
        ? h("table.latents.stack", null, h("thead", null, head), h("tbody", null, rows))
        : SAE.empty("No latent matches; remove or widen a filter."));
      const last = answer.offset + answer.rows.length;
      const step = (by, name) => h("button", { type: "button",
        disabled: by < 0 ? answer.offset === 0 : last >= answer.total,
        onclick: () => { changed("offset", Math.max(0, answer.offset + by), true);
          section.scrollIntoView(); } }, name);
      SAE.replace(foot, h("span", null, answer.total
        ? `${SAE.whole(answer.offset + 1)}–${SAE.whole(last)} of ${SAE.whole(answer.total)}` : ""),
      answer.total > PAGE ? [step(-PAGE, "← previous"), step(PAGE, "next →")] : null);
    }

    drawFilters();
    const ready = load();
    return { element: section, ready, filter: (name, low, high) => {
      changed(name, `${low}..${high}`);
      drawFilters();
      section.scrollIntoView({ block: "start" });
    } };
  };
})(window.SAE);
