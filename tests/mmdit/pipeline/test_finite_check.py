"""The check of each step is read once the next step is launched, at the end, and where a drawing is left early."""

import pytest

import mmdit
from mmdit.pipeline import failures, steps
from mmdit.pipeline.plan import _Progress
from samplers import SOLVERS, Solver, euler

SETTINGS = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 32, "width": 32, "progress": False, "seed": 1}
SETTINGS |= {"max_sequence_length": 8}


@pytest.fixture(scope="module")
def pipe():
    return mmdit.Pipeline.demo()


@pytest.fixture
def late(monkeypatch):
    """Checks that fail when they are read, as on a GPU; gives the steps that fail, and a log of what happened."""
    failing, log = set(), []

    class Late(failures.FiniteCheck):
        def __init__(self, step, *rest):
            super().__init__(step, *rest)
            self.i = step.i

        def read(self):  # of a check that `begin_check` would read at once on a CPU
            log.append(f"read {self.i}")
            if self.i in failing:
                self._fail(3)

    predict = _Progress.__call__

    def noted(self, *given):
        log.append(f"launch {self.step}")
        return predict(self, *given)

    monkeypatch.setattr(steps, "begin_check", Late)
    monkeypatch.setattr(_Progress, "__call__", noted)
    return failing, log


def draw(pipe, **more):
    return pipe("a red circle", **{"output_type": "latent"} | SETTINGS | more).images


def test_a_step_is_read_after_the_next_is_launched(pipe, late):
    _, log = late
    draw(pipe)
    assert log == ["launch 0", "launch 1", "read 0", "launch 2", "read 1", "launch 3", "read 2", "read 3"]


@pytest.mark.parametrize("bad", [1, 3])
def test_its_own_step_and_level_are_named(pipe, late, bad):
    failing, log = late
    failing.add(bad)
    levels = pipe.sigmas(4).tolist()
    said = rf"step {bad} from sigma {levels[bad]:g} to {levels[bad + 1]:g} gave 3 of 256 "
    with pytest.raises(FloatingPointError, match=said):
        draw(pipe)
    assert log[-2:] == ([f"launch {bad + 1}", f"read {bad}"] if bad < 3 else ["read 2", "read 3"])


def test_the_last_step_is_read_before_it_is_given_out(pipe, late):
    late[0].add(3)
    cond = pipe.encode("a red circle", max_sequence_length=8)
    drawing = pipe.sample(cond, None, pipe.noise(1, height=32, width=32), num_inference_steps=4, guidance_scale=1.0)
    assert [next(drawing).i for _ in range(3)] == [0, 1, 2]
    with pytest.raises(FloatingPointError, match="step 3"):
        next(drawing)


def test_the_last_step_of_a_picture_is_read_once_decoding_is_launched(pipe, late, monkeypatch):
    failing, log = late
    decoded = type(pipe)._decoded_latent
    monkeypatch.setattr(type(pipe), "_decoded_latent", lambda *given: (log.append("decode"), decoded(*given))[1])
    draw(pipe, output_type="pt")
    assert log[-3:] == ["read 2", "decode", "read 3"]
    failing.add(3)
    with pytest.raises(FloatingPointError, match="step 3"):
        draw(pipe, output_type="pt")


def test_a_callback_is_given_the_last_latent_once_it_is_read(pipe, late):
    late[0].add(3)
    seen = []
    with pytest.raises(FloatingPointError, match="step 3"):
        draw(pipe, output_type="pt", callback_on_step_end=lambda pipe, step, *_: seen.append(step))
    assert seen == [0, 1, 2]


def short(denoise, x, sigmas):
    """A solver of a caller, which ends where it likes."""
    yield from euler(denoise, x, sigmas[:3])


@pytest.fixture(scope="module")
def encoded(pipe):
    found = pipe.encode("a red circle", max_sequence_length=8)
    return {"prompt_embeds": found.context, "pooled_prompt_embeds": found.pooled}


@pytest.mark.parametrize("sampler", [*SOLVERS, short, Solver(short, 1, own_steps=True)])
def test_no_solver_s_last_latent_reaches_a_callback_before_it_is_read(pipe, late, encoded, monkeypatch, sampler):
    log = late[1]
    monkeypatch.setattr(_Progress, "__call__", lambda self, x, sigma, branches: [x / 2] * len(branches))
    given = {"sampler": sampler, "output_type": "latent"} | encoded | SETTINGS
    pipe(**given, callback_on_step_end=lambda _, step, *__: log.append(f"callback {step}"))
    last = int(log[-1].split()[1])
    assert log[-2:] == [f"read {last}", f"callback {last}"]
    assert [line for line in log if line.startswith("read")] == [f"read {i}" for i in range(last + 1)]


def test_settings_are_made_while_steps_run(pipe, late, monkeypatch):
    log, made = late[1], type(pipe)._settings
    monkeypatch.setattr(type(pipe), "_settings", lambda *given: (log.append("settings"), made(*given))[1])
    found = pipe("a red circle", output_type="latent", **SETTINGS)
    assert log[:3] == ["launch 0", "settings", "launch 1"]
    assert log.count("settings") == 1
    assert found.settings[0].seed == 1


def test_a_solver_with_its_own_steps_is_read_at_its_end(pipe, late):
    draw(pipe, sampler="dpm_fast")
    reads = [int(line.split()[1]) for line in late[1] if line.startswith("read")]
    assert reads == sorted(set(reads))
    assert len(reads) == max(reads) + 1


def test_a_drawing_that_a_callback_ends_is_read(pipe, late):
    failing, log = late

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1

    draw(pipe, callback_on_step_end=stop)
    assert log[-1] == "read 1"
    failing.add(1)
    with pytest.raises(FloatingPointError, match="step 1"):
        draw(pipe, callback_on_step_end=stop)


def test_what_a_bad_step_breaks_is_not_what_is_said(pipe, late):
    late[0].add(0)

    def broken(x, sigma, cond, uncond):
        if sigma < 0.95:
            raise ZeroDivisionError
        return cond

    with pytest.raises(FloatingPointError, match="step 0"):
        draw(pipe, guidance=broken, guidance_scale=None)
    late[0].clear()
    with pytest.raises(ZeroDivisionError):
        draw(pipe, guidance=broken, guidance_scale=None)


def test_a_callback_reads_the_timestep_of_its_step(pipe):
    found = []
    draw(pipe, callback_on_step_end=lambda _, step, timestep, tensors: found.append((timestep.shape, float(timestep))))
    levels = pipe.sigmas(4).tolist()[:-1]
    assert found == [((), pytest.approx(1000 * level)) for level in levels]
