"""Speculative decoding: MTP layers draft a few tokens, and one pass of the model says which of them it would have made.

MTP layer d takes the hidden states of the one before it and the tokens d + 1 ahead, and predicts those d + 2 ahead
(MiMo report, section 2.3), so that M layers draft a chain of M tokens from the last hidden state of the model. What a
layer was given of drafts that turned out wrong is computed again: every round all of them read the last 2 · M
positions, which are as many as can have changed. What is kept is thus what reading the text at once would give.
"""

import torch
from torch import Tensor

from export.torch_runtime.cache import Cache, DraftCache
from export.torch_runtime.model import Decoder


def _drafts_of(cache: Cache) -> DraftCache:
    if cache.drafts is None:
        raise ValueError("the model has no MTP layers to draft with: load_model(folder, mtp=True)")
    return cache.drafts


def _keep(drafts: DraftCache, hidden: Tensor, positions: Tensor) -> None:
    """Keeps the last hidden states of the model [B, T, D]."""
    places = drafts.hidden.shape[1]
    drafts.hidden.index_copy_(1, positions[-places:] % places, hidden[:, -places:])


def read_prompt(model: Decoder, hidden: Tensor, positions: Tensor, cache: Cache, num_slots: int) -> None:
    """Shows a part of the prompt to the MTP layers.

    At the end of the prompt they lack tokens that follow; what they make of it there is made again by `draft`.

    Args:
        model: with MTP layers.
        hidden: its hidden states of that part [B, T, D].
        positions: of that part [T].
        cache: with the whole prompt in `drafts.tokens`.
        num_slots: up to the end of the part.
    """
    drafts = _drafts_of(cache)
    _keep(drafts, hidden, positions)
    for index, layer in enumerate(model.mtp_layers):
        following = model.embed(drafts.tokens.index_select(1, positions + index + 1))
        hidden = layer(
            hidden, following, cache.rotary[positions], positions, drafts.layers[index], cache.sparse, num_slots
        )


def draft(model: Decoder, position: Tensor, cache: Cache, num_slots: int | None) -> None:
    """Writes the most probable M tokens behind the one at `position` to `cache.drafts.tokens`.

    Args:
        model: with M MTP layers.
        position: of the last token that is known, at least 1; the model has read those before it [1].
        cache: with all that was read.
        num_slots: as for `Decoder.forward`: max(position, 2 · M), or None.
    """
    drafts, window = _drafts_of(cache), 2 * len(model.mtp_layers)
    first = (position - window).clamp(min=0)
    # After a short prompt some of these positions lie behind those that were read: nothing that counts sees them.
    positions = first + torch.arange(window, device=position.device)
    hidden = drafts.hidden.index_select(1, positions % drafts.hidden.shape[1])
    for index, layer in enumerate(model.mtp_layers):
        following = model.embed(drafts.tokens.index_select(1, positions + index + 1))
        hidden = layer(
            hidden, following, cache.rotary[positions], positions, drafts.layers[index], cache.sparse, num_slots
        )
        last = hidden.index_select(1, position - 1 - first)
        drafts.tokens.index_copy_(1, position + index + 1, model.logits(last).argmax(dim=-1))


def speculate(
    model: Decoder, token: Tensor, position: Tensor, cache: Cache, static: bool = False
) -> tuple[Tensor, Tensor]:
    """One round: drafts M tokens, and reads the last known one and all of them.

    Args:
        model: with M MTP layers.
        token: the last known one [B, 1].
        position: of it [1].
        cache: with all tokens before it.
        static: whether the whole cache is read by a mask, with the same operations at every position.

    Returns:
        The drafts [B, M], and logits after the token and each of them [B, M + 1, V].
    """
    drafts, number = _drafts_of(cache), len(model.mtp_layers)
    drafts.tokens.index_copy_(1, position, token)
    draft(model, position, cache, None if static else max(int(position), 2 * number))
    positions = position + torch.arange(number + 1, device=position.device)
    tokens = drafts.tokens.index_select(1, positions)
    hidden = model(tokens, positions, cache, None if static else int(position) + number + 1)
    _keep(drafts, hidden, positions)
    return tokens[:, 1:], model.logits(hidden)
