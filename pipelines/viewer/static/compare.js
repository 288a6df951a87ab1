// Two SAEs: each latent's nearest in the other, by decoder cosine.
"use strict";

(function (SAE) {
  const { h } = SAE;

  SAE.pages.compare = async function (main) {
    document.title = "compare";
    const other = SAE.info.compare, params = SAE.params, title = h("h1", null, "Compare");
    if (!other) {
      SAE.replace(main, title, SAE.empty(
        "One SAE is shown. `sae-features serve --features A --compare B` puts a second beside it."));
      return;
    }
    const box = h("div.tablebox"), foot = h("div.pager"), filters = h("div.filters");
    let asked = 0;

    async function load() {
      const mine = ++asked;
      SAE.keepParams(params);
      let answer;
      try {
        answer = await SAE.source.compare(params);
      } catch (error) {
        SAE.replace(box, SAE.problem(error.message));
        return;
      }
      if (mine !== asked) return;
      SAE.walk = answer.rows.map((r) => r.latent);
      SAE.walkAddress = location.hash;
      const cells = (latent, label, sae) => label && [h("td", null, SAE.latentLink(latent, sae)),
        h("td", null, label.dead ? h("span.dead", null, "dead") : SAE.named(label, 3)),
        h("td.num", { "data-name": "density" }, SAE.percent(label.density))];
      SAE.replace(box, h("table.latents.stack", null,
        h("thead", null, h("tr", null, h("th", null, SAE.info.name), h("th", null, "fires most on"),
          h("th.num", null, "density"), h("th.num", null, h("button", { type: "button",
            title: "sort by cosine", onclick: () => {
              params.set("desc", params.get("desc") === "1" ? "0" : "1");
              params.delete("offset");
              load();
            } }, params.get("desc") === "1" ? "cosine ↓" : "cosine ↑")),
          h("th", null, other.name), h("th", null, "fires most on"), h("th.num", null, "density"))),
        h("tbody", null, answer.rows.map((r) => h("tr", null, cells(r.latent, r.ours, "a"),
          h("td.num.cosine", { "data-name": "cosine", style: { "--share": Math.max(0, r.cosine) } },
            SAE.fixed(r.cosine)), cells(r.other, r.theirs, "b"))))));
      const last = answer.offset + answer.rows.length;
      const step = (by, name) => h("button", { type: "button",
        disabled: by < 0 ? answer.offset === 0 : last >= answer.total,
        onclick: () => { params.set("offset", Math.max(0, answer.offset + by)); load(); } }, name);
      SAE.replace(foot, h("span", null, answer.total
        ? `${SAE.whole(answer.offset + 1)}–${SAE.whole(last)} of ${SAE.whole(answer.total)}`
        : "no pair matches"), step(-50, "← previous"), step(50, "next →"));
      const active = params.get("low") || params.get("high");
      SAE.replace(filters, active ? h("span.filter", null,
        `cosine ${SAE.number(Number(params.get("low")))}–${SAE.number(Number(params.get("high")))}`,
        h("button.close", { type: "button", "aria-label": "remove the cosine filter", onclick: () => {
          for (const key of ["low", "high", "offset"]) params.delete(key);
          load();
        } }, "×")) : null);
    }

    const about = (name, info) => h("div.figure", null, h("b", null, h("bdi", null, name)),
      h("span", null, `${SAE.whole(info.n_latents)} latents · ${info.run.model || ""} ${info.run.site}`));
    const matches = SAE.info.matches ? SAE.matches(SAE.info.matches, other.name) : null;
    SAE.replace(main, title, matches && matches.element,
      matches && h("h2", null, "Nearest by decoder cosine"),
      h("p.muted", null, "For each latent of the first SAE, the latent of the second SAE with the " +
        "highest cosine between their decoder rows."),
      other.differences.length ? h("div.card.warning", { role: "note" }, other.differences.map((d) =>
        h("p", null, d))) : null,
      h("section.plots.compare", null,
        h("div.figures", null, about(SAE.info.name, SAE.info), about(other.name, other),
          h("div.figure", null, h("b", null, SAE.number(other.median)),
            h("span", null, "median cosine")),
          h("div.figure", null, h("b", null, SAE.percent(other.above_90)),
            h("span", null, "above 0.9"))),
        SAE.histogram(other.cosines, "Cosine to the nearest", { of: "latents", onpick: (low, high) => {
          params.set("low", low);
          params.set("high", high);
          params.delete("offset");
          load();
        } })), filters, box, foot);
    await Promise.all([load(), matches && matches.ready]);
  };
})(window.SAE);
