"""The command line that the scripts share: every Config field is a flag with dashes."""

import argparse
import dataclasses
import os
from functools import partial
from pathlib import Path

from ganomaly import config
from ganomaly.config import DATASET_DEFAULTS, EXPERIMENTS, FIELDS, allowed, is_name, nearest
from ganomaly.errors import UserError
from ganomaly.files import model_file

RUNS = EXPERIMENTS  # where runs go without --experiments-dir
# How argparse reads the value of a field, by the field's type
READ = {
    "int": {"type": int, "metavar": "INT"},
    "float": {"type": float, "metavar": "FLOAT"},
    "str": {"metavar": "STR"},
    "bool": {"action": argparse.BooleanOptionalAction},
}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and no abbreviated flags."""

    def __init__(self, description: str):
        super().__init__(
            usage="%(prog)s [flags]", description=description, allow_abbrev=False,
            formatter_class=partial(argparse.HelpFormatter, max_help_position=32, width=100),
        )  # fmt: skip

    def error(self, message: str):
        raise UserError(f"{message}; --help lists the flags")

    def add_config_flags(self) -> None:
        text = f"config; [..] is the default; recipes, {', '.join(DATASET_DEFAULTS)} have their own"
        group = self.add_argument_group(text)
        group.add_argument("--config", type=Path, metavar="FILE", help="start from a saved config")
        for name, key in FIELDS.items():
            choices = f": {allowed(key)}" if "choices" in key.metadata else ""
            default = "" if name in ("dataset", "category") else f" [{key.default}]"
            group.add_argument(
                "--" + name.replace("_", "-"),
                help=key.metadata["help"] + choices + default,
                **READ[str(key.type).split()[0]],
            )


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")


def add_place_flags(parser: argparse.ArgumentParser, experiment: str = "local") -> None:
    """Where images, experiments and the device are: no part of a config."""
    add = parser.add_argument
    add("--experiment", default=experiment, metavar="NAME", help=f"folder [{experiment}]")
    add("--data-root", type=Path, metavar="DIR", help="of the images [data; mvtec: data/mvtec]")
    add("--download", action="store_true", help="fetch mnist or cifar10 if missing")
    add_device_flag(parser)
    folder = os.path.relpath(RUNS)
    add("--experiments-dir", type=Path, default=folder, metavar="DIR", help="[experiments]")


def add_train_flags(parser: Parser, experiment: str = "local", recipe: str | None = None) -> None:
    """What to train, how, and where; `experiment` and `recipe` are defaults."""
    add = parser.add_argument
    text = f"a folder of experiments/ [{recipe or 'the defaults below'}]"
    add("--recipe", default=recipe, metavar="NAME", help=text)
    add("--force", action="store_true", help="train anew, over what is there")
    add("--dry-run", action="store_true", help="say what would be done, and stop")
    add("--deterministic", action="store_true", help="on CUDA the same bytes in every run")
    add_place_flags(parser, experiment)
    parser.add_config_flags()


def add_list_flags(parser: argparse.ArgumentParser) -> None:
    """Of which categories and seeds; see asked_categories()."""
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="[all of the data set]")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="INT", help="[the recipe's, 42]")


def asked_categories(args: argparse.Namespace) -> list[str] | None:
    """Those of --categories, else that of --category; None: all."""
    return args.categories or ([args.category] if args.category else None)


def add_model_flags(parser: argparse.ArgumentParser, images: bool = True) -> None:
    add = parser.add_argument
    add("--model", type=model_file, required=True, metavar="FILE", help="a run's model.pt")
    quantile = f"{FIELDS['quantile'].metadata['help']} [as trained]"
    add("--quantile", type=float, metavar="FLOAT", help=quantile)
    add("--score", metavar="NAME", help="[the model's own]")
    if images:
        add(
            "--images", required=True, nargs="+", metavar="PATH",
            help="images, folders, patterns such as '**/*.png'; - reads paths from a pipe",
        )  # fmt: skip
        add_device_flag(parser)


def experiment_folder(args: argparse.Namespace) -> Path:
    """The folder of --experiment: a plain name, or one in another, as local/paper is.

    experiments/local/paper, as a shell completes it, is the same folder. <recipe>, in a default,
    stands for the recipe's name.
    """
    name = args.experiment.replace("<recipe>", str(vars(args).get("recipe"))).rstrip("/")
    name = name.removeprefix(f"{args.experiments_dir.name}/")
    if not all(is_name(part) for part in name.split("/")):
        raise UserError(f"--experiment {name!r} is not a plain folder name")
    return args.experiments_dir / name


def given_values(args: argparse.Namespace) -> dict:
    """The Config values of --config, else of --recipe, overridden by flags.

    With another --dataset than the file's, the defaults of that data set override the file. It also
    sets args.recipe to the recipe's name.
    """
    values, recipe = {}, vars(args).get("recipe")
    if args.config is None and recipe is not None:
        args.config = EXPERIMENTS / recipe / "config.json"
        if not is_name(recipe) or not args.config.is_file():
            recipes = sorted(path.parent.name for path in EXPERIMENTS.glob("*/config.json"))
            raise UserError(f"--recipe {recipe}: no such recipe; {nearest(recipe, recipes)}")
    if args.config:
        values = dataclasses.asdict(config.load_config(args.config))
        if args.dataset not in (None, values["dataset"]):
            values |= {**DATASET_DEFAULTS.get(args.dataset, {}), "category": None}
        path = args.config.absolute()
        args.recipe = path.parent.name if path.stem == "config" else path.stem
    return values | {name: vars(args)[name] for name in FIELDS if vars(args)[name] is not None}
