/* quantize of loops.h for AVX-512, in float32: what is converted, divided, rounded and multiplied stays in registers,
 * and where project_adjusted in nearest.h goes from the nearest value to another, an instruction rounds its own way.
 * By a scale that serves many elements nothing is divided: a division takes as long as all the rest.
 */

#ifdef __AVX512F__

#define RZ (_MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)
#define RU (_MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC)
#define RD (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)

/* 32 elements: the first and the second half, of bfloat16 the even and the odd ones. */
struct pair {
    __m512 a, b;
};

INLINE struct pair load_pair(const void *from, enum dtype dtype, int64_t i) {
    const uint16_t *halves = (const uint16_t *)from + i;
    if (dtype == FLOAT32) {
        const float *floats = (const float *)from + i;
        return (struct pair){_mm512_loadu_ps(floats), _mm512_loadu_ps(floats + 16)};
    }
    if (dtype == FLOAT16) {
        return (struct pair){_mm512_cvtph_ps(_mm256_loadu_si256((const void *)halves)),
                             _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(halves + 16)))};
    }
    const __m512i words = _mm512_loadu_si512(halves);
    return (struct pair){_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
                         _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)))};
}

/* float32 beside elements of the dtype. */
INLINE struct pair load_beside(const void *from, enum dtype dtype, int64_t i) {
    const struct pair p = load_pair(from, FLOAT32, i);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return dtype != BFLOAT16
               ? p
               : (struct pair){_mm512_permutex2var_ps(p.a, even, p.b), _mm512_permutex2var_ps(p.a, odd, p.b)};
}

/* to_bfloat16 in the upper half of each. The only NaN here is 0 * infinity, which ends in zeros and so stays NaN. */
INLINE __m512i rounded_to_bfloat16(__m512 numbers) {
    const __m512i bits = _mm512_castps_si512(numbers), below_half = _mm512_set1_epi32(0x7fff);
    const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    return _mm512_add_epi32(bits, _mm512_mask_mov_epi32(below_half, is_odd, _mm512_set1_epi32(0x8000)));
}

INLINE void store_pair(void *to, enum dtype dtype, int is_short, int64_t i, struct pair p) {
    uint16_t *halves = (uint16_t *)to + i;
    if (dtype == FLOAT32) {
        _mm512_storeu_ps((float *)to + i, p.a);
        _mm512_storeu_ps((float *)to + i + 16, p.b);
    } else if (dtype == FLOAT16) {
        const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        _mm256_storeu_si256((void *)halves, _mm512_cvtps_ph(p.a, nearest));
        _mm256_storeu_si256((void *)(halves + 16), _mm512_cvtps_ph(p.b, nearest));
    } else {
        const __m512i even = is_short ? _mm512_castps_si512(p.a) : rounded_to_bfloat16(p.a);
        const __m512i odd = is_short ? _mm512_castps_si512(p.b) : rounded_to_bfloat16(p.b);
        _mm512_storeu_si512(halves, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd));
    }
}

/* a | (b & c) */
INLINE __m512 with_bits(__m512 a, __m512 b, __m512i c) {
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b), c, 0xf8));
}

/* project_nearest and project_adjusted. No sum rounded toward zero passes a multiple of the quantum, as these are
 * float32 numbers. So magic + x toward zero is magic + below; and so is what follows from x + quantum / 2, or from x +
 * R * quantum / 2^N, rounded toward zero: its value below is that at or above the midpoint, or StochasticA's. */
INLINE __m512 project_vector(__m512 q, __m512 signs, __m512i random, enum variant variant, enum rounding rounding,
                             const struct format32 *f, __m512i *most) {
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    const __m512i quotient = _mm512_andnot_si512(sign, _mm512_castps_si512(q));
    *most = _mm512_max_epi32(*most, quotient);
    const __m512i a = _mm512_min_epi32(quotient, _mm512_set1_epi32((int32_t)f->limits[0]));
    const __m512i exponent = _mm512_and_si512(a, _mm512_set1_epi32(FLOAT32_INFINITY));
    const __m512i power = _mm512_max_epi32(exponent, _mm512_set1_epi32((int32_t)f->min_power));
    __m512 x = _mm512_castsi512_ps(a), p = _mm512_castsi512_ps(power), quanta = _mm512_set1_ps(f->quanta), sum;
    if (variant == POWERS) {
        const __m512i more = _mm512_srli_epi32(power, 23);
        quanta = _mm512_castsi512_ps(_mm512_add_epi32(more, _mm512_set1_epi32((int32_t)f->power_quanta)));
    }
    switch (rounding) {
    case NEAREST_TIES_TO_AWAY:
        x = _mm512_fmadd_round_ps(p, _mm512_set1_ps(f->half_quantum), x, RZ);
        sum = _mm512_fmadd_round_ps(p, quanta, x, RZ);
        break;
    case TOWARD_ZERO:
        sum = _mm512_fmadd_round_ps(p, quanta, x, RZ);
        break;
    case TOWARD_POSITIVE:
        p = with_bits(p, signs, sign);
        sum = _mm512_fmadd_round_ps(p, quanta, with_bits(x, signs, sign), RU);
        break;
    case TOWARD_NEGATIVE:
        p = with_bits(p, signs, sign);
        sum = _mm512_fmadd_round_ps(p, quanta, with_bits(x, signs, sign), RD);
        break;
    case TO_ODD: /* of the two sums beside x the one with an odd fraction */
        sum = with_bits(_mm512_fmadd_round_ps(p, quanta, x, RZ), _mm512_fmadd_round_ps(p, quanta, x, RU),
                        _mm512_set1_epi32(1));
        break;
    case STOCHASTIC: {
        const __m512i r = _mm512_and_si512(random, _mm512_set1_epi32((int32_t)f->random_mask));
        const __m512 step = _mm512_mul_ps(p, _mm512_set1_ps(f->random_quantum));
        x = _mm512_fmadd_round_ps(_mm512_cvtepi32_ps(r), step, x, RZ);
        sum = _mm512_fmadd_round_ps(p, quanta, x, RZ);
        break;
    }
    default:
        sum = _mm512_fmadd_ps(p, quanta, x);
    }
    const __m512 y = with_bits(_mm512_fnmadd_ps(p, quanta, sum), signs, sign);
    return variant == UNSIGNED_ZERO ? _mm512_add_ps(y, _mm512_setzero_ps()) : y;
}

/* How x is divided: by a division; by the product with the reciprocal of a power of two, which is exact; or by the
 * product with a reciprocal, and what that leaves of x. */
enum division { DIVISION, BY_POWER, BY_RECIPROCAL };

INLINE __m512 quotient_of(__m512 x, __m512 divisor, __m512 reciprocal, enum division division) {
    if (division == DIVISION) {
        return _mm512_div_ps(x, divisor);
    }
    const __m512 q = _mm512_mul_ps(x, reciprocal);
    if (division == BY_POWER) {
        return q;
    }
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(q, divisor, x), reciprocal, q); /* 0 of -0 */
}

/* The reciprocals of n divisors; whether BY_RECIPROCAL gives with each what a division gives, rounded to the format.
 *
 * The product is off by less than 1.5 ulp, and is corrected exactly where what it leaves is a float32 number, as it is
 * from |x| = 2^-101 on, and the quotient is normal: tests/test_cuda.py tries the quotients for which that might not do.
 * What is smaller must be so small for the format that an ulp is nothing; where rounding tells 0 from what is above it,
 * divisors up to 1 make no zero: the least product is 2^-149 then, and leaves nothing below 0 of it. An infinite
 * product becomes NaN, and the chunk is done again. By powers of two the product is the quotient, and nothing is left,
 * or the same is rounded again. */
static int reciprocals_of(const float *restrict divisors, int64_t n, int are_powers, enum rounding rounding,
                          const struct format32 *f, float *restrict reciprocals) {
    const float half = number32(f->min_power) * f->half_quantum; /* of the smallest quantum */
    const float decides = half * (rounding == STOCHASTIC ? 0x1p-34f : 0.5f);
    const int tells_zero = rounding == TOWARD_POSITIVE || rounding == TOWARD_NEGATIVE || rounding == TO_ODD;
    const float limit = tells_zero ? 1 : 0x1p126f;
    const float least = 0x1p-101f / decides > 0x1p-126f ? 0x1p-101f / decides : 0x1p-126f;
    int are_exact = decides >= 0x1p-126f;
    for (int64_t i = 0; i < n; i++) {
        reciprocals[i] = 1 / divisors[i];
        are_exact &= divisors[i] >= least && divisors[i] <= limit;
    }
    return are_powers || are_exact;
}

/* The scales of 32 elements of the dtype: of all, of each, of half or of all of these. */
INLINE struct pair load_scales(const float *scales, int shared, enum dtype dtype, int64_t i) {
    if (shared == 1) {
        return load_beside(scales, dtype, i);
    }
    const __m512 first = _mm512_set1_ps(scales[shared ? i / shared : 0]);
    if (shared != 16) {
        return (struct pair){first, first};
    }
    const __m512 second = _mm512_set1_ps(scales[i / 16 + 1]);
    const __m512 halves = _mm512_mask_blend_ps(0xff00, first, second); /* of the even elements, and of the odd ones */
    return dtype != BFLOAT16 ? (struct pair){first, second} : (struct pair){halves, halves};
}

/* The operands of quantize32 where x has the dtype of out; n >= 32, and whole pairs where more than one share a scale.
 */
struct vectors {
    const void *x;
    void *out;
    const float *divisor, *reciprocal, *multiplier; /* reciprocal: where they are not of each element */
    const uint32_t *random;
    int64_t n;
    int are_powers, is_short; /* the divisors; the products with the multipliers */
};

/* Returns the largest |q|, as quantize_each does. The last pair may begin in the one before it. Short products are cut
 * to bfloat16; where that loses a bit, as of subnormals, UINT32_MAX is returned instead. */
INLINE uint32_t quantize_vectors(const struct vectors *operands, enum dtype dtype, enum division division, int is_short,
                                 int shared, enum variant variant, enum rounding rounding,
                                 const struct format32 *format) {
    const struct vectors v = *operands;
    const struct format32 f = *format;
    __m512i most = _mm512_setzero_si512(), used = most; /* bits of products */
    const struct pair none = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    struct pair random = none;
    for (int64_t next = 0; next < v.n; next += 32) {
        const int64_t i = next < v.n - 32 ? next : v.n - 32;
        const struct pair x = load_pair(v.x, dtype, i), multiplier = load_scales(v.multiplier, shared, dtype, i);
        const struct pair d = division == BY_POWER ? none : load_scales(v.divisor, shared, dtype, i);
        const struct pair r = division == DIVISION ? none : load_scales(v.reciprocal, shared, dtype, i);
        if (rounding == STOCHASTIC) {
            random = load_beside(v.random, dtype, i);
        }
        struct pair y = {quotient_of(x.a, d.a, r.a, division), quotient_of(x.b, d.b, r.b, division)};
        const struct pair signs = division == DIVISION ? y : x; /* divisors are positive elsewhere */
        y.a = project_vector(y.a, signs.a, _mm512_castps_si512(random.a), variant, rounding, &f, &most);
        y.b = project_vector(y.b, signs.b, _mm512_castps_si512(random.b), variant, rounding, &f, &most);
        y = (struct pair){_mm512_mul_ps(y.a, multiplier.a), _mm512_mul_ps(y.b, multiplier.b)};
        used = _mm512_ternarylogic_epi32(used, _mm512_castps_si512(y.a), _mm512_castps_si512(y.b), 0xfe);
        store_pair(v.out, dtype, is_short, i, y);
    }
    if (is_short && _mm512_test_epi32_mask(used, _mm512_set1_epi32(0xffff)) != 0) {
        return UINT32_MAX;
    }
    return (uint32_t)_mm512_reduce_max_epi32(most);
}

static uint32_t quantize_chunk512(const struct vectors *v, enum dtype dtype, int shared, enum variant variant,
                                  enum rounding rounding, const struct format32 *f) {
#define SHORT(DIVISION, SHARED) quantize_vectors(v, BFLOAT16, DIVISION, 1, SHARED, PLAIN, NEAREST_TIES_TO_EVEN, f)
    if (v->is_short && variant == PLAIN && dtype == BFLOAT16 && shared > 1) {
        return v->are_powers  ? shared == 16 ? SHORT(BY_POWER, 16) : SHORT(BY_POWER, 32)
                : shared == 16 ? SHORT(BY_RECIPROCAL, 16)
                              : SHORT(BY_RECIPROCAL, 32);
    }
#undef SHORT
#define EACH_SCALE(DTYPE, VARIANT, ROUNDING)                                                                           \
    shared == 0    ? quantize_vectors(v, DTYPE, BY_RECIPROCAL, 0, 0, VARIANT, ROUNDING, f)                             \
    : shared == 1  ? quantize_vectors(v, DTYPE, DIVISION, 0, 1, VARIANT, ROUNDING, f)                                  \
    : shared == 16 ? quantize_vectors(v, DTYPE, BY_RECIPROCAL, 0, 16, VARIANT, ROUNDING, f)                            \
                   : quantize_vectors(v, DTYPE, BY_RECIPROCAL, 0, 32, VARIANT, ROUNDING, f)
#define EACH_DTYPE(VARIANT, ROUNDING)                                                                                  \
    return dtype == FLOAT32   ? EACH_SCALE(FLOAT32, VARIANT, ROUNDING)                                                 \
           : dtype == FLOAT16 ? EACH_SCALE(FLOAT16, VARIANT, ROUNDING)                                                 \
                              : EACH_SCALE(BFLOAT16, VARIANT, ROUNDING)
    switch (rounding) {
    case NEAREST_TIES_TO_AWAY:
        EACH_DTYPE(ADJUSTED, NEAREST_TIES_TO_AWAY);
    case TOWARD_ZERO:
        EACH_DTYPE(ADJUSTED, TOWARD_ZERO);
    case TOWARD_POSITIVE:
        EACH_DTYPE(ADJUSTED, TOWARD_POSITIVE);
    case TOWARD_NEGATIVE:
        EACH_DTYPE(ADJUSTED, TOWARD_NEGATIVE);
    case TO_ODD:
        EACH_DTYPE(ADJUSTED, TO_ODD);
    case STOCHASTIC:
        EACH_DTYPE(ADJUSTED, STOCHASTIC);
    default:
        break;
    }
    if (variant == POWERS) {
        EACH_DTYPE(POWERS, NEAREST_TIES_TO_EVEN);
    }
    if (variant == UNSIGNED_ZERO) {
        EACH_DTYPE(UNSIGNED_ZERO, NEAREST_TIES_TO_EVEN);
    }
    EACH_DTYPE(PLAIN, NEAREST_TIES_TO_EVEN);
#undef EACH_DTYPE
#undef EACH_SCALE
}

#undef RZ
#undef RU
#undef RD
#endif
