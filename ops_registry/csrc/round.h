/* The rounding, the same for every operator. kernels.c includes this once for each compute type, with these defined:
 * FLOAT, UINT (unsigned of the same width), FRACTION_BITS, EXPONENT_BIAS, and NAME(x), which tells the types apart.
 *
 * Steps: divide, round, saturate, multiply; in the codecs pack and unpack. Magnitudes are handled as their bits, which
 * compare as the numbers do, and nothing branches, so that loops over these functions vectorize.
 */

#define SIGN ((UINT)1 << (8 * sizeof(UINT) - 1))
#define INFINITE ((UINT)(2 * EXPONENT_BIAS + 1) << FRACTION_BITS)
#define ONE_EXPONENT ((UINT)1 << FRACTION_BITS)

/* A plan in the compute type; magnitudes are bits. */
struct NAME(format) {
    UINT mantissa_bits, min_step, magic_offset;
    UINT limit, max_value, over_values[2], infinite_value, sign_of_zero;
    UINT max_code, over_codes[2], infinite_code, nan_code, sign_code, first_signed, signed_codes;
    UINT inf_code, has_nan;
    FLOAT random_range;
};

INLINE FLOAT NAME(number)(UINT bits) {
    FLOAT number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

INLINE UINT NAME(bits)(FLOAT number) {
    UINT bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

INLINE UINT NAME(max)(UINT a, UINT b) { return a > b ? a : b; }
INLINE UINT NAME(min)(UINT a, UINT b) { return a < b ? a : b; }

/* The number that rounds by being added.
 *
 * step is 2^e, e being the exponent of a magnitude but at least min_exponent, so values of the format are one quantum
 * q = 2^(e - M) apart there. magic is 2^FRACTION_BITS quanta, hence adding a to it rounds a to whole quanta. Its
 * fraction starts at (e - min_exponent) * 2^M instead of 0, and so the sum's fraction is the code: n quanta at e have
 * the code n + (e - min_exponent) * 2^M, also where n carries into the next exponent. IEEE's tie to the even fraction
 * thus is the tie to the even code, for subnormals and for M = 0 too.
 */
INLINE UINT NAME(magic)(UINT step, const struct NAME(format) * f) {
    return step + (step >> (FRACTION_BITS - f->mantissa_bits)) + f->magic_offset;
}

/* The magnitude that a sum of magic and quanta stands for. */
INLINE UINT NAME(magnitude)(UINT sum, UINT magic) { return NAME(bits)(NAME(number)(sum) - NAME(number)(magic)); }

/* The value of a code without sign, read as a number whatever the specials. */
INLINE UINT NAME(value)(UINT code, const struct NAME(format) * f) {
    UINT exponent = NAME(max)(code >> f->mantissa_bits, 1) - 1;
    UINT magic = NAME(magic)(f->min_step + (exponent << FRACTION_BITS), f);
    return NAME(magnitude)((magic & INFINITE) | code, magic);
}

/* Rounds a <= limit. Returns magic + the rounded value, whose fraction is the code; *magic is set. */
INLINE UINT NAME(round)(UINT a, UINT is_negative, UINT random, enum rounding rounding, const struct NAME(format) * f,
                        UINT *magic) {
    UINT step = NAME(max)(a & INFINITE, f->min_step);
    *magic = NAME(magic)(step, f);
    UINT sum = NAME(bits)(NAME(number)(*magic) + NAME(number)(a));
    if (rounding == NEAREST_TIES_TO_EVEN) {
        return sum;
    }
    UINT nearest = NAME(magnitude)(sum, *magic);
    UINT is_inexact = nearest != a;
    UINT below = sum - (nearest > a);
    /* a < 2 * (the value below) or that is 0, so the difference is exact, and so is its product with 1 / q. */
    FLOAT excess = NAME(number)(a) - NAME(number)(NAME(magnitude)(below, *magic));
    FLOAT nu = excess * NAME(number)(((2 * EXPONENT_BIAS + f->mantissa_bits) << FRACTION_BITS) - step);
    switch (rounding) {
    case NEAREST_TIES_TO_AWAY:
        return below + (nu >= (FLOAT)0.5);
    case TOWARD_POSITIVE:
        return below + (is_inexact & (is_negative ^ 1));
    case TOWARD_NEGATIVE:
        return below + (is_inexact & is_negative);
    case TO_ODD:
        return below + (is_inexact & (below ^ 1) & 1);
    case STOCHASTIC: /* P3109's StochasticA: floor(nu * 2^N) + R >= 2^N; all of it is exact */
        return below + ((FLOAT)(int32_t)(nu * f->random_range) + (FLOAT)(int32_t)random >= f->random_range);
    default:
        return below;
    }
}

/* The projection of q = x / scale, as bits with the sign. */
INLINE UINT NAME(project)(FLOAT q, UINT random, enum rounding rounding, const struct NAME(format) * f) {
    UINT a = NAME(bits)(q) & ~SIGN, sign = NAME(bits)(q) & SIGN, magic;
    UINT sum = NAME(round)(NAME(min)(a, f->limit), sign != 0, random, rounding, f, &magic);
    UINT r = NAME(magnitude)(sum, magic);
    r = r > f->max_value ? (sign ? f->over_values[1] : f->over_values[0]) : r;
    r = a == INFINITE ? f->infinite_value : r;
    r = a > INFINITE ? a : r;
    return r | (sign & (r ? SIGN : f->sign_of_zero));
}

/* The code of the projection of q. */
INLINE UINT NAME(pack)(FLOAT q, UINT random, enum rounding rounding, const struct NAME(format) * f) {
    UINT a = NAME(bits)(q) & ~SIGN, sign = NAME(bits)(q) & SIGN, magic;
    UINT sum = NAME(round)(NAME(min)(a, f->limit), sign != 0, random, rounding, f, &magic);
    UINT code = sum & (ONE_EXPONENT - 1);
    code = code > f->max_code ? (sign ? f->over_codes[1] : f->over_codes[0]) : code;
    code = a == INFINITE ? f->infinite_code : code;
    UINT is_signed = code - f->first_signed < f->signed_codes; /* zero may have no sign, NaN never has */
    code |= sign && is_signed ? f->sign_code : 0;
    return a > INFINITE ? f->nan_code : code;
}

/* The value of a code as bits with the sign. */
INLINE UINT NAME(unpack)(UINT code, const struct NAME(format) * f) {
    UINT magnitude = code & (f->sign_code - 1), is_negative = code & f->sign_code;
    UINT r = NAME(value)(magnitude, f);
    r = f->has_nan && magnitude > f->max_code ? INFINITE | 1 : r;
    r = magnitude == f->inf_code ? INFINITE : r;
    r = !f->sign_of_zero && is_negative && !magnitude ? INFINITE | 1 : r;
    return r | (is_negative ? SIGN : 0);
}

static struct NAME(format) NAME(prepare)(const struct plan *p) {
    UINT min_step = (UINT)(p->min_exponent + EXPONENT_BIAS) << FRACTION_BITS;
    struct NAME(format) f = {
        .mantissa_bits = p->mantissa_bits,
        .min_step = min_step,
        .magic_offset = ((UINT)(FRACTION_BITS - p->mantissa_bits) << FRACTION_BITS) -
                        (min_step >> (FRACTION_BITS - p->mantissa_bits)),
        .sign_of_zero = p->has_negative_zero ? SIGN : 0,
        .max_code = p->max_code,
        .over_codes = {p->over_codes[0], p->over_codes[1]},
        .infinite_code = p->infinite_code,
        .nan_code = p->nan_code,
        .sign_code = p->sign_code,
        .first_signed = !p->has_negative_zero,
        .signed_codes = p->max_code + (p->inf_code >= 0) + p->has_negative_zero,
        .inf_code = p->inf_code,
        .has_nan = p->has_nan,
        .random_range = (FLOAT)((int64_t)1 << p->random_bits),
    };
    f.limit = NAME(value)(p->limit_code, &f);
    f.max_value = NAME(value)(p->max_code, &f);
    f.infinite_value = NAME(unpack)(p->infinite_code, &f);
    for (int i = 0; i < 2; i++) {
        f.over_values[i] = NAME(unpack)(p->over_codes[i], &f);
    }
    return f;
}

#undef SIGN
#undef INFINITE
#undef ONE_EXPONENT
