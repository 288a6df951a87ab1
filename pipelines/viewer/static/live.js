// Live text: type, and see the latents that fire on each token.
"use strict";

(function (SAE) {
  const { h } = SAE;
  const EXAMPLE = "The senator told the court that the river had frozen, and nobody believed him.";

  SAE.pages.live = async function (main) {
    document.title = "live text";
    const title = h("h1", null, "Live text");
    if (!SAE.source.live) {
      SAE.replace(main, title, SAE.needsServer("Live text"));
      return;
    }
    const text = h("textarea", { rows: 2, maxlength: 5000, "aria-label": "text", dir: "auto",
      value: SAE.params.get("text") || SAE.kept.live || EXAMPLE, spellcheck: "false" });
    const state = h("span.muted", { role: "status" });
    const run = h("button.strong", { type: "submit" }, "Show latents");
    const result = h("div.live");
    SAE.replace(main, title,
      h("p.muted", null, "The model reads the text; each token is heated by the latent " +
        "nearest to its own maximum there, or by the one you choose."),
      h("form.ask", { onsubmit: (e) => { e.preventDefault(); ask(); } }, text,
        h("div.row", null, run, h("span.keys", null, h("kbd", null, "Ctrl"), h("kbd", null, "↵")),
          state)), result);
    text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
    });
    let asked = 0, shown = null;
    text.addEventListener("input", SAE.later(() => { if (shown) ask(); }, 600));
    if (SAE.params.get("text")) await ask();

    async function ask() {
      const mine = ++asked, typed = text.value;
      SAE.kept.live = typed;
      state.textContent = "the model reads …";
      try {
        const answer = await SAE.source.activations(typed);
        if (mine !== asked) return;
        state.textContent = `${answer.tokens.length} tokens, ` +
          `${SAE.number(answer.n_firing / answer.tokens.length)} latents each`;
        shown = answer;
        draw(answer, result);
      } catch (error) {
        if (mine !== asked) return;
        if (error.busy) { setTimeout(() => { if (mine === asked) ask(); }, 800); return; }
        state.textContent = "";
        SAE.replace(result, SAE.problem(error.message));
      }
    }
  };

  function draw(answer, result) {
    const label = (latent) => answer.labels[latent] || { tokens: [], max: null };
    const relative = (latent, value) => value / Math.max(label(latent).max || value, 1e-9);
    // by share of its own maximum: a latent that always fires strongly says little
    for (const token of answer.tokens) {
      token.latents.sort((a, b) => relative(...b) - relative(...a));
    }
    const strengths = new Map();  // latent -> its strongest activation in this text
    for (const { latents } of answer.tokens) {
      for (const [latent, value] of latents) {
        strengths.set(latent, Math.max(strengths.get(latent) || 0, value));
      }
    }
    const ranked = [...strengths].sort((a, b) => relative(...b) - relative(...a));
    let chosen = null, at = null;
    const line = h("div.livetext", { dir: "auto" }), caption = h("p.muted"), side = h("div.side"), list = h("div.side");

    function heats() {
      SAE.replace(caption, chosen === null
        ? "Heat: the strongest latent of each token, as a share of its maximum."
        : ["Heat: latent ", SAE.latentLink(chosen), ", as a share of its maximum."]);
      SAE.replace(line, answer.tokens.map((token, i) => {
        const best = token.latents[0];
        const [latent, value] = chosen === null ? best || [null, 0]
          : token.latents.find(([l]) => l === chosen) || [chosen, 0];
        const [blank, span] = SAE.tokenSpan(token.text, value,
          latent === null ? null : label(latent).max, i === at);
        span.setAttribute("tabindex", 0);
        span.setAttribute("role", "button");
        const pick = () => { at = i; heats(); token_(); };
        span.addEventListener("click", pick);
        span.addEventListener("keydown", (e) => { if (e.key === "Enter") pick(); });
        return [blank, span];
      }));
    }

    function bars(pairs) {
      return h("ol.firing", null, pairs.map(([latent, value]) => {
        const button = h("button.plain", { type: "button", "aria-pressed": String(latent === chosen),
          title: "heat the text by this latent", onclick: () => {
            chosen = chosen === latent ? null : latent;
            heats(); token_(); all();
          } }, "heat");
        return h("li" + (latent === chosen ? ".chosen" : ""), {
          style: { "--share": Math.min(relative(latent, value), 1) } },
        SAE.latentLink(latent), SAE.tokens(label(latent).tokens, 3),
        h("span.num", null, SAE.fixed(value),
          h("span.muted", null, ` ${SAE.percent(relative(latent, value))}`)), button);
      }));
    }

    function token_() {
      const token = at === null ? null : answer.tokens[at];
      SAE.replace(side, h("h2", null, "On the token ", token ? SAE.token(token.text) : "…"),
        h("p.muted", null, "by share of each latent's own maximum"),
        !token ? SAE.empty("Choose a token of the text.")
          : token.latents.length ? bars(token.latents.slice(0, 20))
            : SAE.empty("No latent fires here."));
    }

    function all() {
      SAE.replace(list, h("h2", null, "Strongest in the text"),
        h("p.muted", null, "by share of each latent's own maximum"), bars(ranked.slice(0, 20)));
    }

    at = answer.tokens.reduce((best, token, i) =>
      token.latents.length && (best === null
        || relative(...token.latents[0]) > relative(...answer.tokens[best].latents[0]))
        ? i : best, null);
    heats(); token_(); all();
    SAE.replace(result, h("section.card", null, line, caption),
    h("div.two", null, h("section.card", null, side), h("section.card", null, list)), perToken());

    function perToken() {
      return h("details.card", null, h("summary", null, "Every token with its latents"),
        h("table.latents.tokentable", null, h("tbody", null, answer.tokens.map((token) =>
          h("tr", null, h("th", { scope: "row" }, SAE.token(token.text)),
            h("td", null, token.latents.slice(0, 6).map(([latent, value]) =>
              h("span.chip", null, SAE.latentLink(latent), " ",
                SAE.tokens(label(latent).tokens, 1), " ",
                h("span.muted", null, SAE.number(value))))))))));
    }
  }
})(window.SAE);
