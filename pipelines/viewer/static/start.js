// The start page: the origin of the tables, plots and the list of latents.
"use strict";

(function (SAE) {
  const { h } = SAE;

  const figure = (value, name, hint) =>
    h("div.figure", { title: hint || "" }, h("b", null, value), h("span", null, name));

  SAE.pages.start = async function (main) {
    const start = SAE.info;
    const run = start.run, list = SAE.list(start.columns);
    const pick = (name) => (low, high) => list.filter(name, low, high);
    const plot = (name, label, format, unit) =>
      SAE.histogram(start.plots[name], label, { format, unit, onpick: pick(name) });
    const density = (x) => SAE.percent(x);
    SAE.replace(main,
      h("section.hero", null,
        h("div", null,
          h("h1", null, h("bdi", null, run.model || start.name), " ",
            h("span.site", null, run.site)),
          SAE.searchForm({ big: true })),
        h("div.figures", null,
          figure(SAE.whole(start.n_latents), "latents"),
          figure(SAE.whole(start.n_dead), "dead", "fire on no row that was read"),
          figure(SAE.short(start.n_rows), "rows read"),
          figure(SAE.number(start.mean_firing), "latents a row",
            "mean number of latents that fire on a row"))),
      h("section.plots", null,
        SAE.scatter(start.scatter, (latent) => SAE.open("latent/" + latent)),
        plot("density", "Density, share of rows", density),
        plot("token_entropy_bits", "Entropy of its tokens", SAE.number, " bits"),
        plot("max", "Highest activation"),
        plot("encoder_decoder_cosine", "Encoder–decoder cosine"),
        plot("kurtosis", "Kurtosis of its activations"),
        plot("bimodality", "Bimodality of its activations")),
      list.element,
      h("details.ancestry", null, h("summary", null, "Where these tables come from"),
        h("dl", null, Object.entries(run).map(([key, value]) => [
          h("dt", null, key.replaceAll("_", " ")),
          h("dd", null, value !== null && typeof value === "object"
            ? JSON.stringify(value) : String(value))]))));
    await list.ready;
  };
})(window.SAE);
