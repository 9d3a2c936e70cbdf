"""ComfyUI workflows in both forms: every input is checked, outlined and converted, or refused by our own error."""

import json
from pathlib import Path

from fuzzing import cases, mutated, survives
from mmdit import SettingsError, from_workflow
from mmdit.comfyui.errors import LimitError, WorkflowError
from mmdit.comfyui.files import as_folders
from mmdit.comfyui.graph import check, read_graph
from mmdit.comfyui.outline import outline

ROOT = Path(__file__).parents[2]
API = json.loads((ROOT / "notebooks" / "workflows" / "article.json").read_text())
UI = json.loads((ROOT / "tests" / "data" / "workflows" / "ui.json").read_text())
ERRORS = (WorkflowError, LimitError, SettingsError)


def test_changed_workflows(tmp_path):
    folders = as_folders("demo", tmp_path, tmp_path)
    calls = (lambda graph: check(read_graph(graph), folders), lambda graph: outline(graph, folders), from_workflow)
    worked = refused = 0
    for seed, random in cases(60):
        graph = random.choice((API, UI))
        for _ in range(random.choice((1, 1, 2, 6))):
            changed = mutated(graph, random)
            graph = changed if isinstance(changed, dict) else graph
        for call in calls:
            succeeded = survives(lambda call=call, graph=graph: call(graph), ERRORS, seed)
            worked, refused = worked + succeeded, refused + (not succeeded)
    assert refused
    assert worked, "a generator that breaks everything tries little"
