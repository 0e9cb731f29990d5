"""`xrl convert`: bit for bit there and back, whole or not at all, a tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_models import make_checkpoint
from xrl.cli import main
from xrl.config import SettingsError
from xrl.files.atomic_folder import atomic_folder
from xrl.weights.convert import open_source

ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"


def convert(*arguments: object) -> int:
    """The exit code of `xrl convert`."""
    with pytest.raises(SystemExit) as end:
        main(["convert", *map(str, arguments)])
    return int(end.value.code or 0)


def layout_flags(tensor: int = 1, pipeline: int = 1, **others: int) -> list[str]:
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, **others}
    return [part for name, size in sizes.items() for part in (f"--{name.replace('_', '-')}", str(size))]


LAYOUTS = {
    "single": layout_flags(),
    "tp2 x pp4": layout_flags(2, 4),
    "vpp": layout_flags(1, 2, virtual_pipeline_model_parallel_size=2),
    "given stages": layout_flags(2, 2, decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=4),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Qwen2 of five layers, in several files, its vocabulary odd."""
    folder = tmp_path_factory.mktemp("dense") / "hf"
    return make_checkpoint(folder, family="qwen2", vocab_size=99, num_hidden_layers=5, max_shard_bytes=200_000)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied DeepSeek-V3 in bf16, but for the routers' biases."""
    folder = make_checkpoint(tmp_path_factory.mktemp("sparse") / "hf", family="deepseek_v3", tied=False)
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if not name.endswith("e_score_correction_bias"):
            tensors[name] = tensor.bfloat16()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_weights(left: Path, right: Path) -> None:
    expected, found = contents(left), contents(right)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_is_the_same_folder(layout: str, dense: Path, tmp_path: Path) -> None:
    assert convert("--from", dense, "--to", tmp_path / "megatron", *LAYOUTS[layout]) == 0
    assert convert("--from", tmp_path / "megatron", "--to", tmp_path / "back") == 0
    assert_same_weights(dense, tmp_path / "back")
    others = {path.name for path in dense.iterdir() if not path.name.startswith("model")}
    assert {path.name for path in (tmp_path / "back").iterdir()} == others | {WEIGHTS}
    for name in others:
        assert (tmp_path / "back" / name).read_bytes() == (dense / name).read_bytes()


def test_experts_are_spread_and_number_formats_kept(sparse: Path, tmp_path: Path) -> None:
    flags = layout_flags(2, 2, expert_model_parallel_size=2)
    assert convert("--from", sparse, "--to", tmp_path / "megatron", *flags) == 0
    files = sorted(path.parent.name for path in tmp_path.glob("megatron/release/*/model_optim_rng.pt"))
    assert files == [f"mp_rank_{t:02d}_{p:03d}_{e:03d}" for t in (0, 1) for p in (0, 1) for e in (0, 1)]
    # From one layout straight to another, with the layers as transformer-engine names them, then back.
    flags = [*layout_flags(4, 1), "--transformer-impl", "transformer_engine"]
    assert convert("--from", tmp_path / "megatron", "--to", tmp_path / "other", *flags) == 0
    assert convert("--from", tmp_path / "other", "--to", tmp_path / "back") == 0
    assert_same_weights(sparse, tmp_path / "back")


def test_the_way_back_loads_in_transformers(dense: Path, tmp_path: Path) -> None:
    convert("--from", dense, "--to", tmp_path / "megatron", *LAYOUTS["tp2 x pp4"])
    convert("--from", tmp_path / "megatron", "--to", tmp_path / "back")
    expected, found = (AutoModelForCausalLM.from_pretrained(folder) for folder in (dense, tmp_path / "back"))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    assert AutoTokenizer.from_pretrained(tmp_path / "back").get_vocab()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_check_goes_there_and_back_in_memory(
    kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = request.getfixturevalue(kind)
    flags = layout_flags(2, 2, **({"expert_model_parallel_size": 4} if kind == "sparse" else {}))
    assert convert("--check", "--from", folder, *flags) == 0
    assert f"{len(contents(folder))} tensors, all equal, bit by bit" in capsys.readouterr().out


def test_check_reports_every_tensor_that_differs(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert("--from", dense, "--to", tmp_path / "megatron", *LAYOUTS["tp2 x pp4"])
    changed = tmp_path / "changed"
    convert("--from", tmp_path / "megatron", "--to", changed)
    assert convert("--check", "--from", tmp_path / "megatron", "--to", changed) == 0
    tensors = load_file(changed / WEIGHTS)
    up, norm = "model.layers.3.mlp.up_proj.weight", "model.norm.weight"
    tensors[up].view(torch.int32)[5, 7] ^= 1  # one bit
    tensors[norm] = tensors[norm].bfloat16()
    save_file(tensors, changed / WEIGHTS, metadata={"format": "pt"})
    capsys.readouterr()
    assert convert("--check", "--from", tmp_path / "megatron", "--to", changed) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines[:-1]) == [
        f"differs: {up} differs in 1 of 6,144 numbers",
        f"differs: {norm} is float32 [64] in one and bfloat16 [64] in the other",
    ]
    assert lines[-1].endswith("tensors, 2 differ")


def test_check_finds_copies_that_disagree(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A norm that tensor ranks both hold, a tied head, padding: no tensor of the way back would show it."""
    folder = tmp_path / "megatron"
    convert("--from", dense, "--to", folder, *layout_flags(2, 2))
    file = folder / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["model"]["decoder.final_layernorm.weight"][0] += 1
    content["model"]["output_layer.weight"][-1] = 1  # the hundredth row of 99
    torch.save(content, file)
    capsys.readouterr()
    assert convert("--check", "--from", folder) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [
        "differs: decoder.final_layernorm.weight in release/mp_rank_01_001/model_optim_rng.pt",
        "differs: output_layer.weight in release/mp_rank_01_001/model_optim_rng.pt",
    ]


def edited(folder: Path, source: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a folder in one file, with tensors replaced, added, or (None) left out."""
    folder.mkdir()
    for path in source.iterdir():
        if not path.name.startswith("model"):
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = {**contents(source), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)
    return folder


def test_bad_input_is_one_sentence_before_a_file_is_touched(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    missing = edited(tmp_path / "missing", dense, **{q_proj: None})
    unknown = edited(tmp_path / "unknown", dense, **{"model.layers.5.x.weight": torch.zeros(1)})
    mixed = edited(tmp_path / "mixed", dense, **{q_proj: contents(dense)[q_proj].bfloat16()})
    int8 = edited(tmp_path / "int8", dense, **{"model.norm.weight": torch.zeros(64, dtype=torch.int8)})
    cut = edited(tmp_path / "cut", dense)
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-100])
    other_model = edited(tmp_path / "gpt2", dense)
    config = json.loads((other_model / "config.json").read_text())
    (other_model / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    index = edited(tmp_path / "index", dense)
    (index / WEIGHTS).unlink()
    (index / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": 1}}))
    file = tmp_path / "file"
    file.touch()
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    target = tmp_path / "target"
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in (
        (["--from", dense, "--to", file / "x"], "file is no folder that can be written to"),
        (["--from", dense, "--to", dangling], "exists already"),
        (["--from", index, "--to", target], "has no weight_map from tensors to files"),
        (["--from", tmp_path / "nothing", "--to", target], "does not exist"),
        (["--from", tmp_path, "--to", target], "has neither config.json"),
        (["--from", dense], "--to is missing"),
        (["--from", dense, "--to", missing], "exists already"),
        (["--from", dense, "--to", target, *layout_flags(4)], "does not divide the model's 2 key/value heads"),
        (["--from", dense, "--to", target, *layout_flags(1, 6)], "5 layers are too few for 6 pipeline chunks"),
        (["--from", dense, "--to", target, *layout_flags(0)], "tensor_size must be >= 1, got 0"),
        (["--from", dense, "--to", target, "--tensor-model-parallel-size", "two"], "invalid int value: 'two'"),
        (["--from", missing, "--to", target], f"tensor {q_proj} is missing"),
        (["--from", unknown, "--to", target], "tensor model.layers.5.x.weight has no place in Qwen2ForCausalLM"),
        (["--from", mixed, "--to", target, *layout_flags(2)], "one number format is needed"),
        (["--from", int8, "--to", target], "model.norm.weight has number format I8"),
        (["--from", cut, "--to", target], "missing, truncated or corrupt"),
        (["--from", other_model, "--to", target], "GPT2LMHeadModel is not supported"),
        (["--check", "--from", dense, "--to", missing, *layout_flags(2)], "leave out --to or the layout flags"),
    ):
        assert convert(*arguments) == 2, arguments
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("xrl: error: ") and words in error, error
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_megatron_checkpoint_is_refused(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "megatron"
    convert("--from", dense, "--to", folder, *layout_flags(2))
    file = folder / "release" / "mp_rank_01" / "model_optim_rng.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(SettingsError, match="mp_rank_01/model_optim_rng.pt is missing, truncated or corrupt"):
        open_source(folder)
    file.write_bytes(b"")  # what a full disk leaves
    with pytest.raises(SettingsError, match="mp_rank_01/model_optim_rng.pt is missing, truncated or corrupt"):
        open_source(folder)
    for content, options in (([1], {}), ({"model": {"a": torch.ones(1)}}, {"_use_new_zipfile_serialization": False})):
        torch.save(content, file, **options)
        with pytest.raises(SettingsError, match="mp_rank_01/model_optim_rng.pt is missing, truncated or corrupt"):
            open_source(folder)
    file.write_bytes((folder / "release" / "mp_rank_00" / "model_optim_rng.pt").read_bytes())
    content = torch.load(file, weights_only=False)
    del content["model"]["decoder.final_layernorm.weight"]
    torch.save(content, file)
    with pytest.raises(SettingsError, match=r"decoder\.final_layernorm\.weight is missing, shape \[64\] is needed"):
        open_source(folder)


def test_damaged_manifest_is_one_sentence(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "megatron"
    convert("--from", dense, "--to", folder, *layout_flags(2))
    file = folder / "xrl_manifest.json"
    whole = json.loads(file.read_text())
    layout = whole["layout"]
    changes = [
        *({"layout": other} for other in (5, None, {}, layout | {"new": 1})),
        *({"layout": layout | {"tensor_size": size}} for size in ("2", True, 2.0, -1, 0, 10**400, [2])),
        *({"format": other} for other in ("\x1b[2J", 10**400)),
        {"architecture": ["x"]},
    ]
    for change in changes:
        file.write_text(json.dumps(whole | change))
        with pytest.raises(SettingsError) as caught:
            open_source(folder)
        assert str(caught.value).startswith(str(file)) and str(caught.value).isprintable()
    for content in (b"", b"[" * 100_000, b"\xff\xfe", b'{"format": 1, "format": 1}'):
        file.write_bytes(content)
        with pytest.raises(SettingsError, match="xrl_manifest.json"):
            open_source(folder)


@pytest.mark.parametrize("pattern", ["*.safetensors", "config.json"])
def test_pipes_are_not_waited_for(dense: Path, tmp_path: Path, pattern: str) -> None:
    folder = Path(shutil.copytree(dense, tmp_path / "hf"))
    file = sorted(folder.glob(pattern))[0]
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(SettingsError):
        open_source(folder)


def test_pipe_in_place_of_a_rank_s_file_is_not_waited_for(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "megatron"
    convert("--from", dense, "--to", folder, *layout_flags(2))
    file = folder / "release" / "mp_rank_01" / "model_optim_rng.pt"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(SettingsError, match="mp_rank_01/model_optim_rng.pt is missing, truncated or corrupt"):
        open_source(folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 MB, no tensor above 2 MB."""
    folder = make_checkpoint(
        tmp_path_factory.mktemp("large") / "hf", num_hidden_layers=1, hidden_size=512, intermediate_size=1024
    )
    config = json.loads((folder / "config.json").read_text())
    layers = 24
    (folder / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers})
    )
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if ".layers.0." in name]:
        tensors |= {name.replace(".0.", f".{layer}."): tensors[name] + layer for layer in range(1, layers)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


# Runs a conversion and prints by how many bytes its anonymous memory (what is no file) grew at most; a first one, of a
# tiny model, has then done the imports.
WATCHED = """
import re, sys, threading, time
from xrl.cli import main

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

def convert(*arguments):
    try:
        main(["convert", *arguments])
    except SystemExit as end:
        assert not end.code

tiny, out, *arguments = sys.argv[1:]
convert("--from", tiny, "--to", out + "/megatron")
convert("--from", out + "/megatron", "--to", out + "/back")
peak = start = anonymous()
threading.Thread(target=watch, daemon=True).start()
convert(*arguments)
print(peak - start)
"""


@pytest.mark.slow
def test_conversion_holds_a_few_tensors_at_a_time(large: Path, dense: Path, tmp_path: Path) -> None:
    """A tenth of the model would show."""
    limit = (large / WEIGHTS).stat().st_size / 10
    assert limit > 15e6

    def grown_bytes(*arguments: object) -> int:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        out = tmp_path / f"first-{len(list(tmp_path.iterdir()))}"
        command = [sys.executable, "-c", WATCHED, *map(str, (dense, out, *arguments))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return int(done.stdout.splitlines()[-1])

    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert grown_bytes("--from", large, "--to", megatron, *layout_flags(2, 2)) < limit
    assert grown_bytes("--from", megatron, "--to", back) < limit
    assert grown_bytes("--check", "--from", large, "--to", back) < limit


def test_a_source_under_the_name_of_unfinished_work_is_spared(dense: Path, tmp_path: Path) -> None:
    source = edited(tmp_path / ".target.partial", dense)
    before = {path: path.read_bytes() for path in source.iterdir()}
    assert convert("--from", source, "--to", tmp_path / "target") == 2
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    assert not (tmp_path / "target").exists()


def test_two_conversions_to_one_folder_do_not_mix(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "target") as partial:
        (partial / "mine").touch()
        with pytest.raises(FileExistsError, match="another process writes"), atomic_folder(tmp_path / "target"):
            pass
        assert (partial / "mine").exists()
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["mine"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(dense: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); from xrl.cli import main; main(sys.argv[1:])"
    )
    for flags in ([], layout_flags(2)):
        arguments = ["convert", "--from", str(dense), "--to", str(tmp_path / "target"), *flags]
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr and "target cannot be written: " in done.stderr.splitlines()[-1]
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("back", [False, True], ids=["to Megatron", "to Hugging Face"])
def test_killed_conversion_leaves_nothing_that_loads(back: bool, large: Path, tmp_path: Path) -> None:
    source, target = large, tmp_path / "target"
    if back:
        source = tmp_path / "megatron"
        assert convert("--from", large, "--to", source) == 0
    command = [sys.executable, "-m", "xrl.cli", "convert", "--from", str(source), "--to", str(target)]
    command += [] if back else layout_flags(2, 2)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    partial = tmp_path / ".target.partial"
    while process.poll() is None and not any(partial.rglob("*.*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not target.exists() and partial.exists()
    with pytest.raises(SettingsError, match=r"has neither config\.json"):
        open_source(partial)
    # The next try is not hindered.
    assert convert(*command[4:]) == 0
    assert not partial.exists()
    assert convert("--check", "--from", source, "--to", target) == 0
