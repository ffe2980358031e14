/* The Hadamard transform of hadamard.py: 16 elements down a column or along a row, whose sums have its order. */

enum { GROUP = 16, GROUPS = CHUNK / 16, NEGATED = 0xd7e8 /* bit i: element i */ };

/* Many groups at a time: row i has element i of each. */
static void transform_groups(float (*restrict v)[GROUPS]) {
    for (int apart = 1; apart < GROUP; apart *= 2) {
        for (int i = 0; i < GROUP; i++) {
            for (int group = 0; (i & apart) == 0 && group < GROUPS; group++) {
                const float a = v[i][group], b = v[i + apart][group];
                v[i][group] = a + b;
                v[i + apart][group] = a - b;
            }
        }
    }
}

/* Strips begin to end of a struct transform: of 16 rows and GROUPS columns, or of GROUPS groups behind each other. */
static void transform_range(const struct transform *t, int64_t begin, int64_t end) {
    const int64_t strips_across = t->is_down ? (t->columns + GROUPS - 1) / GROUPS : 1;
    float buffer[CHUNK], v[GROUP][GROUPS] = {{0}};
    const int64_t apart = t->is_down ? t->columns : 1, step = t->is_down ? 1 : GROUP; /* of elements, and of groups */
    for (int64_t strip = begin; strip < end; strip++) {
        const int64_t down = strip / strips_across, first = strip % strips_across * GROUPS;
        const int64_t left = t->is_down ? t->columns - first : t->groups - strip * GROUPS;
        const int64_t n = left < GROUPS ? left : GROUPS;
        const int64_t at = t->is_down ? down * GROUP * t->columns + first : strip * CHUNK;
        const char *raw = t->x + at * size_of(t->dtype);
        const float *x = t->is_down ? NULL : convert32(raw, t->dtype, n * GROUP, buffer);
        for (int64_t i = 0; i < GROUP; i++) {
            const float sign = NEGATED >> i & 1 ? -1 : 1;
            const float *row = t->is_down ? convert32(raw + i * apart * size_of(t->dtype), t->dtype, n, buffer) : x + i;
            for (int64_t group = 0; group < n; group++) {
                v[i][group] = sign * row[group * step];
            }
        }
        transform_groups(v);
        for (int64_t i = 0; i < GROUP; i++) {
            for (int64_t group = 0; group < n; group++) {
                t->out[at + i * apart + group * step] = v[i][group] * 0.25f;
            }
        }
    }
}
