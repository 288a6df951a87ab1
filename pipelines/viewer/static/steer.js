// Steering: the text that the model writes with latents clamped, beside its text without clamps.
"use strict";

(function (SAE) {
  const { h } = SAE;

  SAE.pages.steer = async function (main) {
    document.title = "steer";
    const title = h("h1", null, "Steer");
    if (!SAE.source.live) {
      SAE.replace(main, title, SAE.needsServer("Steering"));
      return;
    }
    const kept = SAE.kept.steer = SAE.kept.steer || { prompt: "I went to the market and",
      strengths: "0.5, 1, 2", n: 40, temperature: 0, seed: 0, latents: [] };
    if (SAE.params.get("latent") !== null) kept.latents = [Number(SAE.params.get("latent"))];
    const prompt = h("textarea", { rows: 2, maxlength: 5000, "aria-label": "prompt", dir: "auto",
      value: kept.prompt });
    const strengths = h("input", { type: "text", value: kept.strengths,
      "aria-label": "strengths, in multiples of the latent's maximum" });
    const number = (name, value, low, high, step, label) => h("label.field", null, label,
      h("input.number", { type: "number", name, value, min: low, max: high, step }));
    const settings = [number("n", kept.n, 1, 200, 1, "tokens"),
      number("temperature", kept.temperature, 0, 5, 0.1, "temperature"),
      number("seed", kept.seed, 0, 1e9, 1, "seed")];
    const latents = h("div.clamps"), result = h("div.steered");
    const state = h("span.muted", { role: "status" });
    const stop = h("button", { type: "button", hidden: true, onclick: () => halt() }, "Stop");
    let working = null;  // stops the running generation

    function halt() {
      if (working) working.abort();
      working = null;
      stop.hidden = true;
    }
    SAE.leaving(halt);

    async function drawLatents() {
      const add = h("input.number", { type: "text", inputmode: "numeric", placeholder: "latent",
        "aria-label": "latent to clamp", onkeydown: (e) => {
          if (e.key === "Enter") { e.preventDefault(); put(); }
        } });
      const put = () => {
        const n = Number(add.value.trim() || NaN);
        if (Number.isInteger(n) && n >= 0 && n < SAE.info.n_latents) {
          if (!kept.latents.includes(n)) kept.latents.push(n);
          drawLatents();
        } else state.textContent = `Latents are numbers from 0 to ${SAE.info.n_latents - 1}.`;
      };
      const chips = kept.latents.map((n) => {
        const about = h("span");
        SAE.source.latent(n).then((page) => SAE.replace(about, SAE.named(
          { label: page.label, tokens: page.statistics.top_tokens }, 3),
          h("span.muted", null, ` max ${SAE.number(page.statistics.max)}`)), () => {});
        return h("span.filter", null, SAE.latentLink(n), about, h("button.close", { type: "button",
          "aria-label": `remove latent ${n}`, onclick: () => {
            kept.latents = kept.latents.filter((l) => l !== n);
            drawLatents();
          } }, "×"));
      });
      SAE.replace(latents, chips, add, h("button", { type: "button", onclick: put }, "add"));
    }

    async function go() {
      halt();
      Object.assign(kept, { prompt: prompt.value, strengths: strengths.value });
      for (const label of settings) kept[label.lastChild.name] = Number(label.lastChild.value);
      const times = kept.strengths.split(",").map((t) => t.trim()).filter(Boolean).map(Number);
      if (!kept.latents.length) { state.textContent = "Add a latent to clamp."; return; }
      if (!times.length || times.some((t) => !Number.isFinite(t)) || times.length > 6) {
        state.textContent = "Strengths must be 1 to 6 numbers, separated by commas.";
        return;
      }
      state.textContent = "";
      const pages = await Promise.all(kept.latents.map((n) => SAE.source.latent(n)));
      if (pages.some((page) => page.statistics.dead)) {
        state.textContent = "A dead latent has no maximum; choose another latent.";
        return;
      }
      const runs = [null, ...times].map((time) => ({
        name: time === null ? "plain" : `${SAE.number(time)} × max`,
        clamps: time === null ? [] : pages.map((page) => ({
          latent: page.latent, value: time * page.statistics.max })),
        box: h("div.output", { dir: "auto" }, h("span.muted", null, "waiting …")),
      }));
      SAE.replace(result, runs.map((run) => h("section.card" + (run.clamps.length ? "" : ".plainrun"),
        null, h("h2", null, run.name), h("p.muted", null, run.clamps.length
          ? run.clamps.map((c) => `latent ${c.latent} held at ${SAE.number(c.value)}`).join(", ")
          : "no latent clamped"), run.box)));
      const mine = working = new AbortController();
      stop.hidden = false;
      for (const run of runs) {  // one after the other, as the server runs one at a time
        await write(run, kept, mine.signal);
        if (mine.signal.aborted) {
          for (const { box } of runs.slice(runs.indexOf(run))) {
            for (const waits of box.querySelectorAll(".working")) waits.remove();
            box.append(h("span.muted", null, " (stopped)"));
          }
          return;
        }
      }
      halt();
    }

    async function write(run, { prompt: before, n, temperature, seed }, signal) {
      const made = h("span.made"), mark = h("span.muted.working", null, " …");
      SAE.replace(run.box, h("span.muted.working", null, "the model reads …"));
      const show = (text) => {
        if (!made.isConnected) {
          SAE.replace(run.box, h("span.muted", null, SAE.paragraphs(before)), made, mark);
        }
        SAE.replace(made, SAE.paragraphs(text));
      };
      for (let attempt = 0; !signal.aborted; attempt++) {
        try {
          await SAE.source.generate({ prompt: before, clamps: run.clamps, n_tokens: n, temperature,
            seed }, show, signal);
          mark.remove();
          return;
        } catch (error) {
          if (signal.aborted) return;
          if (error.busy && attempt < 20) {
            await new Promise((done) => setTimeout(done, 1500));
          } else {
            mark.remove();
            if (!made.isConnected) SAE.replace(run.box);
            run.box.append(SAE.problem(error.message));
            return;
          }
        }
      }
    }

    SAE.replace(main, title, h("p.muted", null,
      "A latent is held at a multiple of its highest activation in the tables, on every row that " +
      "the SAE's rule reads; 0 takes the latent away."),
    h("form.ask", { onsubmit: (e) => { e.preventDefault(); go(); } },
      h("label.field.block", null, "prompt", prompt),
      h("div.field.block", null, "latents", latents),
      h("div.row", null, h("label.field", null, "strengths × max", strengths), settings),
      h("div.row", null, h("button.strong", { type: "submit" }, "Generate"), stop, state)), result);
    prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) go();
    });
    drawLatents();
  };

  /** Text with its line breaks, and with visible signs for all other control characters. */
  SAE.paragraphs = (text) => text.split("\n").flatMap((line, i) =>
    i ? [h("br"), SAE.visible(line)] : [SAE.visible(line)]);
})(window.SAE);
