/* Formats whose range leaves float32 no room to round in, whose codes take more than a byte, or that have no sign: by
 * the rounding in float64, where every format has room. Their values are float32 numbers, so nothing is rounded twice.
 *
 * An unsigned format is rounded as the signed one of the same values. What is below its smallest value becomes that, or
 * NaN where overflow does. Without zero, the codes here are one larger than the format's, whose parity round.h heeds.
 */

static void wide_project(const struct plan *p, double *numbers, const uint32_t *random, int64_t n) {
    const struct format64 f = prepare64(p);
    const double smallest = number64(f.min_power), lowest = p->has_zero ? 0 : smallest, nan = number64(f.nan_value | 1);
    double quotients[CHUNK] = {0}, ones[CHUNK];
    for (int i = 0; i < CHUNK; i++) {
        ones[i] = 1;
    }
    for (int64_t i = 0; i < n; i++) {
        double q = numbers[i];
        if (!p->is_signed && !(p->overflows && p->has_zero)) {
            q = p->overflows && q <= 0 ? nan : q < lowest ? lowest : q;
        }
        quotients[i] = q;
    }
    quantize_chunk64(quotients, ones, ones, 1, random, numbers, n, variant_of(p), p, &f);
    for (int64_t i = 0; !p->is_signed && i < n; i++) {
        numbers[i] = numbers[i] < 0 ? nan : numbers[i] + 0.0; /* and -0 becomes 0 */
    }
}

/* The inverse of value64: below min_power, adding it makes the exponent that of min_power, which is taken off again. */
static void wide_encode(const struct plan *p, const double *values, void *codes, int64_t n) {
    const struct format64 f = prepare64(p);
    const uint64_t shift = 52 - f.mantissa_bits, smallest = f.min_power >> shift, one = (uint64_t)1 << f.mantissa_bits;
    const double min_power = number64(f.min_power);
    for (int64_t i = 0; i < n; i++) {
        const uint64_t bits = bits64(values[i]), a = bits & ~((uint64_t)1 << 63);
        const int is_subnormal = a < f.min_power;
        uint64_t code = bits64(number64(a) + (is_subnormal ? min_power : 0)) >> shift;
        code -= smallest - (is_subnormal ? 0 : one) + !p->has_zero;
        code = a == (uint64_t)2047 << 52 ? (uint64_t)p->max_code + 1 : code;
        code |= bits >> 63 << p->sign_bit;
        code = a > (uint64_t)2047 << 52 ? (uint64_t)p->nan_code : code;
        if (p->out_dtype == UINT8) {
            ((uint8_t *)codes)[i] = (uint8_t)code;
        } else {
            ((uint16_t *)codes)[i] = (uint16_t)code;
        }
    }
}

static void wide_decode(const struct plan *p, const void *codes, double *values, int64_t n) {
    const struct format64 f = prepare64(p);
    const uint64_t all = ((uint64_t)1 << p->code_bits) - 1;
    for (int64_t i = 0; i < n; i++) {
        const uint64_t code = p->dtypes[X] == UINT8 ? ((const uint8_t *)codes)[i] : ((const uint16_t *)codes)[i];
        values[i] = unpack64((code & all) + !p->has_zero, 1, &f);
    }
}
