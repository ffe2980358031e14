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

/* One loop for each rounding, which the compiler then knows. */
#define FOR_EACH_ROUNDING(LOOP, BODY)                                                                                  \
    switch (rounding) {                                                                                                \
        LOOP(NEAREST_TIES_TO_EVEN, BODY)                                                                               \
        LOOP(NEAREST_TIES_TO_AWAY, BODY)                                                                               \
        LOOP(TOWARD_ZERO, BODY)                                                                                        \
        LOOP(TOWARD_POSITIVE, BODY)                                                                                    \
        LOOP(TOWARD_NEGATIVE, BODY)                                                                                    \
        LOOP(TO_ODD, BODY)                                                                                             \
        LOOP(STOCHASTIC, BODY)                                                                                         \
    }
#define LOOP(ROUNDING, BODY)                                                                                           \
    case ROUNDING:                                                                                                     \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            const UINT r = ROUNDING == STOCHASTIC ? random[i] : 0;                                                     \
            out[i] = BODY(x[i] / scale[i], r, ROUNDING);                                                               \
        }                                                                                                              \
        break;

static void NAME(quantize)(const FLOAT *restrict x, const FLOAT *restrict scale, const uint32_t *restrict random,
                           FLOAT *restrict out, int64_t n, enum rounding rounding, int overflows,
                           const struct NAME(format) * format) {
    const struct NAME(format) f = *format;
#define SATURATING(q, random, rounding) NAME(project)(q, random, rounding, 0, &f) * scale[i]
#define OVERFLOWING(q, random, rounding) NAME(project)(q, random, rounding, 1, &f) * scale[i]
    if (overflows) {
        FOR_EACH_ROUNDING(LOOP, OVERFLOWING)
    } else {
        FOR_EACH_ROUNDING(LOOP, SATURATING)
    }
#undef SATURATING
#undef OVERFLOWING
}

static void NAME(encode)(const FLOAT *restrict x, const FLOAT *restrict scale, const uint32_t *restrict random,
                         uint8_t *restrict out, int64_t n, enum rounding rounding, const struct NAME(format) * format) {
    const struct NAME(format) f = *format;
#define PACK(q, random, rounding) (uint8_t)NAME(pack)(q, random, rounding, &f)
    FOR_EACH_ROUNDING(LOOP, PACK)
#undef PACK
}

static void NAME(decode)(const uint8_t *restrict codes, const FLOAT *restrict scale, FLOAT *restrict out, int64_t n,
                         const struct NAME(format) * format) {
    const struct NAME(format) f = *format;
    for (int64_t i = 0; i < n; i++) {
        out[i] = NAME(unpack)(codes[i], &f) * scale[i];
    }
}

/* Elements begin to end of a call, chunk by chunk. */
static void NAME(range)(const struct call *c, int64_t begin, int64_t end) {
    const struct plan *p = c->plan;
    const struct NAME(format) f = NAME(prepare)(p);
    FLOAT x_buffer[CHUNK], scale_buffer[CHUNK], out_buffer[CHUNK];
    uint64_t raw_buffers[OPERANDS][CHUNK];
    uint32_t random_buffer[CHUNK];
    struct stream streams[OPERANDS];
    for (int operand = 0; operand < OPERANDS; operand++) {
        streams[operand] = open_stream(c, operand, raw_buffers[operand]);
    }
    const int64_t period = streams[SCALE].period;
    const int64_t step = period <= CHUNK ? CHUNK / period * period : CHUNK;
    const FLOAT *scale = NULL;
    const uint32_t *random = NULL;
    for (int64_t n; begin < end; begin += n) {
        n = end - begin < step ? end - begin : step;
        if (scale == NULL || period > CHUNK) { /* else a step is whole periods, and what was read once serves all */
            scale = NAME(convert)(read_stream(&streams[SCALE], begin, n), p->dtypes[SCALE], n, scale_buffer);
        }
        const void *raw = read_stream(&streams[X], begin, n);
        const FLOAT *x = p->operation == DECODE ? NULL : NAME(convert)(raw, p->dtypes[X], n, x_buffer);
        if (p->rounding == STOCHASTIC) {
            random = read_random(&streams[RANDOM], p, begin, n, random_buffer);
        }
        char *to = c->out + begin * size_of(p->out_dtype);
        if (p->operation == ENCODE) {
            NAME(encode)(x, scale, random, (uint8_t *)to, n, p->rounding, &f);
            continue;
        }
        const int is_narrow = p->out_dtype == FLOAT16 || p->out_dtype == BFLOAT16;
        FLOAT *out = is_narrow ? out_buffer : (FLOAT *)to;
        if (p->operation == QUANTIZE) {
            NAME(quantize)(x, scale, random, out, n, p->rounding, p->overflows, &f);
        } else if (p->operation == DECODE) {
            NAME(decode)(raw, scale, out, n, &f);
        } else {
            for (int64_t i = 0; i < n; i++) {
                out[i] = x[i] * scale[i];
            }
        }
        if (p->out_dtype == FLOAT16) {
            float16_from_floats((const float *)out, (uint16_t *)to, n);
        }
        if (p->out_dtype == BFLOAT16) {
            bfloat16_from_floats((const float *)out, (uint16_t *)to, n);
        }
    }
}

#undef FOR_EACH_ROUNDING
#undef LOOP
