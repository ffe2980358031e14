"""The command ``altgrad``: reports of checkpoints, and tables of formats.

Exit codes: 0; 2 for input that cannot be used, with one line on stderr; 130 after Ctrl-C. Files are written complete
or not at all.
"""

from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import __version__
from ..quantization.formats import FORMAT_REGISTRY, resolve
from .assign import assign
from .candidates import DEFAULT, GRAMMAR, NAMED
from .number_line import picture
from .page import write
from .results import write_files
from .tables import print_format, print_formats, print_report
from .weights import report_weights

BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    try:
        cli.main(arguments, prog_name="altgrad", standalone_mode=False)
    except click.exceptions.Exit as exit:
        return exit.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("altgrad: interrupted, nothing was written", err=True)
        return INTERRUPTED
    except (click.ClickException, ValueError, OSError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"altgrad: {' '.join(message.split())}", err=True)
        return BAD_INPUT
    return 0


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Small floating-point formats: which one suits a model, and what their values are."""


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--candidates",
    "-c",
    default=",".join(DEFAULT),
    show_default=True,
    help=f"What to compare, separated by commas: {', '.join(NAMED)}; {GRAMMAR}. FORMAT is a name or a spelling.",
)
@click.option("--budget", "-b", default=5.0, show_default=True, help="Average bits of a weight for the recommendation.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Folder for report.html and report.json; the current one by default.",
)
@click.option(
    "--worst",
    "-n",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Rows in the table of the worst layers.",
)
def report(path: Path, candidates: str, budget: float, output: Path, worst: int) -> None:
    """Says what each format does to each weight of a checkpoint.

    PATH is a .safetensors file, a .pt file of tensors, the .index.json of a sharded checkpoint, or the folder of a
    downloaded model. Nothing in it is executed. Prints the worst layers and a recommendation; writes report.html and
    report.json.
    """
    if not output.is_dir():
        raise ValueError(f"{output}: no such folder")
    if not budget > 0:  # NaN neither
        raise ValueError(f"--budget must be above 0, got {budget}")
    names = [name.strip() for name in candidates.split(",") if name.strip()]
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    progress = Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    )
    with progress:
        task = progress.add_task(path.name, total=None)
        result = report_weights(path, names, lambda done, total: progress.update(task, completed=done, total=total))
    try:
        choice, problem = assign(result, budget), ""
    except ValueError as error:
        choice, problem = None, str(error)
    files = write(result, output, choice)
    print_report(_console(), result, choice, problem, worst)
    click.echo(f"wrote {' and '.join(map(str, files))}")


@cli.command()
@click.argument("names", nargs=-1)
@click.option("--values", is_flag=True, help="All values, code by code.")
@click.option("--svg", type=click.Path(path_type=Path), help="Write a picture of the number line to this file.")
def formats(names: tuple[str, ...], values: bool, svg: Path | None) -> None:
    """Says what formats are: range, specials and number line.

    NAMES are names (E4M3) or spellings (e4m3b7fn: exponent bits, mantissa bits, bias, specials); all named formats by
    default.
    """
    chosen = [resolve(name) for name in names] or list(FORMAT_REGISTRY.values())
    if svg is not None:
        write_files({svg: picture(chosen)})
    console = _console()
    if len(chosen) == 1 or values:
        for f in chosen:
            print_format(console, f, values)
    else:
        print_formats(console, chosen)
    if svg is not None:
        click.echo(f"wrote {svg}")


def _console() -> Console:
    """Of the terminal's width; wide enough for tables where the output goes elsewhere."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
