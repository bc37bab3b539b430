/* Products of tokens with picked rows of a large table, read once from where they lie: gathering them first would write
   and read every picked row once more. */

#include <stdint.h>

/* A row lies anywhere, so its first lines are asked for while the row before it is multiplied. */
enum { AHEAD = 4, LINES = 4, FLOATS_PER_LINE = 16 };

static void ask_for(const float *row) {
    for (int i = 0; i < LINES; i++) __builtin_prefetch(row + i * FLOATS_PER_LINE);
}

/* out[t, k] = x[t] . table[row[t, k]] */
void expertier_gather_dot(const float *x, const float *table, const int64_t *row, int64_t T, int64_t K, int64_t D,
                          float *out) {
#pragma omp parallel for schedule(static) if (T > 1 && T * K * D > 1 << 16)
    for (int64_t t = 0; t < T; t++) {
        const float *token = x + t * D;
        for (int64_t k = 0; k < K; k++) {
            if (k + AHEAD < K) ask_for(table + row[t * K + k + AHEAD] * D);
            const float *picked = table + row[t * K + k] * D;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < D; d++) sum += token[d] * picked[d];
            out[t * K + k] = sum;
        }
    }
}

/* grad[row[t, k]] += weight[t, k] * x[t]. A row is written by one thread alone, in the order of the tokens, so the sum is
   the same for any number of threads. */
void expertier_scatter_rows(const float *weight, const float *x, const int64_t *row, int64_t T, int64_t K, int64_t D,
                            int64_t parts, float *grad) {
#pragma omp parallel for schedule(static, 1) if (parts > 1)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t t = 0; t < T; t++)
            for (int64_t k = 0; k < K; k++) {
                int64_t next = t * K + k + AHEAD;
                if (next < T * K && row[next] % parts == part) ask_for(grad + row[next] * D);
                if (row[t * K + k] % parts != part) continue;
                float share = weight[t * K + k];
                const float *token = x + t * D;
                float *target = grad + row[t * K + k] * D;
#pragma omp simd
                for (int64_t d = 0; d < D; d++) target[d] += share * token[d];
            }
}
