/* quantize of bfloat16 to formats like E2M1 in blocks of 16 or 32, for AVX-512. Seven thresholds tell their values
 * apart: magnitudes of x from which on the result is the next one. As bits, counted from a power of two near the scale,
 * thresholds and results depend on the scale's fraction alone, and a format of scales has eight of these at most. A
 * threshold is at least 1.4 times the one before it, so each quarter of a power of two, a cell, has one or none, which
 * is looked up, and what results below it; from it on that is what the next cell begins with. Without this file every
 * result is the same.
 */

#ifdef __AVX512BW__

/* Of each cell of a class of scales; the first begins at the base of the divisor, and results are counted from that of
 * the multiplier. */
struct thresholds {
    _Alignas(64) uint16_t thresholds[CELLS], values[CELLS]; /* beyond all: none; what the cell begins with, 0: zero */
};

INLINE int suits_thresholds(const struct blocks *b, const struct format32 *f) {
    return is_narrow_and_plain(b->plan) && b->plan->out_dtype == BFLOAT16 && f->mantissa_bits == 1 &&
           f->max_value == f->min_power + (5u << (FRACTION_BITS - 1)) &&
           (b->is_power || (b->level != NULL && b->level->mantissa_bits <= 3 && b->tensor_scale >= 0x1p-126f));
}

INLINE float fraction_of(float number) {
    return number32((bits32(number) & ((1u << FRACTION_BITS) - 1)) | 127u << FRACTION_BITS);
}

/* Those of a class, for scales from 1 to 2. Below a midpoint's product is one number that might be rounded up, as a
 * tie, and above it is one that might be rounded down. */
static void find_thresholds(const struct format32 *f, float divisor, float multiplier, struct thresholds *t) {
    static const float values[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6}; /* times the least normal number */
    enum { STEPS = 7 };
    const float least = number32(f->min_power);
    const uint16_t base = base_of_one(f);
    uint16_t x[CELLS] = {0}, results[CELLS], found[STEPS], of_values[STEPS + 1] = {0};
    for (int i = 0; i < STEPS; i++) {
        const float midpoint = (values[i] + values[i + 1]) / 2 * least;
        x[2 * i] = (uint16_t)(bits32(midpoint * divisor) >> 16);
        x[2 * i + 1] = x[2 * i] + 1;
        of_values[i + 1] = to_bfloat16(values[i + 1] * least * multiplier);
    }
    const struct vectors v = {x, results, &divisor, NULL, &multiplier, NULL, CELLS, 0, 0};
    quantize_vectors(&v, BFLOAT16, DIVISION, 0, 0, PLAIN, NEAREST_TIES_TO_EVEN, f);
    for (int i = 0; i < STEPS; i++) {
        const uint16_t value = of_values[i + 1];
        found[i] = x[2 * i] + (results[2 * i] < value) + (results[2 * i + 1] < value) - base;
    }
    for (int cell = 0; cell < CELLS; cell++) {
        const uint16_t begin = (uint16_t)(cell * CELLS), end = begin + CELLS;
        t->thresholds[cell] = UINT16_MAX;
        t->values[cell] = 0;
        for (int i = 0; i < STEPS; i++) {
            if (found[i] <= begin) {
                t->values[cell] = of_values[i + 1] - base;
            } else if (found[i] < end) {
                t->thresholds[cell] = found[i];
            }
        }
    }
}

/* Those of all classes: the scales of blocks are 1 to 2 in eighths, times the tensor's, or powers of two. */
static void find_classes(const struct blocks *b, const struct format32 *f, struct thresholds *classes) {
    for (int i = 0; i < (b->is_power ? 1 : CLASSES); i++) {
        const float level = 1 + (float)i / CLASSES;
        const float divisor = fraction_of(b->is_power ? 1 : level * fraction_of(b->tensor_scale));
        find_thresholds(f, divisor, b->is_power || b->with_tensor_scale ? divisor : level, &classes[i]);
    }
}

/* As many as shared have a scale, 16 or 32, and n elements are whole pairs of 16. */
INLINE void quantize_by_thresholds(const struct thresholds *classes, const struct bases *bases, int shared,
                                   const uint16_t *x, uint16_t *out, int64_t n) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), one = _mm512_set1_epi16(1),
                  last = _mm512_set1_epi16(CELLS - 1);
    const __mmask32 second = 0xffff0000;
    for (int64_t i = 0; i < n; i += 32) {
        const int64_t block = i / shared;
        const struct thresholds *t = &classes[bases->classes[block]], *u = t;
        __m512i divisor = divisor_base(bases, block), multiplier = multiplier_base(bases, block);
        if (shared == 16) {
            u = &classes[bases->classes[block + 1]];
            divisor = _mm512_mask_mov_epi16(divisor, second, divisor_base(bases, block + 1));
            multiplier = _mm512_mask_mov_epi16(multiplier, second, multiplier_base(bases, block + 1));
        }
#define LOOK_UP(MEMBER, cell)                                                                                          \
    _mm512_mask_permutexvar_epi16(_mm512_permutexvar_epi16(cell, _mm512_load_si512(t->MEMBER)), second, cell,          \
                                  _mm512_load_si512(u->MEMBER))
        const __m512i bits = _mm512_loadu_si512(x + i);
        const __m512i above = _mm512_subs_epu16(_mm512_and_si512(bits, magnitude), divisor);
        __m512i cell = _mm512_min_epu16(_mm512_srli_epi16(above, 5), last);
        const __mmask32 is_next = _mm512_cmpge_epu16_mask(above, LOOK_UP(thresholds, cell));
        cell = _mm512_mask_add_epi16(cell, is_next, cell, one);
        const __m512i value = LOOK_UP(values, cell);
#undef LOOK_UP
        const __m512i y = _mm512_maskz_add_epi16(_mm512_test_epi16_mask(value, value), value, multiplier);
        _mm512_storeu_si512(out + i, _mm512_ternarylogic_epi32(y, bits, magnitude, 0xf4)); /* y | (bits & ~magnitude) */
    }
}

#endif
