"""`mmdit train`: train a LoRA, the whole transformer, or a ControlNet; `mmdit train init` writes a config."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmdit.cli.console import say
from mmdit.cli.usage import UsageError, usage_errors

if TYPE_CHECKING:
    from mmdit.training.config import TrainingConfig
    from mmdit.training.loop import Processes

METHODS = {
    "lora": "train an adapter: LoRA, DoRA or LoKr",
    "full": "train the transformer itself",
    "controlnet": "train a ControlNet on hints",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the methods and `init` as subcommands."""
    more = parser.add_subparsers(
        title="what is trained", required=True, metavar="lora, full, controlnet, init", dest="what"
    )
    for name, said in METHODS.items():
        one = more.add_parser(name, help=said, description=f"{said[0].upper()}{said[1:]}.")
        one.add_argument("config", metavar="CONFIG.json", help="settings of the run; mmdit train init writes them")
        one.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the output")
        parallel = "under torchrun: every process holds the model (ddp), or a share of each weight (fsdp); default ddp"
        one.add_argument("--parallel", choices=("ddp", "fsdp"), help=parallel)
        one.add_argument("-q", "--quiet", action="store_true", help="write the log to files alone")
    said = "write a config with every setting and its description, as keys that begin with //"
    one = more.add_parser("init", help=said, description=f"{said[0].upper()}{said[1:]}.")
    one.add_argument("config", metavar="CONFIG.json", help="a new file")
    one.add_argument("--method", default="lora", choices=METHODS, help="what is trained (default: %(default)s)")
    one.add_argument("--model", default="demo", help="the base model, whose size decides some settings (default: demo)")
    one.add_argument("--data", default="data", metavar="FOLDER", help="folder of pictures and captions (default: data)")
    one.add_argument("--output", default="trained", metavar="FOLDER", help="folder of the run (default: trained)")


def run(options: argparse.Namespace) -> int:
    """Train and say where the result is, or write a config."""
    return _init(options) if options.what == "init" else _train(options)


def _train(options: argparse.Namespace) -> int:
    from encoders.json_files import read_json
    from mmdit.training.config import TrainingConfig
    from mmdit.training.run import train

    values = read_json(options.config, kind=dict)
    if values.setdefault("method", options.what) != options.what:
        raise UsageError(
            f"{options.config} says method {values['method']!r}, and the command {options.what!r}: change one of them"
        )
    with usage_errors():
        config = TrainingConfig.from_json(values, where=options.config)
    processes = _processes(options.parallel, config)
    path = train(config, resume=options.resume, quiet=options.quiet, processes=processes)
    if processes is None or not processes.rank:
        say(f"wrote {path}")
    return 0


def _processes(strategy: Literal["ddp", "fsdp"] | None, config: TrainingConfig) -> Processes | None:
    """The place of this process under torchrun; None where there is only one."""
    if strategy is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    from mmdit.runtime.mesh import own_device
    from mmdit.training.distributed import processes_of
    from mmdit.training.setup import device_of

    with usage_errors():
        return processes_of(strategy or "ddp", own_device(device_of(config)))


def _init(options: argparse.Namespace) -> int:
    from mmdit.training.presets import config_for
    from mmdit.utils import replacing

    config = config_for(options.model, method=options.method, data=options.data, output=options.output)
    with replacing(Path(options.config), new=True) as part:
        part.write_text(config.commented(), encoding="utf-8")
    say(f"wrote {options.config}")
    return 0
