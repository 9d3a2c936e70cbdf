"""The recorded models, written once, and a cache that keeps them loaded from test to test."""

from collections.abc import Callable
from pathlib import Path

import pytest

import recorded_workflows as recorded
from mmdit import WorkflowCache, WorkflowResult, run_workflow


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folder of the recorded models."""
    return recorded.write_models(tmp_path_factory.mktemp("comfyui") / "models")


@pytest.fixture(scope="session")
def loaded() -> dict[str, WorkflowCache]:
    """What tests before have loaded, by the checkpoint: a cache forgets what its last run did not need."""
    return {}


@pytest.fixture
def run(models: Path, loaded: dict[str, WorkflowCache]) -> Callable[..., WorkflowResult]:
    """Run a graph with the recorded models and pictures."""

    def running(graph: dict, **options: object) -> WorkflowResult:
        names = [str(one["inputs"].get("ckpt_name")) for one in graph.values()]
        cache = loaded.setdefault(" ".join(sorted(set(names))), WorkflowCache())
        given = {"models": models, "input": recorded.INPUT, "tokenizers": recorded.tokenizers(), "cache": cache}
        return run_workflow(graph, **(given | options))

    return running
