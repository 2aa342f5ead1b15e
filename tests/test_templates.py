"""An operator's templates: what the file may say, which request gets which, and what is put around its prompt."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import ROOT
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine.chat import convert, wrap_chat
from sglang_dynasor.engine.claims import claim
from sglang_dynasor.engine.flag import from_cli_args, read_templates
from sglang_dynasor.engine.place import check_place
from sglang_dynasor.engine.templates import TemplateBook, book_of
from sglang_dynasor.engine.validation import validate
from sglang_dynasor.errors import ConfigError, FieldError
from sglang_dynasor.frontend.plan import runs_on_server
from sglang_dynasor.policy.spec import FIELD_HELP, parse_field
from sglang_dynasor.policy.templates import ENDPOINTS, KEYS, WRAPPER_HELP, line_of, parse_templates

# It asks the model's tokenizer.
LONG = """algorithm = "long_cot"
effort = "low"
think_end = "</think>"
"""
FILE = f"""
# the operator's
["math-hard@1"]
branches = 32
stop = "careful"
answer = "boxed"

["math-hard@2"]
branches = 16
answer = "boxed"
tenant = "math"
after = \"\"\"
Put your answer in a box.
["math-hard@9"]
branches = 1000
\"\"\"

["quick@3"]
{LONG}
["polite@1"]
system = "Be brief."
before = "Question: "

[[default]]
endpoint = "/v1/responses"
template = "quick"

[[default]]
endpoint = "/v1/chat/completions"
model = "mathematician"
template = "polite@1"

[[default]]
model = "mathematician"
template = "math-hard"

[[default]]
endpoint = "/v1/completions"
template = "plain"
"""
READ = parse_templates(FILE, "t.toml", 64)


# The file


def test_what_a_file_says() -> None:
    """Each version as a client would send it; without one the newest."""
    newest = READ.find("math-hard")
    assert newest is not None
    assert (newest.id, newest.field) == ("math-hard@2", {"branches": 16, "answer": "boxed", "tenant": "math"})
    assert newest.wrap("1+1?").startswith("1+1?Put your answer in a box.")
    first = READ.find("math-hard@1")
    assert first is not None
    assert not first.has_wrapper
    for name in (
        "math-hard@3",
        "math-hard@",
        "math-hard@x",
        "math-hard@²",
        "math",
        "",
        "math-hard@1@1",
        f"math-hard@{'9' * 5000}",
    ):
        assert name == "math-hard@" or READ.find(name) is None


@pytest.mark.parametrize(
    ("endpoint", "model", "template"),
    [
        ("/v1/responses", "any", "quick"),
        ("/v1/chat/completions", "mathematician", "polite@1"),
        ("/generate", "mathematician", "math-hard"),
        ("/v1/completions", "mathematician", "math-hard"),  # the first row that fits
        ("/v1/completions", "any", "plain"),
        ("/v1/chat/completions", "any", None),
        ("/v1/chat/completions", "", None),
        ("/health_generate", "mathematician", None),
        ("", "mathematician", None),
    ],
)
def test_who_gets_a_default(endpoint: str, model: str, template: str | None) -> None:
    """By endpoint and model; nobody else, and never what is no endpoint of clients."""
    row = READ.default_for(endpoint, model)
    assert (row and row.template) == template
    everywhere = parse_templates(FILE, "t.toml", 64, default="self_consistency").default_for(endpoint, model)
    assert (everywhere and everywhere.template) == (template or ("self_consistency" if endpoint in ENDPOINTS else None))


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("[x\n", 1, "Expected ']'"),
        ('\n\n["a@1"]\nbranches == 3', 4, "Invalid value"),
        ('["a@1"]\nbranches = [3\n', 3, ""),
        ('# branches\n["a@1"]\nstop = "careful"\n\nbranches = 1000', 5, "branches=1000 is outside [1, 64]"),
        ('["a@1"]\nbefore = """\nbranches = 3\n"""\nbranches = 2.5', 5, "branches=2.5 is a float"),
        ('["a@1"]\nbranches = 3\n["a@2"]\nbranches = 4\n\n["b@1"]\nbranches = 0', 7, "branches=0"),
        ('"a@1".branches = 3\n"a@1".width = 4\n', 2, "width=4"),
        ('\n"a@1" = {stop = "careful", width = 99}\n', 2, "width=99"),
        ('["a@1"]\nwidht = 2', 2, "'widht' is not a key of a template; the keys are algorithm, branches,"),
        ('["a@1"]\nprogram = "p"', 2, "program is one request's own"),
        ('["a@1"]\nbudget = "p"', 2, "budget is one request's own"),
        ('["a@1"]\nafter = 3', 2, "after is no string"),
        ('["a@1"]\nvote = "reward"', 2, "without dynasor.judge"),
        ('["a@1"]\nalgorithm = "best_of_n"', 2, "without dynasor.judge"),
        ("\n[a]\nbranches = 3", 2, "'a' is no template; write a table [\"NAME@VERSION\"]"),
        ('["a@0"]', 1, "is no template"),
        ('["a@01"]', 1, "is no template"),
        ('["a b@1"]', 1, "is no template"),
        ('["a@1@2"]', 1, "is no template"),
        ('"a@1" = 3', 1, "is a value"),
        ('\n["long_cot@1"]', 2, "'long_cot' is a name of its own"),
        ('["plain@1"]', 1, "'plain' is a name of its own"),
        ("[default]\nx = 1", 1, "write rows [[default]]"),
        ('["a@1"]\n[[default]]\ntemplate = "a"\n[[default]]\ntemplate = "b"', 5, "template='b' is not known; use one of a, self_consistency"),
        ('["a@1"]\n[[default]]\nmodel = "m"\n', 2, "a default without a template"),
        ('["a@1"]\n[[default]]\nmodle = "m"\n', 3, "'modle' is not a key of a default"),
        ('["a@1"]\n[[default]]\nmodel = 3\n', 3, "model=3 is no string"),
        ('["a@1"]\n[[default]]\nendpoint = "/encode"\ntemplate = "a"', 3, "endpoint='/encode' has no defaults"),
        ('["a@1"]\nsystem = "s"\n[[default]]\nendpoint = "/generate"\ntemplate = "a"', 5, "has system, which cannot be put around the prompts of /generate"),
        ('["a@1"]\nafter = "s"\n[[default]]\nendpoint = "/v1/responses"\ntemplate = "a"', 5, "has after, which cannot be put"),
        ("a = " + "[" * 100_000, 1, "too deep"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_line(text: str, line: int, message: str) -> None:
    """The file's name, the line and what is allowed."""
    with pytest.raises(ConfigError) as told:
        parse_templates(text, "t.toml", 64)
    assert str(told.value).startswith(f"t.toml:{line}: ")
    assert message in str(told.value)
    assert len(str(told.value)) < 1500


def test_what_is_right_is_not() -> None:
    """An empty file, rows without an endpoint whose template some endpoints cannot have, every name that may be a default's."""
    assert parse_templates("", "t.toml", 64).defaults == ()
    for name in ("a", "a@1", "self_consistency", "plain"):
        text = f'["a@1"]\nsystem = "s"\n[[default]]\ntemplate = "{name}"'
        assert parse_templates(text, "t.toml", 64).defaults[0].template == name
        parse_templates('["a@1"]\n', "t.toml", 64, default=name)
    with pytest.raises(ConfigError, match="--dynasor-default='b' is not known; use one of a, self_consistency"):
        parse_templates('["a@1"]\n', "t.toml", 64, default="b")
    with pytest.raises(ConfigError, match=r"t.toml:2: a@1: dynasor.branches=8 is outside"):
        parse_templates('["a@1"]\nbranches = 8', "t.toml", 4)


def test_every_line_is_found() -> None:
    """Of each key of the file above, also where a text in quotes looks like it; what is not there is where its table is."""
    lines = FILE.split("\n")
    for start, path in (
        (3, ("math-hard@1",)),
        (4, ("math-hard@1", "branches")),
        (9, ("math-hard@2", "branches")),
        (12, ("math-hard@2", "after")),
    ):
        assert line_of(FILE, *path) == start
        assert str(path[-1]) in lines[start - 1]
    assert lines[line_of(FILE, "default", 1, "model") - 1] == 'model = "mathematician"'
    assert line_of(FILE, "math-hard@2", "width") == line_of(FILE, "math-hard@2") == 8
    assert line_of(FILE, "nothing") == 1


def test_an_operator_is_told_before_the_engine_starts(tmp_path: Path) -> None:
    """A file that is not there, or is no text."""
    (tmp_path / "t.toml").write_bytes(b"\xff\xfe")
    for name in ("none.toml", "t.toml", ""):
        config = DynasorConfig("dynasor", dynasor_templates=str(tmp_path / name))
        with pytest.raises(ConfigError, match=r"--dynasor-templates=.*cannot be read"):
            read_templates(config)
    assert read_templates(DynasorConfig("dynasor"))[0].by_name == {}
    with pytest.raises(ConfigError, match="--dynasor-default='no'"):
        read_templates(DynasorConfig("dynasor", dynasor_default="no"))


def test_a_wrong_file_stops_the_start(tmp_path: Path) -> None:
    """With one line, before SGLang reads anything."""
    file = tmp_path / "t.toml"
    file.write_text('["a@1"]\nstop = "later"\n')
    args = Namespace(scheduler="dynasor", dynasor_templates=str(file), device="cpu")
    with pytest.raises(SystemExit, match=r"error: .*t.toml:2: a@1: dynasor.stop='later'"):
        from_cli_args(lambda cls, args: SimpleNamespace(), SimpleNamespace, args)  # type: ignore[arg-type,return-value]


def test_the_docs_name_every_key_and_endpoint() -> None:
    """And their file is one."""
    text = (ROOT / "docs" / "operations.md").read_text()
    section = text.partition("## Templates\n")[2].partition("\n## ")[0]
    for key in (*WRAPPER_HELP, *ENDPOINTS):
        assert f"`{key}`" in section
    assert set(KEYS) == set(FIELD_HELP) - {"program", "budget", "budget_programs", "template"} | set(WRAPPER_HELP)
    assert parse_templates(section.partition("```toml\n")[2].partition("```")[0], "t.toml", 64).defaults


# What a client names


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ("math-hard@1", {"branches": 32, "stop": "careful", "answer": "boxed", "template": "math-hard@1"}),
        ("math-hard", {"branches": 16, "answer": "boxed", "tenant": "math", "template": "math-hard@2"}),
        ({"template": "math-hard@2"}, {"branches": 16, "answer": "boxed", "tenant": "math", "template": "math-hard@2"}),
        ({"branches": 8, "template": "math-hard"}, {"branches": 8, "answer": "boxed", "tenant": "math", "template": "math-hard@2"}),
        ("self_consistency", "self_consistency"),
        ({"algorithm": "self_consistency"}, {"algorithm": "self_consistency"}),
        (None, None), (3, 3), ({"template": 3}, {"template": 3}), ([], []),
    ],
)  # fmt: skip
def test_a_name_stands_for_settings(asked: Any, field: Any) -> None:
    """Under those that are sent beside it. Resolved again it is the same; what names none is left to the parser."""
    assert READ.resolve(asked)[0] == field
    assert READ.resolve(field)[0] == field


def test_a_name_that_is_not_known() -> None:
    """What there is, is told. Without templates a name is an algorithm's, misspelt."""
    with pytest.raises(
        FieldError, match=r"template='math' is not known; the templates are math-hard, quick, polite, algorithms self_c"
    ):
        READ.resolve("math")
    with pytest.raises(FieldError, match=r"template='math-hard@7' is not known"):
        READ.resolve({"template": "math-hard@7"})
    none = parse_templates("", "", 64)
    with pytest.raises(FieldError, match="this server has no templates"):
        none.resolve("math@1")
    assert none.resolve("self_consistancy") == ("self_consistancy", None)
    with pytest.raises(FieldError, match="send NAME or NAME@VERSION"):
        parse_field({"template": "x\n"}, 64)


def test_an_author_s_own_loop_has_no_templates() -> None:
    """Nobody there knows them; and all its settings are sent, which would win."""
    with pytest.raises(FieldError, match=r"dynasor.template='math-hard' outside a request"):
        runs_on_server({"template": "math-hard"}, has_reward=False)


# Requests


class Held:
    """What SGLang holds of a request."""


UNDER_WAY = Held()


@pytest.fixture
def manager(tmp_path: Path) -> Any:
    """As much of a tokenizer manager as is read."""
    file = tmp_path / "t.toml"
    file.write_text(FILE.replace(LONG, "branches = 2").replace('template = "quick"', 'template = "math-hard@1"'))
    config = DynasorConfig("dynasor", dynasor_templates=str(file))
    model_config = SimpleNamespace(vocab_size=8)
    return SimpleNamespace(
        server_args=SimpleNamespace(_dynasor=config),
        rid_to_state=SimpleNamespace(get=lambda rid: UNDER_WAY),
        preferred_sampling_params=None,
        tokenizer=None,
        model_config=model_config,
    )


def sent(route: str, **body: Any) -> Any:
    return SimpleNamespace(_json=body, scope={"route": SimpleNamespace(path=route)})


def taken(manager: Any, route: str = "/generate", *, model: str = "", **fields: Any) -> Any:
    """A request as it is after SGLang has taken it in."""
    obj = GenerateReqInput(**fields)
    obj.normalize_batch_and_arguments()
    check_place(manager, obj, sent(route, model=model) if route else None)
    return obj


def field_in(params: dict[str, Any]) -> Any:
    return (params.get("custom_params") or {}).get("dynasor")


def asking(field: Any, **params: Any) -> dict[str, Any]:
    return {"sampling_params": {"custom_params": {"dynasor": field, "mine": 1}, **params}}


def test_a_request_has_its_template_s_settings(manager: Any) -> None:
    """And its prompt what is put around it; the client's other parameters stay."""
    obj = taken(manager, text="1+1?", **asking("math-hard", temperature=0.7))
    assert field_in(obj.sampling_params)["template"] == "math-hard@2"
    assert obj.sampling_params["custom_params"]["mine"] == 1
    assert obj.sampling_params["temperature"] == 0.7
    assert obj.text.startswith("1+1?Put your answer")
    check_place(manager, obj, sent("/generate"))  # SGLang brings it no second time before it has been checked
    validate(None, manager, obj, [1])
    text = obj.text
    check_place(manager, obj)
    assert obj.text == text


@pytest.mark.parametrize("route", ["/generate", "/v1/completions", "/api/generate", ""])
def test_each_prompt_has_its_own(manager: Any, route: str) -> None:
    """One that names none stays as it is, and SGLang makes its parts of what they have become."""
    params = [asking("math-hard")["sampling_params"], {}, asking({"branches": 3})["sampling_params"]]
    obj = taken(manager, route, text=["a", "b", "c"], sampling_params=params)
    assert [field_in(p) and field_in(p)["branches"] for p in obj.sampling_params] == [16, None, 3]
    assert [text[0] for text in obj.text] == ["a", "b", "c"]
    assert [len(text) > 1 for text in obj.text] == [True, False, False]
    assert obj[0].text == obj.text[0]
    assert field_in(obj[0].sampling_params)["template"] == "math-hard@2"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_ids": [1, 2], **asking("math-hard")}, "puts text around the prompt, and this one is no text but tokens"),
        ({"text": "Q", **asking("polite")}, "polite@1 has system, which cannot be put around this prompt"),
        ({"text": "Q", **asking("nobody")}, "'nobody' is not known"),
        ({"text": "Q", **asking({"template": "math-hard", "width": 17})}, r"width=17 is outside.*of template math-hard@2 with what was sent beside it"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused(manager: Any, fields: dict[str, Any], message: str) -> None:
    """Who asks for it is told."""
    with pytest.raises(FieldError, match=message):
        taken(manager, **fields)


def test_tokens_may_have_a_template_without_a_wrapper(manager: Any) -> None:
    """Nothing is put around them."""
    obj = taken(manager, input_ids=[1, 2], **asking("math-hard@1"))
    assert field_in(obj.sampling_params)["branches"] == 32


MATH: dict[str, Any] = {"route": "/generate", "model": "mathematician"}


def test_a_request_without_a_field_has_a_default(manager: Any) -> None:
    """As if it had asked for it."""
    obj = taken(manager, text="1+1?", **MATH)
    assert field_in(obj.sampling_params)["template"] == "math-hard@2"
    assert "box" in obj.text
    validate(None, manager, obj, [1])
    both = taken(manager, text=["a", "b"], sampling_params=[{"n": 1}, {"temperature": 0}], **MATH)
    assert [bool(field_in(params)) for params in both.sampling_params] == [True, False]
    assert both.text[1] == "b"
    assert both[1].text == "b"
    given = book_of(manager).listing()["defaults"][2]
    assert (given["num_given"], given["num_plain"]) == (2, 1)
    assert "greedy" in given["last_plain"]
    assert (
        next(t for t in book_of(manager).listing()["templates"] if t["template"] == "math-hard@2")["num_requests"] == 2
    )


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"text": "Q", "sampling_params": {"temperature": 0}}, "greedy"),
        ({"text": "Q", "sampling_params": {"top_k": 1}}, "greedy"),
        ({"text": "Q", "sampling_params": {"max_new_tokens": 0}}, "no room"),
        ({"text": "Q", "sampling_params": {"n": 3}}, "n=3"),
        ({"text": "Q", "sampling_params": {"beam_width": 2}}, "beam_width"),
        ({"input_ids": [1, 2]}, "tokens"),
        ({"text": "Q", "session_params": {"id": "x"}}, "session_params"),
        ({"text": "Q", "image_data": "x"}, "image_data"),
        ({"text": "Q", "sampling_params": {"custom_params": [1]}}, "custom_params"),
    ],
)
def test_what_cannot_be_a_program_is_served_without(manager: Any, fields: dict[str, Any], why: str) -> None:
    """Its client asked for none; why is counted."""
    obj = taken(manager, **fields, **MATH)
    before = GenerateReqInput(**fields)
    before.normalize_batch_and_arguments()
    assert (obj.sampling_params, obj.text) == (before.sampling_params, before.text)
    assert why in book_of(manager).listing()["defaults"][2]["last_plain"]


@pytest.mark.parametrize(
    "where",
    [{"route": "/health_generate", "model": "mathematician"}, {"route": "", "model": "mathematician"}, {"route": "/generate", "model": "other"},
     {"route": "/v1/completions", "model": "other"}],
)  # fmt: skip
def test_nobody_else_has_one(manager: Any, where: Any) -> None:
    """Health checks, code beside the server, other models, endpoints that the operator left out."""
    obj = taken(manager, text="Q", **where)
    assert field_in(obj.sampling_params) is None


def test_a_client_may_want_no_program(manager: Any) -> None:
    """`plain` in place of a template; other parameters of its own stay."""
    obj = taken(manager, text="Q", **asking("plain"), **MATH)
    assert obj.sampling_params["custom_params"] == {"mine": 1}
    obj = taken(manager, text="Q", sampling_params={"custom_params": {"dynasor": "plain"}}, **MATH)
    assert obj.sampling_params["custom_params"] is None


# Chats


def chat(*messages: tuple[str, Any], **more: Any) -> Any:
    return ChatCompletionRequest(
        model="mathematician", messages=[{"role": role, "content": content} for role, content in messages], **more
    )


def contents(request: Any) -> list[tuple[str, Any]]:
    return [
        (m.role, m.content if isinstance(m.content, str) else [part.text for part in m.content])
        for m in request.messages
    ]


def test_a_chat_is_wrapped_around_its_last_user_message() -> None:
    """The system message goes before its own, or first; in parts the first and last text are added to. The client's stays as it was."""
    polite, math = READ.find("polite"), READ.find("math-hard")
    assert polite is not None
    assert math is not None
    asked = chat(("user", "a"), ("assistant", "b"), ("user", "c"))
    assert contents(wrap_chat(asked, polite)) == [
        ("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "Question: c"),
    ]  # fmt: skip
    assert contents(asked) == [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert contents(wrap_chat(chat(("system", "Be kind."), ("user", "a")), polite))[0] == (
        "system",
        "Be brief.\n\nBe kind.",
    )
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    assert contents(wrap_chat(chat(("user", parts)), polite))[1] == ("user", ["Question: x", "y"])
    (_, wrapped) = contents(wrap_chat(chat(("user", parts)), math))[0]
    assert wrapped[0] == "x"
    assert wrapped[1].startswith("yPut your answer")
    with pytest.raises(FieldError, match="this chat has none"):
        wrap_chat(chat(("assistant", "b")), polite)
    with pytest.raises(FieldError, match="input_ids are tokens"):
        wrap_chat(chat(("user", "b"), input_ids=[1]), polite)


def converted(manager: Any, request: Any, route: str = "/v1/chat/completions") -> tuple[Any, list[Any]]:
    """What becomes of a chat, and the chats that SGLang rendered for it."""
    rendered: list[Any] = []

    def original(serving: Any, request: Any, raw_request: Any) -> Any:
        rendered.append(request)
        params = {"custom_params": request.custom_params, "temperature": request.temperature, "n": request.n}
        return GenerateReqInput(
            input_ids=[1, 2], sampling_params=params, return_logprob=bool(request.logprobs)
        ), request

    adapted, _ = convert(original, SimpleNamespace(tokenizer_manager=manager), request, sent(route))
    return adapted, rendered


def test_a_chat_that_names_a_template(manager: Any) -> None:
    """It is rendered once, with it; taken in, it has the same field and no more around it."""
    adapted, (rendered,) = converted(manager, chat(("user", "a"), custom_params={"dynasor": "polite"}))
    assert contents(rendered) == [("system", "Be brief."), ("user", "Question: a")]
    assert field_in(adapted.sampling_params) == {"template": "polite@1"}
    adapted.normalize_batch_and_arguments()
    check_place(manager, adapted, sent("/v1/chat/completions"))
    assert field_in(adapted.sampling_params) == {"template": "polite@1"}
    for asked in (
        None,
        {"mine": 1},
        {"dynasor": "self_consistency"},
        {"dynasor": {"branches": 3}},
        {"dynasor": "plain"},
    ):
        request = chat(("user", "a"), custom_params=asked)
        request.model = "other"
        adapted, rendered_plain = converted(manager, request)
        assert rendered_plain == [request]
        assert adapted.sampling_params["custom_params"] == asked


def test_a_chat_with_a_default(manager: Any) -> None:
    """One that cannot be a program is rendered again as it came; Responses have settings only."""
    adapted, (rendered,) = converted(manager, chat(("user", "a"), temperature=0.7))
    assert contents(rendered)[-1] == ("user", "Question: a")
    assert field_in(adapted.sampling_params)["template"] == "polite@1"
    for more in ({"temperature": 0}, {"n": 2, "temperature": 1}):
        request = chat(("user", "a"), **more)
        adapted, rendered_twice = converted(manager, request)
        assert [len(r.messages) for r in rendered_twice] == [2, 1]
        assert field_in(adapted.sampling_params) is None
    _, once = converted(manager, chat(("assistant", "a"), temperature=1))
    assert len(once) == 1
    row = book_of(manager).listing()["defaults"][1]
    assert (row["num_given"], row["num_plain"]) == (1, 3)
    adapted, _ = converted(manager, chat(("user", "a"), temperature=1), "/v1/messages")
    assert field_in(adapted.sampling_params)["template"] == "math-hard@2"
    response = taken(manager, "/v1/responses", input_ids=[1, 2])
    assert field_in(response.sampling_params)["template"] == "math-hard@1"


# Read again


def test_a_file_is_read_again(manager: Any) -> None:
    """New versions and rows hold from then on, and what was is listed; what is wrong, or changed under its name, leaves all as it was."""
    book: TemplateBook = book_of(manager)
    file = Path(book.config.dynasor_templates)
    text = file.read_text()
    book.reload()  # unchanged
    assert [t["removed_at"] for t in book.listing()["templates"]] == [None] * 4
    for wrong, message in (
        (
            text.replace("branches = 32", "branches = 33"),
            r"t.toml:3: math-hard@1 is not what it was.*give it the version 3",
        ),
        (text + '\n["new@1"]\nbranches = 1000\n', rf"t.toml:{text.count(chr(10)) + 3}: new@1: dynasor.branches=1000"),
        ("[", "t.toml:1: "),
    ):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match=message):
            book.reload()
        assert book.templates.find("new") is None
        assert book.templates.find("math-hard@1").field["branches"] == 32
    file.write_text('["math-hard@3"]\nbranches = 4\n')
    book.reload()
    assert book.templates.find("math-hard").id == "math-hard@3"
    assert book.templates.find("math-hard@2") is None
    listed = {t["template"]: t for t in book.listing()["templates"]}
    assert [name for name, t in listed.items() if t["is_newest"]] == ["math-hard@3"]
    assert listed["math-hard@2"]["removed_at"] >= listed["math-hard@2"]["loaded_at"]
    assert book.listing()["defaults"] == []
    file.write_text('["math-hard@2"]\nbranches = 4\n')  # it was something else once
    with pytest.raises(ConfigError, match="math-hard@2 is not what it was"):
        book.reload()
    file.write_text(text)
    book.reload()
    assert {t["template"]: t["removed_at"] for t in book.listing()["templates"]}["math-hard@2"] is None
    file.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        book.reload()


def test_what_this_server_cannot_serve_is_wrong_in_its_file(manager: Any) -> None:
    """Told at the start with its line, not to each client; a default of it would never hold."""
    file = Path(manager.server_args._dynasor.dynasor_templates)
    file.write_text('["a@1"]\nanswer = "hash"\njudge = "model"\nvote = "reward"\n')
    with pytest.raises(ConfigError, match=r"t.toml:3: a@1: dynasor.judge='model' without a reward model"):
        book_of(manager)


# Claims


def test_a_request_that_is_refused_claims_nothing(manager: Any) -> None:
    """Neither its program nor its budget is anybody's before SGLang has accepted it, too."""
    for own in ({"program": "p", "branches": 2}, {"budget_tokens": 100, "budget": "b", "budget_programs": 2}):
        refused, accepted = (
            taken(manager, text="Q", **asking({**own, "tenant": tenant})) for tenant in ("thief", "owner")
        )
        validate(None, manager, refused, [1])  # SGLang then refuses its temperature
        validate(None, manager, accepted, [1])
        claim(None, manager, accepted, "Q", [1])
        with pytest.raises(FieldError, match="is another tenant's"):
            claim(None, manager, refused, "Q", [1])
        claim(None, manager, taken(manager, text="Q", **asking({**own, "tenant": "owner"})), "Q", [1])
    plain = taken(manager, text="Q", rid="p")
    claim(None, manager, plain, "Q", [1])  # a plain request has no record


def test_a_batch_that_is_another_s_claims_no_budget(manager: Any) -> None:
    """The ids are looked at together before any is taken."""
    first = taken(manager, text="Q", rid="mine", **asking({"tenant": "me"}))
    claim(None, manager, first, "Q", [1])
    field = {"budget_tokens": 100, "budget": "b", "budget_programs": 2, "tenant": "other"}
    with pytest.raises(FieldError, match="rid='mine' is another tenant's"):
        claim(None, manager, taken(manager, text="Q", rid="mine", **asking(field)), "Q", [1])
    claim(None, manager, taken(manager, text="Q", **asking({**field, "tenant": "me"})), "Q", [1])
