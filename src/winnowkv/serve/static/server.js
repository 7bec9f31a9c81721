// The server: requests with the user's key, streams, and errors in words.

import { plural, sentence } from "./words.js";

let key = ""; // in memory only

/** Send this key with every request from now on. */
export function useKey(given) {
  key = given;
}

/** Why the server did not answer, as a sentence; `param`: the field that it is about. */
export class Refused extends Error {
  constructor(message, status, param = null) {
    super(message);
    Object.assign(this, { status, param });
  }
}

/** What went wrong, as a sentence. */
export function inWords(error) {
  if (error instanceof Refused) return error.message;
  return `The page failed: ${error.message}.`;
}

/** The error that an answer with such a status holds. */
async function refusal(response) {
  let said = { message: `the server answered with status ${response.status}` };
  try {
    said = (await response.json()).error;
  } catch {
    // not the server's own answer
  }
  const again = response.headers.get("retry-after");
  const when = response.status === 429 && again ? ` Try again in ${plural(Number(again), "second")}.` : "";
  return new Refused(sentence(said.message) + when, response.status, said.param);
}

/** What a wait for the network gives; Refused with these words if the connection fails. */
async function connected(waited, said) {
  try {
    return await waited;
  } catch (error) {
    throw error instanceof TypeError ? new Refused(said, 0) : error;
  }
}

/** The server's answer to a request, which raises Refused if it is an error. */
export async function call(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const sent = fetch(path, { ...options, headers, credentials: "omit", redirect: "error" });
  const response = await connected(sent, "The server cannot be reached. Is it still running?");
  if (!response.ok) throw await refusal(response);
  return response;
}

/** The JSON objects of a stream of server-sent events. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await connected(reader.read(), "The connection to the server was lost: ask again.");
    if (done) throw new Refused("The server ended the answer in the middle: ask again.", 0);
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}
