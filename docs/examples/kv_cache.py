"""A cache of keys and values in MXFP8: what attention reads of earlier tokens, in 8.25 bits an element.

    python docs/examples/kv_cache.py

prints the bytes of the cache and how far attention through it is from attention in float32.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from altgrad.quantization import MXFP8_E4M3, Blocks, decode_blocks, encode_blocks, quantize_blocks, sqnr


class KVCache:
    """Room for the keys and values of so many tokens, [batch, heads, tokens, head size].

    Blocks of 32 lie along the head, so a token is encoded when it comes, whatever comes later. Powers of two are
    rounded up ("rceil"): then nothing clips.
    """

    def __init__(self, batch: int, heads: int, tokens: int, head_size: int, dtype: torch.dtype = torch.bfloat16):
        empty = torch.zeros(batch, heads, tokens, head_size, dtype=dtype)
        self.format = MXFP8_E4M3 | {"power_of_two": "rceil"}
        self.stored = [encode_blocks(empty, **self.format) for _ in ("keys", "values")]
        self.tokens = 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Encodes the keys and values of new tokens."""
        end = self.tokens + keys.shape[-2]
        for room, x in zip(self.stored, (keys, values), strict=True):
            new = encode_blocks(x, **self.format)
            room.codes[..., self.tokens : end, :] = new.codes
            room.scales[..., self.tokens : end, :] = new.scales
        self.tokens = end

    def read(self) -> list[Tensor]:
        """The keys and values of all tokens so far."""
        return [decode_blocks(self._filled(room)) for room in self.stored]

    def _filled(self, room: Blocks) -> Blocks:
        return room._replace(codes=room.codes[..., : self.tokens, :], scales=room.scales[..., : self.tokens, :])

    @property
    def nbytes(self) -> int:
        return sum(room.nbytes for room in self.stored)


def generate(cache: KVCache, queries: Tensor, keys: Tensor, values: Tensor, prompt: int) -> Tensor:
    """Attention of the tokens behind a prompt, one at a time, each over all before it and itself."""
    cache.append(keys[..., :prompt, :], values[..., :prompt, :])
    outputs = []
    for i in range(prompt, queries.shape[-2]):
        token = slice(i, i + 1)
        cache.append(keys[..., token, :], values[..., token, :])
        outputs.append(scaled_dot_product_attention(queries[..., token, :], *cache.read()))
    return torch.cat(outputs, -2)


def main(tokens: int = 256, prompt: int = 192) -> None:
    torch.manual_seed(0)
    shape = 1, 8, tokens, 64
    queries, keys, values = (torch.randn(shape) for _ in range(3))
    cache = KVCache(*shape, dtype=torch.float32)
    got = generate(cache, queries, keys, values, prompt)
    keys_in_mxfp8, values_in_mxfp8 = (quantize_blocks(x, **cache.format) for x in (keys, values))
    rows = torch.arange(tokens)
    mask = rows[:, None] >= rows

    def attention(keys: Tensor, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(queries, keys, values, attn_mask=mask)[..., prompt:, :]

    print(f"{cache.nbytes * 8 / (2 * keys.numel()):.2f} bits an element, {cache.nbytes} bytes")
    print(f"attention through the cache: {sqnr(attention(keys, values), got):.1f} dB of float32's")
    same = [a.equal(b) for a, b in zip(cache.read(), (keys_in_mxfp8, values_in_mxfp8), strict=True)]
    print(f"keys and values are those of quantize_blocks: {all(same)}")


if __name__ == "__main__":
    main()
