"""LoRAs of a pipeline: what acts, what is refused, and that nothing is left behind."""

import os
import pickle
import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmdit
from inspected import inputs
from inspected import model as tiny
from mmdit import Pipeline, load_lora
from mmdit.checkpoints.load import load_mmdit
from mmdit.models.layers import Mlp
from mmdit.models.lora import LoraLinear, LoraMlp, all_beside, beside, without
from mmdit.pipeline import patched_weights
from mmdit.pipeline.patched_weights import Adapter, PatchedWeights
from mmdit.runtime.host import HostCopies
from mmdit.runtime.lora_products import PRODUCTS
from quant import Float8Tensor, dequantize_, quantize_
from quant.quantize import linears_of

DRAWING = {
    "num_inference_steps": 1,
    "seed": 3,
    "output_type": "latent",
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
}
BLOCK = "joint_blocks.1.x_block"
SHAPES = {"attn.qkv": (768, 256), "mlp.fc1": (1024, 256), "mlp.fc2": (256, 1024), "adaLN_modulation.1": (1536, 256)}
LINEARS = [f"{BLOCK}.{name}" for name in SHAPES]


def noise(seed: int, *shape: int) -> Tensor:
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(seed: int) -> dict[str, Tensor]:
    """A LoRA of four Linears of a block, and of one of CLIP-L."""
    tensors = {}
    for i, (name, (rows, columns)) in enumerate(SHAPES.items()):
        key = f"diffusion_model.{BLOCK}.{name}"
        tensors[f"{key}.lora_B.weight"] = noise(seed + i, rows, 4)
        tensors[f"{key}.lora_A.weight"] = noise(seed - i, 4, columns)
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    return tensors | {f"{text}.lora_B.weight": noise(seed, 64, 2), f"{text}.lora_A.weight": noise(-seed, 2, 64)}


def other_kinds(seed: int) -> dict[str, Tensor]:
    """What has no two factors: a LoHa, a whole difference, a norm, a bias, a convolution."""
    key = f"lora_unet_{BLOCK.replace('.', '_')}"
    a, b = noise(seed, 1024, 4), noise(seed + 1, 4, 256)
    return {
        f"{key}_mlp_fc1.hada_w1_a": 4 * a,
        f"{key}_mlp_fc1.hada_w1_b": 4 * b,
        f"{key}_mlp_fc1.hada_w2_a": 4 * a.flip(0),
        f"{key}_mlp_fc1.hada_w2_b": 4 * b.flip(0),
        f"{key}_attn_qkv.diff": noise(seed + 2, 768, 256),
        f"{key}_attn_qkv.diff_b": noise(seed + 3, 768),
        f"{key}_attn_ln_q.w_norm": noise(seed + 4, 64),
        "lora_unet_x_embedder_proj.diff": noise(seed + 5, 256, 16, 2, 2),
    }


@pytest.fixture(scope="module")
def shared() -> Pipeline:
    return Pipeline.demo()


@pytest.fixture
def pipe(shared: Pipeline):
    """The embedded model, which every test leaves as it was."""
    before = {name: dict(model.state_dict(keep_vars=True)) for name, model in shared.models.items()}
    yield shared
    shared.plain()
    shared.unload_lora_weights()
    for name, model in shared.models.items():
        after = model.state_dict(keep_vars=True)
        assert all(after[key] is tensor or torch.equal(after[key], tensor) for key, tensor in before[name].items())
        model.load_state_dict({key: tensor.detach() for key, tensor in before[name].items()}, assign=True)
        model.requires_grad_(False)


def draw(pipe: Pipeline) -> Tensor:
    return pipe("a red circle", **DRAWING).images


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def effective(linear: nn.Linear) -> Tensor:
    """The weight that a Linear acts with, whatever stands beside it."""
    weight = linear.weight.dequantize() if isinstance(linear.weight, Float8Tensor) else linear.weight.detach()
    if isinstance(linear, LoraLinear):
        weight = weight if linear.up is None else weight + linear.up @ linear.down
        weight = weight if linear.delta is None else weight + linear.delta
    return weight


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (2, 3, 6)])
def test_a_linear_with_factors_takes_no_rows_as_a_plain_one_does(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)
    linear = beside(model, "0", factors=(torch.randn(2, 6), torch.randn(5, 2)))
    x = torch.randn(shape)
    torch.testing.assert_close(linear(x), linear.add_to(linear.plain[0](x), x))


class Counted(TorchDispatchMode):
    """Counts operations of aten."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def two(quant: str | None) -> tuple[nn.Sequential, nn.Sequential]:
    """A Linear in bfloat16 or float8, and the same with factors of rank 4 beside it."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 32)).bfloat16().requires_grad_(False)
    if quant is not None:
        quantize_(plain, quant)
    attached = nn.Sequential(plain[0])
    factors = noise(1, 4, 16).bfloat16(), noise(2, 32, 4).bfloat16()
    beside(attached, "0", factors=factors, products=PRODUCTS)
    return plain, attached


@pytest.mark.parametrize("quant", [None, "fp8", "fp8-weight-only"])
@pytest.mark.parametrize("shape", [(2, 3, 16), (5, 16), (16,)], ids=str)
def test_factors_cost_two_products_and_views(quant: str | None, shape: tuple[int, ...]) -> None:
    """The host pays for each operation; it launches no copy, no cast and no multiplication by a strength."""
    plain, attached = two(quant)
    x = noise(3, *shape).bfloat16()
    with torch.no_grad():
        with Counted() as before:
            output = plain(x)
        with Counted() as after:
            found = attached(x)
    more = Counter(after.names) - Counter(before.names)
    assert more.total() - sum(more[view] for view in ("view", "t", "transpose", "_unsafe_view")) == 2, more
    assert more["addmm_"] == more["mm"] == 1
    linear = attached[0]
    wanted = output.double() + x.double() @ linear.down.double().t() @ linear.up.double().t()
    assert found.shape == output.shape
    assert error(found.double(), wanted) < 2**-7


@pytest.mark.parametrize("quant", [None, "fp8"])
def test_factors_beside_rows_with_gaps_and_under_autocast(quant: str | None) -> None:
    _, attached = two(quant)
    linear, joint = attached[0], noise(3, 2, 7, 16).bfloat16()
    x = joint[:, 2:5]
    with torch.no_grad():
        torch.testing.assert_close(attached(x), attached(x.contiguous()))
        with torch.autocast("cpu", torch.float16):
            found = attached(x)
            wanted = linear.plain[0](x) + nn.functional.linear(nn.functional.linear(x, linear.down), linear.up)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("quant", [None, "fp8"])
def test_gradients_of_the_input_pass_through_factors(quant: str | None) -> None:
    _, attached = two(quant)
    linear, x = attached[0], noise(3, 2, 5, 16).bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(attached(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(linear.add_to(linear.plain[0](x), x).square().sum(), x)
    assert found.any()
    torch.testing.assert_close(found, wanted)


def test_factors_that_are_parameters_have_gradients() -> None:
    """They are then no buffers of the module."""
    _, attached = two(None)
    linear = attached[0]
    linear.down, linear.up = nn.Parameter(linear.down), nn.Parameter(linear.up)
    x = noise(3, 5, 16).bfloat16()
    attached(x).square().sum().backward()
    assert linear.down.grad.any()
    assert linear.up.grad.any()
    with torch.no_grad():
        torch.testing.assert_close(attached(x), linear.add_to(linear.plain[0](x), x))


class Doubled(Mlp):
    """An MLP of a user."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def mlp_with(names: Sequence[str], dtype: torch.dtype = torch.bfloat16, kind: type[Mlp] = Mlp) -> nn.Sequential:
    """An MLP, "0", with factors beside some of its Linears."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(16, 32)).to(dtype).requires_grad_(False)
    for name in names:
        rows, columns = model.get_submodule(name).weight.shape
        beside(model, name, factors=(noise(1, 4, columns).to(dtype), noise(2, rows, 4).to(dtype)), products=PRODUCTS)
    return model


@pytest.mark.parametrize("how", [torch.no_grad, torch.enable_grad, partial(torch.autocast, "cpu", torch.float16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("names", [["0.fc1"], ["0.fc2"], ["0.fc1", "0.fc2"]], ids=str)
def test_an_mlp_computes_what_its_modules_compute(
    names: list[str], dtype: torch.dtype, how: Callable[[], AbstractContextManager[object]]
) -> None:
    trained = how is torch.enable_grad
    model, x = mlp_with(names, dtype), noise(3, 2, 3, 16).to(dtype).requires_grad_(trained)
    assert (type(model[0]) is LoraMlp) == ("0.fc1" in names)
    with how():
        found = model(x)
        assert torch.equal(found, Mlp.forward(model[0], x))
    assert found.requires_grad == trained
    assert not trained or torch.autograd.grad(found.sum(), x)[0].any()


def test_an_mlp_has_its_own_class_again_without_factors() -> None:
    model, x = mlp_with([]), noise(3, 2, 3, 16).bfloat16()
    mlp, plain = model[0], model(x)
    seen: list[Tensor] = []
    mlp.register_forward_hook(lambda *given: seen.append(given[2]))
    down, up = noise(1, 4, 16).bfloat16(), noise(2, 32, 4).bfloat16()
    for _ in range(2):  # the second one replaces the first
        beside(model, "0.fc1", factors=(down, up), products=PRODUCTS)
    assert model[0] is mlp
    assert isinstance(mlp, Mlp)
    changed = model(x)
    assert torch.equal(seen[0], changed)
    assert not torch.equal(changed, plain)
    mlp._forward_hooks.clear()  # a list of this test cannot be copied
    for other in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), changed)
        without(other, "0.fc1")
        assert type(other[0]) is Mlp
        assert torch.equal(other(x), plain)
    assert torch.equal(model(x), changed)
    without(model, "0.fc1")
    assert type(mlp) is Mlp
    assert torch.equal(model(x), plain)


def test_an_mlp_of_another_class_keeps_it() -> None:
    """Also where that class is made of ours after factors are attached, as FSDP does."""
    model, x = mlp_with(["0.fc1"], kind=Doubled), noise(3, 2, 3, 16).bfloat16()
    assert type(model[0]) is Doubled
    assert torch.equal(model(x), 2 * mlp_with(["0.fc1"])(x))
    without(model, "0.fc1")
    assert type(model[0]) is Doubled
    model = mlp_with(["0.fc1"])
    model[0].__class__ = other = type("FSDPLoraMlp", (LoraMlp,), {})
    without(model, "0.fc1")
    assert type(model[0]) is other
    assert torch.equal(model(x), mlp_with([])(x))


@pytest.mark.parametrize("tensors", [low_rank(1), other_kinds(1)], ids=["low rank", "other kinds"])
def test_attached_merged_and_fast_draw_the_same(pipe: Pipeline, tensors: dict[str, Tensor]) -> None:
    plain, digest = draw(pipe), pipe.digest
    report = repr(pipe.load_lora_weights(tensors, "one", 0.8))
    assert "attached" in report and "0.8" in report
    attached = draw(pipe)
    assert error(attached, plain) > 1e-2
    assert pipe.digest != digest
    pipe.accelerate()
    assert error(draw(pipe), attached) < 1e-5
    pipe.set_adapters("one", -0.3)
    fast = draw(pipe)
    pipe.plain()
    assert error(draw(pipe), fast) < 1e-5
    assert error(fast, attached) > 1e-2
    pipe.set_adapters("one", 0.8)
    pipe.fuse_lora()
    assert not any(all_beside(model) for model in pipe.models.values())
    assert error(draw(pipe), attached) < 1e-4
    pipe.accelerate()
    assert error(draw(pipe), attached) < 1e-4
    pipe.unload_lora_weights()
    fast = draw(pipe)
    pipe.plain()
    assert torch.equal(draw(pipe), plain)
    assert error(fast, plain) < 1e-5
    assert pipe.digest == digest


def test_attached_leaves_weights_names_and_hooks_as_they_are(pipe: Pipeline) -> None:
    model = pipe.transformer
    names = [name for name, _ in linears_of(model)]
    weights = {name: linear.weight for name, linear in linears_of(model)}
    points, seen = set(mmdit.points(model)), []
    handle = model.get_submodule(LINEARS[0]).register_forward_hook(lambda *_: seen.append(1))
    pipe.load_lora_weights(low_rank(1))
    assert set(all_beside(model)) == set(LINEARS)
    assert [name for name, _ in linears_of(model)] == names
    assert all(linear.weight is weights[name] for name, linear in linears_of(model))
    assert set(mmdit.points(model)) == points
    assert set(model.state_dict()) == {key for key, _ in (*model.named_parameters(), ("pos_embed", None))}
    draw(pipe)
    assert seen
    handle.remove()
    pipe.unload_lora_weights()
    assert not model.get_submodule(LINEARS[0])._forward_hooks


def test_capture_sees_the_adapter_on_and_off(pipe: Pipeline) -> None:
    pipe.load_lora_weights(low_rank(1))
    with mmdit.capture(pipe, f"{BLOCK}.attn.q", budget=None) as on:
        draw(pipe)
    with pipe.without_lora(), mmdit.capture(pipe, f"{BLOCK}.attn.q", budget=None) as off:
        draw(pipe)
    assert pipe.get_active_adapters() == ["default_0"]
    one, other = (found[f"{BLOCK}.attn.q"] for found in (on, off))
    assert error(torch.as_tensor(one), torch.as_tensor(other)) > 1e-3


@pytest.mark.parametrize("form", ["attached", "merged"])
def test_float8_weights(pipe: Pipeline, form: str) -> None:
    """Attached products are exact beside float8; merged weights are rounded again; the codes come back bit for bit."""
    model = pipe.transformer
    base = {name: effective(model.get_submodule(name)) for name in LINEARS}
    quantize_(model, "fp8", [f"{BLOCK}.attn.qkv", f"{BLOCK}.mlp.*"])
    codes = {name: model.get_submodule(name).weight for name in LINEARS}
    before = {name: effective(model.get_submodule(name)) for name in LINEARS}
    pipe.load_lora_weights(low_rank(1), weight=0.5, form=form)
    for i, name in enumerate(LINEARS):
        rows, columns = SHAPES[name.removeprefix(f"{BLOCK}.")]
        wanted = before[name] + 0.5 * noise(1 + i, rows, 4) @ noise(1 - i, 4, columns)
        limit = 1e-6 if form == "attached" or "adaLN" in name else 0.04
        assert error(effective(model.get_submodule(name)), wanted) < limit
        assert (type(model.get_submodule(name).weight) is Float8Tensor) == ("adaLN" not in name) or form == "attached"
    drawn = draw(pipe)
    pipe.accelerate()
    assert error(draw(pipe), drawn) < 2e-2  # inputs near the middle of two codes are rounded either way
    pipe.plain()
    pipe.unload_lora_weights()
    for name in LINEARS:
        weight = model.get_submodule(name).weight
        assert weight is codes[name] or torch.equal(weight, codes[name])
        model.get_submodule(name).weight = nn.Parameter(base[name], requires_grad=False)


def test_weights_by_glob_and_of_text_encoders(pipe: Pipeline) -> None:
    model, base = pipe.transformer, {name: effective(pipe.transformer.get_submodule(name)) for name in LINEARS}
    assert pipe.clip_l is not None
    q = pipe.clip_l.get_submodule("text_model.encoder.layers.0.self_attn.q_proj")
    text = effective(q)
    pipe.load_lora_weights(low_rank(1), weight={"*.mlp.*": -2.0, "*.attn.*": 0.25}, text_encoder_weight=0.5)
    for i, (name, weight) in enumerate(zip(LINEARS, (0.25, -2.0, -2.0, 1.0), strict=True)):
        rows, columns = SHAPES[name.removeprefix(f"{BLOCK}.")]
        change = effective(model.get_submodule(name)) - base[name]
        assert error(change, weight * noise(1 + i, rows, 4) @ noise(1 - i, 4, columns)) < 1e-4
    q = pipe.clip_l.get_submodule("text_model.encoder.layers.0.self_attn.q_proj")
    assert error(effective(q) - text, 0.5 * noise(1, 64, 2) @ noise(-1, 2, 64)) < 1e-4
    assert pipe.get_list_adapters() == {"transformer": ["default_0"], "clip_l": ["default_0"]}


def test_several_add_up_and_weights_do_not_accumulate(pipe: Pipeline) -> None:
    linear = pipe.transformer.get_submodule(LINEARS[0])
    base = effective(linear)
    one, two = (noise(seed, 768, 4) @ noise(seed, 4, 256) for seed in (1, 7))
    for name, seed in (("one", 1), ("two", 7)):
        pipe.load_lora_weights(low_rank(seed), name, form="merged")
    for weights in ([0.5, -1.0], [1.0, 0.0], [0.25, 0.25]):
        pipe.set_adapters(["one", "two"], weights)
        change = effective(pipe.transformer.get_submodule(LINEARS[0])) - base
        assert error(change, weights[0] * one + weights[1] * two) < 1e-4
    pipe.delete_adapters("one")
    assert pipe.get_active_adapters() == ["two"]


def test_saved_pipelines_have_the_lora_in_their_weights(pipe: Pipeline, tmp_path) -> None:
    pipe.load_lora_weights(low_rank(1))
    saved = load_mmdit(pipe.save_pretrained(tmp_path / "saved"))
    for name in LINEARS:
        wanted = effective(pipe.transformer.get_submodule(name))
        torch.testing.assert_close(saved.get_submodule(name).weight, wanted, rtol=1e-5, atol=1e-6)
    assert all_beside(pipe.transformer)


def test_casts_and_gradients_reach_what_is_attached() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    down, up = torch.ones(2, 4, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
    linear = beside(model, "0", factors=(down, up))
    model(torch.ones(1, 4)).sum().backward()
    assert up.grad is not None
    assert linear.to(torch.float64).up.dtype == torch.float64
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    with pytest.raises(ValueError, match="factors"):
        beside(model, "0")
    with pytest.raises(TypeError, match="Sequential"):
        beside(nn.Sequential(model), "0", delta=down)


REFUSED: list[tuple[str, Callable[[Pipeline], object], str]] = [
    ("name twice", lambda pipe: pipe.load_lora_weights(low_rank(2), "one"), "'one'"),
    ("unknown name", lambda pipe: pipe.set_adapters("on"), "'on'.*'one'"),
    ("named twice", lambda pipe: pipe.set_adapters(["one", "one"]), "'one' is named twice"),
    ("unknown to delete", lambda pipe: pipe.delete_adapters("two"), "'two'"),
    ("weight NaN", lambda pipe: pipe.set_adapters("one", float("nan")), "adapter_weights"),
    ("weights", lambda pipe: pipe.set_adapters("one", [1.0, 2.0]), "2 entries for 1"),
    ("glob", lambda pipe: pipe.set_adapters("one", {"joint_blocks.9.*": 0.5}), r"joint_blocks\.9.*matches none"),
    ("glob's weight", lambda pipe: pipe.set_adapters("one", {"*": float("inf")}), "inf"),
    ("loaded with NaN", lambda pipe: pipe.load_lora_weights(low_rank(2), weight=float("nan")), "weight"),
    ("too strong", lambda pipe: pipe.set_adapters("one", 1e39), f"{BLOCK}.*values are not finite"),
    ("too strong to merge", lambda pipe: pipe.fuse_lora(lora_scale=1e39), f"{BLOCK}.*values are not finite"),
    ("scale", lambda pipe: pipe.fuse_lora(lora_scale=float("nan")), "lora_scale"),
    ("too wide", lambda pipe: pipe.load_lora_weights(
        {
            f"diffusion_model.{BLOCK}.attn.qkv.lora_B.weight": torch.ones(769, 2),
            f"diffusion_model.{BLOCK}.attn.qkv.lora_A.weight": torch.ones(2, 256),
        }
    ), "769 x 256"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "said"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
def test_what_is_refused_changes_nothing(pipe: Pipeline, call: Callable[[Pipeline], object], said: str) -> None:
    pipe.load_lora_weights(low_rank(1), "one", 0.5)
    before = [effective(pipe.transformer.get_submodule(name)) for name in LINEARS]
    with pytest.raises(ValueError, match=said):
        call(pipe)
    assert pipe.get_active_adapters() == ["one"]
    after = [effective(pipe.transformer.get_submodule(name)) for name in LINEARS]
    assert all(map(torch.equal, before, after))


def test_nothing_to_fuse(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match="no LoRA acts"):
        pipe.fuse_lora()


# Random sequences


@dataclass
class Expected:
    """The base weight of a Linear as it should be, beside what is loaded."""

    base: Tensor  # as it is stored, without any LoRA
    is_float8: bool = False
    is_merged: bool = False

    def settle(self) -> None:
        """What every call on LoRAs does first: the base weight comes back in the form of today."""
        if self.is_merged and self.is_float8 and not isinstance(self.base, Float8Tensor):
            self.base = Float8Tensor.quantize(self.base, "e4m3", "row")
        elif self.is_merged and not self.is_float8 and isinstance(self.base, Float8Tensor):
            self.base = self.base.dequantize()

    def quantize(self, *, on: bool) -> None:
        self.is_float8 = on
        if not self.is_merged and on != isinstance(self.base, Float8Tensor):
            self.base = Float8Tensor.quantize(self.base, "e4m3", "row") if on else self.base.dequantize()


CALLS = ("load", "load", "set", "set", "fuse", "unfuse", "delete", "disable", "enable", "quantize", "dequantize")
SEQUENCES = 500 if os.environ.get("MMDIT_FULL") == "1" else 40
FILES = {seed: load_lora(low_rank(seed)) for seed in (1, 7, 30)}


def test_random_sequences_end_with_the_right_weights(pipe: Pipeline) -> None:
    name, model = LINEARS[0], pipe.transformer
    change = {seed: noise(seed, 768, 4) @ noise(seed, 4, 256) for seed in FILES}
    original = model.get_submodule(name).weight.detach().clone()
    for number in range(SEQUENCES):
        rng, weights, merged, enabled = random.Random(number), dict[int, float](), set[int](), True
        expected = Expected(original)
        for _ in range(rng.randint(3, 8)):
            call, seed = rng.choice(CALLS), rng.choice(list(FILES))
            loaded = [each for each in FILES if str(each) in pipe._loras.adapters]
            if call in ("quantize", "dequantize"):
                if (call == "quantize") != expected.is_float8:
                    quantize_(model, "fp8-weight-only", [name]) if call == "quantize" else dequantize_(model, [name])
                    expected.quantize(on=call == "quantize")
                continue
            weight = rng.choice((-1.0, 0.0, 0.5, 2.0))
            possible = {
                "load": seed not in loaded,
                "set": loaded,
                "fuse": weights and enabled,
                "delete": seed in loaded,
            }
            if not possible.get(call, True):
                continue
            expected.settle()
            if call == "load":
                form = rng.choice(("attached", "merged"))
                pipe.load_lora_weights(FILES[seed], str(seed), weight, form=form)
                weights[seed] = weight
                merged |= {seed} if form == "merged" else set()
            elif call == "set":
                chosen = rng.sample(loaded, rng.randint(1, len(loaded)))
                pipe.set_adapters([str(each) for each in chosen], weight)
                weights = dict.fromkeys(chosen, weight)
            elif call == "fuse":
                pipe.fuse_lora()
                merged |= set(weights)
            elif call == "unfuse":
                pipe.unfuse_lora()
                merged = set()
            elif call == "delete":
                pipe.delete_adapters(str(seed))
                weights.pop(seed, None)
                merged.discard(seed)
            elif call in ("disable", "enable"):
                getattr(pipe, f"{call}_lora")()
                enabled = call == "enable"
            acting = weights if enabled else {}
            expected.is_merged = any(each in merged for each in acting)
            wanted = sum((acting[each] * change[each] for each in acting), start=Tensor.clone(value(expected.base)))
            rounded = expected.is_float8 and expected.is_merged
            found = effective(model.get_submodule(name))
            assert error(found, wanted) < (0.04 if rounded else 1e-5), (number, call)
        expected.settle()
        pipe.unload_lora_weights()
        weight = model.get_submodule(name).weight
        if isinstance(expected.base, Float8Tensor):
            assert torch.equal(weight.qdata.view(torch.uint8), expected.base.qdata.view(torch.uint8)), number
            assert torch.equal(weight.scale, expected.base.scale), number
        else:
            assert torch.equal(weight, expected.base), number
        model.get_submodule(name).weight = nn.Parameter(original, requires_grad=False)


def value(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if isinstance(tensor, Float8Tensor) else tensor


def test_a_lora_that_cannot_be_merged_leaves_the_pipeline_as_it_was():
    pipe = Pipeline.demo(quant="fp8")
    pipe.load_lora_weights(low_rank(1), "first", 0.5, form="merged")
    before = effective(pipe.transformer.get_submodule(LINEARS[0]))
    for change in (
        lambda: pipe.load_lora_weights(low_rank(2), "second", 1e300, form="merged", text_encoder_weight=0.0),
        lambda: pipe.fuse_lora("first", lora_scale=1e300),
        lambda: pipe.set_adapters("first", 1e300, text_encoder_weights=0.0),
    ):
        with pytest.raises(ValueError, match=rf"{BLOCK}.*e\+(300|299)"):
            change()
        assert pipe.get_active_adapters() == ["first"]
        (adapter,) = pipe.lora_report().adapters.values()
        assert (adapter.weight, adapter.form, adapter.scale, adapter.text_encoder_weight) == (0.5, "merged", 1.0, None)
        assert torch.equal(effective(pipe.transformer.get_submodule(LINEARS[0])), before)


@torch.no_grad()
@pytest.mark.parametrize("error", [MemoryError, LookupError, KeyboardInterrupt])
def test_no_error_and_no_interrupt_loses_an_original(error, monkeypatch):
    """Copies run in a thread; an error there is raised here, and the weights come back all the same."""
    model, weights, copied = tiny(), PatchedWeights(), []

    class Failing(HostCopies):
        def __call__(self, tensor: Tensor) -> Tensor:
            copied.append(tensor)
            if len(copied) == 2 and error is not KeyboardInterrupt:
                raise error("the second one")
            return super().__call__(tensor).clone()

    class Interrupted(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait, cancel_futures=cancel_futures)
            if error is KeyboardInterrupt:
                raise KeyboardInterrupt("the second one")

    monkeypatch.setattr(patched_weights, "HostCopies", Failing)
    monkeypatch.setattr(patched_weights, "ThreadPoolExecutor", Interrupted)
    names = [f"joint_blocks_{block}_x_block_mlp_fc{i}" for block in (0, 1) for i in (1, 2)]
    sides = [(512, 128), (128, 512)] * 2
    lora = load_lora(
        {f"lora_unet_{name}.diff": noise(1, *side).double() for name, side in zip(names, sides, strict=True)}
    )
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(error, match="the second one"):
        weights.apply({"transformer": model}, [Adapter(lora, "merged")])
    assert (len(copied), len(weights.before)) == (4, 4)
    assert not all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    weights.restore({"transformer": model})
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@torch.no_grad()
def test_a_lora_changes_one_of_two_modules_that_share_a_weight():
    """Merged as attached, the other module keeps the weight; without the LoRA both share it again."""
    model, given, weights = tiny(), inputs(), PatchedWeights()
    first, second = (block.x_block.mlp.fc1 for block in model.joint_blocks[:2])
    second.weight, second.bias = first.weight, first.bias
    tensors = {
        "lora_unet_joint_blocks_1_x_block_mlp_fc1.lora_up.weight": noise(1, 512, 4).double(),
        "lora_unet_joint_blocks_1_x_block_mlp_fc1.lora_down.weight": noise(2, 4, 128).double(),
        "lora_unet_joint_blocks_1_x_block_mlp_fc1.diff_b": noise(3, 512).double(),
    }
    lora, plain, found = load_lora(tensors), model(*given), {}
    for form in ("attached", "merged"):
        weights.apply({"transformer": model}, [Adapter(lora, form)])
        found[form] = model(*given)
    assert error(found["merged"], found["attached"]) < 1e-10
    assert error(found["merged"], plain) > 1e-3
    assert first.weight is not model.joint_blocks[1].x_block.mlp.fc1.weight
    weights.restore({"transformer": model})
    assert torch.equal(model(*given), plain)
    assert second is model.joint_blocks[1].x_block.mlp.fc1
    assert (second.weight is first.weight, second.bias is first.bias) == (True, True)


@pytest.mark.parametrize("kind", ["factors", "matrix"])
def test_a_lora_of_a_text_encoder_whose_16_bits_are_upcast(tmp_path, kind):
    """Under the profile comfyui, encoders compute in float32 over weights of 16 bits; the LoRA's were not upcast."""
    pipe = mmdit.Pipeline.demo(profile="comfyui", device="cpu")
    g, name = torch.Generator().manual_seed(0), "text_model.encoder.layers.0.self_attn.q_proj"
    rows, columns = pipe.clip_l.get_submodule(name).weight.shape
    down, up = (torch.randn(shape, generator=g) for shape in ((2, columns), (rows, 2)))
    key = f"text_encoders.clip_l.transformer.{name}"
    tensors = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
    if kind == "matrix":
        tensors = {f"{key}.diff": up @ down}
    save_file(tensors, tmp_path / "lora.safetensors")
    pipe.load_lora_weights(tmp_path / "lora.safetensors", weight=0.1)
    wanted = pipe.encode("a red circle").context
    pipe.unload_lora_weights()
    pipe.clip_l.to(torch.bfloat16)
    plain = pipe.encode("a red circle").context
    pipe.load_lora_weights(tmp_path / "lora.safetensors", weight=0.1)
    found = pipe.encode("a red circle").context
    assert float((found - wanted).norm()) < 0.2 * float((plain - wanted).norm())
    pipe.unload_lora_weights()
    assert torch.equal(pipe.encode("a red circle").context, plain)
