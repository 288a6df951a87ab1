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
      h("p.muted", null, "The model reads the text. A token is coloured if a latent has " +
        "an unusual activation on it, or by one latent that you choose."),
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

  const COLOURED = Math.log10(2), DARKEST = 1.5;  // unusualness of one token in 2, and in 30

  const HOW = "activation, and how many tokens have a latent as unusual: 1 in …";

  /** The text "1 in n": about one token in n has a latent as unusual. */
  const oneIn = (unusual) => unusual < COLOURED ? "common" : `1 in ${SAE.whole(10 ** unusual)}`;

  function draw(answer, result) {
    const label = (latent) => answer.labels[latent] || { tokens: [], max: null };
    const relative = (latent, value) => value / Math.max(label(latent).max || value, 1e-9);
    const strengths = new Map();  // latent -> [its strongest activation in this text, unusualness]
    for (const { latents } of answer.tokens) {
      for (const [latent, value, unusual] of latents) {
        const [v, u] = strengths.get(latent) || [0, -Infinity];
        strengths.set(latent, [Math.max(v, value), Math.max(u, unusual)]);
      }
    }
    const ranked = [...strengths].map(([latent, [value, unusual]]) => [latent, value, unusual])
      .sort((a, b) => b[2] - a[2] || relative(b[0], b[1]) - relative(a[0], a[1]));
    let chosen = null, at = null;
    const line = h("div.livetext", { dir: "auto" }), caption = h("p.muted"), side = h("div.side"), list = h("div.side");

    /** Activation and scale that colour a token, and the text of its tip. */
    function heatOf(token) {
      if (chosen !== null) {
        const [, value] = token.latents.find(([l]) => l === chosen) || [chosen, 0];
        return [value, label(chosen).max, value ? `latent ${chosen}: ${SAE.number(value)}, ` +
          `${SAE.percent(relative(chosen, value))} of the maximum` : `latent ${chosen} does not fire here`];
      }
      if (!token.latents.length) return [0, null, "no latent fires here"];
      const [latent, value, unusual] = token.latents[0];
      return [unusual - COLOURED, DARKEST - COLOURED, `latent ${latent}: ${SAE.number(value)}, ` +
        `${SAE.percent(relative(latent, value))} of the maximum; ${oneIn(unusual)}` +
        (unusual < COLOURED ? "" : " tokens")];
    }

    function heats() {
      SAE.replace(caption, chosen === null
        ? "Coloured: tokens as unusual as 1 in 2 of the corpus or rarer; darkest: 1 in 30 or rarer."
        : ["Coloured: activation of latent ", SAE.latentLink(chosen), " as a share of its maximum."]);
      SAE.replace(line, answer.tokens.map((token, i) => {
        const [heat, scale, said] = heatOf(token);
        const [blank, span] = SAE.tokenSpan(token.text, heat, scale, i === at);
        span.sae.said = said;
        span.setAttribute("tabindex", 0);
        span.setAttribute("role", "button");
        const pick = () => { at = i; heats(); token_(); };
        span.addEventListener("click", pick);
        span.addEventListener("keydown", (e) => { if (e.key === "Enter") pick(); });
        return [blank, span];
      }));
    }

    function bars(pairs) {
      return h("ol.firing", null, pairs.map(([latent, value, unusual]) => {
        const button = h("button.plain", { type: "button", "aria-pressed": String(latent === chosen),
          title: "colour the text by this latent", onclick: () => {
            chosen = chosen === latent ? null : latent;
            heats(); token_(); all();
          } }, "heat");
        return h("li" + (latent === chosen ? ".chosen" : ""), {
          style: { "--share": Math.min(Math.max(unusual / DARKEST, 0), 1) } },
        SAE.latentLink(latent), SAE.named(label(latent), 3),
        h("span.num.muted", { title: `${SAE.percent(relative(latent, value))} of its maximum` },
          SAE.fixed(value)),
        h("span.num", { title: "about one token in this many has a latent as unusual" },
          oneIn(unusual)), button);
      }));
    }

    function token_() {
      const token = at === null ? null : answer.tokens[at];
      SAE.replace(side, h("h2", null, "On the token ", token ? SAE.token(token.text) : "…"),
        h("p.muted", null, HOW),
        !token ? SAE.empty("Choose a token of the text.")
          : token.latents.length ? bars(token.latents.slice(0, 20))
            : SAE.empty("No latent fires here."));
    }

    function all() {
      SAE.replace(list, h("h2", null, "Most unusual in the text"),
        h("p.muted", null, HOW), bars(ranked.slice(0, 20)));
    }

    const most = (token) => (token.latents.length ? token.latents[0][2] : -Infinity);
    at = answer.tokens.reduce((best, token, i) =>
      most(token) > (best === null ? -Infinity : most(answer.tokens[best])) ? i : best, null);
    heats(); token_(); all();
    SAE.replace(result, h("section.card", null, line, caption),
    h("div.two", null, h("section.card", null, side), h("section.card", null, list)), perToken());

    function perToken() {
      return h("details.card", null, h("summary", null, "Every token with its latents"),
        h("table.latents.tokentable", null, h("tbody", null, answer.tokens.map((token) =>
          h("tr", null, h("th", { scope: "row" }, SAE.token(token.text)),
            h("td", null, token.latents.slice(0, 6).map(([latent, value, unusual]) =>
              h("span.chip", null, SAE.latentLink(latent), " ",
                SAE.named(label(latent), 1), " ",
                h("span.muted", null, `${SAE.number(value)}, ${oneIn(unusual)}`)))))))));
    }
  }
})(window.SAE);
