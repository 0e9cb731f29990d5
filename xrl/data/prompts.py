"""Training and evaluation prompts: tokenised once, shuffled anew each epoch, with a cursor that can be saved."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from xrl.config import Settings, SettingsError
from xrl.data.cpu_limit import CpuLimit
from xrl.data.rows import PromptRow, load_rows
from xrl.data.text import check_text
from xrl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Of computing, for one prompt: a template that takes longer than this does not end.
TEMPLATE_LIMIT_S = 1.0
# Prompts handed to the tokenizer at once: enough to keep its threads busy.
TOKENIZER_BATCH = 1024


class PromptDataset:
    """Prompts of one file, drawn batch by batch through any number of epochs."""

    def __init__(
        self,
        path: Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_length: int,
        seed: int,
        shuffle: bool,
        most_rows: int | None = None,
    ) -> None:
        """
        Args:
            path: JSONL or parquet file; see `xrl.data.rows` for its rows.
            max_prompt_length: in tokens; longer prompts are dropped and counted in `num_dropped`.
            seed: of the order; an epoch's order depends on the seed and the epoch alone.
            most_rows: leave out what comes after so many; default: nothing.

        Raises:
            SettingsError: a bad row, no chat template for chat messages, or no prompt short enough.
        """
        rows = load_rows(path)[:most_rows]
        prompts = list(_tokenize(rows, tokenizer, path))
        self.path = path
        self.max_prompt_length = max_prompt_length
        self.seed = seed
        self.shuffle = shuffle
        self.prompts = [prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_length]
        self.num_dropped = len(prompts) - len(self.prompts)
        if not self.prompts:
            shortest = min(len(prompt.token_ids) for prompt in prompts)
            raise SettingsError(
                f"{path} has no prompt within --max-prompt-length {max_prompt_length}: "
                f"the shortest has {shortest} tokens"
            )
        if self.num_dropped:
            logger.warning(
                "%s: dropped %d of %d prompts longer than --max-prompt-length %d tokens",
                *(path, self.num_dropped, len(prompts), max_prompt_length),
            )
        self._start(epoch=0, position=0)

    def __len__(self) -> int:
        """Prompts in an epoch."""
        return len(self.prompts)

    def check_ids(self, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> None:
        """Refuse a prompt with a token that the model has no embedding for.

        transformers gives tokens that tokenizer_config.json names, and tokenizer.json lacks, ids behind all others.

        Raises:
            SettingsError: naming the token.
        """
        if max(tokenizer.get_vocab().values(), default=0) < vocab_size:
            return
        for prompt in self.prompts:
            largest = max(prompt.token_ids)
            if largest >= vocab_size:
                raise SettingsError(
                    f"{self.path}: a prompt has the token {tokenizer.convert_ids_to_tokens(largest)!r}, which "
                    f"tokenizer_config.json adds as id {largest}, but the model's vocab_size is {vocab_size}"
                )

    @property
    def epoch(self) -> int:
        """Passes over the data finished so far."""
        return self._epoch

    @property
    def num_taken(self) -> int:
        """Prompts that batches have held so far, in all epochs: the ordinal of the next one."""
        return self._epoch * len(self) + self._position

    def at(self, ordinal: int) -> Prompt:
        """The prompt that is, was or will be the so-manieth, over all epochs. Does not move the cursor."""
        epoch, position = divmod(ordinal, len(self))
        order = self._order if epoch == self._epoch else self._epoch_order(epoch)
        return self.prompts[order[position]]

    def all(self) -> list[Prompt]:
        """Every prompt in file order, for evaluation. Does not move the cursor."""
        return list(self.prompts)

    def next_batch(self, num_prompts: int) -> list[Prompt]:
        """The next prompts; a batch that an epoch's end cuts short goes on into the next epoch.

        Raises:
            SettingsError: the batch is larger than an epoch, so that it would hold a prompt twice.
        """
        if num_prompts > len(self):
            raise SettingsError(
                f"--rollout-batch-size {num_prompts} is more than the {len(self)} prompts of {self.path} "
                f"within --max-prompt-length {self.max_prompt_length}"
            )
        batch: list[Prompt] = []
        while len(batch) < num_prompts:
            chosen = self._order[self._position : self._position + num_prompts - len(batch)]
            batch += [self.prompts[index] for index in chosen]
            self._position += len(chosen)
            if self._position == len(self):
                self._start(epoch=self._epoch + 1, position=0)
        return batch

    def state_dict(self) -> dict[str, int]:
        """Where the cursor stands: enough to go on with the same prompts in the same order."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self.seed,
            "num_prompts": len(self),
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Put the cursor where `state_dict` found it.

        Raises:
            SettingsError: the state is of other data or another seed, whose order would be another one.
        """
        if state["num_prompts"] != len(self):
            raise SettingsError(
                f"cannot resume: the saved run had {state['num_prompts']} prompts, {self.path} has {len(self)}; "
                f"use the same --data and --max-prompt-length"
            )
        if state["seed"] != self.seed:
            raise SettingsError(
                f"cannot resume: the saved run shuffled with --seed {state['seed']}, this one with {self.seed}"
            )
        self._start(epoch=state["epoch"], position=state["position"])

    def _start(self, *, epoch: int, position: int) -> None:
        self._epoch = epoch
        self._position = position
        self._order = self._epoch_order(epoch)

    def _epoch_order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self)))
        # Seeds are of any sign, SeedSequence's entropy is not.
        entropy = (self.seed % 2**64, epoch)
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
        order: list[int] = generator.permutation(len(self)).tolist()
        return order


def rollouts_of(settings: Settings, num_prompts: int) -> int:
    """Rollouts in the run: as many as asked for, or as the epochs hold.

    Raises:
        SettingsError: too few prompts are left for one batch.
    """
    batch = settings.data.rollout_batch_size
    needed = settings.prompts_in_flight
    if num_prompts < needed:
        asked = f"--rollout-batch-size {batch}"
        if needed > batch:
            asked = f"the {needed} prompts of {asked} x --oversampling {settings.rollout.oversampling:g}"
        raise SettingsError(
            f"--data {settings.data.data} has {num_prompts} prompts of at most {settings.data.max_prompt_length} "
            f"tokens, fewer than {asked}"
        )
    return settings.data.num_rollouts or num_prompts * settings.data.num_epochs // batch


def _tokenize(rows: list[PromptRow], tokenizer: PreTrainedTokenizerBase, path: Path) -> Iterator[Prompt]:
    with tqdm(total=len(rows), desc="tokenising prompts", unit="prompt", delay=2) as bar:
        for start in range(0, len(rows), TOKENIZER_BATCH):
            chunk = rows[start : start + TOKENIZER_BATCH]
            texts = [_render(row, tokenizer, path) for row in chunk]
            # The template has put every special token in place already.
            encoded: Any = tokenizer(texts, add_special_tokens=False)
            for row, text, token_ids in zip(chunk, texts, encoded["input_ids"], strict=True):
                if not token_ids:
                    raise SettingsError(
                        f"{path}, {row.location}: the prompt has no tokens, so that nothing can follow it"
                    )
                yield Prompt(
                    id=row.id,
                    token_ids=token_ids,
                    text=text,
                    ground_truth=row.ground_truth,
                    data_source=row.data_source,
                    extra=row.extra,
                )
            bar.update(len(chunk))


def _render(row: PromptRow, tokenizer: PreTrainedTokenizerBase, path: Path) -> str:
    """The prompt as the model will read it; a string is taken as it stands."""
    if isinstance(row.prompt, str):
        return row.prompt
    model = f"the tokenizer of {tokenizer.name_or_path or 'the model'}"
    template: Any = tokenizer.chat_template
    if template is None:
        raise SettingsError(
            f"{path} holds chat messages, but {model} has no "
            f"chat template: add one to the model folder, or give prompts as strings"
        )
    if isinstance(template, dict) and "default" not in template:
        raise SettingsError(
            f"{path} holds chat messages, but of the chat templates of {model} ({', '.join(sorted(template))}) none is "
            f"called default: give that name to the one to use"
        )
    # Imported here: transformers brings jinja2 along, and only templates need it.
    from jinja2 import TemplateSyntaxError

    try:
        with CpuLimit(TEMPLATE_LIMIT_S):
            text = str(tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True, tokenize=False))
    except TimeoutError as error:
        raise SettingsError(
            f"{path}, {row.location}: the model's chat template has not ended after {TEMPLATE_LIMIT_S:g} s: it loops"
        ) from error
    except TemplateSyntaxError as error:
        raise SettingsError(
            f"{model} has a chat template with an error in line {error.lineno}: {error.message}"
        ) from error
    except Exception as error:  # a template is somebody else's program: it raises what it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingsError(
            f"{path}, {row.location}: the model's chat template refuses the prompt: {reason}"
        ) from error
    try:
        check_text(text)  # what the template itself adds has been seen by nobody yet
    except ValueError as error:
        raise SettingsError(f"{path}, {row.location}: the model's chat template gives {error}") from error
    return text
