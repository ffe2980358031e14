/* The scales of blocks from their largest magnitudes: the numbers of scales.py and tiles.py. */

/* n scales from the largest magnitudes: what is divided by, and what values are multiplied by. */
static void scales_of(const struct blocks *b, struct room *r, struct columns *c, int64_t n) {
    const float *restrict amax = r->amax;
    float *restrict divisor = c->divisor, *restrict multiplier = c->multiplier, *restrict quotients = r->quotients;
    const float max_value = b->max_value, factor = b->factor, second_factor = b->second_factor, most = b->most;
    const float tensor_scale = b->tensor_scale;
    const int32_t carry = b->carry, exponent = b->exponent;
    if (b->level != NULL) {
        for (int64_t i = 0; i < n; i++) {
            quotients[i] = amax[i] / max_value / tensor_scale;
        }
        quantize32(b->level, &r->level, quotients, r->ones, r->ones, 0, 1, 0, NULL, multiplier, n);
        for (int64_t i = 0; i < n; i++) {
            const float level = multiplier[i] < b->smallest ? b->smallest : multiplier[i];
            divisor[i] = level * tensor_scale;
            multiplier[i] = b->with_tensor_scale ? divisor[i] : level;
            quotients[i] = level;
        }
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        float scale;
        if (b->is_power) {
            const float a = (b->by_quotient ? amax[i] / max_value : amax[i]) * factor * second_factor;
            int32_t code = ((int32_t)(bits32(a) + (uint32_t)carry) >> 23) - exponent;
            code = code < 254 ? code : 254;
            const int32_t bits = (int32_t)((uint32_t)code << 23), smallest = 1 << 22; /* 2^-127 */
            scale = number32((uint32_t)(bits > smallest ? bits : smallest));
            scale = amax[i] != amax[i] ? amax[i] : scale;
        } else {
            scale = amax[i] / max_value;
            scale = scale < b->smallest ? b->smallest : scale;
            scale = scale > most ? most : scale;
            scale = amax[i] == 0 ? 1 : scale;
            scale = bits32(amax[i]) == FLOAT32_INFINITY ? number32(FLOAT32_INFINITY | 1u << 22) : scale;
        }
        divisor[i] = multiplier[i] = scale;
    }
}

/* What values of n blocks are multiplied by, as scale number at and those behind it. */
static void store_scales(const struct blocks *b, const struct room *r, const float *multiplier, int64_t at, int64_t n) {
    uint8_t *codes = (uint8_t *)b->scales + at;
    if (b->level != NULL) {
        encode32(multiplier, r->ones, 1, NULL, codes, n, variant_of(b->level), NEAREST_TIES_TO_EVEN, &r->level);
    } else if (b->is_power) {
        for (int64_t i = 0; i < n; i++) {
            codes[i] = (uint8_t)(bits32(multiplier[i]) >> FRACTION_BITS); /* 0 of 2^-127, 255 of NaN */
        }
    } else {
        memcpy((float *)(void *)b->scales + at, multiplier, (size_t)n * sizeof *multiplier);
    }
}

/* As many of n elements as share a scale in quantize32, where blocks are so wide. */
INLINE int shares(int64_t width, int64_t n) {
    const int is_vector = VECTOR_BYTES == 64 && n % 32 == 0;
    return is_vector && width % 32 == 0 ? 32 : is_vector && width % 16 == 0 ? 16 : 1;
}

/* count scales, width times each. */
static void spread_scales(const float *restrict scales, int64_t count, int64_t width, float *restrict to) {
#define SPREAD(WIDTH)                                                                                                  \
    for (int64_t block = 0; block < count; block++) {                                                                  \
        for (int64_t i = 0; i < WIDTH; i++) {                                                                          \
            to[block * WIDTH + i] = scales[block];                                                                     \
        }                                                                                                              \
    }
    EACH_WIDTH(SPREAD)
#undef SPREAD
}
