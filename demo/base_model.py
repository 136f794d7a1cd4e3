"""The demo's base model: a small Llama trained here on the generated corpus.

A plain Hugging Face folder, cached under a digest of everything it is made from.
"""

import argparse
import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo import conversations, corpus, grammar, lexicon, pretraining, tokenizer
from demo.pretraining import Progress, Training
from demo.tokenizer import VERDICT_DOWN, VERDICT_PROMPT, VERDICT_UP
from thumbloop.errors import SettingsError

__all__ = ["VERDICT_DOWN", "VERDICT_PROMPT", "VERDICT_UP", "Recipe", "build", "default_folder"]

CACHE = Path(".cache/base_model")
SEAL = "recipe.json"
"""Written last into a finished folder: the recipe and its digest."""
_MADE_FROM = (conversations, corpus, grammar, lexicon, pretraining, tokenizer)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes and settings; together with the corpus code they decide the model."""

    seed: int = 0
    exchanges: int = 14_000
    vocabulary: int = 1024
    layers: int = 4
    hidden: int = 320
    intermediate: int = 864
    heads: int = 5
    context: int = 512
    sharpness: float = 1.2
    """Factor on the trained logits. The corpus has no rare words, so what little probability falls
    outside of it is error: sharper logits cut that and leave equal choices equal."""
    training: Training = field(default_factory=Training)

    def digest(self) -> str:
        """Name this recipe by its settings and by the code that writes the corpus."""
        sources = [Path(str(module.__file__)).read_bytes() for module in _MADE_FROM]
        sources.append(Path(__file__).read_bytes())
        settings = json.dumps(asdict(self), sort_keys=True).encode()
        return hashlib.sha256(b"\0".join([settings, *sources])).hexdigest()[:16]


def default_folder(seed: int = 0) -> Path:
    """Where `python -m demo.base_model` and the demo keep the model of this seed."""
    return CACHE / Recipe(seed=seed).digest()


def build(
    folder: Path | str,
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Build the base model into the folder, or return at once when it is there already.

    The folder appears whole or not at all. A model of an older recipe is replaced; a folder that
    holds anything else is left alone. Raises SettingsError: that, or it cannot be written.
    """
    try:
        return _build(Path(folder), recipe or Recipe(seed=seed), on_progress)
    except OSError as error:
        raise SettingsError(
            f"the base model cannot be kept in {folder}: {error.strerror}"
        ) from None


def _build(folder: Path, recipe: Recipe, on_progress: Callable[[Progress], None] | None) -> Path:
    if _sealed_digest(folder) == recipe.digest():
        return folder
    if _sealed_digest(folder) is None and folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"{folder} holds no base model: give an empty or a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        fresh = Path(scratch, "fresh")
        _write_model(fresh, recipe, on_progress)
        if folder.exists():
            folder.rename(Path(scratch, "stale"))
        fresh.rename(folder)
    return folder


def _sealed_digest(folder: Path) -> str | None:
    """The digest of the recipe a folder was finished by, None where there is no finished model."""
    seal = folder / SEAL
    return str(json.loads(seal.read_text())["digest"]) if seal.exists() else None


def _write_model(
    folder: Path, recipe: Recipe, on_progress: Callable[[Progress], None] | None
) -> None:
    exchanges = corpus.exchanges(recipe.exchanges, recipe.seed)
    words = tokenizer.train_tokenizer(
        (
            text
            for exchange in exchanges
            for text in (exchange.prompt, exchange.reply, " " + " ".join(exchange.traits))
        ),
        vocabulary=recipe.vocabulary,
        context=recipe.context,
    )
    examples = conversations.converse(exchanges, words, random.Random(recipe.seed))
    rows = pretraining.pack(examples, recipe.training.row_tokens, words.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        generator = torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(_config(recipe, words))
        pretraining.pretrain(
            model, rows, recipe.training, generator=generator, on_progress=on_progress
        )
    with torch.no_grad():
        model.lm_head.weight.mul_(recipe.sharpness)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    seal = {"digest": recipe.digest(), "recipe": asdict(recipe)}
    (folder / SEAL).write_text(json.dumps(seal, indent=2) + "\n")


def _config(recipe: Recipe, words: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama that ends on the end of a turn and pads with a token of its own."""
    return LlamaConfig(
        vocab_size=len(words),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=False,
    )


def _print_progress(progress: Progress) -> None:
    print(
        f"\rstep {progress.step}/{progress.steps}  loss {progress.loss:.3f}",
        end="" if progress.step < progress.steps else "\n",
        file=sys.stderr,
        flush=True,
    )


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help=f"default: {CACHE}/<digest>")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.folder or default_folder(options.seed)
    print(build(folder, seed=options.seed, on_progress=_print_progress))


if __name__ == "__main__":
    _main()
