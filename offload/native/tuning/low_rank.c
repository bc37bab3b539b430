/* Products of bfloat16 rows with the two factors of an adapter, which are float32 and have a few rows.

   Each sum is one thread's, in an order that depends on its length alone. */

#include "../bfloat16.h"

/* Fewer products than ONE_THREAD are not worth a second thread, which has to be woken. Not tuned. */
enum { COLUMNS_AT_ONCE = 512, ONE_THREAD = 1 << 20 };

static inline void widen_row(const uint16_t *x, int64_t columns, float *wide) {
#pragma omp simd
    for (int64_t c = 0; c < columns; c++) wide[c] = load_bf16(x[c]);
}

/* inner[i][k] = sum_c x[i][c] a[k][c] */
void expertier_low_rank_inner(const uint16_t *x, int64_t rows, int64_t columns, const float *a, int64_t rank, float *inner) {
#pragma omp parallel for schedule(static) if (rows * columns * rank > ONE_THREAD)
    for (int64_t i = 0; i < rows; i++) {
        float wide[COLUMNS_AT_ONCE];
        for (int64_t k = 0; k < rank; k++) inner[i * rank + k] = 0;
        for (int64_t begin = 0; begin < columns; begin += COLUMNS_AT_ONCE) {
            int64_t count = columns - begin < COLUMNS_AT_ONCE ? columns - begin : COLUMNS_AT_ONCE;
            widen_row(x + i * columns + begin, count, wide);
            for (int64_t k = 0; k < rank; k++) {
                const float *factor = a + k * columns + begin;
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t c = 0; c < count; c++) sum += wide[c] * factor[c];
                inner[i * rank + k] += sum;
            }
        }
    }
}

/* y[i][c] += scale sum_k inner[i][k] b[k][c], rounded once */
void expertier_low_rank_add(uint16_t *y, int64_t rows, int64_t columns, const float *inner, const float *b, int64_t rank, float scale) {
#pragma omp parallel for schedule(static) if (rows * columns * rank > ONE_THREAD)
    for (int64_t i = 0; i < rows; i++) {
        float wide[COLUMNS_AT_ONCE];
        for (int64_t begin = 0; begin < columns; begin += COLUMNS_AT_ONCE) {
            int64_t count = columns - begin < COLUMNS_AT_ONCE ? columns - begin : COLUMNS_AT_ONCE;
            uint16_t *row = y + i * columns + begin;
            widen_row(row, count, wide);
            for (int64_t k = 0; k < rank; k++) {
                const float *factor = b + k * columns + begin, by = scale * inner[i * rank + k];
#pragma omp simd
                for (int64_t c = 0; c < count; c++) wide[c] += by * factor[c];
            }
            for (int64_t c = 0; c < count; c++) row[c] = round_bf16(wide[c]);
        }
    }
}

/* out[k][c] = scale sum_i inner[i][k] x[i][c] */
void expertier_low_rank_outer(const uint16_t *x, int64_t rows, int64_t columns, const float *inner, int64_t rank, float scale, float *out) {
#pragma omp parallel for schedule(static) if (rows * columns * rank > ONE_THREAD)
    for (int64_t begin = 0; begin < columns; begin += COLUMNS_AT_ONCE) {
        int64_t count = columns - begin < COLUMNS_AT_ONCE ? columns - begin : COLUMNS_AT_ONCE;
        float wide[COLUMNS_AT_ONCE];
        for (int64_t k = 0; k < rank; k++)
            for (int64_t c = 0; c < count; c++) out[k * columns + begin + c] = 0;
        for (int64_t i = 0; i < rows; i++) {
            widen_row(x + i * columns + begin, count, wide);
            for (int64_t k = 0; k < rank; k++) {
                float *sums = out + k * columns + begin, by = scale * inner[i * rank + k];
#pragma omp simd
                for (int64_t c = 0; c < count; c++) sums[c] += by * wide[c];
            }
        }
    }
}
