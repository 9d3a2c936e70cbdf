"""The table of points: every place exists, and plain hooks there see what the names promise."""

import pytest
import torch

from mmdit import MMDiT, MMDiTConfig
from mmdit.inspection.points import point_table
from mmdit.models.attention import Attend

CONFIG = MMDiTConfig(
    depth=2, hidden_size=128, context_dim=48, pooled_dim=32, pos_embed_size=8, dual_attention_blocks=(0,)
)


@pytest.fixture(scope="module")
def run():
    """All points of one forward, by name, and the model."""
    torch.manual_seed(0)
    model = MMDiT(CONFIG).double().eval().requires_grad_(False)
    seen: dict[str, torch.Tensor] = {}
    for point in point_table(CONFIG).values():
        _hook(model, point, seen)
    given = (torch.randn(2, 16, 4, 6), torch.tensor([900.0, 20.0]), torch.randn(2, 5, 48), torch.randn(2, 32))
    out = model(given[0].double(), given[1], given[2].double(), given[3].double())
    return model, seen, out, given


def _hook(model, point, seen):
    def keep(module, inputs, output):
        value = inputs if point.side == "input" else output
        value = value[point.argument] if isinstance(value, tuple) else value
        if value is not None:
            seen[point.name] = value if point.chunk is None else value.chunk(point.chunk.of, -1)[point.chunk.part]

    model.get_submodule(point.module).register_forward_hook(keep)


def test_every_point_is_passed(run):
    _, seen, _, _ = run
    assert set(seen) == set(point_table(CONFIG))
    assert "joint_blocks.0.x_block.attn2.q" in seen
    assert "joint_blocks.1.context_block.attn.z" not in seen  # the context ends in the last block


def test_points_fit_together(run):
    """q, k, v and z of both streams reproduce attention; residuals and adaLN reproduce the stream."""
    model, seen, _, _ = run
    block = "joint_blocks.0"

    def heads(name):
        return seen[name].unflatten(-1, (CONFIG.heads, -1)).transpose(1, 2)

    q, k = (
        torch.cat([seen[f"{block}.{s}.attn.{part}_normed"] for s in ("context_block", "x_block")], 1).transpose(1, 2)
        for part in "qk"
    )
    v = torch.cat([heads(f"{block}.{s}.attn.v") for s in ("context_block", "x_block")], dim=2)
    z = Attend()(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(z[:, 5:], seen[f"{block}.x_block.attn.z"])
    torch.testing.assert_close(z[:, :5], seen[f"{block}.context_block.attn.z"])
    norm = model.joint_blocks[0].x_block.attn.ln_q
    raw = seen[f"{block}.x_block.attn.q"].unflatten(-1, (CONFIG.heads, -1))
    torch.testing.assert_close(norm(raw), seen[f"{block}.x_block.attn.q_normed"])

    name = f"{block}.x_block"
    gates = {part: seen[f"{name}.adaln.gate_{part}"].unsqueeze(1) for part in ("msa", "msa2", "mlp")}
    mid = (
        seen[f"{name}.resid_pre"] + gates["msa"] * seen[f"{name}.attn.out"] + gates["msa2"] * seen[f"{name}.attn2.out"]
    )
    torch.testing.assert_close(mid, seen[f"{name}.resid_mid"])
    torch.testing.assert_close(mid + gates["mlp"] * seen[f"{name}.mlp.out"], seen[f"{name}.resid_post"])
    torch.testing.assert_close(seen[f"{name}.resid_post"], seen["joint_blocks.1.x_block.resid_pre"])


def test_one_attend_can_be_replaced(run):
    """Attention of one block, changed from outside; the others stay."""
    model, _, out, given = run
    latent, timestep, context, pooled = given[0].double(), given[1], given[2].double(), given[3].double()
    kept = model.joint_blocks[1].attend

    class Uniform(torch.nn.Module):
        def forward(self, q, k, v):
            return v.mean(2, keepdim=True).expand_as(q)

    model.joint_blocks[1].attend = Uniform()
    changed = model(latent, timestep, context, pooled)
    model.joint_blocks[1].attend = kept
    assert float((changed - out).abs().max()) > 1e-3
    assert torch.equal(model(latent, timestep, context, pooled), out)
    assert [sum(1 for _ in block.attend.parameters()) for block in model.joint_blocks] == [0, 0]
