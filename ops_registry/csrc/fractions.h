/* quantize of 16 bits by a scale that serves many elements, for AVX-512. Where x, x / scale, what that is rounded to
 * and the product are normal numbers, all of them double with x. So the exponent of x counts the binades from one whose
 * results were found once, and the fraction tells which of these it is. Each of 32 cells of the fractions has one
 * threshold at most, as values of up to 3 mantissa bits lie an eighth of a binade apart: what results below it and from
 * it on is looked up. What is above the largest value of the format becomes that. Without this file every result is the
 * same.
 */

#ifdef __AVX512BW__

enum {
    CELLS = 32,
    RANGE = 12,  /* exponents of normal numbers that are worth it */
    CLASSES = 8, /* of scales, by their fractions */
    BELOW = 3    /* a base is 2^-BELOW of the least normal number of a format, times a scale */
};

/* Of the blocks of a strip: bits of bfloat16, the divisor's base below the multiplier's. */
struct bases {
    uint32_t both[CHUNK / 16], classes[CHUNK / 16];
};

INLINE uint16_t base_of_one(const struct format32 *f) { return (uint16_t)((f->min_power >> 16) - (BELOW << 7)); }

INLINE __m512i divisor_base(const struct bases *bases, int64_t block) {
    return _mm512_set1_epi16(((const int16_t *)bases->both)[2 * block]);
}

INLINE __m512i multiplier_base(const struct bases *bases, int64_t block) {
    return _mm512_set1_epi16(((const int16_t *)bases->both)[2 * block + 1]);
}

/* n blocks with these levels, or with powers of two. Returns whether all scales are normal numbers above the least, to
 * which smaller products are rounded, not the largest ones, which infinity may have, and results and their thresholds
 * are normal. */
static int find_bases(const struct format32 *f, const float *restrict divisors, const float *restrict multipliers,
                      const float *restrict levels, int64_t n, struct bases *restrict bases) {
    const uint32_t below = 127 - (base_of_one(f) >> 7), most = (f->max_value - f->min_power) >> FRACTION_BITS;
    const uint32_t range = 254 - BELOW - 2 - most;
    uint32_t is_beyond = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t divisor = bits32(divisors[i]) >> FRACTION_BITS;
        const uint32_t multiplier = bits32(multipliers[i]) >> FRACTION_BITS;
        is_beyond |= (divisor - 2 >= 252) | (multiplier - 2 >= 252);
        is_beyond |= (divisor - below - 1 >= range) | (multiplier - below - 1 >= range);
        bases->both[i] = (divisor - below) << 7 | (multiplier - below) << 23;
        bases->classes[i] = bits32(levels[i]) >> (FRACTION_BITS - 3) & (CLASSES - 1);
    }
    return !is_beyond;
}

/* Fractions from which on a cell has its second result, and both results as bits above an exponent's. */
struct cells {
    _Alignas(64) uint16_t thresholds[CELLS], below[CELLS], from[CELLS];
};

/* Of the results of CELLS times size numbers in order, the first of which is first. */
INLINE void find_cells(const uint16_t *results, int size, uint16_t first, struct cells *t) {
    for (int cell = 0; cell < CELLS; cell++) {
        const uint16_t *result = results + cell * size;
        int step = 0;
        while (step < size && result[step] == result[0]) {
            step++;
        }
        t->thresholds[cell] = (uint16_t)(cell * size + step); /* the next cell's first: none */
        t->below[cell] = result[0] - first;
        t->from[cell] = result[size - 1] - first;
    }
}

struct fractions {
    struct cells cells;
    uint16_t first, most; /* the least magnitude from which on they hold, 0: none; the largest magnitude of a result */
    float divisor, reciprocal, multiplier;
};

INLINE int fraction_bits_of(enum dtype dtype) { return dtype == FLOAT16 ? 10 : 7; }

/* Whether 16 bits become 16 bits by the plain rounding. */
INLINE int is_narrow_and_plain(const struct plan *p) {
    return (p->operation == QUANTIZE || p->operation == PROJECT) && !p->is_wide && is_narrow(p->out_dtype) &&
           p->dtypes[X] == p->out_dtype && variant_of(p) == PLAIN;
}

/* Whether n elements by one scale are worth it. */
INLINE int suits_fractions(const struct plan *p, const struct format32 *f, int64_t n) {
    return is_narrow_and_plain(p) && f->mantissa_bits <= 3 &&
           f->max_value >= f->min_power + ((uint32_t)RANGE << FRACTION_BITS) &&
           n >= (int64_t)8 << fraction_bits_of(p->out_dtype);
}

INLINE void quantize_exactly(const uint16_t *x, enum dtype dtype, const float *divisor, const float *reciprocal,
                             const float *multiplier, const struct format32 *f, uint16_t *out, int64_t n) {
    const struct vectors v = {x, out, divisor, reciprocal, multiplier, NULL, n, 0, 0};
    quantize_vectors(&v, dtype, BY_RECIPROCAL, 0, 0, PLAIN, NEAREST_TIES_TO_EVEN, f);
}

/* first begins the first binade of which all quotients are normal in the format. That divisors have exact reciprocals
 * leaves it far above the least float32; of x and of products it must be asked. Infinite products are what lies beyond
 * the largest. */
INLINE void find_fractions_in(const struct format32 *f, enum dtype dtype, float divisor, float multiplier,
                              struct fractions *t) {
    const int bits = fraction_bits_of(dtype);
    const uint32_t below = dtype == FLOAT16 ? 127 - 15 : 0, last = dtype == FLOAT16 ? 30 : 254;
    const uint32_t least = bits32(divisor * number32(f->min_power)), one = 1u << FRACTION_BITS;
    const uint32_t exponent = (least + one - 1) / one - below;
    const float largest = number32(f->max_value) * multiplier;
    t->divisor = divisor;
    t->multiplier = multiplier;
    t->most = dtype == FLOAT16 ? to_float16(largest) : to_bfloat16(largest);
    t->first = 0;
    if (!reciprocals_of(&divisor, 1, 0, NEAREST_TIES_TO_EVEN, f, &t->reciprocal) || exponent - 1 >= last ||
        multiplier * number32(f->min_power) < number32((below + 1) << FRACTION_BITS)) {
        return;
    }
    t->first = (uint16_t)(exponent << bits);
    uint16_t x[1024], results[1024];
    for (uint16_t i = 0; i < 1 << bits; i++) {
        x[i] = t->first + i;
    }
    quantize_exactly(x, dtype, &t->divisor, &t->reciprocal, &t->multiplier, f, results, 1 << bits);
    find_cells(results, (1 << bits) / CELLS, t->first, &t->cells);
}

static void find_fractions(const struct format32 *f, enum dtype dtype, float divisor, float multiplier,
                           struct fractions *t) {
    if (dtype == FLOAT16) {
        find_fractions_in(f, FLOAT16, divisor, multiplier, t);
    } else {
        find_fractions_in(f, BFLOAT16, divisor, multiplier, t);
    }
}

/* n <= CHUNK elements. Returns the largest magnitudes of x. With bases, of each 32 elements of bfloat16, the scales are
 * powers of two, and the fractions those of 1. */
INLINE __m512i quantize_by_fractions(const struct fractions *t, const struct format32 *f, enum dtype dtype,
                                     const struct bases *bases, const float *divisors, const uint16_t *x, uint16_t *out,
                                     int64_t n) {
    const int bits_of_fraction = fraction_bits_of(dtype);
    const __m512i thresholds = _mm512_load_si512(t->cells.thresholds),
                  of_fraction = _mm512_set1_epi16((1 << bits_of_fraction) - 1);
    const __m512i below = _mm512_load_si512(t->cells.below), from = _mm512_load_si512(t->cells.from);
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), one = _mm512_set1_epi16(1);
    const uint16_t base = bases == NULL ? 0 : base_of_one(f);
    const __m512i most_of_one = _mm512_set1_epi16((int16_t)(t->most - base));
    const __m512i before_of_one = _mm512_set1_epi16((int16_t)(t->first - base - 1));
    __m512i largest = _mm512_setzero_si512(), most = most_of_one, before = before_of_one;
    uint32_t rest = 0; /* vectors with elements below first but for 0 */
    for (int64_t next = 0; next < n; next += 32) {
        const int64_t i = next < n - 32 ? next : n - 32;
        if (bases != NULL) {
            const __m512i base_of_block = divisor_base(bases, i / 32);
            most = _mm512_add_epi16(most_of_one, base_of_block);
            before = _mm512_add_epi16(before_of_one, base_of_block);
        }
        const __m512i bits = _mm512_loadu_si512(x + i), a = _mm512_and_si512(bits, magnitude);
        const __m512i fraction = _mm512_and_si512(bits, of_fraction);
        const __m512i cell = _mm512_srli_epi16(bits, (unsigned)bits_of_fraction - 5); /* its low five bits */
        const __mmask32 is_from = _mm512_cmpge_epu16_mask(fraction, _mm512_permutexvar_epi16(cell, thresholds));
        const __m512i above = _mm512_mask_permutexvar_epi16(_mm512_permutexvar_epi16(cell, below), is_from, cell, from);
        const __m512i sum = _mm512_add_epi16(_mm512_andnot_si512(of_fraction, a), above);
        const __m512i y = _mm512_maskz_min_epu16(_mm512_test_epi16_mask(a, a), sum, most);
        _mm512_storeu_si512(out + i, _mm512_ternarylogic_epi32(y, bits, magnitude, 0xf4)); /* y | (bits & ~magnitude) */
        const __mmask32 is_small = _mm512_cmplt_epu16_mask(_mm512_sub_epi16(a, one), before);
        rest |= (uint32_t)(is_small != 0) << (next / 32);
        largest = _mm512_max_epu16(largest, a);
    }
    /* By themselves, and one after the other without a guess: a wrong one would wait for memory. */
    for (; rest != 0; rest &= rest - 1) {
        const int64_t next = 32 * __builtin_ctz(rest), i = next < n - 32 ? next : n - 32;
        if (bases == NULL) {
            quantize_exactly(x + i, dtype, &t->divisor, &t->reciprocal, &t->multiplier, f, out + i, 32);
        } else {
            const float *divisor = &divisors[i / 32], reciprocal = 1 / *divisor;
            quantize_exactly(x + i, dtype, divisor, &reciprocal, divisor, f, out + i, 32);
        }
    }
    return largest;
}

INLINE __m512i quantize_by_scale(const struct fractions *t, const struct format32 *f, enum dtype dtype,
                                 const uint16_t *x, uint16_t *out, int64_t n) {
    return dtype == FLOAT16 ? quantize_by_fractions(t, f, FLOAT16, NULL, NULL, x, out, n)
                            : quantize_by_fractions(t, f, BFLOAT16, NULL, NULL, x, out, n);
}

/* The largest |q|, as quantize_vectors returns it. */
INLINE uint32_t largest_quotient(__m512i magnitudes, enum dtype dtype, float divisor) {
    const __m256i of_16 =
        _mm256_max_epu16(_mm512_castsi512_si256(magnitudes), _mm512_extracti64x4_epi64(magnitudes, 1));
    const __m128i of_8 = _mm_max_epu16(_mm256_castsi256_si128(of_16), _mm256_extracti128_si256(of_16, 1));
    const __m128i least_left = _mm_minpos_epu16(_mm_andnot_si128(of_8, _mm_set1_epi32(-1)));
    const uint16_t most = (uint16_t)~_mm_cvtsi128_si32(least_left);
    return bits32((dtype == FLOAT16 ? from_float16(most) : number32((uint32_t)most << 16)) / divisor);
}

#endif
