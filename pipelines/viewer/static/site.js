// The data source of an export: scripts under data/ that call SAE.chunk with JSON.
"use strict";

(function (SAE) {
  const PAGE = 50, LOOKED_THROUGH = 24;
  const waiting = new Map(), loaded = new Map();

  SAE.chunk = function (name, value) {
    loaded.set(name, value);
  };

  /** JSON of a file of the export, once. */
  function chunk(name) {
    if (!waiting.has(name)) {
      waiting.set(name, new Promise((done, fail) => {
        const script = document.createElement("script");
        script.src = `data/${name}.js`;
        script.onload = () => { script.remove(); done(loaded.get(name)); loaded.delete(name); };
        script.onerror = () => {
          waiting.delete(name);
          fail(new Error(`data/${name}.js cannot be read; is the export complete?`));
        };
        document.head.append(script);
      }));
    }
    return waiting.get(name);
  }

  const ours = (name) => chunk(`${SAE.sae}/${name}`);

  /** FNV-1a of a key's UTF-8, the same as in site.py. */
  function share(key) {
    let state = 0x811c9dc5;
    for (const byte of new TextEncoder().encode(key)) {
      state = Math.imul(state ^ byte, 0x01000193) >>> 0;
    }
    return (state % SAE.info.shares).toString(16).padStart(2, "0");
  }

  async function latent(n) {
    if (!Number.isInteger(n) || n < 0 || n >= SAE.info.n_latents) {
      throw new Error(`There is no latent ${n}; these tables hold 0 to ${SAE.info.n_latents - 1}.`);
    }
    return (await ours(`latents/${Math.floor(n / SAE.info.per_file)}`))[n];
  }

  async function latents(params) {
    const columns = await ours("summary"), names = Object.keys(columns);
    let found = columns.latent.map((_, i) => i);
    if (params.get("dead") !== "1") found = found.filter((i) => !columns.dead[i]);
    const token = (params.get("fires_on") || "").toLowerCase();
    if (token) {
      found = found.filter((i) => columns.tokens[i].some((t) => t.toLowerCase().includes(token)));
    }
    for (const name of Object.keys(SAE.info.columns)) {
      if (!params.get(name)) continue;
      const ends = params.get(name).split("..").map((e) => (e === "" ? null : Number(e)));
      if (ends.some((e) => Number.isNaN(e))) throw new Error(`${params.get(name)} is not a range of numbers.`);
      const [low, high] = ends, column = columns[name];
      found = found.filter((i) => column[i] !== null &&
        (low === null || column[i] >= low) && (high === null || column[i] <= high));
    }
    const by = columns[params.get("sort") || "latent"] || columns.latent;
    const sign = params.get("desc") === "1" ? -1 : 1;
    found.sort((a, b) => (by[a] === null) - (by[b] === null) || sign * (by[a] - by[b]) || a - b);
    const offset = Number(params.get("offset") || 0);
    const rows = found.slice(offset, offset + PAGE).map((i) =>
      Object.fromEntries(names.map((name) => [name, columns[name][i]])));
    return { total: found.length, offset, rows };
  }

  async function search(question) {
    const q = question.trim(), lowered = q.toLowerCase(), number = q.replace(/^#/, "");
    const { tokens, label } = await ours("summary");
    const byToken = ((await ours(`tokens/${share(lowered)}`))[lowered] || [])
      .map(([n, texts, count, mean, part, lift]) =>
        ({ latent: n, texts, count, mean, share: part, lift, tokens: tokens[n], label: label[n] }));
    return {
      question: q,
      latent: /^\d+$/.test(number) && Number(number) < SAE.info.n_latents ? Number(number) : null,
      tokens: { exact: true, rows: byToken },
      texts: await byText(lowered, tokens, label),
      words: true,
      explanations: null,
    };
  }

  /** Latents whose contexts contain the text, among those that fire most on its words. */
  async function byText(lowered, tokens, label) {
    const words = [...new Set(lowered.match(/[\p{L}\p{N}]+/gu) || [])];
    const lists = await Promise.all(words.map(async (word) =>
      (await ours(`words/${share(word)}`))[word] || []));
    const best = new Map();  // latent -> its strength where one of the words is the peak, and anywhere
    for (const [n, atPeak, atAll] of lists.flat()) {
      const [peaks, all] = best.get(n) || [0, 0];
      best.set(n, [peaks + atPeak, all + atAll]);
    }
    const chosen = [...best].sort(byStrength)
      .slice(0, LOOKED_THROUGH).map(([n]) => n);
    const rows = await Promise.all(chosen.map(async (n) => {
      const page = await latent(n);
      const found = page.contexts
        .filter((c) => c.activation > 0 && c.text.toLowerCase().includes(lowered))
        .map((context) => ({ context, onPeak: onPeak(context, lowered) }))
        .sort((a, b) => b.onPeak - a.onPeak || b.context.activation - a.context.activation);
      const strength = (some) => some.reduce((sum, f) => sum + f.context.activation, 0) /
        page.statistics.max;
      return found.length ? { strength: [strength(found.filter((f) => f.onPeak)), strength(found)],
        latent: n, tokens: tokens[n], label: label[n], max: page.statistics.max,
        n: found.length, n_peak: found.filter((f) => f.onPeak).length, context: found[0].context,
        title: (page.documents[found[0].context.document] || {}).title } : null;
    }));
    return rows.filter(Boolean).sort((a, b) =>
      byStrength([a.latent, a.strength], [b.latent, b.strength]));
  }

  const byStrength = ([a, x], [b, y]) => y[0] - x[0] || y[1] - x[1] || a - b;

  /** Whether the searched text overlaps the token of the context's row. */
  function onPeak(context, lowered) {
    const pieces = SAE.pieces(context).map((t) => t.toLowerCase());
    const before = pieces.slice(0, context.place).join("").length;
    const after = before + (pieces[context.place] || "").length;
    return pieces.join("").slice(Math.max(0, before - lowered.length + 1), after + lowered.length - 1)
      .includes(lowered);
  }

  async function compare(params) {
    const [pairs, a, b] = await Promise.all([chunk("compare"), chunk("a/summary"), chunk("b/summary")]);
    const label = (columns, n) => ({ latent: n, density: columns.density[n], max: columns.max[n],
      dead: columns.dead[n], tokens: columns.tokens[n], label: columns.label[n] });
    const low = params.get("low"), high = params.get("high");
    const sign = params.get("desc") === "1" ? -1 : 1, cosine = pairs.cosine;
    const order = pairs.latent.map((_, i) => i)
      .filter((i) => (!low || cosine[i] >= Number(low)) && (!high || cosine[i] <= Number(high)))
      .sort((x, y) => sign * (cosine[x] - cosine[y]) || x - y);
    const offset = Number(params.get("offset") || 0);
    return { total: order.length, offset, rows: order.slice(offset, offset + PAGE).map((i) => ({
      latent: pairs.latent[i], other: pairs.other[i], cosine: cosine[i],
      ours: label(a, pairs.latent[i]), theirs: label(b, pairs.other[i]) })) };
  }

  const matches = (params) => chunk(`matches/${params.get("class")}/${
    Math.floor(Number(params.get("offset") || 0) / SAE.info.matches.page)}`);

  SAE.site = { live: false, start: () => ours("start"), latents, latent, search, compare, matches };
})(window.SAE);
