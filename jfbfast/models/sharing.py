"""Models as directories and as repositories of the Hugging Face hub.

They hold ``config.json``, ``model.safetensors`` and ``README.md``, which huggingface_hub's PyTorchModelHubMixin writes
too. The three methods of `Shared` are named as in that mixin. They are our own because the mixin keeps only arguments
that JSON can hold, and a model here is made of modules; and because importing it takes a tenth of the time that
importing torch takes. Only the hub itself needs huggingface_hub.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from torch import nn

from jfbfast import checks
from jfbfast.files import write_whole
from jfbfast.models.card import write_card
from jfbfast.models.checkpoint import CheckpointError, check_finite, digest
from jfbfast.models.config import ModelConfig
from jfbfast.models.description import Described, describe, external_objects
from jfbfast.models.directory import CONFIG_FILE, FORMAT, WEIGHTS_FILE, check_class, load_directory
from jfbfast.models.hub import client
from jfbfast.models.pretrained import load_model, pretrained_names

M = TypeVar("M", bound="Shared")

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Shared(Described):
    """A module that can be saved, loaded and shared: ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    Attributes:
        trained_noise: the standard deviation on [−1, 1] of the noise that the model was trained for. It is saved for
            the command line, which takes None, unknown, for 0.01.
    """

    trained_noise: float | None = None
    card_tags: tuple[str, ...] = ("denoising",)  # what models of this class do, for the hub

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        license: str | None = None,
        datasets: str | Sequence[str] | None = None,
        metrics: Mapping[str, float] | None = None,
        description: str | None = None,
    ) -> None:
        """Write the model into a directory, for `from_pretrained`.

        ``config.json`` describes the model: its class and arguments, those of its networks, of A, of the solver and of
        the gradient method. An object that is not of this package, such as your own denoiser, is named there, and
        whoever loads the model passes one like it. Nothing is pickled.

        ``README.md`` is the model card. If there is one, its text stays, and its metadata too if none is given here.

        Args:
            directory: made if it does not exist; files of an earlier save are replaced.
            license: of the weights, such as "mit" (the hub's names).
            datasets: name or names of the data that the model was trained on.
            metrics: such as ``{"psnr": 34.0}``, measured on the last of ``datasets``.
            description: what the model is for, in Markdown, for a new card.

        Raises:
            ValueError: a weight that is not finite; a constructor that got arguments without a name; two missing
                objects of one name; metrics without a data set.

        Example:
            >>> import tempfile, torch, jfbfast
            >>> red = jfbfast.RED(jfbfast.UNet(1, features=(4,), blocks=(1,)), filter_damping="weight")
            >>> model = jfbfast.DEGrad(jfbfast.GaussianBlur(sigma=2.0), red, preconditioner="exact").eval()
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     model.save_pretrained(directory, license="mit", datasets="my/photographs", metrics={"psnr": 34.0})
            ...     loaded = jfbfast.DEGrad.from_pretrained(directory)
            >>> d = torch.rand(1, 1, 16, 16)
            >>> torch.equal(model(d), loaded(d)), loaded.blur.sigma
            (True, (2.0, 2.0))
        """
        config, tensors = describe(self)
        external = external_objects(config)
        assert isinstance(self, nn.Module)
        for name, value in self.state_dict().items():
            tensors[name] = value.detach().cpu().clone().contiguous()  # tied weights must not share memory in a file
            check_finite("model", name, tensors[name])
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        header = {"format": "pt", "digest": digest(FORMAT, tensors)}
        content = safetensors.torch.save(tensors, header)
        whole: dict[str, Any] = {"format": FORMAT, "model": config}
        if self.trained_noise is not None:
            whole["trained_noise"] = float(self.trained_noise)
        told = json.dumps(whole, indent=2, allow_nan=False, ensure_ascii=False)
        write_card(folder / CARD, type(self), external, license, datasets, metrics, description)
        write_whole(folder / WEIGHTS_FILE, lambda partial: partial.write_bytes(content))
        write_whole(folder / CONFIG_FILE, lambda partial: partial.write_text(told + "\n", encoding="utf-8"))

    @classmethod
    def from_pretrained(
        cls: type[M],
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **objects: Any,
    ) -> M:
        """Load a model, in eval(): from a directory, a file, the hub, or a published one by its name.

        Args:
            name: a directory that `save_pretrained` wrote; a file that `jfbfast train` wrote, or its directory; one of
                `jfbfast.pretrained_names`; or "user/model" on the Hugging Face hub. The hub, which also has the
                named models that are not in this installation, takes ``pip install 'jfbfast[hub]'``. What lies on
                this machine goes before the hub.
            revision, token, cache_dir, force_download, local_files_only: as in huggingface_hub's snapshot_download.
                With local_files_only, or the variable HF_HUB_OFFLINE=1, only what was downloaded before is used.
            objects: what the model has of other libraries, such as ``denoiser=my_network``; its weights are loaded.

        Raises:
            CheckpointError: none of these (the message lists the names); a damaged model, or one with another
                class; objects missing, or that it does not take.
            ModuleNotFoundError: the hub without huggingface_hub.
        """
        options = {"revision": revision, "token": token, "cache_dir": cache_dir}
        flags = {"force_download": force_download, "local_files_only": local_files_only}
        return load_shared(cls, name, objects, {**options, **flags})[0]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        datasets: str | Sequence[str] | None = None,
        metrics: Mapping[str, float] | None = None,
        description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        commit_message: str = "Upload a model of jfbfast",
    ) -> str:
        """Upload the model to the Hugging Face hub, as `save_pretrained` writes it.

        The text of a card that the repository already has stays.

        Args:
            repo_id: "user/model"; the repository is made if it does not exist.
            license, datasets, metrics, description: as in `save_pretrained`.
            private: of a new repository; None for what is usual for the user.
            token: of the hub; None for the one that ``hf auth login`` stored.
            branch, create_pr, commit_message: as in huggingface_hub's upload_folder.

        Returns:
            The address of the commit.

        Raises:
            ValueError: as in `save_pretrained`.
            ModuleNotFoundError: huggingface_hub is not installed.
        """
        api = client().HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if api.file_exists(repo_id, CARD):
                shutil.copyfile(api.hf_hub_download(repo_id, CARD), Path(folder) / CARD)
            self.save_pretrained(folder, license=license, datasets=datasets, metrics=metrics, description=description)
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=branch, create_pr=create_pr, commit_message=commit_message
            )
        return str(done)


def load_shared(
    cls: type[M], name: str | Path, objects: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[M, ModelConfig | None]:
    """`Shared.from_pretrained`, and the settings of a model that ships or that `jfbfast train` wrote."""
    path, config = Path(name), None
    on_hub = str(name) not in pretrained_names() and not path.exists() and _HUB_ID.fullmatch(str(name))
    if on_hub and path.suffix != ".safetensors":
        path = _downloaded(str(name), options)
    if (path / CONFIG_FILE).is_file():
        return load_directory(path, cls, objects), None
    model, config = load_model(name if path == Path(name) else path, options)
    if objects:
        raise CheckpointError(f"{name}: it takes no {', '.join(objects)}; it has all that its settings name")
    check_class(str(name), model, cls, f"{config.form} network")
    return model, config


def _downloaded(repo_id: str, options: Mapping[str, Any]) -> Path:
    """The directory of a model of the hub on this machine."""
    hub = client()
    try:
        return Path(hub.snapshot_download(repo_id, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], **options))
    except (OSError, ValueError) as error:  # huggingface_hub's errors derive from these
        names = ", ".join(pretrained_names())
        told = f"name is {repo_id!r}, which is no file here, and the hub does not give it ({checks.one_line(error)})"
        raise CheckpointError(f"{told}; the published models are {names}") from error
