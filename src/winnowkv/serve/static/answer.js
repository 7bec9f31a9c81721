// One of the two answers: asked, and shown while it comes.

import { Refused, call, events, inWords } from "./server.js";
import { bytes, plural, seconds, sentence } from "./words.js";

/** One of the two cards: what it shows while its answer comes. */
export class Side {
  constructor(id, name) {
    this.card = document.getElementById(id);
    this.card.replaceChildren(document.getElementById("side").content.cloneNode(true));
    this.card.hidden = false;
    this.name = name;
    const title = this.find("name");
    title.textContent = name;
    title.id = `${id}-name`;
    this.find("answer").setAttribute("role", "region");
    this.find("answer").setAttribute("aria-label", `${name}: answer`);
    this.find("bar").setAttribute("aria-label", `${name}: kept bytes of the full cache`);
    this.text = "";
    this.state("waits for the other answer, so that both are timed alone", "waiting");
  }

  find(part) {
    return this.card.querySelector(`.${part}`);
  }

  put(part, text) {
    this.find(part).textContent = text;
  }

  state(text, kind = "") {
    this.put("state", text);
    this.find("state").classList.toggle("bad", kind === "bad");
    this.card.classList.toggle("waiting", kind === "waiting");
    this.card.setAttribute("aria-busy", String(kind === "busy"));
  }

  /** Ask, and show what comes. Returns the last chunk's `winnow_kept`; raises Refused, and AbortError if it was stopped. */
  async run(body, signal) {
    const began = performance.now();
    const since = () => (performance.now() - began) / 1000;
    this.state("reads the text …", "busy");
    const clock = setInterval(() => this.begun || this.put("first", seconds(since())), 100);
    let first = 0, last = 0, count = 0, end = null, kept;
    try {
      const response = await call("v1/chat/completions", {
        method: "POST", signal, body: JSON.stringify(body), headers: { "content-type": "application/json" },
      });
      for await (const chunk of events(response.body)) {
        if (chunk.error) throw new Refused(sentence(chunk.error.message), 500);
        const choice = chunk.choices[0];
        if (choice && !("role" in choice.delta)) {
          last = since();
          count += 1;
          if (!first) {
            first = last;
            this.begun = true;
            this.put("first", seconds(first));
            this.state("answers …", "busy");
          }
          this.add(choice.delta.content ?? "");
          this.put("count", plural(count, "token"));
          if (count > 1) this.put("speed", ((count - 1) / (last - first)).toFixed(1));
          end = choice.finish_reason ?? end;
        }
        if (chunk.usage) {
          this.usage = chunk.usage;
          this.measured(chunk.usage, first, last);
        }
        if ("winnow_kept" in chunk) kept = chunk.winnow_kept;
      }
    } catch (error) {
      if (error.name === "AbortError") this.state("stopped");
      else this.state(inWords(error), "bad");
      throw error;
    } finally {
      clearInterval(clock);
    }
    if (!this.text) this.put("answer", "(The model ended its answer at once.)");
    this.state(`done after ${seconds(last)}${end === "length" ? ", at the longest length" : ""}`);
    return kept;
  }

  add(text) {
    const box = this.find("answer");
    const follow = box.scrollTop + box.clientHeight >= box.scrollHeight - 4;
    this.text += text;
    box.append(text);
    if (follow) box.scrollTop = box.scrollHeight;
  }

  measured(usage, first, last) {
    const used = usage.winnow;
    const share = used.full_bytes ? (100 * used.kept_bytes) / used.full_bytes : 100;
    this.put("bytes", `${bytes(used.kept_bytes)} of ${bytes(used.full_bytes)}`);
    this.find("fill").style.setProperty("width", `${share}%`);
    const bar = this.find("bar");
    bar.setAttribute("aria-valuenow", share.toFixed(1));
    bar.setAttribute("aria-valuetext", `${bytes(used.kept_bytes)} of ${bytes(used.full_bytes)}, ${share.toFixed(1)} percent`);
    this.put("count", plural(usage.completion_tokens, "token"));
    if (usage.completion_tokens > 1 && last > first) this.put("speed", ((usage.completion_tokens - 1) / (last - first)).toFixed(1));
    this.find("notes").replaceChildren(...used.notes.map((note) => {
      const item = document.createElement("li");
      item.textContent = sentence(note);
      return item;
    }));
    this.find("notes").hidden = !used.notes.length;
  }

  get summary() {
    return `${this.name}: ${this.find("bytes").textContent}, first token after ${this.find("first").textContent}, ` +
      `${this.find("speed").textContent} tokens a second.`;
  }
}
