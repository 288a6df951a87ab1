// Plots: histograms in SVG, the density/maximum scatter on a canvas.
"use strict";

(function (SAE) {
  const { h, svg } = SAE;

  /** A drawing with its axes: the peak's label above; low end, name and high end below. */
  function framed(drawing, height, low, name, high) {
    return [h("div.peakline", null, `↑ 0 to ${height}`), h("div.plotarea", null, drawing),
      h("div.axis", null, h("span", null, low), h("span", null, name), h("span", null, high))];
  }

  /**
   * A histogram with edges [n + 1] and counts [n]; `of` names the counted objects.
   * `unit` is written after the numbers below; `onpick(low, high)` makes the bars buttons.
   */
  SAE.histogram = function (plot, label,
    { format = SAE.number, unit = "", of = "latents", onpick = null, tall = 72 } = {}) {
    const { edges, counts } = plot;
    const figure = h("figure.plot", null, h("figcaption", null, label,
      plot.log ? h("span.hint", null, "log scale") : null));
    if (!counts.length) return SAE.add(figure, SAE.empty("nothing to plot"));
    const width = 240, peak = Math.max(...counts), step = width / counts.length;
    const drawing = svg("svg", {
      viewBox: `0 0 ${width} ${tall}`, preserveAspectRatio: "none", role: "img",
      "aria-label": `${label}: from ${format(edges[0])} to ${format(edges[edges.length - 1])}`,
    });
    counts.forEach((count, i) => {
      const height = count ? Math.max(1, (count / peak) * (tall - 2)) : 0;
      const text = `${format(edges[i])} to ${format(edges[i + 1])}${unit}: ${SAE.whole(count)} ${of}`;
      const pick = onpick && count ? () => onpick(edges[i], edges[i + 1]) : null;
      const bar = svg(pick ? "g.bar.pick" : "g.bar", pick ? {
        tabindex: 0, role: "button", "aria-label": text, onclick: pick,
        onkeydown: (e) => { if (e.key === "Enter") pick(); },
      } : null,
      svg("rect.back", { x: i * step, y: 0, width: step, height: tall }),
      svg("rect.front", { x: i * step + 0.4, y: tall - height, width: step - 0.8, height }));
      tipOn(bar, text);
      drawing.append(bar);
    });
    const middle = edges[Math.floor(edges.length / 2)];
    return SAE.add(figure, framed(drawing, `${SAE.whole(peak)} ${of}`, format(edges[0]) + unit,
      format(middle) + unit,
      format(edges[edges.length - 1]) + unit));
  };

  /** A latent's activations: bins [low, high, count] on a log axis, quantiles marked. */
  SAE.activationHistogram = function (bins, marks) {
    const width = 320, tall = 96;
    if (!bins.length) return SAE.empty("This latent fired on no row that was read.");
    const low = Math.log2(bins[0][0]), high = Math.log2(bins[bins.length - 1][1]);
    const x = (v) => ((Math.log2(Math.max(v, 1e-12)) - low) / Math.max(high - low, 1e-9)) * width;
    const peak = Math.max(...bins.map((b) => b[2]));
    const drawing = svg("svg", { viewBox: `0 0 ${width} ${tall}`, role: "img",
      preserveAspectRatio: "none", "aria-label": "histogram of its activations" });
    for (const [from, to, count] of bins) {
      const height = Math.max(1, (count / peak) * (tall - 4));
      const bar = svg("g.bar", null,
        svg("rect.back", { x: x(from), y: 0, width: x(to) - x(from), height: tall }),
        svg("rect.front", { x: x(from) + 0.3, y: tall - height,
          width: Math.max(x(to) - x(from) - 0.6, 0.6), height }));
      tipOn(bar, `${SAE.number(from)} to ${SAE.number(to)}: ${SAE.whole(count)} rows`);
      drawing.append(bar);
    }
    for (const [value] of marks) {
      if (value !== null) {
        drawing.append(svg("line.mark", { x1: x(value), x2: x(value), y1: 0, y2: tall }));
      }
    }
    return h("figure.plot", null, framed(drawing, `${SAE.whole(peak)} rows a bar`,
      SAE.number(bins[0][0]), ["activation, log scale", marks.map(([v, name]) =>
        [h("br"), `${name} ${SAE.number(v)}`])], SAE.number(bins[bins.length - 1][1])));
  };

  /** The share of firings in each part of a context of `length` tokens. */
  SAE.profile = function (shares, label, length) {
    const peak = Math.max(...shares, 1e-9);
    const drawing = svg("svg", { viewBox: `0 0 ${shares.length * 10} 28`, role: "img",
      preserveAspectRatio: "none", "aria-label": label });
    shares.forEach((share, i) => {
      const height = Math.max(0.6, (share / peak) * 28);
      const bar = svg("g.bar", null,
        svg("rect.back", { x: i * 10, y: 0, width: 10, height: 28 }),
        svg("rect.front", { x: i * 10 + 0.6, y: 28 - height, width: 8.8, height }));
      tipOn(bar, `part ${i + 1} of ${shares.length}: ${SAE.percent(share)}`);
      drawing.append(bar);
    });
    return h("figure.plot.profile", null, framed(drawing, `${SAE.percent(peak)} of its firings`,
      "first token", "position in the context", length ? `token ${length}` : "last token"));
  };

  /** Density against maximum; a click opens the latent nearest to the pointer. */
  SAE.scatter = function (points, onpick) {
    const canvas = h("canvas", { tabindex: 0, role: "img",
      "aria-label": "each latent's density against its highest activation" });
    const wrap = h("div.scatter", null, canvas);
    const caption = h("figcaption", null, "Density and highest activation",
      points.step > 1 ? ` (one of ${points.step} latents)` : "",
      h("span.hint", null, "click a latent"));
    const upwards = h("div.peakline", null, "↑ highest activation, log scale");
    const axis = h("div.axis");
    const figure = h("figure.plot.wide", null, caption, upwards, wrap, axis);
    const usable = points.latent.map((_, i) => i)
      .filter((i) => points.density[i] > 0 && points.max[i] > 0);
    if (!usable.length) return SAE.add(figure, SAE.empty("nothing to plot"));
    const dx = usable.map((i) => Math.log10(points.density[i]));
    const dy = usable.map((i) => Math.log10(points.max[i]));
    const [left, right] = range(dx), [bottom, top] = range(dy);
    let place = [], hovered = -1;

    function draw() {
      const box = wrap.getBoundingClientRect(), scale = window.devicePixelRatio || 1;
      if (!box.width) return;
      canvas.width = box.width * scale;
      canvas.height = box.height * scale;
      const c = canvas.getContext("2d"), style = getComputedStyle(wrap);
      c.scale(scale, scale);
      const pad = 8, w = box.width - 2 * pad, t = box.height - 2 * pad;
      place = usable.map((_, k) => [
        pad + ((dx[k] - left) / (right - left)) * w,
        pad + t - ((dy[k] - bottom) / (top - bottom)) * t,
      ]);
      c.strokeStyle = style.getPropertyValue("border-color");
      c.fillStyle = style.color;
      c.font = `11px ${style.fontFamily}`;
      for (let e = Math.ceil(left); e <= right; e++) {
        const at = pad + ((e - left) / (right - left)) * w;
        c.beginPath(); c.moveTo(at, 0); c.lineTo(at, box.height); c.stroke();
        if (at > 40 && at < box.width - 40) c.fillText(SAE.percent(10 ** e), at + 3, box.height - 3);
      }
      for (let e = Math.ceil(bottom); e <= top; e++) {
        const at = pad + t - ((e - bottom) / (top - bottom)) * t;
        c.beginPath(); c.moveTo(0, at); c.lineTo(box.width, at); c.stroke();
        c.fillText(SAE.number(10 ** e), 4, at - 3);
      }
      c.fillStyle = getComputedStyle(canvas).color;
      c.globalAlpha = usable.length > 6000 ? 0.35 : 0.55;
      const r = usable.length > 6000 ? 1.3 : usable.length > 1500 ? 1.8 : 2.6;
      for (const [a, b] of place) { c.beginPath(); c.arc(a, b, r, 0, 7); c.fill(); }
      c.globalAlpha = 1;
      if (hovered >= 0) {
        c.lineWidth = 2; c.strokeStyle = getComputedStyle(canvas).color;
        c.beginPath(); c.arc(...place[hovered], 6, 0, 7); c.stroke();
      }
    }

    function nearest(event) {
      const box = canvas.getBoundingClientRect();
      const x = event.clientX - box.left, y = event.clientY - box.top;
      let best = -1, distance = 24 ** 2;
      place.forEach(([a, b], k) => {
        const d = (a - x) ** 2 + (b - y) ** 2;
        if (d < distance) { best = k; distance = d; }
      });
      return best;
    }

    canvas.addEventListener("pointermove", (event) => {
      hovered = nearest(event);
      draw();
      if (hovered < 0) { SAE.hideTip(); return; }
      const i = usable[hovered];
      SAE.tip(event.clientX, event.clientY, `latent ${points.latent[i]}`,
        `density ${SAE.percent(points.density[i])}, max ${SAE.number(points.max[i])}`);
    });
    canvas.addEventListener("pointerleave", () => { hovered = -1; draw(); SAE.hideTip(); });
    canvas.addEventListener("click", (event) => {
      const k = nearest(event);
      if (k >= 0) onpick(points.latent[usable[k]]);
    });
    new ResizeObserver(draw).observe(wrap);
    SAE.onTheme(draw);
    SAE.replace(axis, h("span", null, SAE.percent(10 ** left)), h("span", null, "density, log scale →"),
      h("span", null, SAE.percent(10 ** right)));
    return figure;
  };

  function range(values) {
    let low = Infinity, high = -Infinity;
    for (const v of values) { low = Math.min(low, v); high = Math.max(high, v); }
    return low === high ? [low - 0.5, high + 0.5] : [low, high];
  }

  // ---- the one tooltip

  const box = () => document.getElementById("tip");

  SAE.tip = function (x, y, ...lines) {
    const tip = SAE.replace(box(), lines.map((line, i) => h(i ? "div" : "strong", null, line)));
    tip.hidden = false;
    const size = tip.getBoundingClientRect();
    const left = Math.min(Math.max(x + 12, 6), window.innerWidth - size.width - 6);
    const above = y - size.height - 12;
    tip.style.setProperty("left", `${left}px`);
    tip.style.setProperty("top", `${above > 4 ? above : y + 18}px`);
  };

  SAE.hideTip = function () { box().hidden = true; };

  function tipOn(element, text) {
    element.addEventListener("pointermove", (e) => SAE.tip(e.clientX, e.clientY, text));
    element.addEventListener("pointerleave", SAE.hideTip);
  }
})(window.SAE);
