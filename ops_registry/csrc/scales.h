/* The scales of blocks from their largest magnitudes: the numbers of scales.py and tiles.py. */

/* What 16 bits are looked up in, instead of being divided and rounded. */
enum lookup { NO_LOOKUP, FRACTIONS_OF_EACH, FRACTIONS_OF_ONE, THRESHOLDS };

/* Of the columns of a strip: the largest magnitudes so far, scales, and random words of four rows. */
struct columns {
    _Alignas(64) float divisor[CHUNK], multiplier[CHUNK], divisors[CHUNK], multipliers[CHUNK];
    uint32_t fours[4 * (CHUNK + LANES)];
    union {
        uint32_t words[CHUNK];
        uint16_t halves[CHUNK];
    } most;
#ifdef __AVX512BW__
    struct fractions fractions[CHUNK / LONG_RUN]; /* of each scale, where these serve many elements */
    struct bases bases;
#endif
};

/* What a piece needs in the first-level cache; ones are scales of 1. */
struct room {
    _Alignas(64) float x[CHUNK], quotients[CHUNK], ones[CHUNK], amax[CHUNK];
    uint32_t random[PHILOX_ROOM];
    uint8_t codes[CHUNK];
    struct format32 level; /* of scales in a format of their own */
#ifdef __AVX512BW__
    enum lookup lookup; /* by narrow blocks: the thresholds of scales, or the fractions of powers of two */
    struct thresholds classes[CLASSES];
    struct levels levels;
    struct fractions of_one;
#endif
};

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
#undef EACH_WIDTH
