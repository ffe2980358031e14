/* The scales of narrow blocks of bfloat16 in a format of three mantissa bits at most, for AVX-512: the largest
 * magnitude by the largest value of the format and by the tensor's scale, rounded. Where all of these are normal
 * numbers they double with the magnitude, so what those of one binade have is looked up, as fractions.h does it for
 * elements. What thresholds.h needs follows from the scale's exponent and fraction. Without this file every result is
 * the same.
 */

#ifdef __AVX512BW__

/* The cells of fractions.h as bits of float32. The first and the end of the magnitudes for which they hold, the end 0
 * where there are none. */
struct levels {
    _Alignas(64) uint32_t thresholds[CELLS], below[CELLS], from[CELLS];
    uint32_t offsets[2 * CLASSES]; /* of both bases from the exponent, twice for a whole vector */
    uint32_t first, end, most;
};

/* From the levels of all magnitudes that bfloat16 has in the first binade. With three mantissa bits at most they are
 * numbers of bfloat16 too. */
static void fill_levels(const float *levels, struct levels *t) {
    enum { BINADE = 128 };
    uint16_t results[BINADE];
    struct cells cells;
    for (int i = 0; i < BINADE; i++) {
        results[i] = to_bfloat16(levels[i]);
    }
    find_cells(results, BINADE / CELLS, (uint16_t)(t->first >> 16), &cells);
    for (int cell = 0; cell < CELLS; cell++) {
        t->thresholds[cell] = (uint32_t)cells.thresholds[cell] << 16;
        t->below[cell] = (uint32_t)cells.below[cell] << 16;
        t->from[cell] = (uint32_t)cells.from[cell] << 16;
    }
}

/* From the bases of each class for this exponent, in both halves. */
static void fill_offsets(const uint32_t *bases, uint32_t exponent, struct levels *t) {
    for (int i = 0; i < 2 * CLASSES; i++) {
        const uint32_t both = bases[i % CLASSES];
        t->offsets[i] = ((both - exponent) & 0xffff) | ((both >> 16) - exponent) << 16;
    }
}

INLINE __m512i look_up_16(const uint32_t *table, __m512i cells) {
    return _mm512_permutex2var_epi32(_mm512_load_si512(table), cells, _mm512_load_si512(table + CELLS / 2));
}

/* Whether the bases of n blocks could be looked up by their largest magnitudes. */
static int look_up_bases(const struct levels *t, const float *amax, int64_t n, struct bases *bases) {
    const __m512i of_fraction = _mm512_set1_epi32((1 << FRACTION_BITS) - 1);
    const __m512i offsets = _mm512_load_si512(t->offsets);
    __mmask16 is_beyond = 0;
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 used = n - i < 16 ? (__mmask16)((1u << (n - i)) - 1) : 0xffff;
        const __m512i bits = _mm512_loadu_si512(amax + i), fraction = _mm512_and_si512(bits, of_fraction);
        const __m512i cell = _mm512_srli_epi32(bits, FRACTION_BITS - 5); /* its low five bits */
        const __mmask16 is_from = _mm512_cmpge_epu32_mask(fraction, look_up_16(t->thresholds, cell));
        const __m512i above = _mm512_mask_mov_epi32(look_up_16(t->below, cell), is_from, look_up_16(t->from, cell));
        const __m512i sum = _mm512_add_epi32(_mm512_andnot_si512(of_fraction, bits), above);
        const __m512i level = _mm512_min_epu32(sum, _mm512_set1_epi32((int)t->most));
        is_beyond |= _mm512_mask_cmpge_epu32_mask(used, _mm512_sub_epi32(bits, _mm512_set1_epi32((int)t->first)),
                                                  _mm512_set1_epi32((int)(t->end - t->first)));
        const __m512i class = _mm512_and_si512(_mm512_srli_epi32(level, FRACTION_BITS - 3), _mm512_set1_epi32(7));
        const __m512i exponent = _mm512_and_si512(_mm512_srli_epi32(level, 16), _mm512_set1_epi32(0x7f80));
        const __m512i both = _mm512_or_si512(exponent, _mm512_slli_epi32(exponent, 16));
        _mm512_storeu_si512(bases->both + i, _mm512_add_epi16(both, _mm512_permutexvar_epi32(class, offsets)));
        _mm512_storeu_si512(bases->classes + i, class);
    }
    return is_beyond == 0;
}

#endif
