// Elements, numbers and text. All text of a corpus becomes text nodes, never markup.
"use strict";
window.SAE = window.SAE || {};
window.SAE.pages = {};

(function (SAE) {
  const SVG = "http://www.w3.org/2000/svg";

  /** An element: h("a.big", {href, onclick, style: {..}}, child, [children], "text"). */
  SAE.h = function (what, props, ...children) {
    const [tag, ...classes] = what.split(".");
    return fill(document.createElement(tag || "div"), classes, props, children);
  };

  /** The same in SVG. */
  SAE.svg = function (what, props, ...children) {
    const [tag, ...classes] = what.split(".");
    return fill(document.createElementNS(SVG, tag), classes, props, children);
  };

  function fill(element, classes, props, children) {
    if (classes.length) element.setAttribute("class", classes.join(" "));
    for (const [name, value] of Object.entries(props || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name === "style") {
        for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
      } else if (name === "value" || name === "checked") element[name] = value;
      else element.setAttribute(name, value === true ? "" : value);
    }
    SAE.add(element, children);
    return element;
  }

  SAE.add = function (element, children) {
    for (const child of [children].flat(Infinity)) {
      if (child === null || child === undefined || child === false) continue;
      element.append(child instanceof Node ? child : document.createTextNode(String(child)));
    }
    return element;
  };

  SAE.replace = function (element, ...children) {
    element.replaceChildren();
    return SAE.add(element, children);
  };

  // ---- numbers

  const NONE = "–";

  SAE.whole = (x) => (x === null || x === undefined ? NONE : Math.round(x).toLocaleString("en"));

  /** Three digits; very small and large ones with an exponent. */
  SAE.number = function (x, digits = 3) {
    if (x === null || x === undefined || Number.isNaN(x)) return NONE;
    const size = Math.abs(x);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return x.toExponential(digits - 1);
    if (size >= 1000) return Math.round(x).toLocaleString("en");
    return Number(x.toPrecision(digits)).toString().replace("-", "−");
  };

  /** Three digits, zeros kept: for columns. */
  SAE.fixed = function (x) {
    const size = Math.abs(x);
    return size >= 1e-3 && size < 1000 ? x.toPrecision(3).replace("-", "−") : SAE.number(x);
  };

  SAE.percent = function (x) {
    if (x === null || x === undefined) return NONE;
    const p = x * 100;
    if (p === 0) return "0 %";
    if (p < 0.001) return p.toExponential(1) + " %";
    return (p >= 99.95 ? p.toFixed(0) : Number(p.toPrecision(p < 1 ? 2 : 3)).toString()) + " %";
  };

  SAE.short = function (x) {
    if (x === null || x === undefined) return NONE;
    for (const [size, unit] of [[1e9, " G"], [1e6, " M"], [1e4, " k"]]) {
      if (x >= size) return Number((x / (unit === " k" ? 1e3 : size)).toPrecision(3)) + unit;
    }
    return SAE.whole(x);
  };

  // ---- text of a corpus

  const BIDI = {
    0x061c: "ALM", 0x200e: "LRM", 0x200f: "RLM", 0x202a: "LRE", 0x202b: "RLE", 0x202c: "PDF",
    0x202d: "LRO", 0x202e: "RLO", 0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI",
  };
  const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff]/g;

  /** Text with visible signs in place of control characters, so that they have no effect. */
  SAE.visible = function (text) {
    return text.replace(HIDDEN, (c) => {
      const code = c.codePointAt(0);
      if (c === "\n") return "↵";
      if (c === "\t") return "⇥";
      if (code < 32) return String.fromCodePoint(0x2400 + code);
      if (code === 127) return "␡";
      return BIDI[code] ? `⟨${BIDI[code]}⟩` : `⟨${code.toString(16).toUpperCase()}⟩`;
    });
  };

  const RTL = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]/g;
  const LETTERS = /\p{L}/gu;

  /** Whether most letters of a text run from right to left. */
  SAE.isRightToLeft = function (text) {
    const right = (text.match(RTL) || []).length;
    return right > 0 && right * 2 > (text.match(LETTERS) || []).length;
  };

  /** A token as a small label; a blank before it shows as a middle dot. */
  SAE.token = function (text, ...more) {
    const shown = SAE.visible(text);
    const blank = shown.startsWith(" ");
    return SAE.h("span.token", { dir: "auto" },
      blank ? SAE.h("span.blank", null, "·") : null,
      (blank ? shown.slice(1) : shown) || (blank ? "" : "∅"), more);
  };

  SAE.tokens = (texts, most = 6) =>
    SAE.h("span.tokens", null, (texts || []).slice(0, most).map((t) => SAE.token(t)));

  /** What describes a latent best: its label, or the tokens that it fires on most. */
  SAE.named = (row, most = 6) => row && row.label
    ? SAE.h("span.label", { dir: "auto" }, SAE.visible(row.label))
    : SAE.tokens(row && row.tokens, most);

  // ---- small parts of pages

  /** Address of a page of the SAE that is shown. */
  SAE.link = (path, sae = SAE.sae) => "#/" + (sae === "b" ? "b/" : "") + path;

  SAE.latentLink = (latent, sae) =>
    SAE.h("a.latent", { href: SAE.link("latent/" + latent, sae) }, String(latent));

  SAE.problem = (sentence) => SAE.h("p.problem", { role: "alert" }, sentence);

  SAE.empty = (sentence) => SAE.h("p.empty", null, sentence);

  /** Title and address of a document; only web addresses become links. */
  SAE.document = function (number, document) {
    if (!document) return SAE.h("span.document", null, number >= 0 ? `document ${number}` : "");
    const name = SAE.visible(document.title || document.source || `document ${number}`);
    if (/^https?:\/\//i.test(document.url || "")) {
      return SAE.h("a.document",
        { href: document.url, target: "_blank", rel: "noopener noreferrer", title: document.url },
        SAE.h("bdi", null, name), " ↗");
    }
    return SAE.h("span.document", { title: SAE.visible(document.source || "") },
      SAE.h("bdi", null, name));
  };

  /** A group of buttons of which one is pressed. */
  SAE.choice = function (label, options, chosen, onchange) {
    const group = SAE.h("div.choice", { role: "group", "aria-label": label });
    for (const [value, text] of options) {
      group.append(SAE.h("button", {
        type: "button", "aria-pressed": String(value === chosen),
        onclick: (event) => {
          for (const b of group.children) b.setAttribute("aria-pressed", "false");
          event.currentTarget.setAttribute("aria-pressed", "true");
          onchange(value);
        },
      }, text));
    }
    return group;
  };

  SAE.remember = function (key, value) {
    try {
      if (value === undefined) return localStorage.getItem("sae-" + key);
      localStorage.setItem("sae-" + key, value);
    } catch { /* no storage: the choice is forgotten */ }
    return null;
  };
})(window.SAE);
