// The router (the address after # names the page), the keys, the bar and the theme.
"use strict";

(function (SAE) {
  const { h } = SAE;
  const main = document.getElementById("main");
  const KEYS = [["/", "search"], ["j", "next latent, or next row of a list"],
    ["k", "previous latent, or row"], ["↵", "open a row, or a context"], ["u", "back to the list"],
    ["t", "light, dark or the system's colours"], ["?", "this help"], ["Esc", "close"]];
  const themes = [], leavings = [];

  SAE.sae = "a";
  SAE.kept = {};  // texts typed on a page, kept until the window is closed
  SAE.walk = [];  // latents of the list shown last, in its order
  SAE.infos = {};
  SAE.source = document.documentElement.dataset.mode === "site" ? SAE.site : SAE.server;

  SAE.onTheme = (draw) => themes.push(draw);
  SAE.leaving = (last) => leavings.push(last);
  SAE.open = (path) => { location.hash = SAE.link(path).slice(1); };

  /** Run `what` after `wait` ms without another call; `.now()` runs a waiting call at once. */
  SAE.later = function (what, wait) {
    let timer = null;
    const soon = () => {
      clearTimeout(timer);
      timer = setTimeout(() => { timer = null; what(); }, wait);
    };
    soon.now = () => { if (timer !== null) { clearTimeout(timer); timer = null; what(); } };
    return soon;
  };

  SAE.keepParams = function (params) {
    const query = params.toString(), path = location.hash.split("?")[0] || "#/";
    history.replaceState(null, "", path + (query ? "?" + query : ""));
    SAE.walkAddress = location.hash;
  };

  /** The previous or next latent: in the list shown last, or by number. */
  SAE.neighbour = function (latent, by) {
    const at = SAE.walk.indexOf(latent);
    if (at >= 0 && SAE.walk[at + by] !== undefined) return SAE.walk[at + by];
    const n = SAE.info.n_latents;
    return (latent + by + n) % n;
  };

  SAE.needsServer = (what) => h("section.card", null, h("p", null, `${what} needs the model and a ` +
    "server. These pages are a static export; on the machine with the tables, run"),
  h("p", null, h("code", null, "sae-features serve --features FOLDER")));

  async function show() {
    for (const last of leavings.splice(0)) last();
    themes.length = 0;
    SAE.hideTip();
    const [path, query] = (location.hash.slice(2) || "").split("?");
    const parts = path.split("/").filter(Boolean);
    const sae = parts[0] === "b" ? (parts.shift(), "b") : "a";
    if (sae !== SAE.sae) SAE.walk = [];
    SAE.sae = sae;
    SAE.params = new URLSearchParams(query || "");
    const name = parts[0] || "start", here = location.hash;
    const page = SAE.pages[name];
    main.classList.add("loading");
    const inside = h("div.page.on-" + (page ? name : "missing"));
    try {
      SAE.info = SAE.infos[sae] = SAE.infos[sae] || await SAE.source.start();
      document.title = `${SAE.info.name} · latents`;
      drawBar(name);
      if (!page) throw new Error("There is no such page.");
      const made = page(inside, parts.slice(1));
      if (name !== "start") await made;  // its list fills in by itself
    } catch (error) {
      SAE.replace(inside, SAE.problem(error.message));
      if (!SAE.info) SAE.replace(document.getElementById("bar"));
    }
    if (here !== location.hash && here.split("?")[0] !== location.hash.split("?")[0]) return;
    SAE.replace(main, inside);
    main.classList.remove("loading");
    document.documentElement.dataset.shown = location.hash || "#/";
    if (name !== "start" || !SAE.walkAddress) window.scrollTo(0, 0);
  }

  function drawBar(name) {
    const info = SAE.info, item = (path, text, page) => h("a", {
      href: SAE.link(path), "aria-current": page === name ? "page" : null }, text);
    const both = info.compare ? h("span.which", null,
      h("a", { href: "#/", "aria-current": SAE.sae === "a" ? "true" : null }, "A"),
      h("a", { href: "#/b/", "aria-current": SAE.sae === "b" ? "true" : null }, "B")) : null;
    SAE.replace(document.getElementById("bar"),
      h("a.brand", { href: SAE.link("") }, h("span.mark", { "aria-hidden": "true" },
        h("i"), h("i"), h("i")), h("bdi", null, info.name)), both,
      h("nav", { "aria-label": "Pages" }, item("", "Latents", "start"), item("live", "Live text", "live"),
        item("steer", "Steer", "steer"), info.compare ? item("compare", "Compare", "compare") : null,
        item("notes", "Notes", "notes"), info.sql ? item("sql", "SQL", "sql") : null),
      name === "start" || name === "search" ? h("span.space") : SAE.searchForm(),
      h("button.icon", { type: "button", title: "colours (t)", "aria-label": "change colours",
        onclick: theme }, "◐"),
      h("button.icon", { type: "button", title: "keys (?)", "aria-label": "help", onclick: help }, "?"));
  }

  function theme() {
    const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const order = dark ? ["", "light", "dark"] : ["", "dark", "light"];
    const next = order[(order.indexOf(root.dataset.theme || "") + 1) % 3];
    if (next) root.dataset.theme = next; else delete root.dataset.theme;
    SAE.remember("theme", next);
    for (const draw of themes) draw();
  }

  function help() {
    const open = document.querySelector("dialog");
    if (open) { open.close(); return; }
    const dialog = h("dialog", { onclose: () => dialog.remove(), onclick: (e) => {
      if (e.target === dialog) dialog.close();
    } }, h("h2", null, "Keys"), h("dl.keylist", null, KEYS.map(([key, what]) =>
      [h("dt", null, h("kbd", null, key)), h("dd", null, what)])),
    h("form", { method: "dialog" }, h("button", { autofocus: true }, "close")));
    dialog.querySelector("form").addEventListener("submit", (e) => {
      e.preventDefault();
      dialog.close();
    });
    document.body.append(dialog);
    dialog.showModal();
  }

  function step(by) {
    const latent = location.hash.match(/^#\/(?:b\/)?latent\/(\d+)/);
    if (latent) {
      SAE.open("latent/" + SAE.neighbour(Number(latent[1]), by));
      return;
    }
    const rows = [...document.querySelectorAll("tr[data-latent], .context")];
    const at = rows.indexOf(document.activeElement);
    const next = rows[at < 0 ? (by > 0 ? 0 : rows.length - 1) : at + by];
    if (next) { next.focus(); next.scrollIntoView({ block: "nearest" }); }
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, textarea, select");
    if (event.key === "Escape") {
      SAE.hideTip();
      if (typing) typing.blur();
    }
    if (typing) return;
    const act = {
      "/": () => {
        const box = document.querySelector(".search input");
        if (box) { box.focus(); box.select(); }
      },
      j: () => step(1), k: () => step(-1), "?": help, t: theme,
      u: () => { location.hash = (SAE.walkAddress || SAE.link("")).slice(1); },
    }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  window.addEventListener("hashchange", show);
  window.addEventListener("pagehide", () => { for (const last of leavings.splice(0)) last(); });
  window.addEventListener("scroll", SAE.hideTip, { passive: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change",
    () => { for (const draw of themes) draw(); });
  show();
})(window.SAE);
