"""Who sent a request: a short hash of its credential, or of what the operator's gateway says in a header. Empty: nobody said.

The front process reads it and sends it along beside the field, where no client can put it. The credential itself goes nowhere.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from hashlib import sha256
from typing import Any

from sglang_dynasor.engine.flag import config_of
from sglang_dynasor.policy.spec import ProgramSpec

KEY = "dynasor_owner"  # beside the field, in custom_params
MOST_CHARS = 16


def owner_of(server_args: Any, request: Any) -> str:
    """Whose a request is; empty where it says nothing of that, and where there is no request, as from `sgl.Engine`.

    Args:
        request: as FastAPI has it.
    """
    headers: Any = getattr(request, "headers", None)
    if headers is None:
        return ""
    name = config_of(server_args).dynasor_owner_header
    # Of a header that is there twice both count: a client that adds one to the gateway's becomes somebody else, not somebody it names.
    # Headers of SGLang's gRPC server are told one by one.
    listed: Any = getattr(headers, "getlist", lambda name: [headers.get(name) or ""])
    said = listed(name) if name else [_credential(headers)]
    return sha256("\0".join(said).encode()).hexdigest()[:MOST_CHARS] if any(said) else ""


def is_operator(server_args: Any, request: Any) -> bool:
    """Whether a request may read everybody's: it comes with the admin key, or without any to a server that has no keys and no gateway
    that says who sends it. SGLang lets that one list everything anyway."""
    key, said = server_args.admin_api_key, _credential(request.headers)
    if key:
        return secrets.compare_digest(said.encode(), key.encode())
    return not said and not server_args.api_key and not config_of(server_args).dynasor_owner_header


def _credential(headers: Any) -> str:
    """What a request authenticates itself by: as SGLang reads it, or as Anthropic's clients send it."""
    said = headers.get("authorization", "")
    scheme, _, token = said.partition(" ")
    return (token if scheme.lower() == "bearer" else said) or headers.get("x-api-key", "")


def with_owner(custom: dict[str, Any], owner: str) -> dict[str, Any]:
    """`custom_params` with this owner, in place of whatever stood there."""
    if not owner and KEY not in custom:
        return custom
    return {key: value for key, value in custom.items() if key != KEY} | ({KEY: owner} if owner else {})


def owner_in(custom: Any) -> str:
    """The owner that the front process has put into `custom_params`."""
    owner: Any = custom.get(KEY, "") if isinstance(custom, dict) else ""
    return owner if isinstance(owner, str) else ""


def owned(spec: ProgramSpec, custom: Any) -> ProgramSpec:
    """The program that a field asks for, as its owner's."""
    owner = owner_in(custom)
    return replace(spec, owner=owner) if owner else spec
