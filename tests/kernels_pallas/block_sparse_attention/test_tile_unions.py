"""The tables of unions, and the same turned round, against sets."""

import numpy as np
import pytest

from kernels_pallas.block_sparse_attention.tile_unions import block_tiles, tile_unions


@pytest.mark.parametrize(("tile", "length", "num_blocks", "chosen"), [(4, 40, 9, 3), (32, 64, 5, 5), (1, 7, 12, 2)])
def test_unions_and_the_same_turned_round(tile, length, num_blocks, chosen):
    rng = np.random.default_rng(0)
    lists = np.stack([rng.permutation(num_blocks)[:chosen] for _ in range(2 * length)]).reshape(1, 2, length, chosen)
    lists = np.where(rng.random(lists.shape) < 0.2, -1, lists)
    unions = tile_unions(lists, tile, num_blocks, multiple=1)
    ids, words, counts = map(np.asarray, unions)
    second = rng.random(ids.shape) < 0.5
    entries, starts = map(np.asarray, block_tiles(unions.ids, unions.words, second, num_blocks))
    for head in range(2):
        pairs = set()
        for m in range(length // tile):
            of_tile = lists[0, head, m * tile : (m + 1) * tile]
            want = {b: sum(1 << q for q in range(tile) if b in of_tile[q]) for b in set(of_tile.ravel()) - {-1}}
            got = ids[0, head, m, : counts[0, head, m]], words[0, head, m, : counts[0, head, m]]
            assert dict(zip(*map(np.ndarray.tolist, got), strict=True)) == {
                int(b): w - (w >> 31 << 32) for b, w in sorted(want.items())
            }
            pairs |= {(b, m) for b in want}
        found = []
        for block in range(num_blocks):
            first, middle, last = starts[0, head, 2 * block : 2 * block + 3]
            of_block = entries[0, head, first:last]
            found += [(block, e // ids.shape[3]) for e in of_block]
            assert [second[0, head].ravel()[e] for e in of_block] == [0] * (middle - first) + [1] * (last - middle)
            for part in (of_block[: middle - first], of_block[middle - first :]):
                assert (np.diff(part) > 0).all()
        assert len(found) == len(pairs)
        assert set(found) == pairs
