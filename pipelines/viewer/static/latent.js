// A latent's page.
"use strict";

(function (SAE) {
  const { h } = SAE;
  const DECILES = Array.from({ length: 10 }, (_, i) => `decile_${10 - i}`);
  const SHOWN = [
    ["all", "All", ["top", ...DECILES, "random"]],
    ["top", "Top", ["top"]],
    ["deciles", "Deciles", DECILES],
    ["random", "Random", ["random"]],
    ["silent", "Silent", ["hard_negative", "inactive"]],
  ];
  const FEW = 5;  // contexts of a stratum that a phone shows before a click on "more"
  const TITLES = { top: "Top activations", random: "Drawn from all firings",
    hard_negative: "Similar contexts in which it does not fire",
    inactive: "Contexts in which it does not fire" };

  SAE.pages.latent = async function (main, [number]) {
    const page = await SAE.source.latent(Number(number));
    const s = page.statistics, maximum = s.max || 1;
    document.title = `latent ${page.latent} · ${SAE.info.name}`;
    SAE.replace(main, heading(page), h("div.columns", null,
      h("div.side", null, statistics(page), lens(s), scores(page), programs(page), near(page),
        nearest(page), notes(page)),
      h("div.texts", null, simulated(page, maximum), contexts(page, maximum))));
  };

  function heading(page) {
    const s = page.statistics, n = page.latent;
    const total = Math.max(s.n_fire, 1);
    const jump = (by, name, key) => h("a.button", {
      href: SAE.link("latent/" + SAE.neighbour(n, by)), title: `key ${key}` }, name);
    return h("section.head", null,
      h("div.row", null, h("h1", null, `Latent ${n}`), h("div.buttons", null,
        jump(-1, "← previous", "k"), jump(1, "next →", "j"),
        h("a.button.strong", { href: SAE.link(`steer?latent=${n}`) }, "Steer"))),
      page.explanation ? h("p.explanation", { dir: "auto" }, SAE.visible(page.explanation)) : null,
      page.label && page.label !== page.explanation
        ? h("p.label", { dir: "auto", title: "what predicts it best by score" }, SAE.visible(page.label))
        : null,
      s.dead ? h("p", null, "This latent is dead: it fired on no row that was read.")
        : h("div.fireson", null, h("span.muted", null, "fires on"),
          s.top_tokens.map((t, i) => SAE.token(t,
            h("b", null, SAE.percent(s.top_token_counts[i] / total))))));
  }

  function statistics(page) {
    const s = page.statistics, columns = SAE.info.columns;
    const stat = (name, value, hint) =>
      h("div", { title: hint || columns[name] || "" }, h("dt", null, name), h("dd", null, value));
    const marks = [["q50", "median"], ["q99", "99 %"]].map(([q, name]) => [s[q], name]);
    return h("section.card", null, h("h2", null, "Activations"),
      SAE.activationHistogram(page.histogram, s.dead ? [] : marks),
      h("dl.stats", null,
        stat("density", SAE.percent(s.density), `${SAE.whole(s.n_fire)} rows`),
        stat("contexts", SAE.percent(s.context_density), `${SAE.whole(s.n_contexts)} contexts`),
        stat("max", SAE.number(s.max), columns.max),
        stat("mean", SAE.number(s.mean), columns.mean),
        stat("median", SAE.number(s.q50)),
        stat("std", SAE.number(s.std)),
        stat("tokens", SAE.whole(s.n_tokens), columns.n_tokens),
        stat("entropy", s.token_entropy_bits === null ? "–"
          : SAE.number(s.token_entropy_bits) + " bits", columns.token_entropy_bits),
        stat("kurtosis", SAE.number(s.kurtosis)),
        stat("bimodality", SAE.number(s.bimodality)),
        stat("enc·dec cosine", SAE.number(s.encoder_decoder_cosine),
          columns.encoder_decoder_cosine),
        stat("encoder bias", SAE.number(s.encoder_bias))),
      s.position_profile && s.position_profile.length && !s.dead
        ? [h("h3", null, "Position in the context"),
          SAE.profile(s.position_profile, "share of its firings in each part of the context",
            SAE.info.run.context_length)]
        : null,
      s.strongest_tokens && s.strongest_tokens.length ? [h("h3", null, "Strongest on"),
        h("div.tokens", null, s.strongest_tokens.map((t, i) =>
          SAE.token(t, h("b", null, SAE.number(s.strongest_token_means[i])))))] : null);
  }

  function lens(s) {
    if (!s.top_logit_tokens) return null;
    const side = (tokens, logits, name, cls) => {
      const peak = Math.max(...logits.map(Math.abs), 1e-9);
      const list = h("ol.logits." + cls, null, tokens.map((t, i) => h("li", {
        style: { "--share": Math.abs(logits[i]) / peak } }, SAE.token(t),
      h("span.num", null, SAE.fixed(logits[i])))));
      return h("div", null, h("h3", null, name), list);
    };
    const section = h("section.card", null,
      h("h2", { title: "next tokens whose logits its decoder row raises most and lowers most" }, "Logit lens"),
      h("div.two", null, side(s.top_logit_tokens, s.top_logits, "raises", "for"),
        side(s.bottom_logit_tokens, s.bottom_logits, "lowers", "against")));
    const more = h("button.plain", { type: "button", onclick: () => {
      more.textContent = section.classList.toggle("whole") ? "show fewer" : "show all";
    } }, "show all");
    return s.top_logits.length > 10 ? SAE.add(section, more) : section;
  }

  function near(page) {
    const table = (rows, key, name) => h("div", null, h("h3", null, name),
      rows.length ? h("ol.near", null, rows.map((n) => h("li", null, SAE.latentLink(n.other),
        SAE.named(n, 1), h("span.num", null, n[key].toFixed(2).replace("-", "−")))))
        : SAE.empty("none"));
    return h("section.card", null, h("h2", null, "Neighbours"), h("div.two", null,
      table(page.neighbours.cosine, "decoder_cosine", "decoder cosine"),
      table(page.neighbours.cofire, "jaccard", "fires together (Jaccard)")));
  }

  function programs(page) {
    if (!page.programs || !page.programs.length) return null;
    const { rows, positives } = page.programs[0];
    const two = (x) => x === null ? "–" : x.toFixed(2);
    const score = (p) => p.f1 === null ? "no held-out firing"
      : `F1 ${two(p.f1)} (95 %: ${two(p.f1_low)} to ${two(p.f1_high)}); another latent's program `
        + `${two(p.other_f1)}, always firing ${two(p.always_f1)}`;
    // patterns are separated by semicolons outside quotes
    const patterns = (text) => text.match(/(?:"(?:[^"\\]|\\.)*"|[^;"])+/g) || [];
    return h("section.card.programs", null,
      h("h2", { title: "what predicts its activation from tokens alone" }, "Programs"),
      h("p.muted", null, `scored on ${SAE.whole(rows)} held-out rows, ` +
        `${SAE.whole(positives)} of them with a firing`),
      page.programs.map((p) => [h("h3", null, p.kind), h("p.muted", null, score(p)),
        h("ul", { dir: "auto" }, patterns(p.program || "").map((line) =>
          h("li", null, SAE.visible(line.trim()))))]));
  }

  /** Scores of the explanation, each beside its floors. */
  function scores(page) {
    if (!page.explained) return null;
    const value = ([x, low, high]) => x === null ? "–"
      : x.toFixed(2) + (low === null ? "" : ` (${low.toFixed(2)} to ${high.toFixed(2)})`);
    return h("section.card.scores", null,
      h("h2", { title: "on documents that the explainer has not seen" }, "Scores"),
      page.explained.scores.map(({ task, part, metric, subjects }) => [
        h("h3", null, `${task}, ${part}: ${metric}`),
        h("ul", null, Object.entries(subjects).map(([subject, score]) => h("li", null,
          subject === "explanation" ? h("b", null, subject) : subject, " ", value(score),
          score[4] ? h("span.muted", null, ` ${score[4]} failed`) : null)))]));
  }

  /** Excerpts twice: with the latent's activations, and as simulated from the explanation. */
  function simulated(page, maximum) {
    if (!page.explained || !page.explained.simulations.length) return null;
    const line = (row, values, name) => h("div.line", null, h("span.muted", null, name),
      h("div.text", { dir: SAE.isRightToLeft(row.tokens.join("")) ? "rtl" : "ltr" },
        row.tokens.map((text, i) => SAE.tokenSpan(text, values[i], maximum, false))));
    return h("section.card.simulated", null,
      h("h2", { title: "activations above, those that a model expects from the explanation below" },
        "Real and simulated"),
      page.explained.simulations.map((row) => h("div.pair", null,
        line(row, row.activations, "real"), line(row, row.simulated, "simulated"))));
  }

  function nearest(page) {
    if (!page.nearest || !SAE.info.compare) return null;
    const { other, cosine, label } = page.nearest;
    return h("section.card", null, h("h2", null, "Nearest in ", SAE.info.compare.name),
      h("p", null, SAE.latentLink(other, "b"), " ", SAE.named(label, 3),
        h("span.muted", null, ` cosine ${SAE.number(cosine)}, density `,
          SAE.percent(label && label.density))));
  }

  function notes(page) {
    const section = h("section.card.notes", null, h("h2", null, "Notes"));
    if (!SAE.source.live) {
      return SAE.add(section, SAE.empty("Notes need the server: run `sae-features serve`."));
    }
    const state = h("span.muted", { role: "status" });
    if (page.notes.problem) return SAE.add(section, [SAE.problem(page.notes.problem)]);
    const note = h("textarea", { rows: 4, "aria-label": "note", value: page.notes.note,
      placeholder: "What does this latent stand for?" });
    const tags = h("input", { type: "text", "aria-label": "tags, with commas between them",
      placeholder: "tags, with commas", value: page.notes.tags.join(", ") });
    let queue = Promise.resolve();
    function save() {
      state.textContent = "saving …";
      const wanted = tags.value.split(",").map((t) => t.trim()).filter(Boolean);
      const text = note.value;
      // saved one after the other, so that the note typed last is kept
      queue = queue.then(() => SAE.source.saveNotes(page.latent, text, wanted)).then(
        () => { state.textContent = "saved"; },
        (error) => { state.textContent = error.message; });
    }
    const soon = SAE.later(save, 700);
    for (const field of [note, tags]) {
      field.addEventListener("input", () => { state.textContent = "typing …"; soon(); });
    }
    SAE.leaving(soon.now);
    return SAE.add(section, [note, tags, state]);
  }

  function contexts(page, maximum) {
    const box = h("div.contexts"), section = h("section.card.main", { "aria-label": "Contexts" });
    const narrow = window.innerWidth < 800;
    let full = SAE.remember("full") ? SAE.remember("full") === "1" : narrow;
    let chosen = narrow ? "top" : "all", rows = [];

    function draw() {
      const strata = SHOWN.find(([name]) => name === chosen)[2];
      rows = [];
      SAE.replace(box, strata.map((stratum) => {
        const found = page.contexts.filter((c) => c.stratum === stratum);
        if (!found.length) return null;
        const made = (some) => some.map((context) => {
          const row = SAE.context(context, maximum, page.documents[context.document], { full });
          rows.push(row);
          return row;
        });
        const first = narrow ? FEW : found.length;  // a phone must reach the next stratum soon
        const more = found.length > first ? h("button.plain", { type: "button", onclick: () =>
          more.replaceWith(...made(found.slice(first))) }, `${found.length - first} more`) : null;
        return h("div.stratum", null, h("h3", null, title(stratum, page.statistics),
          h("span.muted", null, ` ${found.length}`)), made(found.slice(0, first)), more);
      }));
      if (!rows.length) SAE.replace(box, SAE.empty("There are no such contexts."));
    }

    const present = new Set(page.contexts.map((c) => c.stratum));
    const offered = SHOWN.filter(([, , strata]) => strata.some((t) => present.has(t)));
    draw();
    return SAE.add(section, [h("div.row", null, h("h2", null, "Contexts"),
      SAE.choice("which contexts", offered.map(([v, t]) => [v, t]), chosen,
        (value) => { chosen = value; draw(); }),
      SAE.choice("how they are shown", [["lines", "Lines"], ["full", "Full"]],
        full ? "full" : "lines", (value) => {
          full = value === "full";
          SAE.remember("full", full ? "1" : "0");
          for (const row of rows) row.setFull(full);
        }), legend(maximum)), box]);
  }

  function title(stratum, s) {
    if (!stratum.startsWith("decile_")) return TITLES[stratum];
    const d = Number(stratum.slice(7));
    if (d === 10) return "Decile 10, the strongest tenth";
    return `Decile ${d}` + (d === 1 ? ", the weakest tenth" : "");
  }

  function legend(maximum) {
    return h("span.legend", { "aria-hidden": "true" }, "0",
      Array.from({ length: 9 }, (_, i) => h("span.t.h" + (i + 1))), SAE.number(maximum));
  }
})(window.SAE);
