"""`Accelerated`: its numbers are the model's, and it notices what changes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from mmdit.models.attention import SelfOnly, attending
from mmdit.models.config import MMDiTConfig
from mmdit.models.lora import all_beside, beside, without
from mmdit.models.mmdit import MMDiT
from mmdit.runtime import texts
from mmdit.runtime.accelerate import Accelerated
from mmdit.runtime.attention import BestAttention, Choice, chosen, torch_attention
from mmdit.runtime.graphs import Graphs, Pace
from mmdit.runtime.streaming import WHOLE, Residency
from mmdit.runtime.texts import Kept, Recorded, Text
from mmdit.runtime.versions import contents_of, version_of
from quant.quantize import linears_of, quantize_
from skips import SKIPS
from triton_device import DEVICE

CONFIG = MMDiTConfig(3, 64, 48, 24, 8, head_dim=16, in_channels=4, out_channels=4, dual_attention_blocks=(0,))
GPU = DEVICE == "cuda"


@pytest.fixture
def model():
    found = MMDiT(CONFIG)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(std=0.2)
    return found.to(DEVICE, torch.bfloat16 if GPU else torch.float32).eval().requires_grad_(False)


def inputs_of(model, samples=1, cells=6):
    shapes = (samples, 4, cells, 8), (samples, 5, 48), (samples, 24)
    return [torch.randn(shape).to(DEVICE, model.pos_embed.dtype) for shape in shapes]


def velocity(fast, inputs, timestep=500.0, **rest):
    latent, context, pooled = inputs
    return fast.velocity(latent, timestep, [context], [pooled], **rest)


def near(model, found, inputs, timestep=500.0, **rest):
    """Whether this is what the model says, to rounding."""
    latent, context, pooled = inputs
    wanted = model(latent, torch.full((len(latent),), timestep, device=DEVICE), context, pooled, **rest)
    return float((found - wanted).norm() / wanted.norm()) < (0.03 if GPU else 1e-5)


def test_it_computes_what_the_model_computes(model):
    fast, inputs = Accelerated(model), inputs_of(model)
    for timestep in (1000.0, 37.5, 1000.0):
        assert near(model, velocity(fast, inputs, timestep), inputs, timestep)
    assert near(model, velocity(fast, inputs, skip_layers=(1,)), inputs, skip_layers=(1,))
    other = inputs_of(model, samples=2, cells=4)
    assert near(model, velocity(fast, other), other)
    assert near(model, velocity(fast, inputs), inputs)


def test_parts_of_a_batch_have_their_own_texts(model):
    fast, latent = Accelerated(model), inputs_of(model, samples=2)[0]
    (_, one, first), (_, two, second) = inputs_of(model), inputs_of(model)
    found = fast.velocity(latent, 500.0, [one, two], [first, second])
    assert near(model, found, (latent, torch.cat([one, two]), torch.cat([first, second])))


def test_tables_are_computed_together_and_once(model):
    fast, inputs, asked = Accelerated(model, graph=False), inputs_of(model), []
    table = fast.fast.table
    fast.fast.table = lambda timesteps, pooled: asked.append(timesteps.tolist()) or table(timesteps, pooled)
    for timestep in fast.drawing([900.0, 600.0, 450.0, 300.0, 900.0], [900.0, 600.0, 300.0, 0.0]):
        assert near(model, velocity(fast, inputs, timestep), inputs, timestep)
    assert asked == [[900.0, 600.0, 300.0, 0.0], [450.0, 300.0, 0.0], [900.0, 600.0, 300.0, 0.0]]
    velocity(fast, inputs, 900.0)
    assert asked[3:] == [[900.0]]


def test_drawings_of_several_threads_compute_what_each_does_alone(model):
    """Tables of other sizes would be rounded otherwise."""
    fast, inputs, asked = Accelerated(model, graph=False), inputs_of(model), []
    table = fast.fast.table
    fast.fast.table = lambda timesteps, pooled: asked.append(timesteps.tolist()) or table(timesteps, pooled)

    def draw(times, meanwhile):
        for timestep in fast.drawing(times, times):
            meanwhile()
            velocity(fast, inputs, timestep)

    other = [700.0, 200.0]
    with ThreadPoolExecutor(1) as pool:
        draw([900.0, 600.0, 300.0], lambda: pool.submit(draw, other, lambda: None).result())
    assert asked == [other, [900.0, 600.0, 300.0], other, other]


def test_a_thread_does_not_go_on_with_texts_of_weights_that_another_one_changed(model):
    fast, inputs = Accelerated(model), inputs_of(model)
    velocity(fast, inputs)

    def change():
        model.context_embedder.weight.mul_(2)
        velocity(fast, inputs_of(model))

    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        pool.submit(torch.no_grad()(change)).result()
    assert near(model, velocity(fast, inputs), inputs)


class Steps(Graphs):
    """Keeps steps in place of graphs."""

    def __call__(self, key, step, inputs):
        return self._captured.setdefault(key, step)(*inputs)


def test_small_tables_that_come_again_are_recorded(model):
    fast, steps = Accelerated(model).fast, Steps()
    tables, pooled = Recorded(fast, steps), inputs_of(model, samples=2)[2]
    for count in (4, 3, 4, 4, 2**15, 2**15):
        timesteps = torch.linspace(1000, 1, count, device=DEVICE)
        found = tables.table(timesteps, pooled[:1])
        assert torch.equal(found, fast.table(timesteps, pooled[:1]))
    assert list(steps._captured) == [((4,), (1, 24))]
    text, plain = (Text(one, inputs_of(model)[1], pooled) for one in (tables, fast))
    assert torch.equal(text.vectors(tables, 500.0, [250.0]), plain.vectors(fast, 500.0, [250.0]))


def test_tables_of_timesteps_between_the_planned_ones_are_not_recorded(model):
    fast, inputs, steps = Accelerated(model, graph=False), inputs_of(model), Steps()
    fast._modulated = Recorded(fast.fast, steps)
    for _ in range(3):
        for timestep in fast.drawing([900.0, 750.0, 600.0, 450.0, 300.0], [900.0, 600.0, 300.0]):
            assert near(model, velocity(fast, inputs, timestep), inputs, timestep)
    assert list(steps._captured) == [((3,), (1, 24))]


def attach(model, scale=1.0):
    """A LoRA beside two Linears of each block."""
    for name, linear in linears_of(model):
        if "x_block.mlp" in name:
            sizes = (4, linear.in_features), (linear.out_features, 4)
            down, up = (torch.full(size, 0.1).to(DEVICE, model.pos_embed.dtype) for size in sizes)
            beside(model, name, factors=(down, scale * up))


def control_of(model, samples=1, cells=6):
    """Residuals, of which one is added after two blocks."""
    one, two = (torch.randn(samples, cells // 2 * 4, 64).to(DEVICE, model.pos_embed.dtype) for _ in range(2))
    return [one, two, one]


def test_control_residuals(model):
    fast, inputs = Accelerated(model), inputs_of(model)
    control = control_of(model)
    found = velocity(fast, inputs, control=control)
    assert near(model, found, inputs, control=control)
    assert not torch.equal(found, velocity(fast, inputs))
    assert near(model, velocity(fast, inputs, control=[None, None, None]), inputs)
    with pytest.raises(ValueError, match="2 entries"):
        velocity(fast, inputs, control=control[:2])


CHANGES = {
    "a LoRA beside": attach,
    "in place": lambda model: model.joint_blocks[1].x_block.mlp.fc1.weight.mul_(3),
    "a norm": lambda model: model.joint_blocks[2].x_block.attn.ln_q.weight.mul_(3),
    "modulation": lambda model: model.joint_blocks[0].context_block.adaLN_modulation[1].bias.add_(1),
    "a parameter": lambda model: setattr(
        model.context_embedder, "weight", nn.Parameter(model.context_embedder.weight * 2, requires_grad=False)
    ),
    "float8": lambda model: quantize_(model, "fp8"),
    "data": lambda model: setattr(model.x_embedder.proj.weight, "data", model.x_embedder.proj.weight.data * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_noticed_at_the_next_drawing(model, change):
    fast, inputs = Accelerated(model), inputs_of(model)
    (before,) = (velocity(fast, inputs) for _ in fast.drawing([0], [500.0]))
    version = version_of(model)
    with torch.no_grad():
        CHANGES[change](model)
    assert version_of(model) != version
    (found,) = (velocity(fast, inputs) for _ in fast.drawing([0], [500.0]))
    assert not torch.equal(before, found)
    assert near(model, found, inputs)


def test_codes_written_to_are_noticed(model):
    quantize_(model, "fp8")
    version = version_of(model)
    assert version == version_of(model)
    contents = contents_of(model)
    weight = model.joint_blocks[0].x_block.mlp.fc1.weight
    assert contents_of(model) == contents
    with torch.no_grad():
        weight.copy_(2 * weight.dequantize())
    assert version_of(model) != version
    assert contents_of(model) != contents


def test_writes_are_noticed_beside_a_tensor_that_counts_none():
    net = torch.nn.Linear(2, 2).requires_grad_(False)
    with torch.inference_mode():
        net.register_buffer("uncounted", torch.zeros(2))
    version = version_of(net)
    assert version_of(net) == version
    with torch.no_grad():
        net.bias.add_(1)
    assert version_of(net) != version
    version = version_of(net)
    net.uncounted = torch.ones(2)
    assert version_of(net) != version


@pytest.mark.parametrize("part", ["qdata", "scale"])
def test_parts_of_a_float8_weight_written_to_directly_are_noticed(model, part):
    quantize_(model, "fp8")
    contents, moving = contents_of(model), contents_of(model, parts=False)
    written = getattr(model.joint_blocks[0].x_block.mlp.fc1.weight, part)
    with torch.no_grad():
        written.view(torch.uint8)[0, 0] += 1
    assert contents_of(model) != contents
    assert contents_of(model, parts=False) == moving


def test_unchanged_weights_keep_what_was_built(model):
    fast = Accelerated(model)
    built = fast.fast
    velocity(fast, inputs_of(model))
    fast.begin()
    assert fast.fast is built


def compiled(model):
    model.joint_blocks[0].compile()


def hooked(model):
    model.joint_blocks[1].x_block.mlp.register_forward_hook(lambda module, args, output: None)


def replaced(model):
    vars(model.joint_blocks[2])["forward"] = lambda context, x, c: (context, x)


def exchanged(model):
    model.joint_blocks[2].attend = nn.Identity()


def other_kernel(model):
    model.joint_blocks[0].attend2.kernel = lambda q, k, v: v


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (compiled, "blocks.0"),
        (hooked, "blocks.1"),
        (replaced, "blocks.2"),
        (exchanged, "blocks.2"),
        (other_kernel, "blocks.0.attend2"),
    ],
)
def test_what_it_would_not_run_is_refused(model, change, named):
    fast = Accelerated(model)
    change(model)
    with pytest.raises(ValueError, match=named):
        fast.begin()
    with pytest.raises(ValueError, match=named):
        Accelerated(model)


def test_a_strategy_in_a_slot_is_refused_while_it_is_there(model):
    fast = Accelerated(model)
    with (
        attending([(model.joint_blocks[1].attend, SelfOnly(5))]),
        pytest.raises(ValueError, match=r"blocks\.1\.attend"),
    ):
        fast.begin()
    fast.begin()


def test_the_report_says_what_was_chosen(model):
    quantize_(model, "fp8", ["joint_blocks.*.mlp.*"])
    fast = Accelerated(model)
    velocity(fast, inputs_of(model))
    report = fast.report()
    layers = {layer.name: layer for layer in report.layers}
    assert len(layers) == 3 * 8 + 2 - 3
    assert layers["joint_blocks.0.x_block.mlp.fc1"].reads == "codes"
    assert layers["joint_blocks.0.x_block.attn2.qkv"].reads == "16 bits"
    assert "joint_blocks.2.context_block.attn.proj" not in layers
    assert report.graph is GPU
    assert (not GPU) == any("Triton" in one for one in report.left_out)
    assert str(len(layers) - 10) in str(report)
    if GPU:
        assert report.graphs.nbytes > 0
        assert str(next(iter(report.attention.choices.values())).name) in str(report)


@pytest.mark.skipif(GPU, reason=SKIPS["no gpu"])
def test_a_graph_needs_a_gpu(model):
    with pytest.raises(ValueError, match="cpu"):
        Accelerated(model, graph=True)


def test_an_attention_kernel_that_is_not_here():
    with pytest.raises(ValueError, match=r"cudnn.*flash"):
        BestAttention("flash-attn-9")


def test_attention_is_chosen_beyond_noise_only():
    assert chosen({"cudnn": 1.0, "flash": 0.98, "flash-attn-4": 0.975}) == "cudnn"
    assert chosen({"cudnn": 1.0, "flash": 1.3, "flash-attn-4": 0.8}) == "flash-attn-4"
    assert chosen({"cudnn": 0.012, "flash": 0.008}) == "cudnn"
    assert chosen({"flash": 0.5, "flash-attn-4": 0.49}) == "flash"
    said = str(Choice("flash", torch_attention, {"flash": 0.25}, {"cudnn": "no plan"}))
    assert all(word in said for word in ("flash 0.250 ms", "cudnn refused: no plan", "flash-attn-4"))


class _Noted(Graphs):
    """Graphs that run their step, and note what they would do."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __call__(self, key, step, inputs, *, before=1):
        self.done.append("replays" if key in self else f"records after {before}")
        self._captured[key] = None
        return step(*inputs)


class _AsOnGpu(Accelerated):
    """Records wherever weights allow it."""

    def _refresh(self):
        super()._refresh()
        self.graph = self._may_record


class _Scripted(Pace):
    """A GPU that says what it is told to, when it is asked whether it is done."""

    def __init__(self, said):
        super().__init__()
        self.said = list(said)

    def query(self):
        return self.said.pop(0)

    def launched(self, device):
        self._end = self


@pytest.fixture
def visiting(model):
    """A model whose weights take turns, and its fast forward with graphs that only note what they do."""
    weights = Residency("cpu", moves=True)
    weights.graphs_at_once = 1
    weights.enter({model: WHOLE})
    fast = _AsOnGpu(model, weights=weights)
    fast.graphs = _Noted()
    weights.graphs.add(fast.graphs)
    return fast, weights


TIMES = (900.0, 700.0, 500.0, 300.0, 100.0)


@pytest.mark.skipif(GPU, reason=SKIPS["stand-in"])
def test_where_weights_visit_steps_are_recorded_once_the_gpu_waits_for_the_host(model, visiting):
    fast, weights = visiting
    inputs, fast._pace = inputs_of(model), _Scripted([False, True])
    for timestep in fast.drawing(TIMES, TIMES):
        assert near(model, velocity(fast, inputs, timestep), inputs, timestep)
    assert fast.graphs.done == ["records after 0", "replays", "replays"], "the third step is recorded"
    assert len(fast.graphs) == 0, "freed with the drawing"
    fast._pace.said = [False] * 4
    for timestep in fast.drawing(TIMES, TIMES):
        velocity(fast, inputs, timestep)
    assert len(fast.graphs.done) == 3, "a GPU that is busy needs no graph"
    fast._pace.said = [True]
    velocity(fast, inputs, 1.0)
    velocity(fast, inputs, 1.0)
    assert len(fast.graphs.done) == 3, "nor do steps that belong to no drawing"
    weights.leave()


@pytest.mark.skipif(GPU, reason=SKIPS["stand-in"])
def test_a_second_kind_of_step_has_a_graph_where_two_fit(model, visiting):
    """Elsewhere the only graph is freed before the other kind takes its memory, and none is recorded any more."""
    fast, weights = visiting
    inputs, held = inputs_of(model), []
    for fit in (1, 2):
        weights.graphs_at_once, fast._pace = fit, _Scripted([True] * 9)
        for i, timestep in enumerate(fast.drawing(TIMES, TIMES)):
            velocity(fast, inputs, timestep)
            if i > 1:
                velocity(fast, inputs, timestep, skip_layers=(1,))
            held.append(len(fast.graphs))
    assert held == [0, 1, 0, 0, 0, 0, 1, 1, 2, 2]


@pytest.mark.skipif(GPU, reason=SKIPS["stand-in"])
def test_graphs_are_freed_before_weights_move(model, visiting):
    fast, weights = visiting
    inputs, fast._pace = inputs_of(model), _Scripted([True, True, True])
    steps = fast.drawing(TIMES, TIMES)
    for _ in range(2):
        velocity(fast, inputs, next(steps))
    assert len(fast.graphs) == 1
    weights.enter({nn.Linear(2, 2): WHOLE})
    assert len(fast.graphs) == 0
    weights.enter({model: WHOLE})
    for timestep in steps:
        velocity(fast, inputs, timestep)
    assert fast.graphs.done == ["records after 0", "records after 0", "replays"], "not the step whose weights arrive"
    weights.graphs_at_once = 0
    fast._refresh()
    assert "CUDA graphs: blocks move" in fast.report().left_out[-1]
    weights.leave()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason=SKIPS["gpu"])
@pytest.mark.parametrize("recipe", [None, "fp8"])
def test_graphs_with_loras_and_controls_are_bit_equal_and_notice_changes(model, recipe):
    if recipe is not None:
        quantize_(model, recipe)
    attach(model)
    fast = Accelerated(model)
    plain = fast.without_graphs()
    inputs, seen = inputs_of(model), []
    for scale in (1.0, -2.0, None):
        if scale is None:
            for name in all_beside(model):
                without(model, name)
        else:
            attach(model, scale)
        for control in (None, control_of(model), control_of(model)):
            found = velocity(fast, inputs, control=control)
            assert torch.equal(found, velocity(plain, inputs, control=control))
            assert recipe is not None or near(model, found, inputs, control=control)
            assert not any(torch.equal(found, other) for other in seen)
            seen.append(found)
        assert len(fast.graphs) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason=SKIPS["gpu"])
def test_graphs_are_bit_equal_and_few(model):
    fast = Accelerated(model, graphs=2)
    plain = fast.without_graphs()
    for cells in (4, 6, 8, 4):
        inputs = inputs_of(model, cells=cells)
        for timestep in (900.0, 100.0):
            assert torch.equal(velocity(fast, inputs, timestep), velocity(plain, inputs, timestep))
    assert len(fast.graphs) == 2
    fast.graphs.clear()
    assert fast.graphs.nbytes == 0


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason=SKIPS["gpu"])
def test_a_graph_that_streams_share_gives_each_its_own_result():
    """Threads may have streams of their own: a call must not write what the call before still reads."""
    weight = torch.randn(2048, 2048, device=DEVICE) / 2048**0.5

    def step(x):
        y = x
        for _ in range(30):
            y = y @ weight
        return x + 0.01 * y

    graphs, streams = Graphs(), [torch.cuda.Stream() for _ in range(2)]
    given = [torch.full((2048, 2048), float(value), device=DEVICE) for value in range(1, 7)]
    wanted, found = [step(x) for x in given], []
    graphs("a step", step, given[:1])
    torch.cuda.synchronize()
    for i, x in enumerate(given):
        with torch.cuda.stream(streams[i % 2]):
            found.append(graphs("a step", step, [x]))
    torch.cuda.synchronize()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason=SKIPS["gpu"])
def test_different_graphs_on_two_streams_do_not_share_cublas_s_memory_at_once():
    """Products with a long sum are split over many multiprocessors, which leave their parts in memory of the stream."""
    right = torch.randn(2**16, 64, device=DEVICE, dtype=torch.bfloat16)
    given = torch.randn(2, 64, 2**16, device=DEVICE, dtype=torch.bfloat16)

    def step(x):
        return torch.stack([x @ right for _ in range(20)])

    graphs, streams = Graphs(), [torch.cuda.Stream() for _ in range(2)]
    wanted, found = [step(x) for x in given], []
    for i in (0, 1):
        graphs(i, step, [given[i]])
    torch.cuda.synchronize()
    for turn in range(20):
        with torch.cuda.stream(streams[turn % 2]):
            found.append(graphs(turn % 2, step, [given[turn % 2]]))
    torch.cuda.synchronize()
    for turn, one in enumerate(found):
        torch.testing.assert_close(one, wanted[turn % 2], rtol=0, atol=8.0)  # a sum has a deviation of 256


def test_each_stream_has_what_was_made_on_it(monkeypatch):
    """What one stream makes may not be there yet for another one."""
    kept, one, made = Kept(), torch.zeros(1), []

    def make():
        made.append(now[-1])
        return made[-1]

    now = []
    monkeypatch.setattr(texts, "_stream_for", lambda tensor: now[-1])
    for stream in ("a", "b", "a", "b"):
        now.append(stream)
        assert kept.of([one], make) == stream
    assert made == ["a", "b"]
