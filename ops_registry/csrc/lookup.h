/* What of blocks of 16 bits is looked up, by fractions.h, thresholds.h and levels.h, for AVX-512. Without this file
 * every result is the same. */

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
