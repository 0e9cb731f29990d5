"""What a run says about its machine."""

from __future__ import annotations

import json
import subprocess

import torch

from xrl.metrics.environment import chosen_variables, git_state, package_versions, write_environment


def test_environment_file_names_versions_machine_and_command(tmp_path):
    path = tmp_path / "environment.json"
    write_environment(path)
    environment = json.loads(path.read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["devices"]
    assert {"python", "host", "command_line", "variables", "git"} <= environment.keys()


def test_versions_name_only_what_is_installed():
    assert "torch" in package_versions()
    assert all(package_versions().values())


def test_secrets_in_the_environment_stay_there():
    environ = {
        "OMP_NUM_THREADS": "2",
        "HF_TOKEN": "hf_x",
        "SLURM_JWT": "eyJ",
        "SLURM_JOB_ID": "7",
        "WANDB_API_KEY": "k",
    }
    assert chosen_variables(environ) == {"OMP_NUM_THREADS": "2", "SLURM_JOB_ID": "7"}


def test_git_state_is_that_of_the_checkout_itself(tmp_path):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    state = git_state(tmp_path)
    assert state is not None
    assert len(state["commit"]) == 40
    assert state["modified"] is False
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == {"commit": state["commit"], "modified": True}
    (tmp_path / "inside").mkdir()
    assert git_state(tmp_path / "inside") is None  # somebody else's repository around an installed package


def test_a_command_line_with_a_name_that_is_not_utf8_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["python", "xrl", "--data", "d\udce9mo.jsonl"])
    write_environment(tmp_path / "environment.json")
    assert json.loads((tmp_path / "environment.json").read_text())["command_line"][2] == "d\udce9mo.jsonl"
