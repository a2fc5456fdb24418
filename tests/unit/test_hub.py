import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from csm_jax import hub
from tests.support.hub_server import serve

WATERMARK = [f"{hub.WATERMARK_FOLDER}/{name}" for name in hub.WATERMARK_FILES]

DRIVER = """
import json, sys, time
from csm_jax import hub
time.sleep = lambda seconds: None  # between the client's retries
calls, out = json.loads(sys.argv[1]), {}
try:
    files = hub.locate(calls["source"])
    out["checkpoint"], out["config"] = str(files.checkpoint), str(files.config)
    for name in calls["ask"]:
        out[name] = str(getattr(files, name)())
    if calls.get("prompt"):
        out["prompt"] = str(hub.locate_prompt(calls["prompt"]))
except (hub.HubError, FileNotFoundError, ValueError) as error:
    out["error"], out["kind"] = str(error), type(error).__name__
print("RESULT" + json.dumps(out))
"""


@pytest.fixture
def server():
    with serve() as running:
        running.files = {
            "sesame/csm-1b": {
                "config.json": b"{}",
                "model.safetensors": b"weights" * 1000,
                "prompts/conversational_a.wav": b"wav",
            },
            "meta-llama/Llama-3.2-1B": {"tokenizer.json": b"official"},
            "unsloth/Llama-3.2-1B": {"tokenizer.json": b"copy"},
            "kyutai/moshiko-pytorch-bf16": {hub.MIMI: b"mimi"},
            "sony/silentcipher": {name: name.encode() for name in WATERMARK},
        }
        yield running


@pytest.fixture
def ask(tmp_path, server):
    """Runs `locate` in a fresh process, since the hub's variables are read at import."""

    def run(source="sesame/csm-1b", *ask, prompt=None, **environment):
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            **environment,
        }
        result = subprocess.run(
            [
                sys.executable,
                "-c",
                DRIVER,
                json.dumps({"source": str(source), "ask": ask, "prompt": prompt}),
            ],
            env=environment,
            capture_output=True,
            text=True,
        )
        lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
        assert lines, result.stderr
        return json.loads(lines[0].removeprefix("RESULT"))

    return run


def read(path):
    with open(path, "rb") as file:
        return file.read()


def test_everything_from_the_hub_then_offline(ask, server):
    everything = ("tokenizer", "mimi", "watermark_dir")
    out = ask("sesame/csm-1b", *everything, prompt="conversational_a")
    assert "error" not in out
    assert read(out["checkpoint"]) == b"weights" * 1000
    assert os.path.dirname(out["config"]) == os.path.dirname(out["checkpoint"])
    assert read(out["tokenizer"]) == b"official"
    assert read(out["mimi"]) == b"mimi"
    assert sorted(os.listdir(out["watermark_dir"])) == sorted(hub.WATERMARK_FILES)
    assert read(out["prompt"]) == b"wav"
    server.requests.clear()
    again = ask("sesame/csm-1b", *everything, prompt="conversational_a", HF_HUB_OFFLINE="1")
    assert again == out
    assert not server.requests


def test_codec_and_watermark_are_fetched_only_when_asked_for(ask, server):
    del server.files["kyutai/moshiko-pytorch-bf16"], server.files["sony/silentcipher"]
    out = ask("sesame/csm-1b", "tokenizer")
    assert "error" not in out
    assert not any("moshiko" in path or "silentcipher" in path for _, path in server.requests)


@pytest.mark.parametrize("token", [None, "wrong"])
def test_gated(ask, server, token):
    server.gated.add("sesame/csm-1b")
    out = ask(**({} if token is None else {"HF_TOKEN": token}))
    assert out["kind"] == "HubError"
    assert "sesame/csm-1b is gated and this account has no access" in out["error"]
    assert f"accept its conditions at {server.url}/sesame/csm-1b" in out["error"]
    assert "`hf auth login` or set HF_TOKEN" in out["error"]
    assert "model directory" in out["error"]


def test_a_token_opens_gated_repositories(ask, server):
    server.gated |= {"sesame/csm-1b", "meta-llama/Llama-3.2-1B"}
    out = ask("sesame/csm-1b", "tokenizer", HF_TOKEN="secret")
    assert read(out["tokenizer"]) == b"official"


def test_a_gated_tokenizer_is_replaced_by_its_copy(ask, server):
    server.gated.add("meta-llama/Llama-3.2-1B")
    assert read(ask("sesame/csm-1b", "tokenizer")["tokenizer"]) == b"copy"
    del server.files["unsloth/Llama-3.2-1B"]
    out = ask("sesame/csm-1b", "tokenizer", HF_HOME=os.devnull + "x")
    assert "meta-llama/Llama-3.2-1B is gated" in out["error"]
    assert "unsloth/Llama-3.2-1B cannot be had either" in out["error"]


def test_no_such_repository(ask):
    out = ask("nobody/nothing")
    assert out["kind"] == "HubError"
    assert "no repository nobody/nothing" in out["error"]
    assert "hf auth login" in out["error"]


def test_a_repository_without_a_checkpoint(ask, server):
    del server.files["sesame/csm-1b"]["model.safetensors"]
    out = ask()
    assert "has none of model.safetensors, ckpt.pt" in out["error"]


def test_shards_follow_their_index(ask, server):
    index = {"weight_map": {"a": "t-1.safetensors", "b": "t-2.safetensors"}}
    server.files["sesame/csm-1b"] = {
        "config.json": b"{}",
        "transformers.safetensors.index.json": json.dumps(index).encode(),
        "t-1.safetensors": b"1",
        "t-2.safetensors": b"2",
    }
    out = ask()
    folder = os.path.dirname(out["checkpoint"])
    assert {"t-1.safetensors", "t-2.safetensors"} <= set(os.listdir(folder))
    index["weight_map"]["b"] = "../../evil"
    server.files["sesame/csm-1b"]["transformers.safetensors.index.json"] = json.dumps(
        index
    ).encode()
    out = ask(HF_HOME=folder)
    assert out["kind"] == "ValueError"
    assert "'../../evil', which is outside its directory" in out["error"]


def test_offline_without_a_cache(ask, server):
    out = ask(HF_HUB_OFFLINE="1")
    assert (
        "config.json of sesame/csm-1b is not in the hub's cache and HF_HUB_OFFLINE is set"
        in (out["error"])
    )
    assert "`hf download sesame/csm-1b config.json` while online" in out["error"]
    assert not server.requests


def test_nobody_listens(ask):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    out = ask(HF_ENDPOINT=url)
    assert f"{url} cannot be reached" in out["error"]
    assert "check the connection and HF_ENDPOINT" in out["error"]


def test_the_hub_is_broken(ask, server):
    server.status["sesame/csm-1b"] = 500
    out = ask()
    assert out["kind"] == "HubError"
    assert "config.json of sesame/csm-1b" in out["error"]


def test_a_download_that_breaks_off_is_tried_again(ask, server):
    server.drops = 1
    out = ask()
    assert read(out["checkpoint"]) == b"weights" * 1000
    assert server.drops == 0
    gets = [path for method, path in server.requests if method == "GET"]
    assert sum("model.safetensors" in path for path in gets) == 2


def test_a_download_that_keeps_breaking_off(ask, server, tmp_path):
    server.drops, server.drop_after = 100, 10
    out = ask(HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert out["kind"] == "HubError"
    assert "downloading model.safetensors of sesame/csm-1b broke off" in out["error"]
    assert "run the same command again" in out["error"]
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if "model.saf" in name]


# --- directories -------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "model"
    folder = path / "silentcipher" / hub.WATERMARK_FOLDER
    folder.mkdir(parents=True)
    for name in hub.WATERMARK_FILES:
        (folder / name).touch()
    for name in ("config.json", "model.safetensors", "tokenizer.json", hub.MIMI):
        (path / name).touch()
    (path / "prompts").mkdir()
    (path / "prompts" / "a.wav").touch()
    return path


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args):
        raise AssertionError(f"asked the hub for {args}")

    monkeypatch.setattr(hub, "_fetch", fail)


@pytest.mark.parametrize("as_text", [True, False])
def test_a_whole_directory(directory, no_network, as_text):
    files = hub.locate(str(directory) if as_text else directory)
    assert files.checkpoint == directory / "model.safetensors"
    assert files.config == directory / "config.json"
    assert files.tokenizer() == directory / "tokenizer.json"
    assert files.mimi() == directory / hub.MIMI
    assert files.watermark_dir() == directory / "silentcipher" / hub.WATERMARK_FOLDER
    assert files.prompts_dir == directory / "prompts"
    assert hub.locate_watermark(directory) == files.watermark_dir()
    assert hub.locate_prompt("a", directory) == directory / "prompts" / "a.wav"
    with pytest.raises(FileNotFoundError, match=r"has no prompts/b\.wav"):
        hub.locate_prompt("b", directory)


def test_the_demo_is_in_the_package(directory, no_network, monkeypatch, tmp_path):
    inside = hub.local_path("demo")
    assert inside == Path(hub.__file__).parent / "demo_voice"
    (tmp_path / "demo").symlink_to(directory)
    monkeypatch.chdir(tmp_path)
    assert hub.local_path("demo") == inside  # whatever lies around
    assert hub.local_path("./demo") == Path("demo")
    assert not hub.is_watermarked("demo")
    assert hub.is_watermarked("./demo")
    with pytest.raises(FileNotFoundError, match="without a watermark"):
        hub.locate_watermark("demo")


def test_a_vocabulary(directory, no_network):
    assert hub.locate(directory).vocabulary() is None
    (directory / hub.VOCABULARY).write_text("one\ntwo\n")
    assert hub.locate(directory).vocabulary() == {"one", "two"}


def test_an_empty_directory_lists_everything(tmp_path, no_network):
    with pytest.raises(FileNotFoundError, match="lacks:") as info:
        hub.locate(tmp_path)
    message = str(info.value)
    for name in ("model.safetensors", "config.json", "tokenizer.json", hub.MIMI, *WATERMARK):
        assert name in message
    assert f"hf download sesame/csm-1b config.json --local-dir {tmp_path}" in message
    assert f"hf download unsloth/Llama-3.2-1B tokenizer.json --local-dir {tmp_path}" in message
    assert message.count("hf download sony/silentcipher") == 1


@pytest.mark.parametrize(
    ("missing", "ask"),
    [
        ("tokenizer.json", "tokenizer"),
        (hub.MIMI, "mimi"),
        (f"silentcipher/{WATERMARK[2]}", "watermark_dir"),
    ],
)
def test_optional_files_are_missed_only_when_asked_for(directory, no_network, missing, ask):
    (directory / missing).unlink()
    files = hub.locate(directory)
    for name in {"tokenizer", "mimi", "watermark_dir"} - {ask}:
        getattr(files, name)()
    with pytest.raises(FileNotFoundError, match="lacks:") as info:
        getattr(files, ask)()
    assert missing in str(info.value)
    assert str(info.value).count("hf download") == 1


def test_a_missing_shard(directory, no_network):
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"a": "t-1.safetensors", "b": "t-2.safetensors"}}
    (directory / "transformers.safetensors.index.json").write_text(json.dumps(index))
    (directory / "t-1.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"t-2\.safetensors \(part of") as info:
        hub.locate(directory)
    assert "t-1.safetensors" not in str(info.value)
    (directory / "t-2.safetensors").touch()
    assert hub.locate(directory).checkpoint.name == "transformers.safetensors.index.json"


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {"a": "/etc/x"}}',
        '{"weight_map": {"a": ".."}}',
    ],
)
def test_a_bad_index(directory, no_network, content):
    (directory / "model.safetensors").unlink()
    (directory / "transformers.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json (is not an index|names the file)"):
        hub.locate(directory)


def test_an_orbax_checkpoint_in_a_directory(directory, no_network):
    (directory / "model.safetensors").unlink()
    (directory / "config.json").unlink()
    (directory / "params").mkdir()
    with pytest.raises(FileNotFoundError, match="checkpoint; or"):
        hub.locate(directory)
    (directory / "params" / "_METADATA").touch()
    files = hub.locate(directory)
    assert files.checkpoint == directory / "params"
    assert files.config is None
    files = hub.locate(directory / "params")  # the same, given directly
    assert files.checkpoint == directory / "params"
    assert files.tokenizer() == directory / "tokenizer.json"


def test_a_bare_checkpoint_takes_what_lies_beside_it(directory, no_network):
    (directory / "finetuned.pt").touch()
    files = hub.locate(directory / "finetuned.pt")
    assert files.checkpoint == directory / "finetuned.pt"
    assert files.config == directory / "config.json"
    assert files.mimi() == directory / hub.MIMI
    assert files.watermark_dir() == directory / "silentcipher" / hub.WATERMARK_FOLDER


def test_a_bare_checkpoint_gets_the_rest_from_the_hub(tmp_path, ask):
    (tmp_path / "ckpt.pt").touch()
    out = ask(tmp_path / "ckpt.pt", "tokenizer", "mimi", "watermark_dir")
    assert out["checkpoint"] == str(tmp_path / "ckpt.pt")
    assert out["config"] == "None"  # the checkpoint's shapes tell the sizes of CSM-1B
    assert read(out["mimi"]) == b"mimi"


@pytest.mark.parametrize("ask", [hub.locate, hub.locate_config, hub.locate_watermark])
@pytest.mark.parametrize(
    "source", ["./nowhere", "/nowhere/at/all", "a/b/c", "", "nowhere", "missing.safetensors"]
)
def test_neither_path_nor_id(ask, source, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no model at '{source}'"):
        ask(source)


@pytest.mark.parametrize("ask", [hub.locate, hub.locate_config, hub.locate_watermark])
def test_a_file_that_is_no_checkpoint(ask, directory, no_network):
    (directory / "ok.wav").touch()
    for source in (directory / "ok.wav", os.devnull):
        with pytest.raises(ValueError, match=r"unknown kind of file; known endings are \.safetens"):
            ask(source)
    (directory / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is not an index"):
        ask(directory / "config.json")


def test_the_endings_are_those_that_load(tmp_path):
    from csm_jax.weights.opening import open_source

    with pytest.raises(ValueError, match="unknown kind of file") as info:
        open_source(tmp_path / "a.wav")
    assert str(info.value).endswith(f"known endings are {', '.join(hub.CHECKPOINT_SUFFIXES)}")


def test_the_config_and_the_watermark_alone(directory, no_network):
    # Of a directory, a file in it, or an orbax directory in it.
    (directory / "params").mkdir()
    (directory / "params" / "_METADATA").touch()
    for source in (directory, directory / "model.safetensors", directory / "params"):
        assert hub.locate_config(source) == directory / "config.json"
        expected = directory / "silentcipher" / hub.WATERMARK_FOLDER
        assert hub.locate_watermark(source) == expected


@pytest.mark.parametrize("sharded", [False, True])
def test_a_codec_inside_the_checkpoint_is_not_missed(directory, no_network, sharded):
    from safetensors.numpy import save_file

    tensors = {"codec_model.a": np.zeros(1, np.float32), "lm_head.weight": np.zeros(1, np.float32)}
    (directory / "tokenizer.json").unlink()
    (directory / hub.MIMI).unlink()
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "model.safetensors")
    if sharded:
        (directory / "model.safetensors").rename(directory / "t-1.safetensors")
        index = {"weight_map": dict.fromkeys(tensors, "t-1.safetensors")}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    files = hub.locate(directory)
    with pytest.raises(FileNotFoundError) as info:
        files.tokenizer()
    assert hub.MIMI not in str(info.value)
    with pytest.raises(FileNotFoundError, match=hub.MIMI):
        files.mimi()  # asked for all the same: by the bridge, which reads moshi's file only


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x02" + bytes(7) + b"[]"])
def test_a_damaged_checkpoint_brings_no_codec(directory, no_network, content):
    (directory / "tokenizer.json").unlink()
    (directory / hub.MIMI).unlink()
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(FileNotFoundError, match=hub.MIMI):
        hub.locate(directory).tokenizer()
