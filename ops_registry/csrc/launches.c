/* Launches of CUDA kernels of which all but the addresses is known, through torch's stable C interface and the driver.
 *
 * Two kernels of the dispatcher, of schemas in ops_registry/launches.py: `remember` keeps a launch under what it
 * depends on, and `again` makes the outputs and launches, or returns undefined tensors where nothing is kept or the
 * driver did not launch. torch owns tensors by handles; a kernel deletes those of its arguments and gives away those of
 * outputs. */

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "export.h"

typedef void *tensor;
typedef int32_t error; /* 0 where there was none */
typedef void (*kernel)(uint64_t *stack, uint64_t arguments, uint64_t outputs);

enum { SIZES = 7 }; /* grid and threads, three each, and bytes of shared memory */

/* A CUlaunchConfig, without attributes. */
struct config {
    uint32_t sizes[SIZES];
    void *stream, *attributes;
    uint32_t number_of_attributes;
};

/* In the order of FUNCTIONS in ops_registry/launches.py. */
static struct functions {
    error (*init_impl)(const char *name, const char *key, const char *file, uint32_t line, void **library);
    error (*library_impl)(void *library, const char *name, kernel function, uint64_t version);
    error (*get_dim)(tensor t, int64_t *dim);
    error (*get_sizes)(tensor t, const int64_t **sizes);
    error (*get_strides)(tensor t, const int64_t **strides);
    error (*get_dtype)(tensor t, int32_t *dtype);
    error (*get_device_type)(tensor t, int32_t *type);
    error (*get_device_index)(tensor t, int32_t *index);
    error (*get_const_data_ptr)(tensor t, const void **data);
    error (*item_float32)(tensor t, float *value);
    error (*empty_strided)(int64_t dim, const int64_t *sizes, const int64_t *strides, int32_t dtype,
                           int32_t device_type, int32_t device_index, tensor *out);
    error (*zero)(tensor t);
    error (*new_undefined)(tensor *out);
    error (*delete_tensor)(tensor t);
    error (*current_stream)(int32_t device, void **stream);
    int (*current_device)(int *device); /* of the thread's context, and an error where it has none */
    int (*launch)(const struct config *config, void *function, void **arguments, void **extra);
} torch;

enum { INPUTS = 3, DIMS = 8, SLOTS = 24 }; /* those of ops_registry/launches.py */
enum { OUTPUTS = 2, ALIGNMENT = 16, TURNS = 1 << 12 };
enum { TRAITS = 4, WORDS = 1 + INPUTS * (TRAITS + 2 * DIMS), CALLS = 4096 };
static const uint64_t VERSION = (uint64_t)2 << 56 | (uint64_t)11 << 48; /* of torch, whose interface this is */

/* What a launch depends on: the operator with its options, and of each input all but its address. */
struct key {
    int64_t count, words[WORDS];
};

struct output {
    int64_t dim, sizes[DIMS], strides[DIMS];
    int32_t dtype, device_type;
};

/* A launch without addresses. What sources count are the inputs, then the outputs. */
struct launch {
    void *function;
    int32_t sizes[SIZES], device;
    int32_t from_zero;   /* the outputs are 0 before it */
    int32_t with_number; /* the value of the second input goes before the pointers */
    int32_t sources_count, integers_count, outputs_count, sources[SLOTS];
    int64_t integers[SLOTS];
    struct output outputs[OUTPUTS];
};

struct call {
    struct call *next;
    struct key key;
    struct launch launch;
};

static struct call *calls[CALLS];
static int calls_count;
static atomic_flag is_busy = ATOMIC_FLAG_INIT; /* while calls are read or changed: never while torch is called */

/* Whether the calls could be had. In a process that was forked while another thread had them they never can. */
static int lock(void) {
    int turns = 0;
    while (atomic_flag_test_and_set_explicit(&is_busy, memory_order_acquire)) {
        if (++turns == TURNS) {
            return 0;
        }
    }
    return 1;
}

static void unlock(void) { atomic_flag_clear_explicit(&is_busy, memory_order_release); }

static struct call **place_of(const struct key *key) {
    uint64_t hash = 0;
    for (int64_t i = 0; i < key->count; i++) {
        hash = (hash ^ (uint64_t)key->words[i]) * 0x9e3779b97f4a7c15;
        hash ^= hash >> 32;
    }
    return &calls[hash % CALLS];
}

static struct call *find(const struct key *key) {
    struct call *call = *place_of(key);
    while (call != NULL && (call->key.count != key->count ||
                            memcmp(call->key.words, key->words, sizeof(int64_t) * (size_t)key->count) != 0)) {
        call = call->next;
    }
    return call;
}

/* The key of an operator with its options on the inputs, and their addresses; whether it could be made. */
static int make_key(int64_t kind, const tensor *inputs, struct key *key, const void **addresses) {
    int64_t *word = key->words;
    *word++ = kind;
    for (int i = 0; i < INPUTS; i++) {
        const int64_t *sizes, *strides;
        int64_t dim;
        int32_t dtype, device;
        if (torch.get_dim(inputs[i], &dim) || dim > DIMS || torch.get_sizes(inputs[i], &sizes) ||
            torch.get_strides(inputs[i], &strides) || torch.get_dtype(inputs[i], &dtype) ||
            torch.get_device_index(inputs[i], &device) || torch.get_const_data_ptr(inputs[i], &addresses[i])) {
            return 0;
        }
        const int64_t traits[TRAITS] = {dim, dtype, device, (int64_t)((uintptr_t)addresses[i] % ALIGNMENT)};
        memcpy(word, traits, sizeof traits);
        memcpy(word + TRAITS, sizes, sizeof *sizes * (size_t)dim);
        memcpy(word + TRAITS + dim, strides, sizeof *strides * (size_t)dim);
        word += TRAITS + 2 * dim;
    }
    key->count = word - key->words;
    return 1;
}

/* Makes the outputs of a launch, and 0 where they have to be; whether all lie on the boundaries that it asks for. */
static int make_outputs(const struct launch *launch, tensor *outputs, const void **addresses) {
    for (int i = 0; i < launch->outputs_count; i++) {
        const struct output *o = &launch->outputs[i];
        if (torch.empty_strided(o->dim, o->sizes, o->strides, o->dtype, o->device_type, launch->device, &outputs[i])) {
            return 0;
        }
        if ((launch->from_zero && torch.zero(outputs[i])) || torch.get_const_data_ptr(outputs[i], &addresses[i]) ||
            (uintptr_t)addresses[i] % ALIGNMENT != 0) {
            return 0;
        }
    }
    return 1;
}

/* Whether the driver launched it. */
static int run(const struct launch *launch, const void *const *addresses, tensor number) {
    union {
        float number;
        const void *address;
        int64_t integer;
    } slots[SLOTS] = {{0}};
    struct config config = {.attributes = NULL};
    void *arguments[SLOTS];
    int count = 0;
    if (launch->with_number && torch.item_float32(number, &slots[count++].number)) {
        return 0;
    }
    for (int i = 0; i < launch->sources_count; i++) {
        slots[count++].address = addresses[launch->sources[i]];
    }
    for (int i = 0; i < launch->integers_count; i++) {
        slots[count++].integer = launch->integers[i];
    }
    for (int i = 0; i < count; i++) {
        arguments[i] = &slots[i];
    }
    memcpy(config.sizes, launch->sizes, sizeof config.sizes);
    return torch.current_stream(launch->device, &config.stream) == 0 &&
           torch.launch(&config, launch->function, arguments, NULL) == 0;
}

static void delete_all(tensor *tensors, int count) {
    for (int i = 0; i < count; i++) {
        if (tensors[i] != NULL) {
            torch.delete_tensor(tensors[i]);
            tensors[i] = NULL;
        }
    }
}

static int recall(const struct key *key, struct launch *launch) {
    if (!lock()) {
        return 0;
    }
    const struct call *call = find(key);
    if (call != NULL) {
        *launch = call->launch;
    }
    unlock();
    return call != NULL;
}

/* (int kind, Tensor x, Tensor second, Tensor third) -> (Tensor, Tensor) */
static void again(uint64_t *stack, uint64_t arguments, uint64_t outputs_count) {
    tensor inputs[INPUTS], outputs[OUTPUTS] = {NULL};
    const void *addresses[INPUTS + OUTPUTS];
    struct key key;
    struct launch launch;
    int device;
    for (int i = 0; i < INPUTS; i++) {
        inputs[i] = (tensor)(uintptr_t)stack[1 + i];
    }
    if (make_key((int64_t)stack[0], inputs, &key, addresses) && recall(&key, &launch)) {
        const int is_current = torch.current_device(&device) == 0 && device == launch.device;
        if (!is_current || !make_outputs(&launch, outputs, addresses + INPUTS) || !run(&launch, addresses, inputs[1])) {
            delete_all(outputs, OUTPUTS);
        }
    }
    delete_all(inputs, INPUTS);
    for (uint64_t i = 0; i < outputs_count; i++) {
        if (outputs[i] == NULL) {
            torch.new_undefined(&outputs[i]);
        }
        stack[i] = (uint64_t)(uintptr_t)outputs[i];
    }
}

static int describe_output(tensor t, struct output *output) {
    const int64_t *sizes, *strides;
    if (torch.get_dim(t, &output->dim) || output->dim > DIMS || torch.get_sizes(t, &sizes) ||
        torch.get_strides(t, &strides) || torch.get_dtype(t, &output->dtype) ||
        torch.get_device_type(t, &output->device_type)) {
        return 0;
    }
    memcpy(output->sizes, sizes, sizeof *sizes * (size_t)output->dim);
    memcpy(output->strides, strides, sizeof *strides * (size_t)output->dim);
    return 1;
}

/* Takes a launch from the numbers that ops_registry/launches.py writes, and the outputs; whether there is room. */
static int read_launch(const int64_t *numbers, tensor *outputs, struct launch *launch) {
    launch->function = (void *)(uintptr_t)*numbers++;
    for (int i = 0; i < SIZES; i++) {
        launch->sizes[i] = (int32_t)*numbers++;
    }
    launch->device = (int32_t)*numbers++;
    launch->from_zero = (int32_t)*numbers++;
    launch->with_number = (int32_t)*numbers++;
    launch->outputs_count = (int32_t)*numbers++;
    launch->sources_count = (int32_t)*numbers++;
    launch->integers_count = (int32_t)*numbers++;
    if (launch->with_number + launch->sources_count + launch->integers_count > SLOTS) {
        return 0;
    }
    for (int i = 0; i < launch->sources_count; i++) {
        launch->sources[i] = (int32_t)*numbers++;
    }
    for (int i = 0; i < launch->integers_count; i++) {
        launch->integers[i] = *numbers++;
    }
    return describe_output(outputs[0], &launch->outputs[0]) && describe_output(outputs[1], &launch->outputs[1]);
}

static void forget(void) {
    for (int i = 0; i < CALLS; i++) {
        for (struct call *call = calls[i], *next; call != NULL; call = next) {
            next = call->next;
            free(call);
        }
        calls[i] = NULL;
    }
    calls_count = 0;
}

/* (int kind, Tensor x, Tensor second, Tensor third, Tensor out, Tensor other, Tensor numbers) -> () */
static void remember(uint64_t *stack, uint64_t arguments, uint64_t outputs) {
    tensor tensors[INPUTS + OUTPUTS + 1];
    const void *addresses[INPUTS], *numbers;
    struct call *call = calloc(1, sizeof *call);
    for (int i = 0; i < INPUTS + OUTPUTS + 1; i++) {
        tensors[i] = (tensor)(uintptr_t)stack[1 + i];
    }
    if (call != NULL && make_key((int64_t)stack[0], tensors, &call->key, addresses) &&
        torch.get_const_data_ptr(tensors[INPUTS + OUTPUTS], &numbers) == 0 &&
        read_launch(numbers, tensors + INPUTS, &call->launch) && lock()) {
        if (find(&call->key) == NULL) {
            if (calls_count == CALLS) {
                forget();
            }
            struct call **place = place_of(&call->key);
            call->next = *place;
            *place = call;
            calls_count++;
            call = NULL;
        }
        unlock();
    }
    free(call);
    delete_all(tensors, INPUTS + OUTPUTS + 1);
}

/* What the kernels call, before they serve. */
EXPORT void altgrad_launch_by(const struct functions *functions) { torch = *functions; }

/* Makes both kernels those of a dispatch key; whether torch took them. */
EXPORT int altgrad_serve_launches(const char *key) {
    void *library;
    return torch.init_impl("altgrad_launches", key, __FILE__, __LINE__, &library) == 0 &&
           torch.library_impl(library, "again", again, VERSION) == 0 &&
           torch.library_impl(library, "remember", remember, VERSION) == 0;
}
