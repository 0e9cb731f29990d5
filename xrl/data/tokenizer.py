"""The model's tokenizer, and the tokens that end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from xrl.config import SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a Hugging Face folder; nothing is fetched from a hub.

    Raises:
        SettingsError: its files are damaged.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # whatever the library meets in damaged files
        reason = " ".join(str(error).split())
        raise SettingsError(
            f"the tokenizer in {model_dir} cannot be loaded: {type(error).__name__}: {reason}"
        ) from error
    return tokenizer


def stop_token_ids(model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer: the generation config's, else the model config's, and the tokenizer's own."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = model_dir / name
        found = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        if found is not None:
            ids.update(found if isinstance(found, list) else [found])
            break
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    return tuple(sorted(ids))
