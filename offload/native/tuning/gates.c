/* Gates of experts and their gradients, from tables with a number for each of the 65536 bfloat16 numbers. */

#include <stddef.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../bfloat16.h"

enum { GATED_AT_ONCE = 256 };

/* hidden = gate[g] linear[u], or gate[g] alone; the slopes are derivatives. Without `linear`, it is u itself. */
struct gate_tables {
    const float *gate, *gate_slope, *linear, *linear_slope;
    int is_gated, is_interleaved;
};

/* Some outputs of the first product: what the gate makes of both parts, and the slopes if they are wanted. */
struct gated {
    float gate[GATED_AT_ONCE], linear[GATED_AT_ONCE], gate_slope[GATED_AT_ONCE], linear_slope[GATED_AT_ONCE];
};

static inline void look_up(const float *table, const uint16_t *bits, int64_t count, float *out) {
#if defined(__AVX512F__)
    for (int64_t j = 0; j < count; j += 16) {
        __m512i places = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(bits + j)));
        _mm512_storeu_ps(out + j, _mm512_i32gather_ps(places, table, sizeof *table));
    }
#else
    for (int64_t j = 0; j < count; j++) out[j] = table[bits[j]];
#endif
}

/* Numbers that lie `step` apart, side by side. */
static inline void take_part(const uint16_t *from, int64_t step, int64_t count, uint16_t *part) {
    if (step == 1)
        memcpy(part, from, (size_t)count * sizeof *part);
    else
        for (int64_t j = 0; j < count; j++) part[j] = from[2 * j];
}

static inline void fill(float value, int64_t count, float *out) {
    for (int64_t j = 0; j < count; j++) out[j] = value;
}

static void gate_some(const struct gate_tables *by, const uint16_t *g, const uint16_t *u, int64_t count, int has_slopes, struct gated *out) {
    int64_t step = by->is_interleaved ? 2 : 1;
    uint16_t part[GATED_AT_ONCE] = {0}; /* whole vectors are looked up */
    take_part(g, step, count, part);
    look_up(by->gate, part, count, out->gate);
    if (has_slopes) look_up(by->gate_slope, part, count, out->gate_slope);
    if (!by->is_gated) {
        fill(1, count, out->linear);
        return;
    }
    take_part(u, step, count, part);
    if (by->linear) {
        look_up(by->linear, part, count, out->linear);
        if (has_slopes) look_up(by->linear_slope, part, count, out->linear_slope);
    } else {
        for (int64_t j = 0; j < count; j++) out->linear[j] = load_bf16(part[j]);
        fill(1, count, out->linear_slope);
    }
}

/* Where the parts of `row` begin, for the hidden number `j`. */
static inline const uint16_t *gate_part(const struct gate_tables *by, const uint16_t *row, int64_t j) { return row + (by->is_interleaved ? 2 * j : j); }
static inline const uint16_t *linear_part(const struct gate_tables *by, const uint16_t *row, int64_t width, int64_t j) {
    return row + (by->is_interleaved ? 2 * j + 1 : width + j);
}

/* hidden[i][j] of `up`, the first product's outputs, rounded; if `weight` is not NULL, times weight[i] and rounded again. */
void expertier_gate(const struct gate_tables *by, const uint16_t *up, int64_t rows, int64_t width, const float *weight, uint16_t *hidden) {
    int64_t across = by->is_gated ? 2 * width : width;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t begin = 0; begin < width; begin += GATED_AT_ONCE) {
            int64_t count = width - begin < GATED_AT_ONCE ? width - begin : GATED_AT_ONCE;
            const uint16_t *row = up + i * across;
            uint16_t *out = hidden + i * width + begin;
            struct gated some;
            gate_some(by, gate_part(by, row, begin), linear_part(by, row, width, begin), count, 0, &some);
            for (int64_t j = 0; j < count; j++) out[j] = round_bf16(some.gate[j] * some.linear[j]);
            if (weight)
                for (int64_t j = 0; j < count; j++) out[j] = round_bf16(load_bf16(out[j]) * weight[i]);
        }
}

/* From `grad`, the gradient of weighted hidden numbers, that of the weights, and in the place of `up` that of `up`. */
void expertier_gate_back(const struct gate_tables *by, uint16_t *up, int64_t rows, int64_t width, const float *weight, const uint16_t *grad,
                         float *weight_grad) {
    int64_t across = by->is_gated ? 2 * width : width, step = by->is_interleaved ? 2 : 1;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        weight_grad[i] = 0;
        for (int64_t begin = 0; begin < width; begin += GATED_AT_ONCE) {
            int64_t count = width - begin < GATED_AT_ONCE ? width - begin : GATED_AT_ONCE;
            uint16_t *g = (uint16_t *)gate_part(by, up + i * across, begin), *u = (uint16_t *)linear_part(by, up + i * across, width, begin);
            struct gated some;
            float wide[GATED_AT_ONCE], sum = 0;
            gate_some(by, g, u, count, 1, &some);
#pragma omp simd
            for (int64_t j = 0; j < count; j++) wide[j] = load_bf16(grad[i * width + begin + j]);
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < count; j++) sum += wide[j] * some.gate[j] * some.linear[j];
            weight_grad[i] += sum;
            for (int64_t j = 0; j < count; j++) g[j * step] = round_bf16(wide[j] * weight[i] * some.linear[j] * some.gate_slope[j]);
            if (by->is_gated)
                for (int64_t j = 0; j < count; j++) u[j * step] = round_bf16(wide[j] * weight[i] * some.gate[j] * some.linear_slope[j]);
        }
    }
}
