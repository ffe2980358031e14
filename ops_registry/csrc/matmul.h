/* Matrix products with the accumulator of a tensor core: the rule is in ops_registry/accumulators.py, and this file is
 * ops_registry/products.py in vectors. Included twice, for sums in float32 and in float64.
 *
 * Terms are products times 2^(F - largest exponent), whose integer part is the truncated term: so sums are sums of
 * integers, exact as long as they stay below 2^FRACTION_BITS. LANES outputs of a row are computed at once. Exponents
 * are read as int32 and are as wide as FLOAT in vectors.
 */

enum { NAME(LANES) = VECTOR_BYTES / sizeof(FLOAT) };

typedef FLOAT NAME(floats) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(FLOAT))));
typedef INT NAME(ints) __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t NAME(stored) __attribute__((vector_size(VECTOR_BYTES / sizeof(FLOAT) * 4), aligned(4)));

#define FLOATS NAME(floats)
#define INTS NAME(ints)

INLINE INTS NAME(either)(INTS mask, INTS a, INTS b) { return (mask & a) | (~mask & b); }
INLINE FLOATS NAME(any)(INTS mask, FLOATS a, FLOATS b) { return (FLOATS)NAME(either)(mask, (INTS)a, (INTS)b); }
INLINE INTS NAME(largest)(INTS a, INTS b) {
    for (int lane = 0; lane < NAME(LANES); lane++) {
        a[lane] = a[lane] > b[lane] ? a[lane] : b[lane];
    }
    return a;
}
INLINE FLOATS NAME(power_of_two)(INTS exponents) { return (FLOATS)((exponents + EXPONENT_BIAS) << FRACTION_BITS); }
INLINE INTS NAME(exponents)(FLOATS x) { return ((INTS)x >> FRACTION_BITS & (2 * EXPONENT_BIAS + 1)) - EXPONENT_BIAS; }

INLINE INTS NAME(read_exponents)(const int32_t *stored) {
    return __builtin_convertvector(*(const NAME(stored) *)stored, INTS);
}

/* To integers, toward zero or to nearest with ties to even. */
INLINE FLOATS NAME(to_integers)(FLOATS x, int is_truncated) {
    for (int lane = 0; lane < NAME(LANES); lane++) {
        x[lane] = (FLOAT)(is_truncated ? __builtin_trunc(x[lane]) : __builtin_rint(x[lane]));
    }
    return x;
}

/* What the accumulator keeps of a sum. */
INLINE FLOATS NAME(round_kept)(FLOATS sum, const struct product *p) {
    const INTS own = NAME(largest)(NAME(exponents)(sum), (INTS){0} + p->min_exponent);
    const INTS exponents = -NAME(largest)(-own, (INTS){0} - p->max_exponent) - p->mantissa_bits;
    const FLOATS quanta = sum * NAME(power_of_two)(-exponents);
    const FLOATS kept = NAME(to_integers)(quanta, p->is_truncated) * NAME(power_of_two)(exponents);
    const FLOATS limit = (FLOATS){0} + NAME(number)((UINT)(p->max_exponent + 1 + EXPONENT_BIAS) << FRACTION_BITS);
    const FLOATS infinity = (FLOATS){0} + (FLOAT)__builtin_inf();
    return NAME(any)(kept >= limit, infinity, NAME(any)(kept <= -limit, -infinity, kept));
}

/* a + b rounded to odd where inexact: whatever rounds it next to fewer bits rounds the exact sum. */
INLINE FLOATS NAME(sum_to_odd)(FLOATS a, FLOATS b) {
    const FLOATS sum = a + b, of_b = sum - a, error = (a - (sum - of_b)) + (b - of_b), zero = {0};
    const INTS is_inexact = (error > zero) | (error < zero), is_even = ((INTS)sum & 1) == 0;
    const INTS away = ((error > zero) == (sum > zero)) & 2; /* 2 or 0: one bit up or down */
    return (FLOATS)((INTS)sum + ((away - 1) & is_inexact & is_even));
}

/* The sum of a block of products of a row of a with LANES columns of b: a term. Lines of a are rows apart. */
INLINE FLOATS NAME(term)(const FLOAT *a, const FLOAT *b, int64_t n, int64_t rows) {
    FLOATS term = a[0] * *(const FLOATS *)b;
    for (int64_t k = 1; k < n; k++) {
        term += a[k * rows] * *(const FLOATS *)(b + k * PANEL);
    }
    return term;
}

/* kept with a group of n products added. */
INLINE FLOATS NAME(add_group)(FLOATS kept, const FLOAT *a, const int32_t *a_exponents, const FLOAT *b,
                              const int32_t *b_exponents, int64_t n, const struct product *p) {
    if (p->fraction_bits < 0) {
        return NAME(round_kept)(NAME(sum_to_odd)(kept, a[0] * *(const FLOATS *)b), p);
    }
    const FLOATS zero = {0};
    const INTS least = (INTS){0} + p->least_exponent, own = NAME(exponents)(kept);
    const INTS counts = (kept != zero) & (own <= EXPONENT_BIAS);
    INTS most = NAME(either)(counts, NAME(largest)(own, (INTS){0} + p->min_exponent), least);
    for (int64_t k = 0; k < n; k += p->block) {
        INTS exponents = NAME(read_exponents)(b_exponents + k * PANEL) + a_exponents[k * p->rows];
        if (p->block > 1) {
            const int64_t end = k + p->block < n ? k + p->block : n;
            for (int64_t i = k + 1; i < end; i++) {
                const INTS others = NAME(read_exponents)(b_exponents + i * PANEL) + a_exponents[i * p->rows];
                exponents = NAME(largest)(exponents, others);
            }
            exponents =
                NAME(either)(NAME(term)(a + k * p->rows, b + k * PANEL, end - k, p->rows) == zero, least, exponents);
        }
        most = NAME(largest)(most, exponents);
    }
    const FLOATS scale = NAME(power_of_two)(p->fraction_bits - most);
    FLOATS sum = NAME(to_integers)(kept * scale, 1);
    for (int64_t k = 0; k < n; k += p->block) {
        const int64_t size = k + p->block < n ? p->block : n - k;
        sum += NAME(to_integers)(NAME(term)(a + k * p->rows, b + k * PANEL, size, p->rows) * scale, 1);
    }
    return NAME(round_kept)(sum * NAME(power_of_two)(most - p->fraction_bits), p) + zero; /* never -0 */
}

/* LANES columns of ROWS rows. */
static void NAME(product_tile)(const struct product *p, const FLOAT *a, const int32_t *a_exponents, const FLOAT *b,
                               const int32_t *b_exponents, int64_t rows, int64_t columns, float *out) {
    FLOATS kept[ROWS] = {{0}};
    float total[ROWS][NAME(LANES)] = {{0}};
    for (int64_t k = 0; k < p->size; k += p->group) {
        const int64_t n = k + p->group < p->size ? p->group : p->size - k, at = k * p->rows;
        const int is_promoted = p->promotion && (k + p->group) % p->promotion == 0;
        for (int64_t row = 0; row < rows; row++) {
            kept[row] = NAME(add_group)(kept[row], a + at + row, a_exponents + at + row, b + k * PANEL,
                                        b_exponents + k * PANEL, n, p);
            if (is_promoted || k + p->group >= p->size) {
                for (int lane = 0; lane < NAME(LANES); lane++) {
                    const float part = (float)kept[row][lane];
                    total[row][lane] = p->promotion ? total[row][lane] + part : part;
                }
                kept[row] = (FLOATS){0};
            }
        }
    }
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t lane = 0; lane < columns && lane < NAME(LANES); lane++) {
            const float y = total[row][lane];
            out[row * p->columns + lane] = y == y ? y : number32(0x7fffffffu);
        }
    }
}

/* PANEL columns of ROWS rows: tile number index. */
static void NAME(product_panel)(const struct product *p, int64_t index) {
    const int64_t panels = (p->columns + PANEL - 1) / PANEL, row_tiles = (p->rows + ROWS - 1) / ROWS;
    const int64_t panel = index % panels, row = index / panels % row_tiles * ROWS, batch = index / panels / row_tiles;
    const int64_t of_a = batch * p->size * p->rows + row, of_b = (batch * panels + panel) * p->size * PANEL;
    const int64_t rows = p->rows - row < ROWS ? p->rows - row : ROWS, columns = p->columns - panel * PANEL;
    float *out = p->out + (batch * p->rows + row) * p->columns + panel * PANEL;
    for (int64_t lane = 0; lane < PANEL && lane < columns; lane += NAME(LANES)) {
        NAME(product_tile)(p, (const FLOAT *)p->a + of_a, p->a_exponents + of_a, (const FLOAT *)p->b + of_b + lane,
                           p->b_exponents + of_b + lane, rows, columns - lane, out + lane);
    }
}
#undef FLOATS
#undef INTS
