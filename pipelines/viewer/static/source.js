// The data source: the server's /api; each request returns a promise of JSON.
"use strict";

(function (SAE) {
  const post = (body) => ({
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  });

  async function send(path, params, options) {
    const query = new URLSearchParams(params || {});
    query.set("sae", SAE.sae);
    try {
      return await fetch(`api/${path}?${query}`, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer; is `sae-features serve` still running?");
    }
  }

  async function ask(path, params, options = {}) {
    return answered(await send(path, params, options));
  }

  async function answered(response) {
    let data;
    try {
      data = await response.json();
    } catch {
      throw new Error(`The server failed (${response.status}); its terminal says why.`);
    }
    if (!response.ok) {
      const error = new Error(data.error || `The server answered ${response.status}.`);
      error.busy = response.status === 429;
      throw error;
    }
    return data;
  }

  /** Call onText with the text so far while the model writes; aborting the signal stops it. */
  async function generate(request, onText, signal) {
    const response = await send("steer", {}, { ...post(request), signal });
    if (!response.ok) return answered(response);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let waiting = "", last = null;
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (waiting + value).split("\n");
      waiting = lines.pop();
      for (const line of lines) {
        last = JSON.parse(line);
        if (last.error) throw new Error(last.error);
        onText(last.text);
      }
    }
    if (!last || !last.done) throw new Error("The server stopped before the text was finished.");
    return last;
  }

  SAE.server = {
    live: true,
    start: () => ask("start"),
    latents: (params) => ask("latents", params),
    latent: (n) => ask("latent/" + n),
    search: (q) => ask("search", { q }),
    compare: (params) => ask("compare", params),
    matches: (params) => ask("matches", params),
    notes: () => ask("notes"),
    // keepalive, as the page may be closing
    saveNotes: (n, note, tags) => ask(`latent/${n}/notes`, {},
      { ...post({ note, tags }), keepalive: true }),
    activations: (text) => ask("live", {}, post({ text })),
    generate,
    sql: (sql) => ask("sql", {}, post({ sql })),
  };
})(window.SAE);
