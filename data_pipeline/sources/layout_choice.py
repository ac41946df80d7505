"""The choice of a layout: found from the columns of a source where only one fits, or set by the user.

| layout | columns | document |
|---|---|---|
| question-answer | question, answer | one turn |
| instruction | instruction, input (optional), output | one turn; the input follows the instruction after a blank line |
| prompt-response | prompt, response or completion | one turn |
| chat | messages or conversations | one turn for each user message and the assistant's answer |
| text | text | the text alone |

`--columns` renames the columns of a layout, and templates make a layout of any columns.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from data_pipeline.errors import DataError
from data_pipeline.sources.layouts import SOURCE, ChatLayout, Layout, Template, TemplateLayout

TASK_NAME = re.compile(r"summarization|translation:[^-:.{}]+-[^-:.{}]+")


@dataclass(frozen=True)
class Form:
    """A known layout.

    roles: the names that its columns usually have, by role; the first one found is taken.
    prompt, answer: texts with roles in braces. A prompt of None makes plain texts.
    optional: roles that may be missing.
    """

    roles: dict[str, tuple[str, ...]]
    prompt: str | None
    answer: str
    optional: tuple[str, ...] = ()

    def columns(self, found: Collection[str], named: dict[str, str]) -> dict[str, str]:
        """Return the column of each role that has one. named: columns that the user has named, by role."""
        candidates = {role: (named[role],) if role in named else usual for role, usual in self.roles.items()}
        present = {role: [column for column in names if column in found] for role, names in candidates.items()}
        return {role: columns[0] for role, columns in present.items() if columns}

    def missing(self, columns: dict[str, str]) -> list[str]:
        """List the roles without which the layout does not fit."""
        return [role for role in self.roles if role not in columns and role not in self.optional]

    def layout(self, name: str, columns: dict[str, str], source: str) -> Layout:
        """Return the layout for these columns, which cover all that is required."""
        if name == "chat":
            return ChatLayout(columns["messages"], source=source)
        columns = {role: columns.get(role, role) for role in self.roles}
        prompt = None if self.prompt is None else Template(_with_columns(self.prompt, columns))
        answer = Template(_with_columns(self.answer, columns))
        return TemplateLayout(name, prompt, answer, source, tuple(columns[role] for role in self.optional))


def _with_columns(text: str, columns: dict[str, str]) -> str:
    """Replace each role in braces by its column."""
    names = "|".join(columns)
    return re.sub(rf"{{({names})(?=[.}}])", lambda found: "{" + columns[found[1]], text)


LAYOUTS: dict[str, Form] = {
    "question-answer": Form({"question": ("question",), "answer": ("answer",)}, "{question}", "{answer}"),
    "instruction": Form(
        {"instruction": ("instruction",), "input": ("input",), "output": ("output",)},
        "{instruction}\n\n{input}",
        "{output}",
        optional=("input",),
    ),
    "prompt-response": Form({"prompt": ("prompt",), "response": ("response", "completion")}, "{prompt}", "{response}"),
    "chat": Form({"messages": ("messages", "conversations")}, None, ""),
    "text": Form({"text": ("text",)}, None, "{text}"),
}
# Only `--task` chooses these, because they add words to the prompt.
SUMMARIZATION = Form(
    {"document": ("document",), "summary": ("summary",)}, "Summarize this text:\n\n{document}", "{summary}"
)
TASKS = "summarization or translation:FROM-TO"


def _translation(languages: str) -> Form:
    first, _, second = languages.partition("-")
    prompt = f"Translate this text from {first} to {second}:\n\n{{translation.{first}}}"
    return Form({"translation": ("translation",)}, prompt, f"{{translation.{second}}}")


@dataclass(frozen=True)
class LayoutChoice:
    """What a user says about the layout. Everything that is left out follows from the columns.

    layout: a name in LAYOUTS, or `auto`.
    columns: pairs of a role in the layout, or `source`, and the column that has it.
    prompt_template, answer_template: texts with columns in braces, instead of a layout. Without a prompt, the answers are
    plain texts.
    task: `summarization`, or `translation:FROM-TO` with the keys of the two languages.
    Raises DataError for unknown names and for choices that exclude each other.
    """

    layout: str = "auto"
    columns: tuple[tuple[str, str], ...] = ()
    prompt_template: str | None = None
    answer_template: str | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        if self.layout not in ("auto", *LAYOUTS):
            raise DataError(f"the layout is {self.layout!r}: give auto or one of {', '.join(LAYOUTS)}")
        if self.prompt_template is not None and self.answer_template is None:
            raise DataError("there is a prompt template but no answer template: give both, or only the answer template")
        if sum((self.layout != "auto", self.answer_template is not None, self.task is not None)) > 1:
            raise DataError("a layout, templates and a task exclude each other: give one of them")
        if self.task is not None and not TASK_NAME.fullmatch(self.task):
            raise DataError(f"the task is {self.task!r}: give {TASKS}, such as translation:en-de")
        roles = {SOURCE}.union(*(form.roles for form in self._forms().values()))
        if unknown := [role for role, _ in self.columns if role not in roles]:
            raise DataError(f"no layout has the column {unknown[0]!r}: give a name to {', '.join(sorted(roles))}")

    def resolve(self, found: Collection[str], where: str) -> Layout:
        """Return the layout for a source with these columns. where: names the source in errors.

        Raises DataError if columns are missing, or if more than one layout fits.
        """
        named = dict(self.columns)
        source = named.pop(SOURCE, SOURCE)
        if source != SOURCE and source not in found:
            raise DataError(f"{where} has no column {source}: it has {_listed(found)}")
        if self.answer_template is not None:
            prompt = None if self.prompt_template is None else Template(self.prompt_template)
            return TemplateLayout("template", prompt, Template(self.answer_template), source)
        forms = {name: form for name, form in self._forms().items() if set(named) <= set(form.roles)}
        columns = {name: form.columns(found, named) for name, form in forms.items()}
        fitting = [name for name, form in forms.items() if not form.missing(columns[name])]
        if len(fitting) > 1:
            raise DataError(f"{where} fits the layouts {' and '.join(fitting)}: choose one with --layout")
        if not fitting:
            raise DataError(self._nothing_fits(forms, columns, found, where))
        return forms[fitting[0]].layout(fitting[0], columns[fitting[0]], source)

    def _forms(self) -> dict[str, Form]:
        """Return the layouts that this choice leaves."""
        if self.answer_template is not None:
            return {}
        if self.task is not None:
            name, _, languages = self.task.partition(":")
            return {name: _translation(languages) if languages else SUMMARIZATION}
        return dict(LAYOUTS) if self.layout == "auto" else {self.layout: LAYOUTS[self.layout]}

    def _nothing_fits(self, forms: dict[str, Form], columns: dict, found: Collection[str], where: str) -> str:
        if len(forms) == 1:
            ((name, form),) = forms.items()
            named = dict(self.columns)
            missing = [named.get(role, role) for role in form.missing(columns[name])]
            return (
                f"{where} has no column {' and no column '.join(missing)}: it has {_listed(found)}; say which column holds "
                f"what with --columns {','.join(f'{role}=COLUMN' for role in form.missing(columns[name]))}"
            )
        return (
            f"{where} has the columns {_listed(found)}, which fit no layout: say which column holds what with --columns "
            "question=COLUMN,answer=COLUMN, or with templates"
        )


def _listed(names: Collection[str]) -> str:
    return ", ".join(names) or "none"
