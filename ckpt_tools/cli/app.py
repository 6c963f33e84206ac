"""The application: its verbs in the order of their use, and how every run ends.

Help is plain text, because rich help costs a third of a second; typer's own traceback and error boxes are off, because
`failures` and `output` say how a run ended, to people and as JSON alike.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ckpt_tools.cli import (
    consolidate,
    convert,
    diff,
    doctor,
    estimate,
    explain,
    families,
    inspect,
    plan,
    roundtrip,
    train,
    verify,
)
from ckpt_tools.cli.failures import (
    BROKEN_PIPE,
    INTERNAL_ERROR,
    Interrupted,
    TerminationSignal,
    failure,
    sigterm_interrupts,
    traceback_of,
    unknown_verb,
)
from ckpt_tools.cli.output import Output
from ckpt_tools.cli.ranks import is_bystander, output
from ckpt_tools.core.errors import TerminatedError
from ckpt_tools.version import __version__

_GOES_ON = "the same command again goes on where this one stopped"
RESUMING = {"convert": _GOES_ON, "consolidate": _GOES_ON, "train": "the same command again resumes at the last save"}
"""What to do after Ctrl-C or SIGTERM, for the verbs that keep what they have done."""


class Application(TyperGroup):
    """The group of verbs; turns whatever a verb raises into a message and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: ARG002 - typer passes it; this group always ends the process
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        for stream in (sys.stdout, sys.stderr):
            # Paths and tensor names hold any character, and a log's encoding may not: escape rather than fail.
            getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
        if is_bystander(arguments):
            sys.exit(0)
        try:
            code = super().main(arguments, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:
            code = _fail(error, _output(arguments))
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            with sigterm_interrupts():
                result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt as signalled:
            hint = RESUMING.get(ctx.invoked_subcommand)
            if isinstance(signalled, TerminationSignal):
                raise TerminatedError("ended by SIGTERM", hint=hint) from None
            raise Interrupted("interrupted", hint=hint) from None
        except BrokenPipeError:
            # What is left in the buffer has no reader; without this the interpreter would complain at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if not ctx.resilient_parsing and not args[0].startswith("-") and args[0] not in self.commands:
            raise unknown_verb(args[0], self.commands)
        return super().resolve_command(ctx, args)


def _output(arguments: Sequence[str]) -> Output:
    """The sink that the command line asks for, also when it could not be parsed."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return output("--json" in options, "--quiet" in options or "-q" in options)


def _fail(error: Exception, out: Output) -> int:
    known = failure(error)
    if known is not None:
        out.fail(known.message, known.hint, known.exit_code)
        return known.exit_code
    sys.stderr.write(traceback_of(error))
    hint = "this is a defect of ckpt, not of your files: please report it with the lines above"
    out.fail(f"{type(error).__name__}: {error}", hint, INTERNAL_ERROR)
    return INTERNAL_ERROR


app = typer.Typer(
    name="ckpt",
    cls=Application,
    help="Move mixture-of-experts checkpoints between Hugging Face and training layouts, "
    "and prove that nothing was lost.",
    epilog="Every verb takes --json and --quiet, and --help shows its examples. Exit codes: docs/errors.md.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)

VERBS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "convert": (convert.convert, convert.EXAMPLES),
    "train": (train.train, train.EXAMPLES),
    "consolidate": (consolidate.consolidate, consolidate.EXAMPLES),
    "verify": (verify.verify, verify.EXAMPLES),
    "roundtrip": (roundtrip.roundtrip, roundtrip.EXAMPLES),
    "plan": (plan.plan, plan.EXAMPLES),
    "estimate": (estimate.estimate, estimate.EXAMPLES),
    "inspect": (inspect.inspect, inspect.EXAMPLES),
    "diff": (diff.diff, diff.EXAMPLES),
    "explain": (explain.explain, explain.EXAMPLES),
    "families": (families.families, families.EXAMPLES),
    "doctor": (doctor.doctor, doctor.EXAMPLES),
}
"""Each verb's function and examples, in the order in which a newcomer meets them."""


def _add(name: str, function: Callable[..., None], examples: Sequence[str]) -> None:
    # \b keeps click from filling the lines into one paragraph.
    epilog = "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)
    app.command(name, short_help=(function.__doc__ or "").partition("\n")[0], epilog=epilog)(function)


for _name, (_function, _examples) in VERBS.items():
    _add(_name, _function, _examples)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ckpt {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[  # noqa: ARG001 - its callback acts on it
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
