"""Drawing within a memory budget: the same pictures, the plan kept, nothing left behind."""

import gc
from contextlib import suppress
from weakref import ref

import pytest
import torch

import mmdit
from device_double import LiveBytes
from full import in_full
from mmdit.pipeline import memory
from mmdit.pipeline.failures import ExplainedMemoryError
from mmdit.runtime import device_memory
from mmdit.runtime.device_memory import DeviceMemory
from mmdit.runtime.plan import STREAMED, VISITED, TooLittleMemory, smallest
from quant.tensor import Float8Tensor

PROMPT = "a large red circle above a blue star, on a white background"
SETTINGS = {
    "num_inference_steps": 2,
    "height": 128,
    "width": 128,
    "max_sequence_length": 77,
    "output_type": "latent",
    "seed": 7,
    "progress": False,
}
OUTSIDE = 600_000  # bytes of what a drawing makes beside the planned: text, noise, pictures, sampler


def addresses(pipe):
    return [tensor.data_ptr() for one in pipe.models.values() for tensor in (*one.parameters(), *one.buffers())]


@pytest.fixture(scope="module")
def pipes():
    """The plain pipeline, and one of each kind of plan."""
    found = {"plain": mmdit.Pipeline.demo()}
    for name, budget in (("visited", "42MB"), ("streamed", "31MB")):
        found[name] = mmdit.Pipeline.demo(memory=budget)
    return found


@pytest.fixture(scope="module")
def wanted(pipes):
    return pipes["plain"](PROMPT, **SETTINGS).images


@pytest.mark.parametrize("name", ["visited", "streamed"])
def test_pictures_are_the_same(pipes, wanted, name):
    pipe = pipes[name]
    for _ in range(2):
        assert torch.equal(pipe(PROMPT, **SETTINGS).images, wanted)
    assert pipe.memory_plan.visited
    assert pipe.memory_plan.sum <= pipe.memory_plan.budget
    how = SETTINGS | {"sampler": "heun", "skip_guidance_layers": [1], "height": 64}
    assert torch.equal(pipe(PROMPT, **how).images, pipes["plain"](PROMPT, **how).images)


def test_tiles_are_those_of_the_plan(pipes):
    """Tiles round a little differently than whole pictures do, and as ever for a caller who asks for them."""
    pipe, how = pipes["streamed"], SETTINGS | {"output_type": "pt", "num_inference_steps": 1}
    found = pipe(PROMPT, **how).images
    assert pipe.memory_plan.tile == 64
    assert torch.equal(found, pipes["plain"](PROMPT, vae_tile=64, **how).images)
    assert (found - pipes["plain"](PROMPT, **how).images).abs().max() < 1e-5


def test_in_steps(pipes):
    """The same in the steps of a notebook, also with a loop of one's own, whose levels nobody has planned."""
    plain, pipe = pipes["plain"], pipes["streamed"]
    noise = plain.noise(seed=1, height=64, width=64)
    found = []
    for one in (plain, pipe):
        cond, uncond = one.encode(PROMPT), one.encode("")
        with torch.no_grad():
            *_, last = one.sample(cond, uncond, noise, num_inference_steps=2)
            predict = one.predictor(cond=cond, uncond=uncond)
            found.append((last.x, *predict(noise, 0.7), *predict(noise, 0.3), one.decode(last.x, tile=64)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("quant", in_full([None, "fp8"], ["fp8"]))
def test_the_device_never_holds_more_than_the_plan_says(quant):
    """Counted: everything new that a drawing makes, the copies of weights included, is alive for all of a drawing."""
    pipe, how = mmdit.Pipeline.demo(memory="31MB", quant=quant), SETTINGS | {"max_sequence_length": 256}
    pipe(PROMPT, **how)
    pipe._leave()
    pipe._replan()
    gc.collect()
    with LiveBytes() as live:
        pipe("two green triangles", **how)
    plan = pipe.memory_plan
    assert plan.rung >= VISITED
    assert live.peak <= plan.sum + OUTSIDE
    assert live.peak <= plan.budget
    assert live.peak < sum(one.total for one in plan.models.values()), "less than the weights alone"


def test_float8_models_are_drawn_with_without_a_dispatched_operation(tmp_path, monkeypatch):
    """Torch imports 520 modules, 41 MB, when it dispatches the first one to a tensor subclass."""

    def refuse(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was dispatched")

    how = {"dtype": torch.float32, "memory": "31MB"}
    with monkeypatch.context() as patched:
        patched.setattr(Float8Tensor, "__torch_dispatch__", classmethod(refuse))
        pipe = mmdit.Pipeline.demo(quant="fp8", **how)
        pipe(PROMPT, **SETTINGS | {"num_inference_steps": 1, "height": 64, "width": 64})
        assert "fp8" in repr(pipe)
    assert pipe.memory_plan.rung >= VISITED
    pipe.save_pretrained(tmp_path / "float8")
    monkeypatch.setattr(Float8Tensor, "__torch_dispatch__", classmethod(refuse))
    again = mmdit.Pipeline.from_pretrained(tmp_path / "float8", **how)
    assert isinstance(again.transformer.joint_blocks[0].x_block.attn.qkv.weight, Float8Tensor)


def test_a_calibration_is_planned_with_its_statistics():
    pipe = mmdit.Pipeline.demo(memory="90MB")
    before = pipe.memory_plan
    with pipe._observing(5_000_000):
        inside = pipe.memory_plan
    assert inside.sum <= inside.budget
    assert inside.activations.kept == before.activations.kept + 5_000_000
    assert inside.activations.step - before.activations.step == 24 * 2 * 333 * 1024, "values of the widest input"
    assert pipe.memory_plan == before
    pipe._set_budget(smallest(pipe.memory_plan.models, pipe.memory_plan.activations).sum)
    before = pipe.memory_plan
    with pytest.raises(TooLittleMemory):
        mmdit.calibrate(pipe, PROMPT, 1)
    assert pipe.memory_plan == before


def test_a_dropped_pipeline_is_freed_at_once():
    """No drawing leaves a cycle that keeps the models until a garbage collection."""

    def stop(*_):
        raise KeyboardInterrupt

    how = SETTINGS | {"num_inference_steps": 1, "height": 64, "width": 64}
    gc.collect()
    gc.disable()
    try:
        for options in ({}, {"memory": "31MB"}):
            pipe = mmdit.Pipeline.demo(**options)
            pipe.decode(pipe(PROMPT, **how, skip_guidance_layers=[1]).images)
            with suppress(KeyboardInterrupt):
                pipe(PROMPT, callback_on_step_end=stop, **how)
            models = [ref(pipe.transformer), ref(pipe.vae)]
            del pipe
            assert [model() for model in models] == [None, None], options
    finally:
        gc.enable()


def test_a_larger_drawing_is_planned_anew_or_refused_before_it_runs(pipes):
    pipe = pipes["visited"]
    with pytest.raises(TooLittleMemory, match=r"give at least '[0-9.]+[GM]B'") as refused:
        pipe(PROMPT, **SETTINGS | {"num_images_per_prompt": 60, "seed": 1})
    assert refused.value.smallest > refused.value.budget == 42_000_000
    pipe(PROMPT, **SETTINGS)
    before = pipe.memory_plan
    pipe(PROMPT, **SETTINGS | {"height": 64, "width": 64})
    assert before.activations.step > pipe.memory_plan.activations.step
    assert "budget 42.00 MB" in str(before)


def test_a_budget_is_checked_before_weights_are_read(monkeypatch):
    from mmdit.checkpoints import load_pipeline

    monkeypatch.setattr(load_pipeline, "build", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(TooLittleMemory, match="smallest plan"):
        mmdit.Pipeline.demo(memory="1MB")
    for quant in (None, "fp8"):  # the forecast is what is there later
        with pytest.raises(TooLittleMemory) as refused:
            mmdit.Pipeline.demo(memory="1MB", quant=quant)
        monkeypatch.undo()
        pipe = mmdit.Pipeline.demo(memory=refused.value.smallest, quant=quant)
        assert pipe.memory_plan.sum <= refused.value.smallest
    with pytest.raises(ValueError, match="both given"):
        mmdit.Pipeline.demo(memory="1GB", offload="stages")


def test_loras_are_part_of_the_plan(pipes):
    plain, pipe = pipes["plain"], pipes["streamed"]
    before = pipe.memory_plan.models["transformer"].total
    for one in (plain, pipe):
        one.load_lora_weights(mmdit.OUTLINES, "outlines")
    try:
        assert torch.equal(pipe(PROMPT, **SETTINGS).images, plain(PROMPT, **SETTINGS).images)
        assert pipe.memory_plan.models["transformer"].total > before
        for one in (plain, pipe):
            one.fuse_lora()
        assert torch.equal(pipe(PROMPT, **SETTINGS).images, plain(PROMPT, **SETTINGS).images)
    finally:
        for one in (plain, pipe):
            one.unload_lora_weights()


def test_encoders_run_once_for_the_same_words(pipes, monkeypatch):
    pipe, calls = pipes["streamed"], []
    pipe._leave()
    forward = type(pipe.t5).forward
    monkeypatch.setattr(type(pipe.t5), "forward", lambda self, *given: calls.append(1) or forward(self, *given))
    pipe("three blue squares", **SETTINGS)
    pipe("three blue squares", **SETTINGS | {"seed": 8})
    pipe("a red ring", **SETTINGS)
    assert len(calls) == 3, "a prompt, the empty one, and another prompt"
    with torch.no_grad():
        pipe.t5.encoder.final_layer_norm.weight.mul_(1.0)
    pipe("a red ring", **SETTINGS)
    assert len(calls) == 5, "an encoder that has changed runs again"


def test_what_watches_encoders_and_modulation_sees_them_run(pipes):
    found = {}
    for name in ("plain", "streamed"):
        names = ["joint_blocks.*.x_block.adaln.*", "t_embedder", "t5.*block.0.*resid_mid*"]
        with mmdit.capture(pipes[name], names) as seen:
            pipes[name](PROMPT, **SETTINGS)
            pipes[name](PROMPT, **SETTINGS)
        found[name] = seen
    assert list(found["plain"]) == list(found["streamed"])
    assert all(torch.equal(found["plain"][key], found["streamed"][key]) for key in found["plain"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_stopped_drawing_leaves_a_usable_pipeline(pipes, wanted, error):
    pipe = pipes["streamed"]

    def stop(*_):
        raise error("stop")

    with pytest.raises(error):
        pipe(PROMPT, callback_on_step_end=stop, **SETTINGS)
    pipe._turns.leave()
    homes = addresses(pipe)
    for n in (0, 1):  # in the middle of a step: in a block that is streamed
        block = pipe.transformer.joint_blocks[n + 1]
        handle = block.register_forward_hook(stop)
        with pytest.raises(error):
            pipe(PROMPT, **SETTINGS)
        handle.remove()
        assert addresses(pipe) == homes
    assert torch.equal(pipe(PROMPT, **SETTINGS).images, wanted)


def test_a_callback_may_read_and_write_weights(pipes):
    """Between two steps a streamed block has its own weights, not those of the block in the same slot."""
    found = []
    for name in ("plain", "streamed"):
        pipe = pipes[name]
        weight = pipe.transformer.joint_blocks[2].x_block.mlp.fc2.weight
        before, read = weight.detach().clone(), []

        def double(pipe, step, timestep, tensors, weight=weight, read=read):
            read.append(weight.detach().clone())
            with torch.no_grad():
                weight.mul_(1.25)
            return {}

        images = pipe(PROMPT, callback_on_step_end=double, **SETTINGS).images
        with torch.no_grad():
            weight.copy_(before)
        assert torch.equal(read[0], before)
        assert torch.equal(read[1], before * 1.25)
        found.append(images)
    assert torch.equal(*found)


# ---- out of memory


@pytest.fixture
def gpu(monkeypatch):
    """Errors say what there is on a GPU of 24 GB."""
    monkeypatch.setattr(memory, "memory_of", lambda device: DeviceMemory(24 * 10**9, 10**9, 22 * 10**9))


@pytest.mark.parametrize("name", ["plain", "streamed"])
def test_out_of_memory_at_every_stage(pipes, wanted, gpu, name):
    """A device that fails in an operation of encoders or steps: the error says what would do, and all is freed."""
    pipe = pipes[name]
    pipe(PROMPT, **SETTINGS)
    pipe._leave()
    with LiveBytes() as live:
        assert torch.equal(pipe(PROMPT, **SETTINGS).images, wanted)
    total = live.operations
    for place in in_full((0.03, 0.1, 0.3, 0.6, 0.9, 0.95), (0.1, 0.6, 0.95)):
        pipe._leave()
        gc.collect()
        device = LiveBytes(fails=lambda i, n=int(place * total): i == n)
        with device, pytest.raises(ExplainedMemoryError) as raised:
            pipe(PROMPT, **SETTINGS)
        assert "Tried to allocate 2.00 GiB" in str(raised.value)
        assert "The device has 24.00 GB: 22.00 GB are this process's, 1.00 GB are free" in str(raised.value)
        assert ("memory='23GB'" in str(raised.value)) == (name == "plain")
        assert device.live < 450_000, "while the error is held, nothing but the two conditionings is alive"
        del raised
    assert torch.equal(pipe(PROMPT, **SETTINGS).images, wanted)


@pytest.mark.parametrize("name", in_full(["plain", "streamed"], ["streamed"]))
def test_out_of_memory_in_calls_on_their_own(pipes, gpu, name):
    pipe = pipes[name]
    cond, noise = pipes["plain"].encode(PROMPT), pipes["plain"].noise(seed=1, height=64, width=64)

    def last():
        with torch.no_grad():
            return [step.x for step in pipe.sample(cond, cond, noise, num_inference_steps=2)][-1]

    picture = torch.rand(3, 64, 64)
    calls = (
        (lambda: pipe.encode("a blue cross").context, "1 prompts"),
        (last, "a step of latents [1, 16, 8, 8]"),
        (lambda: pipe.predict(noise, 0.5, [cond])[0], "a step of latents"),
        (lambda: pipe.decode(noise), "the pictures of latents [1, 16, 8, 8]"),
        (lambda: pipe.encode_image(picture, mean=True), "the latents of 1 pictures"),
    )
    for call, says in calls:
        wanted = call()
        pipe._leave()
        with LiveBytes() as live:
            call()
        pipe._leave()
        device = LiveBytes(fails=lambda i, n=live.operations * 2 // 3: i == n)
        with device, pytest.raises(MemoryError, match=says.replace("[", r"\[").replace("]", r"\]")):
            call()
        assert torch.equal(call(), wanted)


def test_a_full_device_is_full_for_the_plain_pipeline_only(pipes, wanted):
    """The simulated device of 31 MB: the plan keeps to it, and without a plan the drawing fails."""
    pipe = mmdit.Pipeline.demo(memory="31MB")
    assert pipe.memory_plan.rung >= STREAMED
    with LiveBytes(capacity=31_000_000):
        assert pipe(PROMPT, **SETTINGS).images.shape == wanted.shape
    everything = mmdit.Pipeline.demo(memory="1GB")
    with LiveBytes(capacity=31_000_000), pytest.raises(ExplainedMemoryError):
        everything(PROMPT, **SETTINGS)


@pytest.mark.parametrize(("outside", "counted"), [(700, 900), (950, 950), (4000, 1200)])
def test_what_a_driver_takes_is_measured(monkeypatch, outside, counted):
    """In MB; `counted` is what a plan sets aside, and by which the cap is below the budget."""
    there = DeviceMemory(80_000 * 10**6, (80_000 - 5_000 - outside) * 10**6, 5_000 * 10**6)
    monkeypatch.setattr(device_memory, "memory_of", lambda device: there)
    assert device_memory.context_of(torch.device("cuda")) == counted * 10**6
