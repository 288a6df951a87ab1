// Where data comes from: the server's /api, one promise of JSON a question.
"use strict";

(function (SAE) {
  async function ask(path, params, body, keepalive = false) {
    const query = new URLSearchParams(params || {});
    query.set("sae", SAE.sae);
    const options = body === undefined ? {} : {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      keepalive,
    };
    let response;
    try {
      response = await fetch(`api/${path}?${query}`, options);
    } catch {
      throw new Error("The server does not answer; is `sae-features serve` still running?");
    }
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

  SAE.server = {
    live: true,
    start: () => ask("start"),
    latents: (params) => ask("latents", params),
    latent: (n) => ask("latent/" + n),
    search: (q) => ask("search", { q }),
    compare: (params) => ask("compare", params),
    notes: () => ask("notes"),
    // kept alive: the page may be closing
    saveNotes: (n, note, tags) => ask(`latent/${n}/notes`, {}, { note, tags }, true),
    activations: (text) => ask("live", {}, { text }),
    generate: (request) => ask("steer", {}, request),
    sql: (sql) => ask("sql", {}, { sql }),
  };
})(window.SAE);
