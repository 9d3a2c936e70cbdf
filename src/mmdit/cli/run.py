"""`mmdit run`: run a ComfyUI workflow."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmdit.cli.console import note, say
from mmdit.cli.usage import DTYPES, dtype_name, usage_errors

LIMITS = "pixels, batch, steps, nodes, characters, tokens, prompts"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the workflow, its folders, and changes of its values."""
    more = parser.add_argument
    more("workflow", metavar="FILE", help="workflow in API or UI form (.json), or a PNG that holds one")
    models = "ComfyUI's folder or its models folder; several are looked through in order (default: demo, which offers "
    more(
        "--models",
        nargs="+",
        metavar="FOLDER",
        default=["demo"],
        help=f"{models}the embedded model as demo.safetensors)",
    )
    more("--input", metavar="FOLDER", help="where LoadImage reads (default: none)")
    more("--output", metavar="FOLDER", default="output", help="where SaveImage writes (default: output)")
    tokenizers = "what holds tokenizer, tokenizer_2 and tokenizer_3 (default: beside the models)"
    more("--tokenizers", metavar="FOLDER", help=tokenizers)
    change = "another value of an input, such as 7.seed=5; may be given several times"
    more("--set", nargs="+", action="extend", default=[], metavar="NODE.INPUT=VALUE", help=change)
    limit = f"what the workflow may ask for at most, such as steps=2000; of {LIMITS}"
    more("--limit", nargs="+", action="extend", default=[], metavar="NAME=NUMBER", help=limit)
    more("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    dtype = "what to compute in (default: float32 on the CPU, else as stored)"
    more("--dtype", type=dtype_name, choices=DTYPES, help=dtype)


def run(options: argparse.Namespace) -> int:
    """Run the workflow and say what it wrote."""
    from mmdit.cli.devices import device_of, dtype_of
    from mmdit.cli.outputs import check_folder
    from mmdit.comfyui.graph import read_graph
    from mmdit.comfyui.limits import WorkflowLimits
    from mmdit.comfyui.run import overridden, run_workflow

    graph = read_graph(options.workflow)
    with usage_errors():
        limits = WorkflowLimits.from_text(options.limit)
        graph = overridden(graph, options.set)
        check_folder(Path(options.output), f"--output {options.output}")
    found = run_workflow(
        graph,
        models=options.models,
        input=options.input,
        output=options.output,
        tokenizers=options.tokenizers,
        device=device_of(options.device, note),
        dtype=dtype_of(options.dtype),
        limits=limits,
    )
    for id, problems in found.node_errors.items():
        for one in problems:
            say(f"left out: node {id}: {one.message}")
    for path in found.files:
        say(f"wrote {path}")
    return 1 if found.node_errors else 0
