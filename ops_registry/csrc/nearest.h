/* Rounding in fewer instructions than round.h takes: to nearest, ties to even, and from there to what another rounding
 * takes instead. Without this file every result is the same: GENERAL serves every format and mode, as it does those
 * that the variants here leave out. Included behind round.h.
 */

#ifndef ALTGRAD_NEAREST_H
#define ALTGRAD_NEAREST_H

/* GCC would narrow the parts of a code to bytes before it joins them, which takes more instructions. */
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define JOINED(code) __builtin_assoc_barrier(code)
#else
#define JOINED(code) (code)
#endif

/* Roundings to nearest, ties to even, that take fewer instructions than the general one, by what is special about the
 * format: nothing, M = 0, zero without sign; and PLAIN, adjusted to another rounding, which only projects. Magnitudes
 * from special_from on, NaN at least, are beyond them. */
enum variant { PLAIN, POWERS, UNSIGNED_ZERO, ADJUSTED, GENERAL };

static enum variant variant_of(const struct plan *p) {
    if (p->operation == DECODE || p->operation == DEQUANTIZE) { /* nothing is rounded */
        return PLAIN;
    }
    const int is_power = p->mantissa_bits == 0;
    if (p->overflows || (is_power && !p->has_negative_zero)) {
        return GENERAL;
    }
    if (p->rounding != NEAREST_TIES_TO_EVEN) {
        return is_power || !p->has_negative_zero || p->operation == ENCODE ? GENERAL : ADJUSTED;
    }
    return is_power ? POWERS : p->has_negative_zero ? PLAIN : UNSIGNED_ZERO;
}

#endif

/* For M = 0 the number of quanta that is magic in powers: 2^FRACTION_BITS, and one more from exponent to exponent. */
INLINE FLOAT NAME(power_quanta)(UINT power, const struct NAME(format) * f) {
    return NAME(number)(f->power_quanta + (power >> FRACTION_BITS));
}

/* project for a variant that is not GENERAL, right below f->special_from; *most becomes the largest |q| up to here. */
INLINE FLOAT NAME(project_nearest)(FLOAT q, enum variant variant, const struct NAME(format) * f, UINT *most) {
    UINT bits = NAME(bits)(q), a = bits & ~SIGN;
    *most = NAME(max)(*most, a);
    a = NAME(min)(a, f->limits[0]);
    UINT power = NAME(max)(a & INFINITE, f->min_power);
    /* For M > 0 the fraction of magic may be 0: codes are as even as their quanta. */
    FLOAT p = NAME(number)(power), quanta = variant == POWERS ? NAME(power_quanta)(power, f) : f->quanta;
    FLOAT r = MULTIPLY_ADD(-p, quanta, MULTIPLY_ADD(p, quanta, NAME(number)(a)));
    FLOAT y = NAME(number)(NAME(bits)(r) | (bits & SIGN));
    return variant == UNSIGNED_ZERO ? y + (FLOAT)0 : y;
}

/* project for M > 0 and zero with a sign: y, the nearest value, or the next one in the direction of the rounding. All
 * differences here are exact: y is within 2 |q|, or 0. */
INLINE FLOAT NAME(project_adjusted)(FLOAT q, UINT random, enum rounding rounding, const struct NAME(format) * f,
                                    UINT *most) {
    UINT bits = NAME(bits)(q), sign = bits & SIGN, a = bits & ~SIGN;
    *most = NAME(max)(*most, a);
    a = NAME(min)(a, f->limits[0]);
    const FLOAT magnitude = NAME(number)(a), p = NAME(number)(NAME(max)(a & INFINITE, f->min_power));
    const FLOAT quantum = p * (2 * f->half_quantum), sum = MULTIPLY_ADD(p, f->quanta, magnitude);
    FLOAT r = MULTIPLY_ADD(-p, f->quanta, sum);
    const FLOAT limited = NAME(number)(a | sign), y = NAME(number)(NAME(bits)(r) | sign);
    switch (rounding) {
    case TOWARD_POSITIVE: /* a zero that -quantum becomes here has lost its sign */
        r = y + (y < limited ? quantum : 0);
        return NAME(number)((NAME(bits)(r) & ~SIGN) | sign);
    case TOWARD_NEGATIVE:
        r = y - (y > limited ? quantum : 0);
        return NAME(number)((NAME(bits)(r) & ~SIGN) | sign);
    case NEAREST_TIES_TO_AWAY: /* a tie that went to the even value below */
        r += magnitude - r == p * f->half_quantum ? quantum : 0;
        break;
    case TO_ODD: { /* the code has the parity of the sum's fraction */
        const UINT below = NAME(bits)(sum) - (r > magnitude);
        r = MULTIPLY_ADD(-p, f->quanta, NAME(number)(below | (r != magnitude)));
        break;
    }
    case STOCHASTIC: /* as in round */
        r -= r > magnitude ? quantum : 0;
        r += magnitude - r >= (f->random_range - (FLOAT)(int32_t)random) * (p * f->random_quantum) ? quantum : 0;
        break;
    default: /* TOWARD_ZERO */
        r -= r > magnitude ? quantum : 0;
    }
    return NAME(number)(NAME(bits)(r) | sign);
}

/* pack as project_nearest, but zero has a sign in every variant. */
INLINE UINT NAME(pack_nearest)(FLOAT q, enum variant variant, const struct NAME(format) * f, UINT *most) {
    UINT bits = NAME(bits)(q), a = bits & ~SIGN, values = f->sign_code - 1;
    *most = NAME(max)(*most, a);
    a = NAME(min)(a, f->limits[0]);
    UINT power = NAME(max)(a & INFINITE, f->min_power);
    /* An even number of quanta in magic is no harm, and takes from the sum what the power's bits put there. */
    FLOAT quanta = variant == POWERS ? NAME(power_quanta)(power, f) : f->code_quanta;
    UINT sum = NAME(bits)(MULTIPLY_ADD(NAME(number)(power), quanta, NAME(number)(a)));
    sum += variant == POWERS ? 0 : power >> (FRACTION_BITS - f->mantissa_bits);
    UINT signs = bits >> f->sign_shift; /* from the bit of values on */
    return JOINED(signs ^ ((signs ^ sum) & values));
}
