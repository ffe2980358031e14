/* The largest magnitudes of blocks of a row, NaN the largest of all. A magnitude is compared as the bits of its number.
 */

/* Of n numbers, as bits. */
INLINE uint32_t most_of_floats(const uint32_t *numbers, int64_t n) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t a = numbers[i] & 0x7fffffffu;
        largest = (int32_t)a > (int32_t)largest ? a : largest;
    }
    return largest;
}

/* Of 32, the least of what is left to all ones is one instruction for eight; of other numbers compilers are as fast. */
INLINE uint16_t most_of_halves(const uint16_t *numbers, int64_t n) {
    uint16_t largest = 0;
    int64_t i = 0;
#ifdef __SSE4_1__
    if (n == 32) {
        __m128i most = _mm_setzero_si128();
        for (; i < n; i += 8) {
            const __m128i a = _mm_loadu_si128((const __m128i *)(const void *)(numbers + i));
            most = _mm_max_epi16(most, _mm_and_si128(a, _mm_set1_epi16(0x7fff)));
        }
        largest = (uint16_t)~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_andnot_si128(most, _mm_set1_epi32(-1))));
    }
#endif
    for (; i < n; i++) {
        const uint16_t a = numbers[i] & 0x7fffu;
        largest = (int16_t)a > (int16_t)largest ? a : largest;
    }
    return largest;
}

/* The widths of formats as constants: loops of a few vectors without ends. */
#define EACH_WIDTH(CALL)                                                                                               \
    if (width == 16) {                                                                                                 \
        CALL(16);                                                                                                      \
    } else if (width == 32) {                                                                                          \
        CALL(32);                                                                                                      \
    } else {                                                                                                           \
        CALL(width);                                                                                                   \
    }

INLINE float most_of(const void *x, enum dtype dtype, int64_t begin, int64_t n) {
    if (dtype == FLOAT32) {
        return number32(most_of_floats((const uint32_t *)x + begin, n));
    }
    const uint16_t most = most_of_halves((const uint16_t *)x + begin, n);
    return dtype == FLOAT16 ? from_float16(most) : number32((uint32_t)most << 16);
}

#ifdef __AVX512BW__
/* Of a and of b, side by side in units of SIZE bits: the larger ones of the first and of the last units of each lane.
 */
#define FOLD(TYPE, SIZE, a, b) _mm512_max_##TYPE(_mm512_unpacklo_epi##SIZE(a, b), _mm512_unpackhi_epi##SIZE(a, b))
#define FOLD_LANES(TYPE, a, b, FIRST, LAST)                                                                            \
    _mm512_max_##TYPE(_mm512_shuffle_i32x4(a, b, FIRST), _mm512_shuffle_i32x4(a, b, LAST))

/* The largest magnitudes of 16 blocks of 16 or 32 floats: a block is a vector, and all are folded at once until one
 * vector has a number of each. */
INLINE __m512 most_of_16_blocks_of_floats(const uint32_t *x, int64_t width) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i rows[16];
    for (int i = 0; i < 16; i++, x += width) {
        rows[i] = _mm512_and_si512(_mm512_loadu_si512(x), magnitude);
        if (width == 32) {
            rows[i] = _mm512_max_epi32(rows[i], _mm512_and_si512(_mm512_loadu_si512(x + 16), magnitude));
        }
    }
    for (int i = 0; i < 8; i++) {
        rows[i] = FOLD(epi32, 32, rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = FOLD(epi32, 64, rows[2 * i], rows[2 * i + 1]);
    }
    rows[0] = FOLD_LANES(epi32, rows[0], rows[1], 0x88, 0xdd);
    rows[1] = FOLD_LANES(epi32, rows[2], rows[3], 0x88, 0xdd);
    return _mm512_castsi512_ps(FOLD_LANES(epi32, rows[0], rows[1], 0x88, 0xdd));
}

/* The same of halves, of which a vector has two blocks. */
INLINE __m512 most_of_16_blocks_of_halves(const uint16_t *x, enum dtype dtype, int64_t width) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i rows[8];
    for (int i = 0; i < 8; i++, x += 2 * width) {
        rows[i] = _mm512_and_si512(_mm512_loadu_si512(x), magnitude);
        if (width == 32) {
            const __m512i second = _mm512_and_si512(_mm512_loadu_si512(x + 32), magnitude);
            rows[i] = FOLD_LANES(epi16, rows[i], second, 0x44, 0xee);
        }
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = FOLD(epi16, 16, rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        rows[i] = FOLD(epi16, 32, rows[2 * i], rows[2 * i + 1]);
    }
    rows[0] = FOLD(epi16, 64, rows[0], rows[1]);
    rows[0] =
        FOLD_LANES(epi16, rows[0], rows[0], 0x88, 0xdd); /* the even blocks in the first lane, then the odd ones */
    const __m128i even = _mm512_castsi512_si128(rows[0]), odd = _mm512_extracti32x4_epi32(rows[0], 1);
    const __m256i most = _mm256_set_m128i(_mm_unpackhi_epi16(even, odd), _mm_unpacklo_epi16(even, odd));
    return dtype == FLOAT16 ? _mm512_cvtph_ps(most)
                            : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(most), 16));
}
#undef FOLD
#undef FOLD_LANES

#define MOST_OF_16(WIDTH)                                                                                              \
    (dtype == FLOAT32 ? most_of_16_blocks_of_floats((const uint32_t *)x + block * WIDTH, WIDTH)                        \
                      : most_of_16_blocks_of_halves((const uint16_t *)x + block * WIDTH, dtype, WIDTH))
#endif

/* The largest magnitudes of blocks of width elements, the last of which may have fewer. */
INLINE void most_of_blocks(const void *x, enum dtype dtype, int64_t n, int64_t width, float *restrict amax) {
    const int64_t whole = n / width;
    int64_t block = 0;
#ifdef __AVX512BW__
    for (; block + 16 <= whole && (width == 16 || width == 32); block += 16) {
        _mm512_storeu_ps(amax + block, width == 16 ? MOST_OF_16(16) : MOST_OF_16(32));
    }
#undef MOST_OF_16
#endif
#define MOST_OF_EACH(WIDTH)                                                                                            \
    for (; block < whole; block++) {                                                                                   \
        amax[block] = most_of(x, dtype, block * WIDTH, WIDTH);                                                         \
    }
    EACH_WIDTH(MOST_OF_EACH)
#undef MOST_OF_EACH
    if (n > whole * width) {
        amax[whole] = most_of(x, dtype, whole * width, n - whole * width);
    }
}

static void most_of_row(const void *x, enum dtype dtype, int64_t n, int64_t width, float *amax) {
    if (dtype == FLOAT32) {
        most_of_blocks(x, FLOAT32, n, width, amax);
    } else if (dtype == FLOAT16) {
        most_of_blocks(x, FLOAT16, n, width, amax);
    } else {
        most_of_blocks(x, BFLOAT16, n, width, amax);
    }
}
