// Contexts with their tokens coloured by activation ("heat").
"use strict";

(function (SAE) {
  const { h } = SAE;
  const LEVELS = 9;

  /** Class of the heat of an activation, as a share of the maximum. */
  SAE.heat = function (activation, maximum) {
    if (!(activation > 0)) return "";
    const share = Math.min(activation / Math.max(maximum || activation, 1e-9), 1);
    return "h" + Math.max(1, Math.ceil(share * LEVELS));
  };

  /** [the blank before a token or "", its span]; the text itself comes in text nodes only. */
  SAE.tokenSpan = function (text, activation, maximum, peak) {
    const heat = SAE.heat(activation, maximum), shown = SAE.visible(text);
    // heat is on the word: a blank of its colour at the end of a line looks like a token
    const blank = heat && shown.length > 1 && shown[0] === " ";
    const span = h("span.t" + (heat ? "." + heat : "") + (peak ? ".peak" : ""), null,
      blank ? shown.slice(1) : shown);
    span.sae = { text, activation, maximum };
    return [blank ? " " : "", span];
  };

  /** Texts of a context's tokens; lengths count code points. */
  SAE.pieces = function (context) {
    const characters = Array.from(context.text), texts = [];
    let at = 0;
    for (const length of context.lengths) {
      texts.push(characters.slice(at, at + length).join(""));
      at += length;
    }
    return texts;
  };

  /**
   * A context, on one line with its peak in a column, or in full.
   * Clicking a line opens it.
   */
  SAE.context = function (context, maximum, document, { full = false } = {}) {
    const texts = SAE.pieces(context), heat = new Map(context.heat);
    const rtl = SAE.isRightToLeft(context.text);
    const spans = texts.map((text, i) =>
      SAE.tokenSpan(text, heat.get(i) || 0, maximum, i === context.place));
    const peak = spans[context.place] || ["", ""];
    const value = h("span.value", null, context.activation ? SAE.fixed(context.activation) : "0");
    const source = h("span.source", null, SAE.document(context.document, document));
    const body = h("div.text", rtl ? { dir: "rtl" } : { dir: "ltr" });
    const detail = h("div.detail", { hidden: true });
    const row = h("div.context", { tabindex: 0, role: "group",
      "aria-label": `activation ${SAE.number(context.activation)}` },
    h("div.line", null, value, body, source), detail);

    function arrange(open) {
      row.classList.toggle("open", open);
      if (open || rtl) {
        SAE.replace(body, spans);
      } else {
        SAE.replace(body, h("span.before", null, h("span", null, spans.slice(0, context.place), peak[0])),
          h("span.after", null, h("span", null, peak[1], spans.slice(context.place + 1))));
      }
      body.classList.toggle("cut", !open && !rtl);
    }

    function details() {
      const strongest = [...context.heat].sort((a, b) => b[1] - a[1]).slice(0, 8);
      SAE.replace(detail,
        h("span", null, `${SAE.stratum(context.stratum)} ${context.rank + 1}`),
        context.reason && h("span", null, `similar by ${context.reason}`),
        context.split && h("span", null, `to ${context.split}`),
        h("span", null, `row ${SAE.whole(context.row)}`),
        h("span", null, `position ${context.position}`),
        h("span", null, "document ", SAE.document(context.document, document),
          document && document.source ? ` (${SAE.visible(document.source)})` : ""),
        strongest.length ? h("span.values", null, strongest.map(([i, a]) =>
          SAE.token(texts[i], h("b", null, SAE.number(a))))) : null);
    }

    function toggle() {
      const open = detail.hidden;
      detail.hidden = !open;
      if (open) details();
      arrange(open || full);
    }

    arrange(full);
    row.addEventListener("click", (event) => {
      if (!event.target.closest("a") && !String(window.getSelection())) toggle();
    });
    row.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target === row) toggle();
    });
    row.setFull = (value) => { full = value; arrange(value || !detail.hidden); };
    return row;
  };

  const NAMES = { top: "top", random: "random", inactive: "inactive",
    hard_negative: "hard negative" };

  SAE.stratum = (name) => NAMES[name] || name.replace("_", " ");

  // Hover: one listener for all tokens of all pages.
  document.addEventListener("pointerover", (event) => {
    const span = event.target.closest && event.target.closest(".t");
    if (!span || !span.sae) return;
    const { text, activation, maximum, said } = span.sae;
    const box = span.getClientRects()[0];
    if (!box) return;
    SAE.tip(box.left, box.top + 4, `“${SAE.visible(text)}”`, said ||
      (activation > 0
        ? `${SAE.number(activation, 4)}` +
          (maximum ? `, ${SAE.percent(activation / maximum)} of the maximum` : "")
        : "does not fire here"));
  });
  document.addEventListener("pointerout", (event) => {
    if (event.target.closest && event.target.closest(".t")) SAE.hideTip();
  });
})(window.SAE);
