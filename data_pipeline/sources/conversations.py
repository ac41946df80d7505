"""Conversations as turns: each message of the user, and the assistant's answer to it."""

from __future__ import annotations

from data_pipeline.errors import DataError
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


def turns_of(messages: object, where: str) -> tuple[list[str], list[str]]:
    """Return the prompts and the answers of a conversation, `[turns]` each.

    messages: objects with role and content, or from and value. The roles alternate between user and assistant, and end with
    the assistant. A system message may come first; its text is put before the first prompt, after which comes a blank line.
    where: names the conversation in errors.
    Raises DataError for anything else.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where} has no list of messages: give one, or leave the row out")
    said = [_role_and_text(message, f"{where}, message {number},") for number, message in enumerate(messages, 1)]
    system = f"{said.pop(0)[1]}\n\n" if said[0][0] == "system" else ""
    prompts, answers = said[::2], said[1::2]
    if not answers or len(prompts) != len(answers):
        last = said[-1][0] if said else "system"
        raise DataError(
            f"{where} ends with a message of the {last}: end every conversation with the assistant's answer"
        )
    if any(role != "user" for role, _ in prompts) or any(role != "assistant" for role, _ in answers):
        order = ", ".join(role for role, _ in said)
        raise DataError(f"{where} has messages of {order}: let user and assistant alternate, beginning with the user")
    prompts[0] = ("user", system + prompts[0][1])
    return [text for _, text in prompts], [text for _, text in answers]


def _role_and_text(message: object, where: str) -> tuple[str, str]:
    if isinstance(message, dict):
        for role, content in FORMS:
            if role in message and content in message:
                name = message[role]
                if name not in ROLES:
                    raise DataError(f"{where} has the role {name!r}: the roles are {', '.join(ROLES)}")
                return ROLES[name], _content(message[content], where)
    raise DataError(f"{where} is not an object with role and content, or with from and value: correct it")


def _content(content: object, where: str) -> str:
    """Return a message's text: a value, or a list of parts of the type text."""
    if not isinstance(content, list):
        return text_of(content, f"{where} content")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"{where} has a part that is not text: only parts of the type text can be read")
        texts.append(text_of(part["text"], f"{where} content"))
    return "".join(texts)
