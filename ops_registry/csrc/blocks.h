/* quantize_operand and encode_blocks in float32: strips of blocks, whose elements are read to find the scales and, out
 * of a cache, read again to be divided. */

enum { BAND = 8 }; /* strips beside each other that are read together; their columns lie on the stack */

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

#ifdef __AVX512BW__
/* Asks for the next strip while this one is written: narrow blocks are read faster than some processors see that memory
 * is read on. Inlined, since GCC takes a call that only asks for memory to be without effect. */
INLINE void read_ahead(const struct blocks *b, const struct strip *s) {
    const int64_t size = size_of(b->plan->dtypes[X]);
    if ((b->width == 16 || b->width == 32) && s->pieces == 1) {
        for (int64_t i = 0; i < s->n * size; i += 64) {
            _mm_prefetch(b->x + (s->at + s->n) * size + i, _MM_HINT_T0);
        }
    }
}
#endif

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
#ifdef __AVX512BW__
        if (number + n < end) {
            read_ahead(b, &strips[n - 1]);
        }
#endif
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
