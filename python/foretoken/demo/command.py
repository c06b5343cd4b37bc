"""``foretoken demo``: options, and the order of things."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

import torch

from foretoken.demo.screen import Screen

if TYPE_CHECKING:
    from foretoken.demo.models import Models

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOY = """\
The embedded pair is a toy: 9.9M and 2.5M parameters that write plausible Python. It proves the mechanism,
offline and on any machine; how much faster your models get depends on your models (--target, --draft).
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``foretoken demo``."""
    parser = commands.add_parser(
        "demo",
        help="decode a real pair of models speculatively, and compare",
        description="Decodes live, then compares ways to decode. Offline unless --target names a hub model.",
    )
    add = parser.add_argument
    add("--target", metavar="NAME", help="a model from the hub or a folder (default: the embedded pair)")
    add("--draft", metavar="NAME", help="its draft model, of the same vocabulary (default: n-grams alone)")
    add("--prompt", metavar="TEXT", action="append", help="a prompt, or @FILE; again for more (default: ten)")
    add("--raw", action="store_true", help="no chat template around the prompts")
    add("--dtype", choices=DTYPES, default="float32", help="of the models (default: %(default)s)")
    add("--max-new-tokens", metavar="N", type=_positive, help="per prompt (default: 200; quick: 48)")
    add("--num-drafts", metavar="K", type=_drafts, help="drafts a round (default: the best of a sweep)")
    add("--temperature", metavar="T", type=_temperature, action="append", help="(default: 0 and 0.8)")
    add("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    add("--quick", action="store_true", help="two prompts, short texts, no sweep")
    add("--json", action="store_true", help="print JSON and nothing else; no live part")
    add("--plot", metavar="FILE", help="also draw acceptance and a round's time (needs matplotlib)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    out = sys.stderr if options.json else sys.stdout
    screen = Screen(out=out)
    try:
        report = _run(options, screen)
    except ImportError as error:
        screen.line(f"foretoken demo: {error}. It needs the extras: pip install 'foretoken[hf,cli]'")
        return 1
    except (ValueError, OSError) as error:  # OSError: no such file, or no such model
        screen.line(f"foretoken demo: {error}")
        return 2
    if options.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 0


def _run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    from foretoken.demo.models import load, read_prompt

    texts = [read_prompt(text) for text in options.prompt or ()]
    if options.target is None and not options.json:
        screen.line(TOY, "dim")
        _live_pair(options, screen, texts)
    screen.progress("loading transformers and the models ...")
    models = load(options.target, options.draft, texts, DTYPES[options.dtype], options.raw)
    screen.clear_progress()
    if options.quick:
        models.prompts = models.prompts[:2]
    if options.target is not None and not options.json:
        _live_modules(options, screen, models)
    return _compare(options, screen, models)


def _sizes(options: argparse.Namespace) -> tuple[int, int]:
    """New tokens, and the drafts of a round where none was chosen by a sweep."""
    return options.max_new_tokens or (48 if options.quick else 200), options.num_drafts or 4


def _live_pair(options: argparse.Namespace, screen: Screen, texts: list[str]) -> None:
    """The first text goes without transformers, whose import takes longer than the text."""
    from tokenizers import Tokenizer

    from foretoken import pair
    from foretoken.demo import live
    from foretoken.pair.weights import FOLDER

    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    prompt = tokenizer.encode((texts or pair.prompts())[0]).ids
    new, drafts = _sizes(options)
    length = len(prompt) + new + drafts + 1
    target, draft = (pair.load_lean(role, max_batch=1, max_length=length) for role in ("target", "draft"))
    live.show(
        screen,
        live.Loop(target, draft, target.vocab_size, length, drafts),
        lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)),
        prompt,
        new=new,
        temperature=0.8,
        seed=options.seed,
    )


def _live_modules(options: argparse.Namespace, screen: Screen, models: Models) -> None:
    from foretoken.demo import live
    from foretoken.hf import ModuleRunner

    prompt = models.prompts[0]
    new, drafts = _sizes(options)
    length = len(prompt) + new + drafts + 1
    target = ModuleRunner(models.target, max_batch=1, max_length=length)
    draft = models.draft and ModuleRunner(models.draft, max_batch=1, max_length=length)
    live.show(
        screen,
        live.Loop(target, draft, target.vocab_size, length, drafts),
        lambda ids: str(models.tokenizer.decode(ids)),
        prompt,
        new=new,
        temperature=0.8,
        seed=options.seed,
    )


def _compare(options: argparse.Namespace, screen: Screen, models: Models) -> dict[str, Any]:
    from foretoken.demo import report as reports
    from foretoken.demo.checks import check
    from foretoken.demo.compare import Plan, compare
    from foretoken.demo.methods import Stand
    from foretoken.hf.loading import quiet

    new, count = _sizes(options)
    drafts = (count,) if options.num_drafts or options.quick else Plan().drafts
    plan = Plan(
        temperatures=tuple(options.temperature or (0.0, 0.8)), new=new, drafts=drafts, seed=options.seed
    )
    longest = max(map(len, models.prompts))
    with quiet():
        stand = Stand(models, max_length=longest + new + max(drafts) + 1, max_drafts=max(drafts))
        result = compare(stand, models.prompts, plan, screen.progress)
        report = reports.collect(result, models)
    screen.progress("n-gram index and import ...")
    report["checks"] = [] if options.quick else check(result, report["rows"])
    screen.clear_progress()
    if options.plot:
        from foretoken.demo.plot import draw

        draw(report, options.plot)
    if not options.json:
        _print(screen, report)
    return report


def _print(screen: Screen, report: dict[str, Any]) -> None:
    from foretoken.demo import report as reports

    threads, cpu = report["machine"]["threads"], report["machine"]["cpu"]["model"]
    screen.line(
        f"\n{report['models']}; {report['prompts']} prompts, {report['new_tokens']} new tokens each; "
        f"{threads['torch']} threads, {cpu}"
    )
    for temperature in sorted({row["temperature"] for row in report["rows"]}):
        screen.line(f"\nTemperature {temperature:g}", "head")
        head, *rows = reports.table(report, temperature)
        screen.line(head, "dim")
        for row in rows:
            screen.line(row)
        for note in reports.notes(report, temperature):
            screen.line(note, "dim")
    screen.line()
    for line in reports.legend():
        screen.line(line, "dim")
    if not report["checks"]:
        screen.line("\nTwo short texts say little about speed: leave --quick away for figures to quote.")
        return
    screen.line("\nFigures with a bound, at temperature 0 where it matters", "head")
    for line in reports.check_lines(report["checks"]):
        screen.line(line)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _drafts(text: str) -> int:
    value = _positive(text)
    if value > 16:
        raise argparse.ArgumentTypeError(f"expected 1 to 16, got {value}")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return value
