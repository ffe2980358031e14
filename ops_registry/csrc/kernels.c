/* The kernels for one instruction set. setup.py compiles this file once for each, with its flags and -DTARGET=name. */

#include <fenv.h>
#include <stddef.h>
#include <string.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "plan.h"

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline, unused))
#else
#define INLINE static inline
#endif

enum { CHUNK = 1024 }; /* elements at a time: their buffers stay in the first-level cache */

#define FLOAT float
#define UINT uint32_t
#define FRACTION_BITS 23
#define EXPONENT_BIAS 127
#define NAME(x) x##32
#include "round.h"

#include "operands.h"
#include "loops.h"
#undef FLOAT
#undef UINT
#undef FRACTION_BITS
#undef EXPONENT_BIAS
#undef NAME

#define FLOAT double
#define UINT uint64_t
#define FRACTION_BITS 52
#define EXPONENT_BIAS 1023
#define NAME(x) x##64
#include "round.h"

#include "loops.h"

#define JOIN(a, b) a##b
#define RANGE(target) JOIN(altgrad_range_, target)

/* Elements begin to end of a struct call, in the default floating-point environment, whatever the thread has set:
 * subnormals are not flushed and rounding is to nearest. The environment is restored, its exception flags included. */
void RANGE(TARGET)(int64_t begin, int64_t end, void *call) {
    const struct call *c = call;
    fenv_t caller;
    fegetenv(&caller);
    fesetenv(FE_DFL_ENV);
    (c->plan->is_double ? range64 : range32)(c, begin, end);
    fesetenv(&caller);
}
