/* The rounding, the same for every operator. kernels.c includes this once for each compute type, with these defined:
 * FLOAT, INT and UINT (integers of its width), FRACTION_BITS, EXPONENT_BIAS, and NAME(x), which tells the types apart.
 *
 * Steps: divide, round, saturate, multiply; in the codecs pack and unpack. The words of aten.py and cuda_kernels.py:
 *
 *   q = x / scale      a = |q|, limited to max or one value beyond      r   a rounded and saturated
 *   power = 2^e        at or below a, e being at least min_exponent     quantum = power * 2^-M, the spacing of values
 *   below              the value at or below a                          excess = a - below    nu = excess / quantum
 *
 * Magnitudes are handled as their bits, which compare as the numbers do, and nothing branches, so that loops over these
 * functions vectorize.
 */

#define SIGN ((UINT)1 << SIGN_SHIFT)
#define INFINITE ((UINT)(2 * EXPONENT_BIAS + 1) << FRACTION_BITS)
#define SIGN_SHIFT (8 * sizeof(UINT) - 1)
#define FRACTION_MASK (((UINT)1 << FRACTION_BITS) - 1)

/* A plan in the compute type; limits and values are bits of magnitudes. */
struct NAME(format) {
    UINT mantissa_bits, min_power, magic_offset;
    UINT limits[2], max_value, over_value; /* limits: by the sign */
    FLOAT quanta, code_quanta; /* what a power is multiplied by for the magic of nearest.h, to project and to pack */
    UINT power_quanta;         /* bits of the quanta for M = 0 at min_power, less its exponent */
    UINT special_from, special_or, minus_zero;      /* magnitudes from special_from on become special_or | they */
    UINT nan_first, nan_count, nan_mask, nan_value; /* the codes that are no number, and the value of the first */
    UINT infinite_code, nan_code, sign_code, sign_shift, first_signed, signed_codes;
    uint32_t random_mask;
    FLOAT half_quantum, random_range, random_quantum; /* quanta for a power of 1 */
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

/* Of magnitudes. They compare the same with sign, and SSE2 has no other comparison of integers. */
INLINE UINT NAME(max)(UINT a, UINT b) { return (INT)a > (INT)b ? a : b; }
INLINE UINT NAME(min)(UINT a, UINT b) { return (INT)a < (INT)b ? a : b; }

/* a where condition (0 or 1) is true, else b. What `?:` selects may be computed behind a branch, load included. */
INLINE UINT NAME(select)(UINT condition, UINT a, UINT b) { return b ^ ((a ^ b) & (0 - condition)); }

/* The number that rounds by being added.
 *
 * magic is 2^FRACTION_BITS quanta of power, hence adding a to it rounds a to whole quanta. Its fraction starts at
 * (e - min_exponent) * 2^M instead of 0, and so the sum's fraction is the code: n quanta at e have the code
 * n + (e - min_exponent) * 2^M, also where n carries into the next exponent. IEEE's tie to the even fraction thus is
 * the tie to the even code, for subnormals and for M = 0 too.
 */
INLINE UINT NAME(magic)(UINT power, const struct NAME(format) * f) {
    return power + (power >> (FRACTION_BITS - f->mantissa_bits)) + f->magic_offset;
}

/* The magnitude that a sum of magic and quanta stands for. */
INLINE UINT NAME(magnitude)(UINT sum, UINT magic) { return NAME(bits)(NAME(number)(sum) - NAME(number)(magic)); }

/* The bits of the value of a code without sign, read as a number whatever the specials. Its fields move to those of
 * FLOAT; a subnormal takes the exponent 1 and gives back the one that this put before its fraction. */
INLINE UINT NAME(value)(UINT code, const struct NAME(format) * f) {
    const UINT exponent_1 = (UINT)1 << FRACTION_BITS;
    UINT fields = code << (FRACTION_BITS - f->mantissa_bits);
    UINT added = fields < exponent_1 ? exponent_1 : 0, one = fields < exponent_1 ? f->min_power : 0;
    return NAME(bits)(NAME(number)(fields + added + (f->min_power - exponent_1)) - NAME(number)(one));
}

/* The magnitude to round: beyond max nothing is told apart, and the arithmetic of rounding stays finite. */
INLINE UINT NAME(limit)(UINT bits, enum rounding rounding, const struct NAME(format) * f) {
    int is_directed = rounding == TOWARD_ZERO || rounding == TOWARD_POSITIVE || rounding == TOWARD_NEGATIVE;
    return NAME(min)(bits & ~SIGN, is_directed && bits & SIGN ? f->limits[1] : f->limits[0]);
}

/* Rounds a <= limit. Returns magic + the rounded value, whose fraction is the code; *magic is set. */
INLINE UINT NAME(round)(UINT a, UINT is_negative, UINT random, enum rounding rounding, const struct NAME(format) * f,
                        UINT *magic) {
    UINT power = NAME(max)(a & INFINITE, f->min_power);
    *magic = NAME(magic)(power, f);
    UINT sum = NAME(bits)(NAME(number)(*magic) + NAME(number)(a));
    if (rounding == NEAREST_TIES_TO_EVEN) {
        return sum;
    }
    UINT nearest = NAME(magnitude)(sum, *magic);
    UINT is_inexact = nearest != a;
    UINT sum_below = sum - (nearest > a); /* magic + below; its parity is that of the code */
    /* a < 2 * below or below is 0, so the difference is exact. */
    const FLOAT excess = NAME(number)(a) - NAME(number)(NAME(magnitude)(sum_below, *magic));
    switch (rounding) {
    case NEAREST_TIES_TO_AWAY:
        return sum_below + (excess >= NAME(number)(power) * f->half_quantum);
    case TOWARD_POSITIVE:
        return sum_below + (is_inexact & (is_negative ^ 1));
    case TOWARD_NEGATIVE:
        return sum_below + (is_inexact & is_negative);
    case TO_ODD:
        return sum_below + (is_inexact & (sum_below ^ 1) & 1);
    case STOCHASTIC: /* P3109's StochasticA, floor(nu * 2^N) >= 2^N - R, times quantum / 2^N; all of it is exact */
        return sum_below +
               (excess >= (f->random_range - (FLOAT)(int32_t)random) * (NAME(number)(power) * f->random_quantum));
    default:
        return sum_below;
    }
}

/* The projection of q = x / scale; overflows tells whether the limits lie beyond max. */
INLINE FLOAT NAME(project)(FLOAT q, UINT random, enum rounding rounding, int overflows, const struct NAME(format) * f) {
    UINT bits = NAME(bits)(q), a = bits & ~SIGN, magic;
    UINT sum = NAME(round)(NAME(limit)(bits, rounding, f), bits >> SIGN_SHIFT, random, rounding, f, &magic);
    UINT r = NAME(magnitude)(sum, magic);
    r = overflows && r > f->max_value ? f->over_value : r;
    /* Adding infinity or NaN gives these, adding -0 changes nothing, and adding +0 turns -0 into +0. */
    UINT special = a >= f->special_from ? bits | f->special_or : f->minus_zero;
    return NAME(number)(r | (bits & SIGN)) + NAME(number)(special);
}

/* The code of the projection of q. What follows max in the order of codes is what overflow becomes: inf or NaN. */
INLINE UINT NAME(pack)(FLOAT q, UINT random, enum rounding rounding, const struct NAME(format) * f) {
    UINT bits = NAME(bits)(q), a = bits & ~SIGN, magic;
    UINT sum = NAME(round)(NAME(limit)(bits, rounding, f), bits >> SIGN_SHIFT, random, rounding, f, &magic);
    UINT code = sum & FRACTION_MASK;
    code = NAME(select)(a == INFINITE, f->infinite_code, code);
    UINT is_signed = code - f->first_signed < f->signed_codes; /* zero may have no sign, NaN never has */
    code |= is_signed ? bits >> f->sign_shift & f->sign_code : 0;
    return NAME(select)(a > INFINITE, f->nan_code, code);
}

/* The value of a code; without may_be_special, of one that is a number. */
INLINE FLOAT NAME(unpack)(UINT code, int may_be_special, const struct NAME(format) * f) {
    UINT r = NAME(value)(code & (f->sign_code - 1), f);
    UINT nan = (code & f->nan_mask) - f->nan_first;
    r = may_be_special && nan < f->nan_count ? f->nan_value + nan : r;
    return NAME(number)(r | (code << f->sign_shift & SIGN));
}

static struct NAME(format) NAME(prepare)(const struct plan *p) {
    UINT min_power = (UINT)(p->min_exponent + EXPONENT_BIAS) << FRACTION_BITS;
    UINT nan_first = p->max_code + 1, sign_code = (UINT)1 << p->sign_bit;
    UINT exponent_quanta = (0 - (min_power >> (FRACTION_BITS - p->mantissa_bits))) & (sign_code - 1);
    int saturates = p->infinite_code == p->max_code;
    struct NAME(format) f = {
        .mantissa_bits = p->mantissa_bits,
        .min_power = min_power,
        .magic_offset = ((UINT)(FRACTION_BITS - p->mantissa_bits) << FRACTION_BITS) -
                        (min_power >> (FRACTION_BITS - p->mantissa_bits)),
        .quanta = (FLOAT)((UINT)1 << (FRACTION_BITS - p->mantissa_bits)),
        .code_quanta = (FLOAT)(((UINT)1 << FRACTION_BITS) + exponent_quanta) / (FLOAT)((UINT)1 << p->mantissa_bits),
        .over_value = INFINITE + !p->has_inf,
        .special_from = INFINITE + saturates,
        .special_or = !saturates && !p->has_inf,
        .nan_first = nan_first,
        .nan_count = p->has_nan ? NAME(max)(sign_code - nan_first, 1) : 0,
        .nan_mask = p->has_negative_zero ? sign_code - 1 : 2 * sign_code - 1,
        .nan_value = INFINITE + !p->has_inf,
        .infinite_code = p->infinite_code,
        .nan_code = p->nan_code,
        .sign_code = sign_code,
        .sign_shift = SIGN_SHIFT - p->sign_bit,
        .first_signed = !p->has_negative_zero,
        .signed_codes = p->max_code + p->has_inf + p->has_negative_zero,
        .minus_zero = p->has_negative_zero ? SIGN : 0,
        .half_quantum = (FLOAT)0.5 / (FLOAT)((UINT)1 << p->mantissa_bits),
        .random_mask = (1u << p->random_bits) - 1,
        .random_range = (FLOAT)((int64_t)1 << p->random_bits),
        .random_quantum = 1 / (FLOAT)((int64_t)1 << (p->mantissa_bits + p->random_bits)),
    };
    f.power_quanta = NAME(bits)(f.quanta) - (min_power >> FRACTION_BITS);
    f.magic_offset += !p->has_zero; /* codes are one lower there, and so is their parity */
    f.power_quanta += !p->has_zero;
    f.max_value = NAME(value)(p->max_code, &f);
    f.limits[0] = NAME(value)(p->limit_codes[0], &f);
    f.limits[1] = NAME(value)(p->limit_codes[1], &f);
    return f;
}
