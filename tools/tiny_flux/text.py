"""Tokenizers of our own, built from word lists, and text encoders sized for them.

Every word of the little world is one token in both tokenizers; other text falls apart into letters, so that a prompt
outside the world is legal and merely meaningless. Nothing is learnt from data here: a trained merge list would
depend on hash order and differ from one process to the next.
"""

from __future__ import annotations

import string
from pathlib import Path

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from tools.tiny_flux.scenes import COLOURS, POSITIONS, SHAPES

WIDTH = 64
CLIP_POSITIONS = 77
WORDS = tuple(dict.fromkeys(["a", "an", "on", "background", *COLOURS, *SHAPES, *" ".join(POSITIONS.values()).split()]))


def _merges() -> list[tuple[str, str]]:
    """Return byte-pair merges that make every word one token: each is merged left to right, earlier rules first."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for merge in merges:
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == merge:
                    pieces[i : i + 2] = ["".join(merge)]
                i += 1
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
    return merges


def clip_tokenizer() -> CLIPTokenizer:
    """Return a lower-casing CLIP tokenizer, 77 positions."""
    merges = _merges()
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters), *map("".join, merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_POSITIONS)


def t5_tokenizer() -> T5Tokenizer:
    """Return a case-sensitive T5 tokenizer; words also begin sentences, so each is there with a capital too."""
    starts = [w if c == 0 else w.capitalize() for c in (0, 1) for w in WORDS]
    letters = string.ascii_letters + string.digits + string.punctuation
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{w}", -1.0) for w in starts)]
    known = {p for p, _ in pieces}
    pieces += [(p, -8.0) for p in ("\u2581", *letters) if p not in known]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def save_tokenizers(folder: Path) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Write both tokenizers below `folder` and return them as a user will load them."""
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    t5_tokenizer().save_pretrained(folder / "tokenizer_2")
    return (
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
    )


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained CLIP text encoder, pooled at the tokenizer's own end-of-text token."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        # 2 would select transformers' legacy pooling (the largest id wins), which is wrong for this vocabulary.
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Return an untrained T5 encoder without dropout."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=16,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)
