/* Strips of blocks: where they lie, and what is found of them. */

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
