"""Publish each network and its card on the Hugging Face hub, under the tag from which this version fetches it.

python .github/publish_networks.py jfbfast/weights        # takes HF_TOKEN; what the tag has already stays as it is
"""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from jfbfast.models.directory import WEIGHTS_FILE
from jfbfast.models.hub import ORGANISATION, REVISION, SHA256

FREE, FACES = "mit", "other\nlicense_name: non-commercial-research"
LICENSES = {name: FACES if name.startswith("gaussian5") else FREE for name in SHA256}  # those of README's table
HEAD = """---
library_name: jfbfast
pipeline_tag: image-to-image
license: {}
tags: [deblurring, image-restoration, jfbfast]
---
"""


def publish(api: HfApi, weights: Path, name: str) -> None:
    repository, file = f"{ORGANISATION}/{name}", (weights / f"{name}.safetensors").read_bytes()
    if sha256(file).hexdigest() != SHA256[name]:
        sys.exit(f"{name}.safetensors is not the file that jfbfast.models.hub names")
    api.create_repo(repository, exist_ok=True)
    if any(tag.name == REVISION for tag in api.list_repo_refs(repository).tags):
        print(f"{repository} has the tag {REVISION} already")
        return
    card = HEAD.format(LICENSES[name]) + (weights / f"{name}.md").read_text(encoding="utf-8")
    files = [CommitOperationAdd(WEIGHTS_FILE, file), CommitOperationAdd("README.md", card.encode())]
    done = api.create_commit(repository, files, commit_message=f"The network {name} as of {REVISION}")
    api.create_tag(repository, tag=REVISION, revision=done.oid)
    print(f"{repository}: published as {REVISION}")


def main() -> None:
    for name in SHA256:
        publish(HfApi(), Path(sys.argv[1]), name)


if __name__ == "__main__":
    main()
