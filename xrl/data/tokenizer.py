"""The model's tokenizer, and the tokens that end an answer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xrl.config import SettingsError
from xrl.config.files import read_whole
from xrl.config.json_file import MOST_BYTES, read_json_object
from xrl.config.printable import shortened
from xrl.launch.start import without_collections

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Of what a library says: it may quote the whole file.
MAX_REASON_CHARS = 500
# What tokenizers treat differently: runs of digits and spaces, apostrophes, line ends, letters of two forms, scripts.
PROBES = (
    "Ana has 12 cakes and 650841823 boxes; it's 3.14159, isn't it? I'LL SAY SO.",
    "  def f(x):\n\treturn x**2  # two   spaces\r\n\n\n    end \n",
    "(a+b)^2 = a^2+2ab+b^2 != $\\frac{1}{2}$, <b>http://x.org/?q=1&r=2</b>_under_score\u2026 \u201cquoted\u201d",
    "caf\u00e9 cafe\u0301 \ufb01ne \u212b \u00bd \u2460 \uff21\uff22 \u017f",
    "\u6570\u5b66\u306e\u554f\u984c\u3002 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \ud55c\uad6d\uc5b4 1\u0663\u096a",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u00a0\u2003\u3000x\u200by \u0000 \u0085",
)


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a Hugging Face folder, with the tokens of its tokenizer.json; nothing is fetched from a hub.

    AutoTokenizer of transformers 5 builds some tokenizers anew by the name of their class or model, and they then cut
    text otherwise than tokenizer.json says, which the model was trained with and other engines read.

    Raises:
        SettingsError: its files are damaged, or nothing gives the tokens of tokenizer.json.
    """
    try:
        return _load_agreeing(model_dir)
    except SettingsError:
        raise
    except Exception as error:  # settings of its files that nobody looks at before, and plain Exceptions of a library
        raise SettingsError(f"the tokenizer in {model_dir} cannot be used: {_reason(error)}") from error


def _load_agreeing(model_dir: Path) -> PreTrainedTokenizerBase:
    with without_collections():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = _load(AutoTokenizer, model_dir)
    whole = model_dir / "tokenizer.json"
    if not whole.is_file():
        return tokenizer
    expected = _read_whole(whole)
    if _agree(tokenizer, expected, model_dir):
        return tokenizer
    literal = _load(PreTrainedTokenizerFast, model_dir)
    if not _agree(literal, expected, model_dir):
        raise SettingsError(
            f"{whole}: transformers cuts text into other tokens than this file says, so that other engines would give "
            f"the model other tokens: make tokenizer_config.json fit it"
        )
    logger.warning(
        "%s: tokens are those of tokenizer.json; transformers' AutoTokenizer (%s) would give others",
        *(model_dir, type(tokenizer).__name__),
    )
    return literal


def _load(loader: Any, model_dir: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # whatever the library meets in damaged files
        raise SettingsError(f"the tokenizer in {model_dir} cannot be loaded: {_reason(error)}") from error
    return tokenizer


def _reason(error: Exception) -> str:
    return shortened(" ".join(f"{type(error).__name__}: {error}".split()), MAX_REASON_CHARS)


def _read_whole(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(read_whole(file, most_bytes=MOST_BYTES).decode())
    except SettingsError:
        raise
    except Exception as error:  # the library raises plain Exceptions
        raise SettingsError(f"{file} cannot be read: {_reason(error)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _agree(tokenizer: PreTrainedTokenizerBase, expected: Tokenizer, model_dir: Path) -> bool:
    """Whether both cut the probes alike, put them together alike, and know the same tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # in Python, without a tokenizer.json of its own
        return True
    for probe in PROBES:
        token_ids = _tokens(tokenizer, probe, model_dir)
        if token_ids != expected.encode(probe, add_special_tokens=False).ids:
            return False
        # Pieces too: in a small vocabulary few of the probes' differences reach the tokens.
        if _pieces(backend, probe) != _pieces(expected, probe):
            return False
        if backend.decode(token_ids) != expected.decode(token_ids):
            return False
    return expected.get_vocab().items() <= tokenizer.get_vocab().items()  # config may add tokens of its own


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, model_dir: Path) -> list[int]:
    try:
        token_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as error:  # settings of tokenizer_config.json that nobody looks at before
        raise SettingsError(
            f"the tokenizer in {model_dir} cannot be used as tokenizer_config.json says: {_reason(error)}"
        ) from error
    return token_ids


def _pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """What the vocabulary is looked up for: the text normalised and cut."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def stop_token_ids(model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer: the generation config's, else the model config's, and the tokenizer's own."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = model_dir / name
        found = read_json_object(file).get("eos_token_id") if file.is_file() else None
        if found is not None:
            ids.update(found if isinstance(found, list) else [found])
            break
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    return tuple(sorted(ids))
