/* quantize of bfloat16 by a scale that serves many elements, for AVX-512. Where x, x / scale, what that is rounded to
 * and the product are normal numbers, all of them double with x. So the bits of the result are those of x and a change
 * that the 7 bits of x's fraction tell: 128 changes are found once, and looked up. What is above the largest value of
 * the format becomes that. Without this file every result is the same.
 */

#ifdef __AVX512BW__

enum { FRACTIONS = 128, RANGE = 12 }; /* fractions of bfloat16; exponents of normal numbers that are worth it */

struct fractions {
    _Alignas(64) uint16_t changes[FRACTIONS]; /* by the fraction */
    uint16_t first, most; /* the least magnitude from which on they hold, 0: none; the largest magnitude of a result */
    float divisor, reciprocal, multiplier;
};

/* Whether n elements by one scale are worth it, of which none is negative, infinite or NaN. */
INLINE int suits_fractions(const struct plan *p, const struct format32 *f, int64_t n) {
    const int is_quantize = (p->operation == QUANTIZE || p->operation == PROJECT) && !p->is_wide;
    return is_quantize && n >= CHUNK && p->dtypes[X] == BFLOAT16 && p->out_dtype == BFLOAT16 &&
           variant_of(p) == PLAIN && f->max_value >= f->min_power + ((uint32_t)RANGE << FRACTION_BITS);
}

INLINE struct vectors vectors_of(const struct fractions *t, const uint16_t *x, uint16_t *out, int64_t n) {
    return (struct vectors){x, out, &t->divisor, &t->reciprocal, &t->multiplier, NULL, n, 0, 0};
}

#define QUANTIZE_VECTORS(v) quantize_vectors(v, BFLOAT16, BY_RECIPROCAL, 0, 0, PLAIN, NEAREST_TIES_TO_EVEN, f)

/* The changes are those of the first power of two whose quotient is normal in the format, and its fractions: these have
 * quotients below four times the format's least normal number. That divisors have exact reciprocals leaves it far above
 * the least float32; of products it must be asked. Infinite products are what lies beyond the largest. */
static void find_fractions(const struct format32 *f, float divisor, float multiplier, struct fractions *t) {
    const float least = divisor * number32(f->min_power), least_product = multiplier * number32(f->min_power);
    const uint32_t one = 1u << FRACTION_BITS;
    t->divisor = divisor;
    t->multiplier = multiplier;
    t->most = to_bfloat16(number32(f->max_value) * multiplier);
    t->first = 0;
    if (!reciprocals_of(&divisor, 1, 0, NEAREST_TIES_TO_EVEN, f, &t->reciprocal) || least_product < 0x1p-126f) {
        return;
    }
    t->first = (uint16_t)((bits32(least) + one - 1) / one << 7);
    uint16_t x[FRACTIONS];
    for (uint16_t i = 0; i < FRACTIONS; i++) {
        x[i] = t->first + i;
    }
    const struct vectors v = vectors_of(t, x, t->changes, FRACTIONS);
    QUANTIZE_VECTORS(&v);
    for (uint16_t i = 0; i < FRACTIONS; i++) {
        t->changes[i] -= x[i];
    }
}

/* n <= CHUNK elements. Returns the largest |q|, as quantize_vectors does. */
static uint32_t quantize_by_fractions(const struct fractions *t, const struct format32 *f, const uint16_t *x,
                                      uint16_t *out, int64_t n) {
    const __m512i changes[] = {_mm512_load_si512(t->changes), _mm512_load_si512(t->changes + 32),
                               _mm512_load_si512(t->changes + 64), _mm512_load_si512(t->changes + 96)};
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), one = _mm512_set1_epi16(1);
    const __m512i most = _mm512_set1_epi16((int16_t)t->most), before = _mm512_set1_epi16((int16_t)(t->first - 1));
    __m512i largest = _mm512_setzero_si512();
    __mmask32 small[CHUNK / 32], any = 0; /* elements below first but for 0 */
    for (int64_t next = 0; next < n; next += 32) {
        const int64_t i = next < n - 32 ? next : n - 32;
        const __m512i bits = _mm512_loadu_si512(x + i), a = _mm512_and_si512(bits, magnitude);
        const __m512i low = _mm512_permutex2var_epi16(changes[0], bits, changes[1]);
        const __m512i high = _mm512_permutex2var_epi16(changes[2], bits, changes[3]);
        const __mmask32 is_high = _mm512_test_epi16_mask(bits, _mm512_set1_epi16(FRACTIONS / 2));
        const __m512i changed = _mm512_add_epi16(a, _mm512_mask_blend_epi16(is_high, low, high));
        const __m512i y = _mm512_maskz_min_epu16(_mm512_test_epi16_mask(a, a), changed, most);
        _mm512_storeu_si512(out + i, _mm512_ternarylogic_epi32(y, bits, magnitude, 0xf4)); /* y | (bits & ~magnitude) */
        any |= small[next / 32] = _mm512_cmplt_epu16_mask(_mm512_sub_epi16(a, one), before);
        largest = _mm512_max_epu16(largest, a);
    }
    for (int64_t next = 0; any != 0 && next < n;
         next += 32) { /* by themselves: no guess of a branch waits for memory */
        if (small[next / 32] != 0) {
            const int64_t i = next < n - 32 ? next : n - 32;
            const struct vectors v = vectors_of(t, x + i, out + i, 32);
            QUANTIZE_VECTORS(&v);
        }
    }
    const __m256i of_16 = _mm256_max_epu16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1));
    const __m128i of_8 = _mm_max_epu16(_mm256_castsi256_si128(of_16), _mm256_extracti128_si256(of_16, 1));
    const __m128i least_left = _mm_minpos_epu16(_mm_andnot_si128(of_8, _mm_set1_epi32(-1)));
    return bits32(number32((uint32_t)~_mm_cvtsi128_si32(least_left) << 16) / t->divisor);
}

#undef QUANTIZE_VECTORS
#endif
