/* Random bits from a counter: Philox-4x32-10, as ops_registry/philox.py says. */

enum { PHILOX_GROUP = 16 }; /* blocks at a time, in lanes */

/* The words of count blocks from the given one on, in whole groups: up to 4 * (PHILOX_GROUP - 1) words too many. */
static void philox(uint64_t seed, uint64_t block, int64_t count, uint32_t *restrict words) {
    for (int64_t done = 0; done < count; done += PHILOX_GROUP, words += 4 * PHILOX_GROUP) {
        uint32_t x[4][PHILOX_GROUP], k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        for (int i = 0; i < PHILOX_GROUP; i++) {
            const uint64_t counter = block + (uint64_t)(done + i);
            x[0][i] = (uint32_t)counter;
            x[1][i] = (uint32_t)(counter >> 32);
            x[2][i] = x[3][i] = 0;
        }
        for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
            for (int i = 0; i < PHILOX_GROUP; i++) {
                const uint64_t p0 = (uint64_t)0xD2511F53u * x[0][i], p1 = (uint64_t)0xCD9E8D57u * x[2][i];
                x[0][i] = (uint32_t)(p1 >> 32) ^ x[1][i] ^ k0;
                x[1][i] = (uint32_t)p1;
                x[2][i] = (uint32_t)(p0 >> 32) ^ x[3][i] ^ k1;
                x[3][i] = (uint32_t)p0;
            }
        }
        for (int i = 0; i < PHILOX_GROUP; i++) {
            for (int word = 0; word < 4; word++) {
                words[4 * i + word] = x[word][i];
            }
        }
    }
}

enum { PHILOX_ROOM = CHUNK + 4 * (PHILOX_GROUP + 1) };

/* The random words of n <= CHUNK elements from the given one on; buffer has PHILOX_ROOM. */
static const uint32_t *random_words(uint64_t seed, int64_t begin, int64_t n, uint32_t *buffer) {
    philox(seed, (uint64_t)begin / 4, (begin % 4 + n + 3) / 4, buffer);
    return buffer + begin % 4;
}
