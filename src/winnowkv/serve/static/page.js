// The page of winnow serve: one text, one question, two answers. What comes from the server is only ever put into text nodes.

import { Side } from "./answer.js";
import { showKept } from "./kept.js";
import { call, inWords, useKey } from "./server.js";
import { bytes, plural, sentence, whole } from "./words.js";

const $ = (id) => document.getElementById(id);
const LOADING_PAUSE = 1500; // milliseconds between two looks at a server that loads its model
const CHARACTERS_A_TOKEN = 4.2; // of English text, about: only for the size that is shown
const LEAST_GAIN = 1.05; // what is called less memory

let choices = null; // what the server offers
let running = null; // an AbortController while answers come

function tell(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

function news(text) {
  $("news").textContent = text;
}

// ---------------------------------------------------------------- the server

function server(text, state = "") {
  $("server").textContent = text;
  $("server").className = `server ${state}`;
}

async function connect() {
  try {
    choices = await (await call("v1/winnow/policies")).json();
  } catch (error) {
    if (error.status === 401) {
      server("an API key is needed");
      $("key-form").hidden = false;
      if ($("key").value) tell(error.message);
      $("key").focus();
    } else if (error.status === 503) {
      server("the server is loading its model …");
      setTimeout(connect, LOADING_PAUSE);
    } else {
      server("not connected", "failed");
      tell(inWords(error));
    }
    return;
  }
  $("key-form").hidden = true;
  tell("");
  server(choices.model, "ready");
  offer();
}

/** Fill the form with what the server offers. */
function offer() {
  const options = choices.policies.filter((one) => one.name !== "full" || one.name === choices.policy);
  $("policy").replaceChildren(...options.map((one) => new Option(one.name, one.name)));
  $("policy").value = choices.policy;
  if (typeof choices.budget === "number" && choices.budget <= 1 && !Number.isInteger(choices.budget)) {
    $("budget").value = Math.max(1, Math.round(choices.budget * 100));
  }
  $("levels").replaceChildren(...choices.levels.map(segment));
  $("length").max = choices.max_new_tokens;
  $("length").value = Math.min($("length").value, choices.max_new_tokens);
  const asked = choices.levels.find((one) => one.name === choices.quality) ?? choices.levels[0];
  $("levels").querySelector(`input[value="${asked.name}"]`).checked = true;
  changed();
}

function segment(level) {
  const input = document.createElement("input");
  Object.assign(input, { type: "radio", name: "level", value: level.name });
  const label = document.createElement("label");
  label.append(input, level.name);
  return label;
}

const chosenPolicy = () => choices?.policies.find((one) => one.name === $("policy").value);
const chosenLevel = () => $("levels").querySelector("input:checked:enabled")?.value ?? null;

/** Say what is chosen, and offer only what goes together. */
function changed() {
  const policy = chosenPolicy();
  $("budget-shown").textContent = `${$("budget").value}% kept`;
  $("budget").style.setProperty("--at", `${$("budget").value}%`);
  $("budget").setAttribute("aria-valuetext", `${$("budget").value} percent kept`);
  if (!policy) return;
  $("policy-about").textContent = sentence(policy.purpose);
  $("budget").disabled = !policy.evicts;
  $("budget").closest(".field").classList.toggle("off", !policy.evicts);
  for (const input of $("levels").querySelectorAll("input")) {
    input.disabled = !policy.evicts || !policy.levels.includes(input.value);
  }
  const level = choices.levels.find((one) => one.name === chosenLevel());
  $("level-about").textContent = level ? level.about : "This policy has no levels of quality.";
}

// ---------------------------------------------------------------- the text

function sized() {
  const characters = $("text").value.length;
  const tokens = Math.round(characters / CHARACTERS_A_TOKEN);
  $("text-size").textContent = characters ? `${whole(characters)} characters, about ${plural(tokens, "token")}` : "";
}

function take(text, name) {
  $("text").value = text;
  $("text").scrollTop = 0;
  sized();
  tell("");
  news(`${name} is loaded: ${$("text-size").textContent}.`);
}

async function open(file) {
  const most = choices?.max_body ?? Infinity;
  if (file.size > most) {
    tell(`${file.name} has ${bytes(file.size)}, and this server takes at most ${bytes(most)}: choose a shorter text.`);
    return;
  }
  try {
    take(new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer()), file.name);
  } catch {
    tell(`${file.name} is not plain text in UTF-8: save it as such, or paste the text.`);
  }
}

async function useExample() {
  try {
    const example = await (await call("static/example.json")).json();
    $("question").value = example.question;
    take(example.text, "The example");
    $("question").focus();
  } catch (error) {
    tell(inWords(error));
  }
}

// ---------------------------------------------------------------- asking

/** What keeps the form from being asked, as a sentence, and the field that it is about. */
function missing() {
  if (!choices) return ["The server is not ready: wait until its model's name stands at the top.", "question"];
  if (!$("text").value.trim()) return ["There is no text yet: paste one, open a file, or use the example.", "text"];
  if (!$("question").value.trim()) return ["There is no question yet: write one.", "question"];
  if (!$("length").checkValidity() || !$("length").value) {
    return [`The answer can have 1 to ${whole(choices.max_new_tokens)} tokens: change its length.`, "length"];
  }
  return null;
}

function bodyOf(winnow) {
  return {
    model: choices.model,
    messages: [{ role: "user", content: `${$("text").value.trim()}\n\n${$("question").value.trim()}` }],
    max_tokens: Number($("length").value), temperature: 0, stream: true, stream_options: { include_usage: true }, winnow,
  };
}

async function ask() {
  if (running) return;
  const lack = missing();
  if (lack) {
    tell(lack[0]);
    $(lack[1]).focus();
    return;
  }
  tell("");
  running = new AbortController();
  busy(true);
  const policy = chosenPolicy(), level = chosenLevel(), order = $("order").value;
  const winnow = { policy: policy.name, explain: true };
  if (policy.evicts) Object.assign(winnow, { budget: Number($("budget").value) / 100 }, level ? { quality: level } : {});
  const bodies = { compressed: bodyOf(winnow), full: bodyOf({ policy: "full" }) };
  $("answers").hidden = false;
  $("kept").hidden = $("verdict").hidden = true;
  const what = policy.evicts ? `${policy.name} at ${$("budget").value}%` : policy.name;
  const sides = { compressed: new Side("compressed", `Compressed: ${what}`), full: new Side("full", "Full cache") };
  $("full").hidden = order === "compressed";
  document.querySelector(".sides").classList.toggle("single", order === "compressed");
  $("answers").scrollIntoView({ block: "nearest" });
  news("Asked. The answers come below.");
  const answer = async (id) => {
    try {
      return await sides[id].run(bodies[id], running.signal);
    } catch (error) {
      if (error.param !== "winnow.explain") throw error;
      delete bodies[id].winnow.explain; // the text is too long for that, and may be asked all the same
      return sides[id].run(bodies[id], running.signal);
    }
  };
  try {
    if (order === "together") {
      const both = await Promise.allSettled([answer("compressed").then((kept) => showKept(kept, choices.explain_tokens)), answer("full")]);
      for (const one of both) if (one.status === "rejected") throw one.reason;
    } else {
      showKept(await answer("compressed"), choices.explain_tokens);
      news(sides.compressed.summary);
      if (order === "after") await answer("full");
    }
    if (order !== "compressed") compare(sides);
    news(`Done. ${sides.compressed.summary} ${order === "compressed" ? "" : sides.full.summary}`);
  } catch (error) {
    if (error.name === "AbortError") news("Stopped.");
    else if (error.status === 401) connect();
    else tell(inWords(error));
    for (const side of Object.values(sides)) if (side.card.classList.contains("waiting")) side.state("was not asked");
  } finally {
    running = null;
    busy(false);
  }
}

function busy(on) {
  const held = document.activeElement === $("stop");
  $("stop").hidden = !on;
  $("go").setAttribute("aria-disabled", String(on));
  if (!on && held) $("go").focus();
}

const words = (text) => text.trim().split(/\s+/);

/** How much less was held, and how far the answers agree. */
function compare({ compressed, full }) {
  const mine = compressed.usage?.winnow, theirs = full.usage?.winnow;
  if (!mine || !theirs) return;
  const less = document.createElement("strong");
  const times = theirs.kept_bytes / mine.kept_bytes;
  less.textContent = times < LEAST_GAIN ? "The same memory" : `${times.toFixed(1)}× less memory`;
  const ours = words(compressed.text), others = words(full.text);
  let same = 0;
  while (same < ours.length && same < others.length && ours[same] === others[same]) same++;
  const agree = document.createElement("span");
  if (compressed.text === full.text) agree.textContent = "Both answers are the same, word for word.";
  else agree.textContent = same ? `The first ${plural(same, "word")} of both answers are the same.` : "The answers differ from the first word.";
  $("verdict").replaceChildren(less, agree);
  $("verdict").hidden = false;
}

// ---------------------------------------------------------------- the form

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("ask").addEventListener("input", changed);
$("text").addEventListener("input", sized);
$("pick").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) open($("file").files[0]);
  $("file").value = "";
});
$("example").addEventListener("click", useExample);
$("clear").addEventListener("click", () => {
  take("", "An empty text");
  $("text").focus();
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return; // text is dropped by the browser itself
    event.preventDefault(); // else a file dropped beside the field would take the page's place
    document.querySelector(".text").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") open(event.dataTransfer.files[0]);
  });
}
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  connect();
});

sized();
connect();
