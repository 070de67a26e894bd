"""The model card of a saved model: README.md with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jfbfast.files import write_whole

_FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_TASK = "image-to-image"
_METHOD = "which implements [Liu, Tong and Zhao (2024)](https://arxiv.org/abs/2402.02065)"


def write_card(
    path: Path,
    kind: type[Any],
    external: Mapping[str, tuple[str, str]],
    license: str | None,
    datasets: str | Sequence[str] | None,
    metrics: Mapping[str, float] | None,
    description: str | None,
) -> None:
    """Write the card, or only the metadata of the card that is there, or nothing if none is given then.

    Args:
        path: of README.md.
        kind: the model's class; its ``card_tags`` are among the tags.
        external: the objects that whoever loads the model passes, as `description.external_objects` returns them.
        license, datasets, metrics, description: as in `Shared.save_pretrained`.

    Raises:
        ValueError: metrics without a data set.
    """
    found = path.read_text(encoding="utf-8") if path.is_file() else None
    names = [datasets] if isinstance(datasets, str) else list(datasets or ())
    if metrics and not names:
        raise ValueError(f"metrics is {dict(metrics)} with datasets={datasets!r}; it takes the data they are of")
    if found is not None and not (license or names or metrics):
        return
    front = _front_matter(kind, license, names, metrics or {})
    body = _body(kind, external, description) if found is None else _FRONT.sub("", found, count=1)
    write_whole(path, lambda partial: partial.write_text(front + body, encoding="utf-8"))


def _front_matter(kind: type[Any], license: str | None, datasets: list[str], metrics: Mapping[str, float]) -> str:
    """The metadata in YAML, by its subset JSON."""
    told: dict[str, Any] = {
        "library_name": "jfbfast",
        "pipeline_tag": _TASK,
        "tags": sorted({*kind.card_tags, "image-restoration", "jfbfast"}),
    }
    if license:
        told["license"] = license
    if datasets:
        told["datasets"] = datasets
    if metrics:
        told["metrics"] = list(metrics)
        measured = [{"type": name, "value": float(value)} for name, value in metrics.items()]
        data = {"type": datasets[-1], "name": datasets[-1]}
        result = {"task": {"type": _TASK}, "dataset": data, "metrics": measured}
        told["model-index"] = [{"name": kind.__name__, "results": [result]}]
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in told.items()]
    return "\n".join(["---", *lines, "---", ""])


def _body(cls: type[Any], external: Mapping[str, tuple[str, str]], description: str | None) -> str:
    kind = cls.__name__
    public = getattr(sys.modules.get("jfbfast"), kind, None) is cls
    passed = "".join(f", {name}=…" for name in external)
    objects = "".join(f"\n`{name}` is a `{found}`, which you pass.\n" for name, (_, found) in external.items())
    told = description or f"A `{kind}` of the Python library jfbfast, {_METHOD}."
    return f"""
# {kind}

{told}

```python
from {"jfbfast" if public else cls.__module__} import {kind}

model = {kind}.from_pretrained("…"{passed})  # this repository or directory
```
{objects}"""
