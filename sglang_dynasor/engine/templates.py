"""The operator's templates in the front process: read, read again, and given to requests.

What a request is given is a plain field, so that no scheduler needs the file.
"""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace
from typing import Any

from sglang_dynasor.engine.flag import config_of, read_templates
from sglang_dynasor.engine.media import INPUTS
from sglang_dynasor.engine.owner import KEY
from sglang_dynasor.engine.validation import UNSUPPORTED_INPUTS, check_program, check_spec, has_field
from sglang_dynasor.errors import ConfigError, FieldError
from sglang_dynasor.policy.spec import parse_field
from sglang_dynasor.policy.templates import ENDPOINTS, PLAIN, Default, Template, Templates, changed_versions, line_of


class TemplateBook:
    """The templates as they are, those that were, and what became of requests that were given one unasked.

    Raises:
        ConfigError: the file cannot be read, or says what this server cannot serve.
    """

    def __init__(self, tokenizer_manager: Any):
        self.tokenizer_manager = tokenizer_manager
        self.config = config_of(tokenizer_manager.server_args)
        self.templates = Templates()
        self._known: dict[str, dict[str, Any]] = {}  # by NAME@VERSION: each that was ever there, with its times
        self._given: dict[Default, dict[str, Any]] = {}
        self.reload()

    def reload(self) -> None:
        """Read the file again; if that fails, all stays as it is.

        Raises:
            ConfigError: as at the start, or a version was changed.
        """
        check = partial(check_spec, tokenizer_manager=self.tokenizer_manager)
        new, text = read_templates(self.config, check)
        known = Templates()
        for entry in self._known.values():
            template: Template = entry["template"]
            known.by_name.setdefault(template.name, {})[template.version] = template
        if changed := changed_versions(known, new):
            template = changed[0]
            raise ConfigError(
                f"{self.config.dynasor_templates}:{line_of(text, template.id)}: {template.id} is not what it was, and records name it; give it "
                f"the version {max(new.by_name[template.name]) + 1}"
            )
        now, there = time.time(), {t.id: t for versions in new.by_name.values() for t in versions.values()}
        for name, entry in self._known.items():
            if name not in there:
                entry["removed_at"] = entry["removed_at"] or now
        for name, template in there.items():
            entry = self._known.setdefault(name, {"template": template, "loaded_at": now, "num_requests": 0})
            entry["removed_at"] = None
        self._given = {
            row: self._given.get(row, {"num_given": 0, "num_plain": 0, "last_plain": None}) for row in new.defaults
        }
        self.templates = new

    def listing(self) -> dict[str, Any]:
        """What is served at /dynasor/templates: each version that was ever there, and the defaults; JSON."""
        versions = [
            {
                "template": name,
                "is_newest": entry["template"] == self.templates.find(entry["template"].name),
                "settings": entry["template"].as_dict(),
                **{key: entry[key] for key in ("loaded_at", "removed_at", "num_requests")},
            }
            for name, entry in self._known.items()
        ]
        defaults = [
            {"endpoint": row.endpoint or None, "model": row.model or None, "template": row.template, **given}
            for row, given in self._given.items()
        ]
        return {"file": self.config.dynasor_templates or None, "templates": versions, "defaults": defaults}

    def take(self, asked: Any) -> tuple[Any, Template | None]:
        """The field that a client's stands for, and its template.

        Raises:
            FieldError: no such template, or what is sent beside its name does not go with it.
        """
        field, template = self.templates.resolve(asked)
        if template is not None and field != template.field | {"template": template.id}:
            try:
                parse_field(field, self.config.dynasor_max_branches, self.config.dynasor_level)
            except FieldError as error:
                raise FieldError(f"{error} (of template {template.id} with what was sent beside it)") from None
        return field, template

    def note(self, template: Template | None) -> None:
        """Count a request that was given a template."""
        if template is not None:
            self._known[template.id]["num_requests"] += 1

    def note_default(self, row: Default, why_plain: str) -> None:
        """Count a request that a default was for; `why_plain`: why it is served without."""
        if (given := self._given.get(row)) is None:  # read again meanwhile
            return
        given["num_plain" if why_plain else "num_given"] += 1
        given["last_plain"] = why_plain or given["last_plain"]


def book_of(tokenizer_manager: Any) -> TemplateBook:
    """The front process's templates, read when the server starts."""
    if not hasattr(tokenizer_manager, "_dynasor_templates"):
        tokenizer_manager._dynasor_templates = TemplateBook(tokenizer_manager)
    return tokenizer_manager._dynasor_templates


def with_field(params: dict[str, Any], field: Any) -> dict[str, Any]:
    """A prompt's sampling parameters with this field; with None, without."""
    custom = {key: value for key, value in (params.get("custom_params") or {}).items() if key not in ("dynasor", KEY)}
    if field is not None:
        custom["dynasor"] = field
    return params | {"custom_params": custom or None}


def why_plain(obj: Any, params: dict[str, Any], tokenizer_manager: Any) -> str:
    """Why a request that asked for no program cannot be the one of `params`; empty if it can."""
    if (num_choices := params.get("n") or 1) != 1:
        return f"n={num_choices}: its client waits for as many texts"
    try:
        check_program(obj, params, tokenizer_manager)
    except FieldError as error:
        return str(error)
    return ""


def give_templates(tokenizer_manager: Any, obj: Any, route: str, model: str) -> None:
    """Let the prompts of a request have the fields that they name, or that the operator wants for them.

    Chats whose messages are wrapped come from place.py with their fields; what they have is only looked up again.

    Raises:
        FieldError: no such template, or one that cannot be had here.
    """
    book = book_of(tokenizer_manager)
    row = book.templates.default_for(route, model)
    if not isinstance(obj.sampling_params, list):
        obj.sampling_params, obj.text = _give(book, row, obj, obj.sampling_params, obj.text, route)
        return
    num = len(obj.sampling_params)
    texts: list[Any] = obj.text if isinstance(obj.text, list) else [None] * num
    if len(texts) != num:
        return  # SGLang says so
    given = [
        _give(book, row, obj if row is None else _part(obj, i), params, text, route)
        for i, (params, text) in enumerate(zip(obj.sampling_params, texts, strict=True))
    ]
    obj.sampling_params = [params for params, _ in given]
    if isinstance(obj.text, list):
        obj.text = [text for _, text in given]


def _part(obj: Any, index: int) -> Any:
    """What of one prompt of several `check_program` looks at. SGLang keeps what it makes of one itself, so none is made here."""
    names = (*UNSUPPORTED_INPUTS, *INPUTS, "return_logprob")
    values = {name: getattr(obj, name, None) for name in names}
    return SimpleNamespace(**{k: v[index] if isinstance(v, list) and index < len(v) else v for k, v in values.items()})


def _give(book: TemplateBook, row: Default | None, obj: Any, params: Any, text: Any, route: str) -> tuple[Any, Any]:
    """One prompt's sampling parameters and text, with what it is given."""
    kind = ENDPOINTS.get(route, "text")
    if has_field(params):
        asked = params["custom_params"]["dynasor"]
        if asked == PLAIN:
            return with_field(params, None), text
        field, template = book.take(asked)
        if template is None:
            return params, text
        if kind != "chat":
            book.note(template)
            text = _wrap(template, kind, text)
        return with_field(params, field), text
    if row is None or row.template == PLAIN or kind == "chat" or not isinstance(params, dict):
        return params, text
    field, template = book.take(row.template)
    custom: Any = params.get("custom_params")
    given = with_field(params, field) if custom is None or isinstance(custom, dict) else None
    why = "custom_params is no object" if given is None else why_plain(obj, given, book.tokenizer_manager)
    wrapped = text
    if not why and template is not None:
        try:
            wrapped = _wrap(template, kind, text)
        except FieldError as error:
            why = str(error)
    book.note_default(row, why)
    if why:
        return params, text
    book.note(template)
    return given, wrapped


def _wrap(template: Template, kind: str, text: Any) -> Any:
    if key := template.unwrappable(kind):
        raise FieldError(
            f"template {template.id} has {key}, which cannot be put around this prompt; use another template"
        )
    if not template.has_wrapper:
        return text
    if not isinstance(text, str):
        raise FieldError(
            f"template {template.id} puts text around the prompt, and this one is no text but tokens; send text, or use another template"
        )
    return template.wrap(text)
