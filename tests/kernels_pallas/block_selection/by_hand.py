"""The selection of InfLLM v2 token by token in float64, from the paper's text; shares nothing with the library."""

import numpy as np

NEVER = -np.inf


def scores_by_hand(q, k, settings, segment_ids=None, positions=None, coarse=True):
    """Scores of all blocks, [B, K, T, C] in float64: -inf where a block holds no key that the query may see.

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H], the keys themselves.
        settings: dict of kernel_size, kernel_stride, block_size.
        segment_ids: [B, S].
        positions: [B, T]; None for query t at t.
        coarse: whether the normaliser is that of kernels four times as long and as far apart.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    batch, length, heads, width = q.shape
    num_keys, kv_heads = k.shape[1:3]
    size, stride, block = settings["kernel_size"], settings["kernel_stride"], settings["block_size"]
    num_blocks = -(-num_keys // block)
    out = np.full((batch, kv_heads, length, num_blocks), NEVER)
    for b in range(batch):
        for t in range(length):
            place = t if positions is None else int(positions[b, t])
            mine = [s for s in range(place + 1) if segment_ids is None or segment_ids[b, s] == segment_ids[b, place]]
            for g in range(kv_heads):
                fine = kernels(k[b, :, g], size, stride, mine)
                normalisers = kernels(k[b, :, g], 4 * size, 4 * stride, mine) if coarse else fine
                total = dict.fromkeys(fine, 0.0)
                group = range(g * heads // kv_heads, (g + 1) * heads // kv_heads)
                for n in group:
                    if normalisers:
                        weight = sum(np.exp(q[b, t, n] @ x / np.sqrt(width)) for x in normalisers.values())
                        for start, x in fine.items():
                            total[start] += np.exp(q[b, t, n] @ x / np.sqrt(width)) / weight
                for c in {s // block for s in mine}:
                    touching = [total[start] for start in total if start < (c + 1) * block and start + size > c * block]
                    out[b, g, t, c] = max(touching, default=0.0)
    return out


def kernels(k, size, stride, mine):
    """Means of the windows of keys [S, H] that lie wholly in `mine`, by the position of their first key."""
    seen = set(mine)
    starts = [s for s in range(0, len(k) - size + 1, stride) if seen.issuperset(range(s, s + size))]
    return {s: k[s : s + size].mean(axis=0) for s in starts}


def select_by_hand(scores, place, first_block, settings, num_local, num_selected):
    """The blocks of one query from its scores [C], as a sorted list."""
    own = place // settings["block_size"]
    visible = [c for c in range(len(scores)) if scores[c] > NEVER]
    forced = [c for c in visible if c < first_block + settings["init_blocks"] or c > own - num_local]
    others = sorted((c for c in visible if c not in forced), key=lambda c: (-scores[c], c))
    return sorted((forced + others)[:num_selected])
