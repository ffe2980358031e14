/* The door of the library: picks the instruction set once, and splits calls over torch's threads. */

#include <stddef.h>
#include <string.h>

#include "plan.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

typedef void (*range_function)(int64_t begin, int64_t end, void *call);
typedef int32_t (*parallel_function)(int64_t begin, int64_t end, int64_t grain, range_function range, void *call);

void altgrad_range_baseline(int64_t begin, int64_t end, void *call);
#ifdef ALTGRAD_X86
void altgrad_range_avx2(int64_t begin, int64_t end, void *call);
void altgrad_range_avx512(int64_t begin, int64_t end, void *call);
#endif

enum { GRAIN = 32768 }; /* elements that are worth a thread, as in ATen */

static range_function range;
static parallel_function parallel;

/* Selects the best instruction set, or the one asked for, and torch_parallel_for (NULL: no threads). Returns the name
 * of the set, NULL where the one asked for is not in this library or not in this machine. */
EXPORT const char *altgrad_select(const char *target, parallel_function parallel_for) {
#ifdef ALTGRAD_X86
    const int has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
#endif
    const struct {
        const char *name;
        range_function range;
        int is_supported;
    } targets[] = {
#ifdef ALTGRAD_X86
        {"avx512", altgrad_range_avx512,
         has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
        {"avx2", altgrad_range_avx2, has_avx2},
#endif
        {"baseline", altgrad_range_baseline, 1},
    };
    parallel = parallel_for;
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++) {
        if (targets[i].is_supported && (target == NULL || strcmp(target, targets[i].name) == 0)) {
            range = targets[i].range;
            return targets[i].name;
        }
    }
    return NULL;
}

/* Runs a plan on tensors of n elements. ndim = 0: x and random lie as out does, and scale is one element. */
EXPORT void altgrad_run(const struct plan *plan, int64_t n, char *out, const char *x, const char *scale,
                        const char *random, int64_t ndim, const int64_t *dims) {
    const int64_t flat[] = {n, 1, 0, 1};
    struct call call = {plan, out, {x, scale, random}, ndim ? ndim : 1, ndim ? dims : flat};
    if (n > GRAIN && parallel != NULL) {
        parallel(0, n, GRAIN, range, &call);
    } else {
        range(0, n, &call);
    }
}
