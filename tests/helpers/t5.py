"""A T5 of a few thousand random weights and a tokenizer of bytes, made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def write_t5(path: Path) -> Path:
    """Write both into a folder, which is returned. Features have 12 channels; the test is skipped without T5."""
    transformers = pytest.importorskip("transformers", reason="T5 needs transformers, which is not installed")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(vocabulary),
        d_model=12,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_heads=3,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = transformers.T5EncoderModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return path
