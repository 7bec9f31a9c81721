"""What an OpenAI request on a context becomes before vLLM reads it, or why it is refused; no vLLM and no HTTP in here.

A prompt is either *whole*, the document and what follows it, as it would be sent without contexts, or a *question*: what
follows the document alone. Its token ids tell which: a whole prompt begins with the document's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from winnowkv.contexts.context import CONTEXT_PARAM, Context
from winnowkv.contexts.fit import fields_difference
from winnowkv.contexts.store import ContextStore, RememberedContexts
from winnowkv.errors import CacheError, InputError, UnknownContextError, WinnowError
from winnowkv.files import shown
from winnowkv.prompt.chat import BEFORE_QUESTION, PROBES, apply_template, open_turn, shared_tokens, text_ending, user_message

logger = logging.getLogger(__name__)
CHAT_PATH, COMPLETIONS_PATH, CONTEXTS_PATH = "/v1/chat/completions", "/v1/completions", "/v1/winnow/contexts"
LEAST_SHARED = 32  # a prompt that begins with so many tokens of the document's text was meant to hold all of it
LEAST_PASSAGE = 4  # tokens of passages by which a document is recognized
DAMAGED = "context {} cannot be used, the server's log says why: add the document anew"
MOST_CONTEXTS = 256  # whose token ids are held in memory
Body = dict[str, Any]
MakeTokenizer = Callable[[Mapping[str, Any]], Any]  # of the template's options that a request gives

# Fields of a request that cannot be honoured on a context: whether a value asks for it, and why not, with the way out.
GIVEN, TRUE = (lambda value: value is not None), bool
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt_logprobs": (GIVEN, "the document's tokens are not computed, so they have no probabilities: leave it out"),
    "echo": (TRUE, "the prompt of a request on a context begins with placeholders, not with the document: leave it out"),
    "return_prompt_text": (TRUE, "the prompt of a request on a context begins with placeholders: leave it out"),
    "truncate_prompt_tokens": (GIVEN, "a context is served whole, or not at all: leave it out, and shorten what follows"),
    "prompt_embeds": (GIVEN, "what follows a document must be text or token ids: give prompt"),
    "suffix": (GIVEN, "nothing can follow the answer: leave it out"),
    "use_beam_search": (TRUE, "beams would be read anew without the context: leave it out"),
    "tools": (TRUE, "the chat template puts tools before the document, which was read without: leave them out"),
    "documents": (TRUE, "the chat template puts documents before the context's, which was read without: leave them out"),
    "continue_final_message": (TRUE, "a request on a context ends where the assistant's answer begins: leave it out"),
    "add_generation_prompt": (
        lambda value: value is not None and not value,
        "a request on a context ends where the assistant's answer begins: leave it out",
    ),
    "cache_salt": (GIVEN, f"{CONTEXT_PARAM} sets it: leave it out"),
    "kv_transfer_params": (GIVEN, f"{CONTEXT_PARAM} sets them: leave them out"),
}
CHAT_REFUSED = {"add_special_tokens": (TRUE, "they would stand before the document, which was read without: leave it out")}


class RefusedError(InputError):
    """A request that cannot be honoured: ``field`` of its body, and the HTTP status of the answer."""

    def __init__(self, field: str, why: str, status: int = 400) -> None:
        super().__init__(why)
        self.field, self.status = field, status


@dataclass(frozen=True)
class Served:
    """What the server serves.

    Attributes
    ----------
    models: names of the base model. adapters: names of its LoRA adapters.
    max_model_len: tokens of prompt and answer.
    fields: of the model (:func:`winnowkv.contexts.fit.model_fields`); None if not known here: the connector compares, too.
    """

    models: frozenset[str] = frozenset()
    adapters: frozenset[str] = frozenset()
    max_model_len: int | None = None
    fields: Mapping[str, Any] | None = None


class Contexts:
    """The contexts of a store, with those that were asked for lately in memory."""

    def __init__(self, store: ContextStore) -> None:
        self.store = store
        self._known = RememberedContexts(store, MOST_CONTEXTS)

    def __getitem__(self, asked: Any) -> Context:
        """A context. Raises RefusedError for what is none, is not there or cannot be used, without the store's place."""
        try:
            return self._known[asked]
        except UnknownContextError:
            raise RefusedError(
                CONTEXT_PARAM, f"there is no context {asked} in the server's store: see {CONTEXTS_PATH}"
            ) from None
        except CacheError as error:
            logger.error("%s", error)
            raise RefusedError(CONTEXT_PARAM, DAMAGED.format(asked)) from None
        except InputError as error:
            raise RefusedError(CONTEXT_PARAM, str(error)) from None

    def listed(self) -> list[Body]:
        """All contexts as plain data; of a file that cannot be used its id and why."""
        rows: list[Body] = []
        for one in self.store.ids():
            try:
                rows.append({"object": "context", **self.store.context(one).to_dict()})
            except WinnowError as error:
                logger.error("%s", error)
                rows.append({"object": "context", "id": one, "error": DAMAGED.format(one)})
        return rows


def rewritten(path: str, body: Body, contexts: Contexts, tokenizer: MakeTokenizer, served: Served) -> Body:
    """The body that vLLM is sent in place of one that names a context.

    Parameters
    ----------
    path: :data:`CHAT_PATH` or :data:`COMPLETIONS_PATH`.
    tokenizer: makes the server's tokenizer, with options of the chat template.

    Raises
    ------
    RefusedError
        For whatever cannot be honoured.
    """
    chat = path == CHAT_PATH
    check_model(body, served)
    for field, (asks, why) in (REFUSED | CHAT_REFUSED if chat else REFUSED).items():
        if field in body and asks(body[field]):
            raise RefusedError(field, f"{field}={shown(body[field])} cannot be honoured on a context: {why}")
    context = contexts[body[CONTEXT_PARAM]]
    if served.fields is not None and (difference := fields_difference(context.header.model, served.fields)):
        raise RefusedError(CONTEXT_PARAM, f"context {context.id} is of another model: {difference}; add the document anew")
    try:
        rest = (chat_rest if chat else completion_rest)(context, body, tokenizer)
        prompt = context.prompt(rest)
    except RefusedError:
        raise
    except InputError as error:
        raise RefusedError("messages" if chat else "prompt", str(error)) from None
    check_length(context, len(rest), body, served)
    new = {name: value for name, value in body.items() if name != CONTEXT_PARAM}
    if not chat:
        return new | prompt.body
    params = {**prompt.kv_transfer_params, "prompt_token_ids": prompt.ids}
    return new | {"cache_salt": prompt.salt, "kv_transfer_params": params}


def check_model(body: Body, served: Served) -> None:
    """Raise RefusedError for a model that is not served, and for an adapter."""
    name = body.get("model")
    if name in served.adapters:
        raise RefusedError("model", f"model {shown(name)} is a LoRA adapter: documents are read without, ask the base model")
    if name and served.models and name not in served.models:
        names = ", ".join(sorted(served.models))
        raise RefusedError("model", f"model {shown(name)} does not exist: there is {names}", status=404)


def check_length(context: Context, rest: int, body: Body, served: Served) -> None:
    """Raise RefusedError for a request that passes the server's limit with what it is to generate."""
    field = next((one for one in ("max_completion_tokens", "max_tokens") if isinstance(body.get(one), int)), None)
    new = max(1, body[field]) if field else 1
    limit = served.max_model_len
    if limit is not None and context.kept + rest + new > limit:
        raise RefusedError(
            field or "messages",
            f"{context.kept} entries of context {context.id}, {rest} tokens after them and {new} new ones pass the server's "
            f"{limit} tokens: ask for fewer, or add the document with a smaller budget",
        )


def chat_rest(context: Context, body: Body, make: MakeTokenizer) -> list[int]:
    """Token ids that follow the document in a chat request."""
    messages = checked_messages(body.get("messages"))
    if not context.header.chat:
        raise RefusedError(
            CONTEXT_PARAM,
            f"context {context.id} was stored without the chat template: ask it at {COMPLETIONS_PATH}, or add it anew with "
            "--chat",
        )
    tokenizer = make(template_options(body))
    whole = apply_template(tokenizer, messages, f"ask at {COMPLETIONS_PATH}")
    if begins_with(whole, context.tokens):
        return context.rest(whole)
    first = next((at for at, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise RefusedError("messages", "there is no message of the user: give one with the question")
    leading, question, later = messages[:first], text_of(messages[first]), messages[first + 1 :]
    turns = [apply_template(tokenizer, [*leading, *user_message(probe)]) for probe in PROBES[:2]]
    head = shared_tokens(*turns)
    if leading and not begins_with(turns[0][:head], context.tokens[:head]):
        raise RefusedError(
            "messages",
            f"a {shown(leading[0]['role'])} message stands before the document, and context {context.id} was not stored with "
            "it: leave it out, or add the document with --system",
        )
    check_not_whole(context, whole, head)
    if not question.strip():
        raise RefusedError("messages", "the question is empty: give at least one word")
    ending = text_ending(tokenizer, context.tokens, chat=True)
    so_far = open_turn(tokenizer, ending, chat=True)
    ids = apply_template(tokenizer, [*user_message(f"{ending}{BEFORE_QUESTION}{question.strip()}"), *later])
    if not begins_with(ids, so_far):
        raise RefusedError(
            "messages",
            f"the question {question[:20]!r}... begins with characters that join the text, or the chat template changes what "
            "stands before it: begin with a word, and leave the template's options out",
        )
    return ids[len(so_far) :]


def completion_rest(context: Context, body: Body, make: MakeTokenizer) -> list[int]:
    """Token ids that follow the document in a completions request."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        if begins_with(prompt, context.tokens):
            return context.rest(prompt)
        check_not_whole(context, prompt, 0)
        return prompt
    if not isinstance(prompt, str):
        raise RefusedError("prompt", f"prompt {shown(prompt)}: on a context give one text, or the token ids of one prompt")
    tokenizer = make({})
    whole = tokenizer(prompt, add_special_tokens=body.get("add_special_tokens") is not False).input_ids
    if begins_with(whole, context.tokens):
        return context.rest(whole)
    check_not_whole(context, whole, 0)
    return context.question(tokenizer, prompt)


def begins_with(ids: Sequence[int], start: Sequence[int]) -> bool:
    """Whether token ids begin with others."""
    return len(ids) >= len(start) and shared_tokens(ids, start) == len(start)


def check_not_whole(context: Context, ids: Sequence[int], head: int) -> None:
    """Raise InputError for a prompt that was meant to be whole and is not one on this context.

    That is one that begins as the document does, ``head`` tokens of the template aside, and changes it, and one that holds the
    document after something else.
    """
    if shared_tokens(ids, context.tokens) - head >= LEAST_SHARED:
        context.rest(ids)  # says where they part
    size = min(LEAST_SHARED, context.seen // 8)
    passages = [context.tokens[at : at + size] for at in (context.seen * part // 4 for part in (1, 2, 3))]
    if size >= LEAST_PASSAGE and all(occurs(passage, ids) for passage in passages):
        raise InputError(
            f"the prompt holds the document of context {context.id}, but does not begin with its {context.seen} tokens as they "
            "were stored (with another first token, system message or template): put it first, unchanged, or send what "
            "follows it alone"
        )


def occurs(passage: Sequence[int], ids: Sequence[int]) -> bool:
    """Whether token ids occur in others, one after the other."""
    size = len(passage)
    return any(ids[at] == passage[0] and list(ids[at : at + size]) == list(passage) for at in range(len(ids) - size + 1))


def checked_messages(messages: Any) -> list[Body]:
    """A request's messages. Raises RefusedError for what are none, or not text alone."""
    if not isinstance(messages, list) or not messages:
        raise RefusedError("messages", f"messages {shown(messages)}: give a list with a message of the user")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RefusedError("messages", f"message {shown(message)} has no role: give role and content")
        text_of(message)
    return messages


def text_of(message: Body) -> str:
    """The text of a message, its parts on lines of their own as vLLM joins them. Raises RefusedError for images and sound."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message["role"] == "assistant":
        return ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RefusedError("messages", f"content {shown(part)}: requests on a context hold text alone, or send the text")
        texts.append(part["text"])
    return "\n".join(texts)


def template_options(body: Body) -> Body:
    """What a chat request says to its template, as ``POST /tokenize`` takes it."""
    options = {name: body[name] for name in ("chat_template", "chat_template_kwargs") if body.get(name) is not None}
    if (effort := body.get("reasoning_effort")) is not None:
        given = dict(options.get("chat_template_kwargs") or {})
        given.setdefault("enable_thinking", effort != "none")
        options["chat_template_kwargs"] = given | {"reasoning_effort": effort}
    return options


def error_body(error: WinnowError) -> Body:
    """The answer to a request that is refused, as OpenAI's and vLLM's errors are written."""
    status = getattr(error, "status", 400)
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    field = getattr(error, "field", CONTEXT_PARAM)
    return {"error": {"message": f"winnowkv: {error}", "type": kind, "param": field, "code": status}}
