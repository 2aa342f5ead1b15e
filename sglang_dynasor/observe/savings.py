"""What a program saved against using its whole cap. One rule, for everybody who tells it: counters, metrics, the live page, reports."""

from __future__ import annotations

from typing import Any

SAVING = ("certain", "price")  # a program that was cut for another reason has saved nothing


def saved_branches(record: dict[str, Any]) -> int:
    """Branches that the cap allowed and that were not needed; 0 where the program ended for want of time, tokens or patience."""
    return record["cap"] - record["num_branches"] if record["stop_reason"] in SAVING else 0


def saved_tokens(record: dict[str, Any]) -> int:
    """Tokens saved against using the whole cap, 0 or more: an estimate by the mean of all its branches, so rather too little.

    0 where the program ended for want of time or tokens.
    """
    lengths = record.get("branch_tokens")
    if not lengths or record["stop_reason"] not in SAVING:
        return 0
    return max(0, round(record["cap"] * sum(lengths) / len(lengths)) - record["num_tokens"])
