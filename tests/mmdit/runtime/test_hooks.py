"""What looks inside acts in its own thread alone, and leaves nothing behind, also where an interrupt hits its entry."""

import copy
import gc
import sys
import threading

import pytest
import torch
from torch import nn

import mmdit
from inspected import TEXT, inputs, left_behind, model
from mmdit import Guidance, Pipeline
from mmdit.models.lora import beside, without
from mmdit.pipeline.passes import perturbed
from mmdit.runtime.compiled import refuse_changed
from mmdit.runtime.hooks import Hook, hooks, listening

POST = "joint_blocks.1.x_block.resid_post"
SETTINGS = {
    "seed": 1,
    "num_inference_steps": 2,
    "output_type": "latent",
    "height": 64,
    "width": 64,
    "guidance_scale": 4.0,
    "max_sequence_length": 16,
}
PERTURBED = {"guidance": Guidance(perturbed_layers=(1,))}


@pytest.fixture(scope="module")
def demo():
    return Pipeline.demo()


def draw(pipe, **settings):
    return pipe("a red circle", **SETTINGS | settings).images


def clean(pipe):
    return left_behind(*pipe.models.values()) == [] and pipe.watchers == [] and pipe.planners == []


def test_hooks_run_in_their_order_and_are_gone():
    layer, log = nn.Linear(2, 2), []

    def note(name, change=None):
        def call(_, args, kwargs, *output):
            log.append(name)
            return change

        return call

    wanted = [
        Hook(layer, "input", note("in", ((torch.zeros(1, 2),), {}))),
        Hook(layer, "output", note("out")),
        Hook(layer, "output", note("changed", torch.ones(1, 2))),
        Hook(layer, "input", note("first in"), first=True),
        Hook(layer, "output", note("always"), always=True),
    ]
    with hooks(wanted):
        assert torch.equal(layer(torch.randn(1, 2)), torch.ones(1, 2))
        assert log == ["first in", "in", "out", "changed", "always"]
        log.clear()
        with pytest.raises(TypeError), hooks([Hook(layer, "input", note("bad", ((1, 2, 3), {})))]):
            layer(torch.randn(1, 2))
        assert log == ["first in", "in", "bad", "always"]
    assert left_behind(layer) == []
    assert not layer._forward_hooks_with_kwargs
    assert not layer._forward_hooks_always_called
    assert not layer._forward_pre_hooks_with_kwargs


def waiting(pipe, inside, release, *, perturbed):
    """A hook that stops this thread in the middle of a pass (of the perturbed branch), until the other has drawn."""
    stopped, block = [], pipe.transformer.joint_blocks[1]

    def wait(*_):
        if not stopped and (block.attend.held or not perturbed):
            stopped.append(True)
            inside.wait(60)
            release.wait(60)

    return Hook(block.x_block.mlp, "input", wait)


WAYS = {
    "perturbed": (lambda pipe: None, PERTURBED),
    "patch": (lambda pipe: mmdit.patch(pipe, POST, scale=0.5), {}),
    "pattern": (lambda pipe: mmdit.patch(pipe, "joint_blocks.1.attend.pattern", scale=0.5), {}),
    "capture": (lambda pipe: mmdit.capture(pipe, [POST, "clip_l.*.resid_mid"]), {}),
    "maps": (lambda pipe: mmdit.attention_maps(pipe, "circle"), {}),
    "concepts": (lambda pipe: mmdit.concept_tokens(pipe, ["circle", "star"]), {}),
}


def values(entered):
    """What was seen, as tensors."""
    if isinstance(entered, mmdit.Captured):
        return [entered[name] for name in entered]
    if entered is None:
        return []
    return [entered.words["circle"]] if hasattr(entered, "words") else [entered.maps().values]


@pytest.mark.parametrize("way", WAYS)
def test_two_threads_on_one_pipeline(demo, way):
    """One thread stands in the middle of a pass, with all that it has entered, while the other one draws."""
    make, settings = WAYS[way]
    plain = draw(demo)

    def run(extra=()):
        context = make(demo)
        with hooks(extra):
            if context is None:
                return draw(demo, **settings), []
            with context as entered:
                latent = draw(demo, **settings)
            return latent, values(entered)

    wanted, seen = run()
    inside, release, found = threading.Barrier(2), threading.Event(), []

    def other():
        found.append(run([waiting(demo, inside, release, perturbed=way == "perturbed")]))

    thread = threading.Thread(target=other)
    thread.start()
    try:
        inside.wait(60)
        assert not clean(demo)
        mine = draw(demo)
    finally:
        release.set()
        thread.join(120)
    assert torch.equal(mine, plain)
    assert torch.equal(found[0][0], wanted)
    assert len(found[0][1]) == len(seen)
    assert all(torch.equal(*pair) for pair in zip(found[0][1], seen, strict=True))
    assert clean(demo)
    assert torch.equal(draw(demo), plain)


def test_threads_that_look_inside_at_once(demo):
    """Each thread sees its own drawing alone, and the numbers of its own steps."""
    words, barrier, found = ["circle", "star", "ring"], threading.Barrier(3), {}

    def one(word, barrier=None):
        with mmdit.capture(demo, POST, branch="cond") as seen, mmdit.attention_maps(demo, word) as maps:
            if barrier is not None:
                barrier.wait(60)
            demo(f"a red {word}", **SETTINGS | PERTURBED)
        return seen.labelled(POST).labels("step"), seen[POST], maps.words[word]

    def work(word):
        found[word] = one(word, barrier)

    threads = [threading.Thread(target=work, args=(word,)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    for word in words:
        steps, post, maps = one(word)
        assert found[word][0] == steps == (0, 1)
        assert torch.equal(found[word][1], post)
        assert torch.equal(found[word][2], maps)
    assert clean(demo)


# Functions that change something, on the way into the contexts below; torch's own registering among them.
ENTRY = {
    *("hooks", "listening", "attending", "_add", "hooked", "tracking", "_told", "_with_concepts", "perturbed"),
    *("capture", "patch", "attention_maps", "concept_tokens", "register_forward_hook", "register_forward_pre_hook"),
    *("__enter__", "_in_thread"),
}


def interrupted(make, at):
    """Enter with an interrupt at the `at`-th line of `ENTRY`; whether the entry came to its end before that."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_name not in ENTRY:
            return None
        if event == "line":
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with make():
            sys.settrace(before)
            return True
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("way", ["listening", "perturbed", "capture", "patch", "maps", "concepts"])
def test_an_interrupt_between_two_lines_of_the_entry_leaves_nothing(demo, way):
    vectors = torch.randn(2, 48).double()
    small = model()
    make = {
        "listening": lambda: listening(demo.watchers, print),
        "perturbed": lambda: perturbed(small, (0, 1), TEXT),
        "capture": lambda: mmdit.capture(small, POST),
        "patch": lambda: mmdit.patch(small, "joint_blocks.1.attend.pattern", scale=2.0),
        "maps": lambda: mmdit.attention_maps(demo, "circle", blocks=[1, 2]),
        "concepts": lambda: mmdit.concept_tokens(small, vectors),
    }[way]
    plain = small(*inputs())
    at = 1
    while not interrupted(make, at):
        assert left_behind(small, demo.transformer) == [], at
        assert demo.watchers == demo.planners == [], at
        at += 1
    gc.collect()
    assert at > 3
    assert left_behind(small, demo.transformer) == []
    assert torch.equal(small(*inputs()), plain)


def test_a_copy_made_inside_is_not_changed():
    """Hooks are copied with a module, and nobody removes them from the copy."""
    plain = model()
    wanted = plain(*inputs())
    with mmdit.patch(plain, POST, ablate="zero"), mmdit.capture(plain, POST) as seen:
        other = copy.deepcopy(plain)
        assert torch.equal(other(*inputs()), wanted)
        assert not seen
        assert not torch.equal(plain(*inputs()), wanted)
    assert torch.equal(other(*inputs()), wanted)
    refuse_changed(other, "the copy")  # it counts as not hooked, so that it can be accelerated


def test_hooks_stay_where_a_lora_is_attached_or_removed_inside():
    """What stands in for a Linear shares its hooks."""
    small, seen = model(), []
    name = "joint_blocks.1.x_block.attn.qkv"

    def calls_inside(change):
        seen.clear()
        with hooks([Hook(small.get_submodule(name), "output", lambda *_: seen.append(1))]), torch.no_grad():
            small(*inputs())
            change()
            small(*inputs())
        return len(seen)

    width = small.get_submodule(name).in_features
    down, up = (torch.zeros(shape, dtype=torch.float64) for shape in ((4, width), (3 * width, 4)))
    assert calls_inside(lambda: beside(small, name, factors=(down, up))) == 2
    assert calls_inside(lambda: without(small, name)) == 2
    assert left_behind(small) == []
