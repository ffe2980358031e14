/* Codes of 1 to 8 bits, packed and unpacked by groups: 8 codes are as many bytes as a code has bits, in one word. */

#define EVERY16 0x0001000100010001u
#define EVERY32 0x0000000100000001u

/* A word has its lowest byte first in memory. */
INLINE uint64_t little_endian(uint64_t x) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap64(x);
#else
    return x;
#endif
}

/* The low bits of the 8 bytes of x side by side: in each lane of two bytes, of four, in all. */
INLINE uint64_t joined(uint64_t x, int bits) {
    const uint64_t first = 0xFF * EVERY16, second = 0xFFFF * EVERY32, third = 0xFFFFFFFF;
    x &= (((uint64_t)1 << bits) - 1) * (EVERY16 | EVERY16 << 8);
    x = (x & first) | (x & ~first) >> (8 - bits);
    x = (x & second) | (x & ~second) >> (16 - 2 * bits);
    return (x & third) | (x & ~third) >> (32 - 4 * bits);
}

/* The inverse; what x has above its 8 * bits low ones must be 0. */
INLINE uint64_t spread(uint64_t x, int bits) {
    const uint64_t third = ((uint64_t)1 << 4 * bits) - 1, second = (((uint64_t)1 << 2 * bits) - 1) * EVERY32;
    const uint64_t first = (((uint64_t)1 << bits) - 1) * EVERY16;
    x = (x & third) | (x & ~third) << (32 - 4 * bits);
    x = (x & second) | (x & ~second) << (16 - 2 * bits);
    return (x & first) | (x & ~first) << (8 - bits);
}

/* n <= 8 codes of in, or the bytes that they take, to out. */
INLINE void pack_group(uint8_t *out, uint64_t in, int64_t n, int bits, int unpacks) {
    uint64_t x = little_endian(in);
    if (unpacks) { /* what is behind the group may be in */
        x = spread(bits < 8 ? x & (((uint64_t)1 << 8 * (bits & 7)) - 1) : x, bits);
    } else {
        x = joined(x, bits);
    }
    x = little_endian(x);
    memcpy(out, &x, (size_t)(unpacks ? n : (n * bits + 7) / 8));
}

/* Bytes of two codes of 4 bits, in loops that vectorize. */
INLINE void pack_pairs(uint8_t *restrict out, const uint8_t *restrict in, int64_t bytes, int unpacks) {
    for (int64_t i = 0; unpacks && i < bytes; i++) {
        out[2 * i] = in[i] & 15;
        out[2 * i + 1] = in[i] >> 4;
    }
    for (int64_t i = 0; !unpacks && i < bytes; i++) {
        out[i] = (uint8_t)((in[2 * i] & 15) | in[2 * i + 1] << 4);
    }
}

/* Three bytes of four codes of 6 bits, for vectors whose bytes can change places: they are slower without. */
INLINE void pack_fours(uint8_t *restrict out, const uint8_t *restrict in, int64_t threes) {
    for (int64_t i = 0; i < threes; i++) {
        const uint8_t a = in[4 * i] & 63, b = in[4 * i + 1] & 63, c = in[4 * i + 2] & 63, d = in[4 * i + 3] & 63;
        out[3 * i] = (uint8_t)(a | b << 6);
        out[3 * i + 1] = (uint8_t)(b >> 2 | c << 4);
        out[3 * i + 2] = (uint8_t)(c >> 4 | d << 2);
    }
}

/* Groups begin to end of rows of n codes, each of which begins with a group of its own. Whole groups are read as words,
 * with what follows them, as long as a row has that: put together of parts a word would be slow to read. */
INLINE void pack_groups(const struct packing *p, int64_t begin, int64_t end, int bits, int unpacks) {
    const int64_t groups = (p->n + 7) / 8, row_bytes = (p->n * bits + 7) / 8;
    const int64_t in_bytes = unpacks ? row_bytes : p->n, out_bytes = unpacks ? p->n : row_bytes;
    const int in_step = unpacks ? bits : 8, out_step = unpacks ? 8 : bits;
    const int64_t words = in_bytes < 8 ? 0 : (in_bytes - 8) / in_step + 1;
    while (begin < end) {
        const int64_t row = begin / groups, first = begin % groups;
        const int64_t last = groups - first < end - begin ? groups : first + (end - begin);
        const int64_t whole = last < words ? last : words;
        const uint8_t *in = p->in + row * in_bytes;
        uint8_t *out = p->out + row * out_bytes;
        const int by_fours = bits == 6 && !unpacks && VECTOR_BYTES > 16;
        if (bits == 4 && first < whole) {
            pack_pairs(out + first * out_step, in + first * in_step, 4 * (whole - first), unpacks);
        } else if (by_fours && first < whole) {
            pack_fours(out + first * out_step, in + first * in_step, 2 * (whole - first));
        } else {
            for (int64_t i = first; i < whole; i++) {
                uint64_t x;
                memcpy(&x, in + i * in_step, sizeof x);
                pack_group(out + i * out_step, x, 8, bits, unpacks);
            }
        }
        for (int64_t i = first < whole ? whole : first; i < last; i++) {
            const int64_t n = p->n - 8 * i < 8 ? p->n - 8 * i : 8;
            uint64_t x = 0;
            memcpy(&x, in + i * in_step, (size_t)(unpacks ? (n * bits + 7) / 8 : n));
            pack_group(out + i * out_step, x, n, bits, unpacks);
        }
        begin += last - first;
    }
}

#define FOR_WIDTH(BITS)                                                                                                \
    case BITS:                                                                                                         \
        if (p->unpacks) {                                                                                              \
            pack_groups(p, begin, end, BITS, 1);                                                                       \
        } else {                                                                                                       \
            pack_groups(p, begin, end, BITS, 0);                                                                       \
        }                                                                                                              \
        break;

static void pack_range(const struct packing *p, int64_t begin, int64_t end) {
    switch (p->bits) {
        FOR_WIDTH(1)
        FOR_WIDTH(2)
        FOR_WIDTH(3)
        FOR_WIDTH(4)
        FOR_WIDTH(5)
        FOR_WIDTH(6)
        FOR_WIDTH(7)
        FOR_WIDTH(8)
    }
}
