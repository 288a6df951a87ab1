// The notes on all latents, and SQL if the server allows it.
"use strict";

(function (SAE) {
  const { h } = SAE;

  SAE.pages.notes = async function (main) {
    document.title = "notes";
    const title = h("h1", null, "Notes");
    if (!SAE.source.live) {
      SAE.replace(main, title, SAE.needsServer("Keeping notes"));
      return;
    }
    const { rows, path } = await SAE.source.notes();
    const tags = [...new Set(rows.flatMap((r) => r.tags))].sort();
    SAE.walk = rows.map((r) => r.latent);
    SAE.walkAddress = location.hash;
    SAE.replace(main, title, h("p.muted", null, `Saved in ${path}.`),
      tags.length ? h("p.tags", null, tags.map((tag) => h("a.tag", {
        href: SAE.link(`?tag=${encodeURIComponent(tag)}`) }, SAE.visible(tag)))) : null,
      rows.length ? h("section.card", null, h("ul.found", null, rows.map((r) => h("li", null,
        SAE.latentLink(r.latent), h("div", null, SAE.tokens(r.label && r.label.tokens, 3),
          r.tags.map((tag) => h("span.tag", null, SAE.visible(tag))),
          h("p.note", { dir: "auto" }, SAE.paragraphs(r.note)))))))
        : SAE.empty("No latent has a note yet; write one on its page."));
  };

  SAE.pages.sql = async function (main) {
    document.title = "SQL";
    const title = h("h1", null, "SQL");
    if (!SAE.source.live || !SAE.info.sql) {
      SAE.replace(main, title, SAE.source.live
        ? SAE.empty("SQL from the page is off; start `sae-features serve --allow-sql`.")
        : SAE.needsServer("SQL"));
      return;
    }
    const sql = h("textarea.code", { rows: 5, "aria-label": "query", spellcheck: "false",
      value: SAE.kept.sql || "SELECT latent, density, top_tokens\nFROM latents\nORDER BY density DESC" +
        "\nLIMIT 20" });
    const box = h("div.tablebox"), state = h("span.muted", { role: "status" });
    async function run() {
      SAE.kept.sql = sql.value;
      state.textContent = "asking …";
      try {
        const answer = await SAE.source.sql(sql.value);
        state.textContent = `${answer.rows.length} rows${answer.more ? ", there are more" : ""}`;
        const at = answer.columns.indexOf("latent");
        SAE.replace(box, h("table.latents.sql", null,
          h("thead", null, h("tr", null, answer.columns.map((c) => h("th", null, SAE.visible(c))))),
          h("tbody", null, answer.rows.map((row) => h("tr", null, row.map((value, i) =>
            i === at && Number.isInteger(value) ? h("td", null, SAE.latentLink(value))
              : typeof value === "number" ? h("td.num", null, String(value))
                : h("td", { dir: "auto" }, value === null ? h("span.muted", null, "null")
                  : SAE.visible(String(value)))))))));
      } catch (error) {
        state.textContent = "";
        SAE.replace(box, SAE.problem(error.message));
      }
    }
    sql.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
    });
    SAE.replace(main, title, h("p.muted", null, "One SELECT over latents, contexts, histograms, " +
      "neighbours, tokens, documents and firings. It cannot change them."),
    h("form.ask", { onsubmit: (e) => { e.preventDefault(); run(); } }, sql,
      h("div.row", null, h("button.strong", { type: "submit" }, "Run"),
        h("span.keys", null, h("kbd", null, "Ctrl"), h("kbd", null, "↵")), state)), box);
  };
})(window.SAE);
