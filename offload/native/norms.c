/* Root-mean-square norms of few rows in bfloat16, with the bits of torch's operations one after the other.

   Source of the order of summation: aten/src/ATen/native/cpu/SumKernel.cpp of PyTorch. This file must be compiled without
   contraction of products and sums. */

#include "bfloat16.h"

#include <math.h>

enum { LANES = 8, CHAINS = 4, LEVELS = 4, LEAST_POWER = 4 };

static int power_of_level(int64_t steps) {
    int power = 0;
    while ((int64_t)1 << power < steps) power++;
    return power / LEVELS > LEAST_POWER ? power / LEVELS : LEAST_POWER;
}

/* Lanes of four chains; sums of 2^power steps go one level up, where as many of them make a sum of the next. */
static void add_steps(const float *square, int64_t steps, float sums[CHAINS][LANES]) {
    float level[LEVELS][CHAINS][LANES] = {{{0}}};
    int power = power_of_level(steps);
    for (int64_t step = 0; step < steps;) {
        for (int chain = 0; chain < CHAINS; chain++)
            for (int lane = 0; lane < LANES; lane++) level[0][chain][lane] += square[(step * CHAINS + chain) * LANES + lane];
        step++;
        if (step & (((int64_t)1 << power) - 1)) continue;
        for (int up = 1; up < LEVELS; up++) {
            for (int chain = 0; chain < CHAINS; chain++)
                for (int lane = 0; lane < LANES; lane++) {
                    level[up][chain][lane] += level[up - 1][chain][lane];
                    level[up - 1][chain][lane] = 0;
                }
            if (step & ((((int64_t)1 << power) - 1) << (up * power))) break;
        }
    }
    for (int up = 1; up < LEVELS; up++)
        for (int chain = 0; chain < CHAINS; chain++)
            for (int lane = 0; lane < LANES; lane++) level[0][chain][lane] += level[up][chain][lane];
    memcpy(sums, level[0], sizeof level[0]);
}

float expertier_sum(const float *value, int64_t count) {
    float sums[CHAINS][LANES], total = 0;
    int64_t vectors = count / LANES, steps = vectors / CHAINS;
    add_steps(value, steps, sums);
    for (int64_t vector = steps * CHAINS; vector < vectors; vector++)
        for (int lane = 0; lane < LANES; lane++) sums[0][lane] += value[vector * LANES + lane];
    for (int chain = 1; chain < CHAINS; chain++)
        for (int lane = 0; lane < LANES; lane++) sums[0][lane] += sums[chain][lane];
    for (int64_t i = vectors * LANES; i < count; i++) total += value[i];
    for (int lane = 0; lane < LANES; lane++) total += sums[0][lane];
    return total;
}

/* y = w * (x / sqrt(mean(x^2) + eps)) for each row; rounded before the product with w as well if `rounds_first`.
   `square` is room for one row. */
void expertier_rms_norm(int rounds_first, const uint16_t *x, const uint16_t *w, float eps, float *square, uint16_t *y,
                        int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; row++, x += columns, y += columns) {
        for (int64_t i = 0; i < columns; i++) square[i] = load_bf16(x[i]) * load_bf16(x[i]);
        float scale = 1.0f / sqrtf(expertier_sum(square, columns) / (float)columns + eps);
        for (int64_t i = 0; i < columns; i++) {
            float normed = load_bf16(x[i]) * scale;
            if (rounds_first) normed = load_bf16(round_bf16(normed));
            y[i] = round_bf16(load_bf16(w[i]) * normed);
        }
    }
}
