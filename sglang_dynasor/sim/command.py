"""`sglang-dynasor simulate`: ways of solving questions, side by side on a modelled engine."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.errors import ConfigError
from sglang_dynasor.sim.arrivals import poisson, recorded
from sglang_dynasor.sim.costs import CURVES, read_costs
from sglang_dynasor.sim.curves import check_picture, draw_curves
from sglang_dynasor.sim.peers import PEERS
from sglang_dynasor.sim.request import Size
from sglang_dynasor.sim.run import PROGRAM, Load, parse_way, simulate
from sglang_dynasor.sim.samples import Question, read_samples
from sglang_dynasor.sim.table import counters, figures, write_rows

SIZE = Size()  # where the command line does not say
AT_ONCE = (1, 16)
WAYS = ("single", "stock", "doubling", "beta", "adaptive", "windows", PROGRAM)


def add_simulate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sglang-dynasor simulate`."""
    ways = "; ".join(f"{name}: {peer.about}" for name, peer in PEERS.items()).replace("%", "%%")
    parser.add_argument("--samples", type=Path, required=True, metavar="FILE", help="recorded samples, JSONL (docs/simulator.md)")  # fmt: skip
    parser.add_argument("--dataset", metavar="TEXT", help="only questions whose dataset or model contains this")
    parser.add_argument(
        "--ways", nargs="+", default=list(WAYS), metavar="WAY",
        help=f"{ways}; or '{PROGRAM} KEY=VALUE ...' with keys of the field, as in '{PROGRAM} stop=predictive:0.05 width=3'",
    )  # fmt: skip
    parser.add_argument("--cap", type=int, default=16, help="most branches or samples of a question (default 16)")
    parser.add_argument(
        "--num-questions", type=int, help="of one repeat, drawn in turn (default: each of the file once)"
    )
    parser.add_argument("--repeats", type=int, default=1, help="each with samples in another order (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--at-once", type=int, nargs="+", metavar="N", help="questions under way at once (default 1 16)")
    load.add_argument("--rates", type=float, nargs="+", metavar="RATE", help="questions per second, as they come")
    parser.add_argument("--arrivals", type=Path, metavar="CSV", help="with --rates: a recorded stream with a column t_s, in place of Poisson")  # fmt: skip
    parser.add_argument("--costs", default="cpu", metavar="CURVE", help=f"{', '.join(CURVES)}, or a JSON file that bench_simulator.py wrote (default cpu)")  # fmt: skip
    parser.add_argument("--rows", type=int, default=SIZE.rows, help=f"requests that run at once (default {SIZE.rows})")
    parser.add_argument("--pool-tokens", type=int, default=1_000_000, help="KV tokens (default 1000000)")
    parser.add_argument("--pass-tokens", type=int, default=SIZE.pass_tokens, help=f"most of one prefill pass (default {SIZE.pass_tokens})")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=SIZE.max_new_tokens, help=f"that each request allows (default {SIZE.max_new_tokens})")  # fmt: skip
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of questions that do not say (default 256)")
    parser.add_argument("--patience-tokens", type=int, default=-1, help="as --dynasor-patience-tokens")
    parser.add_argument("--width", type=int, default=0, help="as --dynasor-width")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="also write the table as CSV, with the engine's counters"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw latency against load")


def simulate_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per load and way, as each is done.

    Raises:
        ConfigError: an option or a file is wrong; the message names it.
    """
    for name in ("cap", "repeats", "prompt_tokens", "num_questions", *(["at_once"] if args.at_once else [])):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')}={value} is below 1; choose 1 or more")
    for rate in args.rates or ():
        if not 0 < rate < 1e6:
            raise ConfigError(f"--rates {rate:g} is outside (0, 1000000); choose questions per second inside")
    if args.arrivals is not None and not args.rates:
        raise ConfigError(f"--arrivals={args.arrivals} without --rates; say how many questions come per second")
    config = DynasorConfig(
        dynasor_max_branches=256, dynasor_patience_tokens=args.patience_tokens, dynasor_width=args.width
    )
    costs = read_costs(args.costs)
    size = Size(args.rows, args.pool_tokens, args.pass_tokens, args.max_new_tokens)
    ways = [parse_way(text, args.cap, config) for text in args.ways]
    questions = read_samples(args.samples, args.dataset, args.prompt_tokens)
    longest = max(sample.num_tokens for question in questions for sample in question.samples)
    if longest > size.max_new_tokens:
        raise ConfigError(
            f"--max-new-tokens={size.max_new_tokens} is below the longest sample, {longest}; allow as many"
        )
    for load_name, loads in _loads(args, args.num_questions or len(questions)).items():
        for way in ways:
            runs = [
                simulate(way, _drawn(args, questions, repeat), load, size, costs, config)
                for repeat, load in enumerate(loads)
            ]
            about = {"load": load_name, "way": way.name, **figures(runs)}
            yield about | {
                **counters(runs),
                "questions": len(runs[0].solved),
                "repeats": len(runs),
                "seed": args.seed,
                "cap": args.cap,
                "samples": args.samples.name,
                "dataset": args.dataset or "",
                "rows": args.rows,
                "costs": costs.source,
            }


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """The part of a row that a table on a screen has room for."""
    last = list(row).index("tokens/s") + 1
    return dict(list(row.items())[:last])


def run_simulate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows; also the CSV and the picture where they are asked for."""
    if args.plot is not None:
        check_picture(args.plot)
    rows = list(simulate_rows(args))
    if args.plot is not None:
        about = "questions per second" if args.rates else "questions at once"
        draw_curves(rows, args.rates or args.at_once or AT_ONCE, about, args.plot)
    if args.csv is not None:
        try:
            write_rows(args.csv, rows)
        except OSError as error:
            raise ConfigError(f"--csv={args.csv} cannot be written: {error}") from None
    return rows


def _loads(args: argparse.Namespace, num_questions: int) -> dict[str, list[Load]]:
    """By name, a load for each repeat."""
    seeds = [args.seed + repeat for repeat in range(args.repeats)]
    if not args.rates:
        return {f"{num} at once": [Load(num_at_once=num) for _ in seeds] for num in args.at_once or AT_ONCE}
    loads: dict[str, list[Load]] = {}
    for rate in args.rates:
        times = (
            poisson(rate, num_questions, seed)
            if args.arrivals is None
            else recorded(rate, num_questions, seed, args.arrivals)
            for seed in seeds
        )
        loads[f"{rate:g}/s"] = [Load(times_s=tuple(at_s)) for at_s in times]
    return loads


def _drawn(args: argparse.Namespace, questions: list[Question], repeat: int) -> list[Question]:
    """The questions of a repeat, the same for every way and load: in an order of its own, each with samples in one of its own.

    Where there are to be more than the file has, they come again as other questions: with another prompt.
    """
    seed, num = args.seed + repeat, args.num_questions or len(questions)
    order = random.Random(f"order:{seed}").sample(range(len(questions)), len(questions))
    drawn: list[Question] = []
    for index in range(num):
        turn, place = divmod(index, len(questions))
        question = questions[order[place]].drawn(f"{seed}:{turn}", args.cap)
        drawn.append(replace(question, id=f"{question.id}#{turn}") if turn else question)
    return drawn
