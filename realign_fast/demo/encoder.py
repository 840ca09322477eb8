"""A dual encoder of pictures and captions, trained by contrast: its two clouds lie apart, as those of CLIP do."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from .world import PADDING, VOCABULARY_SIZE, Scenes, captions, render, sample_scenes, tokenize

DIM = 128
# Not the usual 14: a temperature so warm would let this small model close the gap by itself.
_LOGIT_SCALE = 100.0
_LEARNING_RATE = 8e-4
_BATCH = 256
# Captions that say less than the picture shows keep the gap that real data has.
_LEAVE_OUT = 0.3


class DualEncoder(nn.Module):
    """A strided CNN for pictures and a bidirectional GRU for captions, with unit embeddings of `DIM` dimensions.

    Its training begins with `logit_scale`, which is also the largest: the larger, the more of the gap stays.
    """

    def __init__(self, logit_scale: float = _LOGIT_SCALE) -> None:
        super().__init__()
        self.max_logit_scale = logit_scale
        widths = (3, 32, 64, 128, 256)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1), nn.BatchNorm2d(fan_out), nn.ReLU()]
        self.image_encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 4, DIM))
        self.words = nn.Embedding(VOCABULARY_SIZE, 64, padding_idx=PADDING)
        self.reader = nn.GRU(64, 128, batch_first=True, bidirectional=True)
        self.text_head = nn.Linear(256, DIM)
        self.log_scale = nn.Parameter(torch.tensor(float(np.log(logit_scale))))

    def encode_image(self, images: Tensor) -> Tensor:
        """Return `(n, DIM)` unit rows for `(n, 3, 32, 32)` uint8 pictures."""
        return normalize(self.image_encoder(images.float() / 127.5 - 1))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return `(n, DIM)` unit rows for `(n, MAX_WORDS)` tokens."""
        states, _ = self.reader(self.words(tokens))
        states = states.masked_fill((tokens == PADDING)[..., None], -torch.inf)
        return normalize(self.text_head(states.amax(dim=1)))


def train(
    *,
    steps: int = 400,
    num_pairs: int = 20_000,
    seed: int = 0,
    scenes: Scenes | None = None,
    make: Callable[[], DualEncoder] = DualEncoder,
    progress: Callable[[int], None] | None = None,
) -> DualEncoder:
    """Return what `make` makes, trained with InfoNCE on pairs of its own; the same for equal arguments.

    The pairs show `scenes`, by default `num_pairs` random ones.
    """
    generator_state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        if scenes is None:
            scenes = sample_scenes(num_pairs, seed)
        images = torch.from_numpy(render(scenes, seed))
        tokens = torch.from_numpy(tokenize(captions(scenes, seed, leave_out=_LEAVE_OUT)))
        encoder = make()
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=max(steps, 2))
        targets = torch.arange(_BATCH)
        for _ in range(steps):
            batch = torch.randint(len(images), (_BATCH,))
            logits = encoder.encode_text(tokens[batch]) @ encoder.encode_image(images[batch]).T
            logits = logits * encoder.log_scale.exp().clamp(max=encoder.max_logit_scale)
            loss = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(1)
    finally:
        torch.random.set_rng_state(generator_state)
    return encoder.eval()


@torch.no_grad()
def embed_images(encoder: DualEncoder, images: NDArray[np.uint8], batch: int = 1000) -> NDArray[np.float32]:
    """Return `(n, DIM)` unit rows of pictures."""
    parts = torch.split(torch.from_numpy(images), batch)
    return np.concatenate([encoder.encode_image(part).numpy() for part in parts])


@torch.no_grad()
def embed_texts(encoder: DualEncoder, texts: list[str], batch: int = 1000) -> NDArray[np.float32]:
    """Return `(n, DIM)` unit rows of captions."""
    parts = torch.split(torch.from_numpy(tokenize(texts)), batch)
    return np.concatenate([encoder.encode_text(part).numpy() for part in parts])
