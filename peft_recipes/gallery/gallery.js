"use strict";
/* Filters, their state in the address (#base=...&method=...), and the figure. Everything shown is in the page already:
   rows carry their point as data-p (trained parameters), data-s (share of the base's), data-d, -l, -h (difference and
   interval in margins) and data-g (share of full's gain). */
(() => {
  const $ = (id) => document.getElementById(id);
  const FILTERS = ["q", "base", "task", "method", "verdict"], AXES = ["y", "x"];
  const styles = JSON.parse($("styles").textContent);
  const entries = [...document.querySelectorAll(".entry")].map((node) => {
    const rows = [...node.querySelectorAll("tbody tr")].map((row) => ({
      node: row, arm: row.dataset.method !== undefined, method: row.dataset.method, verdict: row.dataset.verdict,
      reference: row.classList.contains("full"), label: row.querySelector("th").textContent.trim(),
      p: number(row.dataset.p), s: number(row.dataset.s), d: number(row.dataset.d), l: number(row.dataset.l),
      h: number(row.dataset.h), g: number(row.dataset.g),
    }));
    const title = node.querySelector("h3").textContent;
    const text = [title, node.dataset.text, node.dataset.base, node.dataset.task, ...rows.map((row) => row.label)];
    const entry = { node, title, base: node.dataset.base, task: node.dataset.task, rows, text: text.join(" ").toLowerCase() };
    rows.forEach((row) => (row.entry = entry));
    return entry;
  });
  const options = Object.fromEntries(FILTERS.slice(1).map((name) => [name, [...$(name).options].map((o) => [o, o.value, o.text])]));

  let unfolded = null;

  function number(text) { return text === undefined ? null : Number(text); }

  // State: the controls hold it, the address repeats it.
  const state = () => Object.fromEntries([...FILTERS, ...AXES].map((name) => [name, $(name).value.trim()]));
  function read() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const name of [...FILTERS, ...AXES]) {
      const value = given.get(name) || "";
      const known = name === "q" || [...$(name).options].some((option) => option.value === value);
      $(name).value = known ? value : "";
    }
  }
  function write(now) {
    const kept = Object.entries(now).filter(([, value]) => value);
    const hash = kept.length ? "#" + new URLSearchParams(kept) : "";
    if (hash !== location.hash) history.replaceState(null, "", location.href.split("#")[0] + hash);
  }

  const words = (now) => now.q.toLowerCase().split(/\s+/).filter(Boolean);
  const entryFits = (entry, now, but) =>
    (but === "base" || !now.base || entry.base === now.base) && (but === "task" || !now.task || entry.task === now.task)
    && words(now).every((word) => entry.text.includes(word));
  const rowFits = (row, now, but) => row.arm
    && (but === "method" || !now.method || row.method === now.method)
    && (but === "verdict" || !now.verdict || row.verdict === now.verdict);

  function update() {
    const now = state(), filtered = FILTERS.some((name) => now[name]);
    const shown = [];
    let comparisons = 0;
    for (const entry of entries) {
      const rows = entryFits(entry, now) ? entry.rows.filter((row) => rowFits(row, now)) : [];
      entry.node.hidden = !rows.length && (filtered || entry.rows.some((row) => row.arm));
      comparisons += !entry.node.hidden;
      for (const row of entry.rows) { // the base and full stay as what the others are compared with
        const fits = rows.includes(row);
        row.node.hidden = !fits && row.arm && !row.reference;
        row.node.classList.toggle("aside", !fits && filtered);
      }
      shown.push(...rows);
    }
    const few = comparisons <= (now.method || now.verdict ? 25 : 8); // the tables of many are folded
    if (few !== unfolded) entries.forEach((entry) => (entry.node.querySelector("details").open = few));
    unfolded = few;
    count(now);
    const plural = (n, one, more) => `${n} ${n === 1 ? one : more}`;
    $("count").textContent = `${plural(shown.length, "arm", "arms")} in ${plural(comparisons, "entry", "entries")}`;
    $("reset").hidden = !filtered;
    $("nothing").hidden = comparisons > 0;
    write(now);
    draw(shown, now);
  }

  // How many arms each choice would show, given the other filters.
  function count(now) {
    for (const [name, all] of Object.entries(options)) {
      const numbers = new Map();
      for (const entry of entries) {
        if (!entryFits(entry, now, name)) continue;
        for (const row of entry.rows) {
          if (!rowFits(row, now, name)) continue;
          const value = name === "base" || name === "task" ? entry[name] : row[name];
          numbers.set(value, (numbers.get(value) || 0) + 1);
        }
      }
      for (const [option, value, text] of all) if (value) option.text = `${text} (${numbers.get(value) || 0})`;
    }
  }

  // The figure.
  const SVG = "http://www.w3.org/2000/svg";
  function add(parent, tag, attributes, text) {
    const node = parent.appendChild(document.createElementNS(SVG, tag));
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }
  const trimmed = (value, digits) => String(Number(value.toPrecision(digits)));
  const signed = (value) => (value > 0 ? "+" : "") + trimmed(value, 2).replace("-", "−");
  const percent = (value) => trimmed(100 * value, 2) + " %";
  const short = (value) => {
    const power = Math.max(0, Math.min(4, Math.floor(Math.log10(value * 1.0005) / 3)));
    return trimmed(value / 1000 ** power, 3) + ["", " k", " M", " B", " T"][power];
  };
  const SCALES = {
    "": { at: (row) => row.d, ends: (row) => [row.l, row.h], bend: Math.asinh, least: [-2, 2], show: signed,
          title: "Difference from full fine-tuning, in margins", zero: "full fine-tuning", band: [-1, 1],
          ticks: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 1e4, 1e5].flatMap((tick) => [-tick, tick]).concat(0) },
    gain: { at: (row) => row.g, ends: () => [], bend: (value) => value, least: [0, 1.1], show: percent,
            title: "Share of full's gain over the untuned base", zero: "full fine-tuning", at0: 1 },
  };
  let points = [], current = -1;

  function draw(rows, now) {
    const scale = SCALES[now.y] || SCALES[""], x = now.x === "share" ? "s" : "p";
    const drawn = rows.filter((row) => scale.at(row) !== null && row[x] > 0).sort((a, b) => a[x] - b[x]);
    const everything = entries.flatMap((entry) => entry.rows);
    $("figure").hidden = !everything.some((row) => (row.d !== null || row.g !== null) && row.p > 0);
    if ($("figure").hidden) return;
    keys(everything.filter((row) => scale.at(row) !== null && row[x] > 0), now);
    const arms = rows.filter((row) => !row.reference), missing = arms.length - drawn.length;
    const unit = now.y === "gain" ? "0 % is the untuned base, 100 % full fine-tuning."
      : "0 is the full fine-tune of the same comparison; in the band, a difference is within the margin. Lines: 95 % intervals.";
    const why = now.y === "gain" ? "full gained nothing to share, or there is none" : "without a full fine-tune to compare with, or failed";
    $("caption").textContent = `${unit} Higher is better.`
      + (missing > 0 ? ` ${missing} of ${arms.length} arms not drawn: ${why}.` : "");
    chart($("plot"), drawn, scale, x);
  }

  function chart(box, drawn, scale, x) {
    const width = Math.max(240, box.clientWidth), height = Math.round(Math.min(430, Math.max(290, width * 0.46)));
    const left = 50, right = width - 14, top = 30, bottom = height - 42;
    box.replaceChildren();
    points = [];
    current = -1;
    hide();
    const svg = add(box, "svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    if (drawn.length > 60) svg.setAttribute("class", "many");
    const values = drawn.flatMap((row) => [scale.at(row), ...scale.ends(row)]).concat(scale.least).map(scale.bend);
    const low = Math.min(...values), high = Math.max(...values), pad = 0.06 * (high - low);
    const up = (value) => bottom - (scale.bend(value) - low + pad) / (high - low + 2 * pad) * (bottom - top);
    const logs = drawn.length ? drawn.map((row) => Math.log10(row[x])) : [0, 1];
    const first = Math.min(...logs), span = Math.max(0.6, Math.max(...logs) - first);
    const middle = (first + Math.max(...logs)) / 2, start = middle - 0.56 * span, end = middle + 0.56 * span;
    const across = (value) => left + (Math.log10(value) - start) / (end - start) * (right - left);

    add(svg, "text", { x: 0, y: 12 }, scale.title);
    add(svg, "text", { x: right, y: height - 4, "text-anchor": "end" }, x === "s" ? "Trained share of the base's parameters" : "Trained parameters");
    if (scale.band) add(svg, "rect", { class: "band", x: left, width: right - left, y: up(scale.band[1]), height: up(scale.band[0]) - up(scale.band[1]) });
    let above = Infinity;
    for (const tick of (scale.ticks || steps(low, high)).sort((a, b) => a - b)) {
      const y = up(tick);
      if (y < top - 4 || y > bottom + 4) continue;
      if (above - y < 15 && tick !== 0) continue;
      above = y;
      add(svg, "line", { class: "grid", x1: left, x2: right, y1: y, y2: y });
      add(svg, "text", { x: left - 8, y: y + 4, "text-anchor": "end" }, scale.show(tick));
    }
    let before = -Infinity;
    for (let power = Math.floor(start); power <= end; power++) {
      for (const factor of end - start < 2.2 ? [1, 2, 5] : end - start > 7 && power % 2 ? [] : [1]) {
        const value = factor * 10 ** power, at = across(value);
        if (at < left || at > right || at - before < 46) continue;
        before = at;
        add(svg, "line", { class: "grid", x1: at, x2: at, y1: top, y2: bottom });
        add(svg, "text", { x: at, y: bottom + 18, "text-anchor": "middle" }, x === "s" ? percent(value) : short(value));
      }
    }
    const zero = up(scale.at0 || 0);
    add(svg, "line", { class: "zero", x1: left, x2: right, y1: zero, y2: zero });
    
    for (const row of drawn) {
      const style = styles[row.method] || { path: "M6 1.5a4.5 4.5 0 1 0 .01 0z", colour: "--base" };
      const node = add(svg, "g", { class: "point" }), cx = across(row[x]), cy = up(scale.at(row));
      const colour = `var(${style.colour})`, [below, over] = scale.ends(row);
      if (below !== undefined && below !== null) add(node, "line", { class: "interval", stroke: colour, x1: cx, x2: cx, y1: up(below), y2: up(over) });
      add(node, "path", { d: style.path, fill: colour, transform: `translate(${cx - 7} ${cy - 7}) scale(1.17)` });
      points.push({ row, node, cx, cy });
    }
    add(svg, "text", { class: "on", x: left + 8, y: zero - 7 }, scale.zero);
    if (!drawn.length) add(svg, "text", { x: (left + right) / 2, y: (top + zero) / 2, "text-anchor": "middle" }, "No arm to draw");
  }

  function steps(low, high) {
    const step = [0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 50, 100, 1000].find((each) => (high - low) / each <= 7) || high - low;
    const first = Math.ceil(low / step);
    return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
  }

  function keys(rows, now) {
    const names = Object.keys(styles).filter((name) => rows.some((row) => row.method === name));
    const had = document.activeElement && document.activeElement.dataset.key;
    $("keys").replaceChildren(...names.map((name) => {
      const button = document.createElement("button"), svg = add(button, "svg", { viewBox: "0 0 12 12", class: "swatch", "aria-hidden": "true" });
      add(svg, "path", { d: styles[name].path, fill: `var(${styles[name].colour})` });
      button.type = "button";
      button.dataset.key = name;
      button.append(name);
      button.setAttribute("aria-pressed", String(now.method === name));
      button.addEventListener("click", () => { $("method").value = $("method").value === name ? "" : name; update(); });
      return button;
    }));
    if (had) [...$("keys").children].find((button) => button.dataset.key === had)?.focus();
  }

  // One point is current: under the pointer, or chosen with the arrow keys.
  function choose(index) {
    if (index === current) return;
    hide();
    if (index < 0 || !points[index]) return;
    current = index;
    const { row, node, cx, cy } = points[index], tip = $("tip"), box = $("plot");
    node.classList.add("now");
    add(node, "circle", { class: "ring", cx, cy, r: 10 });
    node.parentNode.append(node); // drawn last: above the others
    const cell = (key) => row.node.querySelector(`td.${key}`);
    const text = (key) => { // "27,216 (6.5 %)"
      const [main, second] = [...(cell(key)?.childNodes || [])].map((part) => part.textContent);
      return second ? `${main} (${second})` : main;
    };
    const against = row.d === null ? "" : `Against full ${text("difference")}: ${row.verdict}`;
    const gained = row.g === null ? "" : `${percent(row.g)} of full's gain over the base`;
    const lines = [row.entry.title, `${cell("metric")?.dataset.title} ${text("metric")}`, against, gained,
      `${text("trainable_parameters")} trained`];
    const head = document.createElement("b");
    head.textContent = row.label;
    tip.replaceChildren(head, ...lines.filter(Boolean).map((line) => Object.assign(document.createElement("span"), { textContent: line })));
    tip.hidden = false;
    const x = box.offsetLeft + cx, y = box.offsetTop + cy, room = box.parentNode.clientWidth;
    const side = x + 18 + tip.offsetWidth > room - 8 ? x - 18 - tip.offsetWidth : x + 18;
    tip.style.left = `${Math.max(8, Math.min(side, room - tip.offsetWidth - 8))}px`;
    const beside = side >= 8;
    tip.style.top = `${beside ? Math.max(8, y - tip.offsetHeight / 2) : y + 20}px`;
  }
  function hide() {
    if (points[current]) {
      points[current].node.classList.remove("now");
      points[current].node.querySelector(".ring")?.remove();
    }
    current = -1;
    $("tip").hidden = true;
  }
  function go() {
    if (current < 0) return;
    const node = points[current].row.node;
    node.closest("details").open = true;
    node.tabIndex = -1;
    node.scrollIntoView({ block: "center", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
    node.focus({ preventScroll: true });
    node.classList.add("flash");
    setTimeout(() => node.classList.remove("flash"), 1400);
  }
  function nearest(event) {
    const box = $("plot").getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = -1, least = 26;
    points.forEach((point, index) => {
      const distance = Math.hypot(point.cx - x, point.cy - y);
      if (distance < least) [best, least] = [index, distance];
    });
    return best;
  }
  $("plot").addEventListener("pointermove", (event) => choose(nearest(event)));
  $("plot").addEventListener("pointerleave", hide);
  $("plot").addEventListener("click", (event) => {
    const index = nearest(event);
    if (index >= 0 && index === current && event.pointerType !== "touch") go();
    else choose(index);
  });
  $("plot").addEventListener("blur", hide);
  $("plot").addEventListener("keydown", (event) => {
    const last = points.length - 1;
    const next = { ArrowRight: Math.min(current + 1, last), ArrowLeft: Math.max(current - 1, 0), Home: 0, End: last }[event.key];
    if (next !== undefined) { event.preventDefault(); choose(next); }
    else if (event.key === "Enter") go();
    else if (event.key === "Escape") hide();
  });

  for (const name of [...FILTERS, ...AXES]) $(name).addEventListener("input", update);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  const all = () => { FILTERS.forEach((name) => ($(name).value = "")); update(); };
  $("filters").addEventListener("reset", (event) => { event.preventDefault(); all(); $("q").focus(); });
  $("again").addEventListener("click", () => { all(); $("q").focus(); });
  addEventListener("hashchange", () => { read(); update(); });
  let width = 0;
  new ResizeObserver(() => { if ($("plot").clientWidth !== width) { width = $("plot").clientWidth; update(); } }).observe($("plot"));
  read();
  update();
  document.documentElement.dataset.ready = "true";
})();
