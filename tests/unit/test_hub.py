"""`load` takes a hub id where there is no such folder: the repository's files, by a stubbed download."""

import pytest

import bmojo_edge as be
from bmojo_edge import checkpoint, hub
from bmojo_edge.torch import load as load_torch
from tests.helpers import random_weights


@pytest.mark.parametrize("load", [be.load, load_torch])
def test_load_takes_a_hub_id(load, tmp_path, monkeypatch):
    config = be.Config.preset("tiny")
    checkpoint.save(tmp_path / "model", config, random_weights(config))
    asked = []

    def download(repo, revision=None, progress=None):
        asked.append(repo)
        return tmp_path / "model"

    monkeypatch.setattr(hub, "download", download)
    monkeypatch.chdir(tmp_path)
    assert load("somebody/tiny-bmojo").config == config
    assert asked == ["somebody/tiny-bmojo"]


@pytest.mark.parametrize("load", [be.load, load_torch])
def test_load_names_a_folder_that_is_not_there(load, tmp_path):
    with pytest.raises(be.CheckpointError, match="no such file or folder"):
        load(tmp_path / "absent")


def test_a_local_folder_wins_over_the_hub(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda *_, **__: pytest.fail("asked the hub"))
    assert hub.locate("owner/name").resolve() == (tmp_path / "owner" / "name").resolve()
