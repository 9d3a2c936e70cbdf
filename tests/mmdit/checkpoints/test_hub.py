"""Downloading from a hub: the files that are chosen in the official repositories, and the requests to a server."""

import hashlib
import json
import shutil
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mmdit import Pipeline
from mmdit.checkpoints.components import REGISTRY
from mmdit.checkpoints.hub import HubError, fetch, is_repo_id, needed, needed_control
from mmdit.checkpoints.locate import weights_in
from mmdit.checkpoints.write import convert
from refusals import refuses

REPO, COMMIT, NEWER = "someone/tiny-sd3.5", "0123456789abcdef0123456789abcdef01234567", "f" * 40

# Lists of the official repositories. Sources: the file lists and model cards of these repositories as other people's
# code on GitHub quotes them (2024-2026). Comments mark decoys, such as mirrors have.
CLIP_TOKENIZER = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
T5_TOKENIZER = ("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json")
SMALL = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{name}/config.json" for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")),
    *(f"{name}/{file}" for name in ("tokenizer", "tokenizer_2") for file in CLIP_TOKENIZER),
    *(f"tokenizer_3/{file}" for file in T5_TOKENIZER),
]
T5_INDEX, T5_INDEX_FP16 = (f"text_encoder_3/model.safetensors.index{mark}.json" for mark in ("", ".fp16"))
T5_SHARDS, T5_SHARDS_FP16 = (
    [f"text_encoder_3/model{mark}-0000{i}-of-00002.safetensors" for i in (1, 2)] for mark in ("", ".fp16")
)
CLIPS, CLIPS_FP16 = (
    [f"{name}/model{mark}.safetensors" for name in ("text_encoder", "text_encoder_2")] for mark in ("", ".fp16")
)
TEXTS, TEXTS_FP16 = [*CLIPS, T5_INDEX, *T5_SHARDS], [*CLIPS_FP16, T5_INDEX_FP16, *T5_SHARDS_FP16]
VAE, ONE = "vae/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors"
TWO = [f"{ONE}.index.json", *(ONE.replace(".", f"-0000{i}-of-00002.", 1) for i in (1, 2))]
OFFICIAL_TEXTS = [
    f"text_encoders/{name}"
    for name in ("README.md", *(f"{n}.safetensors" for n in ("clip_g", "clip_l", "t5xxl_fp16", "t5xxl_fp8_e4m3fn")))
]
PAGES = [".gitattributes", "LICENSE.md", "README.md", "mmdit.png"]
LARGE = [
    *PAGES,
    *("SD3.5L_example_workflow.json", "sd3.5_large.safetensors", "sd3.5_large_demo.png"),
    *(*SMALL, *TEXTS, *TEXTS_FP16, *OFFICIAL_TEXTS, *TWO, VAE),
]
TURBO = [name.replace("sd3.5_large", "sd3.5_large_turbo").replace("3.5L_", "3.5L_Turbo_") for name in LARGE]
MEDIUM_3_5 = [
    *PAGES,
    *("SD3.5M_example_workflow.json", "SD3.5M_SLG_example_workflow.json", "sd3_medium_demo.jpg"),
    *("SD3.5L_plus_SD3.5M_upscaling_example_workflow.json", "sd3.5_medium.safetensors"),
    *(*SMALL, *TEXTS, *TEXTS_FP16, *OFFICIAL_TEXTS, ONE, VAE),
    "vae copy/diffusion_pytorch_model.safetensors",  # a mirror's
    "text_encoder/pytorch_model.bin",  # a decoy
]
MEDIUM_3_DIFFUSERS = [*PAGES, "sd3demo.jpg", *SMALL, *TEXTS, *TEXTS_FP16, ONE, VAE]
MEDIUM_3 = [
    *PAGES,
    *(f"comfy_example_workflows/sd3_medium_example_workflow_{n}.json" for n in ("basic", "multi_prompt", "upscaling")),
    *("sd3demo.jpg", "sd3demo_prompts.txt", "sd3_medium.safetensors", "sd3_medium_incl_clips.safetensors"),
    *(f"sd3_medium_incl_clips_t5xxl{kind}.safetensors" for kind in ("fp16", "fp8")),
    *OFFICIAL_TEXTS,
]
TOKENIZERS = [name for name in SMALL if name.startswith("tokenizer")]
COMFYUI = ["README.md", "sd3.5_large_fp8_scaled.safetensors", *OFFICIAL_TEXTS]


@pytest.mark.parametrize(
    ("names", "transformer"),
    [(LARGE, TWO), (TURBO, TWO), (MEDIUM_3_5, [ONE]), (MEDIUM_3_DIFFUSERS, [ONE])],
    ids=["3.5 large", "3.5 large turbo", "3.5 medium", "3 medium, diffusers"],
)
def test_official_repositories(tmp_path, names, transformer):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    kinds = [kind for kind in REGISTRY.values() if not kind.many]
    read = {str(weights_in(tmp_path / kind.folder).relative_to(tmp_path)) for kind in kinds}
    assert read <= set(needed(names)), "the loader would read others of a whole copy"
    assert needed(names) == sorted([*SMALL, *TEXTS, *transformer, VAE])
    assert needed(names, variant="fp16") == sorted([*SMALL, *TEXTS_FP16, *transformer, VAE])


def test_controlnets_of_repositories():
    diffusers = ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "examples/hint.png"]
    assert needed_control(diffusers) == ["diffusion_pytorch_model.safetensors", "config.json"]
    assert needed_control(diffusers, "canny") == needed_control(diffusers)
    nets = [f"sd3.5_large_controlnet_{kind}.safetensors" for kind in ("blur", "canny", "depth")]
    assert needed_control([*nets, "README.md"], "depth") == [nets[2]]
    assert needed_control([f"controlnet/{nets[0]}"]) == [f"controlnet/{nets[0]}"]
    shards = [f"controlnet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "controlnet/diffusion_pytorch_model.safetensors.index.json"
    assert needed_control([*SMALL, *shards, index]) == [index, *shards]
    refuses(lambda: needed_control(nets), "3 ControlNets", error=HubError)
    refuses(lambda: needed_control(nets, "pose"), "3 ControlNets", error=HubError)
    refuses(lambda: needed_control(["net.bin"]), "no ControlNets", error=HubError)


def test_official_layout_where_diffusers_is_incomplete():
    texts = [f"text_encoders/{name}.safetensors" for name in ("clip_g", "clip_l", "t5xxl_fp16")]
    configs = [name for name in SMALL if name != "model_index.json"]
    wanted = sorted(["sd3.5_large.safetensors", VAE, *texts, *configs])
    assert needed(set(LARGE) - {TWO[2]}) == wanted
    assert needed(set(LARGE) - {"model_index.json"}) == wanted
    assert needed([*MEDIUM_3, *TOKENIZERS]) == sorted(["sd3_medium.safetensors", *texts, *TOKENIZERS])
    assert needed([*COMFYUI, *TOKENIZERS]) == sorted(["sd3.5_large_fp8_scaled.safetensors", *texts, *TOKENIZERS])
    assert needed([*COMFYUI, *TOKENIZERS, "clip/t5.fp8.safetensors"]) == needed([*COMFYUI, *TOKENIZERS])
    only_fp8 = [*COMFYUI, *TOKENIZERS]
    only_fp8.remove("text_encoders/t5xxl_fp16.safetensors")
    assert "text_encoders/t5xxl_fp8_e4m3fn.safetensors" in needed(only_fp8)


def test_t5_is_optional_and_whole():
    without = [name for name in LARGE if not name.startswith("text_encoder_3/") and "t5" not in name]
    assert needed(without) == sorted(
        name for name in [*SMALL, *CLIPS, *TWO, VAE] if not name.startswith(("text_encoder_3/", "tokenizer_3/"))
    )
    assert needed(
        set(MEDIUM_3_DIFFUSERS) - {T5_SHARDS[1]}
    ) == sorted(  # the plain variant is incomplete and is not chosen
        [*SMALL, *CLIPS, T5_INDEX_FP16, *T5_SHARDS_FP16, ONE, VAE]
    )
    refuses(
        lambda: needed(set(MEDIUM_3_DIFFUSERS) - {T5_SHARDS[1], T5_INDEX_FP16}),
        "missing: text_encoder_3/",
        error=HubError,
    )
    refuses(
        lambda: needed(set(MEDIUM_3_DIFFUSERS) - {"tokenizer_3/tokenizer.json", "tokenizer_3/spiece.model"}),
        "missing: tokenizer_3/",
        error=HubError,
    )


def test_the_only_variant_is_taken():
    small = [name for name in SMALL if not name.startswith(("text_encoder_3/", "tokenizer_3/"))]
    names = [name.replace(".safetensors", ".bf16.safetensors") for name in [*small, *CLIPS, ONE, VAE]]
    assert needed(names) == sorted(names)
    refuses(lambda: needed([*names, ONE.replace(".", ".fp32.", 1)]), "missing: transformer/", error=HubError)


def test_incomplete_repositories():
    name = "stabilityai/stable-diffusion-3-medium"
    message = refuses(
        lambda: needed(MEDIUM_3, repository=name),
        name,
        "missing: tokenizer/ (vocab.json, merges.txt, tokenizer_config.json), tokenizer_2/",
        f"{name}-diffusers",
        error=HubError,
    )
    assert "clip" not in message
    refuses(lambda: needed(COMFYUI), "missing: tokenizer/", error=HubError)
    refuses(
        lambda: needed([*COMFYUI, *TOKENIZERS, "sd3.5_medium.safetensors"]),
        "missing: one transformer",
        "sd3.5_large_fp8_scaled.safetensors, sd3.5_medium",
        error=HubError,
    )
    pickles = [name.replace(".safetensors", ".bin") for name in MEDIUM_3_DIFFUSERS]
    refuses(lambda: needed(pickles), "pickles", "missing: transformer/", "vae/", error=HubError)
    refuses(lambda: needed(["README.md"]), "missing: one transformer", "clip_l", "tokenizer_2/", error=HubError)
    plain = [name for name in MEDIUM_3_DIFFUSERS if "fp16" not in name]
    refuses(lambda: needed(plain, variant="fp16"), "no fp16 files", "variant='fp16'", error=HubError)


def test_what_is_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = ["stabilityai/stable-diffusion-3.5-large", "a/b", "_a/b_c", "a" * 96 + "/" + "b" * 96]
    paths = ["/a/b", "./a", "../a/b", "~/a", "a", "a/", "a/b/", "a/b/c", "a\\b", "é/b", "a/b.safetensors"]
    paths += ["", "a b/c", "a" * 97 + "/b"]
    refused = ["-a/b", "a/b-", ".a/b", "a/b.", "a/b--c", "a..b/c", "a/b.git"]
    for text in ids:
        assert is_repo_id(text)
        assert not is_repo_id(Path(text))
        validate_repo_id(text)
    for text in [*paths, *refused]:
        assert not is_repo_id(text)
    for text in refused:
        with pytest.raises(HFValidationError):
            validate_repo_id(text)
    for text in ("models/sd36", "Checkpoints/a", "here/a"):
        (tmp_path / "here").mkdir(exist_ok=True)
        assert not is_repo_id(text), "a missing folder is not looked for on the Hub"
        assert is_repo_id(f"hf:{text}")
        refuses(lambda text=text: Pipeline.from_pretrained(text), text, f"hf:{text}", error=FileNotFoundError)
    assert not is_repo_id("hf:a")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not is_repo_id("a/b")
    with pytest.raises(ValueError, match="owner/name, got 'a'"):
        fetch("a")


@dataclass
class Hub:
    """A hub with one repository, which is a folder. `asked` lists every request for a file."""

    folder: Path
    url: str = ""
    commit: str = COMMIT
    decoys: tuple[str, ...] = ()  # listed files that must never be requested
    closed: dict[str, tuple[int, str]] = field(
        default_factory=dict
    )  # status and code of the answer, by a part of the path
    cut: set[str] = field(default_factory=set)  # files whose first answer breaks off in the middle
    asked: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    ranges: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    @property
    def fetched(self) -> list[str]:  # only one of several equal files is sent, but each is asked for by HEAD
        return sorted({name for _, name in self.asked})


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.tokens.add(self.headers["Authorization"])
            for part, (status, code) in hub.closed.items():
                if part in path:
                    return self.send(status, b"", {"X-Error-Code": code} if code else {})
            if path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
                return self.send(200, json.dumps({"id": REPO, "sha": hub.commit, "siblings": []}).encode())
            if path == f"/api/models/{REPO}/tree/{hub.commit}":
                names = [*hub.names, *hub.decoys]
                return self.send(
                    200, json.dumps([{"type": "file", "path": n, "size": 9, "oid": n} for n in names]).encode()
                )
            if path.startswith(start := f"/{REPO}/resolve/{hub.commit}/"):
                return self.send_file(path.removeprefix(start))
            code = "RevisionNotFound" if path.startswith(f"/api/models/{REPO}/") else "RepoNotFound"
            return self.send(404, b"", {"X-Error-Code": code})

        def send_file(self, name: str) -> None:
            hub.asked.append((self.command, name))
            content = (hub.folder / name).read_bytes()
            tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": hub.commit}
            if self.headers["Range"]:
                hub.ranges.append(name)
                first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                tag["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                return self.send(206, content[first:], tag)
            if self.command == "GET" and name in hub.cut:
                hub.cut.remove(name)
                return self.send(200, content, tag, sent=len(content) // 2)
            return self.send(200, content, tag)

        def send(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, sent: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:sent])

    return Handler


@pytest.fixture
def hub(tiny_folders, tmp_path, monkeypatch):
    """A server of a tiny diffusers repository with other files in it, and a library that contacts no other server."""
    hub = Hub(shutil.copytree(tiny_folders["sd3.5-medium"], tmp_path / "remote", ignore=shutil.ignore_patterns(".t*")))
    for name in (
        "README.md",
        "demo.png",
        "text_encoder/pytorch_model.bin",
        "text_encoders/clip_l.safetensors",
        "a.ckpt",
    ):
        (hub.folder / name).parent.mkdir(exist_ok=True)
        (hub.folder / name).write_text("a decoy")
    shutil.copy(hub.folder / CLIPS[0], hub.folder / CLIPS_FP16[0])
    hub.decoys = ("sd3.5_medium.safetensors", "lora/pytorch_lora_weights.safetensors")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    connect = socket.create_connection

    def only_here(address, *args, **kwargs):
        assert address[0] == "127.0.0.1", f"network access: {address}"
        return connect(address, *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", only_here)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True
    )  # otherwise the library sends a request about the caller
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    huggingface_hub.close_session()
    yield hub
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def drawn(folder):
    settings = {
        "num_inference_steps": 2,
        "seed": 1,
        "output_type": "pt",
        "height": 64,
        "width": 64,
        "max_sequence_length": 32,
    }
    return Pipeline.from_pretrained(folder)("a star", **settings).images


def real(hub):
    """The files of the tiny pipeline: all but the decoys."""
    loaded = ("model_index.json", "scheduler/", "transformer/", "vae/", "text_encoder", "tokenizer")
    decoys = ("text_encoders/", "text_encoder/pytorch_model.bin", CLIPS_FP16[0])
    return [name for name in hub.names if name.startswith(loaded) and not name.startswith(decoys)]


def test_fetches_what_is_needed_once(hub, cache, tiny_folders):
    folder = fetch(REPO, cache_dir=cache)
    assert hub.fetched == real(hub)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == real(hub)
    assert torch.equal(drawn(folder), drawn(tiny_folders["sd3.5-medium"]))
    assert hub.tokens == {None}
    hub.asked.clear()
    assert fetch(REPO, cache_dir=cache, revision="main", token="hf_x") == folder
    assert hub.asked == []
    assert "Bearer hf_x" in hub.tokens


def test_official_layout(hub, cache, tmp_path, tiny_folders):
    hub.folder = convert(tiny_folders["sd3.5-medium"], tmp_path / "official", "official")
    main = next(hub.folder.glob("*.safetensors"))
    main.rename(main.with_name("sd3.5_[medium].safetensors"))
    (hub.folder / "README.md").write_text("a decoy")
    hub.decoys = ("text_encoders/t5xxl_fp8_e4m3fn.safetensors", "workflow.json")
    folder = fetch(REPO, cache_dir=cache)
    assert hub.fetched == [name for name in hub.names if name not in ("README.md", "model_index.json")]
    assert torch.equal(drawn(folder), drawn(tiny_folders["sd3.5-medium"]))


def test_a_variant(hub, cache, tmp_path):
    folder = fetch(REPO, cache_dir=cache, variant="fp16")
    assert hub.fetched == sorted({*real(hub), CLIPS_FP16[0]} - {CLIPS[0]})
    assert Pipeline.from_pretrained(folder).clip_l is not None
    fetch(REPO, cache_dir=cache)
    message = refuses(lambda: fetch(REPO, cache_dir=cache, variant="fp16"), folder, CLIPS[0], error=HubError)
    assert "cache_dir" in message
    assert fetch(REPO, cache_dir=tmp_path / "other", variant="fp16").is_dir()


def test_newer_commits(hub, cache):
    old = fetch(REPO, cache_dir=cache)
    hub.commit = NEWER
    (hub.folder / "scheduler" / "scheduler_config.json").write_text('{"shift": 2.0}')
    hub.asked.clear()
    new = fetch(REPO, cache_dir=cache)
    assert new.name == NEWER
    assert [name for method, name in hub.asked if method == "GET"] == ["scheduler/scheduler_config.json"]
    assert fetch(REPO, cache_dir=cache, revision=COMMIT) == old


def test_broken_off_downloads_go_on(hub, cache, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut = {ONE}
    folder = fetch(REPO, cache_dir=cache)
    assert hub.ranges == [ONE]
    assert (folder / ONE).read_bytes() == (hub.folder / ONE).read_bytes()


def test_without_network(hub, cache, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.closed = {f"{COMMIT}/transformer/diffusion": (500, "")}
    refuses(lambda: fetch(REPO, cache_dir=cache), REPO, hub.url, "500", error=HubError)
    for offline in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
            patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
            says = "incomplete", "offline mode" if offline else "Connection refused"
            refuses(lambda: fetch(REPO, cache_dir=cache), *says, error=HubError)
            refuses(lambda: fetch("other/name", cache_dir=cache), *says, error=HubError)
    hub.closed, hub.asked = {}, []
    folder = fetch(REPO, cache_dir=cache)
    assert hub.fetched == [ONE]
    for offline in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
            assert fetch(REPO, cache_dir=cache, endpoint="http://127.0.0.1:9") == folder


@pytest.mark.parametrize(
    ("closed", "says"),
    [
        ({f"/{REPO}/resolve": (401, "GatedRepo")}, [f"licence on URL/{REPO}", "hf auth login"]),
        ({f"/{REPO}/resolve": (403, "GatedRepo")}, [f"licence on URL/{REPO}", "hf auth login"]),
        ({"/api/models": (403, "GatedRepo")}, [REPO, "licence"]),
        ({"/api/models": (403, "")}, [REPO, "licence"]),
        ({"/tree/": (403, "")}, [REPO, "licence"]),
        ({"/api/models": (401, "")}, [REPO, "licence"]),
        ({"/api/models": (401, "RepoNotFound")}, [f"URL has no repository {REPO}", "local folder"]),
        ({"/api/models": (404, "RepoNotFound")}, [f"URL has no repository {REPO}", "hf auth login"]),
        ({"/vae/": (404, "EntryNotFound")}, ["incomplete", "HTTPStatusError", "404 Not Found"]),
        ({"/api/models": (503, "")}, ["incomplete", "HTTPStatusError", "503 Service Unavailable"]),
    ],
)
def test_refusals_are_one_sentence(hub, cache, closed, says):
    hub.closed = closed
    facts = [fact.replace("URL", hub.url) for fact in says]
    message = refuses(lambda: fetch(REPO, cache_dir=cache), *facts, error=HubError)
    assert "\n" not in message
    assert hub.asked == [] or "EntryNotFound" in str(closed)


def test_no_such_revision(hub, cache):
    refuses(
        lambda: fetch(REPO, revision="v2", cache_dir=cache),
        f"{hub.url} has no revision 'v2' of {REPO}",
        error=HubError,
    )


def test_other_pipelines_are_refused_before_their_weights(hub, cache):
    index = hub.folder / "model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"transformer": ["diffusers", "FluxTransformer2DModel"]})
    )
    refuses(lambda: fetch(REPO, cache_dir=cache), REPO, "Flux", error=HubError)
    assert not any(name.endswith(".safetensors") for name in hub.fetched)
    (hub.folder / VAE).unlink()
    hub.commit, hub.asked = NEWER, []
    refuses(lambda: fetch(REPO, cache_dir=cache), REPO, "missing: vae/", error=HubError)
    assert hub.asked == []


def test_without_the_library(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)
        refuses(lambda: fetch(REPO), 'pip install "mmdit-lab[hub]"', error=HubError)
    old, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    old.__version__ = "0.36.0"
    monkeypatch.setitem(sys.modules, "huggingface_hub", old)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    refuses(lambda: fetch(REPO), "huggingface_hub 0.36.0", REPO, "pip install -U", error=HubError)
