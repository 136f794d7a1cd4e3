"""A sequence classifier as big as the base model: what a second server would judge replies with."""

from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer


def make_classifier(base: Path, folder: Path) -> Path:
    """Write the base model with a new classification head, once; return the folder.

    It has learned nothing: it stands in for the cost of such a model, not for its judgement.
    """
    if not (folder / "config.json").is_file():
        model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=2)
        tokenizer = AutoTokenizer.from_pretrained(str(base))
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id or 0
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    return folder
