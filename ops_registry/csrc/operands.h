/* Reading operands of any dtype and layout in the memory order of the output. */

/* float16 is one more format: 10 mantissa bits, exponents from -14. Its infinity has the code that follows its max. */
#define FLOAT16_FORMAT                                                                                                 \
    {.mantissa_bits = 10,                                                                                              \
     .min_power = (127 - 14) << 23,                                                                                    \
     .magic_offset = (13u << 23) - ((uint32_t)(127 - 14) << 10),                                                       \
     .limits = {(127 + 16) << 23}}
#define FLOAT16_INFINITY 0x7c00u
#define FLOAT32_INFINITY 0x7f800000u

INLINE float from_float16(uint16_t code) {
    const struct format32 f = FLOAT16_FORMAT;
    uint32_t magnitude = code & 0x7fffu;
    uint32_t a = value32(magnitude, &f);
    a = magnitude >= FLOAT16_INFINITY ? FLOAT32_INFINITY | magnitude << 13 : a;
    return number32(a | (code & 0x8000u) << 16);
}

INLINE uint16_t to_float16(float number) {
    const struct format32 f = FLOAT16_FORMAT;
    uint32_t bits = bits32(number), a = bits & 0x7fffffffu, magic;
    uint32_t code =
        round32(limit32(bits, NEAREST_TIES_TO_EVEN, &f), 0, 0, NEAREST_TIES_TO_EVEN, &f, &magic) & 0x7fffffu;
    return (uint16_t)((a > FLOAT32_INFINITY ? FLOAT16_INFINITY | 1 : code) | (bits >> 16 & 0x8000u));
}

INLINE uint16_t to_bfloat16(float number) {
    uint32_t bits = bits32(number);
    uint32_t nearest = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > FLOAT32_INFINITY ? 0x7fc0u : nearest);
}

/* F16C has both conversions as instructions, which compilers do not find in the loops over the functions above. */
static void floats_from_float16(const uint16_t *restrict codes, float *restrict numbers, int64_t n) {
    int64_t i = 0;
#ifdef __AVX512F__
    for (; i + 16 <= n; i += 16) {
        _mm512_storeu_ps(numbers + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(codes + i))));
    }
#endif
#ifdef __F16C__
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(numbers + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(codes + i))));
    }
#endif
    for (; i < n; i++) {
        numbers[i] = from_float16(codes[i]);
    }
}

static void float16_from_floats(const float *restrict numbers, uint16_t *restrict codes, int64_t n) {
    int64_t i = 0;
#ifdef __AVX512F__
    for (; i + 16 <= n; i += 16) {
        __m256i nearest = _mm512_cvtps_ph(_mm512_loadu_ps(numbers + i), _MM_FROUND_TO_NEAREST_INT);
        _mm256_storeu_si256((__m256i *)(codes + i), nearest);
    }
#endif
#ifdef __F16C__
    for (; i + 8 <= n; i += 8) {
        __m128i nearest = _mm256_cvtps_ph(_mm256_loadu_ps(numbers + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)(codes + i), nearest);
    }
#endif
    for (; i < n; i++) {
        codes[i] = to_float16(numbers[i]);
    }
}

static void bfloat16_from_floats(const float *restrict numbers, uint16_t *restrict codes, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        codes[i] = to_bfloat16(numbers[i]);
    }
}

INLINE int is_narrow(enum dtype dtype) { return dtype == FLOAT16 || dtype == BFLOAT16; }

/* Numbers to elements of a narrow dtype; to others nothing. */
static void narrow(const float *numbers, enum dtype dtype, void *out, int64_t n) {
    if (dtype == FLOAT16) {
        float16_from_floats(numbers, out, n);
    }
    if (dtype == BFLOAT16) {
        bfloat16_from_floats(numbers, out, n);
    }
}

INLINE int64_t size_of(enum dtype dtype) {
    return dtype == UINT8 ? 1 : dtype == FLOAT64 || dtype == INT64 ? 8 : dtype == FLOAT32 || dtype == INT32 ? 4 : 2;
}

/* An operand as a sequence in the memory order of the output, and a place in it. */
struct stream {
    const char *data;
    int64_t size;   /* of an element, in bytes */
    int64_t period; /* the sequence repeats after as many elements: 1 for a scalar */
    int64_t run;    /* as many elements, from the first on, are one and the same: all for a scalar */
    int is_contiguous;
    const struct call *call;
    int operand;
    void *buffer;                                  /* for CHUNK elements */
    int64_t inner, inner_stride, rows, row_stride; /* the last two dimensions; one without end where contiguous */
    int64_t position, row, rest;                   /* the place is (rest * rows + row) * inner + position */
};

static struct stream open_stream(const struct call *c, int operand, int64_t place, void *buffer) {
    struct stream s = {.data = c->data[operand],
                       .size = size_of(c->plan->dtypes[operand]),
                       .period = 1,
                       .run = INT64_MAX,
                       .is_contiguous = 1,
                       .call = c,
                       .operand = operand,
                       .buffer = buffer};
    int64_t inner = 1;
    for (int64_t d = c->ndim - 1; d >= 0; d--) {
        const int64_t *dim = c->dims + d * (1 + OPERANDS), stride = dim[1 + operand];
        s.is_contiguous &= stride == inner;
        s.run = stride && s.run == INT64_MAX ? inner : s.run;
        inner *= dim[0];
        s.period = stride ? inner : s.period;
    }
    const int64_t *last = c->dims + (c->ndim - 1) * (1 + OPERANDS);
    const int64_t *before = c->ndim > 1 ? last - (1 + OPERANDS) : last;
    s.inner = s.is_contiguous ? INT64_MAX : last[0];
    s.inner_stride = last[1 + operand];
    s.rows = c->ndim > 1 ? before[0] : 1;
    s.row_stride = c->ndim > 1 ? before[1 + operand] : 0;
    s.position = place % s.inner;
    s.row = place / s.inner % s.rows;
    s.rest = place / s.inner / s.rows;
    return s;
}

#define COPY(TYPE)                                                                                                     \
    for (int64_t i = 0; i < run; i++) {                                                                                \
        ((TYPE *)to)[i] = ((const TYPE *)from)[i * stride];                                                            \
    }

static void copy_run(char *restrict to, const char *restrict from, int64_t run, int64_t stride, int64_t size) {
    if (stride == 1) {
        memcpy(to, from, (size_t)(run * size));
    } else if (stride == 0 && size == 4) {
        uint32_t element;
        memcpy(&element, from, 4);
        for (int64_t i = 0; i < run; i++) {
            ((uint32_t *)to)[i] = element;
        }
    } else if (size == 1) {
        COPY(uint8_t)
    } else if (size == 2) {
        COPY(uint16_t)
    } else if (size == 4) {
        COPY(uint32_t)
    } else {
        COPY(uint64_t)
    }
}
#undef COPY

/* One element of each of count rows, width times: blocks with a scale each. It writes whole vectors, up to 15 elements
 * too many: those of the next row come later, and a buffer for CHUNK elements of 8 bytes has room behind the last. */
static void repeat_each(uint32_t *restrict to, const uint32_t *restrict from, int64_t count, int64_t stride,
                        int64_t width) {
    for (int64_t row = 0; row < count; row++, to += width) {
        const uint32_t element = from[row * stride];
        for (int64_t i = 0; i < width; i += 16) {
            for (int64_t j = 0; j < 16; j++) {
                to[i + j] = element;
            }
        }
    }
}

/* Moves on by n elements. There is no division: that takes as long as the arithmetic of a hundred elements. */
static void skip(struct stream *s, int64_t n) {
    s->position += n;
    for (; s->position >= s->inner; s->position -= s->inner) {
        if (++s->row == s->rows) {
            s->row = 0;
            s->rest++;
        }
    }
}

/* The next n <= CHUNK elements of a stream: in place where they lie side by side, else in its buffer. */
static const void *read_stream(struct stream *s, int64_t n) {
    if (s->is_contiguous) {
        s->position += n;
        return s->data + (s->position - n) * s->size;
    }
    const int64_t *dims = s->call->dims, width = 1 + OPERANDS;
    const int64_t inner = s->inner, stride = s->inner_stride, rows = s->rows, row_stride = s->row_stride,
                  size = s->size;
    int64_t position = s->position, row = s->row, rest = s->rest;
    const char *in_place = NULL;
    for (int64_t done = 0, stop = 0; done < n;) {
        int64_t offset = row * row_stride, outer = rest;
        for (int64_t d = s->call->ndim - 3; d >= 0; d--) {
            offset += outer % dims[d * width] * dims[d * width + 1 + s->operand];
            outer /= dims[d * width];
        }
        if (stride == 0 && size == 4 && position == 0 && n - done >= inner) {
            const int64_t left = (n - done) / inner, count = left < rows - row ? left : rows - row;
            repeat_each((uint32_t *)s->buffer + done, (const uint32_t *)s->data + offset, count, row_stride, inner);
            done += count * inner;
            row += count;
            offset += count * row_stride;
            stop = inner;
        }
        for (; row < rows && done < n; row++, offset += row_stride, position = 0) {
            const int64_t run = inner - position < n - done ? inner - position : n - done;
            const char *from = s->data + (offset + position * stride) * size;
            if (run == n && (stride == 1 || n == 1)) {
                in_place = from;
            } else {
                copy_run((char *)s->buffer + done * size, from, run, stride, size);
            }
            done += run;
            stop = position + run;
        }
        if (stop < inner) {
            row--;
            position = stop;
        } else if (row == rows) {
            row = 0;
            rest++;
        }
    }
    s->position = position;
    s->row = row;
    s->rest = rest;
    return in_place != NULL ? in_place : s->buffer;
}

/* n random numbers from element begin on, in the low bits of each; buffer has PHILOX_ROOM. */
static const uint32_t *read_random(struct stream *s, const struct plan *p, int64_t begin, int64_t n, uint32_t *buffer) {
    if (p->dtypes[RANDOM] == INT64) {
        return random_words(*(const uint64_t *)(const void *)s->data, begin, n, buffer);
    }
    const void *raw = read_stream(s, n);
    const uint8_t *bytes = raw;
    if (p->dtypes[RANDOM] != UINT8) {
        return raw;
    }
    for (int64_t i = 0; i < n; i++) {
        buffer[i] = bytes[i];
    }
    return buffer;
}
