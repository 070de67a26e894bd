"""Published networks that are not in this installation: from the hub or its cache, or a sentence on what to do."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import huggingface_hub
import pytest

from jfbfast import DEGrad, pretrained_names
from jfbfast.models import hub, pretrained
from jfbfast.models.checkpoint import CheckpointError, save_checkpoint
from jfbfast.models.config import ModelConfig

ROOT = Path(__file__).parents[2]
PUBLISHED = ("model.safetensors", "README.md")
NAME = "small"
CONFIG = ModelConfig("filtered", {"kind": "DnCNN", "channels": 1, "features": 4, "depth": 3, "residual": True})
BY_HAND = (
    r"download https://huggingface\.co/jfbfast/small/resolve/weights-1/model\.safetensors and pass the file's path"
)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The file of a network that is published, in an installation without networks and a cache without files."""
    file = tmp_path / "published.safetensors"
    save_checkpoint(file, CONFIG.model(), CONFIG)
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(hub, "SHA256", {NAME: hashlib.sha256(file.read_bytes()).hexdigest()})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return file


def cached(published: Path, folder: Path) -> Path:
    """Put the file where huggingface_hub's own cache has it, as its download does."""
    repository = folder / "models--jfbfast--small"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / hub.REVISION).write_text("1" * 40)
    file = repository / "snapshots" / ("1" * 40) / "model.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(published.read_bytes())
    return file


@pytest.fixture
def download(published, tmp_path, monkeypatch):
    """A hub in place of the real one, with its signature, which counts downloads."""
    fake = mock.create_autospec(huggingface_hub.hf_hub_download)
    fake.side_effect = lambda *_, cache_dir, **__: str(cached(published, Path(cache_dir or tmp_path / "cache")))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    return fake


def test_a_network_is_fetched_once_and_then_taken_from_the_cache(published, download, tmp_path):
    expected = DEGrad.from_pretrained(published).state_dict()
    for _ in range(2):
        model = DEGrad.from_pretrained(NAME)
        assert all(value.equal(expected[name]) for name, value in model.state_dict().items())
    download.assert_called_once()
    assert download.call_args.args == ("jfbfast/small", "model.safetensors")
    assert download.call_args.kwargs["revision"] == "weights-1"
    DEGrad.from_pretrained(NAME, cache_dir=tmp_path / "another", local_files_only=True, token=False)
    assert download.call_args.kwargs["local_files_only"] is True and download.call_args.kwargs["token"] is False
    DEGrad.from_pretrained(NAME, force_download=True)
    assert download.call_count == 3


def test_a_network_of_the_installation_goes_before_the_hub(published, download):
    (pretrained.WEIGHTS / f"{NAME}.safetensors").write_bytes(published.read_bytes())
    pretrained.load_model(NAME)
    download.assert_not_called()


def test_a_network_that_is_not_here_is_listed_but_not_chosen_by_itself(published, download):
    assert pretrained_names() == [NAME] and pretrained.installed_names() == []
    assert pretrained.matching_name(5, 1.0, 0.01, None) is None
    download.assert_not_called()


def test_without_the_extra_a_sentence_says_what_to_do(published, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=rf"to fetch it, pip install 'jfbfast\[hub\]'; or {BY_HAND}"):
        DEGrad.from_pretrained(NAME)


def test_offline_a_sentence_says_what_to_do(published, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=rf"small is not in .*the hub does not give it \(.+\); {BY_HAND}") as told:
        DEGrad.from_pretrained(NAME)
    assert "\n" not in str(told.value)


def test_another_file_under_the_networks_name_is_refused(published, download):
    file = cached(published, published.parent / "cache")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its SHA-256 is \w+, .*delete it"):
        DEGrad.from_pretrained(NAME)


def test_the_table_has_the_files_of_this_version():
    for name in pretrained.installed_names():
        assert hashlib.sha256(pretrained.pretrained_file(name).read_bytes()).hexdigest() == hub.SHA256[name]


def test_each_network_is_published_once_with_its_card_and_its_licence(tmp_path):
    spec = importlib.util.spec_from_file_location("publish_networks", ROOT / ".github" / "publish_networks.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, licence in (("plug-and-play", "mit"), ("gaussian5-sigma1", "other")):
        api = mock.create_autospec(huggingface_hub.HfApi, instance=True)
        api.list_repo_refs.return_value = SimpleNamespace(tags=[SimpleNamespace(name="weights-0")])
        script.publish(api, pretrained.WEIGHTS, name)
        (repository, files), _ = api.create_commit.call_args
        weights, card = ({file.path_in_repo: file.path_or_fileobj for file in files}[each] for each in PUBLISHED)
        assert repository == f"jfbfast/{name}" and hashlib.sha256(weights).hexdigest() == hub.SHA256[name]
        told = huggingface_hub.ModelCard(card.decode())
        assert told.data.license == licence and told.data.library_name == "jfbfast" and f"# {name}" in told.text
        assert api.create_tag.call_args.kwargs["tag"] == hub.REVISION
        api.list_repo_refs.return_value.tags.append(SimpleNamespace(name=hub.REVISION))
        script.publish(api, pretrained.WEIGHTS, name)
        api.create_commit.assert_called_once()
    (tmp_path / "universal.safetensors").write_bytes(b"another")
    with pytest.raises(SystemExit, match=r"universal\.safetensors is not the file"):
        script.publish(api, tmp_path, "universal")
