/* See choice.h. Sources of the orders, of PyTorch: aten/src/ATen/native/cpu/SoftMaxKernel.cpp (softmax), TopKImpl.h (which of
   equal scores are chosen), ATen/cpu/vec (exp to 20 units in the last place); and of the GNU C++ library: bits/stl_algo.h
   (nth_element). This file must be compiled without contraction of products and sums. */

#include "choice.h"

#include "../bfloat16.h"
#include "../calls.h"

#include <math.h>

/* --- softmax ------------------------------------------------------------------------------------------------------ */

static inline float power_of_two(int32_t power) {
    uint32_t bits = (uint32_t)(power + 127) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* exp(x) = 2^n exp(x - n ln 2), a polynomial of degree 7 in the rest. */
static inline float vector_exp(float x) {
    float n = rintf(x * 0x1.715476p+0f), rest = fmaf(n, -0x1.62e4p-1f, x);
    rest = fmaf(n, -0x1.7f7d1cp-20f, rest);
    float y = fmaf(0.000198527617612853646278381f, rest, 0.00139304355252534151077271f);
    y = fmaf(y, rest, 0.00833336077630519866943359f);
    y = fmaf(y, rest, 0.0416664853692054748535156f);
    y = fmaf(y, rest, 0.166666671633720397949219f);
    y = fmaf(y, rest, 0.5f);
    y = 1.0f + fmaf(rest * rest, y, rest);
    int32_t whole = (int32_t)fmaxf(n, -160.0f), half = whole >> 1;
    return x < -104.0f ? 0.0f : y * power_of_two(half) * power_of_two(whole - half);
}

static float largest_of(const float *value, int64_t count) {
    float most = value[0];
    for (int64_t i = 1; i < count; i++) most = value[i] > most ? value[i] : most;
    return most;
}

/* Number i is added to sum i % lanes; halves of the sums are added to each other. */
static float add_side_by_side(const float *value, int64_t count, int lanes) {
    float sum[MOST_LANES] = {value[0]};
    if (count < lanes) {
        for (int64_t i = 1; i < count; i++) sum[0] += value[i];
        return sum[0];
    }
    memcpy(sum, value, (size_t)lanes * sizeof *sum);
    for (int64_t i = lanes; i < count; i++) sum[i & (lanes - 1)] += value[i];
    for (int half = lanes / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) sum[lane] += sum[lane + half];
    return sum[0];
}

static void softmax(float *value, int64_t count, int lanes) {
    float most = largest_of(value, count);
    for (int64_t i = 0; i < count; i++) value[i] = vector_exp(value[i] - most);
    float scale = 1.0f / add_side_by_side(value, count, lanes);
    for (int64_t i = 0; i < count; i++) value[i] *= scale;
}

/* That of a few bfloat16 numbers, fewer than torch takes side by side. */
static void softmax_of_few(float *value, int64_t count) {
    float most = largest_of(value, count), sum = 0;
    for (int64_t i = 0; i < count; i++) sum += value[i] = expf(value[i] - most);
    for (int64_t i = 0; i < count; i++) value[i] = load_bf16(round_bf16(value[i] / sum));
}

/* --- the largest -------------------------------------------------------------------------------------------------- */

struct scored {
    float score;
    int32_t expert;
};

static inline void swap(struct scored *a, struct scored *b) {
    struct scored kept = *a;
    *a = *b;
    *b = kept;
}

/* Larger scores come first; equal ones keep their order. */
static void sort_few(struct scored *first, int64_t count) {
    for (int64_t i = 1; i < count; i++) {
        struct scored moved = first[i];
        int64_t place = i;
        for (; place > 0 && moved.score > first[place - 1].score; place--) first[place] = first[place - 1];
        first[place] = moved;
    }
}

/* Brings the median of three to `to`. */
static void take_median(struct scored *to, struct scored *a, struct scored *b, struct scored *c) {
    if (a->score > b->score)
        swap(to, b->score > c->score ? b : a->score > c->score ? c : a);
    else
        swap(to, a->score > c->score ? a : b->score > c->score ? c : b);
}

/* Scores that are at least the pivot's come before those that are at most that; where the second ones begin. */
static int64_t part(struct scored *at, int64_t first, int64_t last, float pivot) {
    for (;; first++) {
        while (at[first].score > pivot) first++;
        for (last--; pivot > at[last].score;) last--;
        if (first >= last) return first;
        swap(&at[first], &at[last]);
    }
}

/* The largest come first, in torch's order of equal ones. 0 if the parts do not get small soon, where torch would go on otherwise. */
static int bring_largest(struct scored *at, int64_t count, int64_t chosen) {
    int64_t first = 0, last = count;
    int turns = 2 * (63 - __builtin_clzll((uint64_t)count));
    while (last - first > 3) {
        if (turns-- == 0) return 0;
        take_median(&at[first], &at[first + 1], &at[first + (last - first) / 2], &at[last - 1]);
        int64_t cut = part(at, first + 1, last, at[first].score);
        if (cut <= chosen - 1)
            first = cut;
        else
            last = cut;
    }
    sort_few(at + first, last - first);
    sort_few(at, chosen - 1);
    return 1;
}

/* --- the choice --------------------------------------------------------------------------------------------------- */

/* The experts, best first, and their weights; 0 if torch has to choose: there are scores that are no numbers, or see above. */
int expertier_choose(const struct choice *how, const uint16_t *logits, int64_t *expert, void *weight) {
    int64_t experts = how->experts, chosen = how->chosen;
    float score[experts], found[MOST_CHOSEN];
    struct scored order[experts];
    for (int64_t i = 0; i < experts; i++) score[i] = load_bf16(logits[i]);
    if (how->rule == SOFTMAX_FIRST) softmax(score, experts, how->lanes);
    for (int64_t i = 0; i < experts; i++) {
        if (isnan(score[i])) return 0;
        order[i] = (struct scored){score[i], (int32_t)i};
    }
    if (!bring_largest(order, experts, chosen)) return 0;
    for (int64_t k = 0; k < chosen; k++) {
        expert[k] = order[k].expert;
        found[k] = order[k].score;
    }
    if (how->rule == LARGEST_FIRST) softmax_of_few(found, chosen);
    if (how->normalises) {
        float sum = expertier_sum(found, chosen);
        for (int64_t k = 0; k < chosen; k++) found[k] /= sum;
    }
    for (int64_t k = 0; k < chosen; k++)
        if (how->is_rounded)
            ((uint16_t *)weight)[k] = round_bf16(found[k]);
        else
            ((float *)weight)[k] = found[k];
    return 1;
}
