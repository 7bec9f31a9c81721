// What was kept of the prompt: explain.js draws it, and the passages that every layer keeps are named.

import { whole } from "./words.js";

const $ = (id) => document.getElementById(id);
const UNSHOWN = /^[^\p{L}\p{N}<]+|<\|[^|]*\|>/gu; // of a passage: the end of the sentence before it, and a template's marks
const LEAST_PASSAGE = 5, MOST_PASSAGES = 5; // tokens of a passage, and how many are named

let shown = null; // what explain.js drew

/** Show which tokens of the prompt were kept; null if nothing was evicted, undefined if it is not known.
 *  `most`: tokens of a prompt that can be shown. */
export function showKept(kept, most) {
  $("kept").hidden = false;
  $("kept-view").hidden = !kept;
  $("passages").replaceChildren();
  shown?.remove();
  shown = null;
  if (!kept) {
    $("kept-about").textContent = kept === null
      ? "Nothing was evicted: the answer ended while its policy still looked at its first tokens. Ask for a longer one, or choose quality lean."
      : `The text is too long to show what became of each token: that is done for at most ${whole(most)}.`;
    return;
  }
  $("kept-about").textContent =
    "Each token of the prompt, darker where more of the model’s layers keep it. Point at one, or move with the arrow keys, to see where.";
  shown = winnowExplain($("kept-view"), { tokens: kept.texts, selections: [kept] });
  const found = passages(kept);
  if (!found.length) return;
  $("passages").append("Kept by every layer:");
  for (const [begin, end] of found) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = kept.texts.slice(begin, end).join("").replace(UNSHOWN, "").trim();
    button.addEventListener("click", () => shown.select(begin));
    $("passages").append(button);
  }
  reveal(found[0][0]);
}

/** The longest runs of tokens that every layer keeps in some head, as [begin, end], in their order; none if that is all. */
function passages(kept) {
  const counts = new Uint16Array(kept.tokens);
  for (const rows of kept.positions) {
    if (rows === null) for (let at = 0; at < kept.tokens; at++) counts[at] += 1;
    else for (const at of new Set(rows.flat())) counts[at] += 1;
  }
  const runs = [];
  for (let begin = 0, end = 0; begin < kept.tokens; begin = end + 1) {
    end = begin;
    while (end < kept.tokens && counts[end] === kept.layers) end++;
    if (end - begin >= LEAST_PASSAGE && end - begin < kept.tokens) runs.push([begin, end]);
  }
  return runs.sort((a, b) => b[1] - b[0] - (a[1] - a[0])).slice(0, MOST_PASSAGES).sort((a, b) => a[0] - b[0]);
}

/** Scroll the text, and nothing else, to a token. Twice, since what was out of view is measured when it comes into view. */
function reveal(token, again = true) {
  const span = $("kept-view").querySelector(`[data-at="${token}"]`);
  const box = span?.closest('[role="listbox"]');
  if (!box) return;
  box.scrollTop += span.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 3;
  if (again) requestAnimationFrame(() => reveal(token, false));
}
