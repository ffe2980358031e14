/* The door of the library: picks the instruction set once, and splits calls over torch's threads. */

#include <stddef.h>
#include <string.h>

#include "export.h"
#include "plan.h"

/* The digest of the files that this was built from; ops_registry/native.py compares it with those beside it. */
EXPORT const char altgrad_sources[] = SOURCES;

typedef int32_t (*parallel_function)(int64_t begin, int64_t end, int64_t grain, range_function range, void *call);

extern const struct kernels altgrad_baseline;
#ifdef ALTGRAD_X86
extern const struct kernels altgrad_avx2, altgrad_avx512;
#endif

enum { GRAIN = 32768 }; /* elements that are worth a thread, as in ATen */

static const struct kernels *kernels;
static parallel_function parallel;

/* Selects the best instruction set, or the one asked for, and torch_parallel_for (NULL: no threads). Returns the name
 * of the set, NULL where the one asked for is not in this library or not in this machine. */
EXPORT const char *altgrad_select(const char *target, parallel_function parallel_for) {
#ifdef ALTGRAD_X86
    const int has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    const struct {
        const char *name;
        const struct kernels *kernels;
        int is_supported;
    } targets[] = {
#ifdef ALTGRAD_X86
        {"avx512", &altgrad_avx512,
         has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
        {"avx2", &altgrad_avx2, has_avx2},
#endif
        {"baseline", &altgrad_baseline, 1},
    };
    parallel = parallel_for;
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++) {
        if (targets[i].is_supported && (target == NULL || strcmp(target, targets[i].name) == 0)) {
            kernels = targets[i].kernels;
            return targets[i].name;
        }
    }
    return NULL;
}

static void run(range_function function, int64_t n, int64_t grain, void *argument) {
    if (n > grain && parallel != NULL) {
        parallel(0, n, grain, function, argument);
    } else {
        function(0, n, argument);
    }
}

enum { MAX_DIMS = 64, WIDTH = 1 + OPERANDS }; /* torch has no tensors of more dimensions */

/* Fills dims of a struct call from the layout of altgrad_run; returns how many there are. They come in the order of
 * out's memory, without those of size 1, and one that continues the next in every operand is merged into it. */
static int64_t arrange(int64_t ndim, const int64_t *layout, int64_t (*dims)[WIDTH]) {
    int64_t order[MAX_DIMS], sorted = 0, count = 0;
    for (int64_t d = 0; d < ndim; d++) {
        if (layout[d] == 1) {
            continue;
        }
        int64_t i = sorted++;
        for (; i > 0 && layout[ndim + order[i - 1]] < layout[ndim + d]; i--) {
            order[i] = order[i - 1];
        }
        order[i] = d;
    }
    for (int64_t i = 0; i < sorted; i++) {
        const int64_t size = layout[order[i]], *strides = layout + 2 * ndim + order[i];
        int64_t *outer = dims[count - (count > 0)];
        int continues = count > 0;
        for (int operand = 0; operand < OPERANDS; operand++) {
            continues = continues && outer[1 + operand] == strides[operand * ndim] * size;
        }
        int64_t *dim = continues ? outer : dims[count++];
        dim[0] = continues ? outer[0] * size : size;
        for (int operand = 0; operand < OPERANDS; operand++) {
            dim[1 + operand] = strides[operand * ndim];
        }
    }
    return count;
}

/* Runs a plan on tensors. layout has rows of ndim numbers: the sizes, and the strides of out, x, scale and random in
 * elements. With ndim = 0, x and random lie as out does, and scale is one element. */
EXPORT void altgrad_run(const struct plan *plan, const struct tensors *t, const int64_t *layout) {
    int64_t dims[MAX_DIMS][WIDTH] = {{t->n, 1, 0, 1}};
    const int64_t count = arrange(t->ndim, layout, dims);
    struct call call = {plan, t->out, {t->data[X], t->data[SCALE], t->data[RANDOM]}, count > 0 ? count : 1, dims[0]};
    run(kernels->range, t->n, GRAIN, &call);
}

/* The largest magnitudes of rows of size floats, of width bytes each, that lie side by side. */
EXPORT void altgrad_amax(int64_t width, int64_t n, int64_t size, void *out, const void *x) {
    struct rows rows = {x, out, width, size};
    run(kernels->amax, n, GRAIN / (size + 1) + 1, &rows);
}

/* Packs or unpacks rows of n codes of bits each, which lie side by side. */
EXPORT void altgrad_pack(int64_t rows, int64_t n, int32_t bits, int32_t unpacks, void *out, const void *in) {
    struct packing packing = {in, out, n, bits, unpacks};
    run(kernels->pack, rows * ((n + 7) / 8), GRAIN / 8, &packing);
}

/* n random words of a seed. */
EXPORT void altgrad_random(int64_t n, void *out, uint64_t seed) {
    struct words words = {seed, out};
    run(kernels->random, n, GRAIN, &words);
}

/* The tiles of a product of panels. */
EXPORT void altgrad_matmul(struct product *p) {
    const int64_t panels = (p->columns + PANEL - 1) / PANEL, row_tiles = (p->rows + ROWS - 1) / ROWS;
    run(kernels->matmul, p->batch * panels * row_tiles, GRAIN / (ROWS * PANEL * (p->size + 1)) + 1, p);
}

/* The groups of a Hadamard transform, of strips of 1024 elements or, at the end of rows, fewer. */
EXPORT void altgrad_transform(struct transform *t, int64_t strips) { run(kernels->transform, strips, GRAIN / 1024, t); }

/* The strips of blocks. */
EXPORT void altgrad_blocks(struct blocks *b, int64_t strips) {
    run(kernels->blocks, strips, GRAIN / (b->span * b->height + 1) + 1, b);
}
