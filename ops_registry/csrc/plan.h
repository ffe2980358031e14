/* What one call is made of. ops_registry/cpu.py packs the same struct plan and struct tensors. */

#ifndef ALTGRAD_PLAN_H
#define ALTGRAD_PLAN_H

#include <stdint.h>

enum operation { QUANTIZE, ENCODE, DECODE, DEQUANTIZE, PROJECT };
enum dtype { FLOAT16, BFLOAT16, FLOAT32, FLOAT64, UINT8, INT32, INT64, UINT16 };
enum rounding {
    NEAREST_TIES_TO_EVEN,
    NEAREST_TIES_TO_AWAY,
    TOWARD_ZERO,
    TOWARD_POSITIVE,
    TOWARD_NEGATIVE,
    TO_ODD,
    STOCHASTIC
};
enum { X, SCALE, RANDOM, OPERANDS };

/* An operator with its format, modes and dtypes: all but the tensors. Codes of specials stand for their values too. */
struct plan {
    int32_t operation;
    int32_t is_double; /* the arithmetic is float64, else float32 */
    int32_t dtypes[OPERANDS], out_dtype;
    int32_t rounding, random_bits; /* of each random number, the low ones count; of dtype INT64 there is a seed */
    int32_t mantissa_bits, min_exponent;
    int32_t sign_bit, max_code, nan_code; /* of a code, the number of its sign bit; nan_code is what NaN packs to */
    int32_t has_inf, has_nan, has_negative_zero;
    int32_t overflows;      /* what is beyond max becomes what follows it in the order of codes: infinity or NaN */
    int32_t limit_codes[2]; /* magnitudes are cut to it before rounding, by the sign: max, or one more to overflow */
    int32_t infinite_code;  /* what infinity becomes: max, or what follows */
    int32_t is_wide;        /* by wide.h: range or codes beyond the loops of float32 and bytes, or no sign, and then: */
    int32_t is_signed, has_zero, code_bits; /* without zero, all codes in this plan but nan_code are one too large */
};

/* The tensors of a call: out has n elements. */
struct tensors {
    int64_t n;
    char *out;
    const char *data[OPERANDS];
    int64_t ndim; /* of the layout beside it */
};

/* A plan with its tensors. out is dense, and position i is its i-th element in memory. */
struct call {
    const struct plan *plan;
    char *out;
    const char *data[OPERANDS];
    int64_t ndim;
    const int64_t *dims; /* ndim rows, from the outermost dimension in out's memory: size, stride of each operand */
};

/* The largest magnitudes of rows: floats of width bytes, side by side, size of them a row. */
struct rows {
    const void *x;
    void *out; /* one float a row */
    int64_t width, size;
};

/* The blocks of quantize_operand: matrices of rows and columns in blocks of height times width, x and random laid out
 * as out. A strip is one block high and span columns wide: whole blocks of CHUNK columns at most, or one longer block.
 */
struct blocks {
    const struct plan *plan, *level; /* of the elements, and of scales in a format of their own, or NULL */
    char *out, *scales;              /* scales: where one a block is stored, as a code of its format, or NULL */
    const char *x, *random;
    int64_t rows, columns, height, width, span, strips_down, strips_across;
    int64_t steps[3];                      /* of matrices, rows and columns, in what a seed counts */
    float headroom, max_value, most;       /* a scale is at most so large, and not below: */
    float smallest, factor, second_factor; /* the factors make room for subnormals */
    float tensor_scale;                    /* above scales in a format */
    int32_t with_tensor_scale, is_power;   /* whether values are multiplied by it; scales are powers of two: */
    int32_t by_quotient, carry, exponent;  /* of amax or of its quotient, with what rounds up and what is taken off */
    int32_t is_short;                      /* whether values by what multiplies them have at most 8 significant bits */
    int32_t packs;                         /* whether codes are packed to their width */
};

/* The random words of a seed. */
struct words {
    uint64_t seed;
    uint32_t *out;
};

/* The groups of a Hadamard transform by hadamard.h, down the columns of matrices behind each other or along rows. */
struct transform {
    const char *x;
    float *out;
    int64_t groups, columns;
    int32_t dtype, is_down;
};

/* Rows of n codes of bits each, packed by pack.h or unpacked. */
struct packing {
    const uint8_t *in;
    uint8_t *out;
    int64_t n;
    int32_t bits, unpacks;
};

/* A matrix product by ops_registry/products.py: [batch, size, rows] times [batch, panels, size, PANEL]. */
struct product {
    int64_t batch, rows, size, columns;
    const void *a, *b; /* double where is_double, else float */
    const int32_t *a_exponents, *b_exponents;
    float *out;
    int64_t group, block, promotion;  /* products: of a group, of a term, until promoted (0: never) */
    int32_t is_double, fraction_bits; /* -1: a chain */
    int32_t least_exponent;           /* to which terms are aligned */
    int32_t mantissa_bits, min_exponent, max_exponent, is_truncated; /* of what is kept */
};
enum { PANEL = 16, ROWS = 32 }; /* columns that lie side by side in b, and rows that they are read for at once */

/* What kernels.c has for one instruction set. */
typedef void (*range_function)(int64_t begin, int64_t end, void *argument);
struct kernels {
    range_function range, amax, random, matmul, blocks, pack, transform;
};

#endif
