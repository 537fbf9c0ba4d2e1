"""`fedsparse`: the commands. Modules that need torch are imported inside them, so that help is instant."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..core.errors import ConfigError, FedsparseError
from ..core.registry import describe
from .compare import Asked, comparing
from .options import (
    CONFIG,
    COUNTS,
    FOLDER,
    MARKDOWN,
    PLUGIN,
    QUIET,
    ROWS,
    RUN,
    SEEDS,
    SLOTS,
    SWAP,
    TABLE,
    TRACK,
    WORK,
    WORKERS,
    Settings,
    settings,
)

if TYPE_CHECKING:
    from ..core.resolve import Resolved

INTERRUPTED = 130  # as shells report a command that Ctrl-C ended


class Group(click.Group):
    """Turns errors into one message and an exit code; FEDSPARSE_TRACEBACK=1 shows tracebacks instead."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            early = " before the first round; nothing was recorded" if ctx.invoked_subcommand == "run" else ""
            click.echo(f"Interrupted{early}.", err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:  # whoever reads has what they wanted; click ends quietly
            raise
        except Exception as error:
            if os.environ.get("FEDSPARSE_TRACEBACK"):
                raise
            if not isinstance(error, FedsparseError):
                error = FedsparseError(
                    f"unexpected {describe(error)}; set FEDSPARSE_TRACEBACK=1 to see where"
                )
            show_error(error)
            ctx.exit(error.exit_code)


def show_error(error: FedsparseError) -> None:
    """The message on standard error, without a traceback."""
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        click.secho(f"Error: {len(error.problems)} problems in the configuration", fg="red", err=True)
        for problem in error.problems:
            click.echo(f"  - {problem}", err=True)
    else:
        click.secho("Error: ", fg="red", nl=False, err=True)
        click.echo(str(error), err=True)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fedsparse")
def main() -> None:
    """Sparse federated training: methods as plugins, equal budgets, honest bytes.

    \b
    fedsparse run --plugin pffdst                          train on the digits, 50 non-IID clients
    fedsparse run --plugin pffdst --swap readjust=feddst   swap one slot of the method
    fedsparse run --plugin pffdst --workers 2              two processes share each round's clients
    fedsparse resume runs/pffdst-digits-seed0              go on with an interrupted run
    fedsparse compare runs/*                               accuracy at equal bytes and FLOPs, cost of a target
    fedsparse report runs/* --out report                   the same with figures, as one HTML page
    fedsparse card runs/pffdst-digits-seed0                what a reviewer asks about a run
    fedsparse ablate --plugin pffdst --slots all --out abl each slot swapped for FedAvg's, over seeds
    fedsparse reproduce                                    the papers' tables: kept figures, or played again
    fedsparse plugins                                      what is installed
    fedsparse new-plugin my_method                         a package for a method of your own
    fedsparse config show --plugin pffdst                  every setting and where it comes from
    """


@main.command()
@settings
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the results, new or empty. Default: a new one under runs/.",
)
@WORKERS
@TRACK
@QUIET
def run(chosen: Settings, out: Path | None, workers: int, trackers: tuple[str, ...], quiet: bool) -> None:
    """Train with a method and write metrics, model and mask to a folder.

    \b
    fedsparse run --plugin feddst --set federation.rounds=100 --set sparsity.target=0.9
    fedsparse run --plugin pffdst --config cifar10-lenet --set task.data_root=/data
    fedsparse run --plugin ./mine.py --seed 1
    fedsparse run --plugin pffdst --track tensorboard
    """
    from ..core.trackers import tracked

    train(tracked(chosen.resolve(), trackers), out, workers, quiet)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@WORKERS
@TRACK
@QUIET
def resume(folder: Path, workers: int, trackers: tuple[str, ...], quiet: bool) -> None:
    """Go on with an interrupted run, from its last checkpoint.

    \b
    fedsparse resume runs/pffdst-digits-seed0
    """
    from ..core.api import begun
    from ..core.trackers import tracked

    resolved = tracked(Settings(configs=(str(begun(folder)),)).resolve(), trackers)
    train(resolved, folder, workers, quiet, resume=True)


def train(resolved: Resolved, out: Path | None, workers: int, quiet: bool, resume: bool = False) -> None:
    """Plays a run under its view; ends with 130 or 143 if Ctrl-C or SIGTERM ended the run."""
    from ..core.playing import play
    from .view import choose_view

    view = choose_view(quiet)
    result = play(resolved, out, view, workers, resume)
    if result is None:  # another process of torchrun's records
        return
    view.end(result)
    if result.summary["interrupted"]:
        saved = (result.path / "checkpoint").exists()
        after = f"fedsparse resume {shlex.quote(str(result.path))}"
        click.echo(f"Go on: {after}" if saved else "There is no checkpoint to go on from.", err=True)
        sys.exit(128 + signal.Signals[result.summary["signal"]])  # as shells report it


@main.command("new-plugin")
@click.argument("name")
@click.option(
    "--in",
    "parent",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Folder to write the package's folder into. Default: this one.",
)
def new_plugin(name: str, parent: Path) -> None:
    """Write an installable package with a small method that works: module, entry point, tests, README.

    \b
    fedsparse new-plugin my_method
    pip install -e fedsparse-my-method
    fedsparse plugins check my_method
    """
    from .new_plugin import new_plugin as written

    folder = written(name, parent)
    module = folder / "src" / f"fedsparse_{name}" / "__init__.py"
    click.echo(f"Wrote {folder}; the method is {module}. Next:")
    click.echo(f"  pip install -e {shlex.quote(str(folder))}\n  fedsparse plugins check {name}")
    click.echo(f"  fedsparse run --plugin {name}")


@main.command()
@comparing
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: bytes, FLOPs, seconds, each seed's values."
)
def compare(asked: Asked, as_json: bool) -> None:
    """Compare runs at equal megabytes, at equal FLOPs, and by what a target accuracy cost.

    Runs that differ only in the seed are one row: mean ± sample standard deviation. Seconds are modelled: a
    round takes as long as its mean client downloads, computes and uploads at the given speeds.

    \b
    fedsparse compare runs/*
    fedsparse compare runs/pffdst-* runs/feddst-* --budgets 1,5,10 --target 0.8 --up 1 --down 10
    """
    from .compare import show

    show(asked, as_json)


@main.command()
@comparing
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for the report, new or empty.",
)
def report(asked: Asked, out: Path) -> None:
    """Write what `compare` shows, with figures, as one HTML page; also PNGs and JSON.

    \b
    fedsparse report runs/* --out report
    """
    from .compare import write

    write(asked, out)


@main.command()
@RUN
@MARKDOWN
def card(run: Path, markdown: bool) -> None:
    """What a reviewer asks about a run: method, sparsity, clients, bytes, FLOPs, versions, settings.

    \b
    fedsparse card runs/pffdst-digits-seed0
    fedsparse card runs/pffdst-digits-seed0 --markdown > card.md
    """
    from .card import show_card

    show_card(run, markdown)


@main.command()
@click.argument("first", type=FOLDER)
@click.argument("second", type=FOLDER)
@MARKDOWN
def diff(first: Path, second: Path, markdown: bool) -> None:
    """What differs between two runs: settings and their sources, versions, figures, weights.

    \b
    fedsparse diff runs/pffdst-digits-seed0 runs/pffdst-digits-seed1
    """
    from .card import show_diff

    show_diff(first, second, markdown)


@main.command()
@RUN
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["packed", "onnx", "csr"]),
    help="packed: values and a bitmap; onnx: dense ONNX; csr: linear layers as CSR. Several; default: all.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the files, new or empty. Default: export/ in the run's folder.",
)
def export(run: Path, formats: tuple[str, ...], out: Path | None) -> None:
    """Write a run's final model as packed safetensors, ONNX and CSR; sizes and CPU latency.

    Every file is read back and held against the run's model. ONNX needs fedsparse[export].

    \b
    fedsparse export runs/pffdst-digits-seed0
    fedsparse export runs/pffdst-digits-seed0 --format packed --out small
    """
    from .export import show_export

    show_export(run, formats, out)


@main.command()
@settings
@click.option(
    "--seeds",
    type=SEEDS,
    help="Seeds of every variant, separated by commas.  [default: 0,1,2]",
)
@click.option(
    "--slots",
    type=SLOTS,
    default="",
    help="Swap these slots, each alone, for FedAvg's part unless it is there already: all, or a comma list.",
)
@click.option(
    "--grid",
    multiple=True,
    metavar="KEY=VALUE,VALUE",
    help="Repeat everything with each value of a setting; several: with each combination.",
)
@click.option(
    "--metric",
    default="test_accuracy",
    show_default=True,
    help="Final figure to compare: test_accuracy, client_accuracy, test_loss, upload_bytes_total, …",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for the runs: new, empty, or that of this same ablation, which then goes on.",
)
@WORKERS
@QUIET
def ablate(
    chosen: Settings,
    seeds: tuple[int, ...] | None,
    slots: tuple[str, ...],
    grid: tuple[str, ...],
    metric: str,
    out: Path,
    workers: int,
    quiet: bool,
) -> None:
    """Compare a method with variants of it: each --swap alone, over settings and seeds.

    Started again with the same --out, it goes on where it was interrupted and repeats no finished run.

    \b
    fedsparse ablate --plugin pffdst --swap readjust=feddst --swap freeze_policy=fedavg --out results/swaps
    fedsparse ablate --plugin pffdst --slots all --grid sparsity.target=0.8,0.9 --out results/slots
    """
    from ..core.ablation import plan
    from .ablate import ablate as played

    if seeds is not None and chosen.seed is not None:
        raise ConfigError("--seed and --seeds are both given; give --seeds only")
    if seeds is None:
        seeds = (0, 1, 2) if chosen.seed is None else (chosen.seed,)
    planned = plan(
        chosen.plugin,
        chosen.configs,
        chosen.sets,
        swaps=chosen.swaps,
        extras=chosen.extras,
        grid=grid,
        slots=slots,
        seeds=seeds,
        metric=metric,
        registry=chosen.registry,
    )
    if ended := played(planned, out, workers, quiet):
        sys.exit(128 + ended)  # as shells report it


@main.command()
@click.argument("table", required=False, type=TABLE)
@click.option("--kept", is_flag=True, help="Show the kept figures and the verdicts; play nothing.")
@click.option("--rows", type=ROWS, help="Only these rows, by their presets' names, separated by commas.")
@click.option("--seeds", type=SEEDS, help="Seeds of every row. Default: all of which the table keeps a run.")
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one setting of every row: task.data_root=/data.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the runs: new, empty, or that of this same table, which then goes on. "
    "Default: runs/TABLE.",
)
@click.option("--workers", type=click.IntRange(1, 1024), help="Processes that share each round's clients.")
@QUIET
@MARKDOWN
@click.option("--json", "as_json", is_flag=True, help="Print JSON, in full digits.")
@click.option(
    "--write",
    is_flag=True,
    help="Write the README.md in the folder of the table, or of all, and the project's list of claims.",
)
@click.pass_context
def reproduce(
    ctx: click.Context,
    table: str | None,
    kept: bool,
    rows: tuple[str, ...] | None,
    seeds: tuple[int, ...] | None,
    sets: tuple[str, ...],
    out: Path | None,
    workers: int | None,
    quiet: bool,
    markdown: bool,
    as_json: bool,
    write: bool,
) -> None:
    """Play a paper's table and show it beside the kept runs; without a table: list them.

    A table is a shipped one's name, or a folder with a table.toml. Started again with the same --out, it goes
    on where it was interrupted and repeats no finished run.

    \b
    fedsparse reproduce lenet-cifar10 --kept
    fedsparse reproduce lenet-cifar10 --set task.data_root=/data --out runs/lenet
    fedsparse reproduce lenet-cifar10 --rows pffdst-350,feddst-200 --seeds 0 --workers 2
    """
    playing = {"--set": sets, "--out": out, "--workers": workers, "--quiet": quiet}
    choosing = {"--rows": rows, "--seeds": seeds}
    printing = {"--markdown": markdown, "--json": as_json}

    def refuse(why: str, *options: Mapping[str, object]) -> None:
        given = [name for group in options for name, value in group.items() if value not in (None, False, ())]
        if given:
            raise click.UsageError(f"{', '.join(given)}: {why}", ctx)

    if markdown and as_json:
        raise click.UsageError("--markdown and --json are both given; give one", ctx)
    if write:
        refuse(
            "nothing that --write heeds; it writes whole tables' pages",
            {"--kept": kept},
            playing,
            choosing,
            printing,
        )
    elif table is None:
        refuse("give a table, too; `fedsparse reproduce` lists them", {"--kept": kept}, playing, choosing)
    elif kept:
        refuse("nothing is played with --kept", playing)

    from ..core.reproduction import load
    from . import reproduce as shown

    if table is None:
        shown.write_pages(None) if write else shown.show_list(markdown, as_json)
        return
    found = load(table)
    if write:
        shown.write_pages(found)
        return
    chosen = found.only(rows or (), seeds if kept else None)  # what is played stands beside all kept runs
    if kept:
        shown.show_kept(chosen, markdown, as_json)
        return
    ended = shown.play(
        chosen,
        found.seeds if seeds is None else seeds,
        sets,
        out or Path("runs", found.name),
        workers or 1,
        quiet=quiet,
        as_markdown=markdown,
        as_json=as_json,
    )
    if ended:
        sys.exit(128 + ended)  # as shells report it


@main.command()
@click.argument("works", nargs=-1, type=WORK)
@click.option(
    "--workers",
    "counts",
    type=COUNTS,
    default="1",
    help="Processes that share each round's clients; 1,2,4: measured one after another.",
)
@click.option("--repeats", type=click.IntRange(1, 10_000), default=5, help="Timed rounds of each contender.")
@click.option(
    "--methods",
    default="pffdst,feddst,sparsyfed,fedsparsify",
    show_default=True,
    help="Methods to measure against FedAvg: a comma list, all or none.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False, writable=True), help="JSON file for all figures."
)
@click.option("--quick", is_flag=True, help="One timed round, neither the other executor nor the start-up.")
def bench(
    works: tuple[str, ...], counts: tuple[int, ...], repeats: int, methods: str, out: Path | None, quick: bool
) -> None:
    """Measure seconds a round: a plain PyTorch loop, FedAvg and methods, in turn on the same rounds.

    WORKS are shipped benchmarks (default: all of them) or TOML files as for --config.

    \b
    fedsparse bench lenet-cifar many-small --workers 1,2 --out bench.json
    fedsparse bench mine.toml --methods all --repeats 3
    """
    from .bench.show import bench as measured

    measured(works, counts, repeats, methods, out, quick)


@main.group(invoke_without_command=True)
@click.option(
    "--check",
    "checked",
    type=PLUGIN,
    metavar="PLUGIN",
    help="Hold a plugin against every contract, as check.",
)
@click.pass_context
def plugins(ctx: click.Context, checked: str | None) -> None:
    """List the installed plugins, their parts by slot, and load failures."""
    if checked is not None and ctx.invoked_subcommand is not None:
        raise click.UsageError(
            f"--check {checked} and {ctx.invoked_subcommand} are both given; give one", ctx
        )
    if checked is not None:
        ctx.invoke(plugins_check, plugin=checked)
    elif ctx.invoked_subcommand is None:
        from .describe import show_plugins

        show_plugins()


@plugins.command("show")
@click.argument("plugin", type=PLUGIN)
def plugins_show(plugin: str) -> None:
    """A plugin's parts: slot, fields with defaults, ranges and descriptions."""
    from .describe import show_plugin

    show_plugin(plugin)


@plugins.command("check")
@click.argument("plugin", type=PLUGIN)
@click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change one setting of the checks' tiny runs."
)
def plugins_check(plugin: str, sets: tuple[str, ...] = ()) -> None:
    """Hold a plugin against every contract.

    Prints a line a check; the exit status is 1 if one fails. The runs are tiny: 16 rounds of a small network
    on generated data, with periods of 2 rounds.

    \b
    fedsparse plugins check feddst
    fedsparse plugins check ./mine.py --set method.readjust.period=3
    """
    from .check import show_checks

    if not show_checks(plugin, sets):
        sys.exit(1)


@main.group()
def config() -> None:
    """Look at configurations without running them."""


@config.command("show")
@settings
def config_show(chosen: Settings) -> None:
    """The complete configuration as TOML, each value with its source."""
    resolved = chosen.resolve()
    click.echo(resolved.toml(provenance=True), nl=False)


@config.command("schema")
@settings
def config_schema(chosen: Settings) -> None:
    """JSON schema of the configuration file, with the chosen method's parts."""
    import json

    from ..core.resolve import schema

    click.echo(json.dumps(schema(chosen.resolve()), indent=2))


@config.command("validate")
@click.argument("file", type=CONFIG)
@click.option(
    "--plugin", type=PLUGIN, help="Method to validate it for; default: the one that it names, or fedavg."
)
@click.option("--swap", "swaps", multiple=True, type=SWAP, help="SLOT=PLUGIN, as for run.")
def config_validate(file: str, plugin: str | None, swaps: tuple[str, ...]) -> None:
    """Check a configuration (a TOML file or a preset) and report every problem in it."""
    resolved = Settings(plugin, (file,), swaps).resolve()
    click.echo(f"{file} is valid for the method {resolved.method.name}")


@config.command("list")
def config_list() -> None:
    """The shipped presets, for --config."""
    from ..core.config import preset_names

    names = preset_names()
    width = max(map(len, names))
    for name, line in names.items():
        click.echo(f"{name:<{width}}  {line}")
