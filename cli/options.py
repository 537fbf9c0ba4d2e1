"""Options that several commands share, with shell completion that imports no plugin."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

from ..core.registry import Registry

if TYPE_CHECKING:
    from ..core.resolve import Resolved


class PluginType(click.ParamType[str]):
    """A plugin's name, or the path of a Python file."""

    name = "plugin"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return _starting(incomplete, Registry().names()) or [CompletionItem(incomplete, type="file")]


class ConfigType(click.ParamType[str]):
    """A shipped preset's name, or the path of a TOML file."""

    name = "preset|file"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from ..core.config import preset_names

        return _starting(incomplete, preset_names()) or [CompletionItem(incomplete, type="file")]


class SwapType(click.ParamType[str]):
    """SLOT=PLUGIN or SLOT=PLUGIN:Part."""

    name = "slot=plugin"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from ..core.hookspecs import SLOTS

        slot, equals, _ = incomplete.partition("=")
        if not equals:
            return _starting(slot, [f"{name}=" for name in SLOTS])
        return _starting(incomplete, [f"{slot}={name}" for name in Registry().names()])


class WorkType(click.ParamType[str]):
    """A shipped benchmark's name, or the path of a TOML file."""

    name = "work|file"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from ..core.config import preset_names

        names = [name.removeprefix("bench/") for name in preset_names() if name.startswith("bench/")]
        return _starting(incomplete, names) or [CompletionItem(incomplete, type="file")]


class TableType(click.ParamType[str]):
    """A shipped table's name, or the path of a table's folder."""

    name = "table|folder"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from ..core.reproduction import shipped

        return _starting(incomplete, shipped()) or [CompletionItem(incomplete, type="dir")]


class RowsType(click.ParamType[tuple[str, ...]]):
    """Rows of the table that the argument names, separated by commas."""

    name = "row[,row…]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        texts = tuple(text.strip() for text in str(value).split(",") if text.strip())
        if not texts:
            self.fail(f"{value!r}: expected names of rows, separated by commas", param, ctx)
        return texts

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from ..core.errors import ConfigError
        from ..core.reproduction import load

        # click leaves arguments unread before an option whose value is still being typed
        tables = [ctx.params.get("table"), *ctx.args]
        try:
            names = load(next(filter(None, tables), "")).presets
        except ConfigError:
            return []
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(f"{before}{comma}{name}") for name in names if name.startswith(last)]


class CountsType(click.ParamType[tuple[int, ...]]):
    """Numbers of processes, separated by commas."""

    name = "n[,n…]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        texts = str(value).split(",")
        if not all(text.strip().isdecimal() and 1 <= int(text) <= 1024 for text in texts):
            self.fail(f"{value!r}: expected numbers from 1 to 1024, such as 1,2,4", param, ctx)
        return tuple(int(text) for text in texts)


class SeedsType(click.ParamType[tuple[int, ...]]):
    """Seeds, separated by commas."""

    name = "n[,n…]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        texts = [text.strip() for text in str(value).split(",")]
        if not all(text.isdecimal() for text in texts):
            self.fail(f"{value!r}: expected whole numbers from 0 on, such as 0,1,2", param, ctx)
        return tuple(map(int, texts))


class SlotsType(click.ParamType[tuple[str, ...]]):
    """Slots, separated by commas, or all."""

    name = "all|slot[,slot…]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        return tuple(text.strip() for text in str(value).split(",") if text.strip())

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from ..core.hookspecs import SLOTS

        before, comma, last = incomplete.rpartition(",")
        names = [*SLOTS] if comma else ["all", *SLOTS]
        return _starting(incomplete, [f"{before}{comma}{name}" for name in names if name.startswith(last)])


class Bash(BashComplete):
    """Bash splits words at `=`: puts `readjust = fed` together, and answers with what follows the `=`.

    What ends with `=` is to be gone on with, so that no space follows.
    """

    source_template = BashComplete.source_template.replace(
        "COMPREPLY+=($value)\n", "COMPREPLY+=($value)\n            [[ $value == *= ]] && compopt -o nospace\n"
    )

    def get_completion_args(self) -> tuple[list[str], str]:
        args, incomplete = super().get_completion_args()
        if incomplete == "=" and args:
            incomplete = f"{args.pop()}="
        elif len(args) > 1 and args[-1] == "=":
            args.pop()
            incomplete = f"{args.pop()}={incomplete}"
        return args, incomplete

    def format_completion(self, item: CompletionItem) -> str:
        if "=" in os.environ["COMP_WORDS"].split():  # a line each
            item = CompletionItem(item.value.rpartition("=")[2], item.type)
        return super().format_completion(item)


add_completion_class(Bash)


def _starting(incomplete: str, names: Any) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


PLUGIN, CONFIG, SWAP, WORK, COUNTS = PluginType(), ConfigType(), SwapType(), WorkType(), CountsType()
SEEDS, SLOTS, TABLE, ROWS = SeedsType(), SlotsType(), TableType(), RowsType()
WORKERS = click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=1,
    help="Processes that share each round's clients, one CPU thread or one GPU each.",
)
TRACK = click.option(
    "--track",
    "trackers",
    multiple=True,
    type=click.Choice(["csv", "tensorboard", "wandb", "mlflow"]),
    help="Send each round's metrics there, too; several: repeat it.",
)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
RUN = click.argument("run", type=FOLDER)
MARKDOWN = click.option("--markdown", is_flag=True, help="Print Markdown instead of tables.")
QUIET = click.option("--quiet", "-q", is_flag=True, help="Print only the summary.")


@dataclass(frozen=True)
class Settings:
    """What the options of `settings` said."""

    plugin: str | None = None
    configs: tuple[str, ...] = ()
    swaps: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    seed: int | None = None
    extras: tuple[str, ...] = ()
    registry: Registry = field(default_factory=Registry)

    def resolve(self) -> Resolved:
        """The validated run. Raises ConfigError with every problem."""
        from ..core.config import Layer
        from ..core.resolve import resolve

        layers = [] if self.seed is None else [Layer("--seed", {"seed": self.seed})]
        return resolve(
            self.plugin,
            self.configs,
            self.swaps,
            self.sets,
            extras=self.extras,
            layers=layers,
            registry=self.registry,
        )


def settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that choose a configuration; the command gets them as `chosen`."""

    def gathered(
        plugin: str | None,
        configs: tuple[str, ...],
        swaps: tuple[str, ...],
        extras: tuple[str, ...],
        sets: tuple[str, ...],
        seed: int | None,
        **others: Any,
    ) -> Any:
        return command(Settings(plugin, configs, swaps, sets, seed, extras), **others)

    gathered.__doc__, gathered.__name__ = command.__doc__, command.__name__
    gathered.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    decorators = [
        click.option("--plugin", "-p", type=PLUGIN, help="Method: an installed plugin, or ./file.py."),
        click.option(
            "--config",
            "-c",
            "configs",
            multiple=True,
            type=CONFIG,
            help="Preset or TOML file; several: later wins.",
        ),
        click.option(
            "--swap",
            "swaps",
            multiple=True,
            type=SWAP,
            help="Fill a slot with another plugin's part: readjust=feddst or readjust=feddst:Regrow.",
        ),
        click.option(
            "--extra",
            "extras",
            multiple=True,
            type=PLUGIN,
            metavar="PLUGIN[:PART]",
            help="Add a part that fills no slot: privacy clips and noises what clients send. Repeatable.",
        ),
        click.option(
            "--set",
            "sets",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change one setting: federation.rounds=100.",
        ),
        click.option("--seed", type=click.IntRange(0), help="Seed of every random draw."),
    ]
    for decorate in reversed(decorators):
        gathered = decorate(gathered)
    return gathered
