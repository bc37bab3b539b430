/* Root-mean-square norms and rotary positions of few rows in bfloat16, with the bits of torch's operations one after the other.

   Source of the order of summation: aten/src/ATen/native/cpu/SumKernel.cpp of PyTorch. This file must be compiled without
   contraction of products and sums. */

#include "bfloat16.h"
#include "calls.h"

#include <math.h>

enum { LANES = 8, CHAINS = 4, LEVELS = 4, LEAST_POWER = 4, ONE_THREAD = 1 << 15 };

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

/* Fewer numbers than lanes: four chains of single ones. */
static float add_few(const float *value, int64_t count) {
    float sums[CHAINS] = {0};
    int64_t whole = count / CHAINS * CHAINS;
    for (int64_t i = 0; i < count; i++) sums[i < whole ? i % CHAINS : 0] += value[i];
    for (int chain = 1; chain < CHAINS; chain++) sums[0] += sums[chain];
    return sums[0];
}

float expertier_sum(const float *value, int64_t count) {
    if (count < LANES) return add_few(value, count);
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
   The caller sees to it that a row in float32 fits on the stack. */
void expertier_rms_norm(int rounds_first, const uint16_t *x, const uint16_t *w, float eps, uint16_t *y, int64_t rows,
                        int64_t columns) {
#pragma omp parallel for schedule(static) if (rows * columns > ONE_THREAD)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *of = x + row * columns;
        uint16_t *to = y + row * columns;
        float square[columns];
        for (int64_t i = 0; i < columns; i++) square[i] = load_bf16(of[i]) * load_bf16(of[i]);
        float scale = 1.0f / sqrtf(expertier_sum(square, columns) / (float)columns + eps);
        for (int64_t i = 0; i < columns; i++) {
            float normed = load_bf16(of[i]) * scale;
            if (rounds_first) normed = load_bf16(round_bf16(normed));
            to[i] = round_bf16(load_bf16(w[i]) * normed);
        }
    }
}

/* From the gradient of y, that of x: scale * (w grad - x scale^2 mean(w grad x)), in float32, rounded once. */
void expertier_rms_norm_back(const uint16_t *x, const uint16_t *w, float eps, const uint16_t *grad, uint16_t *x_grad, int64_t rows,
                             int64_t columns) {
#pragma omp parallel for schedule(static) if (rows * columns > ONE_THREAD)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *of = x + row * columns, *from = grad + row * columns;
        uint16_t *to = x_grad + row * columns;
        float squares = 0, along = 0;
#pragma omp simd reduction(+ : squares, along)
        for (int64_t i = 0; i < columns; i++) {
            float value = load_bf16(of[i]);
            squares += value * value;
            along += value * load_bf16(w[i]) * load_bf16(from[i]);
        }
        float scale = 1.0f / sqrtf(squares / (float)columns + eps), by = scale * scale * along / (float)columns;
        for (int64_t i = 0; i < columns; i++)
            to[i] = round_bf16(scale * (load_bf16(w[i]) * load_bf16(from[i]) - load_bf16(of[i]) * by));
    }
}

/* y = x * cos + (-second half of x, first half of x) * sin for the first `rotated` columns of each row, each product and the sum
   rounded; the other columns stay. Both halves share the angles if there are only `rotated` / 2 of them. */
void expertier_rotate(const uint16_t *x, uint16_t *y, int64_t rows, int64_t columns, int64_t rotated, const uint16_t *cos,
                      const uint16_t *sin, int64_t angles) {
    int64_t half = rotated / 2, second = angles == rotated ? half : 0;
    for (int64_t row = 0; row < rows; row++, x += columns, y += columns) {
        for (int64_t i = 0; i < half; i++) {
            float low = load_bf16(x[i]), high = load_bf16(x[half + i]);
            float low_cos = load_bf16(round_bf16(low * load_bf16(cos[i])));
            float high_sin = load_bf16(round_bf16(-high * load_bf16(sin[i])));
            float high_cos = load_bf16(round_bf16(high * load_bf16(cos[second + i])));
            float low_sin = load_bf16(round_bf16(low * load_bf16(sin[second + i])));
            y[i] = round_bf16(low_cos + high_sin);
            y[half + i] = round_bf16(high_cos + low_sin);
        }
        memcpy(y + rotated, x + rotated, (size_t)(columns - rotated) * sizeof *y);
    }
}
