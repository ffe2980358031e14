/* The kernels for one instruction set. setup.py compiles this file once for each, with its flags and -DTARGET=name. */

#include <fenv.h>
#include <stddef.h>
#include <string.h>

#if defined(__x86_64__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "plan.h"

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline, unused))
#else
#define INLINE static inline
#endif

enum {
    CHUNK = 1024,  /* elements at a time: their buffers stay in the first-level cache */
    LONG_RUN = 128 /* elements that are worth a turn of their own for sharing a scale */
};

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#define FLOAT float
#define INT int32_t
#define UINT uint32_t
#define FRACTION_BITS 23
#define EXPONENT_BIAS 127
#define NAME(x) x##32
#ifdef __FMA__ /* where it is one instruction; all products here are exact, so it changes no bit */
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif
#include "round.h"
#include "nearest.h"

#include "philox.h"
#include "operands.h"
#include "avx512.h"
#include "fractions.h"
#include "thresholds.h"
#include "levels.h"
/* In wide.h: numbers to values of the format in place, values to codes, codes to values. */
static void wide_project(const struct plan *p, double *numbers, const uint32_t *random, int64_t n);
static void wide_encode(const struct plan *p, const double *values, void *codes, int64_t n);
static void wide_decode(const struct plan *p, const void *codes, double *values, int64_t n);

#include "loops.h"
#include "pack.h"
#include "magnitudes.h"
#include "strips.h"
#include "scales.h"
#include "lookup.h"
#include "blocks.h"
#include "hadamard.h"
#include "matmul.h"
#undef FLOAT
#undef INT
#undef UINT
#undef FRACTION_BITS
#undef EXPONENT_BIAS
#undef NAME
#undef MULTIPLY_ADD

#define FLOAT double
#define INT int64_t
#define UINT uint64_t
#define FRACTION_BITS 52
#define EXPONENT_BIAS 1023
#define NAME(x) x##64
#ifdef __FMA__
#define MULTIPLY_ADD(a, b, c) __builtin_fma(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif
#include "round.h"
#include "nearest.h"
#include "loops.h"
#include "matmul.h"
#include "wide.h"

/* Rows begin to end of a struct rows. Magnitudes are ordered as their bits are, NaN behind infinity. */
#define LARGEST(TYPE)                                                                                                  \
    for (int64_t row = begin; row < end; row++) {                                                                      \
        const TYPE *x = (const TYPE *)rows->x + row * rows->size, magnitude = (TYPE)(-1) >> 1;                         \
        TYPE most = 0;                                                                                                 \
        for (int64_t i = 0; i < rows->size; i++) {                                                                     \
            const TYPE a = x[i] & magnitude;                                                                           \
            most = a > most ? a : most;                                                                                \
        }                                                                                                              \
        ((TYPE *)rows->out)[row] = most;                                                                               \
    }

static void run_amax(int64_t begin, int64_t end, void *argument) {
    const struct rows *rows = argument;
    if (rows->width == 2) {
        LARGEST(uint16_t)
    } else if (rows->width == 4) {
        LARGEST(uint32_t)
    } else {
        LARGEST(uint64_t)
    }
}

/* Groups begin to end of a struct packing. */
static void run_pack(int64_t begin, int64_t end, void *packing) { pack_range(packing, begin, end); }

/* Words begin to end of a struct words. */
static void run_random(int64_t begin, int64_t end, void *argument) {
    const struct words *words = argument;
    uint32_t buffer[PHILOX_ROOM];
    for (int64_t n; begin < end; begin += n) {
        n = end - begin < CHUNK ? end - begin : CHUNK;
        memcpy(words->out + begin, random_words(words->seed, begin, n, buffer), (size_t)n * sizeof *buffer);
    }
}

/* The default floating-point environment: nothing is flushed to zero, and rounding is to nearest. On x86 all arithmetic
 * is in SSE or AVX, whose control register alone is quicker to set than a fenv_t. */
#ifdef __x86_64__
typedef unsigned environment;
static environment enter_default(void) {
    environment caller = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return caller;
}
static void leave_default(environment caller) { _mm_setcsr(caller); }
#else
typedef fenv_t environment;
static environment enter_default(void) {
    environment caller;
    fegetenv(&caller);
    fesetenv(FE_DFL_ENV);
    return caller;
}
static void leave_default(environment caller) { fesetenv(&caller); }
#endif

/* Elements begin to end of a struct call, whatever floating-point environment the thread has set; it is restored, its
 * exception flags included. */
static void run_range(int64_t begin, int64_t end, void *call) {
    const struct call *c = call;
    const environment caller = enter_default();
    (c->plan->is_double ? range64 : range32)(c, begin, end);
    leave_default(caller);
}

/* Tiles begin to end of a struct product. */
static void run_matmul(int64_t begin, int64_t end, void *product) {
    const struct product *p = product;
    const environment caller = enter_default();
    for (; begin < end; begin++) {
        (p->is_double ? product_panel64 : product_panel32)(p, begin);
    }
    leave_default(caller);
}

/* Strips begin to end of a struct transform. */
static void run_transform(int64_t begin, int64_t end, void *transform) {
    const environment caller = enter_default();
    transform_range(transform, begin, end);
    leave_default(caller);
}

/* Strips begin to end of a struct blocks. */
static void run_blocks(int64_t begin, int64_t end, void *blocks) {
    const environment caller = enter_default();
    blocks_range(blocks, begin, end);
    leave_default(caller);
}

#define JOIN(a, b) a##b
#define FOR_TARGET(name, target) JOIN(name, target)

extern const struct kernels FOR_TARGET(altgrad_, TARGET);
const struct kernels FOR_TARGET(altgrad_, TARGET) = {
    .range = run_range,
    .amax = run_amax,
    .random = run_random,
    .matmul = run_matmul,
    .blocks = run_blocks,
    .pack = run_pack,
    .transform = run_transform,
};
