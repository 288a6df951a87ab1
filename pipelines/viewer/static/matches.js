// What became of the latents of one SAE in the other: classes, pairs, contexts of disagreement.
"use strict";

(function (SAE) {
  const { h } = SAE;

  /** The section of the compare page: {element, ready}. */
  SAE.matches = function (info, otherName) {
    const bar = h("div.filters", { role: "group", "aria-label": "Classes" });
    const says = h("p.muted"), box = h("div.matches"), foot = h("div.pager");
    const params = new URLSearchParams(), buttons = new Map();
    let asked = 0;

    function choose(name) {
      params.set("class", name);
      params.delete("offset");
      for (const [other, button] of buttons) button.setAttribute("aria-pressed", other === name);
      says.textContent = info.classes.find((c) => c.name === name).says;
      return load();
    }

    async function load() {
      const mine = ++asked;
      let answer;
      try {
        answer = await SAE.source.matches(params);
      } catch (error) {
        SAE.replace(box, SAE.problem(error.message));
        return;
      }
      if (mine !== asked) return;
      SAE.replace(box, answer.rows.map((row) => pair(row, answer.documents)));
      const last = answer.offset + answer.rows.length;
      const step = (by, name) => h("button", { type: "button",
        disabled: by < 0 ? answer.offset === 0 : last >= answer.total,
        onclick: () => { params.set("offset", Math.max(0, answer.offset + by)); load(); } }, name);
      SAE.replace(foot, h("span", null, answer.total
        ? `${SAE.whole(answer.offset + 1)}–${SAE.whole(last)} of ${SAE.whole(answer.total)} pairs`
        : "no pair"), step(-info.page, "← previous"), step(info.page, "next →"));
    }

    /** A pair: its two latents, what they share, and contexts in which they disagree. */
    function pair(row, documents) {
      const side = (name, latent, label, sae) => h("span.side", null, h("b", null, name), " ",
        latent === null ? "none" : [SAE.latentLink(latent, sae), " ",
          label ? SAE.named(label, 4) : null]);
      const facts = [
        `${SAE.whole(row.both_fire)} rows together`,
        `${SAE.whole(row.a_only)} A only`, `${SAE.whole(row.b_only)} B only`,
        row.decoder_cosine === null ? null : `cosine ${SAE.fixed(row.decoder_cosine)}`,
        row.gain === null ? null : `adds ${SAE.whole(row.gain)} rows to its set, which covers ` +
          `${SAE.percent(row.set_coverage)} with precision ${SAE.percent(row.set_precision)}`,
        row.parent === null ? null : [`its parent ${row.child} `,
          SAE.latentLink(row.parent, row.child.toLowerCase()),
          ` is silent on ${SAE.whole(row.parent_silent)} of the rows together`,
          row.parent_cosine === null ? "" : ` (cosine ${SAE.fixed(row.parent_cosine)})`],
      ];
      const label = { a: row.ours, b: row.theirs };
      return h("section.card.pair", null,
        h("div.sides", null, side("A", row.latent_a, row.ours, "a"),
          side("B", row.latent_b, row.theirs, "b")),
        h("p.muted", null, facts.filter(Boolean).map((fact, i) => [i ? " · " : "", fact])),
        row.contexts.map((context) => h("div.disagreement", null,
          h("span.kind", null, context.stratum),
          SAE.context(context, label[context.fires] ? label[context.fires].max : 0,
            documents[context.document]))));
    }

    for (const { name, pairs, a, b } of info.classes) {
      const latents = [a === null ? null : `${SAE.whole(a)} latents of A`,
        b === null ? null : `${SAE.whole(b)} of B`].filter(Boolean).join(", ");
      const button = h("button", { type: "button", title: latents, "aria-pressed": "false",
        onclick: () => choose(name) }, `${name} ${SAE.whole(pairs)}`);
      buttons.set(name, button);
      SAE.add(bar, button);
    }
    const element = h("section", null, h("h2", null, "What became of the latents"),
      h("p.muted", null, `A is ${SAE.info.name}, B is ${otherName}. Counted over ` +
        `${SAE.whole(info.rows)} rows that both read. Below each pair: where one of its latents ` +
        "fires and the other does not."), bar, says, box, foot);
    return { element, ready: choose("same") };
  };
})(window.SAE);
