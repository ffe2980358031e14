/* Random bits from a counter: Philox-4x32-10, as ops_registry/philox.py says.
 *
 * A word lies in the low half of a 64-bit lane. What is in the high half reaches no low one: TIMES does not read it,
 * and the rest of a round is bit by bit but for the shift of a product, all of whose 64 bits are meant. Behind the last
 * round a lane is two words, which LAST makes of a product: its high half ^ x ^ key, and above that its low half.
 *
 * store_pairs(a, b) writes the lanes of both by turns, in the order of the blocks that ORDER gives to the lanes: with
 * it a permutation across the vector is spared.
 */

#if defined(__AVX512F__)
typedef uint64_t lanes __attribute__((vector_size(64)));
#define ORDER {0, 4, 1, 5, 2, 6, 3, 7}
#define TIMES(x, k) (lanes) _mm512_mul_epu32((__m512i)(x), _mm512_set1_epi64(k))
#define LAST(p, x, key)                                                                                                \
    (lanes)                                                                                                            \
        _mm512_mask_ternarylogic_epi32(_mm512_rol_epi64((__m512i)(p), 32), 0x5555, (__m512i)(x), (__m512i)(key), 0x96)
INLINE void store_pairs(lanes a, lanes b, uint32_t *words) {
    _mm512_storeu_si512(words, _mm512_unpacklo_epi64((__m512i)a, (__m512i)b));
    _mm512_storeu_si512(words + 16, _mm512_unpackhi_epi64((__m512i)a, (__m512i)b));
}
#elif defined(__AVX2__)
typedef uint64_t lanes __attribute__((vector_size(32)));
#define ORDER {0, 2, 1, 3}
#define TIMES(x, k) (lanes) _mm256_mul_epu32((__m256i)(x), _mm256_set1_epi64x(k))
#define LAST(p, x, key) ((lanes)_mm256_shuffle_epi32((__m256i)(p), 0xb1) ^ ((x) & 0xffffffffu) ^ (key))
INLINE void store_pairs(lanes a, lanes b, uint32_t *words) {
    _mm256_storeu_si256((__m256i *)words, _mm256_unpacklo_epi64((__m256i)a, (__m256i)b));
    _mm256_storeu_si256((__m256i *)(words + 8), _mm256_unpackhi_epi64((__m256i)a, (__m256i)b));
}
#elif defined(__SSE2__)
typedef uint64_t lanes __attribute__((vector_size(16)));
#define ORDER {0, 1}
#define TIMES(x, k) (lanes) _mm_mul_epu32((__m128i)(x), _mm_set1_epi64x(k))
#define LAST(p, x, key) ((lanes)_mm_shuffle_epi32((__m128i)(p), 0xb1) ^ ((x) & 0xffffffffu) ^ (key))
INLINE void store_pairs(lanes a, lanes b, uint32_t *words) {
    _mm_storeu_si128((__m128i *)words, _mm_unpacklo_epi64((__m128i)a, (__m128i)b));
    _mm_storeu_si128((__m128i *)(words + 4), _mm_unpackhi_epi64((__m128i)a, (__m128i)b));
}
#else
typedef uint64_t lanes;
#define ORDER {0}
#define TIMES(x, k) ((uint64_t)(uint32_t)(x) * (k))
#define LAST(p, x, key) (((p) >> 32 | (p) << 32) ^ ((x) & 0xffffffffu) ^ (key))
INLINE void store_pairs(lanes a, lanes b, uint32_t *words) {
    words[0] = (uint32_t)a;
    words[1] = (uint32_t)(a >> 32);
    words[2] = (uint32_t)b;
    words[3] = (uint32_t)(b >> 32);
}
#endif

enum {
    LANES = sizeof(lanes) / sizeof(uint64_t),
    CHAINS = LANES == 8 ? 6 : 4, /* at once, while registers last: a product waits for the one before it */
    PHILOX_ROOM = CHUNK + 4 * LANES + 3
};

/* The words of the blocks whose counters are in counter and by step behind it; the keys of the rounds are added up. */
INLINE void philox_chains(const lanes keys[10][2], lanes counter, uint64_t step, int chains, uint32_t *restrict words) {
    lanes x[CHAINS][4];
    for (int i = 0; i < chains; i++) { /* the first round: words 2 and 3 are 0 */
        const lanes c = counter + (uint64_t)i * step, p = TIMES(c, 0xD2511F53u);
        x[i][0] = (c >> 32) ^ keys[0][0];
        x[i][1] = c - c;
        x[i][2] = (p >> 32) ^ keys[0][1];
        x[i][3] = p;
    }
    for (int round = 1; round < 9; round++) {
        for (int i = 0; i < chains; i++) {
            const lanes p0 = TIMES(x[i][0], 0xD2511F53u), p1 = TIMES(x[i][2], 0xCD9E8D57u);
            x[i][0] = (p1 >> 32) ^ x[i][1] ^ keys[round][0];
            x[i][1] = p1;
            x[i][2] = (p0 >> 32) ^ x[i][3] ^ keys[round][1];
            x[i][3] = p0;
        }
    }
    for (int i = 0; i < chains; i++) {
        const lanes p0 = TIMES(x[i][0], 0xD2511F53u), p1 = TIMES(x[i][2], 0xCD9E8D57u);
        store_pairs(LAST(p1, x[i][1], keys[9][0]), LAST(p0, x[i][3], keys[9][1]), words + i * 4 * LANES);
    }
}

/* The words of count blocks from the given one on, apart from each other, and of those behind that share lanes. */
static void philox(uint64_t seed, uint64_t block, uint64_t apart, int64_t count, uint32_t *restrict words) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    uint64_t blocks[LANES] = ORDER;
    lanes keys[10][2], counter;
    memset(keys, 0, sizeof keys);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        keys[round][0] += (uint64_t)k0;
        keys[round][1] += (uint64_t)k1;
    }
    memcpy(&counter, blocks, sizeof counter);
    counter = counter * apart + block;
    const uint64_t step = LANES * apart;
    for (; count > (CHAINS - 1) * LANES; count -= CHAINS * LANES, words += CHAINS * 4 * LANES) {
        philox_chains(keys, counter, step, CHAINS, words);
        counter += CHAINS * step;
    }
    for (; count > 0; count -= LANES, words += 4 * LANES) {
        philox_chains(keys, counter, step, 1, words);
        counter += step;
    }
}
#undef TIMES
#undef LAST
#undef ORDER

/* The random words of n <= CHUNK elements from the given one on; buffer has PHILOX_ROOM. */
static const uint32_t *random_words(uint64_t seed, int64_t begin, int64_t n, uint32_t *buffer) {
    philox(seed, (uint64_t)begin / 4, 1, (begin % 4 + n + 3) / 4, buffer);
    return buffer + begin % 4;
}

/* The random words of n <= CHUNK elements from the given one on, apart from each other by a multiple of 4. The elements
 * behind them share their blocks: fours has what the call for the first of four of them made, for the three others. */
static const uint32_t *random_words_apart(uint64_t seed, int64_t begin, int64_t apart, int64_t n,
                                          uint32_t *restrict fours, uint32_t *restrict buffer) {
    if (begin % 4 == 0) {
        philox(seed, (uint64_t)begin / 4, (uint64_t)apart / 4, n, fours);
    }
    for (int64_t i = 0; i < n; i++) {
        buffer[i] = fours[4 * i + begin % 4];
    }
    return buffer;
}
