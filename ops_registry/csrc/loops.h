/* The loops over CHUNK elements at most, for one compute type; included behind round.h with the same macros. */

/* n elements of an operand in the compute type: in place where they are of it, else in buffer. */
static const FLOAT *NAME(convert)(const void *raw, enum dtype dtype, int64_t n, FLOAT *restrict buffer) {
    const float *floats = raw;
    const double *doubles = raw;
    const uint16_t *halves = raw;
    if (dtype == (sizeof(FLOAT) == 4 ? FLOAT32 : FLOAT64)) {
        return raw;
    }
    if (dtype == FLOAT16 && sizeof(FLOAT) == 4) {
        floats_from_float16(halves, (float *)buffer, n);
        return buffer;
    }
    for (int64_t i = 0; dtype == FLOAT16 && i < n; i++) {
        buffer[i] = (FLOAT)from_float16(halves[i]);
    }
    for (int64_t i = 0; dtype == BFLOAT16 && i < n; i++) {
        buffer[i] = (FLOAT)number32((uint32_t)halves[i] << 16);
    }
    for (int64_t i = 0; dtype == FLOAT32 && i < n; i++) {
        buffer[i] = (FLOAT)floats[i];
    }
    for (int64_t i = 0; dtype == FLOAT64 && i < n; i++) {
        buffer[i] = (FLOAT)doubles[i];
    }
    return buffer;
}

/* Returns the largest |q| that a variant other than GENERAL met, as bits. */
INLINE UINT NAME(quantize_each)(const FLOAT *restrict x, const FLOAT *restrict divisor,
                                const FLOAT *restrict multiplier, int varies, const uint32_t *restrict random,
                                FLOAT *restrict out, int64_t n, enum variant variant, enum rounding rounding,
                                int overflows, const struct NAME(format) * f) {
    UINT most = 0;
    for (int64_t i = 0; i < n; i++) {
        const FLOAT q = x[i] / divisor[varies ? i : 0], s = multiplier[varies ? i : 0];
        const UINT r = rounding == STOCHASTIC ? random[i] & f->random_mask : 0;
        if (variant == GENERAL) {
            out[i] = s * NAME(project)(q, r, rounding, overflows, f);
        } else if (variant == ADJUSTED) {
            out[i] = s * NAME(project_adjusted)(q, r, rounding, f, &most);
        } else {
            out[i] = s * NAME(project_nearest)(q, variant, f, &most);
        }
    }
    return most;
}

INLINE UINT NAME(encode_each)(const FLOAT *restrict x, const FLOAT *restrict scale, int varies,
                              const uint32_t *restrict random, uint8_t *restrict out, int64_t n, enum variant variant,
                              enum rounding rounding, const struct NAME(format) * f) {
    UINT most = 0;
    for (int64_t i = 0; i < n; i++) {
        const FLOAT q = x[i] / scale[varies ? i : 0];
        if (variant == GENERAL) {
            const UINT r = rounding == STOCHASTIC ? random[i] & f->random_mask : 0;
            out[i] = (uint8_t)NAME(pack)(q, r, rounding, f);
        } else {
            out[i] = (uint8_t)NAME(pack_nearest)(q, variant, f, &most);
        }
    }
    return most;
}

/* LOOP(varies, variant, rounding) with constants for what the variables of these names hold. */
#define SPECIALIZE(LOOP)                                                                                               \
    switch (variant) {                                                                                                 \
        EITHER_SCALE(LOOP, PLAIN)                                                                                      \
        EITHER_SCALE(LOOP, POWERS)                                                                                     \
        EITHER_SCALE(LOOP, UNSIGNED_ZERO)                                                                              \
    default:                                                                                                           \
        switch (rounding) {                                                                                            \
            EACH_ROUNDING(GENERAL_ROUNDING, LOOP)                                                                      \
            GENERAL_ROUNDING(LOOP, NEAREST_TIES_TO_EVEN)                                                               \
        }                                                                                                              \
    }
/* The same for ADJUSTED. */
#define SPECIALIZE_ADJUSTED(LOOP)                                                                                      \
    switch (rounding) {                                                                                                \
        EACH_ROUNDING(ADJUSTED_ROUNDING, LOOP)                                                                         \
    default:                                                                                                           \
        break;                                                                                                         \
    }
#define EITHER_SCALE(LOOP, VARIANT)                                                                                    \
    case VARIANT:                                                                                                      \
        if (varies) {                                                                                                  \
            LOOP(1, VARIANT, NEAREST_TIES_TO_EVEN);                                                                    \
        } else {                                                                                                       \
            LOOP(0, VARIANT, NEAREST_TIES_TO_EVEN);                                                                    \
        }                                                                                                              \
        break;
#define EACH_ROUNDING(CASE, LOOP)                                                                                      \
    CASE(LOOP, NEAREST_TIES_TO_AWAY)                                                                                   \
    CASE(LOOP, TOWARD_ZERO)                                                                                            \
    CASE(LOOP, TOWARD_POSITIVE)                                                                                        \
    CASE(LOOP, TOWARD_NEGATIVE)                                                                                        \
    CASE(LOOP, TO_ODD)                                                                                                 \
    CASE(LOOP, STOCHASTIC)
#define GENERAL_ROUNDING(LOOP, ROUNDING)                                                                               \
    case ROUNDING:                                                                                                     \
        LOOP(1, GENERAL, ROUNDING);                                                                                    \
        break;
#define ADJUSTED_ROUNDING(LOOP, ROUNDING)                                                                              \
    case ROUNDING:                                                                                                     \
        if (varies) {                                                                                                  \
            LOOP(1, ADJUSTED, ROUNDING);                                                                               \
        } else {                                                                                                       \
            LOOP(0, ADJUSTED, ROUNDING);                                                                               \
        }                                                                                                              \
        break;

/* One scale for each of n <= CHUNK elements, of which as many as shared have one, or all for 0: scales, filled. */
static const FLOAT *NAME(spread)(const FLOAT *scale, int shared, int64_t n, FLOAT *scales) {
    const int64_t size = shared > 0 ? shared : n;
    if (shared == 1) {
        return scale;
    }
    for (int64_t i = 0; i < n; i += size, scale++) {
        for (int64_t j = i; j < i + size && j < n; j++) {
            scales[j] = *scale;
        }
    }
    return scales;
}

/* x / divisor rounded, times multiplier. These have one element for all where they do not vary. What variants other
 * than GENERAL must not meet is rare: a chunk that has it is done again. */
static void NAME(quantize_chunk)(const FLOAT *restrict x, const FLOAT *divisor, const FLOAT *multiplier, int varies,
                                 const uint32_t *restrict random, FLOAT *restrict out, int64_t n, enum variant variant,
                                 const struct plan *p, const struct NAME(format) * format) {
    const struct NAME(format) f = *format;
    const enum rounding rounding = p->rounding;
    FLOAT divisors[CHUNK], multipliers[CHUNK];
    if (variant == GENERAL) { /* its loops are for scales that vary */
        divisor = NAME(spread)(divisor, varies, n, divisors);
        multiplier = NAME(spread)(multiplier, varies, n, multipliers);
    }
    UINT most = 0;
#define LOOP(VARIES, VARIANT, ROUNDING)                                                                                \
    most = VARIANT == GENERAL && p->overflows                                                                          \
               ? NAME(quantize_each)(x, divisor, multiplier, VARIES, random, out, n, VARIANT, ROUNDING, 1, &f)         \
               : NAME(quantize_each)(x, divisor, multiplier, VARIES, random, out, n, VARIANT, ROUNDING, 0, &f)
    if (variant == ADJUSTED) {
        SPECIALIZE_ADJUSTED(LOOP)
    } else {
        SPECIALIZE(LOOP)
    }
#undef LOOP
    if (most >= f.special_from) {
        NAME(quantize_chunk)(x, divisor, multiplier, varies, random, out, n, GENERAL, p, format);
    }
}

/* The same from elements of the plan's dtype of x to those of out's; as many as shared have one scale, or all for 0.
 * are_powers: the divisors are powers of two. is_short: the products with the multipliers have no more bits than
 * bfloat16 has. */
static void NAME(quantize)(const struct plan *p, const struct NAME(format) * f, const void *x, const FLOAT *divisor,
                           const FLOAT *multiplier, int shared, int are_powers, int is_short, const uint32_t *random,
                           void *out, int64_t n) {
    enum variant variant = variant_of(p);
#if defined(__AVX512F__) && FRACTION_BITS == 23
    float reciprocals[CHUNK / 16];
    const int64_t scales = shared > 1 ? n / shared : 1;
    if (variant != GENERAL && p->dtypes[X] == p->out_dtype && n >= 32 &&
        (shared == 1 || reciprocals_of(divisor, scales, are_powers, p->rounding, f, reciprocals))) {
        const struct vectors v = {x, out, divisor, reciprocals, multiplier, random, n, are_powers, is_short};
        if (quantize_chunk512(&v, p->out_dtype, shared, variant, p->rounding, f) < f->special_from) {
            return;
        }
        variant = GENERAL;
    }
#endif
    FLOAT x_buffer[CHUNK], out_buffer[CHUNK], divisors[CHUNK], multipliers[CHUNK];
    if (shared > 1) {
        divisor = NAME(spread)(divisor, shared, n, divisors);
        multiplier = NAME(spread)(multiplier, shared, n, multipliers);
    }
    FLOAT *numbers = is_narrow(p->out_dtype) ? out_buffer : out;
    const FLOAT *converted = NAME(convert)(x, p->dtypes[X], n, x_buffer);
    NAME(quantize_chunk)(converted, divisor, multiplier, shared > 0, random, numbers, n, variant, p, f);
    narrow((const float *)numbers, p->out_dtype, out, n);
}

static void NAME(encode)(const FLOAT *restrict x, const FLOAT *restrict scale, int varies,
                         const uint32_t *restrict random, uint8_t *restrict out, int64_t n, enum variant variant,
                         enum rounding rounding, const struct NAME(format) * format) {
    const struct NAME(format) f = *format;
    UINT most = 0;
#define LOOP(VARIES, VARIANT, ROUNDING)                                                                                \
    most = NAME(encode_each)(x, scale, VARIES, random, out, n, VARIANT, ROUNDING, &f)
    SPECIALIZE(LOOP)
#undef LOOP
    if (variant == UNSIGNED_ZERO) {
        const uint8_t minus_zero = (uint8_t)f.sign_code;
        for (int64_t i = 0; i < n; i++) {
            out[i] = out[i] == minus_zero ? 0 : out[i];
        }
    }
    if (most >= f.special_from) {
        FLOAT scales[CHUNK];
        scale = NAME(spread)(scale, varies, n, scales);
        NAME(encode_each)(x, scale, 1, random, out, n, GENERAL, NEAREST_TIES_TO_EVEN, &f);
    }
}

static void NAME(decode)(const uint8_t *restrict codes, const FLOAT *restrict scale, int varies, FLOAT *restrict out,
                         int64_t n, const struct NAME(format) * format) {
    const struct NAME(format) f = *format;
    const uint8_t nan_mask = (uint8_t)f.nan_mask, nan_first = (uint8_t)f.nan_first, nan_count = (uint8_t)f.nan_count;
    uint8_t has_special = 0;
    for (int64_t i = 0; i < n; i++) {
        has_special |= (uint8_t)((codes[i] & nan_mask) - nan_first) < nan_count;
    }
    if (has_special) {
        for (int64_t i = 0; i < n; i++) {
            out[i] = NAME(unpack)(codes[i], 1, &f) * scale[varies ? i : 0];
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            out[i] = NAME(unpack)(codes[i], 0, &f) * scale[varies ? i : 0];
        }
    }
}

static void NAME(dequantize)(const FLOAT *restrict x, const FLOAT *restrict scale, int varies, FLOAT *restrict out,
                             int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        out[i] = x[i] * scale[varies ? i : 0];
    }
}

/* A chunk of a format that wide.h projects: quotients and products in FLOAT, what is in between in float64. */
static void NAME(wide)(const struct plan *p, const void *codes, const FLOAT *restrict x, const FLOAT *restrict scale,
                       int varies, const uint32_t *random, FLOAT *restrict out, void *to, int64_t n) {
    double values[CHUNK];
    if (p->operation == DECODE) {
        wide_decode(p, codes, values, n);
    } else {
        for (int64_t i = 0; i < n; i++) {
            const FLOAT q = x[i] / scale[varies ? i : 0];
            values[i] = q;
        }
        wide_project(p, values, random, n);
    }
    if (p->operation == ENCODE) {
        wide_encode(p, values, to, n);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        const FLOAT r = (FLOAT)values[i]; /* exact */
        out[i] = p->operation == PROJECT ? r : r * scale[varies ? i : 0];
    }
}

#if defined(__AVX512BW__) && FRACTION_BITS == 23
/* Whether elements by one scale could be looked up in its fractions, which are found where they are those of another.
 */
static int quantize_looked_up(const struct plan *p, const struct format32 *f, const void *x, float scale,
                              struct fractions *t, void *out, int64_t n) {
    if (bits32(t->divisor) != bits32(scale)) {
        find_fractions(f, p->out_dtype, scale, p->operation == PROJECT ? 1 : scale, t);
    }
    if (t->first == 0) {
        return 0;
    }
    return largest_quotient(quantize_by_scale(t, f, p->out_dtype, x, out, n), p->out_dtype, scale) < FLOAT32_INFINITY;
}
#endif

/* Elements begin to end of a call, chunk by chunk. */
static void NAME(range)(const struct call *c, int64_t begin, int64_t end) {
    const struct plan *p = c->plan;
    const struct NAME(format) f = NAME(prepare)(p);
    _Alignas(64) FLOAT x_buffer[CHUNK], scale_buffer[CHUNK], out_buffer[CHUNK];
    FLOAT ones[CHUNK];
    uint64_t raw_buffers[OPERANDS][CHUNK];
    uint32_t random_buffer[PHILOX_ROOM];
    struct stream streams[OPERANDS];
    for (int operand = 0; operand < OPERANDS; operand++) {
        streams[operand] = open_stream(c, operand, begin, raw_buffers[operand]);
    }
    for (int i = 0; p->operation == PROJECT && i < CHUNK; i++) {
        ones[i] = 1;
    }
    const enum variant variant = variant_of(p);
    const int64_t run = streams[SCALE].run, period = streams[SCALE].period;
    const int varies = run < LONG_RUN || variant == GENERAL;
    const int64_t step = period <= CHUNK ? CHUNK / period * period : CHUNK;
    const FLOAT *scale = NULL;
    const uint32_t *random = NULL;
#if defined(__AVX512BW__) && FRACTION_BITS == 23
    struct fractions fractions = {.first = 0};
    const int has_fractions = suits_fractions(p, &f, run < end - begin ? run : end - begin);
#endif
    int64_t rest = run - begin % run; /* of the run of one scale */
    for (int64_t n; begin < end; begin += n) {
        n = end - begin < step ? end - begin : step;
        if (!varies) {
            n = n < rest ? n : rest;
            rest = rest == n ? run : rest - n;
        }
        /* A step is whole periods where these are short, and then what was read once serves all. */
        if (scale == NULL || (varies ? period > CHUNK : run < end)) {
            const int64_t scales = varies ? n : 1;
            scale = NAME(convert)(read_stream(&streams[SCALE], scales), p->dtypes[SCALE], scales, scale_buffer);
            skip(&streams[SCALE], n - scales);
        }
        const void *raw = read_stream(&streams[X], n);
        if (p->rounding == STOCHASTIC) {
            random = read_random(&streams[RANDOM], p, begin, n, random_buffer);
        }
        char *to = c->out + begin * size_of(p->out_dtype);
#if defined(__AVX512BW__) && FRACTION_BITS == 23
        if (has_fractions && n >= 32 && quantize_looked_up(p, &f, raw, *scale, &fractions, to, n)) {
            continue;
        }
#endif
        if (!p->is_wide && (p->operation == QUANTIZE || p->operation == PROJECT)) {
            NAME(quantize)(p, &f, raw, scale, p->operation == PROJECT ? ones : scale, varies, 0, 0, random, to, n);
            continue;
        }
        const FLOAT *x = p->operation == DECODE ? NULL : NAME(convert)(raw, p->dtypes[X], n, x_buffer);
        FLOAT *out = is_narrow(p->out_dtype) ? out_buffer : (FLOAT *)to;
        if (p->is_wide) {
            NAME(wide)(p, raw, x, scale, varies, random, out, to, n);
        } else if (p->operation == ENCODE) {
            NAME(encode)(x, scale, varies, random, (uint8_t *)to, n, variant, p->rounding, &f);
        } else if (p->operation == DECODE) {
            NAME(decode)(raw, scale, varies, out, n, &f);
        } else {
            NAME(dequantize)(x, scale, varies, out, n);
        }
        narrow((const float *)out, p->out_dtype, to, n);
    }
}

#undef SPECIALIZE
#undef SPECIALIZE_ADJUSTED
#undef EITHER_SCALE
#undef EACH_ROUNDING
#undef GENERAL_ROUNDING
#undef ADJUSTED_ROUNDING
