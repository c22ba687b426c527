# SPDX-License-Identifier: Apache-2.0
"""The README of a prompt on the Hugging Face hub: what it is, how good, how to use it."""

import json
import re
from collections.abc import Mapping
from typing import Any

from prompt_tuning.checkpoints import hub
from prompt_tuning.data.template import Template

_USE = """
```python
import prompt_tuning as pt

base = pt.load({base})
answers = pt.Predictor(base, [{name}])([{row}])
```
"""
_PEFT = """
```python
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM

base = AutoModelForSeq2SeqLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, {name})
```
"""


def of(name: str, card: Mapping[str, Any], *, peft: bool) -> str:
    """The README, with the metadata that the hub reads in front.

    Args:
      name: of the repository.
      card: the prompt's.
      peft: whether the files are in PEFT's layout.
    """
    base = card.get("base_model") or {}
    base_name = str(base.get("name") or "the model it was tuned on")
    metadata: dict[str, Any] = {"tags": ["prompt-tuning", "soft-prompt", "t5"]}
    # The hub links a base model by its own names alone.
    if "/" in base_name and re.fullmatch(hub.NAME, base_name):
        metadata["base_model"] = base_name
    if peft:
        metadata["library_name"] = "peft"
    # JSON is YAML, whatever characters a name holds.
    lines = [f"{key}: {json.dumps(value)}" for key, value in metadata.items()]
    names = {"base": json.dumps(base_name), "name": json.dumps(name)}
    task = _plain(card.get("task") or name)
    with_peft = f"\nWith PEFT:\n{_PEFT.format(**names)}" if peft else ""
    return f"""---
{chr(10).join(lines)}
---

# {"A soft prompt" if card.get("length") else "An adapter"} for {task}

{_what(card)} the frozen {_plain(base_name)}.

| | |
|---|---|
{chr(10).join(_table(card, base))}

## Use
{_USE.format(**names, row=_row(card))}{with_peft}"""


def _what(card: Mapping[str, Any]) -> str:
    """What the file holds, up to the name of the model."""
    method = f"By {_plain(card['method'])}: " if card.get("method") else ""
    if not card.get("length"):
        return f"{method}numbers that are put into the layers of"
    size = f"{card.get('length')} tuned vectors of width {card.get('width')}"
    return f"{method}{size}, to be put beside"


def _table(card: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Rows of what the card says."""
    labels = card.get("labels")
    facts = {
        "answers": ", ".join(labels) if labels else "free text",
        "template": card.get("template"),
        "placement": card.get("placement"),
        **{key: f"{value:.4g} on validation" for key, value in _metrics(card)},
        "recipe": _pairs(card.get("recipe") or {}),
        "vocabulary": card.get("vocabulary"),
        "fingerprint of the base model": base.get("fingerprint"),
        "versions": _pairs(card.get("versions") or {}),
    }
    return [f"| {key} | {_plain(value)} |" for key, value in facts.items() if value]


def _metrics(card: Mapping[str, Any]) -> list[tuple[str, float]]:
    return list((card.get("metric") or {}).items())


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _row(card: Mapping[str, Any]) -> str:
    """What a row of the prompt may look like, as Python."""
    template = card.get("template")
    columns = Template.parse(template).columns if template else ()
    if len(columns) > 1:
        return json.dumps({column: "..." for column in columns})
    return json.dumps("...")


def _plain(value: Any) -> str:
    """A value within a line of Markdown: no line ends, no cells, no tags."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)
