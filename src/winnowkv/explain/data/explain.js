"use strict";
/*
winnowExplain(element, data) draws inside `element` what policies kept of one prompt, side by side, and replaces what was there.
It needs explain.css on the page and nothing else; it makes no request and sets no markup from texts.

data = {
  tokens: ["The", " cat", ...],   the tokens' texts, in order; "" for a part of a character
  selections: [{                  a policy each; what KeptTokens.to_dict() of the Python package gives:
    policy, budget,               as they were asked
    tokens, layers, heads,        numbers; tokens equals data.tokens.length
    positions: [null | [[0, 1, ...], ...]],   a layer: null keeps all; else a list for all heads, or one for each
    letters: {".": "evicted", ...},           what a letter of `reasons` stands for; null without reasons
    reasons: [["..is", ...], ...] | null,     a layer: a text for all heads, or one for each; a letter a token
    scores: [[row, ...], ...] | null,         the same; a row is numbers and nulls, or a text: base64 of bfloat16, low byte first
    thresholds: [[0.1, ...], ...] | null,     the lowest score that stayed by itself
    label, notes,                 optional: a name in place of policy and budget; sentences below it
  }],
}

It returns {select(token), redraw(), remove()}: make a token (its number) the current one; draw the maps anew after colours
changed; take everything away. While a token is current the element has the attribute data-token with its number.
Colours are the custom properties of `.wx` in explain.css, which a page may set by itself.
*/
const winnowExplain = (() => {
  const LEVELS = 8; // shades of a token: how many layers keep it
  const BLOCK = 300; // tokens of a part of the text that is laid out when it comes into view
  const GONE = ["evicted", "evicted between chunks"];
  const count = (n) => n.toLocaleString("en-US");
  const short = (x) => (x === null || x === undefined || Number.isNaN(x) ? "–" : String(Number(x.toPrecision(3))));
  const plural = (n, one) => `${count(n)} ${one}${n === 1 ? "" : "s"}`;

  function make(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function add(parent, ...rest) {
    return parent.appendChild(make(...rest));
  }

  // Scores of one head as numbers; NaN where there is none.
  function unpack(row) {
    if (typeof row !== "string") return Float32Array.from(row, (x) => (x === null ? NaN : x));
    const bytes = Uint8Array.from(atob(row), (letter) => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer), found = new DataView(new ArrayBuffer(bytes.length * 2));
    for (let at = 0; at < bytes.length; at += 2) found.setUint32(at * 2, view.getUint16(at, true) * 65536, true);
    return new Float32Array(found.buffer);
  }

  // What is drawn of one selection: heads that keep each token, by layer, and what decided.
  class Kept {
    constructor(given, number) {
      Object.assign(this, given);
      this.number = number;
      this.name = given.label ?? given.policy;
      this.held = given.positions.map((rows) => {
        const found = new Uint16Array(this.tokens);
        if (rows === null) return found.fill(this.heads);
        for (const row of rows) for (const at of row) found[at] += this.heads / rows.length;
        return found;
      });
      this.entries = this.held.map((row) => row.reduce((sum, n) => sum + n, 0) / this.heads);
      this.inLayers = new Uint16Array(this.tokens);
      for (const row of this.held) row.forEach((n, at) => { this.inLayers[at] += n > 0 ? 1 : 0; });
      this.unpacked = [];
    }

    scoresOf(layer) {
      this.unpacked[layer] ??= this.scores[layer].map(unpack);
      return this.unpacked[layer];
    }

    headsOf(token) {
      return this.held.reduce((sum, row) => sum + row[token], 0);
    }

    reasonsIn(layer, token) {
      const rows = this.reasons?.[layer] ?? [];
      return Array.from({ length: rows.length ? this.heads : 0 }, (_, head) => this.letters[rows[head % rows.length][token]]);
    }

    // Of these layers the score that is best beside what was enough in its head; null where none competes.
    best(token, layers) {
      let best = null;
      for (const layer of this.scores ? layers : []) {
        this.scoresOf(layer).forEach((row, head, all) => {
          const least = this.thresholds[layer][head % this.thresholds[layer].length], beside = row[token] / (least || 1);
          if (Number.isNaN(row[token]) || (best && best.beside >= beside)) return;
          best = { score: short(row[token]), least: short(least), beside, place: `layer ${layer}${all.length > 1 ? `, head ${head}` : ""}` };
        });
      }
      return best;
    }

    inLayer(layer, token) {
      if (layer >= this.layers) return "–";
      const best = this.best(token, [layer]), why = [...new Set(this.reasonsIn(layer, token))];
      const score = best === null ? [] : [`score ${best.score} (enough: ${best.least})`];
      return [`${this.held[layer][token]} of ${plural(this.heads, "head")}`, why.join(", "), ...score].filter(Boolean).join(" · ");
    }

    // How many heads of all layers each part decided on, those that kept it first.
    decided(token) {
      const counts = new Map();
      for (const layer of this.held.keys()) {
        for (const why of this.reasonsIn(layer, token)) counts.set(why, (counts.get(why) ?? 0) + 1);
      }
      return [...counts].sort((a, b) => GONE.includes(a[0]) - GONE.includes(b[0]) || b[1] - a[1]);
    }

    fate(token) {
      const why = this.decided(token).map(([name, heads]) => `${name} in ${plural(heads, "head")}`).join(", ");
      return [`kept by ${this.inLayers[token]} of ${this.layers} layers`, why].filter(Boolean).join("; ");
    }
  }

  // A custom property's colour as [red, green, blue].
  function rgb(element, name) {
    const context = make("canvas").getContext("2d", { willReadFrequently: true });
    context.fillStyle = getComputedStyle(element).getPropertyValue(name).trim() || "#000";
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  }

  // Layers from top to bottom, positions from left to right; darker where more of the heads keep more of the tokens.
  function paint(canvas, rows, heads, width) {
    const from = rgb(canvas, "--wx-none"), to = rgb(canvas, "--wx-keep-ink");
    const tokens = rows[0].length;
    canvas.width = Math.max(1, Math.min(tokens, width));
    canvas.height = rows.length;
    const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
    let at = 0;
    for (const row of rows) {
      for (let x = 0; x < canvas.width; x++) {
        const begin = Math.floor((x * tokens) / canvas.width), end = Math.floor(((x + 1) * tokens) / canvas.width);
        let sum = 0;
        for (let t = begin; t < end; t++) sum += row[t];
        const share = Math.sqrt(sum / ((end - begin) * heads)); // a few of many must be seen
        for (let c = 0; c < 3; c++) image.data[at++] = from[c] + (to[c] - from[c]) * share;
        image.data[at++] = 255;
      }
    }
    context.putImageData(image, 0, 0);
  }

  // The shade of a token that so many layers keep: 0 for none, the last one for all.
  function levelOf(kept, layers) {
    return kept === layers ? LEVELS : Math.min(LEVELS - 1, Math.ceil((LEVELS * kept) / layers));
  }

  function shownText(text) {
    return text === "" ? "▯" : text.replaceAll("\r", "␍").replaceAll("\n", "↵\n");
  }

  // What may scroll can be reached with the keyboard, and has a name.
  function region(element, name) {
    element.tabIndex = 0;
    element.setAttribute("role", "region");
    element.setAttribute("aria-label", name);
    return element;
  }

  function table(parent, heads, rows, caption) {
    const made = add(parent, "table");
    add(made, "caption", "wx-hidden", caption);
    const top = add(add(made, "thead"), "tr");
    for (const text of heads) add(top, "th", "", text).scope = "col";
    const body = add(made, "tbody");
    for (const [first, ...cells] of rows) {
      const row = add(body, "tr");
      add(row, "th", "", first).scope = "row";
      for (const cell of cells) cell instanceof Node ? add(row, "td").append(cell) : add(row, "td", "", cell);
    }
    return made;
  }

  // One policy: its budget, map and bars, the same as a table, and the text.
  class Panel {
    constructor(parent, kept, texts, owner) {
      this.kept = kept;
      this.owner = owner;
      this.root = add(parent, "section", "wx-panel");
      const title = add(this.root, "h3", "", kept.label ?? `${kept.policy}, budget ${kept.budget}`);
      title.id = `wx-${owner.id}-${kept.number}`;
      this.root.setAttribute("aria-labelledby", title.id);
      add(this.root, "p", "wx-soft", this.summary());
      for (const note of kept.notes ?? []) add(this.root, "p", "wx-soft", note);
      this.drawMap();
      this.drawTable();
      this.drawText(texts);
    }

    summary() {
      const { kept } = this, few = Math.min(...kept.entries), most = Math.max(...kept.entries);
      const all = kept.entries.reduce((a, b) => a + b, 0) / (kept.layers * kept.tokens);
      const each = few === most ? `${count(few)} of each layer` : `${count(Math.round(few))} to ${count(Math.round(most))} of a layer`;
      const none = kept.inLayers.filter((n) => n === 0).length, every = kept.inLayers.filter((n) => n === kept.layers).length;
      return `${(100 * all).toFixed(1)}% of the entries kept, ${each}. ${plural(every, "token")} in all layers, ${count(none)} in none.`;
    }

    drawMap() {
      const { kept } = this, height = Math.max(5, Math.min(13, Math.floor(390 / kept.layers)));
      const box = add(this.root, "div", "wx-map");
      const labels = add(box, "div", "wx-layers"), frame = add(box, "div", "wx-frame"), bars = add(box, "div", "wx-bars");
      for (const part of [labels, bars]) part.setAttribute("aria-hidden", "true");
      this.canvas = add(frame, "canvas");
      this.canvas.style.height = `${height * kept.layers}px`;
      this.canvas.setAttribute("role", "img");
      this.canvas.setAttribute("aria-label", this.mapText());
      this.cursor = add(frame, "div", "wx-cursor");
      const axis = add(frame, "div", "wx-axis");
      axis.setAttribute("aria-hidden", "true");
      for (const share of [0, 0.25, 0.5, 0.75]) add(axis, "span", "", count(Math.round(share * kept.tokens)));
      const most = Math.max(...kept.entries), every = height >= 11 ? 1 : Math.ceil(11 / height);
      kept.entries.forEach((entries, layer) => {
        const label = add(labels, "span", "", layer % (5 * Math.ceil(every / 5)) ? "" : String(layer));
        const bar = add(bars, "span");
        label.style.height = bar.style.height = `${height}px`;
        add(bar, "i").style.width = `${(100 * entries) / most}%`;
        if (layer % every === 0) add(bar, "b", "", count(Math.round(entries)));
      });
      const place = (event) => {
        const area = this.canvas.getBoundingClientRect();
        const inside = (x, size, n) => Math.max(0, Math.min(n - 1, Math.floor((x / size) * n)));
        return [
          inside(event.clientX - area.left, area.width, kept.tokens), inside(event.clientY - area.top, area.height, kept.layers),
        ];
      };
      this.canvas.addEventListener("pointermove", (event) => this.owner.show(...place(event)));
      this.canvas.addEventListener("click", (event) => this.focus(place(event)[0]));
      this.sizes = new ResizeObserver(() => this.redraw());
      this.sizes.observe(frame);
    }

    redraw() {
      const width = this.canvas.clientWidth * (window.devicePixelRatio || 1);
      if (width) paint(this.canvas, this.kept.held, this.kept.heads, Math.round(width));
    }

    tenths() {
      const { kept } = this, parts = Math.min(10, kept.tokens);
      return kept.held.map((row) => Array.from({ length: parts }, (_, part) => {
        const cut = row.subarray(Math.floor((part * kept.tokens) / parts), Math.floor(((part + 1) * kept.tokens) / parts));
        return cut.reduce((a, b) => a + b, 0) / (cut.length * kept.heads);
      }));
    }

    mapText() {
      const { kept } = this, each = this.tenths();
      const shares = each[0].map((_, part) => each.reduce((sum, row) => sum + row[part], 0) / each.length);
      const said = shares.map((share) => `${Math.round(100 * share)}%`).join(", ");
      return `Map of ${kept.layers} layers by ${count(kept.tokens)} positions. Kept from the prompt's begin to its end, in ` +
        `${shares.length} parts: ${said}. The table below has it by layer.`;
    }

    drawTable() {
      const more = add(this.root, "details"), { kept } = this;
      add(more, "summary", "", "Map and budgets as a table");
      more.addEventListener("toggle", () => {
        if (more.querySelector("table")) return;
        const each = this.tenths(), parts = each[0].length;
        const heads = each[0].map((_, part) => `from ${count(Math.floor((part * kept.tokens) / parts))}`);
        const rows = each.map((shares, layer) => [
          String(layer), count(Math.round(10 * kept.entries[layer]) / 10), ...shares.map((share) => `${Math.round(100 * share)}%`),
        ]);
        const scroll = region(add(more, "div", "wx-scroll"), "table of the map");
        table(scroll, ["layer", "entries", ...heads], rows, "Entries of each layer, and the share kept of each part of the prompt");
      });
    }

    drawText(texts) {
      const { kept, owner } = this;
      this.text = add(this.root, "div", "wx-text");
      this.text.setAttribute("role", "listbox");
      this.text.setAttribute("aria-label", `Tokens of the prompt, ${kept.name}. Arrow keys move.`);
      this.spans = [];
      let block = null, size = 0;
      texts.forEach((text, token) => {
        if (block === null || size > 4 * BLOCK || (size >= BLOCK && texts[token - 1].endsWith("\n"))) {
          block = add(this.text, "div", "wx-block");
          block.setAttribute("role", "presentation");
          size = 0;
        }
        const span = add(block, "span", `k${levelOf(kept.inLayers[token], kept.layers)}`, shownText(text));
        span.setAttribute("role", "option");
        span.dataset.at = token;
        this.spans.push(span);
        size += 1;
      });
      this.stop = 0; // the one token that the tabulator reaches
      this.spans[0].tabIndex = 0;
      const tokenOf = (event) => (event.target.dataset.at === undefined ? null : Number(event.target.dataset.at));
      this.text.addEventListener("pointerover", (event) => { if (tokenOf(event) !== null) owner.show(tokenOf(event)); });
      this.text.addEventListener("click", (event) => { if (tokenOf(event) !== null) this.focus(tokenOf(event), false); });
      this.text.addEventListener("focusin", (event) => { if (tokenOf(event) !== null) owner.show(tokenOf(event)); });
      this.text.addEventListener("keydown", (event) => this.key(event));
      this.text.addEventListener("scroll", () => owner.follow(this));
    }

    key(event) {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      const last = this.spans.length - 1, now = this.stop;
      const by = { ArrowRight: 1, ArrowLeft: -1, PageDown: 100, PageUp: -100, Home: -now, End: last }[event.key];
      const line = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (by === undefined && line === undefined) return;
      event.preventDefault();
      this.focus(line ? this.beside(now, line) : Math.max(0, Math.min(last, now + by)));
    }

    // Where a token stands; the larger part of one whose blank stayed in the line before.
    spot(token) {
      return [...this.spans[token].getClientRects()].reduce((a, b) => (b.width > a.width ? b : a));
    }

    // The token of the next line, or the previous one, that is nearest to being below, or above.
    beside(token, step) {
      const here = this.spot(token), off = (spot) => Math.abs(spot.left - here.left);
      let best = token, line = null, least = Infinity;
      for (let at = token + step; at >= 0 && at < this.spans.length; at += step) {
        const spot = this.spot(at);
        if (spot.top === here.top) continue;
        if (spot.top !== (line ??= spot.top)) break;
        if (off(spot) < least) [best, least] = [at, off(spot)];
      }
      return best;
    }

    focus(token, scroll = true) {
      const { kept } = this, span = this.spans[token];
      this.spans[this.stop].removeAttribute("tabindex");
      this.spans[this.stop].removeAttribute("aria-selected");
      this.stop = token;
      span.tabIndex = 0;
      span.setAttribute("aria-selected", "true");
      span.setAttribute("aria-posinset", String(token + 1));
      span.setAttribute("aria-setsize", String(kept.tokens));
      span.setAttribute("aria-label", `${this.owner.data.tokens[token].trim() || "blank"}: ${kept.fate(token)}`);
      span.focus({ preventScroll: true });
      if (scroll) span.scrollIntoView({ block: "nearest", inline: "nearest" });
    }

    mark(token, before) {
      if (before !== null) this.spans[before].classList.remove("wx-now");
      this.spans[token].classList.add("wx-now");
      this.cursor.style.left = `${(100 * (token + 0.5)) / this.kept.tokens}%`;
    }
  }

  // What became of the current token, for all policies.
  class Details {
    constructor(parent) {
      this.root = add(parent, "div", "wx-details");
      this.title = add(this.root, "p", "wx-title", "Point at a token, or move to it with the arrow keys.");
      this.body = region(add(this.root, "div", "wx-scroll"), "what became of the token");
      this.more = add(this.root, "details");
      add(this.more, "summary", "", "Each layer");
      this.layers = region(add(this.more, "div", "wx-scroll wx-tall"), "the token in each layer");
      this.more.hidden = true;
      this.more.addEventListener("toggle", () => this.fill());
    }

    show(data, selections, token, layer) {
      this.now = [selections, token];
      this.title.replaceChildren("Token ", make("b", "", count(token)), ` of ${count(data.tokens.length)}: `);
      add(this.title, "q", "", shownText(data.tokens[token]).replaceAll("\n", ""));
      if (layer !== null) {
        this.title.append(` · layer ${layer}: ${selections.map((kept) => `${kept.name} ${kept.inLayer(layer, token)}`).join("; ")}`);
      }
      const heads = ["policy", "layers", "heads", "what decided, in heads", "best score", "enough there"];
      const rows = selections.map((kept) => this.row(kept, token));
      this.body.replaceChildren(table(make("div"), heads, rows, "What became of the token"));
      this.more.hidden = false;
      this.fill();
    }

    row(kept, token) {
      const best = kept.best(token, kept.held.keys());
      const why = kept.decided(token).map(([name, heads]) => `${name} ${heads}`).join(", ");
      const layers = make("span", "", `${kept.inLayers[token]} of ${kept.layers} `), strip = add(layers, "span", "wx-strip");
      strip.setAttribute("aria-hidden", "true");
      for (const row of kept.held) add(strip, "i", row[token] === 0 ? "" : row[token] === kept.heads ? "wx-full" : "wx-part");
      return [
        kept.name, layers, `${kept.headsOf(token)} of ${kept.layers * kept.heads}`, why || "scores were not kept",
        best === null ? "–" : `${best.score} (${best.place})`, best === null ? "–" : best.least,
      ];
    }

    fill() {
      if (!this.more.open || !this.now) return;
      const [selections, token] = this.now, most = Math.max(...selections.map((kept) => kept.layers));
      const rows = Array.from({ length: most }, (_, layer) => [
        String(layer), ...selections.map((kept) => kept.inLayer(layer, token)),
      ]);
      const heads = ["layer", ...selections.map((kept) => kept.name)];
      this.layers.replaceChildren(table(make("div"), heads, rows, "The token in each layer"));
    }
  }

  let components = 0;

  class Component {
    constructor(element, data) {
      this.element = element;
      this.data = data;
      this.id = components++;
      this.token = null;
      this.selections = data.selections.map((one, number) => new Kept(one, number));
      this.root = make("div", "wx");
      this.drawLegend();
      const panels = add(this.root, "div", "wx-panels");
      this.panels = this.selections.map((kept) => new Panel(panels, kept, data.tokens, this));
      this.details = new Details(this.root);
      element.replaceChildren(this.root);
      this.scheme = window.matchMedia("(prefers-color-scheme: dark)");
      this.changed = () => this.redraw();
      this.scheme.addEventListener("change", this.changed);
    }

    drawLegend() {
      const legend = add(this.root, "p", "wx-legend");
      legend.append("Tokens by how many layers keep them: ");
      const layers = this.selections[0].layers, of = new Map();
      for (let n = 0; n <= layers; n++) of.set(levelOf(n, layers), [...(of.get(levelOf(n, layers)) ?? []), n]);
      for (const [level, counts] of of) {
        add(legend, "span", `wx-key k${level}`, counts.length > 1 ? `${counts[0]}–${counts.at(-1)}` : String(counts[0]));
      }
      add(legend, "span", "wx-soft", "Map: layers from top to bottom, the prompt from left to right; bars: entries of each layer.");
    }

    show(token, layer = null) {
      if (token === this.token && layer === this.layer) return;
      this.wanted = [token, layer];
      this.frame ??= requestAnimationFrame(() => {
        const [next, at] = this.wanted;
        this.frame = undefined;
        for (const panel of this.panels) panel.mark(next, this.token);
        [this.token, this.layer] = [next, at];
        this.element.dataset.token = next;
        this.details.show(this.data, this.selections, next, at);
      });
    }

    // The texts are the same and as wide: they scroll together.
    follow(source) {
      if (this.following && this.following !== source) return;
      this.following = source;
      for (const panel of this.panels) if (panel !== source) panel.text.scrollTop = source.text.scrollTop;
      clearTimeout(this.followed);
      this.followed = setTimeout(() => { this.following = null; }, 120);
    }

    redraw() {
      for (const panel of this.panels) panel.redraw();
    }

    remove() {
      for (const panel of this.panels) panel.sizes.disconnect();
      this.scheme.removeEventListener("change", this.changed);
      cancelAnimationFrame(this.frame);
      this.root.remove();
      delete this.element.dataset.token;
    }
  }

  return (element, data) => {
    const made = new Component(element, data);
    return { select: (token) => made.panels[0].focus(token), redraw: () => made.redraw(), remove: () => made.remove() };
  };
})();
