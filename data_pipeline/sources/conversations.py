"""Conversations as turns: each message of the user, and the assistant's answer to it."""

from __future__ import annotations

from data_pipeline.sources.bad_rows import BadRowError
from data_pipeline.sources.values import text_of

# The names of roles in the two widespread forms, {"role", "content"} and {"from", "value"}.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
FORMS = (("role", "content"), ("from", "value"))


def turns_of(messages: object, name: str) -> tuple[list[str], list[str]]:
    """Return the prompts and the answers of a conversation, `[turns]` each.

    messages: objects with role and content, or from and value. The roles alternate between user and assistant, and end with
    the assistant. A system message may come first; its text is put before the first prompt, followed by a blank line.
    name: of the column, for errors. Raises BadRowError for anything else.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRowError(f"{name} is no list of messages", f"{name} is not a list of messages, or an empty one")
    said = [_role_and_text(message, f"{name}, message {number},") for number, message in enumerate(messages, 1)]
    system = f"{said.pop(0)[1]}\n\n" if said[0][0] == "system" else ""
    order = [role for role, _ in said]
    if not said or order[-1] != "assistant":
        last = order[-1] if said else "system"
        raise BadRowError(
            "the last message is not the assistant's", f"{name} ends with a message of the {last}, which has no answer"
        )
    if order != ["user", "assistant"] * (len(said) // 2):
        raise BadRowError(
            "user and assistant do not alternate",
            f"{name} has messages of {', '.join(order)}, but user and assistant have to alternate, the user first",
        )
    said[0] = ("user", system + said[0][1])
    return [text for _, text in said[::2]], [text for _, text in said[1::2]]


def _role_and_text(message: object, name: str) -> tuple[str, str]:
    if isinstance(message, dict):
        for role, content in FORMS:
            if role in message and content in message:
                if message[role] not in ROLES:
                    raise BadRowError(
                        f"the role {message[role]!r}",
                        f"{name} has the role {message[role]!r}; known are {', '.join(ROLES)}",
                    )
                return ROLES[message[role]], _content(message[content], name)
    raise BadRowError(
        "a message without role and content", f"{name} is not an object with role and content, or with from and value"
    )


def _content(content: object, name: str) -> str:
    """Return a message's text: a value, or a list of parts of the type text."""
    if not isinstance(content, list):
        return text_of(content, f"{name} content")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRowError("a part that is not text", f"{name} has a part that is not of the type text")
        texts.append(text_of(part["text"], f"{name} content"))
    return "".join(texts)
