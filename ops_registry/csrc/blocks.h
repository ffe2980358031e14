/* quantize_operand and encode_blocks in float32: strips of blocks, whose elements are read to find the scales and, out
 * of a cache, read again to be divided. The numbers of scales.py and tiles.py.
 */

enum { BAND = 8 }; /* strips beside each other that are read together; their columns lie on the stack */

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

/* Codes of n elements of one row, from element at on, which is the first of a byte. */
static void encode_row(const struct blocks *b, const struct format32 *f, struct room *r, int64_t at, int64_t n,
                       const float *x, const uint32_t *random, const float *divisor) {
    const struct plan *p = b->plan;
    uint8_t *codes = b->packs ? r->codes : (uint8_t *)b->out + at;
    encode32(x, divisor, 1, random, codes, n, variant_of(p), p->rounding, f);
    if (b->packs) {
        const struct packing row = {codes, (uint8_t *)b->out + at * p->code_bits / 8, n, p->code_bits, 0};
        pack_range(&row, 0, (n + 7) / 8);
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

/* Where the elements of a strip lie: in pieces, which are the rows of blocks beside each other, or CHUNK elements each
 * of a longer block of one row. The first piece has n elements, and so have all others but the last. */
struct strip {
    int64_t at, index, first; /* of the first element, in memory and as a seed counts, and of the first scale */
    int64_t pieces, n, last, step, index_step;
    int is_long;
};

static struct strip strip_of(const struct blocks *b, int64_t matrix, int64_t down, int64_t across) {
    const int64_t row = down * b->height, rows = b->rows - row;
    const int64_t column = across * b->span, columns = b->columns - column;
    const int64_t n = columns < b->span ? columns : b->span, pieces = (n + CHUNK - 1) / CHUNK;
    struct strip s = {.at = (matrix * b->rows + row) * b->columns + column,
                      .index = matrix * b->steps[0] + row * b->steps[1] + column * b->steps[2],
                      .pieces = rows < b->height ? rows : b->height,
                      .n = n,
                      .last = n,
                      .step = b->columns,
                      .index_step = b->steps[1]};
    if (b->scales != NULL) { /* divisions take as long as many elements */
        const int64_t blocks_across = (b->columns + b->width - 1) / b->width;
        s.first = (matrix * b->strips_down + down) * blocks_across + column / b->width;
    }
    if (pieces > 1) {
        s.is_long = 1;
        s.pieces = pieces;
        s.n = s.step = s.index_step = CHUNK;
        s.last = n - (pieces - 1) * CHUNK;
    }
    return s;
}

INLINE int has_rows(const struct strip *s) { return s->pieces > 1 && !s->is_long; }

INLINE int64_t size_of_piece(const struct strip *s, int64_t piece) { return piece < s->pieces - 1 ? s->n : s->last; }

/* The largest magnitudes of each column up to a piece, as bits of the dtype: NaN lies behind infinity. */
#define ADD_MAGNITUDES(TYPE, SIGNED, MEMBER, MAGNITUDE)                                                                \
    {                                                                                                                  \
        const TYPE *restrict x = (const TYPE *)from;                                                                   \
        TYPE *restrict most = c->most.MEMBER;                                                                          \
        for (int64_t i = 0; piece == 0 && i < n; i++) {                                                                \
            most[i] = x[i] & MAGNITUDE;                                                                                \
        }                                                                                                              \
        for (int64_t i = 0; piece > 0 && i < n; i++) {                                                                 \
            const TYPE a = x[i] & MAGNITUDE;                                                                           \
            most[i] = (SIGNED)a > (SIGNED)most[i] ? a : most[i];                                                       \
        }                                                                                                              \
    }

static void add_magnitudes(const struct blocks *b, struct columns *c, const struct strip *s, int64_t piece) {
    const enum dtype dtype = b->plan->dtypes[X];
    const void *from = b->x + (s->at + piece * s->step) * size_of(dtype);
    const int64_t n = size_of_piece(s, piece);
    if (dtype == FLOAT32) {
        ADD_MAGNITUDES(uint32_t, int32_t, words, 0x7fffffffu)
    } else {
        ADD_MAGNITUDES(uint16_t, int16_t, halves, 0x7fffu)
    }
}
#undef ADD_MAGNITUDES

/* What the elements of a piece are divided and multiplied by, as many as shared by one; 0: all. */
struct scales {
    const float *divisors, *multipliers;
    int shared;
    enum lookup lookup;
};

#ifdef __AVX512BW__
/* Those of magnitudes from the power of two on that is above the least normal level's. Whether all scales are normal
 * numbers, and hence magnitudes by the format's largest value, find_bases says of both ends of their exponents. */
static void find_levels(const struct blocks *b, const struct format32 *f, struct room *r, struct columns *c) {
    enum { BINADE = 128, BINADES = 32, ENDS = 2 * CLASSES };
    struct levels *t = &r->levels;
    const uint32_t least = r->level.min_power, most = r->level.max_value, one = 1u << FRACTION_BITS;
    t->end = 0;
    t->most = most;
    t->first = (bits32(number32(least) * b->max_value * b->tensor_scale) / one + 1) * one;
    const uint32_t end = t->first + BINADES * one;
    if (b->headroom != 1 || variant_of(b->level) != PLAIN || end >= FLOAT32_INFINITY ||
        number32(t->first) / b->max_value / b->tensor_scale < number32(least) ||
        number32(end) / b->max_value / b->tensor_scale >= 0x1p127f) {
        return;
    }
    for (uint32_t i = 0; i < BINADE; i++) {
        r->amax[i] = number32(t->first + (i << 16));
    }
    scales_of(b, r, c, BINADE);
    fill_levels(r->quotients, t);
    for (uint32_t i = 0; i < ENDS; i++) { /* all classes with the least exponent and with the largest */
        const float level =
            number32(((i < CLASSES ? least : most) & ~(one - 1)) | (i % CLASSES) << (FRACTION_BITS - 3));
        r->quotients[i] = level;
        c->divisor[i] = level * b->tensor_scale;
        c->multiplier[i] = b->with_tensor_scale ? c->divisor[i] : level;
    }
    if (find_bases(f, c->divisor, c->multiplier, r->quotients, ENDS, &c->bases)) {
        t->end = end;
        fill_offsets(c->bases.both, least >> 16, t);
    }
}

/* What serves the narrow blocks of n elements; scales of wide ones have fractions of their own. */
static void prepare_lookup(const struct blocks *b, const struct format32 *f, struct room *r, struct columns *c,
                           int64_t n) {
    r->lookup = NO_LOOKUP;
    if (n < 16 * CHUNK) { /* finding takes as long as they do */
        return;
    }
    if (suits_thresholds(b, f)) {
        r->lookup = THRESHOLDS;
        find_classes(b, f, r->classes);
        r->levels.end = 0;
        if (b->level != NULL) {
            find_levels(b, f, r, c);
        }
    } else if (b->is_power && b->headroom >= 0x1p-20f && b->plan->out_dtype == BFLOAT16 &&
               suits_fractions(b->plan, f, CHUNK)) { /* no quotient is infinite */
        find_fractions(f, BFLOAT16, 1, 1, &r->of_one);
        r->lookup = r->of_one.first > 0 ? FRACTIONS_OF_ONE : NO_LOOKUP;
    }
}

/* Whether narrow blocks of this width lie in vectors of their own. */
INLINE int is_whole(const struct room *r, const struct strip *s, int64_t width) {
    return r->lookup != NO_LOOKUP && (width == 32 || (width == 16 && r->lookup == THRESHOLDS)) && s->n % 32 == 0;
}

/* What serves a strip with count scales, one for as many columns as width: where all of them are numbers, and hence
 * what they are made from, and where an infinite quotient would count, there is none. */
static enum lookup find_lookup(const struct blocks *b, const struct format32 *f, const struct room *r,
                               struct columns *c, const struct strip *s, int64_t width, int64_t count) {
    const float *levels = b->level == NULL ? c->divisor : r->quotients; /* powers of two are of class 0 */
    if (width < LONG_RUN || !suits_fractions(b->plan, f, s->is_long ? width : width * s->pieces)) {
        const int is_found =
            is_whole(r, s, width) && find_bases(f, c->divisor, c->multiplier, levels, count, &c->bases);
        return is_found ? r->lookup : NO_LOOKUP;
    }
    for (int64_t block = 0; block < count; block++) {
        find_fractions(f, b->plan->out_dtype, c->divisor[block], c->multiplier[block], &c->fractions[block]);
        if (c->fractions[block].first == 0 || !(r->amax[block] / b->headroom / c->divisor[block] < 0x1p127f)) {
            return NO_LOOKUP;
        }
    }
    return FRACTIONS_OF_EACH;
}

/* Whether n elements of a piece could be looked up, of which width have a scale. */
static int look_up(const struct format32 *f, enum dtype dtype, const struct room *r, const struct columns *c,
                   enum lookup lookup, int64_t width, const void *from, void *to, int64_t n) {
    const uint16_t *x = from;
    uint16_t *out = to;
    const int64_t last = n % width > 0 ? n % width : width;
    if (lookup == THRESHOLDS && width == 16) {
        quantize_by_thresholds(r->classes, &c->bases, 16, x, out, n);
    } else if (lookup == THRESHOLDS) {
        quantize_by_thresholds(r->classes, &c->bases, 32, x, out, n);
    } else if (last < 32) { /* less than a vector */
        return 0;
    } else if (lookup == FRACTIONS_OF_ONE) {
        quantize_by_fractions(&r->of_one, f, BFLOAT16, &c->bases, c->divisor, x, out, n);
    } else {
        for (const struct fractions *t = c->fractions; n > 0; n -= width, x += width, out += width, t++) {
            quantize_by_scale(t, f, dtype, x, out, width < n ? width : n);
        }
    }
    return 1;
}
#endif

/* The scales of a strip: of one row, or of those whose magnitudes have been added. */
static struct scales find_scales(const struct blocks *b, const struct format32 *f, struct room *r, struct columns *c,
                                 const struct strip *s) {
    const int64_t n = s->is_long ? (s->pieces - 1) * s->n + s->last : s->n;
    const int64_t width = b->width < n ? b->width : n, count = (n + width - 1) / width;
    const enum dtype dtype = b->plan->dtypes[X];
    const void *magnitudes = has_rows(s) ? (const char *)&c->most : b->x + s->at * size_of(dtype);
    most_of_row(magnitudes, dtype, n, width, r->amax);
#ifdef __AVX512BW__
    if (is_whole(r, s, width) && r->lookup == THRESHOLDS && r->levels.end > 0 &&
        look_up_bases(&r->levels, r->amax, count, &c->bases)) {
        return (struct scales){NULL, NULL, 0, THRESHOLDS}; /* by which look_up finds all */
    }
#endif
    for (int64_t block = 0; block < count; block++) {
        r->amax[block] *= b->headroom;
    }
    scales_of(b, r, c, count);
    if (b->scales != NULL) {
        store_scales(b, r, c->multiplier, s->first, count);
    }
    struct scales found = {c->divisor, c->multiplier, 1, NO_LOOKUP};
    if (b->plan->operation != ENCODE) {
        found.shared = s->is_long ? 0 : shares(width, n);
#ifdef __AVX512BW__
        found.lookup = find_lookup(b, f, r, c, s, width, count);
#endif
    }
    if (found.shared == 0 || width == found.shared) {
        return found;
    }
    /* What is behind a smaller last block has room too: whole blocks, and pieces of longer ones, are CHUNK columns. */
    const int64_t times = (s->is_long ? s->n : width) / found.shared;
    spread_scales(c->divisor, count, times, c->divisors);
    found.divisors = found.multipliers = c->divisors;
    if (b->level != NULL && !b->with_tensor_scale) {
        spread_scales(c->multiplier, count, times, c->multipliers);
        found.multipliers = c->multipliers;
    }
    return found;
}

static void apply_scales(const struct blocks *b, const struct format32 *f, struct room *r, struct columns *c,
                         const struct strip *s, int64_t piece, const struct scales *scales) {
    const struct plan *p = b->plan;
    const int64_t at = s->at + piece * s->step, n = size_of_piece(s, piece);
    const uint32_t *random = NULL;
    if (p->rounding == STOCHASTIC && p->dtypes[RANDOM] == INT64) {
        const int64_t index = s->index + piece * s->index_step;
        const uint64_t seed = *(const uint64_t *)(const void *)b->random;
        random = b->steps[2] == 1 ? random_words(seed, index, n, r->random)
                                  : random_words_apart(seed, index, b->steps[2], n, c->fours, r->random);
    } else if (p->rounding == STOCHASTIC) {
        random = (const uint32_t *)(const void *)b->random + at;
    }
    const char *x = b->x + at * size_of(p->dtypes[X]);
    if (p->operation == ENCODE) {
        encode_row(b, f, r, at, n, convert32(x, p->dtypes[X], n, r->x), random, scales->divisors);
        return;
    }
    char *out = b->out + at * size_of(p->out_dtype);
#ifdef __AVX512BW__
    const int64_t width = s->is_long || b->width > n ? n : b->width;
    if (scales->lookup != NO_LOOKUP && look_up(f, p->out_dtype, r, c, scales->lookup, width, x, out, n)) {
        return;
    }
#endif
    quantize32(p, f, x, scales->divisors, scales->multipliers, scales->shared, b->is_power, b->is_short, random, out,
               n);
}

/* Strips begin to end of a struct blocks. Of strips beside each other whole rows are read and, when the scales of all
 * have been found, read again: rows of one strip lie far from each other, and processors see where memory is read on.
 */
static void blocks_range(const struct blocks *b, int64_t begin, int64_t end) {
    const struct format32 f = prepare32(b->plan);
    struct room room;
    struct columns columns[BAND];
    struct strip strips[BAND];
    struct scales scales[BAND];
    if (b->level != NULL) {
        room.level = prepare32(b->level);
    }
    for (int64_t i = 0; i < CHUNK; i++) {
        room.ones[i] = 1;
    }
#ifdef __AVX512BW__
    prepare_lookup(b, &f, &room, columns, (end - begin) * b->span * b->height);
#endif
    int64_t across = begin % b->strips_across, down = begin / b->strips_across % b->strips_down;
    int64_t matrix = begin / b->strips_across / b->strips_down;
    for (int64_t number = begin, n; number < end; number += n) {
        const int64_t beside = b->strips_across - across, most = b->height > 1 ? BAND : 1;
        n = beside < most ? beside : most;
        n = n < end - number ? n : end - number;
        for (int64_t i = 0; i < n; i++) {
            strips[i] = strip_of(b, matrix, down, across + i);
        }
        for (int64_t row = 0; has_rows(strips) && row < strips->pieces; row++) {
            for (int64_t i = 0; i < n; i++) {
                add_magnitudes(b, &columns[i], &strips[i], row);
            }
        }
        for (int64_t i = 0; i < n; i++) {
            scales[i] = find_scales(b, &f, &room, &columns[i], &strips[i]);
        }
        for (int64_t piece = 0; piece < strips->pieces; piece++) {
            for (int64_t i = 0; i < n; i++) {
                apply_scales(b, &f, &room, &columns[i], &strips[i], piece, &scales[i]);
            }
        }
        across += n;
        if (across == b->strips_across) {
            across = 0;
            down = down + 1 < b->strips_down ? down + 1 : 0;
            matrix += down == 0;
        }
    }
}
