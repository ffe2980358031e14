/* Random bits from a counter: Philox-4x32-10, as ops_registry/philox.py says.
 *
 * A word lies in the low half of a 64-bit lane. What is in the high half reaches no low one: TIMES does not read it,
 * and the rest of a round is bit by bit but for the shift of a product, all of whose 64 bits are meant. store_pairs(a,
 * b) writes a[0], b[0], a[1], b[1], ...
 */

#if defined(__AVX512F__)
typedef uint64_t lanes __attribute__((vector_size(64)));
#define TIMES(x, k) (lanes) _mm512_mul_epu32((__m512i)(x), _mm512_set1_epi64(k))
INLINE void store_pairs(lanes a, lanes b, uint32_t *words) {
    const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11),
                  second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_storeu_si512(words, _mm512_permutex2var_epi64((__m512i)a, first, (__m512i)b));
    _mm512_storeu_si512(words + 16, _mm512_permutex2var_epi64((__m512i)a, second, (__m512i)b));
}
#elif defined(__AVX2__)
typedef uint64_t lanes __attribute__((vector_size(32)));
#define TIMES(x, k) (lanes) _mm256_mul_epu32((__m256i)(x), _mm256_set1_epi64x(k))
INLINE void store_pairs(lanes a, lanes b, uint32_t *words) {
    const __m256i even = _mm256_unpacklo_epi64((__m256i)a, (__m256i)b),
                  odd = _mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
    _mm256_storeu_si256((__m256i *)words, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256((__m256i *)(words + 8), _mm256_permute2x128_si256(even, odd, 0x31));
}
#elif defined(__SSE2__)
typedef uint64_t lanes __attribute__((vector_size(16)));
#define TIMES(x, k) (lanes) _mm_mul_epu32((__m128i)(x), _mm_set1_epi64x(k))
INLINE void store_pairs(lanes a, lanes b, uint32_t *words) {
    _mm_storeu_si128((__m128i *)words, _mm_unpacklo_epi64((__m128i)a, (__m128i)b));
    _mm_storeu_si128((__m128i *)(words + 4), _mm_unpackhi_epi64((__m128i)a, (__m128i)b));
}
#else
typedef uint64_t lanes;
#define TIMES(x, k) ((uint64_t)(uint32_t)(x) * (k))
INLINE void store_pairs(lanes a, lanes b, uint32_t *words) {
    words[0] = (uint32_t)a;
    words[1] = (uint32_t)(a >> 32);
    words[2] = (uint32_t)b;
    words[3] = (uint32_t)(b >> 32);
}
#endif

enum {
    LANES = sizeof(lanes) / sizeof(uint64_t),
    CHAINS = 2,       /* at once: a product waits for the one before it */
    PHILOX_GROUP = 16 /* blocks at a time, for every width of lanes */
};

/* The words of the blocks whose counters are in counter and those behind it; the keys of the rounds are added up. */
INLINE void philox_chains(const lanes keys[10][2], lanes counter, uint32_t *restrict words) {
    lanes x[CHAINS][4];
    for (int i = 0; i < CHAINS; i++) {
        x[i][0] = counter + (uint64_t)(i * LANES);
        x[i][1] = x[i][0] >> 32;
        x[i][2] = x[i][3] = counter - counter;
    }
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < CHAINS; i++) {
            const lanes p0 = TIMES(x[i][0], 0xD2511F53u), p1 = TIMES(x[i][2], 0xCD9E8D57u);
            x[i][0] = (p1 >> 32) ^ x[i][1] ^ keys[round][0];
            x[i][1] = p1;
            x[i][2] = (p0 >> 32) ^ x[i][3] ^ keys[round][1];
            x[i][3] = p0;
        }
    }
    const uint64_t low = 0xffffffffu;
    for (int i = 0; i < CHAINS; i++) {
        store_pairs((x[i][0] & low) | x[i][1] << 32, (x[i][2] & low) | x[i][3] << 32, words + i * 4 * LANES);
    }
}

/* The words of count blocks from the given one on, in whole groups: up to 4 * (PHILOX_GROUP - 1) words too many. */
static void philox(uint64_t seed, uint64_t block, int64_t count, uint32_t *restrict words) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    uint64_t steps[LANES];
    lanes keys[10][2], counter;
    memset(keys, 0, sizeof keys);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        keys[round][0] += (uint64_t)k0;
        keys[round][1] += (uint64_t)k1;
    }
    for (int i = 0; i < LANES; i++) {
        steps[i] = block + (uint64_t)i;
    }
    memcpy(&counter, steps, sizeof counter);
    const int64_t step = CHAINS * LANES;
    for (int64_t done = 0; done < count; done += step, words += 4 * step, counter += (uint64_t)step) {
        philox_chains(keys, counter, words);
    }
}
#undef TIMES

enum { PHILOX_ROOM = CHUNK + 4 * (PHILOX_GROUP + 1) };

/* The random words of n <= CHUNK elements from the given one on; buffer has PHILOX_ROOM. */
static const uint32_t *random_words(uint64_t seed, int64_t begin, int64_t n, uint32_t *buffer) {
    philox(seed, (uint64_t)begin / 4, (begin % 4 + n + 3) / 4, buffer);
    return buffer + begin % 4;
}
